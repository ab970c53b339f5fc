"""Draws: what may be drawn is what Transformers' classes leave; how often, is its probability; and a seed is a text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from tiny import end_with, make_bart, make_t5
from transformers import (
    AutoModelForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    T5ForConditionalGeneration,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loralab.config.generation import Decoding, uniforms
from loralab.on_torch.generation.generate import generate_ids
from loralab.on_torch.generation.sampling import draw, penalised, sharpened
from loralab.on_torch.loading.load import load_weights

CPU = torch.device("cpu")
SOURCES = [list(range(2, 4 + row)) for row in range(9)]


def logits(rows: int = 40, vocabulary: int = 5000) -> torch.Tensor:
    """As spread as a model's."""
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(3)) * 3


# The scores, whole arrays against Transformers' classes


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_the_repetition_penalty_is_transformers(penalty: float) -> None:
    written = torch.randint(0, 5000, (40, 30), generator=torch.Generator().manual_seed(4))
    written[:, 20:] = written[:, :10]  # tokens that stand there twice are penalised once
    for scores in (logits(), logits().log_softmax(-1)):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(written, scores.clone())
        assert torch.equal(penalised(scores, written, penalty), expected)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature_is_transformers(temperature: float) -> None:
    expected = TemperatureLogitsWarper(temperature)(None, logits())
    assert torch.equal(sharpened(logits(), Decoding(max_new_tokens=1, sample=True, temperature=temperature)), expected)


@pytest.mark.parametrize("top_k", [1, 7, 4999, 6000])
def test_top_k_is_transformers(top_k: int) -> None:
    tied = logits().round(decimals=1)
    for scores in (logits(), tied):
        expected = TopKLogitsWarper(top_k)(None, scores)
        assert torch.equal(sharpened(scores, Decoding(max_new_tokens=1, sample=True, top_k=top_k)), expected)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_top_p_is_transformers(top_p: float) -> None:
    expected = logits() if top_p == 1 else TopPLogitsWarper(top_p)(None, logits())
    assert torch.equal(sharpened(logits(), Decoding(max_new_tokens=1, sample=True, top_p=top_p)), expected)


def test_together_they_come_in_transformers_order() -> None:
    expected = logits()
    for warper in (TemperatureLogitsWarper(0.6), TopKLogitsWarper(50), TopPLogitsWarper(0.8)):
        expected = warper(None, expected)
    decoding = Decoding(max_new_tokens=1, sample=True, temperature=0.6, top_k=50, top_p=0.8)
    assert torch.equal(sharpened(logits(), decoding), expected)


# The draw


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    scores = torch.tensor([[2.0, -torch.inf, 1.0, 0.0, -1.0, 0.5, -torch.inf]])
    count, kept = 20_000, [0, 2, 3, 4, 5]
    tokens = draw(scores.expand(count, -1), torch.from_numpy(uniforms(42, range(count), 1))[:, 0])
    drawn = torch.bincount(tokens, minlength=7)
    assert drawn[[1, 6]].sum() == 0
    assert chisquare(drawn[kept].numpy(), (scores.double().softmax(-1)[0, kept] * count).numpy()).pvalue > 0.01


def test_the_ends_of_the_numbers_draw_nothing_impossible() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    assert draw(scores, torch.tensor([1e-30, 1.0])).tolist() == [1, 2]


def test_rows_and_seeds_have_streams_of_their_own() -> None:
    numbers = uniforms(42, range(300), 64)
    assert kstest(numbers.flatten(), "uniform").pvalue > 0.01
    correlations = np.corrcoef(numbers)
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 6 / 64**0.5, "45,000 pairs of rows, each within its standard errors"
    assert np.array_equal(uniforms(42, [7], 64)[0], numbers[7])
    assert not np.isin(uniforms(43, range(300), 64), numbers).any()


# Whole texts


def decoding(**settings: Any) -> Decoding:
    return Decoding(max_new_tokens=10, sample=True, **settings)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 that ends some of its answers."""
    folder = make_t5(tmp_path_factory.mktemp("models") / "t5", "untied")
    return end_with(folder, generate_ids(load_weights(folder, torch.float32, CPU), SOURCES, decoding(), 0))


def test_a_seed_is_a_text(t5: Path) -> None:
    model = load_weights(t5, torch.float32, CPU)
    first, again, other = (generate_ids(model, SOURCES, decoding(seed=seed), 0) for seed in (1, 1, 2))
    assert first == again and sum(a != b for a, b in zip(first, other, strict=True)) > 6
    same_source = generate_ids(model, [SOURCES[0]] * 9, decoding(), 0)
    assert len({tuple(answer) for answer in same_source}) > 3, "the same text in several rows is several draws"


def test_the_first_tokens_are_drawn_from_the_models_distribution(t5: Path) -> None:
    model = load_weights(t5, torch.float32, CPU)
    scores = model(torch.tensor([SOURCES[3]]), decoder_input_ids=torch.tensor([[0]])).logits[0, -1]
    settings = {"temperature": 0.8, "top_k": 8, "repetition_penalty": 1.2}
    count = 4000
    answers = generate_ids(model, [SOURCES[3]] * count, Decoding(max_new_tokens=1, sample=True, **settings), 0)
    end = model.config.eos_token_id
    drawn = torch.bincount(torch.tensor([answer[0] if answer else end for answer in answers]), minlength=120)
    expected = scores[None].detach()
    for warper in (RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(0.8), TopKLogitsWarper(8)):
        expected = warper(torch.tensor([[0]]), expected)
    probabilities = expected.double().softmax(-1)[0]
    kept = probabilities > 0
    assert int(kept.sum()) == 8 and drawn[~kept].sum() == 0
    assert chisquare(drawn[kept].numpy(), (probabilities[kept] * count).numpy()).pvalue > 0.01


SETTINGS: list[dict[str, Any]] = [{}, {"top_k": 5, "temperature": 1.5}, {"top_p": 0.7, "repetition_penalty": 1.4}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_transformers_t5_draws_what_ours_does(settings: dict[str, Any], t5: Path, tmp_path: Path) -> None:
    """The same numbers meet the same scores, though one writes with our loop and the other with its own."""
    folder = Path(shutil.copytree(t5, tmp_path / "t5"))
    end_with(folder, generate_ids(load_weights(folder, torch.float32, CPU), SOURCES, decoding(**settings), 0))
    mine, other = load_weights(folder, torch.float32, CPU), T5ForConditionalGeneration.from_pretrained(folder).eval()
    answers = generate_ids(mine, SOURCES, decoding(**settings), 0)
    assert generate_ids(other, SOURCES, decoding(**settings), 0) == answers
    assert len({len(answer) for answer in answers}) > 2


# Transformers' other classes


@pytest.mark.parametrize("settings", [{}, {"beams": 3, "length_penalty": 0.5}, {"repetition_penalty": 1.5}], ids=str)
def test_an_encoder_decoder_writes_as_it_would_itself(
    settings: dict[str, Any], data_folder: Path, tmp_path: Path
) -> None:
    model: Any = load_weights(make_bart(tmp_path / "bart", data_folder / "tokenizers/t5"), torch.float32, CPU)
    model.generation_config.no_repeat_ngram_size = 1  # a setting of the checkpoint that nobody asked for
    answers = generate_ids(model, SOURCES, Decoding(max_new_tokens=9, **settings), 0)
    assert model.generation_config.no_repeat_ngram_size == 1, "it is put back"
    model.generation_config.no_repeat_ngram_size = 0
    given = {("num_beams" if key == "beams" else key): value for key, value in settings.items()}
    for source, answer in zip(SOURCES, answers, strict=True):
        row = model.generate(torch.tensor([source]), max_new_tokens=9, do_sample=False, **given)[0, 1:].tolist()
        assert answer == (row[: row.index(1)] if 1 in row else row)


@pytest.mark.parametrize("settings", [{}, {"beams": 3}, {"repetition_penalty": 1.5}], ids=str)
def test_a_decoder_alone_continues_the_text(settings: dict[str, Any], data_folder: Path) -> None:
    """Rows of different lengths, padded on the left, write what each writes alone; the prompt is not repeated."""
    model: Any = AutoModelForCausalLM.from_pretrained(data_folder / "models/stories260K").eval()
    answers = generate_ids(model, SOURCES, Decoding(max_new_tokens=9, **settings), 0)
    given = {("num_beams" if key == "beams" else key): value for key, value in settings.items()}
    for source, answer in zip(SOURCES, answers, strict=True):
        ids = torch.tensor([source])
        row = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=2, **given
        )[0, len(source) :].tolist()
        assert answer == (row[: row.index(2)] if 2 in row else row)


def test_a_decoder_alone_draws_the_same_in_any_company(data_folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(data_folder / "models/stories260K").eval()
    together = generate_ids(model, SOURCES, decoding(), 0)
    company = [source if row in (0, 4) else [2, 3] for row, source in enumerate(SOURCES)]
    apart = generate_ids(model, company, decoding(), 0)
    assert [apart[row] for row in (0, 4)] == [together[row] for row in (0, 4)]


@pytest.mark.parametrize("kind", ["t5", "transformers", "decoder alone"])
def test_tokens_are_heard_as_they_are_written(kind: str, t5: Path, data_folder: Path) -> None:
    model: Any = {
        "t5": lambda: load_weights(t5, torch.float32, CPU),
        "transformers": lambda: T5ForConditionalGeneration.from_pretrained(t5).eval(),
        "decoder alone": lambda: AutoModelForCausalLM.from_pretrained(data_folder / "models/stories260K").eval(),
    }[kind]()
    for settings in (Decoding(max_new_tokens=10), decoding(seed=5)):
        heard: list[int] = []
        (answer,) = generate_ids(model, SOURCES[8:], settings, 0, None, heard.append)
        assert heard == answer and heard
