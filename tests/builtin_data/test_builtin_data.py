"""The embedded data sets: what their rows are, that nothing held out leaks into training, and that they are the same again."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageMetadata
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest

from loralab import builtin_data
from loralab.builtin_data import corpus, docstrings, stdlib
from loralab.builtin_data.definitions import Definition, definitions
from loralab.builtin_data.docstrings import REPEATS, WORDS, Row, normal, pairs_of
from loralab.config.data import DataSettings
from loralab.data.sources import splits_of
from loralab.data.splits import index_split, read_split
from loralab.errors import DataError, ModelError

NAME = "embedded:docstrings"
ROOT = str(Path(builtin_data.__file__).parents[2])

SOURCE = b'''
class Box:
    """Hold one thing and nothing else.

    A box is opened once, and then it is empty for as long as it lives.
    """

    @property
    def thing(self):
        """Return the thing that is held."""
        # the comment stays

        return self._thing

    def wrapped(self):
        """Return the thing, in a sentence that goes on
        in a second line."""
        return 1

    def short(self):
        """Return it."""

    def signature(self, a, b):
        """signature(a, b) gives back the better one"""

    def on_one_line(self): """Return nothing at all here."""

    async def empty(self):
        \'\'\'Wait until the box is empty.\'\'\'
'''


@pytest.fixture(scope="module")
def splits() -> dict[str, tuple[Row, ...]]:
    return {split: docstrings.rows(split) for split in stdlib.SPLITS}


def test_the_rows_of_one_file() -> None:
    found = {(row["kind"], row["name"]): (row["source"], row["target"]) for row in pairs_of(SOURCE, "box")}
    assert set(found) == {("class", "Box"), ("docstring", "Box"), ("function", "thing"), ("function", "empty")}
    assert found["docstring", "Box"] == (
        "A box is opened once, and then it is empty for as long as it lives.",
        "Hold one thing and nothing else.",
    )
    assert found["function", "thing"] == (
        "def thing(self):\n    # the comment stays\n    return self._thing",
        "Return the thing that is held.",
    )
    assert found["function", "empty"] == ("async def empty(self):", "Wait until the box is empty.")
    source, _ = found["class", "Box"]
    assert source.startswith("class Box:\n    @property\n    def thing(self):") and "Hold one thing" not in source
    assert list(pairs_of(b"def broken(:", "box")) == []


def test_definitions_are_those_of_a_walk_through_everything() -> None:
    count = 0
    for _, path in islice(stdlib.source_files(), 0, None, 10):
        tree = ast.parse(path.read_bytes())
        walked = [node for node in ast.walk(tree) if isinstance(node, Definition)]
        assert list(definitions(tree)) == walked
        count += len(walked)
    assert count > 1000


def is_python(source: str) -> bool:
    """Whether a definition parses, where need be with the body that was only a docstring."""
    for body in ("", "\n    pass", "\n  pass"):
        try:
            ast.parse(source + body)
        except SyntaxError:
            continue
        return True
    return False


def test_every_row_keeps_the_rules(splits: dict[str, tuple[Row, ...]]) -> None:
    for split, rows in splits.items():
        assert {stdlib.split_of(row["module"]) for row in rows} == {split}
        assert all(WORDS[0] <= len(row["target"].split()) <= WORDS[1] and row["source"].strip() for row in rows)
        assert max(Counter(normal(row["target"]) for row in rows).values()) <= REPEATS
        assert max(Counter(normal(row["source"]) for row in rows).values()) == 1
        code = [row for row in rows if row["kind"] != "docstring"]
        assert not [row for row in code if row["target"] in row["source"].splitlines()[0]]
        whole = [row for row in code if row["source"].count("\n") + 1 < docstrings.LONGEST_SOURCE]
        assert [row["name"] for row in whole if not is_python(row["source"])] == []


def test_nothing_that_is_held_out_is_trained_on(splits: dict[str, tuple[Row, ...]]) -> None:
    texts = {
        split: {normal(row[column]) for row in rows for column in ("source", "target")}
        for split, rows in splits.items()
    }
    modules = {split: {row["module"] for row in rows} for split, rows in splits.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not texts[one] & texts[other] and not modules[one] & modules[other]


def test_the_splits_are_about_80_10_10(splits: dict[str, tuple[Row, ...]]) -> None:
    total = sum(map(len, splits.values()))
    assert 5_000 < total < 8_000
    assert len(splits["train"]) / total == pytest.approx(0.8, abs=0.03)
    assert len(splits["test"]) / total == pytest.approx(0.1, abs=0.03)
    assert max(Counter(row["module"] for row in splits["test"]).values()) < 0.5 * len(splits["test"])


def test_a_module_and_its_twins_are_in_one_split() -> None:
    assert {stdlib.split_of(name) for name in ("datetime", "_datetime", "_pydatetime")} == {stdlib.split_of("datetime")}
    assert stdlib.split_of("_sre") == stdlib.split_of("re") and stdlib.split_of("ntpath") == stdlib.split_of(
        "posixpath"
    )
    assert stdlib.split_of("_collections_abc") == stdlib.split_of("collections")
    # drawn from the names alone: pinned, as a pretrained base has read the training modules
    assert {
        split: [m for m in ("json", "http", "asyncio", "zipfile", "re") if stdlib.split_of(m) == split]
        for split in stdlib.SPLITS
    } == {
        "train": ["asyncio"],
        "validation": ["json", "re"],
        "test": ["http", "zipfile"],
    }


def test_another_process_with_other_hashes_and_strict_warnings_builds_the_same() -> None:
    code = "from loralab.builtin_data import docstrings; import json; print(json.dumps(docstrings.rows('test')))"
    options = [sys.executable, "-W", "error", "-c", code]
    again = subprocess.run(
        options, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": ROOT}
    )
    assert json.loads(again.stdout) == list(docstrings.rows("test"))


def settings(**others: Any) -> DataSettings:
    return DataSettings(**{"name": NAME, "source": "source", "target": "target", **others})


def test_recipes_read_it_by_name(splits: dict[str, tuple[Row, ...]]) -> None:
    split = read_split(settings(max_test_rows=3), "test")
    assert [(e.source, e.targets) for e in split.examples] == [
        (r["source"], (r["target"],)) for r in splits["test"][:3]
    ]
    assert splits_of(NAME) == ["test", "train", "validation"]
    with pytest.raises(DataError, match=r"embedded:docstrings, split 'test', row 1: no column 'text'"):
        read_split(settings(source="text"), "test")
    with pytest.raises(
        DataError, match=r"no embedded data set 'embedded:docstring'. Did you mean 'embedded:docstrings'"
    ):
        read_split(settings(name="embedded:docstring"), "test")
    with pytest.raises(DataError, match=r"no split 'dev'. The splits are: train, validation, test"):
        read_split(settings(), "dev")
    index = index_split(settings(), "test")
    assert [(e.source, e.targets) for e in index] == [(r["source"], (r["target"],)) for r in splits["test"]]


def test_the_card_counts_what_is_there(splits: dict[str, tuple[Row, ...]]) -> None:
    card = builtin_data.card(NAME)
    assert card["rows"] == {split: len(rows) for split, rows in splits.items()}
    assert {split: sum(kinds.values()) for split, kinds in card["kinds"].items()} == card["rows"]
    assert card["python"] == ".".join(map(str, sys.version_info[:3])) and "PSF-2.0" in card["licence"]


def test_without_sources_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(
        DataError,
        match=r"has 0 source files of its standard library in .*Use a Python that is installed with its sources",
    ):
        list(stdlib.source_files())


# The corpus


class Fields(dict[str, Any]):
    """A package's metadata."""

    def get_all(self, name: str) -> list[str]:
        return list(self.get(name, []))


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ({"License-Expression": "MIT"}, "MIT"),
        ({"License-Expression": "(Apache-2.0 OR BSD-2-Clause)"}, "(Apache-2.0 OR BSD-2-Clause)"),
        ({"License-Expression": "MIT AND MPL-2.0"}, None),
        ({"Classifier": ["Topic :: X", "License :: OSI Approved :: BSD License"]}, "BSD"),
        ({"Classifier": ["License :: OSI Approved", "License :: OSI Approved :: MIT License"]}, "MIT"),
        ({"Classifier": ["License :: OSI Approved :: MIT License", "License :: OSI Approved :: GNU GPL v3"]}, None),
        ({"License": "Apache 2.0 License"}, "Apache-2.0"),
        ({"License": "GPL"}, None),
        ({}, None),
    ],
)
def test_only_permissive_licences_count(fields: dict[str, Any], licence: str | None) -> None:
    assert corpus.licence_of(cast(PackageMetadata, Fields(fields))) == licence


def install(site: Path, name: str, files: dict[str, str], licence: str = "MIT") -> None:
    """A package, as pip leaves one."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: {licence}\n\nAbout {name}, at some length.\n"
    )
    for file, text in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in [*files, f"{info.name}/METADATA"]))


def test_what_is_taken_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = next(
        row for row in docstrings.rows("test") if row["kind"] == "function" and row["source"].count("\n") > 5
    )
    head, *body = held_out["source"].splitlines()
    copied = "\n".join([head, f'    """{held_out["target"]}"""', *body])
    new = "def area(width, height):\n    return width * height  # in metres\n"
    files = {
        "good/a.py": new, "good/b.rst": "A long enough line of documentation.\n", "good/copy_of_a.py": new + "\n",
        "good/tests/x.py": "def test_one_thing(): assert area(1, 2) == 2\n", "good/_vendor/y.py": "def vendored(thing): return thing\n",
        "good/table.py": f"TABLE = [{'1, ' * 400}]\n", "good/copied.py": copied, "good/c.txt": "No such file is taken.\n",
    }  # fmt: skip
    install(tmp_path, "good", files)
    install(tmp_path, "bad", {"bad/z.py": "def of_another_licence(): return 1\n"}, licence="GPL-3.0-only")
    found = [*corpus.metadata.distributions(path=[str(tmp_path)])]
    monkeypatch.setattr(corpus.metadata, "distributions", lambda: found)
    rows = list(corpus.new_texts(list(corpus._package_rows())))
    assert {row["text"].strip() for row in rows} == {
        "About good, at some length.",
        new.strip(),
        files["good/b.rst"].strip(),
    }
    assert {(row["origin"], row["version"], row["licence"]) for row in rows} == {("good", "1.0", "MIT")}


def test_held_out_texts_are_the_standard_library_s() -> None:
    rows = corpus.rows("test")
    assert {row["origin"] for row in rows} == {"python"}
    files = [path for module, path in stdlib.source_files() if stdlib.split_of(module) == "test"]
    assert [row["text"] for row in rows] == [path.read_text("utf-8", "replace") for path in files]


def test_an_embedded_base_that_is_not_there_is_told() -> None:
    with pytest.raises(ModelError, match=r"no embedded base 'embedded:small-t5'.*loralab train pretrain-tiny-t5"):
        builtin_data.model_folder("embedded:small-t5")
