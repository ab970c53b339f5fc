"""One training run, from a recipe to a run folder: rows, model, steps, adapter, proof, scores, record.

The loop is the same for every engine; it owns the order of the data and the learning rate, the engine owns the tensors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loralab.config import Recipe
from loralab.data.batches import Batch, collate, plan_batches
from loralab.data.encode import EncodedSplit, encode, encode_sources, resolve_lengths
from loralab.data.prompts import Prompt
from loralab.data.sources import Split, read_split
from loralab.engine import Engine, Proof, load_engine, merge, open_engine
from loralab.errors import RunError, UserError
from loralab.evaluate import evaluate, read_evaluation_rows
from loralab.progress import Progress, say
from loralab.run import METRICS, RECORD, environment, find_trained, new_folder, size_on_disk, write_json, write_recipe
from loralab.schedule import rate_at

PROOF_ROWS = 4  # on which the saved model is held against the live one


@dataclass(frozen=True)
class Course:
    """What the loop measured of itself."""

    steps: int
    seconds: float
    tokens_per_second: float
    """Real source and target tokens; padding is not counted."""
    last_loss: float


def train(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Trains, saves, proves and evaluates; returns the record that it wrote.

    Args:
        folder: the run's, empty.
    """
    write_recipe(folder, recipe)
    rows = read_evaluation_rows(recipe)  # first, so that a missing split or column is found before an hour of training
    training_rows = read_training_rows(recipe)
    engine = open_engine(recipe)
    say(f"{recipe.model.name} on {engine.device} in {engine.dtype} ({engine.dtype_reason})\n{engine.summary}")
    lengths = resolve_lengths(
        training_rows, engine.tokenizer, recipe.data.max_source_length, recipe.data.max_target_length
    )
    record: dict[str, Any] = {"name": recipe.name, "method": recipe.training.method}
    record |= {"trainable": engine.trainable, "total": engine.total}
    if recipe.training.method != "none":
        record |= _train_and_save(engine, recipe, training_rows, lengths, folder)
    record["peak_memory_bytes"] = engine.peak_memory()
    scores = evaluate(engine, recipe, rows, lengths, folder)
    record |= {"metrics": scores.summary(), "evaluated": _describe(rows)}
    record |= {"lengths": lengths, "device": engine.device, "dtype": engine.dtype, **environment()}
    write_json(folder / RECORD, record)
    return record


def read_training_rows(recipe: Recipe) -> Split:
    """The training split's rows."""
    data = recipe.data
    return read_split(data.name, "train", data.source, data.target, data.max_train_rows)


def _train_and_save(
    engine: Engine, recipe: Recipe, rows: Split, lengths: tuple[int, int], folder: Path
) -> dict[str, Any]:
    encoded = encode(rows, engine.tokenizer, Prompt(recipe.data.prompt, recipe.data.source), *lengths)
    say(_counts(rows, encoded))
    course = run_steps(engine, recipe, encoded, folder / METRICS)
    card = {"recipe": recipe.model_dump(mode="json"), "lengths": lengths, "versions": environment()["versions"]}
    saved = engine.save(folder, card)
    peak = engine.peak_memory()  # before the proof, which holds the model twice
    proof = engine.prove(saved, next(batches(engine, recipe, encoded, PROOF_ROWS)))
    _check(proof, saved)
    return {
        "saved": str(saved),
        "adapter_bytes": size_on_disk(saved),
        "steps": course.steps,
        "seconds": course.seconds,
        "tokens_per_second": course.tokens_per_second,
        "last_loss": course.last_loss,
        "training_peak_memory_bytes": peak,
        "proof": asdict(proof),
        "trained_on": _describe(rows),
    }


def run_steps(engine: Engine, recipe: Recipe, encoded: EncodedSplit, log: Path) -> Course:
    """All epochs; a line of metrics.jsonl a step."""
    total = sum(len(_plan(recipe, encoded, epoch)) for epoch in range(recipe.training.epochs))
    progress, started, tokens, loss = Progress("train", total), time.perf_counter(), 0, float("nan")
    with log.open("w", encoding="utf-8") as file:
        for step, batch in enumerate(batches(engine, recipe, encoded)):
            rate = rate_at(step, total, recipe.optimizer)
            result = engine.train_step([batch], rate)
            loss, tokens = result.loss, tokens + batch.num_source_tokens + batch.num_target_tokens
            elapsed = time.perf_counter() - started
            line = {"step": step + 1, "loss": loss, "learning_rate": rate, "grad_norm": result.grad_norm}
            file.write(json.dumps(line | {"tokens": tokens, "seconds": round(elapsed, 3)}) + "\n")
            file.flush()
            progress.update(step + 1, f"loss {loss:.3f}  {tokens / elapsed:,.0f} tokens/s")
    seconds = time.perf_counter() - started
    return Course(total, seconds, tokens / seconds, loss)


def batches(engine: Engine, recipe: Recipe, encoded: EncodedSplit, max_rows: int | None = None) -> Iterator[Batch]:
    """Every batch of every epoch, in order."""
    pad_id = engine.tokenizer.pad_token_id
    assert isinstance(pad_id, int), "the tokenizer pads"
    for epoch in range(recipe.training.epochs):
        for rows in _plan(recipe, encoded, epoch):
            yield collate(encoded, rows[:max_rows], pad_id)


def _plan(recipe: Recipe, encoded: EncodedSplit, epoch: int) -> list[Any]:
    training = recipe.training
    return plan_batches(
        encoded.source_lengths,
        encoded.target_lengths,
        tokens_per_batch=training.token_budget,
        batch_size=training.batch_size,
        seed=training.seed,
        epoch=epoch,
    )


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


def _counts(rows: Split, encoded: EncodedSplit) -> str:
    skipped = f", {len(rows.skipped_empty)} empty ones skipped" if rows.skipped_empty else ""
    return (
        f"{rows.name}: {len(rows):,} training rows{skipped}; sources cut to {encoded.max_source_length} tokens: {encoded.cut_sources:,}, "
        f"targets cut to {encoded.max_target_length}: {encoded.cut_targets:,}"
    )


def _describe(rows: Split) -> dict[str, Any]:
    return {
        "data": rows.name,
        "split": rows.split,
        "rows": len(rows),
        "skipped_empty": len(rows.skipped_empty),
        "hash": rows.content_hash,
    }


# Using what was trained


def evaluate_saved(trained: Path, overrides: list[str], base: str | None) -> dict[str, Any]:
    """Scores a finished run or an adapter; the row of a table."""
    recipe, saved = find_trained(trained, overrides, base)
    rows = read_evaluation_rows(recipe)
    engine = open_engine(recipe) if saved is None else load_engine(recipe, saved)
    lengths = _lengths(engine, recipe, trained)
    scores = evaluate(engine, recipe, rows, lengths, None)
    return {
        "variant": recipe.name,
        "method": recipe.training.method,
        "trainable": engine.trainable,
        "total": engine.total,
        "adapter_bytes": size_on_disk(saved) if saved else 0,
        "peak_memory_bytes": engine.peak_memory(),
        "metrics": scores.summary(),
        "evaluated": _describe(rows),
    }


def answer(
    trained: Path, texts: list[str], overrides: list[str], base: str | None, max_new_tokens: int | None
) -> list[str]:
    """The model's answers to texts, each put into the recipe's prompt."""
    if not texts:
        raise UserError("Nothing to answer: give --text TEXT.")
    recipe, saved = find_trained(trained, overrides, base)
    engine = open_engine(recipe) if saved is None else load_engine(recipe, saved)
    prompt = Prompt(recipe.data.prompt, recipe.data.source)
    ids, _ = encode_sources(texts, engine.tokenizer, prompt, _lengths(engine, recipe, trained)[0])
    answers = engine.generate(ids, max_new_tokens or recipe.evaluation.max_new_tokens)
    return [text.strip() for text in engine.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def merge_saved(trained: Path, out: Path, base: str | None) -> None:
    """Writes a run's base and adapter as one plain model."""
    recipe, saved = find_trained(trained, [], base)
    if recipe.training.method != "lora" or saved is None:
        raise UserError(f"{trained} has no adapter to merge: its method is {recipe.training.method}.")
    merge(recipe.model.name, saved, new_folder(out, out.name))


def _lengths(engine: Engine, recipe: Recipe, trained: Path) -> tuple[int, int]:
    """The lengths of the training; a percentile was settled then."""
    source, target = recipe.data.max_source_length, recipe.data.max_target_length
    if isinstance(source, int) and isinstance(target, int):
        return source, target
    return resolve_lengths(read_training_rows(recipe), engine.tokenizer, source, target)
