"""Files and folders that are whole or not there, whatever happens while they are written.

Everything is written beside its place, under a name that ends in `.part`, and moved there when it is complete. What a
killed process has left beside the place is removed when the same thing is written again. Files get the permissions that
the user's umask gives, also where a library such as safetensors would make them readable by their owner alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = ".part"
# How libraries written in Rust (safetensors, tokenizers) spell an error of the system.
OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that it is whole or not there."""
    write_with(path, lambda part: part.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Writes one JSON object, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file by a function of some library, whole or not at all.

    Args:
        write: writes everything into the path that it is given.

    Raises:
        OSError: the system refused it, for example because the disk is full; nothing is left behind.
    """
    part = path.with_name(path.name + PART)
    try:
        with system_errors(path):
            mode = _new_file_mode(part)
            write(part)
            part.chmod(mode)
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`; what is in it at the end becomes `folder`, or is moved into it where it is there.

    Raises:
        OSError: the system refused it, for example because the disk is full; nothing is left behind.
    """
    folder = folder.absolute()
    part = folder.with_name(f".{folder.name}{PART}")
    try:
        with system_errors(folder):
            if part.exists():  # left by a process that was killed
                shutil.rmtree(part)
            part.mkdir(parents=True)
            yield part
            _give_usual_modes(part)
            _move(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _move(part: Path, folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        for file in sorted(part.iterdir()):
            os.replace(file, folder / file.name)
        part.rmdir()
        return
    if folder.is_dir():
        folder.rmdir()
    os.replace(part, folder)


def _new_file_mode(path: Path) -> int:
    """Makes an empty file; returns its permissions, those of the umask."""
    path.unlink(missing_ok=True)
    path.touch()
    return stat.S_IMODE(path.stat().st_mode)


def _give_usual_modes(folder: Path) -> None:
    probe = folder / PART
    mode = _new_file_mode(probe)
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turns a library's own report of an error of the system, such as a full disk, into the OSError that Python has for it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    except Exception as error:  # safetensors has a class of its own, tokenizers none
        found = OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found.group(1))
        raise OSError(number, os.strerror(number), str(path)) from error
