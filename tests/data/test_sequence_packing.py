"""Packed texts: each token once an epoch, none that sees another text, and a run whose every byte counts."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers import GPT2Config as TheirConfig

from loralab.data.sequence_packing import PackedSplit, best_fit
from loralab.errors import ModelError
from loralab.metrics.compression import AFTER, ALONE, xz_bits_per_byte
from loralab.models.gpt2 import GPT2Config
from loralab.on_torch.models.gpt2 import GPT2
from loralab.on_torch.models.registry import family_of

LENGTH = 32


def texts(sizes: NDArray[np.int64], length: int = LENGTH, seed: int = 1) -> PackedSplit:
    """Texts of so many tokens, start and end included; no token stands twice, so that each tells its place."""
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    ids = np.arange(offsets[-1], dtype=np.int32)
    return PackedSplit(ids, offsets, np.arange(len(sizes)) + 1, 3 * sizes, length, seed, reused=False)


@pytest.fixture(scope="module")
def split() -> PackedSplit:
    sizes = np.random.default_rng(0).integers(2, 50, 60)
    sizes[[3, 40]] = 200, LENGTH + 1  # one is cut often, one fills a row
    return texts(sizes)


def learnt(split: PackedSplit) -> list[int]:
    """Every token but the starts."""
    return sorted(set(split.ids.tolist()) - set(split.offsets[:-1].tolist()))


def test_an_epoch_learns_every_token_once(split: PackedSplit) -> None:
    for epoch in range(3):
        labels: list[int] = []
        for row in split.rows_of(epoch):
            read, said, documents = split.source(row), split.target(row), split.documents(row)
            assert len(read) == len(said) == len(documents) <= LENGTH
            assert (said == read + 1).all(), "each says the next of its own text"
            begins = np.flatnonzero(np.diff(documents, prepend=-1))
            assert documents[begins].tolist() == list(range(len(begins)))
            own = np.searchsorted(split.offsets, read, side="right")
            assert all(len(set(own[documents == each])) == 1 for each in documents)
            labels += said.tolist()
        assert sorted(labels) == learnt(split)
        rows = split.rows_of(epoch)
        assert split.lengths_of(rows)[0].tolist() == [len(split.source(row)) for row in rows]
        assert split.lengths_of(rows)[0].sum() / (len(rows) * LENGTH) > 0.9, "little of a row is empty"


def test_texts_that_fit_are_not_cut(split: PackedSplit) -> None:
    begun = np.concatenate(
        [
            split.source(row)[split.documents(row) == each]
            for row in split.rows_of(0)
            for each in set(split.documents(row).tolist())
        ]
    )
    sizes = np.diff(split.offsets) - 1
    for start, size in zip(split.offsets[:-1], sizes, strict=True):
        place = int(np.flatnonzero(begun == start)[0])
        if size <= LENGTH:
            assert begun[place : place + size].tolist() == list(range(start, start + size))


def rows(split: PackedSplit, epoch: int) -> list[list[int]]:
    return [split.source(row).tolist() for row in split.rows_of(epoch)]


def test_the_order_is_a_function_of_seed_and_epoch(split: PackedSplit) -> None:
    again = texts(np.diff(split.offsets))
    assert rows(split, 1) == rows(again, 1) and rows(split, 0) == rows(again, 0)
    other = texts(np.diff(split.offsets), seed=2)
    assert sorted(rows(split, 0)) != sorted(rows(split, 1)) and sorted(rows(split, 0)) != sorted(rows(other, 0))
    assert split.numbers_of(split.rows_of(0)) == ", ".join(map(str, range(1, 61)))
    kept = split.after(40)
    assert kept.numbers.min() == 41 and learnt(split)[-1] == max(max(row) for row in rows(kept, 0)) + 1


def test_evaluation_counts_every_token_and_byte_once(split: PackedSplit) -> None:
    counted: list[int] = []
    for window in range(len(split)):
        read, said = split.source(window), split.target(window)
        counts = said != -100
        assert (said[counts] == read[counts] + 1).all() and counts.sum() == split.target_tokens[window]
        assert len(read) == split.source_lengths[window] <= LENGTH
        first = read[0] in split.offsets
        assert first == counts[0] and (first or np.flatnonzero(counts)[0] >= LENGTH // 2), "half a row before each"
        counted += said[counts].tolist()
    assert sorted(counted) == learnt(split)
    for number in range(1, 61):
        assert split.target_bytes[split.numbers == number].sum() == pytest.approx(split.num_bytes[number - 1])


def test_best_fit_takes_the_fullest_row_with_room() -> None:
    sizes = np.sort(np.random.default_rng(0).integers(1, LENGTH + 1, 300))[::-1].tolist()
    left: list[int] = []
    for size, row in zip(sizes, best_fit(sizes, LENGTH), strict=True):
        fitting = [room for room in left if room >= size]
        if row == len(left):
            assert not fitting
            left.append(LENGTH)
        assert left[row] == min(fitting, default=LENGTH)
        left[row] -= size


# Models

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: GPT2(GPT2Config(16, 2, 2, n_positions=40, vocab_size=97)),
    "gpt2": lambda: GPT2LMHeadModel(TheirConfig(vocab_size=97, n_positions=40, n_embd=16, n_layer=2, n_head=2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def packed_rows() -> tuple[Tensor, Tensor, Tensor]:
    """(ids, documents, what follows) of two rows: texts of 7, 12 and 9 tokens, and of 20, padded."""
    torch.manual_seed(1)
    ids, following = torch.randint(1, 97, (2, 28)), torch.randint(1, 97, (2, 28))
    documents = torch.tensor([[0] * 7 + [1] * 12 + [2] * 9, [0] * 20 + [-1] * 8])
    return ids, documents, following.masked_fill(documents < 0, -100)


def packed_losses(model: nn.Module, ids: Tensor, documents: Tensor, following: Tensor) -> Tensor:
    return family_of(model).token_losses(model, ids, torch.ones_like(ids), following, documents=documents)


def embeddings(model: nn.Module) -> nn.Module:
    return model.transformer.wte if isinstance(model, GPT2) else model.get_input_embeddings()


def test_no_token_sees_another_text(model: nn.Module) -> None:
    """The gradient of each text's loss towards what stands in the others' places is zero, exactly, and not in its own."""
    caught: list[Tensor] = []
    embeddings(model).register_forward_hook(lambda _, __, output: caught.append(output))
    ids, documents, following = packed_rows()
    losses = packed_losses(model, ids, documents, following)
    row_of, own = (following != -100).nonzero()[:, 0], documents[following != -100]
    for row, text in ((0, 0), (0, 1), (0, 2), (1, 0)):
        (gradient,) = torch.autograd.grad(losses[(row_of == row) & (own == text)].sum(), caught[-1], retain_graph=True)
        mine = torch.zeros_like(documents, dtype=torch.bool)
        mine[row] = documents[row] == text
        assert (gradient[~mine] == 0).all()
        assert (gradient[mine].abs().sum(-1) > 0).all(), "each token of the text itself has a part in its loss"


def test_packed_losses_are_those_of_each_text_alone(model: nn.Module) -> None:
    ids, documents, following = packed_rows()
    alone = [
        packed_losses(
            model, ids[row][mine][None], torch.zeros(1, int(mine.sum()), dtype=torch.long), following[row][mine][None]
        )
        for row in range(2)
        for text in range(3)
        if (mine := documents[row] == text).any()
    ]
    torch.testing.assert_close(packed_losses(model, ids, documents, following), torch.cat(alone))
    family_of(model).check_packing(model, 28)


def test_a_model_that_cannot_pack_is_refused() -> None:
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2)).eval()
    with pytest.raises(
        ModelError, match=r"BloomForCausalLM cannot keep packed texts apart.*Set data\.packing to false"
    ):
        family_of(bloom).check_packing(bloom, 28)


def test_a_batch_says_which_text_each_token_is_of(split: PackedSplit) -> None:
    some = split.rows_of(0)[:4]
    batch = split.collate(some, 0)
    assert batch.documents is not None and batch.documents.shape == batch.labels.shape == batch.source_ids.shape
    assert ((batch.documents < 0) == ~batch.source_mask).all() and ((batch.labels == -100) == ~batch.source_mask).all()
    assert (batch.num_source_tokens, batch.num_target_tokens) == (0, int(batch.source_mask.sum()))
    windows = np.flatnonzero(split.target_tokens < split.source_lengths)[:2]
    batch = split.collate(windows, 0)
    assert batch.num_target_tokens == split.target_tokens[windows].sum() and batch.num_source_tokens > 0


# Floors


def test_the_floors_are_what_xz_makes_of_the_files() -> None:
    training, held_out = ["def f(x):\n    return x\n" * 9, "import os\n"], ["def g(x):\n    return x\n", "é"]
    size = {
        name: len(lzma.compress("".join(parts).encode(), preset=9 | lzma.PRESET_EXTREME))
        for name, parts in (("training", training), ("both", training + held_out), ("held out", held_out))
    }
    num_bytes = len("".join(held_out).encode())
    floors = xz_bits_per_byte(training, held_out)
    assert floors[AFTER] == pytest.approx(8 * (size["both"] - size["training"]) / num_bytes)
    assert floors[ALONE] == pytest.approx(8 * size["held out"] / num_bytes)
