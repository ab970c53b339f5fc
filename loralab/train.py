"""One training run, from a recipe to a run folder: rows, model, steps, adapter, proof, scores, record."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loralab import checkpoint, embedded
from loralab.classify import check_split, settle_labels, within_positions
from loralab.config import Recipe
from loralab.confusion import write_confusion
from loralab.data import denoise
from loralab.data.batches import collate
from loralab.data.denoise import Encoded, MaskedSplit
from loralab.data.encode import check_lengths, resolve_lengths
from loralab.data.encoded import EncodedSplit
from loralab.data.mixture import Mixture, Trained
from loralab.data.parts import IN_WORDS
from loralab.data.rows import Findings
from loralab.data.splits import AnySplit, Split, StreamedSplit, announce, index_split
from loralab.data_settings import DataSettings
from loralab.engine import Engine, Proof, open_engine
from loralab.errors import RunError, Stopped, UserError
from loralab.evaluate import Scores, encode_asked, encode_rows, evaluate, leaked_rows, read_evaluation_rows
from loralab.forgetting import Forgotten, encode_held_out, measure_after, measure_before, read_held_out, write_forgotten
from loralab.labels import Labels
from loralab.loop import Course, plan_steps, run_steps
from loralab.mixing import announce_mixture, describe_shares, encode_mixture, mix, read_mixture, say_shares
from loralab.pilot import find_rate
from loralab.plot import write_curves
from loralab.progress import Progress, say
from loralab.run import (
    RECORD,
    check_free,
    environment,
    find_trained,
    new_folder,
    open_again,
    read_record,
    size_on_disk,
    write_json,
    write_recipe,
)
from loralab.scratch import check_sizes, new_base, remove_base
from loralab.trackers import check_installed
from loralab.validation import Choosing, Validator, best_of, make_validator, read_choosing_rows

PROOF_ROWS = 4  # on which the saved model is held against the live one


@dataclass(frozen=True)
class Material:
    """The rows of a run, as text."""

    training: StreamedSplit
    """Of the main data."""
    mixture: dict[str, StreamedSplit]
    """Of further data."""
    choosing: Choosing | None
    """Measured on while training."""
    evaluated: Split
    leaked: int
    """How many of the evaluated rows have a source that is among the training rows too."""
    held_out: dict[str, Split]
    """Of other data, on which forgetting is measured."""
    labels: Labels | None
    """Of a classifier's rows."""

    @property
    def trained_on(self) -> list[StreamedSplit]:
        """The main data's training rows, and those of further data."""
        return [self.training, *self.mixture.values()]


@dataclass(frozen=True)
class Tokens:
    """The same rows, as token ids."""

    training: Trained | None
    """None where nothing is trained."""
    evaluated: Encoded
    held_out: dict[str, Encoded]


def train(recipe: Recipe, out: Path | None, resume: bool = False) -> tuple[Path, dict[str, Any]]:
    """Trains, saves, proves and evaluates.

    Args:
        out: the run's folder, new or empty; None takes the next free runs/NAME.
        resume: go on with the run in `out`, which must be of this very recipe.

    Returns:
        The run's folder and the record in it.
    """
    recipe, start = starting_point(recipe)
    if resume:
        open_again(out, recipe)
        if out is not None and (out / RECORD).exists():
            say(f"{out} has finished already.")
            return out, read_record(out)
    else:
        check_free(out)
    check_installed(recipe.training.trackers)
    check_sizes(recipe)
    denoise.check_lengths(recipe.data)
    material = read_material(recipe)  # first, so that a missing split or column is found before an hour of training
    place = out if resume else None
    with _place_for_base(recipe, place, out) as place:
        base = None if place is None or recipe.model.init != "random" else new_base(recipe, material.trained_on, place)
        engine = open_engine(recipe, base, start, material.labels)
        say(f"{recipe.model.name} on {engine.device} in {engine.dtype} ({engine.dtype_reason})\n{engine.summary}")
        settings = recipe.data.max_source_length, recipe.data.max_target_length
        lengths = resolve_lengths(material.training, engine.tokenizer, *settings, engine.prompt)
        lengths = within_positions(lengths, engine.positions) if engine.labels is not None else lengths
        check_lengths(recipe.data, lengths, recipe.evaluation.max_new_tokens, engine.causal, engine.positions)
        tokens = encode_material(engine, recipe, material, lengths)
        about = _about(material, tokens)
    folder = place or new_folder(out, recipe.name)  # nothing is left behind by a mistake above
    with checkpoint.locked(folder):
        write_recipe(folder, recipe)
        checkpoint.check_rows(folder, _hashes(about))
        return folder, _run(engine, recipe, material, tokens, lengths, folder, about)


def starting_point(recipe: Recipe) -> tuple[Recipe, Path | None]:
    """(the recipe, on the base that `training.start_from` means; the adapter to go on with, if it is one).

    Raises:
        RunError: there is nothing to start from, or the method cannot start from it.
    """
    if recipe.training.start_from is None or recipe.training.method == "none":
        return recipe, None
    place = Path(recipe.training.start_from)
    earlier, saved = find_trained(place, [], None)
    if saved is None:
        raise RunError(f"training.start_from: {place} has trained nothing (its method is {earlier.training.method}).")
    if earlier.training.method == "full":
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(saved)})}), None
    return recipe, saved


def read_material(recipe: Recipe) -> Material:
    """All rows that a run needs, and what was found in them, said."""
    evaluated, training, mixture = read_evaluation_rows(recipe), read_training_rows(recipe), read_mixture(recipe)
    say(f"{announce(training, recipe.data)}\n{announce_mixture(recipe, mixture)}{announce(evaluated, recipe.data)}")
    if leaked := leaked_rows(training, evaluated, *mixture.values()):
        say(
            f"{leaked:,} of the {len(evaluated):,} {evaluated.split} rows have a source that is among the training rows too."
        )
    labels, choosing = settle_labels(recipe, training), read_choosing_rows(recipe, len(training))
    if labels is not None:
        check_split(labels, training)
        check_split(labels, evaluated)
        if choosing is not None:
            check_split(labels, choosing.rows, quietly=True)
    return Material(training, mixture, choosing, evaluated, leaked, read_held_out(recipe), labels)


@contextmanager
def _place_for_base(recipe: Recipe, place: Path | None, out: Path | None) -> Iterator[Path | None]:
    """The run's folder, made now where a base is to be written into it; a mistake within removes it again."""
    if place is not None or recipe.model.init != "random":
        yield place
        return
    folder = new_folder(out, recipe.name)
    write_recipe(folder, recipe)  # from here on the run can be gone on with
    try:
        yield folder
    except UserError:
        shutil.rmtree(folder)
        raise


def encode_material(engine: Engine, recipe: Recipe, material: Material, lengths: tuple[int, int]) -> Tokens:
    """The tokens of all rows; those of training rows only where they are trained on."""
    training = encode_training_rows(engine, recipe, material, lengths) if recipe.training.method != "none" else None
    evaluated = encode_asked(engine, recipe, material.evaluated, lengths, material.training)
    return Tokens(training, evaluated, encode_held_out(engine, recipe, material.held_out))


def _about(material: Material, tokens: Tokens) -> dict[str, Any]:
    """What the record says of the rows."""
    about = {"evaluated": describe_rows(material.evaluated, tokens.evaluated) | {"leaked": material.leaked}}
    if tokens.training is None:
        return about
    main = tokens.training.parts[0] if isinstance(tokens.training, Mixture) else tokens.training
    trained_on = describe_rows(material.training, main) | card_of(material.training)
    if isinstance(tokens.training, Mixture):
        trained_on |= _about_mixture(material, tokens.training)
    return about | {"trained_on": trained_on}


def _about_mixture(material: Material, encoded: Mixture) -> dict[str, Any]:
    """What an epoch has of the main data, and below "mixture" of each further set, and what that is."""
    first, *others = describe_shares(encoded)
    sets = zip(material.mixture.items(), encoded.parts[1:], others, strict=True)
    return first | {
        "mixture": {
            name: describe_rows(rows, part) | card_of(rows) | {"leaked": leaked_rows(rows, material.evaluated)} | share
            for (name, rows), part, share in sets
        }
    }


def _hashes(about: dict[str, Any]) -> dict[str, str]:
    """Those of all rows that a run which goes on must find as they were."""
    mixture = about.get("trained_on", {}).get("mixture", {})
    return {what.replace("_", " "): rows["hash"] for what, rows in about.items()} | {
        f"trained on as {name}": rows["hash"] for name, rows in mixture.items()
    }


def _run(
    engine: Engine,
    recipe: Recipe,
    material: Material,
    tokens: Tokens,
    lengths: tuple[int, int],
    folder: Path,
    about: dict[str, Any],
) -> dict[str, Any]:
    record: dict[str, Any] = {"name": recipe.name, "method": recipe.training.method}
    record |= {"trainable": engine.trainable, "total": engine.total}
    before = measure_before(engine, material.held_out, tokens.held_out)
    if tokens.training is not None:
        validator = make_validator(recipe, material.choosing, engine, lengths)
        record |= _train_and_save(engine, recipe, tokens.training, validator, lengths, folder)
    record["peak_memory_bytes"] = engine.peak_memory()
    scores = evaluate(engine, recipe, material.evaluated, tokens.evaluated, folder)
    record |= {"metrics": scores.summary(), **about}
    if scores.labels is not None:
        assert engine.labels is not None
        record["labels"] = engine.labels.as_json() | scores.labels
        write_confusion(folder, scores.labels)
    after = before if tokens.training is None else measure_after(engine, material.held_out, tokens.held_out)
    record["forgetting"] = _forgetting(material, tokens.held_out, before, after, folder)
    record |= {"lengths": lengths, "device": engine.device, "dtype": engine.dtype, **environment()}
    write_json(folder / RECORD, record)
    checkpoint.remove(folder)
    remove_base(folder)
    return record


def _forgetting(
    material: Material,
    held_out: dict[str, Encoded],
    before: dict[str, Scores],
    after: dict[str, Scores],
    folder: Path,
) -> dict[str, Any]:
    """What the record says of each of the other data sets; their rows' losses go into a file."""
    forgotten = {name: Forgotten(before[name], after[name]) for name in before}
    write_forgotten(folder, {name: each.numbers.tolist() for name, each in held_out.items()}, forgotten)
    return {
        name: {
            **describe_rows(material.held_out[name], held_out[name]),
            "leaked": leaked_rows(material.training, material.held_out[name], *material.mixture.values()),
            **each.summary(),
        }
        for name, each in forgotten.items()
    }


def read_training_rows(recipe: Recipe) -> StreamedSplit:
    """The index of the training split's rows."""
    return index_split(recipe.data, "train")


def encode_training_rows(engine: Engine, recipe: Recipe, material: Material, lengths: tuple[int, int]) -> Trained:
    """The training rows' tokens, from the cache where they have been there before, without the rows held out."""
    encoded = encode_rows(engine, recipe, material.training, lengths)
    _say_tokens(material.training, recipe.data, encoded)
    if material.choosing is not None and material.choosing.held_out:
        encoded = encoded.after(material.choosing.rows.examples[-1].row)
    if not recipe.mixture:
        return encoded
    others = encode_mixture(engine, recipe, material.mixture)
    for name, rows in material.mixture.items():
        _say_tokens(rows, recipe.mixture[name], others[name])
    mixture = mix(recipe, encoded, others)
    say_shares(mixture)
    return mixture


def _say_tokens(rows: AnySplit, data: DataSettings, encoded: Encoded) -> None:
    what = f"{len(encoded):,} rows"
    if isinstance(encoded, MaskedSplit):
        what = f"{len(encoded):,} chunks of documents, {len(encoded.ids):,} in all"
    start = f"reusing tokens of {what}" if encoded.reused else f"tokens of {what}"
    say(f"{rows.name}, {rows.split}: {start}{encoded.findings.in_words({'long_rows': data.long_rows})}")


def _train_and_save(
    engine: Engine,
    recipe: Recipe,
    encoded: Trained,
    validator: Validator | None,
    lengths: tuple[int, int],
    folder: Path,
) -> dict[str, Any]:
    parts = encoded.parts if isinstance(encoded, Mixture) else (encoded,)
    for rows in (*parts, validator.encoded) if validator is not None else parts:
        engine.compute_once(rows, Progress("once for all epochs", len(rows)).update)
    pilot = None
    if recipe.optimizer.learning_rate == "pilot":
        assert validator is not None
        pilot = find_rate(engine, recipe, encoded, validator, folder)
        optimizer = recipe.optimizer.model_copy(update={"learning_rate": pilot["chosen"]})
        recipe = recipe.model_copy(update={"optimizer": optimizer})
    course = _steps(engine, recipe, encoded, validator, folder)
    card = {"recipe": recipe.model_dump(mode="json"), "lengths": lengths, "versions": environment()["versions"]}
    saved = engine.save(folder, card)
    peak = engine.peak_memory()  # before the proof, which holds the model twice
    some = plan_steps(recipe, encoded)[0][0][:PROOF_ROWS]
    proof = engine.prove(saved, collate(encoded, some, engine.pad_id))
    _check(proof, saved)
    return {
        "saved": str(saved),
        "adapter_bytes": size_on_disk(saved),
        "steps": course.steps,
        "seconds": course.seconds,
        "tokens_per_second": course.tokens_per_second,
        "training_peak_memory_bytes": peak,
        "proof": asdict(proof),
        "pilot": pilot,
        "validation": None if validator is None else _validations(recipe, validator, course),
    }


def _steps(engine: Engine, recipe: Recipe, encoded: Trained, validator: Validator | None, folder: Path) -> Course:
    """All steps, and their curves, also of a run that was stopped."""
    try:
        course = run_steps(engine, recipe, encoded, folder, validator)
    except (Stopped, RunError):
        with suppress(Exception):  # what stopped the run is the news, not that it cannot be drawn
            write_curves(folder, recipe.validation.metric)
        raise
    write_curves(folder, recipe.validation.metric)
    return course


def _validations(recipe: Recipe, validator: Validator, course: Course) -> dict[str, Any]:
    metric, best = recipe.validation.metric, best_of(course.validations, recipe.validation.metric)
    return {
        **describe_rows(validator.choosing.rows),
        "metric": metric,
        "best": None if best is None else {"step": best["step"], "value": best[metric]},
        "kept_step": course.kept,
        "stopped_early": course.steps < course.planned,
        "held_out": validator.choosing.held_out,
        "validations": list(course.validations),
    }


def _check(proof: Proof, saved: Path) -> None:
    if not proof.reloaded_equal:
        raise RunError(
            f"What was saved in {saved} does not give the trained model's logits when read back. Do not use it; please report this."
        )
    error, tolerance = proof.merged_error, proof.merged_tolerance
    if error is not None and tolerance is not None and error > tolerance:
        say(
            f"Merged into the base, the adapter's logits differ by {error:.1e}, more than this dtype's {tolerance:.0e}."
        )


def card_of(rows: AnySplit) -> dict[str, Any]:
    """The card of an embedded data set: what it was made from on this machine."""
    return {"card": embedded.card(rows.name)} if rows.name.startswith(embedded.PREFIX) else {}


def describe_rows(rows: AnySplit, encoded: Encoded | None = None) -> dict[str, Any]:
    """What a record says of the rows that it used, and of what was found in them by row number."""
    findings = Findings(rows.findings | (encoded.findings if encoded is not None else {}))
    return {
        "data": rows.name,
        "split": rows.split,
        "rows": len(rows if encoded is None or isinstance(encoded, MaskedSplit) else encoded),
        **({"chunks": len(encoded)} if isinstance(encoded, MaskedSplit) else {}),
        "parted": IN_WORDS if rows.parted else None,
        "findings": findings.as_json(),
        "hash": rows.content_hash,
        **({"shots": encoded.shots.as_json()} if isinstance(encoded, EncodedSplit) and encoded.shots else {}),
    }
