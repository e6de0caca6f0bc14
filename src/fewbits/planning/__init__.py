"""Choose a scheme for every tensor under a budget of bytes or of errors."""
