"""Peak signal-to-noise ratio."""
