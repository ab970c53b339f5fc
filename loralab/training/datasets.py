"""The rows of a run: read as text, made into tokens, and what its record says of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.config.data import DataSettings
from loralab.config.recipe import Recipe
from loralab.console.progress import say
from loralab.data.encoded import Encoded, Trained
from loralab.data.mixture import Mixture
from loralab.data.row_records import builtin_card, describe_rows
from loralab.data.splits import AnySplit, Split, StreamedSplit, announce
from loralab.data.training_rows import read_training_rows
from loralab.engine import Engine
from loralab.evaluation.forgetting import Forgotten, encode_held_out, read_held_out, write_forgotten
from loralab.evaluation.rows import encode_asked, leaked_rows, read_evaluation_rows
from loralab.metrics.labels import Labels
from loralab.metrics.scores import Scores
from loralab.tasks import task_of
from loralab.training.mixture import announce_mixture, describe_shares, encode_mixture, mix, read_mixture, say_shares
from loralab.training.validation import Choosing, read_choosing_rows


@dataclass(frozen=True)
class RunDatasets:
    """The rows of a run, as text."""

    training: StreamedSplit
    """Training rows of the main data."""
    mixture: dict[str, StreamedSplit]
    """Training rows of further data."""
    choosing: Choosing | None
    """Measured on while training."""
    evaluated: Split
    leaked: int
    """Number of evaluated rows whose source is among the training rows too."""
    held_out: dict[str, Split]
    """Rows of other data, on which forgetting is measured."""
    labels: Labels | None
    """Labels of a classifier's rows."""

    @property
    def trained_on(self) -> list[StreamedSplit]:
        """The main data's training rows, and those of further data."""
        return [self.training, *self.mixture.values()]


@dataclass(frozen=True)
class TokenizedDatasets:
    """The rows of a run, as token ids."""

    training: Trained | None
    """None where nothing is trained."""
    evaluated: Encoded
    held_out: dict[str, Encoded]


def read_run_datasets(recipe: Recipe) -> RunDatasets:
    """All rows that a run needs, and what was found in them, said."""
    evaluated, training, mixture = read_evaluation_rows(recipe), read_training_rows(recipe), read_mixture(recipe)
    say(f"{announce(training, recipe.data)}\n{announce_mixture(recipe, mixture)}{announce(evaluated, recipe.data)}")
    if leaked := leaked_rows(training, evaluated, *mixture.values()):
        say(
            f"{leaked:,} of the {len(evaluated):,} {evaluated.split} rows have a source that is among the training rows too."
        )
    task = task_of(recipe.data)
    labels, choosing = task.settle_labels(training), read_choosing_rows(recipe, len(training))
    task.check_labels(labels, training)
    task.check_labels(labels, evaluated)
    if choosing is not None:
        task.check_labels(labels, choosing.rows, quietly=True)
    return RunDatasets(training, mixture, choosing, evaluated, leaked, read_held_out(recipe), labels)


def tokenize_run_datasets(
    engine: Engine, recipe: Recipe, datasets: RunDatasets, lengths: tuple[int, int]
) -> TokenizedDatasets:
    """The tokens of all rows; those of training rows only where they are trained on."""
    training = encode_training_rows(engine, recipe, datasets, lengths) if recipe.training.method != "none" else None
    evaluated = encode_asked(engine, recipe, datasets.evaluated, lengths, datasets.training)
    return TokenizedDatasets(training, evaluated, encode_held_out(engine, recipe, datasets.held_out))


def encode_training_rows(engine: Engine, recipe: Recipe, datasets: RunDatasets, lengths: tuple[int, int]) -> Trained:
    """The training rows' tokens, from the cache where they have been there before, without the rows held out."""
    encoded = task_of(recipe.data).encode(engine, datasets.training, lengths, recipe.training.one_seed)
    _say_tokens(datasets.training, recipe.data, encoded)
    if datasets.choosing is not None and datasets.choosing.held_out:
        encoded = encoded.after(datasets.choosing.rows.examples[-1].row)
    if not recipe.mixture:
        return encoded
    others = encode_mixture(engine, recipe, datasets.mixture)
    for name, rows in datasets.mixture.items():
        _say_tokens(rows, recipe.mixture[name], others[name])
    mixture = mix(recipe, encoded, others)
    say_shares(mixture)
    return mixture


def _say_tokens(rows: AnySplit, data: DataSettings, encoded: Encoded) -> None:
    start = f"reusing tokens of {encoded}" if encoded.reused else f"tokens of {encoded}"
    say(f"{rows.name}, {rows.split}: {start}{encoded.findings.in_words({'long_rows': data.long_rows})}")


def describe_datasets(datasets: RunDatasets, tokens: TokenizedDatasets) -> dict[str, Any]:
    """Returns what the record says of the rows."""
    about = {"evaluated": describe_rows(datasets.evaluated, tokens.evaluated) | {"leaked": datasets.leaked}}
    if tokens.training is None:
        return about
    trained_on = describe_rows(datasets.training, tokens.training.parts[0]) | builtin_card(datasets.training)
    if isinstance(tokens.training, Mixture):
        trained_on |= _about_mixture(datasets, tokens.training)
    return about | {"trained_on": trained_on}


def _about_mixture(datasets: RunDatasets, encoded: Mixture) -> dict[str, Any]:
    """Returns what an epoch has of the main data, and below "mixture" of each further set, and what that is."""
    first, *others = describe_shares(encoded)
    sets = zip(datasets.mixture.items(), encoded.parts[1:], others, strict=True)
    return first | {
        "mixture": {
            name: describe_rows(rows, part)
            | builtin_card(rows)
            | {"leaked": leaked_rows(rows, datasets.evaluated)}
            | share
            for (name, rows), part, share in sets
        }
    }


def describe_forgetting(
    datasets: RunDatasets,
    held_out: dict[str, Encoded],
    before: dict[str, Scores],
    after: dict[str, Scores],
    folder: Path,
) -> dict[str, Any]:
    """Returns what the record says of each of the other data sets; their rows' losses go into a file."""
    forgotten = {name: Forgotten(before[name], after[name]) for name in before}
    write_forgotten(folder, {name: each.numbers.tolist() for name, each in held_out.items()}, forgotten)
    return {
        name: {
            **describe_rows(datasets.held_out[name], held_out[name]),
            "leaked": leaked_rows(datasets.training, datasets.held_out[name], *datasets.mixture.values()),
            **each.summary(),
        }
        for name, each in forgotten.items()
    }
