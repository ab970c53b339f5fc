"""Learning from plain documents: part of a text is masked, and the model writes what stood there.

    documents ──> token ids, cut to chunks ──> a mask ──> (source, target), drawn anew in every epoch

    tokens   Thank you for inviting me to your party last week          mask: "for inviting", "last"
    source   Thank you <extra_id_0> me to your party <extra_id_1> week </s>
    target   <extra_id_0> for inviting <extra_id_1> last </s>

`span-corruption` is T5's (Raffel et al. 2020, section 3.1.4, https://arxiv.org/abs/1910.10683, and `random_spans_noise_mask` of the
published code): 15 % of the tokens, in spans of 3 on average, of random lengths at random places. `gap-lines` masks whole
lines, as PEGASUS masks whole sentences (Zhang et al. 2020, https://arxiv.org/abs/1912.08777), which takes those that sum up the
rest before others: in code the lines that open a docstring. `mixed` draws one of the two for each chunk.

A mask is a pure function of (seed, epoch, chunk), so that a run that was stopped goes on exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loralab.config.data import DataSettings
from loralab.console.progress import Progress
from loralab.data.batches import Batch, collate
from loralab.data.cache import ArrayFile, Facts, cached
from loralab.data.rows import Findings
from loralab.data.splits import AnySplit
from loralab.data.tokenization import chunks, token_ids, tokenizer_key
from loralab.errors import DataError, ModelError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOISE_DENSITY = 0.15
MEAN_SPAN = 3.0
SENTINELS = 100  # <extra_id_0> … <extra_id_99>, as many as T5 has
SHORTEST_CHUNK = 16  # tokens; what remains of a document below it is left out
SHORTEST_LINE = 3  # tokens of a line that is masked; also keeps the sentinels of a chunk below 100
DOCUMENTS_AT_ONCE = 100  # whole files in memory
QUOTES = ('"""', "'''")

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


def noise_size(num_tokens: int) -> tuple[int, int]:
    """(tokens masked, spans that they form) of a chunk, as in the published code."""
    noise = min(max(round(num_tokens * NOISE_DENSITY), 1), num_tokens - 1)
    return noise, max(round(noise / MEAN_SPAN), 1)


def lengths(num_tokens: int) -> tuple[int, int]:
    """(source, target) lengths of a chunk under span corruption, ends included."""
    noise, spans = noise_size(num_tokens)
    return num_tokens - noise + spans + 1, noise + spans + 1


def chunk_length(objective: str, max_source_length: int, max_target_length: int) -> int:
    """The most tokens of a chunk whose source and target still fit; T5's 512 and 114 give 568.

    Raises:
        RecipeError: the lengths are too short for any chunk.
    """
    most = SHORTEST_CHUNK - 1
    while _fits(objective, most + 1, max_source_length, max_target_length):
        most += 1
    if most < SHORTEST_CHUNK:
        needed = lengths(SHORTEST_CHUNK)
        raise RecipeError(
            f"data.max_source_length {max_source_length} and data.max_target_length {max_target_length} are too short for "
            f"data.objective {objective}: at least {needed[0] + 1} and {needed[1]} tokens are needed."
        )
    return most


def check_objective_lengths(data: DataSettings) -> None:
    """Raises RecipeError where the recipe's lengths are too short for its objective, before anything is read."""
    if data.objective:
        assert isinstance(data.max_source_length, int) and isinstance(data.max_target_length, int)
        chunk_length(data.objective, data.max_source_length, data.max_target_length)


def _fits(objective: str, num_tokens: int, max_source_length: int, max_target_length: int) -> bool:
    source, target = lengths(num_tokens)
    if objective != "span-corruption":
        source = num_tokens + 1  # a line of one token may be all that is masked
    return source <= max_source_length and target <= max_target_length and noise_size(num_tokens)[1] <= SENTINELS


# Masks


def span_mask(num_tokens: int, rng: np.random.Generator) -> Mask:
    """[num_tokens], true where masked: begins with a token that is kept and ends with one that is masked."""
    noise, spans = noise_size(num_tokens)
    kept_lengths = _random_lengths(num_tokens - noise, spans, rng)
    noise_lengths = _random_lengths(noise, spans, rng)
    both = np.stack([kept_lengths, noise_lengths], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, both)


def _random_lengths(total: int, parts: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positive lengths that add up to `total`, all such lists equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def line_mask(ids: Ids, marks: Marks, rng: np.random.Generator) -> Mask:
    """Whole lines, first those that open a docstring, while the target is no longer than span corruption's.

    No line is masked where none fits.
    """
    starts, ends, opening = marks.lines(ids)
    mask = np.zeros(len(ids), dtype=bool)
    room = lengths(len(ids))[1] - 1
    for line in np.lexsort((rng.random(len(starts)), ~opening)):
        cost = 1 + ends[line] - starts[line]
        if cost <= room and len(ids) - mask.sum() > cost:
            mask[starts[line] : ends[line]] = True
            room -= cost
    return mask


@dataclass(frozen=True, slots=True, eq=False)
class Marks:
    """Marks of the tokens that end lines or hold quotes, [vocabulary]."""

    line_end: Mask
    quotes: Mask

    def lines(self, ids: Ids) -> tuple[NDArray[np.int64], NDArray[np.int64], Mask]:
        """(starts, ends, whether it opens a docstring) of the lines of 3 tokens and more; quotes are not part of such a line."""
        breaks = np.flatnonzero(self.line_end[ids])
        starts, ends = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(ids)]])
        starts, ends = starts[starts < ends], ends[starts < ends]
        opening = self.quotes[ids[starts]]
        starts, ends = starts + opening, ends - (opening & self.quotes[ids[ends - 1]])
        long = ends - starts >= SHORTEST_LINE
        return starts[long], ends[long], opening[long]


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """Returns what the tokenizer's tokens are to lines.

    Raises:
        RecipeError: it has no token for the end of a line, as T5's published one.
    """
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    line_end = np.array(["\n" in text for text in texts])
    if not line_end.any() or "\n" not in tokenizer.decode(tokenizer("a\nb", add_special_tokens=False)["input_ids"]):
        raise RecipeError(
            "data.objective masks lines, and this tokenizer drops the ends of lines, as T5's published one does. "
            "Take span-corruption, or a tokenizer that keeps them (model.tokenizer: train)."
        )
    return Marks(line_end, np.array([text.strip() in QUOTES for text in texts]))


# Chunks


@dataclass(frozen=True, slots=True, eq=False)
class MaskedSplit:
    """n chunks of documents. Row `epoch * n + i` is chunk i as it is masked in that epoch: rows never end.

    `source_lengths` and `target_lengths` are those of span corruption, or bounds where lines are masked.
    """

    ids: Ids
    offsets: NDArray[np.int64]  # n + 1
    numbers: NDArray[np.int64]  # [n]: the number of the row that each chunk is of
    objective: str
    sentinels: Ids  # [100]
    eos: int
    marks: Marks | None  # where lines are masked
    seed: int
    reused: bool  # the tokens are those of an earlier run
    findings: Findings = field(default_factory=Findings)  # none: what is long is cut to chunks

    shots = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __str__(self) -> str:
        return f"{len(self):,} chunks of documents, {len(self.ids):,} in all"

    @property
    def parts(self) -> tuple[MaskedSplit]:
        """Itself."""
        return (self,)

    @property
    def facts(self) -> dict[str, Any]:
        """Returns what a record says of the tokens."""
        return {"chunks": len(self)}

    def collate(self, rows: NDArray[np.int64], pad_id: int) -> Batch:
        """The given rows as one padded batch."""
        return collate(rows, [self.source(i) for i in rows], [self.target(i) for i in rows], pad_id)

    @property
    def source_lengths(self) -> NDArray[np.int64]:
        sizes = np.diff(self.offsets)
        return sizes + 1 if self.marks else _each(sizes, 0)

    @property
    def target_lengths(self) -> NDArray[np.int64]:
        return _each(np.diff(self.offsets), 1)

    @property
    def target_tokens(self) -> NDArray[np.int64]:
        """[n]: how many the loss counts of each chunk in the first epoch."""
        return np.array([len(self.target(chunk)) for chunk in range(len(self))], dtype=np.int64)

    def after(self, row: int) -> MaskedSplit:
        """The chunks of the rows whose number is above this one."""
        kept = slice(int(np.searchsorted(self.numbers, row, side="right")), None)
        return replace(self, offsets=self.offsets[kept], numbers=self.numbers[kept])

    def rows_of(self, epoch: int) -> NDArray[np.int64]:
        """[n]: every chunk, as it is masked in this epoch."""
        return self.in_pass(np.arange(len(self)), epoch)

    def in_pass(self, rows: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        """Returns the same chunks under other masks."""
        return rows + number * len(self)

    def lengths_of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(source, target) lengths of these rows; masks do not change them."""
        return self.source_lengths[rows % len(self)], self.target_lengths[rows % len(self)]

    def numbers_of(self, rows: NDArray[np.int64]) -> str:
        """Returns which rows these are of, in words."""
        return ", ".join(map(str, self.numbers[rows % len(self)].tolist()))

    def source(self, i: int) -> Ids:
        """Token ids with a sentinel for each masked span, and the end."""
        ids, mask, first = self._masked(i)
        replaced = np.where(first, self.sentinels[(np.cumsum(first) - 1).clip(0)], ids)
        return self._ended(replaced[first | ~mask])

    def target(self, i: int) -> Ids:
        """A sentinel and the masked tokens, span after span, and the end."""
        ids, mask, first = self._masked(i)
        starts = np.flatnonzero(first[mask])
        return self._ended(np.insert(ids[mask], starts, self.sentinels[: len(starts)]))

    def _masked(self, i: int) -> tuple[Ids, Mask, Mask]:
        """(tokens, which are masked, which of these begin a span)."""
        epoch, chunk = divmod(int(i), len(self))
        ids = self.ids[self.offsets[chunk] : self.offsets[chunk + 1]]
        mask = self._mask(ids, np.random.default_rng([self.seed, epoch, chunk + 1]))
        return ids, mask, mask & ~np.concatenate([[False], mask[:-1]])

    def _mask(self, ids: Ids, rng: np.random.Generator) -> Mask:
        if self.marks and (self.objective == "gap-lines" or rng.random() < 0.5):
            mask = line_mask(ids, self.marks, rng)
            if mask.any():
                return mask
        return span_mask(len(ids), rng)

    def _ended(self, ids: Ids) -> Ids:
        return np.append(ids, self.eos).astype(np.int32)


def _each(sizes: NDArray[np.int64], which: int) -> NDArray[np.int64]:
    table = {size: lengths(size)[which] for size in set(sizes.tolist())}
    return np.array([table[size] for size in sizes.tolist()], dtype=np.int64)


def encode_documents(
    rows: AnySplit,
    tokenizer: PreTrainedTokenizerBase,
    objective: str,
    max_source_length: int,
    max_target_length: int,
    seed: int,
) -> MaskedSplit:
    """Every document's tokens, cut to chunks; a document's last chunk is what remains of it.

    Raises:
        ModelError: the tokenizer has no sentinels <extra_id_0> … or no end token.
        RecipeError: the lengths are too short, or the tokenizer drops the ends of lines that the objective masks.
        DataError: no document is long enough.
    """
    sentinels, eos = _special(tokenizer)
    marks = None if objective == "span-corruption" else marks_of(tokenizer)
    length = chunk_length(objective, max_source_length, max_target_length)
    key = {"texts": rows.content_hash, "length": length, **tokenizer_key(tokenizer)}
    entry = cached("documents", key, lambda folder: _write_chunks(folder, rows, tokenizer, length, eos, sentinels))
    ids, offsets, kept = (entry.array(name) for name in ("ids", "offsets", "kept"))
    return MaskedSplit(ids, offsets, rows.numbers[kept], objective, sentinels, eos, marks, seed, entry.reused)


def _write_chunks(
    folder: Path, rows: AnySplit, tokenizer: PreTrainedTokenizerBase, length: int, eos: int, sentinels: Ids
) -> Facts:
    """The tokens of every chunk one after the other, where each begins, and its document, counted from 0."""
    reserved, progress, document, end = set(sentinels.tolist()), Progress("tokenise", len(rows)), 0, 0
    with (
        ArrayFile(folder / "ids.npy", "<i4") as ids,
        ArrayFile(folder / "offsets.npy", "<i8") as offsets,
        ArrayFile(folder / "kept.npy", "<i8") as kept,
    ):
        offsets.append([0])
        for examples in chunks(rows, DOCUMENTS_AT_ONCE):
            for tokens in token_ids([example.source for example in examples], tokenizer):
                for piece in pieces_of(tokens[:-1] if tokens[-1:] == [eos] else tokens, length):
                    if not reserved & set(piece):  # a text about sentinels would confuse
                        ids.append(piece)
                        offsets.append([end := end + len(piece)])
                        kept.append([document])
                document += 1
            progress.update(document)
        if not kept.length:
            raise DataError(
                f"{rows.name}, {rows.split}: no document has {SHORTEST_CHUNK} tokens, the fewest that can be masked."
            )
    return {}


def pieces_of(tokens: Sequence[int], length: int) -> Iterator[Sequence[int]]:
    """Chunks of `length` tokens, and what remains of them where that is long enough."""
    for start in range(0, len(tokens) - SHORTEST_CHUNK + 1, length):
        yield tokens[start : start + length]


def _special(tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, int]:
    names = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    known = tokenizer.get_vocab()
    if missing := [name for name in names if name not in known]:
        raise ModelError(
            f"data.objective needs a tokenizer with T5's sentinels <extra_id_0> … <extra_id_{SENTINELS - 1}>; this one lacks {missing[0]}. "
            "Take a T5's, or train one (model.tokenizer: train)."
        )
    assert isinstance(tokenizer.eos_token_id, int)
    return np.array([known[name] for name in names], dtype=np.int32), tokenizer.eos_token_id
