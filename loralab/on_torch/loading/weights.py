"""Weight files to tensors, one at a time; all files are looked at before the first is read."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from loralab.errors import ModelError
from loralab.models.checkpoint_files import first_line, open_file, weight_files


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Reads every tensor of the folder's weight files.

    Raises:
        ModelError: a file is missing or damaged.
    """
    shards = weight_files(folder)
    for shard in shards:
        if shard.suffix == ".safetensors":
            with open_file(shard, "pt") as file:
                yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (a file, not a dict)
        else:
            yield from _read_pickle(shard).items()


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """A `.bin`, by the reader that takes tensors only and runs no code; mapped from disk, but for the format of before PyTorch 1.6."""
    try:
        tensors: dict[str, Tensor] = torch.load(
            path, weights_only=True, mmap=zipfile.is_zipfile(path), map_location="cpu"
        )
    except Exception as error:  # pickle, zip and torch each raise their own
        raise ModelError(
            f"{path} cannot be read as weights ({first_line(error)}). Download or copy it again."
        ) from error
    return tensors


@contextmanager
def quiet_transformers(warnings: bool = True) -> Iterator[None]:
    """Transformers without its progress bars, which would stand among ours; without its warnings, where we say all that they do."""
    from transformers.utils import logging

    was_enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not warnings:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_enabled:
            logging.enable_progress_bar()
