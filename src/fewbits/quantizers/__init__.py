"""The lifecycle and the schemes."""
