"""The training step's parts."""
