"""A docstring starts with a verb or a noun, and not with a fragment such as "What it is"."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FRAGMENT = re.compile(r"(What|Whether|Of|The same|Those|How|That of|Which|Where)\b")
SHARE = 0.01  # of all docstrings that may be one


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those of attributes too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text
        if isinstance(node, (ast.Module, ast.ClassDef)):
            for before, each in zip(node.body, node.body[1:], strict=False):
                documented = isinstance(before, (ast.Assign, ast.AnnAssign))
                if documented and isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
                    yield each.lineno, str(each.value.value)


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = [(path, *each) for path in sorted((ROOT / "loralab").rglob("*.py")) for each in docstrings(path)]
    fragments = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}" for path, line, text in found if FRAGMENT.match(text)
    ]
    assert len(found) > 2000
    assert len(fragments) <= SHARE * len(found), "\n".join(fragments)
