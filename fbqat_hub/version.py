"""The version of this package; written into every checkpoint."""

__version__ = "0.2.0.dev0"
