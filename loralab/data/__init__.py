"""The data room, in the order of the computation; NumPy only.

    sources.py (rows of text) ──> prompts.py ──> encode.py (token ids) ──> batches.py (padded arrays)

Import from the files: `encode` is one of them and its function.
"""
