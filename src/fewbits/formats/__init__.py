"""Read weights that other tools quantized (compressed-tensors, FP8 with scales), and export to their readers."""
