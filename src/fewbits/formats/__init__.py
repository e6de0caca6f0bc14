"""Formats that other tools write: compressed-tensors, FP8 weights with scales."""
