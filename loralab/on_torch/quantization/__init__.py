"""Weights in int8 and nf4."""
