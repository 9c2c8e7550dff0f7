"""CLIP score."""
