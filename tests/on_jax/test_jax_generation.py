"""What T5 writes in JAX, token by token, held against the PyTorch engine: greedy, by beam search, by draws; and how many programs
are compiled for it."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_cases import make_ending_t5, random_sources
from sizes import sized
from tiny import make_t5, ours

import loralab
from loralab.config.generation import Decoding
from loralab.data.prompts import Prompt
from loralab.data.splits import Split
from loralab.errors import UserError
from loralab.on_jax.generation.decode import decode
from loralab.on_jax.generation.generate import batch_shape, generate, generate_ids, pad
from loralab.on_jax.loading.load import load_model, load_weights
from loralab.on_jax.models.t5_decoding import next_logits, start
from loralab.on_torch.generation import generate as on_torch

# A trained model and real text


@pytest.mark.parametrize("beams", [1, 4])
def test_real_dialogues_are_answered_as_pytorch_does(beams: int, data_folder: Path, dialogues: Split) -> None:
    folder = str(data_folder / "models/chat-t5-mini")
    prompt = Prompt("Summarize the following conversation.\n\n{dialogue}\n\nSummary: ", "dialogue")
    shortest = sorted((row.source for row in dialogues.examples), key=len)[: 64 : sized(1, 4)]
    texts, settings = (
        [prompt.prefix + source + prompt.suffix for source in shortest],
        {"max_new_tokens": 16, "beams": beams},
    )
    answers = generate(*load_model(folder, "float32"), texts, **settings)
    assert answers == loralab.generate(*loralab.load_model(folder, "float32", "cpu"), texts, **settings)
    assert len(set(answers)) > 1 and all(answers)


# Tiny random models: settings, and answers that end at different steps

SETTINGS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5},
    {"sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"beams": 4},
    {"beams": 2, "length_penalty": -1.0, "early_stopping": True, "repetition_penalty": 1.5},
    {"beams": 5, "length_penalty": 0.5, "early_stopping": "never"},
]


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ending_t5(tmp_path_factory.mktemp("ending"))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_setting_writes_pytorchs_tokens(settings: dict[str, Any], ending: Path) -> None:
    decoding, sources = Decoding(max_new_tokens=12, **settings), random_sources(9)
    answers = generate_ids(*load_weights(ending), sources, decoding)
    assert answers == on_torch.generate_ids(ours(ending), sources, decoding, 0)
    assert len({len(answer) for answer in answers}) > 1, "some end before they are cut"


def test_a_row_is_answered_the_same_in_any_company(ending: Path) -> None:
    model, params = load_weights(ending)
    sources, decoding = random_sources(16), Decoding(max_new_tokens=12, beams=4)
    together = generate_ids(model, params, sources, decoding)
    others = [sources[row] if row % 3 else [2, 3] for row in range(16)]
    apart = generate_ids(model, params, others, decoding)
    assert [apart[row] for row in range(16) if row % 3] == [together[row] for row in range(16) if row % 3]


def test_draws_are_a_rows_own_and_a_seeds_own(ending: Path) -> None:
    model, params = load_weights(ending)
    one, again, other = (
        generate_ids(model, params, random_sources(9), Decoding(max_new_tokens=12, sample=True, seed=seed))
        for seed in (1, 1, 2)
    )
    assert one == again != other


def test_steps_with_beams_equal_one_pass_over_the_whole_target(tmp_path: Path) -> None:
    model, params = load_weights(make_t5(tmp_path, "untied"))
    beams, steps = 3, 5
    ids, mask = pad(random_sources(2), 2, 32)
    targets = np.random.default_rng(0).integers(2, 120, (2 * beams, steps))
    source, cache = jax.jit(start, static_argnums=(0, 4, 5))(model, params, ids, mask, steps, beams)
    step = jax.jit(lambda tokens, cache: next_logits(model, params, tokens, source, cache))
    stepwise = []
    for place in range(steps):
        logits, cache = step(targets[:, place], cache)
        stepwise.append(logits)
    assert source.cross[0][0].shape[0] == 2, "the source's keys are never copied for a beam"
    forward = jax.jit(model.forward)
    whole = forward(params, ids.repeat(beams, 0), mask.repeat(beams, 0), decoder_input_ids=targets).logits
    np.testing.assert_allclose(jnp.stack(stepwise, 1), whole, rtol=1e-5, atol=1e-5 * float(jnp.abs(whole).max()))


def test_bf16_writes_with_a_cache_of_its_own_dtype(ending: Path) -> None:
    model, params = load_weights(ending, jnp.dtype("bfloat16"))
    answers = generate_ids(model, params, random_sources(3), Decoding(max_new_tokens=6, beams=2))
    assert all(0 < len(answer) <= 6 for answer in answers)


# Shapes


def test_shapes_are_few_whatever_the_lengths() -> None:
    draw = np.random.default_rng(0)
    for beams in (1, 4):
        decoding, shapes = Decoding(max_new_tokens=64, beams=beams), set()
        for _ in range(50):
            lengths = sorted(draw.integers(1, 1025, draw.integers(1, 2000)).tolist(), reverse=True)
            done = 0
            while done < len(lengths):
                size, length = batch_shape(len(lengths) - done, lengths[done], decoding)
                assert length >= lengths[done] and size * (length + beams * 64) <= max(32768, length + beams * 64)
                shapes.add((size, length))
                done += size
        assert {length for _, length in shapes} <= {32, 64, 128, 256, 512, 1024}
        assert all(size & (size - 1) == 0 for size, _ in shapes)


def test_lengths_and_seeds_within_a_shape_compile_nothing(ending: Path) -> None:
    model, params = load_weights(ending)
    before = None
    for rows, seed in ((9, 1), (12, 2), (16, 3)):
        decoding = Decoding(max_new_tokens=12, sample=True, seed=seed)
        generate_ids(model, params, [source[:29] for source in random_sources(rows)], decoding)
        assert decode._cache_size() == (before := before or decode._cache_size())


# The door


def test_nothing_asked_nothing_written(ending: Path) -> None:
    assert generate_ids(*load_weights(ending), [], Decoding(max_new_tokens=6)) == []


def test_the_settings_are_those_of_the_other_engine() -> None:
    from loralab.on_torch.generation.generate import generate as write

    here, there = (inspect.signature(f).parameters for f in (generate, write))
    assert [str(p) for name, p in here.items() if name != "params" and p.kind is p.KEYWORD_ONLY] == [
        str(p) for p in there.values() if p.kind is p.KEYWORD_ONLY
    ]


class Numbers:
    """A tokenizer whose texts are the tokens' numbers."""

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])

    def batch_decode(self, answers: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, answer)) for answer in answers]


def test_an_answer_is_cut_before_a_stop_text(ending: Path) -> None:
    tokenizer: Any = Numbers()
    model, params = load_weights(ending)
    texts = [" ".join(map(str, source)) for source in random_sources(9)]
    whole = generate(model, params, tokenizer, texts, max_new_tokens=12)
    stop = whole[0].split()[3]
    cut = generate(model, params, tokenizer, texts, max_new_tokens=12, stop=[stop])
    assert cut == [answer.partition(stop)[0] for answer in whole] != whole
    with pytest.raises(UserError, match=r"in JAX no hypothesis ends with a text\. Set beams to 1"):
        generate(model, params, tokenizer, texts, max_new_tokens=12, stop=[stop], beams=2)


def test_a_wrong_setting_is_one_clear_error(ending: Path) -> None:
    tokenizer: Any = None
    with pytest.raises(UserError, match=r"top_p is 0\.9, which means something only with sample: true"):
        generate(*load_weights(ending), tokenizer, ["text"], max_new_tokens=4, top_p=0.9)
    assert generate(*load_weights(ending), tokenizer, [], max_new_tokens=4) == []
    with pytest.raises(UserError, match=r"texts is the one text 'text'; it must be a list of texts"):
        generate(*load_weights(ending), tokenizer, "text", max_new_tokens=4)
    with pytest.raises(UserError, match=r"params must be a T5's weights, and not shared, q\. Of an adapted model give"):
        generate(load_weights(ending)[0], {"shared": {}, "q": {}}, tokenizer, ["text"], max_new_tokens=4)
