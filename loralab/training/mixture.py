"""Further data sets that a recipe trains on beside its main one: their rows as text, as tokens, and in the record.

What an epoch takes of each stands in data/mixture.py. Validation and evaluation are on the main set alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.config.recipe import Recipe
from loralab.console.progress import say
from loralab.data.encoded import Encoded
from loralab.data.mixture import Mixture
from loralab.data.splits import AnySplit, StreamedSplit, announce, index_split
from loralab.engine import Engine
from loralab.errors import RecipeError, about
from loralab.tasks import task_of


def read_mixture(recipe: Recipe) -> dict[str, StreamedSplit]:
    """The index of each further set's training rows. Raises what reading rows raises, with the key that it is about."""
    rows: dict[str, StreamedSplit] = {}
    for name, data in recipe.mixture.items():
        with about(f"mixture.{name}"):
            task_of(data).check()
            rows[name] = index_split(data, "train")
    return rows


def announce_mixture(recipe: Recipe, rows: Mapping[str, AnySplit]) -> str:
    """Counts how many rows each has, and what was found in them, for people."""
    return "".join(f"mixture.{name}: {announce(each, recipe.mixture[name])}\n" for name, each in rows.items())


def encode_mixture(engine: Engine, recipe: Recipe, rows: Mapping[str, AnySplit]) -> dict[str, Encoded]:
    """Their tokens, each with its own prompt and lengths."""
    encoded: dict[str, Encoded] = {}
    for name, each in rows.items():
        task = task_of(recipe.mixture[name])
        with about(f"mixture.{name}"):
            task.check_labels(engine.labels, each)
            lengths = task.resolve_lengths(engine, each)
            task.check_lengths(lengths, 0, engine.causal, engine.positions)
            encoded[name] = task.encode(engine, each, lengths, recipe.training.one_seed)
    return encoded


def mix(recipe: Recipe, main: Encoded, others: Mapping[str, Encoded]) -> Mixture:
    """All of them as one, with the rows that an epoch has of each.

    Raises:
        RecipeError: a weight is so small that an epoch has no row of its set.
    """
    counts = [len(main)]
    for name, each in others.items():
        weight = recipe.mixture[name].weight
        counts.append(len(each) if weight is None else round(weight * len(main)))
        if not counts[-1]:
            raise RecipeError(
                f"mixture.{name}.weight is {weight:g}: beside the {len(main):,} rows of the main data that is no row of it. "
                "Raise it, or remove the set."
            )
    names = (recipe.data.name, *others)
    return Mixture(names, (main, *others.values()), tuple(counts), recipe.training.one_seed)


def say_shares(mixture: Mixture) -> None:
    """One line a set: the rows of it that an epoch has, their share, and how often that is each of them."""
    say("An epoch has")
    for name, part, count, share in zip(mixture.names, mixture.parts, mixture.counts, shares(mixture), strict=True):
        say(
            f"  {count:>9,} rows of {name}, {100 * share:.1f} % ({count / len(part):.2f} passes over its {len(part):,})"
        )


def shares(mixture: Mixture) -> Sequence[float]:
    """Returns each set's share of an epoch's rows."""
    return [count / sum(mixture.counts) for count in mixture.counts]


def describe_shares(mixture: Mixture) -> list[dict[str, Any]]:
    """For the record: what an epoch has of each set, the main one first."""
    return [
        {"rows_per_epoch": count, "share": round(share, 6)}
        for count, share in zip(mixture.counts, shares(mixture), strict=True)
    ]
