"""Compression of plain texts by xz: two floors for a language model's bits per byte, which need no model.

A model that predicts is a compressor, in as many bits as its loss says (Shannon 1948). `xz -9e` alone has seen nothing but
the text itself. After the training texts it has read what the model has: the bytes that held-out texts add to theirs. Its
window is 64 MiB, so that of more training text than that it still knows the last.

Texts follow each other without anything between them: where one ends costs xz nothing, while the model pays for each end.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Sequence

PRESET = 9 | lzma.PRESET_EXTREME
AFTER, ALONE = "xz after training texts", "xz alone"


def xz_size(texts: Iterable[str]) -> int:
    """Bytes of `xz -9e` of the texts, one after the other."""
    compressor = lzma.LZMACompressor(preset=PRESET)
    return sum(len(compressor.compress(text.encode())) for text in texts) + len(compressor.flush())


def xz_bits_per_byte(training: Iterable[str], held_out: Sequence[str]) -> dict[str, float]:
    """Both floors, in bits per byte of the held-out texts; `training` is gone through twice, so it is no iterator."""
    num_bytes = sum(len(text.encode()) for text in held_out)
    assert num_bytes, "rows without text are no rows"

    def both() -> Iterable[str]:
        yield from training
        yield from held_out

    added = xz_size(both()) - xz_size(training)
    return {AFTER: 8 * added / num_bytes, ALONE: 8 * xz_size(held_out) / num_bytes}
