"""`python -m loralab` is `loralab`."""

from __future__ import annotations

from loralab.cli import main

main()
