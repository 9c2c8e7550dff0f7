"""The version of this package; written into every checkpoint."""

__version__ = "0.1.0"
