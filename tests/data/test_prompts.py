"""Prompts and their cuts, against the tokenizer's own ids and truncation, and brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from folders import INSTRUCTION, read

from loralab.data.prompts import Prompt
from loralab.data.splits import Split
from loralab.data.tokenization import encode_sources
from loralab.errors import DataError, RecipeError

# Prompts.


def test_braces_in_data_and_doubled_braces_are_plain_characters() -> None:
    prompt = Prompt('{{"text": "{dialogue}"}}', "dialogue")
    assert prompt.fill("{0} {dialogue} }{ %s") == '{"text": "{0} {dialogue} }{ %s"}'
    assert (Prompt("summarize: {source}").prefix, Prompt("summarize: {source}", "document").suffix) == (
        "summarize: ",
        "",
    )
    assert Prompt(INSTRUCTION, "dialogue").fill("x") == "Summarize the following conversation.\n\nx\n\nSummary: "


BAD_TEMPLATES = {
    "Summarize.": ["{dialogue} exactly once", "it has none"],
    "": ["{dialogue} exactly once"],
    "{{dialogue}}": ["it has none"],
    "{dialog}": ["unknown placeholder {dialog}", "Did you mean 'dialogue'?"],
    "{}": ["unknown placeholder {}", "dialogue, source"],
    "{dialogue.upper}": ["unknown placeholder {dialogue.upper}"],
    "{dialogue!r}": ["unknown placeholder {dialogue!r}"],
    "{dialogue:>9}": ["unknown placeholder {dialogue:>9}"],
    "{dialogue} {dialogue}": ["exactly once", "it has {dialogue} and {dialogue}"],
    "{dialogue} {source}": ["exactly once", "it has {dialogue} and {source}"],
    "{dialogue": ["unbalanced brace"],
    "dialogue}": ["unbalanced brace"],
    "{dialogue} {": ["unbalanced brace"],
}


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_a_bad_template_is_one_clear_error(template: str) -> None:
    with pytest.raises(RecipeError) as raised:
        Prompt(template, "dialogue")
    message = str(raised.value)
    assert [fragment for fragment in BAD_TEMPLATES[template] if fragment not in message] == [], message


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_whole_rows_are_the_tokenizers_own_ids(name: str, tokenizers: dict[str, Any], dialogues: Split) -> None:
    prompt = Prompt(INSTRUCTION, "dialogue")
    sources = [example.source for example in dialogues.examples]
    rows, num_cut = encode_sources(sources, tokenizers[name], prompt, 4096)
    assert num_cut == 0
    for row, source in zip(rows, sources, strict=True):
        text = f"Summarize the following conversation.\n\n{source}\n\nSummary: "
        assert row == tokenizers[name](text, verbose=False).input_ids


def test_a_cut_row_keeps_prefix_suffix_and_end(t5: Any, dialogues: Split) -> None:
    prompt = Prompt(INSTRUCTION, "dialogue")
    prefix, suffix = t5(prompt.prefix).input_ids[:-1], t5(prompt.suffix).input_ids
    assert t5.decode(suffix) == "Summary:</s>"
    sources = [example.source for example in dialogues.examples]
    whole = t5([prompt.fill(source) for source in sources], verbose=False).input_ids
    rows, num_cut = encode_sources(sources, t5, prompt, 128)
    assert num_cut == sum(len(ids) > 128 for ids in whole) > 300
    for row, ids in zip(rows, whole, strict=True):
        assert len(row) <= 128
        assert row == ids if len(ids) <= 128 else row[-len(suffix) :] == suffix
        source_ids = row[len(prefix) : -len(suffix)]
        assert row[: len(prefix)] == prefix
        assert source_ids == ids[len(prefix) :][: len(source_ids)]
    # only a token that is nothing without its successor (a lone word boundary) may be given up
    assert all(len(row) >= 126 for row, ids in zip(rows, whole, strict=True) if len(ids) > 128)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
@pytest.mark.parametrize("template", [INSTRUCTION, "summarize: {dialogue}", "«{dialogue}»TL;DR"])
def test_no_longer_cut_at_a_token_would_fit(
    name: str, template: str, tokenizers: dict[str, Any], data_folder: Path
) -> None:
    """Against brute force over every token end, on chats with emoji (several tokens a character in GPT-2)."""
    tokenizer, prompt = tokenizers[name], Prompt(template, "dialogue")
    num_cut = 0
    for example in read(data_folder / "samsum", "validation", max_validation_rows=60).examples:
        source = example.source + " 😀🎉"
        whole = tokenizer(prompt.fill(source), return_offsets_mapping=True)
        for limit in {48, len(whole.input_ids) - 1}:
            if not 48 <= limit < len(whole.input_ids):
                continue
            num_cut += 1
            ends = {end - len(prompt.prefix) for _, end in whole.offset_mapping}
            cuts = [source[:end] for end in sorted(ends) if 0 < end < len(source)]
            fitting = [ids for ids in tokenizer([prompt.fill(cut) for cut in cuts]).input_ids if len(ids) <= limit]
            assert prompt.cut(source, tokenizer, limit) == fitting[-1]
    assert num_cut > 50


def test_without_a_suffix_the_cut_is_the_tokenizers_own_truncation(t5: Any, dialogues: Split) -> None:
    prompt = Prompt("summarize: {dialogue}", "dialogue")
    sources = [example.source for example in dialogues.examples]
    rows, num_cut = encode_sources(sources, t5, prompt, 100)
    truncated = t5([prompt.fill(source) for source in sources], truncation=True, max_length=100).input_ids
    word_boundary = t5.convert_tokens_to_ids(
        "▁"
    )  # alone before the end it stands for no text, and the cut leaves it out
    expected = [[*ids[:-2], ids[-1]] if ids[-2] == word_boundary else ids for ids in truncated]
    assert num_cut > 400
    assert rows == expected


def test_a_prompt_that_leaves_no_room_is_an_error(t5: Any) -> None:
    prompt = Prompt(INSTRUCTION, "dialogue")
    num_tokens = len(t5(prompt.fill("")).input_ids)
    with pytest.raises(DataError, match=f"The prompt alone takes {num_tokens} tokens.* max_source_length {num_tokens}"):
        encode_sources(["hello there"], t5, prompt, num_tokens)
    assert encode_sources(["hello there"], t5, prompt, num_tokens + 1) == ([t5(prompt.fill("hello")).input_ids], 1)
