"""Files and folders are whole or not there: after an error, a kill, a full disk; and readable as the umask says."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from processes import Process
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models
from workshop import loralab

from loralab.atomic_files import whole_folder, write_bytes, write_with


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may become larger, which stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_library_that_writes_its_own_file_gets_the_usual_permissions(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(3, np.float32)}
    before = os.umask(0o002)
    try:
        write_with(tmp_path / "one.safetensors", lambda part: save_file(tensors, part))
        with whole_folder(tmp_path / "folder") as part:
            save_file(tensors, part / "two.safetensors")
            (part / "within").mkdir()
            save_file(tensors, part / "within/three.safetensors")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o664}


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_with(tmp_path / "file", fail)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "folder") as part:
        fail(part / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder/a").read_text() == "old"


def test_a_folder_that_is_there_keeps_its_other_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in "ab":
        (tmp_path / "folder" / name).write_text("old")
    with whole_folder(tmp_path / "folder") as part:
        (part / "a").write_text("new")
    assert {path.name: path.read_text() for path in (tmp_path / "folder").iterdir()} == {"a": "new", "b": "old"}


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".folder.part").mkdir()
    (tmp_path / ".folder.part/old").touch()
    (tmp_path / "file.part").write_text("half")
    with whole_folder(tmp_path / "folder") as part:
        (part / "new").touch()
    write_bytes(tmp_path / "file", b"whole")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["file", "folder", "folder/new"]


@pytest.mark.parametrize("library", ["python", "safetensors", "tokenizers"])
def test_a_full_disk_is_the_systems_error_whoever_meets_it(library: str, tmp_path: Path) -> None:
    text = "x" * 100_000

    def write(part: Path) -> None:
        if library == "safetensors":
            save_file({"a": np.zeros(100_000, np.float32)}, part)
        elif library == "tokenizers":
            Tokenizer(models.WordLevel({text: 0}, unk_token=text)).save(str(part))
        else:
            part.write_text(text)

    with largest_file(10_000), pytest.raises(OSError, match="File too large") as raised:
        write_with(tmp_path / "file", write)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    loralab(place, "train", str(workshop / "tiny.yaml"), "training.epochs=1", "--out", "run")
    return place / "run"


def test_merge_leaves_nothing_where_the_disk_is_full(run: Path, tmp_path: Path) -> None:
    process = Process(tmp_path, ("merge", str(run), "--out", "merged"), file_size=100_000)
    assert process.wait() == 2
    assert "the disk is full" in process.errors and "Traceback" not in process.errors
    assert list(tmp_path.iterdir()) == []
    loralab(tmp_path, "merge", str(run), "--out", "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_merge_works_again_after_a_kill(run: Path, tmp_path: Path) -> None:
    process = Process(tmp_path, ("merge", str(run), "--out", "merged"))
    while process.running() and not (tmp_path / ".merged.part").exists():
        pass
    process.signal(signal.SIGKILL)
    process.wait()
    loralab(tmp_path, "merge", str(run), "--out", "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert (tmp_path / "merged/tokenizer.json").exists()


def test_answers_are_whole_or_not_there(run: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"dialogue": "Tom: Lunch? Ann: At one."}\n' + '{"dialogue": ""}\n' * 2000)
    process = Process(tmp_path, ("generate", str(run), "--input", "in.jsonl", "--out", "out.jsonl"), file_size=20_000)
    assert process.wait() == 2
    assert "the disk is full" in process.errors and "Traceback" not in process.errors
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    loralab(tmp_path, "generate", str(run), "--input", "in.jsonl", "--out", "out.jsonl")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2001
