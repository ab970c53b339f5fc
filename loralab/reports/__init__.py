"""Plots and texts made from the records of runs."""
