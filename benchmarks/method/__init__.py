"""The method benchmark: quantization methods at equal budget on the tiny teachers."""
