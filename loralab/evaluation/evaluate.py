"""Scores of a model on real rows: loss per target token, and metrics of what it writes, each with a bootstrap interval.

Rows with the same source (one dialogue, three references) are answered once, and resampled together: they are not
independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.atomic_files import write_lines
from loralab.config.generation import Decoding
from loralab.config.recipe import Recipe
from loralab.console.progress import Progress, say
from loralab.data.batches import collate, evaluation_batches
from loralab.data.cache import Facts, cached
from loralab.data.chat_template import transcript
from loralab.data.few_shot import Shots, draw_shots, shots_in_words, with_shots
from loralab.data.rows import Example, subject
from loralab.data.sequence_packing import PackedSplit, encode_packed
from loralab.data.span_corruption import Documents, Encoded, encode_documents
from loralab.data.splits import AnySplit, Split, read_split
from loralab.data.stop_sequences import truncate_at_stop
from loralab.data.tokenization import NO_LIMIT, encode, encode_sources, flat, prompt_of
from loralab.data.tokenized_split import EncodedSplit
from loralab.engine import Engine
from loralab.evaluation.classification import answer_rows
from loralab.metrics import BITS, COLUMNS, LABELS, METRICS, PERPLEXITY, classification
from loralab.metrics.classification import ACCURACY, details
from loralab.metrics.compression import xz_bits_per_byte
from loralab.metrics.significance import Bootstrap, mcnemar
from loralab.runs.folder import PREDICTIONS, read_lines

Floats = NDArray[np.float64]
LOSS_TOKENS = 8192  # padded tokens of a batch whose loss is measured


@dataclass(frozen=True)
class Scores:
    """Per row: who it belongs to, and what it scored."""

    groups: list[str]
    """The source, or the document's row: rows that share it are one dialogue."""
    values: dict[str, Floats]
    """Metric -> [rows], or of several seeds [seeds, rows]; "loss" is per target token. With k numbers a row where the
    metric's column has a statistic."""
    target_tokens: Floats | None
    """[rows], the weights of the loss; None where there is no loss (floors)."""
    labels: dict[str, Any] | None = None
    """Of a classifier: what it did with each label (metrics/classification.details)."""
    plain: bool = False
    """Whether the rows are texts without a source: then their perplexity is told too."""
    num_bytes: Floats | None = None
    """[rows], where every byte of a text is counted: the weights of bits_per_byte."""

    def summary(self, first: Scores | None = None) -> dict[str, dict[str, float | None]]:
        """Metric -> value, low, high, and p against the first system on the same rows."""
        bootstrap = Bootstrap(self.groups)
        rows = {}
        weighed = {"loss": self.target_tokens, BITS.name: self.num_bytes}
        for name, values in self.values.items():
            weights, statistic = weighed.get(name), COLUMNS[name].statistic
            p, one = None, {}
            if first is not None and name in first.values:
                p = bootstrap.p_value(values, first.values[name], weights, statistic)
                if name == ACCURACY.name and values.ndim == first.values[name].ndim == 1:
                    one = {"p_mcnemar": mcnemar(values > 0, first.values[name] > 0).p}
            rows[name] = {**asdict(bootstrap.interval(values, weights, statistic)), "p_vs_first": p, **one}
            if name == "loss" and self.plain:
                ends = {end: float(np.exp(rows[name][end])) for end in ("value", "low", "high")}
                rows[PERPLEXITY.name] = {**ends, "p_vs_first": p}
        return rows


def stack(seeds: Sequence[Scores]) -> Scores:
    """The scores of one variant's seeds, on the same rows, as one."""
    if len(seeds) == 1:
        return seeds[0]
    assert all(scores.groups == seeds[0].groups for scores in seeds)
    values = {name: np.stack([scores.values[name] for scores in seeds]) for name in seeds[0].values}
    return replace(seeds[0], values=values)


def value_of(name: str, values: Floats) -> float:
    """A column's number over all rows."""
    statistic = COLUMNS[name].statistic
    return float(values.mean() if statistic is None else statistic(values.sum(axis=0)))


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


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    sources: Sequence[str] | None,
    metrics: Sequence[str],
    probabilities: Sequence[Mapping[str, float]] | None = None,
    labels: Sequence[str] = (),
) -> dict[str, Floats]:
    """Every column of every named metric, [rows] each, or [rows, k]. `probabilities` of each label, and all `labels`, are for
    those of labels."""
    columns: dict[str, Floats] = {}
    for name in metrics:
        if name == LABELS:
            columns |= classification.score(predictions, references, sources, probabilities, labels)
        else:
            columns |= METRICS[name].score(predictions, references, sources)
    return columns


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


def read_scores(folder: Path) -> Scores:
    """The scores behind a folder's predictions.jsonl."""
    rows = read_lines(folder / PREDICTIONS)
    known = {"row", "source", "references", "shots", "prediction", "probabilities", "target_tokens", "bytes"}
    values = {name: _column(rows, name) for name in rows[0] if name not in known}
    if "probabilities" in rows[0]:  # what is no mean of rows is made again
        predictions, references = ([row[name] for row in rows] for name in ("prediction", "references"))
        values |= classification.score(predictions, references, None, [row["probabilities"] for row in rows])
    tokens, num_bytes = (_column(rows, name) if name in rows[0] else None for name in ("target_tokens", "bytes"))
    subjects = [subject(row["source"], row["references"]) if "source" in row else str(row["row"]) for row in rows]
    plain = num_bytes is not None or all(row.get("source") == "" for row in rows)
    return Scores(subjects, values, tokens, None, plain, num_bytes)


def _column(rows: Sequence[dict[str, Any]], name: str) -> Floats:
    return np.array([row[name] for row in rows], dtype=np.float64)
