"""The commands as Python functions: `loralab.train`, `compare`, `evaluate`, `plan`, `score` and `generate`.

Each takes what the command takes and returns an object with the numbers, which a notebook shows as tables and pictures.
"""
