"""What can be quantized (a module, a state dict, a file), and what comes out: one source and one target for each."""
