"""Scores of a model on real rows: loss per target token, and metrics of what it writes, each with a bootstrap interval.

Rows with the same source (one dialogue, three references) are answered once, and resampled together: they are not
independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from loralab.atomic_files import write_lines
from loralab.config.generation import Decoding
from loralab.config.recipe import Recipe
from loralab.console.progress import Progress, say
from loralab.data.batches import collate, evaluation_batches
from loralab.data.cache import Facts, cached
from loralab.data.few_shot import Shots
from loralab.data.sequence_packing import PackedSplit
from loralab.data.span_corruption import Documents, Encoded
from loralab.data.splits import AnySplit, Split
from loralab.data.stop_sequences import truncate_at_stop
from loralab.data.tokenized_split import EncodedSplit
from loralab.engine import Engine
from loralab.evaluation.classification import answer_rows
from loralab.evaluation.rows import source_texts
from loralab.evaluation.scores import Scores, score
from loralab.metrics import BITS
from loralab.metrics.classification import details
from loralab.metrics.compression import xz_bits_per_byte
from loralab.metrics.metric import Floats
from loralab.runs.folder import PREDICTIONS

LOSS_TOKENS = 8192  # padded tokens of a batch whose loss is measured


def evaluate(engine: Engine, recipe: Recipe, split: Split, encoded: Encoded, folder: Path | None) -> Scores:
    """Measures the engine's model on the split, whose tokens are `encoded`; writes predictions.jsonl into the folder where
    one is given."""
    if engine.labels is not None:
        assert isinstance(encoded, EncodedSplit)
        return _label_scores(engine, recipe, split, encoded, folder)
    scores = loss_scores(split, encoded, row_losses(engine, encoded, Progress("loss", len(encoded)).update))
    if isinstance(encoded, Documents):
        if folder is not None:
            _write_document_losses(folder, encoded, scores)
        return scores
    values, predictions = scores.values, None
    sources = source_texts(split, bool(recipe.data.messages))
    if recipe.evaluation.metrics:
        shown = Progress("generate", len(set(scores.groups))).update
        predictions = write_answers(engine, split, encoded, recipe.evaluation, shown)
        references = [example.targets for example in split.examples]
        values = values | score(predictions, references, sources, recipe.evaluation.metrics)
    scores = replace(scores, values=values)
    if folder is not None:
        write_predictions(folder, split, sources, predictions, scores, encoded.shots)
    return scores


def loss_scores(split: Split, encoded: Encoded, losses: Floats) -> Scores:
    """What `row_losses` measured, per target token; of documents that of each chunk, under the masks of the first epoch, or of
    each window, then per byte too."""
    tokens = encoded.target_tokens.astype(np.float64)
    documents = isinstance(encoded, Documents)
    groups = list(map(str, encoded.numbers)) if documents else [example.subject for example in split.examples]
    values = {"loss": losses / tokens}
    if not isinstance(encoded, PackedSplit):
        plain = not documents and not any(example.source for example in split.examples)
        return Scores(groups, values, tokens, plain=plain)
    num_bytes = encoded.target_bytes
    return Scores(groups, values | {BITS.name: losses / num_bytes / np.log(2)}, tokens, None, True, num_bytes)


def _write_document_losses(folder: Path, encoded: Documents, scores: Scores) -> None:
    assert scores.target_tokens is not None
    columns = {"row": encoded.numbers.tolist(), "target_tokens": scores.target_tokens.astype(np.int64).tolist()}
    if scores.num_bytes is not None:
        columns["bytes"] = scores.num_bytes.tolist()
    columns |= {name: values.round(6).tolist() for name, values in scores.values.items()}
    write_lines(
        folder / PREDICTIONS, (dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True))
    )


def text_floors(training: AnySplit, rows: Split) -> dict[str, float]:
    """What needs no model: bits per byte of the rows by xz, with and without the training texts before them."""

    class Texts:
        def __iter__(self) -> Iterator[str]:
            return (example.targets[0] for example in training)

    def build(folder: Path) -> Facts:
        say(f"Compressing the texts of {rows.name} with xz, to compare ...")
        return dict(xz_bits_per_byte(Texts(), [example.targets[0] for example in rows.examples]))

    key = {"training": training.content_hash, "rows": rows.content_hash}
    return dict(cached("xz", key, build).facts)


def _label_scores(engine: Engine, recipe: Recipe, split: Split, encoded: EncodedSplit, folder: Path | None) -> Scores:
    """Those of a classifier, with what its record says of each label."""
    labels = engine.labels
    assert labels is not None
    answers = answer_rows(engine, encoded, Progress("classify", len(encoded)).update)
    tokens = encoded.target_tokens.astype(np.float64)
    references = [labels.named(example.targets[0]) for example in split.examples]
    predictions, probabilities = answers.predictions, answers.probabilities
    values = {"loss": answers.losses([encoded.target(row) for row in range(len(encoded))]) / tokens}
    listed = [[text] for text in references]
    values |= score(predictions, listed, None, recipe.evaluation.metrics, probabilities)
    about = details(predictions, references, labels.names, labels.multi)
    scores = Scores([example.subject for example in split.examples], values, tokens, about)
    if folder is not None:
        named = Split(
            split.name,
            split.split,
            tuple(replace(row, targets=(text,)) for row, text in zip(split.examples, references, strict=True)),
            split.findings,
        )
        write_predictions(folder, named, source_texts(named, False), predictions, scores, None, probabilities)
    return scores


def row_losses(engine: Engine, encoded: Encoded, on_done: Callable[[int], None]) -> Floats:
    """[rows]: each row's loss in nats, summed over its target tokens. `on_done` hears how many rows are done."""
    losses, done = np.zeros(len(encoded)), 0
    for rows in evaluation_batches(encoded.source_lengths, encoded.target_lengths, tokens_per_batch=LOSS_TOKENS):
        losses[rows] = engine.losses(collate(encoded, rows, engine.pad_id))
        on_done(done := done + len(rows))
    return losses


def write_answers(
    engine: Engine, split: Split, encoded: EncodedSplit, decoding: Decoding, on_done: Callable[[int], None]
) -> list[str]:
    """One prediction a row; rows with the same source share it. `on_done` hears how many sources are done."""
    first_row: dict[str, int] = {}
    for row, example in enumerate(split.examples):
        first_row.setdefault(example.source, row)
    sources = list(first_row)
    ids = engine.generate([encoded.source(first_row[source]).tolist() for source in sources], decoding, on_done)
    texts = dict(zip(sources, engine.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True))
    return [truncate_at_stop(texts[example.source], decoding.stop).strip() for example in split.examples]


def write_predictions(
    folder: Path,
    split: Split,
    sources: Sequence[str],
    predictions: Sequence[str] | None,
    scores: Scores,
    shots: Shots | None,
    probabilities: Sequence[Mapping[str, float]] | None = None,
) -> None:
    """One line a row, with everything that the scores were made from; `shots`: the numbers of the training rows before it."""
    tokens = scores.target_tokens
    by_row = {name: values for name, values in scores.values.items() if values.ndim == 1}
    write_lines(
        folder / PREDICTIONS,
        (
            {
                "row": example.row,
                "source": sources[i],
                "references": list(example.targets),
                **({} if shots is None else {"shots": shots.rows[i]}),
                **({} if predictions is None else {"prediction": predictions[i]}),
                **({} if probabilities is None else {"probabilities": probabilities[i]}),
                **({} if tokens is None else {"target_tokens": int(tokens[i])}),
                **{name: round(float(values[i]), 6) for name, values in by_row.items()},
            }
            for i, example in enumerate(split.examples)
        ),
    )
