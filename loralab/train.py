"""One training run, from a recipe to a run folder: rows, model, steps, adapter, proof, scores, record."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from loralab import checkpoint
from loralab.config import Recipe
from loralab.data.batches import collate
from loralab.data.encode import EncodedSplit, encode, resolve_lengths
from loralab.data.parts import IN_WORDS
from loralab.data.prompts import Prompt
from loralab.data.rows import Findings
from loralab.data.splits import AnySplit, Split, StreamedSplit, announce, index_split
from loralab.engine import Engine, Proof, open_engine
from loralab.errors import RunError
from loralab.evaluate import encode_evaluation_rows, evaluate, leaked_rows, read_evaluation_rows
from loralab.loop import plan_steps, run_steps
from loralab.progress import say
from loralab.run import (
    RECORD,
    check_free,
    environment,
    new_folder,
    open_again,
    read_record,
    size_on_disk,
    write_json,
    write_recipe,
)

PROOF_ROWS = 4  # on which the saved model is held against the live one


def train(recipe: Recipe, out: Path | None, resume: bool = False) -> tuple[Path, dict[str, Any]]:
    """Trains, saves, proves and evaluates.

    Args:
        out: the run's folder, new or empty; None takes the next free runs/NAME.
        resume: go on with the run in `out`, which must be of this very recipe.

    Returns:
        The run's folder and the record in it.
    """
    if resume:
        open_again(out, recipe)
        if out is not None and (out / RECORD).exists():
            say(f"{out} has finished already.")
            return out, read_record(out)
    else:
        check_free(out)
    rows = read_evaluation_rows(recipe)  # first, so that a missing split or column is found before an hour of training
    training_rows = read_training_rows(recipe)
    say(f"{announce(training_rows, recipe.data)}\n{announce(rows, recipe.data)}")
    if leaked := leaked_rows(training_rows, rows):
        say(f"{leaked:,} of the {len(rows):,} {rows.split} rows have a source that is among the training rows too.")
    engine = open_engine(recipe)
    say(f"{recipe.model.name} on {engine.device} in {engine.dtype} ({engine.dtype_reason})\n{engine.summary}")
    lengths = resolve_lengths(
        training_rows, engine.tokenizer, recipe.data.max_source_length, recipe.data.max_target_length
    )
    encoded, about = None, {}
    if recipe.training.method != "none":
        encoded = encode_training_rows(engine, recipe, training_rows, lengths)
        about["trained_on"] = describe_rows(training_rows, encoded)
    about["evaluated"] = describe_rows(rows, encode_evaluation_rows(engine, recipe, rows, lengths)) | {"leaked": leaked}
    folder = (
        out if resume and out is not None else new_folder(out, recipe.name)
    )  # nothing is left behind by a mistake above
    with checkpoint.locked(folder):
        write_recipe(folder, recipe)
        return folder, _run(engine, recipe, encoded, rows, lengths, folder, about)


def _run(
    engine: Engine,
    recipe: Recipe,
    encoded: EncodedSplit | None,
    rows: Split,
    lengths: tuple[int, int],
    folder: Path,
    about: dict[str, Any],
) -> dict[str, Any]:
    """`about` is what the record says of the rows."""
    record: dict[str, Any] = {"name": recipe.name, "method": recipe.training.method}
    record |= {"trainable": engine.trainable, "total": engine.total}
    if encoded is not None:
        record |= _train_and_save(engine, recipe, encoded, lengths, folder)
    record["peak_memory_bytes"] = engine.peak_memory()
    scores = evaluate(engine, recipe, rows, lengths, folder)
    record |= {"metrics": scores.summary(), **about}
    record |= {"lengths": lengths, "device": engine.device, "dtype": engine.dtype, **environment()}
    write_json(folder / RECORD, record)
    checkpoint.remove(folder)
    return record


def read_training_rows(recipe: Recipe) -> StreamedSplit:
    """The index of the training split's rows."""
    return index_split(recipe.data, "train")


def encode_training_rows(engine: Engine, recipe: Recipe, rows: StreamedSplit, lengths: tuple[int, int]) -> EncodedSplit:
    """The training rows' tokens, from the cache where they have been there before."""
    data = recipe.data
    encoded = encode(rows, engine.tokenizer, Prompt(data.prompt, data.source), *lengths, data.long_rows)
    start = f"reusing tokens of {len(encoded):,} rows" if encoded.reused else f"tokens of {len(encoded):,} rows"
    say(f"{rows.name}, {rows.split}: {start}{encoded.findings.in_words({'long_rows': data.long_rows})}")
    return encoded


def _train_and_save(
    engine: Engine, recipe: Recipe, encoded: EncodedSplit, lengths: tuple[int, int], folder: Path
) -> dict[str, Any]:
    course = run_steps(engine, recipe, encoded, folder)
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


def describe_rows(rows: AnySplit, encoded: EncodedSplit | None = None) -> dict[str, Any]:
    """What a record says of the rows that it used, and of what was found in them by row number."""
    findings = Findings(rows.findings | (encoded.findings if encoded is not None else {}))
    return {
        "data": rows.name,
        "split": rows.split,
        "rows": len(rows if encoded is None else encoded),
        "parted": IN_WORDS if rows.parted else None,
        "findings": findings.as_json(),
        "hash": rows.content_hash,
    }
