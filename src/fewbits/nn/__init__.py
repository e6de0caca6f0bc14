"""Quantized modules, and putting them in the place of float ones."""
