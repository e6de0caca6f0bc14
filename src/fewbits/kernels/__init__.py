"""Kernels: how a layer computes with a stored weight."""
