"""What our GPT-2 writes, token by token, held against Transformers' `generate`; stop texts; and what it refuses."""

from __future__ import annotations

import io
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CPU, end_with, make_gpt2, our_gpt2, their_gpt2
from transformers import AutoTokenizer, GPT2LMHeadModel

from loralab import LoRASpec, UserError, attach, generate, load_model
from loralab.config.generation import Decoding
from loralab.data.stop_sequences import Stops, final_part, truncate_at_stop
from loralab.inference.generate import NO_DATA, GenerateRequest, run_request
from loralab.inference.text_generator import TextGenerator
from loralab.on_torch.generation.generate import generate_ids, pad
from loralab.on_torch.models.gpt2 import GPT2
from loralab.on_torch.models.registry import family_of
from loralab.runs.find_saved_model import find_saved_model

NEW = 12


def prompts(count: int) -> list[list[int]]:
    """Of 1, 4, 7, … tokens."""
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(2, 97, (1 + 3 * row,), generator=numbers).tolist() for row in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 whose answers have different lengths."""
    place = make_gpt2(tmp_path_factory.mktemp("gpt2") / "model")
    return end_with(place, generate_ids(our_gpt2(place), prompts(16), Decoding(max_new_tokens=NEW), 0))


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[GPT2, GPT2LMHeadModel]:
    return our_gpt2(folder), their_gpt2(folder)


def expected(model: Any, sources: list[list[int]], beams: int = 1, **settings: Any) -> list[list[int]]:
    """What Transformers adds to the prompts, padded on the left, before the end."""
    ids, mask = pad(sources, 0, CPU, "left")
    settings = {"max_new_tokens": NEW, "num_beams": beams, "do_sample": False, "pad_token_id": 0, **settings}
    output = model.generate(input_ids=ids, attention_mask=mask, **settings)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    rows = [row[ids.shape[1] :] for row in output.tolist()]
    return [row[: next((i for i, token in enumerate(row) if token in ends), NEW)] for row in rows]


# The same tokens


def test_every_combination_of_settings_equals_transformers(models: tuple[GPT2, GPT2LMHeadModel]) -> None:
    mine, other = models
    sources, lengths = prompts(9), []
    for penalty in (0.8, 1.0, 1.5):
        answers = generate_ids(mine, sources, Decoding(max_new_tokens=NEW, repetition_penalty=penalty), 0)
        assert answers == expected(other, sources, repetition_penalty=penalty)
        lengths += [len(answer) for answer in answers]
    for beams, power, stop, penalty in product((2, 4), (0.0, 2.0), (False, True, "never"), (1.0, 1.5)):
        settings = {"length_penalty": power, "early_stopping": stop, "repetition_penalty": penalty}
        answers = generate_ids(mine, sources, Decoding(max_new_tokens=NEW, beams=beams, **settings), 0)
        assert answers == expected(other, sources, beams, **settings), settings
        lengths += [len(answer) for answer in answers]
    assert sum(length < NEW for length in lengths) > 20 and lengths.count(NEW) > 20, "some end and some are cut"


@pytest.mark.parametrize("beams", [1, 4])
def test_prompts_of_one_token(beams: int, models: tuple[GPT2, GPT2LMHeadModel]) -> None:
    """Nothing is remembered yet when they are gone on from."""
    answers = generate_ids(models[0], [[5], [7]], Decoding(max_new_tokens=NEW, beams=beams), 0)
    assert answers == expected(models[1], [[5], [7]], beams)


@pytest.mark.parametrize("beams", [1, 4])
def test_several_tokens_may_end_a_text(beams: int, folder: Path) -> None:
    mine, other, sources = our_gpt2(folder), their_gpt2(folder), prompts(9)
    second = next(
        token for answer in generate_ids(mine, sources, Decoding(max_new_tokens=NEW), 0) for token in answer[2:]
    )
    mine.ends = (*mine.ends, second)
    other.generation_config.eos_token_id = list(mine.ends)
    answers = generate_ids(mine, sources, Decoding(max_new_tokens=NEW, beams=beams), 0)
    assert answers == expected(other, sources, beams)


def test_draws_are_those_of_the_same_numbers_inside_transformers(models: tuple[GPT2, GPT2LMHeadModel]) -> None:
    mine, other = models
    for settings in ({}, {"top_k": 5, "temperature": 1.5}, {"top_p": 0.7, "repetition_penalty": 1.4}):
        decoding = Decoding(max_new_tokens=NEW, sample=True, **settings)
        assert generate_ids(mine, prompts(9), decoding, 0) == generate_ids(other, prompts(9), decoding, 0)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_in_use_gives_the_logits_of_one_pass(beams: int, models: tuple[GPT2, GPT2LMHeadModel]) -> None:
    """Rows of 1 to 22 tokens, beams in new orders, and prompts that leave."""
    mine, steps = models[0], 5
    ids, mask = pad(prompts(8), 0, CPU, "left")
    memory = family_of(mine).start_decoding(mine, ids, mask, steps, beams)
    whole, real = (x.repeat_interleave(beams, 0) for x in (ids, mask))
    stay = torch.arange(8) % 3 != 0
    for step in range(steps):
        with torch.no_grad():
            torch.testing.assert_close(memory.next_logits(whole[:, -1]), mine(whole, real).logits[:, -1])
        places = torch.arange(len(whole)).view(-1, beams).flip(1).flatten()
        memory.reorder(places)
        whole, real = (x[places] for x in (whole, real))
        if step == 2:
            memory.keep(stay)
            whole, real = (x.view(8, beams, -1)[stay].flatten(0, 1) for x in (whole, real))
        whole = torch.cat([whole, torch.randint(0, 97, (len(whole), 1))], 1)
        real = torch.cat([real, torch.ones_like(real[:, :1])], 1)


@pytest.mark.parametrize("settings", [{}, {"beams": 4}, {"sample": True}, {"repetition_penalty": 1.5}], ids=str)
def test_a_row_is_answered_the_same_in_any_company(
    settings: dict[str, Any], models: tuple[GPT2, GPT2LMHeadModel]
) -> None:
    sources, decoding = prompts(16), Decoding(max_new_tokens=NEW, **settings)
    together = generate_ids(models[0], sources, decoding, 0)
    others = [sources[row] if row % 3 else [2, 3] for row in range(16)]
    apart = generate_ids(models[0], others, decoding, 0)
    assert [apart[row] for row in range(16) if row % 3] == [together[row] for row in range(16) if row % 3]


def test_a_prompts_keys_and_values_are_never_copied_for_a_beam(models: tuple[GPT2, GPT2LMHeadModel]) -> None:
    memory: Any = family_of(models[0]).start_decoding(models[0], *pad(prompts(3), 0, CPU, "left"), 6, beams=4)
    assert all(each.values.shape == (3, 4, 6, 8) for each in memory.shared), "6 of the 7 tokens"
    assert all(each.values.shape == (12, 4, 64, 8) for each in memory.own), "only what is written"


@pytest.mark.parametrize("settings", [{}, {"beams": 4}], ids=str)
def test_an_adapter_writes_the_same_merged_and_factored(settings: dict[str, Any], folder: Path) -> None:
    model, sources, decoding = our_gpt2(folder), prompts(8), Decoding(max_new_tokens=NEW, **settings)
    base = generate_ids(model, sources, decoding, 0)
    adapter = attach(model, LoRASpec(rank=4, alpha=8, rules=["c_attn", "c_proj", "c_fc", "wpe"]))
    torch.manual_seed(2)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    factored = generate_ids(model, sources, decoding, 0)
    assert factored != base
    assert generate_ids(adapter.merge(), sources, decoding, 0) == factored


# Texts


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """A random GPT-2 with GPT-2's own tokenizer."""
    tokenizer = data_folder / "tokenizers/gpt2"
    return make_gpt2(tmp_path_factory.mktemp("gpt2") / "speaker", 50257, tokenizer=tokenizer, n_layer=1)


@pytest.fixture(scope="module")
def spoken(speaker: Path) -> tuple[Any, Any, str]:
    """The model, its tokenizer, and what it says after a text."""
    model, tokenizer = load_model(str(speaker), dtype="float32", device="cpu")
    return model, tokenizer, generate(model, tokenizer, ["A text"], max_new_tokens=NEW)[0]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_stop_text_ends_an_answer_before_it(beams: int, spoken: tuple[Any, Any, str]) -> None:
    """In the middle of a token too, and over two of them; where it does not come, max_new_tokens ends the answer."""
    model, tokenizer, _ = spoken
    whole = generate(model, tokenizer, ["A text"], max_new_tokens=NEW, beams=beams)[0]
    for length in (1, 5, 9):
        stop = whole[6 : 6 + length]
        (answer,) = generate(model, tokenizer, ["A text"], max_new_tokens=NEW, beams=beams, stop=["never so", stop])
        assert answer == whole[: whole.index(stop)] or beams > 1
        assert stop not in answer
    never = generate(
        model, tokenizer, ["A text"], max_new_tokens=NEW, beams=beams, stop=["a stop text that never comes"]
    )
    assert never == [whole]
    ids, stops = tokenizer(["A text"]).input_ids, Stops(tokenizer, ["never so"])
    assert len(generate_ids(model, ids, Decoding(max_new_tokens=NEW, beams=beams), 0, stops=stops)[0]) == NEW


@pytest.mark.parametrize("beams", [1, 3])
def test_the_tokens_end_where_transformers_ends_them(beams: int, spoken: tuple[Any, Any, str], speaker: Path) -> None:
    model, tokenizer, whole = spoken
    stop = whole[6:9]
    ids = tokenizer(["A text", "Another"]).input_ids
    decoding = Decoding(max_new_tokens=NEW, beams=beams, stop=(stop,))
    answers = generate_ids(model, ids, decoding, 0, stops=Stops(tokenizer, (stop,)))
    other = their_gpt2(speaker)
    assert answers == generate_ids(other, ids, decoding, 0, stops=Stops(tokenizer, (stop,)))
    given = {"max_new_tokens": NEW, "num_beams": beams, "do_sample": False, "pad_token_id": 50256}
    alone = other.generate(torch.tensor([ids[0]]), stop_strings=[stop], tokenizer=tokenizer, **given)
    assert answers[0] == alone[0, len(ids[0]) :].tolist()


def test_stop_texts_in_words_and_parts_of_them() -> None:
    assert truncate_at_stop("one two three", ["three", "two"]) == "one " and truncate_at_stop("one", ["two"]) == "one"
    assert final_part("one tw", ["two", "x"]) == "one " and final_part("one two!", ["two"]) == "one two!"
    assert final_part("one\n", ["\n\n"]) == "one" and final_part("abab", ["babx", "bx"]) == "a"


def test_a_stop_text_is_seen_in_the_last_tokens_alone(data_folder: Path) -> None:
    """The window is wide enough for a stop text of which each byte is a token."""
    tokenizer = AutoTokenizer.from_pretrained(data_folder / "tokenizers/gpt2")
    stop = "🦜🦜"
    stops = Stops(tokenizer, [stop])
    ids = tokenizer("word " * 30).input_ids + tokenizer(stop).input_ids
    assert stops.met([ids, ids[:-1]]) == [True, False] and len(ids) > stops.window


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_never_sees_a_stop_text(
    speaker: Path, spoken: tuple[Any, Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = spoken[2].strip(), list[str]()
    stop = whole[8:14]
    settings = ["model.dtype=float32", "model.device=cpu", f"evaluation.max_new_tokens={NEW}"]
    settings += ["data.max_source_length=16", "data.max_target_length=16"]
    recipe, saved = find_saved_model(speaker, [*settings, f"evaluation.stop=[{stop!r}]"], None, NO_DATA)
    screen = Screen()
    monkeypatch.setattr(screen, "write", lambda text: pieces.append(text) or len(text))
    said = TextGenerator(recipe, saved).stream("A text", screen)
    assert said == whole[: whole.index(stop)].strip() and len(pieces) > 2
    assert "".join(pieces).strip() == said
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    result, words = run_request(speaker, GenerateRequest(texts=["A text"]), settings, None, NEW, [stop, "\\n\\n"])
    assert words == said and result == {"answers": [said]}


# What is refused


def test_an_empty_prompt_begins_a_text(spoken: tuple[Any, Any, str]) -> None:
    """GPT-2's texts begin after <|endoftext|>; without such a token there is nothing to begin with."""
    model, tokenizer, _ = spoken
    assert generate(model, tokenizer, ["", "A text"], max_new_tokens=4) == [
        generate(model, tokenizer, [text], max_new_tokens=4)[0] for text in ("<|endoftext|>", "A text")
    ]
    with pytest.raises(UserError, match="Text number 2 has no tokens: there is nothing to go on from"):
        generate_ids(model, [[5], []], Decoding(max_new_tokens=4), 0)
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(UserError, match="The text '' has no tokens, and the tokenizer has none to begin a text with"):
        generate(model, bare, [""], max_new_tokens=4)


def test_a_context_longer_than_the_positions(spoken: tuple[Any, Any, str]) -> None:
    model = spoken[0]
    (answer,) = generate_ids(model, [[5] * 60], Decoding(max_new_tokens=4), 0)
    assert len(answer) == 4, "64 positions are enough"
    with pytest.raises(
        UserError, match=r"Text number 2 has 61 tokens, and with max_new_tokens 4 that is 65: more than the 64"
    ):
        generate_ids(model, [[5], [5] * 61], Decoding(max_new_tokens=4), 0)


def test_an_empty_stop_text_is_refused(spoken: tuple[Any, Any, str]) -> None:
    with pytest.raises(UserError, match=r"stop\.0 is ''; String should have at least 1 character"):
        generate(*spoken[:2], ["A text"], max_new_tokens=4, stop=[""])
