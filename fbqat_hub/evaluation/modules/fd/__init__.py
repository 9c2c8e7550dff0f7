"""Fréchet distance on the extractor that ships."""
