"""Rows are checked and tokenised once, whatever becomes of the process that does it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import INSTRUCTION, ROWS, index, read, real_rows, split_of, write_csv, write_jsonl
from tiny import make_tokenizer

from loralab.data import tokenization as encoding
from loralab.data.cache import ArrayFile, cache_folder, cached
from loralab.data.lengths import bare_lengths
from loralab.data.prompts import Prompt
from loralab.data.tokenization import ARRAYS, encode, tokenizer_key
from loralab.data.tokenized_split import EncodedSplit
from loralab.errors import DataError

PROMPT = Prompt(INSTRUCTION, "dialogue")


def assert_same(a: EncodedSplit, b: EncodedSplit) -> None:
    for name in ("numbers", *(name for name in ARRAYS if name != "kept")):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.findings == b.findings


def entries(cache: Path) -> list[str]:
    return sorted(entry.name for entry in cache.iterdir())


# Reuse.


def test_a_second_run_reads_no_row_and_tokenises_nothing(
    data_folder: Path, t5: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = index(data_folder / "dialogsum", "validation")
    first = encode(rows, t5, PROMPT, 256, 48)
    held = read(data_folder / "dialogsum", "validation")
    assert not rows.index.reused and not first.reused and first.source_ids.flags.writeable is False
    monkeypatch.setattr(encoding, "token_ids", lambda *_: pytest.fail("tokenised again"))
    monkeypatch.setitem(sys.modules["loralab.data.readers"].READERS, ".jsonl.gz", lambda _: pytest.fail("read again"))
    again = index(data_folder / "dialogsum", "validation")
    assert again.index.reused
    for rows_again in (again, held):
        second = encode(rows_again, t5, PROMPT, 256, 48)
        assert second.reused
        assert_same(first, second)
    assert again.sample_of_targets() == [example.targets[0] for example in held]
    np.testing.assert_array_equal(again.source_hashes, held.source_hashes)


def test_the_same_texts_elsewhere_share_tokens_and_keep_their_row_numbers(
    t5: Any, cache: Path, data_folder: Path, tmp_path: Path
) -> None:
    rows = real_rows(data_folder / "dialogsum", "validation")[:50]
    write_jsonl(tmp_path / "train.jsonl", [{"dialogue": " ", "summary": "empty"}, *rows])
    write_csv(tmp_path / "test.csv", rows)
    first = encode(index(tmp_path), t5, PROMPT, 256, 24)
    second = encode(index(tmp_path, "test"), t5, PROMPT, 256, 24)
    assert second.reused
    np.testing.assert_array_equal(first.numbers, second.numbers + 1)
    shifted = [row + 1 for row in second.findings["long_targets"].rows]
    assert first.findings["long_targets"].rows == shifted != []


def test_whatever_tokens_depend_on_makes_an_entry_of_its_own(tokenizers: dict[str, Any], cache: Path) -> None:
    rows, t5 = split_of(("one two", "three")), tokenizers["t5"]
    other_eos = make_tokenizer(["one two three"])
    other_eos.eos_token = "two"
    variants: list[tuple[Any, ...]] = [
        (rows, t5, Prompt("{source}"), 9, 9),
        (split_of(("one two", "three")), t5, Prompt("a {source}"), 9, 9),
        (split_of(("one", "two three")), t5, Prompt("{source}"), 9, 9),
        (rows, t5, Prompt("{source}"), 8, 9),
        (rows, t5, Prompt("{source}"), 9, 8),
        (rows, t5, Prompt("{source}"), 9, 9, "skip"),
        (rows, tokenizers["gpt2"], Prompt("{source}"), 9, 9),
        (rows, make_tokenizer(["one two three"]), Prompt("{source}"), 9, 9),
        (rows, make_tokenizer(["one two four"]), Prompt("{source}"), 9, 9),
        (rows, other_eos, Prompt("{source}"), 9, 9),
    ]
    assert not any(encode(*variant).reused for variant in variants)
    assert all(encode(*variant).reused for variant in variants)
    assert bare_lengths(rows, t5, "source").tolist() == [3] and bare_lengths(rows, t5, "target").tolist() == [2]


def test_whatever_chooses_rows_makes_an_index_of_its_own(cache: Path, tmp_path: Path) -> None:
    rows = [{**row, "title": "t", "text": row["dialogue"] + "<br />"} for row in ROWS]
    write_jsonl(tmp_path / "train.jsonl", rows)
    one_file = write_jsonl(tmp_path / "test.jsonl", rows)
    variants: list[dict[str, Any]] = [
        {},
        {"source": "text"},
        {"target": "title"},
        {"max_train_rows": 2},
        {"html_breaks": "newline"},
        {"duplicate_rows": "skip"},
        {"name": str(one_file)},
    ]
    assert not any(index(tmp_path, **variant).index.reused for variant in variants)
    assert not index(one_file, "test").index.reused
    assert all(index(tmp_path, **variant).index.reused for variant in variants)
    write_jsonl(tmp_path / "train.jsonl", [*rows, rows[0] | {"dialogue": "new"}])
    assert not index(tmp_path).index.reused and len(index(tmp_path)) == 4


def test_what_another_call_asked_of_the_tokenizer_does_not_show(tokenizers: dict[str, Any]) -> None:
    key = tokenizer_key(tokenizers["t5"])
    tokenizers["t5"]("one two three", truncation=True, max_length=2, padding="max_length")
    assert tokenizer_key(tokenizers["t5"]) == key


# Damage.


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a file is missing": ("source_ids.npy", Path.unlink),
    "a file is cut short": ("source_ids.npy", cut_short),
    "a bit is another": ("target_ids.npy", flip),
    "a file is empty": ("kept.npy", lambda file: file.write_bytes(b"") and None),
    "the list is missing": ("entry.json", Path.unlink),
    "the list is cut short": ("entry.json", cut_short),
    "the list is something else": ("entry.json", lambda file: file.write_text("[]") and None),
    "all is missing": (".", shutil.rmtree),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_anew(damage: str, cache: Path) -> None:
    rows, tokenizer = split_of(("one two", "three"), ("four", "five six")), make_tokenizer(["one two three four five"])
    first = encode(rows, tokenizer, Prompt("{source}"), 9, 9)
    whole = {name: np.array(getattr(first, name)) for name in ARRAYS if name != "kept"}
    (name,) = entries(cache)
    file, deed = DAMAGES[damage]
    deed(cache / name / file)
    again = encode(rows, tokenizer, Prompt("{source}"), 9, 9)
    assert not again.reused and entries(cache) == [name]
    for array, expected in whole.items():
        np.testing.assert_array_equal(getattr(again, array), expected)
    assert encode(rows, tokenizer, Prompt("{source}"), 9, 9).reused


def test_an_error_or_a_stop_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*ROWS, {"dialogue": "", "summary": ""}])
    with pytest.raises(DataError, match=r"data\.empty_rows is stop"):
        index(tmp_path, empty_rows="stop")

    def interrupted(folder: Path) -> dict[str, Any]:
        (folder / "half.npy").write_bytes(b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("tokens", {}, interrupted)
    assert entries(cache) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from loralab.data.cache import cached
def build(folder):
    (folder / "half.npy").write_bytes(b"x")
    os.kill(os.getpid(), signal.SIGKILL)
cached("tokens", {"key": 1}, build)
"""


def test_a_killed_process_leaves_nothing_that_is_trusted(cache: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = entries(cache)
    assert left.endswith(".part")

    def build(folder: Path) -> dict[str, Any]:
        with ArrayFile(folder / "numbers.npy", "<i4") as file:
            file.append([1, 2, 3])
        return {"made": "anew"}

    entry = cached("tokens", {"key": 1}, build)
    assert (entry.facts, entry.array("numbers").tolist()) == ({"made": "anew"}, [1, 2, 3])
    yesterday = time.time() - 2 * 86400
    os.utime(cache / left, (yesterday, yesterday))
    cached("tokens", {"key": 2}, build)
    assert left not in entries(cache) and len(entries(cache)) == 2


def test_of_two_processes_the_slower_one_takes_what_the_faster_made(cache: Path) -> None:
    def slow(folder: Path) -> dict[str, Any]:
        faster = cached("tokens", {"key": 1}, lambda folder: {"made by": "the faster"})
        assert not faster.reused
        return {"made by": "the slower"}

    assert cached("tokens", {"key": 1}, slow).facts == {"made by": "the faster"}
    assert len(entries(cache)) == 1


def test_what_was_not_used_for_a_month_goes(cache: Path) -> None:
    for key in ("old", "used again"):
        cached("tokens", {"key": key}, lambda folder: {})
    long_ago = time.time() - 31 * 86400
    for name in entries(cache):
        os.utime(cache / name, (long_ago, long_ago))
    assert cached("tokens", {"key": "used again"}, lambda folder: {}).reused
    cached("tokens", {"key": "new"}, lambda folder: {})
    assert len(entries(cache)) == 2 and cached("tokens", {"key": "used again"}, lambda folder: {}).reused


# The place.


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORALAB_CACHE", "~/here")
    assert cache_folder() == Path.home() / "here"
    monkeypatch.delenv("LORALAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "loralab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/loralab"


def test_a_cache_that_cannot_be_written_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"file/cache cannot be written to .*LORALAB_CACHE name another folder"):
        encode(split_of(("a", "b")), make_tokenizer(["a b"]), Prompt("{source}"), 9, 9)


def test_an_array_file_is_numpys_own(tmp_path: Path) -> None:
    for count in (0, 1, 99_999):
        expected = np.arange(count, dtype=np.int64) * 7
        with ArrayFile(tmp_path / "x.npy", "<i8") as file:
            for part in np.array_split(expected, 3):
                file.append(part)
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy", mmap_mode="r"), expected)
