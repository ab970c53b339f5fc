"""Learning from plain documents: masks are T5's and PEGASUS', and source and target together are the document again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from folders import split_of
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loralab.builtin_data import corpus
from loralab.config.recipe import Recipe
from loralab.data.span_corruption import (
    MEAN_SPAN,
    NOISE_DENSITY,
    SHORTEST_CHUNK,
    MaskedSplit,
    chunk_length,
    encode_documents,
    lengths,
    marks_of,
    noise_size,
    span_mask,
)
from loralab.data.splits import Split
from loralab.data.tokenizer_training import train_tokenizer
from loralab.errors import DataError, ModelError, RecipeError
from loralab.training.loop import plan_steps

OBJECTIVES = ("span-corruption", "gap-lines", "mixed")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [row["text"][:6000] for row in corpus.rows("test")[:8]]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, 640, folder)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def documents(texts: list[str]) -> Split:
    return split_of(*((text,) for text in texts))


def masked(tokenizer: PreTrainedTokenizerBase, texts: list[str], objective: str, seed: int = 1) -> MaskedSplit:
    return encode_documents(documents(texts), tokenizer, objective, 128, 64, seed)


def put_together(split: MaskedSplit, row: int) -> tuple[list[int], int]:
    """(the source with each sentinel replaced by what the target has for it, how many there were)."""
    source, target = split.source(row).tolist(), split.target(row).tolist()
    assert source.pop() == target.pop() == split.eos
    answers: dict[int, list[int]] = {}
    for token in target:
        if token in split.sentinels:
            assert token not in answers
            answers[token] = []
        else:
            answers[list(answers)[-1]].append(token)
    in_source = [token for token in source if token in split.sentinels]
    assert in_source == list(answers) == split.sentinels[: len(answers)].tolist(), "in the order of the sentinels"
    assert all(answers.values())
    return [each for token in source for each in answers.get(token, [token])], len(answers)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_source_and_target_are_the_document_again(
    objective: str, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    split = masked(tokenizer, texts, objective)
    assert len(split) > 50
    whole: dict[int, list[int]] = {}
    for row in range(2 * len(split)):  # two epochs
        together, count = put_together(split, row)
        chunk = row % len(split)
        assert together == split.ids[split.offsets[chunk] : split.offsets[chunk + 1]].tolist() and count > 0
        source, target = len(split.source(row)), len(split.target(row))
        assert source <= min(128, split.source_lengths[chunk]) and target <= min(64, split.target_lengths[chunk])
        if objective == "span-corruption":
            assert (source, target) == (split.source_lengths[chunk], split.target_lengths[chunk])
        if row < len(split):
            whole.setdefault(int(split.numbers[chunk]), []).extend(together)
    for row, text in enumerate(texts, 1):
        ids = tokenizer(text)["input_ids"][:-1]
        assert whole[row] == ids[: len(whole[row])] and len(ids) - len(whole[row]) < SHORTEST_CHUNK


def test_the_published_lengths_fill_the_budget() -> None:
    """512 tokens of source, 15 % and spans of 3 are 568 tokens of text and 114 of target in T5's published code."""
    assert chunk_length("span-corruption", 512, 114) == 568 and lengths(568) == (512, 114)
    for source in (64, 128, 200, 256):
        size = chunk_length("span-corruption", source, 512)
        assert lengths(size)[0] <= source < lengths(size + 1)[0]
    assert chunk_length("span-corruption", 10_000, 10_000) < 2100, "no more than 100 sentinels"
    assert chunk_length("gap-lines", 128, 64) == 127


@pytest.mark.parametrize("size", [100, 568])
def test_the_mask_has_t5_s_density_and_spans(size: int) -> None:
    noise, spans = noise_size(size)
    masks = np.array([span_mask(size, np.random.default_rng(seed)) for seed in range(2000)])
    assert (masks.sum(axis=1) == noise).all() and noise == round(NOISE_DENSITY * size)
    begins = masks[:, 1:] & ~masks[:, :-1]
    assert (begins.sum(axis=1) == spans).all() and spans == round(noise / MEAN_SPAN)
    assert not masks[:, 0].any() and masks[:, -1].all()
    middle = masks[:, size // 4 : -size // 4].mean(axis=0)
    assert np.abs(middle - NOISE_DENSITY).max() < 0.06, "no place is preferred: 7 deviations of 2,000 coins"


def test_masks_are_fresh_in_every_epoch_and_a_function_of_the_seed(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    split, again, other = (masked(tokenizer, texts, "mixed", seed) for seed in (1, 1, 2))
    count = len(split)

    def sources(of: MaskedSplit, epoch: int) -> list[list[int]]:
        return [of.source(epoch * count + chunk).tolist() for chunk in range(count)]

    assert sources(split, 0) == sources(again, 0) and sources(split, 3) == sources(again, 3)
    for one, two in ((sources(split, 0), sources(split, 1)), (sources(split, 0), sources(other, 0))):
        assert sum(a == b for a, b in zip(one, two, strict=True)) < 0.2 * count


CODE = '''def area(width, height):
    """Return the area of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("sides are not negative")
    return width * height


class Box:
    """Hold one thing and nothing else.

    It is opened once.
    """
'''


def test_lines_are_masked_whole_and_those_that_open_docstrings_first(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = np.array(tokenizer(CODE)["input_ids"][:-1], dtype=np.int32)
    starts, ends, opening = marks_of(tokenizer).lines(ids)
    lines = [tokenizer.decode(ids[start:end]) for start, end in zip(starts, ends, strict=True)]
    assert [line for line, opens in zip(lines, opening, strict=True) if opens] == [
        "Return the area of a rectangle.",
        "Hold one thing and nothing else.",
    ]
    assert [line.strip() for line in lines] == [
        line.strip().strip('"') for line in CODE.splitlines() if len(line.strip()) > 3
    ]
    split = encode_documents(documents([CODE]), tokenizer, "gap-lines", 256, 128, 0)
    for epoch in range(20):
        answer = tokenizer.decode(split.target(epoch), skip_special_tokens=False)
        assert "Return the area of a rectangle." in answer or "Hold one thing and nothing else." in answer
        assert split.target_tokens[0] == len(split.target(0))


def test_every_epoch_takes_every_chunk_with_that_epoch_s_masks(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    split = masked(tokenizer, texts, "span-corruption")
    tree = {
        "name": "x", "model": {"name": "x"}, "training": {"method": "full", "epochs": 3, "tokens_per_batch": 512},
        "data": {"name": "x", "source": "text", "objective": "span-corruption"},
    }  # fmt: skip
    rows: NDArray[np.int64] = np.concatenate(
        [batch for step in plan_steps(Recipe.model_validate(tree), split) for batch in step]
    )
    assert sorted(rows.tolist()) == list(range(3 * len(split)))
    batch = split.collate(np.array([len(split) + 5, 5]), 0)
    assert split.numbers_of(batch.rows) == f"{split.numbers[5]}, {split.numbers[5]}"
    for at, row in enumerate((len(split) + 5, 5)):
        assert batch.source_ids[at].tolist() == split.source(row).tolist()
        assert batch.labels[at].tolist() == split.target(row).tolist()


def test_mistakes_are_told(tokenizer: PreTrainedTokenizerBase, texts: list[str], data_folder: Path) -> None:
    t5 = AutoTokenizer.from_pretrained(data_folder / "tokenizers/t5")
    split = masked(t5, texts, "span-corruption")
    assert put_together(split, 7)[0] == split.ids[split.offsets[7] : split.offsets[8]].tolist()
    with pytest.raises(RecipeError, match="this tokenizer drops the ends of lines"):
        masked(t5, texts, "gap-lines")
    with pytest.raises(ModelError, match="this one lacks <extra_id_0>"):
        masked(AutoTokenizer.from_pretrained(data_folder / "tokenizers/gpt2"), texts, "span-corruption")
    with pytest.raises(RecipeError, match=r"max_source_length 10 .* are too short .* at least 17 and 4 tokens"):
        encode_documents(documents(texts), tokenizer, "mixed", 10, 64, 0)
    with pytest.raises(DataError, match="no document has 16 tokens"):
        masked(tokenizer, ["short"], "mixed")
    assert masked(tokenizer, [texts[0], "<extra_id_7> " * 40], "mixed").numbers.max() == 1, (
        "reserved words are not masked over"
    )
