"""The work between prepare and save: in memory, from file to file, on several processes."""
