"""Training: data, recipes, distillation and the teachers that ship."""
