"""LPIPS on AlexNet."""
