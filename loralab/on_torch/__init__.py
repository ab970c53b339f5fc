"""The engine in PyTorch.

oneDNN keeps a compiled program and its scratch memory for each shape that it has met, a thousand of them unless it is told
otherwise: more than a gigabyte where batches differ in length. A step needs some tens.
"""

import os

for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read when the first product is made
    os.environ.setdefault(_name, "64")
