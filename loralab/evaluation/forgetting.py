"""Forgetting: the loss on other data, such as general text or the task before, before and after it.

"Before" is the model as the training finds it: the base, or with `training.start_from` the weights that it starts from.
Both losses are of the same rows, and of documents under the same masks whatever the recipe's seed, so that their
difference has a paired interval, and variants and seeds can be held against each other.

    RUN/forgetting.jsonl   one line a row: data, row, group (rows with one number are resampled together), target_tokens,
                           before, after (nats per target token)

The losses before are kept in the cache: those of one base are measured once for all variants. Which weights they are of is
told by the losses of the first batch; weights that agree in these to the last bit are taken for the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loralab.atomic_files import write_lines
from loralab.config.data import HeldOutSettings
from loralab.config.recipe import Recipe
from loralab.console.progress import Progress, say
from loralab.data.batches import evaluation_batches
from loralab.data.cache import ArrayFile, Facts, cached
from loralab.data.encoded import Encoded
from loralab.data.sources import splits_of
from loralab.data.splits import Split, announce, read_split
from loralab.engine import Engine
from loralab.errors import DataError, about
from loralab.metrics import LOSS
from loralab.metrics.metric import Floats
from loralab.metrics.scores import Scores, stack
from loralab.metrics.significance import Bootstrap
from loralab.runs.folder import FORGETTING
from loralab.runs.record import read_lines
from loralab.tasks import task_of
from loralab.tasks.task import LOSS_TOKENS, row_losses

HELD_OUT = ("test", "validation")  # the first of these that the data has
MASKS = 0  # the seed of masks


@dataclass(frozen=True)
class Forgotten:
    """The losses of the same rows before a training and after it."""

    before: Scores
    after: Scores

    def summary(self) -> dict[str, dict[str, float]]:
        """ "before" and "after" with their intervals, and "difference", what the training added, with its own and its p."""
        bootstrap, tokens = Bootstrap(self.before.groups), self.before.target_tokens
        before, after = self.before.values["loss"], self.after.values["loss"]
        added = after - before  # seed by seed and row by row
        return {
            "before": asdict(bootstrap.interval(before, tokens)),
            "after": asdict(bootstrap.interval(after, tokens)),
            "difference": asdict(bootstrap.difference(added, np.zeros(added.shape[-1]), tokens)),
        }


# Before anything is loaded


def read_held_out(recipe: Recipe) -> dict[str, Split]:
    """The rows of each of the recipe's other data sets. Raises what reading rows raises, with the key that it is about."""
    rows: dict[str, Split] = {}
    for name, data in recipe.forgetting.items():
        with about(f"forgetting.{name}"):
            task_of(data).check()
            rows[name] = read_split(data, _held_out_split(data))
            say(f"forgetting.{name}: {announce(rows[name], data)}")
    return rows


def _held_out_split(data: HeldOutSettings) -> str:
    there = splits_of(data.name)
    found = next((split for split in HELD_OUT if split in there), None)
    if found is None:
        raise DataError(
            f"{data.name} has neither a test nor a validation split, and forgetting is measured on held-out rows. "
            f"The splits are: {', '.join(there) or 'none'}."
        )
    return found


# Measuring


def encode_held_out(engine: Engine, recipe: Recipe, rows: Mapping[str, Split]) -> dict[str, Encoded]:
    """Their tokens, each with its own prompt and lengths."""
    encoded: dict[str, Encoded] = {}
    for name, split in rows.items():
        data = recipe.forgetting[name]
        task = task_of(data)
        with about(f"forgetting.{name}"):
            task.check_labels(engine.labels, split, quietly=True)
            lengths = task.within_positions(data.lengths, engine)
            task.check_lengths(lengths, 0, engine.causal, engine.positions)
            encoded[name] = task.encode_evaluated(engine, split, lengths, MASKS)
    return encoded


def measure_before(
    engine: Engine, recipe: Recipe, rows: Mapping[str, Split], encoded: Mapping[str, Encoded]
) -> dict[str, Scores]:
    """Measures the losses of the weights that the training starts from; the training goes on as if it had not been measured."""
    with engine.preserve_rng():
        return _scores(
            recipe, rows, {name: (each, _known_losses(engine, name, each)) for name, each in encoded.items()}
        )


def measure_after(
    engine: Engine, recipe: Recipe, rows: Mapping[str, Split], encoded: Mapping[str, Encoded]
) -> dict[str, Scores]:
    """Measures the losses of the weights that the training has ended with."""
    return _scores(recipe, rows, {name: (each, _losses(engine, name, each)) for name, each in encoded.items()})


def _scores(
    recipe: Recipe, rows: Mapping[str, Split], measured: Mapping[str, tuple[Encoded, Floats]]
) -> dict[str, Scores]:
    return {
        name: task_of(recipe.forgetting[name]).loss_scores(rows[name], encoded, losses)
        for name, (encoded, losses) in measured.items()
    }


def _losses(engine: Engine, name: str, encoded: Encoded) -> Floats:
    return row_losses(engine, encoded, Progress(f"loss on {name}", len(encoded)).update)


def _known_losses(engine: Engine, name: str, encoded: Encoded) -> Floats:
    """From the cache, where these weights have met these rows."""
    lengths = encoded.source_lengths, encoded.target_lengths
    first = evaluation_batches(*lengths, tokens_per_batch=LOSS_TOKENS)[0]
    known_by = engine.losses(encoded.collate(first, engine.pad_id)).tobytes().hex()
    key = {"tokens": _hash(encoded), "weights": known_by, "on": [engine.device, engine.dtype]}

    def build(folder: Path) -> Facts:
        with ArrayFile(folder / "losses.npy", "<f8") as file:
            file.append(_losses(engine, name, encoded))
        return {}

    return np.array(cached("losses", key, build).array("losses"), dtype=np.float64)


def _hash(encoded: Encoded) -> str:
    """sha256 of every row's tokens."""
    digest = hashlib.sha256()
    for row in range(len(encoded)):
        for ids in (encoded.source(row), encoded.target(row)):
            digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
    return digest.hexdigest()


# What is written down


def write_forgotten(folder: Path, numbers: Mapping[str, Sequence[int]], forgotten: Mapping[str, Forgotten]) -> None:
    """forgetting.jsonl, where there is something; `numbers` are those of the rows in their files."""
    lines = [line for name, each in forgotten.items() for line in _lines(name, numbers[name], each)]
    if lines:
        write_lines(folder / FORGETTING, lines)


def _lines(name: str, numbers: Sequence[int], forgotten: Forgotten) -> Iterator[dict[str, Any]]:
    before, after, tokens = (
        forgotten.before.values["loss"],
        forgotten.after.values["loss"],
        forgotten.before.target_tokens,
    )
    assert tokens is not None
    first: dict[str, int] = {}
    for i, (row, group) in enumerate(zip(numbers, forgotten.before.groups, strict=True)):
        yield {
            "data": name, "row": row, "group": first.setdefault(group, row), "target_tokens": int(tokens[i]),
            "before": round(float(before[i]), 6), "after": round(float(after[i]), 6),
        }  # fmt: skip


def read_forgotten(runs: Sequence[Path]) -> dict[str, Forgotten]:
    """Returns what the runs of one variant's seeds have written down, together."""
    seeds = [_read(run) for run in runs]
    return {
        name: Forgotten(stack([seed[name].before for seed in seeds]), stack([seed[name].after for seed in seeds]))
        for name in seeds[0]
    }


def _read(run: Path) -> dict[str, Forgotten]:
    lines = read_lines(run / FORGETTING) if (run / FORGETTING).exists() else []
    return {name: _of(name, lines) for name in dict.fromkeys(line["data"] for line in lines)}


def _of(name: str, lines: Sequence[dict[str, Any]]) -> Forgotten:
    mine = [line for line in lines if line["data"] == name]
    groups = [str(line["group"]) for line in mine]
    tokens, before, after = (
        np.array([line[key] for line in mine], dtype=np.float64) for key in ("target_tokens", "before", "after")
    )
    return Forgotten(Scores(groups, {"loss": before}, tokens), Scores(groups, {"loss": after}, tokens))


def forgetting_in_words(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """ "forgot: general 3.210 -> 3.402 (+0.192)", of each data set; nothing where there is none."""
    digits = LOSS.digits
    said = (
        f"{name} {of['before']['value']:.{digits}f} -> {of['after']['value']:.{digits}f} ({of['difference']['value']:+.{digits}f})"
        for name, of in summaries.items()
    )
    return f"forgot: {', '.join(said)}" if summaries else ""
