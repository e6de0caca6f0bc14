"""Sources (modules, state dicts, checkpoint files) to read tensors from, and targets that collect the results."""
