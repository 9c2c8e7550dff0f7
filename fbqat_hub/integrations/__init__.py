"""Glue that registers fbqat_hub in other people's tools; one foreign library a file, no arithmetic."""
