"""One training run: data, loop, validation, checkpoints."""
