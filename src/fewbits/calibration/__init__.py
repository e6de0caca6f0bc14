"""Run data through a model, for observers and for rounding strategies."""
