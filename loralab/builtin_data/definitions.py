"""The functions and classes of a source text, as Python's own parser reads them. Nothing is imported or run."""

from __future__ import annotations

import ast
import warnings
from collections import deque
from collections.abc import Iterator

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

# Where a statement holds others, in the order of the text.
BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")


def syntax_of(source: bytes | str) -> ast.Module | None:
    """The syntax tree; None where it is not this Python's syntax."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings that will be errors one day
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def definitions(tree: ast.Module) -> Iterator[Definition]:
    """Every function and class, in the order of `ast.walk`: outer ones first.

    Only statements are visited, as no expression holds a definition: an eighth of all nodes.
    """
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, Definition):
            yield node
        for block in BLOCKS:
            waiting.extend(getattr(node, block, ()))
