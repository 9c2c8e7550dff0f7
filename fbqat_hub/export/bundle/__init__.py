"""What a phone gets: the graphs of a whole pipeline, its host-side parts, a runner without torch, and a doctor."""
