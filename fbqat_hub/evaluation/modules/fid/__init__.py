"""FID by the clean-fid protocol."""
