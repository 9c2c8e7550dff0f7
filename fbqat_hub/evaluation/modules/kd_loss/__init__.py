"""Distillation loss."""
