"""Plain texts for a decoder-only model, several of them in a row: no token is padding, and none sees another text.

    texts ──> <s> t t t </s> ──> windows of at most `length` tokens ──> rows of `length`, filled by best fit

    tokens     <s> a a a <s> b b  .       each is read and learns the next one of its own text
    labels      a  a a </s> b b </s> .
    documents   0  0 0 0  1 1 1 -1        what attention may see: the earlier tokens of the same number

A text that fits into a row is never cut. A longer one is cut at places that change with the epoch, each window going on
where the last one ended, so that every token is learnt once an epoch. Best fit (Ding et al. 2024, "Fewer truncations improve
language modeling", https://arxiv.org/abs/2404.10830): the longest windows first, each into the fullest row that has room.
Rows are a pure function of seed and epoch, so that a run that was stopped goes on exactly.

Where texts are evaluated, a long one is cut into windows that overlap by half: all but the first window's tokens have at
least half a row before them, and each token of the text is counted exactly once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loralab.console.progress import Progress
from loralab.data.batches import IGNORED_LABEL, Batch, collate, padded
from loralab.data.cache import ArrayFile, Facts, cached
from loralab.data.rows import Findings
from loralab.data.splits import AnySplit
from loralab.data.tokenization import chunks, start_token, token_ids, tokenizer_key
from loralab.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING = -1  # the document of padding
UNLEARNT = -100  # the label of a token that is read alone
EPOCH = 1 << 40  # rows of an epoch have numbers from (epoch + 1) · EPOCH on, those below are windows to evaluate
DOCUMENTS_AT_ONCE = 100  # whole texts in memory

Ids = NDArray[np.int32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Windows in the order of their rows: row i is the windows row_offsets[i] to row_offsets[i + 1]."""

    starts: Ints
    """[windows]: where each begins in all tokens."""
    sizes: Ints
    """[windows]: how many tokens it reads; the label of the last is one further."""
    unlearnt: Ints
    """[windows]: how many of its first tokens are read alone."""
    documents: Ints
    """[windows]: which text it is of."""
    row_offsets: Ints

    @property
    def row_sizes(self) -> Ints:
        """[rows], in tokens."""
        return np.diff(np.concatenate([[0], np.cumsum(self.sizes)])[self.row_offsets])

    def windows(self, row: int) -> range:
        """Returns those of a row."""
        return range(int(self.row_offsets[row]), int(self.row_offsets[row + 1]))


@dataclass(frozen=True, slots=True, eq=False)
class PackedSplit:
    """n texts. Its rows are windows to evaluate, from 0 on, or the packed rows of an epoch (`rows_of`)."""

    ids: Ids
    offsets: Ints  # n + 1
    rows: Ints  # [n]: the number of each text in its file
    num_bytes: Ints  # [n]: of each text in UTF-8
    length: int  # tokens of a row
    seed: int
    reused: bool  # the tokens are those of an earlier run
    findings: Findings = field(default_factory=Findings)  # none: what is long is cut into windows

    shots = None

    def __len__(self) -> int:
        return len(_evaluated(self).sizes)

    def __str__(self) -> str:
        return f"{len(self.rows):,} texts, {len(self.ids):,} in all"

    @property
    def parts(self) -> tuple[PackedSplit]:
        """Itself."""
        return (self,)

    @property
    def facts(self) -> dict[str, Any]:
        """Returns what a record says of the tokens."""
        return {"bytes": int(self.num_bytes.sum())}

    def in_pass(self, rows: Ints, number: int) -> Ints:
        """Not defined: packed texts are never a part of a mixture."""
        raise AssertionError("the recipe's checks leave packed texts alone")

    def collate(self, rows: Ints, pad_id: int) -> Batch:
        """The given rows as one batch, with the number of the text that each token is of."""
        batch = collate(rows, [self.source(i) for i in rows], [self.target(i) for i in rows], pad_id)
        documents, _ = padded([self.documents(i) for i in rows], PADDING)
        learnt = int((batch.labels != IGNORED_LABEL).sum())
        read_alone = batch.num_source_tokens - learnt
        return replace(batch, num_source_tokens=read_alone, num_target_tokens=learnt, documents=documents)

    @property
    def numbers(self) -> Ints:
        """[windows]: the number of the text that each is of."""
        return self.rows[_evaluated(self).documents]

    @property
    def source_lengths(self) -> Ints:
        """[windows]"""
        return _evaluated(self).sizes

    @property
    def target_lengths(self) -> Ints:
        """[windows]: none, as each token is read and learnt at once."""
        return np.zeros(len(self), dtype=np.int64)

    @property
    def target_tokens(self) -> Ints:
        """[windows]: how many the loss counts of each."""
        layout = _evaluated(self)
        return layout.sizes - layout.unlearnt

    @property
    def target_bytes(self) -> NDArray[np.float64]:
        """[windows]: a text's bytes, shared out among its windows by their tokens; they add up to the text's."""
        documents = _evaluated(self).documents
        shares: NDArray[np.float64] = self.target_tokens / (np.diff(self.offsets) - 1)[documents]
        return np.asarray(self.num_bytes[documents] * shares, dtype=np.float64)

    def after(self, row: int) -> PackedSplit:
        """The texts whose number in the file is above this one."""
        first = int(np.searchsorted(self.rows, row, side="right"))
        return replace(self, offsets=self.offsets[first:], rows=self.rows[first:], num_bytes=self.num_bytes[first:])

    def rows_of(self, epoch: int) -> Ints:
        """Every packed row of this epoch."""
        return (epoch + 1) * EPOCH + np.arange(len(_packed(self, epoch).row_offsets) - 1)

    def lengths_of(self, rows: Ints) -> tuple[Ints, Ints]:
        """(tokens, none) of these rows, all of one epoch."""
        epoch = int(rows[0]) // EPOCH - 1
        return _packed(self, epoch).row_sizes[rows % EPOCH], np.zeros(len(rows), dtype=np.int64)

    def numbers_of(self, rows: Ints) -> str:
        """Returns which texts these rows are of, in words."""
        found = {
            int(self.rows[layout.documents[each]]) for layout, windows in map(self._windows, rows) for each in windows
        }
        return ", ".join(map(str, sorted(found)))

    def source(self, i: int) -> Ids:
        """The tokens that a row reads."""
        layout, windows = self._windows(i)
        return np.concatenate([self.ids[layout.starts[w] : layout.starts[w] + layout.sizes[w]] for w in windows])

    def target(self, i: int) -> Ids:
        """The token that each of them is to say next."""
        layout, windows = self._windows(i)
        parts = [np.array(self.ids[layout.starts[w] + 1 : layout.starts[w] + layout.sizes[w] + 1]) for w in windows]
        for part, w in zip(parts, windows, strict=True):
            part[: layout.unlearnt[w]] = UNLEARNT
        return np.concatenate(parts)

    def documents(self, i: int) -> Ids:
        """Returns which of the row's texts each of them is of, counted from 0."""
        layout, windows = self._windows(i)
        return np.repeat(np.arange(len(windows), dtype=np.int32), layout.sizes[windows.start : windows.stop])

    def _windows(self, i: int) -> tuple[Layout, range]:
        epoch, row = divmod(int(i), EPOCH)
        layout = _packed(self, epoch - 1) if epoch else _evaluated(self)
        return layout, layout.windows(row)


@lru_cache(maxsize=8)
def _evaluated(split: PackedSplit) -> Layout:
    """Each text's windows, a row each: the first all learnt, of the others the last half, or what is left of the text."""
    sizes, length, step = np.diff(split.offsets) - 1, split.length, max(split.length // 2, 1)
    further = -(-(sizes - length).clip(0) // step)  # windows after the first
    documents = np.repeat(np.arange(len(sizes)), further + 1)
    place = np.arange(len(documents)) - np.repeat(np.cumsum(further + 1) - (further + 1), further + 1)
    ends = np.minimum(length + place * step, sizes[documents])
    begins = (ends - length).clip(0)
    unlearnt = np.where(place > 0, length + (place - 1) * step - begins, 0)
    starts = split.offsets[:-1][documents] + begins
    return Layout(starts, ends - begins, unlearnt, documents, np.arange(len(documents) + 1))


@lru_cache(maxsize=2)
def _packed(split: PackedSplit, epoch: int) -> Layout:
    """The rows of an epoch."""
    rng = np.random.default_rng([split.seed, epoch])
    begins, sizes, documents = _windows_of_epoch(np.diff(split.offsets) - 1, split.length, rng)
    order = rng.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    rows = best_fit(sizes[order].tolist(), split.length)
    at = rng.permutation(max(rows) + 1)[rows]  # rows in random order
    by_row = np.argsort(at, kind="stable")
    order, counts = order[by_row], np.bincount(at)
    starts = split.offsets[:-1][documents[order]] + begins[order]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return Layout(starts, sizes[order], np.zeros(len(order), dtype=np.int64), documents[order], offsets)


def _windows_of_epoch(sizes: Ints, length: int, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """(where in its text, how many tokens, of which text) of every window; the first of a long text has a random length."""
    first = np.where(sizes <= length, sizes, rng.integers(1, length + 1, len(sizes)))
    counts = 1 + -(-(sizes - first) // length)
    documents = np.repeat(np.arange(len(sizes)), counts)
    place = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = np.minimum(first[documents] + place * length, sizes[documents])
    begins = np.where(place == 0, 0, first[documents] + (place - 1) * length)
    return begins, ends - begins, documents


def best_fit(sizes: list[int], length: int) -> list[int]:
    """The row of each size, in order: the fullest that has room, or a new one. Rows are counted from 0."""
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # by what is left
    rooms: list[int] = []  # for which there are rows
    found, rows = [], 0
    for size in sizes:
        place = bisect_left(rooms, size)
        if place == len(rooms):
            row, room, rows = rows, length, rows + 1
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        found.append(row)
        if left := room - size:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(row)
    return found


def encode_packed(rows: AnySplit, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> PackedSplit:
    """Every text's tokens, between the start and the end.

    Raises:
        ModelError: the tokenizer has no end of text.
    """
    key = {"texts": rows.content_hash, "what": "between start and end", **tokenizer_key(tokenizer)}
    entry = cached("texts", key, lambda folder: _write_texts(folder, rows, tokenizer))
    ids, offsets, num_bytes = (entry.array(name) for name in ("ids", "offsets", "bytes"))
    return PackedSplit(ids, offsets, rows.numbers, num_bytes, length, seed, entry.reused)


def _write_texts(folder: Path, rows: AnySplit, tokenizer: PreTrainedTokenizerBase) -> Facts:
    """The tokens of every text one after the other, where each begins, and its bytes."""
    start, end = start_token(tokenizer), tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ModelError("The tokenizer has no end-of-sequence token, so a model cannot learn where a text ends.")
    progress, done, stop = Progress("tokenise", len(rows)), 0, 0
    with (
        ArrayFile(folder / "ids.npy", "<i4") as ids,
        ArrayFile(folder / "offsets.npy", "<i8") as offsets,
        ArrayFile(folder / "bytes.npy", "<i8") as num_bytes,
    ):
        offsets.append([0])
        for examples in chunks(rows, DOCUMENTS_AT_ONCE):
            texts = [example.targets[0] for example in examples]
            for tokens in token_ids(texts, tokenizer, special=False):
                ids.append([start, *tokens, end])
                offsets.append([stop := stop + len(tokens) + 2])
            num_bytes.append([len(text.encode()) for text in texts])
            progress.update(done := done + len(examples))
    return {}
