"""Comparisons of several variants of one recipe."""
