"""`python -m loralab` is `loralab`."""

from __future__ import annotations

import os
import sys

# Python puts the working folder first on its path, where a file json.py would stand in for the standard library's. It goes,
# unless loralab itself is imported from it.
if sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]

from loralab.cli import main

main()
