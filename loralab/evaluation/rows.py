"""The evaluated rows, as text and as tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loralab.config.recipe import Recipe
from loralab.console.progress import say
from loralab.data.chat_template import transcript
from loralab.data.few_shot import Shots, draw_shots, shots_in_words, with_shots
from loralab.data.rows import Example
from loralab.data.sequence_packing import encode_packed
from loralab.data.span_corruption import Encoded, encode_documents
from loralab.data.splits import AnySplit, Split, read_split
from loralab.data.tokenization import NO_LIMIT, encode, encode_sources, flat, prompt_of
from loralab.data.tokenized_split import EncodedSplit
from loralab.engine import Engine


def read_evaluation_rows(recipe: Recipe) -> Split:
    """The rows that the reported numbers come from."""
    return read_split(recipe.data, recipe.evaluation.split)


def leaked_rows(training: AnySplit, rows: AnySplit, *more: AnySplit) -> int:
    """How many of the evaluated rows have a source that the model was trained on, white space apart; `more` was trained on too."""
    hashes = np.concatenate([each.source_hashes for each in (training, *more)])
    return int(np.isin(rows.source_hashes, hashes).sum())


def source_texts(rows: Split, chat: bool) -> list[str]:
    """The sources as people read them: of a chat, what is said in it."""
    return [transcript(example.source) if chat else example.source for example in rows.examples]


def encode_rows(
    engine: Engine, recipe: Recipe, rows: AnySplit, lengths: tuple[int, int], long_rows: str | None = None
) -> Encoded:
    """Tokens of sources and targets, or of documents that are masked; `long_rows` in the place of the recipe's."""
    data = recipe.data
    if data.objective:
        return encode_documents(rows, engine.tokenizer, data.objective, *lengths, seed=recipe.training.one_seed)
    prompt = prompt_of(data, engine.tokenizer, engine.causal, engine.labels)
    if data.packing:
        return encode_packed(rows, engine.tokenizer, lengths[1], recipe.training.one_seed)
    return encode(rows, engine.tokenizer, prompt, *lengths, long_rows or data.long_rows)


def encode_evaluation_rows(engine: Engine, recipe: Recipe, rows: Split, lengths: tuple[int, int]) -> Encoded:
    """Their tokens. None is left out for its length, or two models would be held against each other on different rows."""
    return encode_rows(engine, recipe, rows, lengths, "cut" if recipe.data.long_rows == "skip" else None)


def encode_asked(
    engine: Engine, recipe: Recipe, rows: Split, lengths: tuple[int, int], training: AnySplit | None
) -> Encoded:
    """The tokens of the rows that are reported: after worked examples from the training rows, where the recipe wants any."""
    encoded, settings = encode_evaluation_rows(engine, recipe, rows, lengths), recipe.evaluation
    if not settings.shots:
        return encoded
    assert isinstance(encoded, EncodedSplit) and training is not None
    numbered = [(example.row, example.source) for example in rows.examples]
    drawn = draw_shots(numbered, rows.source_hashes, training, settings.shots, settings.seed)
    alone = [encoded.source(i).tolist() for i in range(len(encoded))]
    preceded, shots = after_shots(engine, alone, [source for _, source in numbered], drawn, encoded.max_source_length)
    ids, offsets = flat(preceded)
    return replace(encoded, source_ids=ids, source_offsets=offsets, shots=shots)


def after_shots(
    engine: Engine, ids: list[list[int]], sources: list[str], drawn: list[list[Example]], max_length: int
) -> tuple[list[list[int]], Shots]:
    """`with_shots` for this engine's prompt and tokenizer, told on the screen."""

    def ask(source: str) -> list[int]:
        return encode_sources([source], engine.tokenizer, engine.prompt, NO_LIMIT)[0][0]

    preceded, shots = with_shots(ids, sources, drawn, engine.prompt, ask, max_length)
    say(f"{shots_in_words(shots.as_json()).capitalize()}.")
    return preceded, shots
