"""Token ids of a split, and lengths given as a percentile, against the tokenizer's own ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import INSTRUCTION, index, split_of

from loralab.data.lengths import resolve_length, resolve_lengths
from loralab.data.prompts import Prompt
from loralab.data.rows import Finding
from loralab.data.splits import Split
from loralab.data.tokenization import encode, encode_sources
from loralab.errors import DataError, ModelError, RecipeError

# Encoding.


def test_encoded_split_holds_each_row(t5: Any, dialogues: Split) -> None:
    prompt = Prompt(INSTRUCTION, "dialogue")
    encoded = encode(dialogues, t5, prompt, 256, 48)
    sources, cut_sources = encode_sources([example.source for example in dialogues.examples], t5, prompt, 256)
    whole = [t5(example.targets[0]).input_ids for example in dialogues.examples]
    targets = t5([example.targets[0] for example in dialogues.examples], truncation=True, max_length=48).input_ids
    assert len(encoded) == len(dialogues) == 500
    assert (encoded.source_ids.dtype, encoded.target_ids.dtype) == (np.int32, np.int32)
    assert (encoded.max_source_length, encoded.max_target_length) == (256, 48)
    assert [encoded.source(i).tolist() for i in range(500)] == sources
    assert [encoded.target(i).tolist() for i in range(500)] == targets
    np.testing.assert_array_equal(encoded.source_lengths, [len(ids) for ids in sources])
    np.testing.assert_array_equal(encoded.target_lengths, [len(ids) for ids in targets])
    assert encoded.findings["long_sources"].count == cut_sources > 0
    long_targets = [number for number, ids in enumerate(whole, 1) if len(ids) > 48]
    assert encoded.findings["long_targets"] == Finding(len(long_targets), long_targets[:100])
    np.testing.assert_array_equal(encoded.numbers, np.arange(1, 501))


@pytest.mark.parametrize("long_rows", ["cut", "skip"])
def test_chunks_do_not_show(
    long_rows: str, t5: Any, dialogues: Split, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = Prompt(INSTRUCTION, "dialogue")
    whole = encode(dialogues, t5, prompt, 256, 48, long_rows)
    monkeypatch.setattr("loralab.data.tokenization.CHUNK_ROWS", 7)
    monkeypatch.setenv("LORALAB_CACHE", str(cache / "another"))
    chunked = encode(dialogues, t5, prompt, 256, 48, long_rows)
    assert not chunked.reused and chunked.findings == whole.findings
    for name in ("source_ids", "source_offsets", "target_ids", "target_offsets", "numbers"):
        np.testing.assert_array_equal(getattr(chunked, name), getattr(whole, name))


def test_long_rows_are_skipped_or_stop_the_run(t5: Any, dialogues: Split) -> None:
    prompt = Prompt(INSTRUCTION, "dialogue")
    everything = encode(dialogues, t5, prompt, 5000, 5000)
    fits = (everything.source_lengths <= 256) & (everything.target_lengths <= 48)
    kept = np.flatnonzero(fits)
    skipped = encode(dialogues, t5, prompt, 256, 48, "skip")
    assert 100 < len(skipped) == len(kept) < 400
    np.testing.assert_array_equal(skipped.numbers, kept + 1)
    for place, row in enumerate(kept):
        np.testing.assert_array_equal(skipped.source(place), everything.source(row))
        np.testing.assert_array_equal(skipped.target(place), everything.target(row))
    long = [int(i) + 1 for i in np.flatnonzero(everything.source_lengths > 256)]
    assert skipped.findings["long_sources"] == Finding(len(long), long[:100])
    stop = f"{len(long)} with a source over data.max_source_length .rows {long[0]}, .* data.long_rows is stop"
    with pytest.raises(DataError, match=stop):
        encode(dialogues, t5, prompt, 256, 48, "stop")
    with pytest.raises(DataError, match="all 500 rows are longer than"):
        encode(dialogues, t5, prompt, 20, 3, "skip")
    assert "long_sources" not in encode(dialogues, t5, prompt, 5000, 5000, "stop").findings


def test_targets_are_the_first_reference_and_end_even_where_the_tokenizer_ends_nothing(
    tokenizers: dict[str, Any],
) -> None:
    gpt2 = tokenizers["gpt2"]
    split = split_of(("x", "a short text", "another"), ("x", "one two three four five six"))
    encoded = encode(split, gpt2, Prompt("{source}"), 8, 5)
    assert encoded.target(0).tolist() == [*gpt2("a short text").input_ids, gpt2.eos_token_id]
    assert encoded.target(1).tolist() == [*gpt2("one two three four").input_ids, gpt2.eos_token_id]
    assert encoded.findings["long_targets"] == Finding(1, [2])


def test_a_tokenizer_that_cannot_serve_is_an_error(tokenizers: dict[str, Any], data_folder: Path) -> None:
    from transformers import AutoTokenizer

    bert = AutoTokenizer.from_pretrained(data_folder / "tokenizers" / "bert-base-uncased")
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        encode(split_of(("a", "b")), bert, Prompt("{source}"), 8, 8)

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow gives no character offsets"):
        encode(split_of(("a", "b")), Slow(), Prompt("{source}"), 8, 8)  # type: ignore[arg-type]


@pytest.mark.slow
def test_percentiles_of_samsum_are_the_published_lengths(t5: Any, data_folder: Path) -> None:
    train = index(data_folder / "samsum")
    assert resolve_lengths(train, t5, "p85", "p90") == (255, 50)
    assert resolve_lengths(train, t5, 300, "p90") == (300, 50)


def test_a_percentile_is_rounded_up_and_capped() -> None:
    lengths = np.array([10, 20, 31, 600, 2000])
    assert resolve_length("p50", lengths) == 31
    assert resolve_length("p40", lengths) == 27  # 26.6
    assert resolve_length("p75", lengths) == resolve_length("p100", lengths) == 512
    assert resolve_length(700, lengths) == 700


@pytest.mark.parametrize("setting", [0, -1, "85", "p0", "p101", "p8.5", "P85", "p85 ", "", None])
def test_a_length_that_is_none_is_an_error(setting: Any) -> None:
    with pytest.raises(RecipeError, match="neither a number of tokens"):
        resolve_length(setting, np.array([1, 2, 3]))
