"""Checking what was made against what was promised."""
