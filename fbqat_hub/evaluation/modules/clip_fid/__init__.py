"""CLIP-FID."""
