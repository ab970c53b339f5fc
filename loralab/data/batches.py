"""Batches: rows of like length, as padded arrays.

Rows of like length share a batch, so that little of it is padding: on DialogSum in batches of 4,096 tokens 97 % of the
source tokens are real, against 59 % in batches of 8 random rows. The plan of an epoch is a pure function of lengths,
seed and epoch, so that a run can be continued or repeated from these alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]  # row indices

IGNORED_LABEL = -100  # the label of padding, which no loss counts
BUCKET_WIDTH = 0.08  # sources of one bucket differ by at most so much, of which padding costs about half
TARGET_JITTER = 0.2  # targets are sorted by their length times up to 1.2, so that neighbours change with the epoch


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B rows, padded on the right to the longest source (S) and the longest target (T) among them."""

    rows: Rows  # [B] indices into what it is made of
    source_ids: NDArray[np.int64]  # [B, S]
    source_mask: NDArray[np.bool_]  # [B, S], true where the token is real
    labels: NDArray[Any]  # [B, T], -100 in the padding; of a regression the number of each row, [B, 1] in float32
    num_source_tokens: int  # real ones that are not learnt as well
    num_target_tokens: int  # real ones
    token_types: NDArray[np.int64] | None = None
    """[B, S] of pairs of texts: 1 where the token is of the second text. None where the model is not told."""
    documents: NDArray[np.int64] | None = None
    """[B, S] of packed texts: which of its row's texts each token is of, -1 in the padding. Labels are then [B, S] too: each the token
    that follows in the same text."""


def plan_batches(
    source_lengths: NDArray[np.int64],
    target_lengths: NDArray[np.int64],
    *,
    tokens_per_batch: int | None,
    batch_size: int | None,
    seed: int,
    epoch: int,
) -> list[Rows]:
    """Every row exactly once, in batches of `batch_size` rows or `tokens_per_batch` tokens (one of the two).

    The tokens of a batch are its rows times (its longest source + its longest target); a row beyond the budget makes a
    batch of its own. Batches come in random order. Under a token budget their number differs a little between epochs.
    """
    rng = np.random.default_rng([seed, epoch])
    order = random_order_by_length(source_lengths, target_lengths, rng)
    batches = fill(order, source_lengths, target_lengths, tokens_per_batch=tokens_per_batch, batch_size=batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def evaluation_batches(
    source_lengths: NDArray[np.int64], target_lengths: NDArray[np.int64], *, tokens_per_batch: int
) -> list[Rows]:
    """Every row exactly once, longest sources first, so that a batch too large for the memory shows at the start.

    For generation give the number of new tokens as every row's target length.
    """
    order = np.lexsort((target_lengths, source_lengths))[::-1]
    return fill(order, source_lengths, target_lengths, tokens_per_batch=tokens_per_batch, batch_size=None)


def random_order_by_length(
    source_lengths: NDArray[np.int64], target_lengths: NDArray[np.int64], rng: np.random.Generator
) -> Rows:
    """The rows so that neighbours have like lengths, but other neighbours at each call.

    Three things change: the half that a row falls in (this mixes even a few rows), where the buckets of source lengths
    begin, and the order of the targets within a bucket. Every other bucket runs downwards, so that lengths do not jump
    where two meet.
    """
    half = rng.integers(2, size=len(source_lengths))
    bucket = np.floor(np.log(source_lengths) / np.log1p(BUCKET_WIDTH) + rng.random())
    target = target_lengths * (1 + TARGET_JITTER * rng.random(len(target_lengths)))
    upwards = (bucket + half) % 2 == 0
    return np.lexsort((np.where(upwards, target, -target), np.where(half == 0, bucket, -bucket), half))


def fill(
    order: Rows,
    source_lengths: NDArray[np.int64],
    target_lengths: NDArray[np.int64],
    *,
    tokens_per_batch: int | None,
    batch_size: int | None,
) -> list[Rows]:
    """`order` cut into batches, each as long as the budget allows."""
    assert (tokens_per_batch is None) != (batch_size is None), "one of tokens_per_batch and batch_size"
    assert len(source_lengths) == len(target_lengths)
    if batch_size is not None:
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    assert tokens_per_batch is not None
    starts: list[int] = []
    longest_source = longest_target = 0
    lengths = zip(source_lengths[order].tolist(), target_lengths[order].tolist(), strict=True)
    for place, (source, target) in enumerate(lengths):
        longest_source, longest_target = max(longest_source, source), max(longest_target, target)
        if not starts or (place + 1 - starts[-1]) * (longest_source + longest_target) > tokens_per_batch:
            starts.append(place)
            longest_source, longest_target = source, target
    return np.split(order, starts[1:])


def collate(
    rows: Rows, sources: Sequence[NDArray[np.int32]], targets: Sequence[NDArray[np.int32]], pad_id: int
) -> Batch:
    """Pads rows to one batch.

    Args:
        rows: their numbers.
        sources: the token ids that the model reads of each.
        targets: the token ids, or the labels, that it learns of each.
        pad_id: what sources are padded with.
    """
    source_ids, source_mask = padded(sources, pad_id)
    labels, label_mask = padded(targets, IGNORED_LABEL)
    return Batch(rows, source_ids, source_mask, labels, int(source_mask.sum()), int(label_mask.sum()))


def with_token_types(batch: Batch, second: NDArray[np.int32]) -> Batch:
    """Returns the batch with the type of each token.

    Args:
        second: [B]: the place of each row's first token of type 1.
    """
    places = np.arange(batch.source_ids.shape[1])
    types = ((places >= second[:, None]) & batch.source_mask).astype(np.int64)
    return replace(batch, token_types=types)


def padded(sequences: Iterable[NDArray[Any]], value: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """(sequences filled up with `value` on the right, mask of what is real), both [number, longest]."""
    listed = list(sequences)
    lengths = np.array([len(sequence) for sequence in listed])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, value, dtype=np.int64 if listed[0].dtype.kind == "i" else listed[0].dtype)
    ids[mask] = np.concatenate(listed)
    return ids, mask
