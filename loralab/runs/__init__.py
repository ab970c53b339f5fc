"""A run's folder: files, checkpoints, records, and listing."""
