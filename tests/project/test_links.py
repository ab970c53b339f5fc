"""The documents' links to files of the repository lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_documents import DOCUMENTS


def broken_links(document: Path) -> list[str]:
    """The targets of relative links that do not exist, as they are written."""
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8"))
    return [t for t in targets if not re.match(r"\w+:|#", t) and not (document.parent / t.partition("#")[0]).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    assert broken_links(document) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    document = tmp_path / "x.md"
    document.write_text("[a](x.md#here) [b](gone.md) [c](https://example.org/gone) [d](#here) [e](folder/gone.md#here)")
    assert broken_links(document) == ["gone.md", "folder/gone.md#here"]
