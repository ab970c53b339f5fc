"""Training from scratch: creates a tokenizer, and a model with random weights, as a folder in Hugging Face's layout.

The folder is `base` in the run's; from there on the run is one of full fine-tuning. It is a pure function of recipe and
training rows, and a run that goes on finds it there.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from loralab.atomic_files import whole_folder
from loralab.config.recipe import Recipe
from loralab.console.progress import say
from loralab.data.splits import AnySplit
from loralab.data.tokenizer_training import DEFAULT_VOCABULARY, GPT2, T5, train_tokenizer
from loralab.engine import create_base
from loralab.models import gpt2, is_gpt2, t5
from loralab.tasks import task_of

BASE = "base"


def make_random_base(recipe: Recipe, training_rows: Sequence[AnySplit], run: Path) -> Path:
    """The folder of the run's base, made where it is not there yet.

    Raises:
        RecipeError: the sizes or the vocabulary do not fit.
        DataError: the training rows are too few for the tokenizer.
        ModelError: there is no tokenizer where the recipe says so, or it lacks a padding or end token.
    """
    place = run / BASE
    if not place.is_dir():
        with whole_folder(place) as part:
            _write(recipe, training_rows, part)
    return place


def remove_base(run: Path) -> None:
    """Removes the base: the run has finished, and what it was trained to stands in `model`."""
    shutil.rmtree(run / BASE, ignore_errors=True)


def check_sizes(recipe: Recipe) -> None:
    """Raises RecipeError where the sizes are wrong, before anything is read."""
    model = recipe.model
    if model.init != "random":
        return
    if not is_gpt2(model.name):
        t5.new_config(model.name, model.sizes, vocab_size=1, pad_id=0, eos_id=0)
        return
    config = gpt2.new_config(model.name, model.sizes, vocab_size=1, start_id=0, end_id=0, pad_id=None)
    task = task_of(recipe.data)
    if task.packed_length is not None:
        task.check_lengths((1, task.packed_length), 0, causal=True, positions=config.n_positions)


def _write(recipe: Recipe, training_rows: Sequence[AnySplit], folder: Path) -> None:
    model = recipe.model
    assert model.tokenizer is not None
    if model.tokenizer == "train":
        vocabulary = model.vocabulary or DEFAULT_VOCABULARY
        say(f"A tokenizer of {vocabulary:,} tokens, from {sum(map(len, training_rows)):,} training rows ...")
        rows, special = chain.from_iterable(training_rows), GPT2 if is_gpt2(model.name) else T5
        train_tokenizer((text for row in rows for text in (row.source, *row.targets)), vocabulary, folder, special)
    create_base(model, str(folder) if model.tokenizer == "train" else model.tokenizer, recipe.training.one_seed, folder)
