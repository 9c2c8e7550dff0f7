"""CLIP-IQA."""
