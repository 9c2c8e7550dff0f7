"""Scripts that run without the rest of fbqat_hub, and without torch."""
