"""What this project measures, and the tracked results."""
