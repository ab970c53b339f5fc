"""The last net: an error that nobody foresaw is one line and a file with the traceback, and not a page on the terminal."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h; a mistake of the user's is 2, a comparison with a failed variant 1
TRACEBACK = "LORALAB_TRACEBACK"  # set to 1, the traceback is printed too
LIBRARIES = (
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "pydantic",
    "numpy",
    "jax",
    "bitsandbytes",
    "peft",
)
LONGEST = 300  # characters of the error in the line


def report_crash(error: BaseException) -> int:
    """Stores the traceback, prints the line on stderr, and returns the exit code."""
    details = "\n".join(_details(error))
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        print(details, file=sys.stderr)
    print(f"loralab: {_line(error)} {_store(details)}", file=sys.stderr)
    return EXIT_CODE


def _line(error: BaseException) -> str:
    """The error in one line."""
    words = " ".join(str(error).split())
    said = "".join(letter for letter in words[:LONGEST] if letter.isprintable()) + ("…" if len(words) > LONGEST else "")
    return f"an error in loralab itself, {type(error).__name__}{': ' if said else ''}{said}."


def _store(details: str) -> str:
    """Writes the file, and says where it is and who wants it; where no file can be written, the details themselves."""
    try:
        handle, place = tempfile.mkstemp(prefix=time.strftime("loralab-%Y%m%d-%H%M%S-"), suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(details)
    except OSError as error:
        return f"The traceback could not be stored ({error}):\n{details}"
    return f"The traceback, versions and the command are in {place}. {how_to_report()}"


def how_to_report() -> str:
    """Returns what to do with the file: the page for reports where the package names one."""
    try:
        urls = importlib.metadata.metadata("loralab").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        urls = []
    parted = [str(url).partition(",") for url in urls]
    pages = {name.strip(): page.strip() for name, _, page in parted}
    page = next((pages[name] for name in ("Issues", "Bug Tracker", "Repository", "Homepage") if name in pages), None)
    whom = f"Report it at {page} with that file" if page else "Please send that file to the maintainers of loralab"
    return f"{whom}; look through it first, as it holds your command."


def _details(error: BaseException) -> Iterator[str]:
    yield f"command: {shlex.join(sys.argv)}"
    yield f"folder: {os.getcwd()}" if _has_folder() else "folder: removed"
    yield f"loralab {_version('loralab')}, Python {platform.python_version()} on {platform.platform()}"
    yield ", ".join(f"{library} {version}" for library in LIBRARIES if (version := _version(library)))
    yield "\n" + "".join(traceback.format_exception(error))


def _has_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
