"""Which rows go together, and the padded arrays they become, against plain loops."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import INSTRUCTION, index, split_of

from loralab.data.batches import evaluation_batches, plan_batches
from loralab.data.prompts import Prompt
from loralab.data.splits import Split
from loralab.data.tokenization import encode
from loralab.data.tokenized_split import EncodedSplit


@pytest.fixture(scope="session")
def train_lengths(data_folder: Path, t5: Any) -> tuple[np.ndarray, np.ndarray]:
    """(source, target) lengths of DialogSum's training rows under the third experiment's prompt, cut at 512 and 128."""
    encoded = encode(index(data_folder / "dialogsum"), t5, Prompt(INSTRUCTION, "dialogue"), 512, 128)
    return encoded.source_lengths, encoded.target_lengths


# Batches.


def tokens_of(batches: list[np.ndarray], lengths: np.ndarray) -> int:
    return sum(len(rows) * int(lengths[rows].max()) for rows in batches)


def assert_each_row_once(batches: list[np.ndarray], num_rows: int) -> None:
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(num_rows))


def random_lengths(num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 400, num_rows), rng.integers(1, 90, num_rows)


PLANS: list[dict[str, Any]] = [
    {"tokens_per_batch": tokens, "batch_size": rows, "seed": seed, "epoch": epoch}
    for tokens, rows in ((2048, None), (None, 8))
    for seed, epoch in ((0, 0), (0, 1), (7, 0))
]


@pytest.mark.parametrize("num_rows", [1, 2, 9, 64, 1001])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_plan_holds_each_row_once_within_its_budget(num_rows: int, plan: dict[str, Any]) -> None:
    source, target = random_lengths(num_rows)
    batches = plan_batches(source, target, **plan)
    assert_each_row_once(batches, num_rows)
    if plan["batch_size"]:
        assert sorted(map(len, batches))[1:] == [8] * ((num_rows - 1) // 8)
    else:
        assert all(len(rows) * (source[rows].max() + target[rows].max()) <= 2048 for rows in batches)


def test_a_row_beyond_the_budget_makes_its_own_batch() -> None:
    source, target = np.array([10, 3000, 10, 900, 10]), np.array([5, 5, 5, 200, 5])
    for batches in (
        plan_batches(source, target, tokens_per_batch=1000, batch_size=None, seed=0, epoch=0),
        evaluation_batches(source, target, tokens_per_batch=1000),
    ):
        assert {1, 3} <= {rows[0] for rows in batches if len(rows) == 1}
        assert_each_row_once(batches, 5)


def test_a_plan_is_a_function_of_its_arguments_alone() -> None:
    source, target = random_lengths(500)

    def plan(seed: int, epoch: int) -> list[list[int]]:
        batches = plan_batches(source, target, tokens_per_batch=2048, batch_size=None, seed=seed, epoch=epoch)
        return [rows.tolist() for rows in batches]

    first = plan(3, 1)
    np.random.seed(0)  # the global state is no argument
    assert plan(3, 1) == first
    assert len({str(plan(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


@pytest.mark.slow
def test_real_batches_are_full_and_in_no_order_of_length(train_lengths: tuple[np.ndarray, np.ndarray]) -> None:
    source, target = train_lengths
    random_rows = np.random.default_rng(0).permutation(len(source))
    by_eight = [random_rows[start : start + 8] for start in range(0, len(source), 8)]
    assert 0.58 < source.sum() / tokens_of(by_eight, source) < 0.61  # what grouping by length saves
    for tokens_per_batch, batch_size, useful_source, useful_target in ((4096, None, 0.96, 0.88), (None, 8, 0.96, 0.88)):
        batches = plan_batches(
            source, target, tokens_per_batch=tokens_per_batch, batch_size=batch_size, seed=42, epoch=0
        )
        assert source.sum() / tokens_of(batches, source) >= useful_source
        assert target.sum() / tokens_of(batches, target) >= useful_target
        longest = np.array([source[rows].max() for rows in batches])
        assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.1  # a batch says nothing of the next one's length


def kept_company(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """The share of pairs of rows in one batch of `first` that share one of `second` too."""
    batch_of = {row: number for number, rows in enumerate(second) for row in rows.tolist()}
    pairs = [(a, b) for rows in first for a in rows.tolist() for b in rows.tolist() if a < b]
    return sum(batch_of[a] == batch_of[b] for a, b in pairs) / len(pairs)


@pytest.mark.slow
@pytest.mark.parametrize(("num_rows", "limit"), [(12_460, 0.12), (1000, 0.3), (200, 0.4)])
def test_rows_meet_others_in_the_next_epoch(
    train_lengths: tuple[np.ndarray, np.ndarray], num_rows: int, limit: float
) -> None:
    source, target = train_lengths[0][:num_rows], train_lengths[1][:num_rows]
    epochs = [
        plan_batches(source, target, tokens_per_batch=4096, batch_size=None, seed=42, epoch=epoch) for epoch in range(4)
    ]
    pairs = list(combinations(epochs, 2))
    assert np.mean([kept_company(first, second) for first, second in pairs]) < limit
    for first, second in pairs:
        sets = [{frozenset(rows.tolist()) for rows in plan if len(rows) > 1} for plan in (first, second)]
        assert not sets[0] & sets[1]


def test_evaluation_starts_with_the_longest_sources() -> None:
    source, target = random_lengths(700)
    batches = evaluation_batches(source, target, tokens_per_batch=2048)
    assert_each_row_once(batches, 700)
    np.testing.assert_array_equal(source[np.concatenate(batches)], np.sort(source)[::-1])
    assert all(len(rows) * (source[rows].max() + target[rows].max()) <= 2048 for rows in batches)
    budget_of_longer = [
        (len(a) + 1) * (source[a].max() + max(target[a].max(), target[b[0]])) for a, b in pairwise(batches)
    ]
    assert min(budget_of_longer) > 2048  # no batch could have taken the next row


# Collation.


def padded_by_hand(rows: list[list[int]], value: int) -> list[list[int]]:
    longest = max(len(row) for row in rows)
    return [row + [value] * (longest - len(row)) for row in rows]


@pytest.fixture(scope="module")
def encoded(t5: Any, dialogues: Split) -> EncodedSplit:
    return encode(dialogues, t5, Prompt(INSTRUCTION, "dialogue"), 512, 128)


def test_collated_rows_are_the_encoded_rows(encoded: EncodedSplit) -> None:
    for rows in evaluation_batches(encoded.source_lengths, encoded.target_lengths, tokens_per_batch=4096):
        batch = encoded.collate(rows, pad_id=0)
        sources = [encoded.source(i).tolist() for i in rows]
        targets = [encoded.target(i).tolist() for i in rows]
        np.testing.assert_array_equal(batch.rows, rows)
        np.testing.assert_array_equal(batch.source_ids, padded_by_hand(sources, 0))
        np.testing.assert_array_equal(batch.source_mask, padded_by_hand([[1] * len(row) for row in sources], 0))
        np.testing.assert_array_equal(batch.labels, padded_by_hand(targets, -100))
        assert (batch.source_ids.dtype, batch.source_mask.dtype, batch.labels.dtype) == (np.int64, np.bool_, np.int64)
        assert batch.num_source_tokens == sum(map(len, sources))
        assert batch.num_target_tokens == sum(map(len, targets))


def test_a_padding_token_in_the_text_is_a_real_token(t5: Any) -> None:
    encoded = encode(split_of(("a<pad>b", "c<pad>"), ("one two three four five", "d")), t5, Prompt("{source}"), 32, 32)
    batch = encoded.collate(np.array([0, 1]), pad_id=t5.pad_token_id)
    assert t5.pad_token_id in encoded.source(0) and t5.pad_token_id in encoded.target(0)
    np.testing.assert_array_equal(batch.source_mask.sum(axis=1), encoded.source_lengths)
    np.testing.assert_array_equal((batch.labels != -100).sum(axis=1), encoded.target_lengths)
    assert batch.num_target_tokens == encoded.target_lengths.sum()
