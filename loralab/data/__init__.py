"""The data room, in the order of the computation; NumPy only.

    sources.py (where) ──> readers.py (records) ──> rows.py (checked) ──> splits.py (in memory, or an index)
        ──> prompts.py ──> tokenization.py (token ids, in cache.py's files) ──> batches.py (padded arrays)

Import from the files: `encode` is one of them and its function.
"""
