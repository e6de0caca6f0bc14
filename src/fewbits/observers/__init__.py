"""Observers: pick scale and zero point for a weight; some look at a layer's inputs first."""
