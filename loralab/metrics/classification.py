"""Metrics of labels: accuracy, precision, recall, F1 and the calibration error, in percent.

Per label, from the rows that have it (true), that were given it (pred), and both (tp):

    precision = tp / pred      recall = tp / true      F1 = 2 tp / (pred + true)         0 where nothing is divided by 0

Of two labels, precision, recall and F1 are those of the second, the positive one; of more, or of several labels a row,
there is none. "macro" is the mean over the labels that any row has or was given, with several labels a row over all
labels; "micro" adds the counts of all labels up first (for single labels that is the accuracy, where no prediction is
empty). With several labels a row, accuracy asks for the very same set. These are scikit-learn's definitions, with
zero_division=0. An empty prediction is wrong and names no label.

The calibration error (ECE; Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
https://arxiv.org/abs/1706.04599, equation 3) sorts rows by the probability of the label that was chosen into 15 bins of
equal width, and is the mean distance, over rows, between a bin's mean probability and its accuracy. With several labels
a row, every label of every row counts as one such choice: its probability against whether the row has it.

F1 is no mean of rows: a row gives its counts, and the `statistic` of a column makes F1 of their sums, also in each draw
of a bootstrap.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.errors import DataError
from loralab.metrics.labels import is_list, members, ordered
from loralab.metrics.metric import Column, Floats, check_rows

ID = "accuracy, precision, recall, F1 (of the second of two labels; macro; micro), ECE in 15 bins; percent"
NEEDS_SOURCES = False
BINS = 15
MOST_LABELS = 500

Probabilities = Sequence[Mapping[str, float]]


def _parts(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """(tp, pred, true), [..., C] each, of sums [..., 3 C]."""
    tp, pred, true = np.split(sums, 3, axis=-1)
    return tp, pred, true


def _share(above: Floats, below: Floats) -> Floats:
    """In percent; 0 where nothing is below."""
    return 100.0 * np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def per_label(sums: Floats) -> dict[str, Floats]:
    """Precision, recall and F1 of each label, [..., C]."""
    tp, pred, true = _parts(sums)
    return {"precision": _share(tp, pred), "recall": _share(tp, true), "f1": _share(2 * tp, pred + true)}


def _positive(name: str) -> Any:
    return lambda sums: per_label(sums)[name][..., 1]


def _macro(name: str) -> Any:
    """Returns the mean over labels of [..., 4 C]: the last C are above 0 for the labels that the mean is over."""

    def statistic(sums: Floats) -> Floats:
        labels = sums.shape[-1] // 4
        there = sums[..., -labels:] > 0
        mean: Floats = (per_label(sums[..., :-labels])[name] * there).sum(-1) / np.maximum(there.sum(-1), 1)
        return mean

    return statistic


def _micro_f1(sums: Floats) -> Floats:
    tp, pred, true = (part.sum(-1) for part in _parts(sums))
    return _share(2 * tp, pred + true)


def _calibration(sums: Floats) -> Floats:
    """Returns the calibration error of [..., BINS + 1]: the surplus of probability over right answers in each bin, and the choices."""
    error: Floats = 100.0 * np.abs(sums[..., :-1]).sum(-1) / sums[..., -1]
    return error


ACCURACY = Column("accuracy", "accuracy", better="higher")
OF_TWO = tuple(
    Column(name, title, better="higher", statistic=_positive(name))
    for name, title in (("precision", "precision"), ("recall", "recall"), ("f1", "F1"))
)
MACRO = tuple(
    Column(f"{name}_macro", f"macro {title}", better="higher", statistic=_macro(name))
    for name, title in (("precision", "precision"), ("recall", "recall"), ("f1", "F1"))
)
MICRO = Column("f1_micro", "micro F1", better="higher", statistic=_micro_f1)
ECE = Column("ece", "ECE", better="lower", statistic=_calibration)
COLUMNS: tuple[Column, ...] = (ACCURACY, *OF_TWO, *MACRO, MICRO, ECE)


def version() -> str:
    """Counted here: the rule is that of this version of loralab."""
    return importlib.metadata.version("loralab")


def columns_of(count: int, multi: bool) -> list[str]:
    """The columns that are measured with so many labels."""
    columns = (ACCURACY, *OF_TWO, MACRO[2]) if count == 2 and not multi else (ACCURACY, *MACRO, MICRO)
    return [*(column.name for column in columns), ECE.name]


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    sources: Sequence[str] | None = None,
    probabilities: Probabilities | None = None,
    names: Sequence[str] = (),
) -> dict[str, Floats]:
    """[rows] for accuracy, and what the `statistic` of each other column takes, [rows, k].

    Args:
        predictions, references: a label each, or in JSON the list of a row's labels; an empty prediction is wrong.
        probabilities: of each label; without them there is no ECE.
        names: all labels in their order; else those that have probabilities, else those of the rows (`names_in`).

    Raises:
        DataError: as `check_rows`; a row has two references; single labels and lists are mixed; there are too many labels.
    """
    check_rows("Accuracy", predictions, references)
    if more := [row for row, texts in enumerate(references) if len(texts) > 1]:
        raise DataError(
            f"Row {more[0]} has {len(references[more[0]])} references. A row has one label, or one list of them."
        )
    truth = [texts[0] for texts in references]
    multi = all(map(is_list, truth))
    names = names or (list(probabilities[0]) if probabilities else names_in(truth, predictions))
    given, true = (memberships(texts, names, multi) for texts in (predictions, truth))
    right = (given == true).all(axis=1) & np.array(list(map(bool, predictions)))
    sums = np.concatenate([given & true, given, true], axis=1).astype(np.float64)
    over = np.concatenate([sums, np.ones_like(true) if multi else given | true], axis=1)
    parts = {ACCURACY.name: 100.0 * right, **{column.name: over for column in MACRO}}
    columns = columns_of(len(names), multi)
    values = {name: parts.get(name, sums) for name in columns if name != ECE.name}
    if probabilities and ECE.name in columns:
        table = np.array([[row.get(name, 0.0) for name in names] for row in probabilities])
        confidence, truly = (table, true) if multi else (table.max(axis=1, keepdims=True), right[:, None])
        values[ECE.name] = calibration_parts(confidence, truly)
    return values


def names_in(truth: Sequence[str], *predictions: Sequence[str]) -> list[str]:
    """All labels of the rows and of every system's predictions, in their order."""
    multi = all(map(is_list, truth))
    texts = {text for texts in (truth, *predictions) for text in texts if text}
    if any(is_list(text) != multi for text in texts):
        raise DataError("Some rows have a list of labels, others a single one. Write all of them in one way.")
    names = ordered({label for text in texts for label in members(text, multi)})
    if len(names) > MOST_LABELS:
        raise DataError(f"The rows have {len(names):,} different texts, such as {names[0]!r:.60}: these are no labels.")
    return names


def memberships(texts: Sequence[str], names: Sequence[str], multi: bool) -> NDArray[np.bool_]:
    """[rows, C]: which labels each text names."""
    place = {name: number for number, name in enumerate(names)}
    table = np.zeros((len(texts), len(names)), dtype=bool)
    for row, text in enumerate(texts):
        for label in members(text, multi) if text else ():
            table[row, place[label]] = True
    return table


def calibration_parts(confidence: Floats, right: NDArray[np.bool_]) -> Floats:
    """[rows, BINS + 1] of [rows, choices]: in each bin confidence less right (0 or 1), summed; and the choices."""
    parts = np.zeros((len(confidence), BINS + 1))
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    np.add.at(parts, (np.arange(len(parts))[:, None], bins), confidence - right)
    parts[:, -1] = confidence.shape[1]
    return parts


def details(predictions: Sequence[str], references: Sequence[str], names: Sequence[str], multi: bool) -> dict[str, Any]:
    """For records: each label's precision, recall, F1 and rows; and of single labels the confusion matrix [true][given]."""
    given, true = (memberships(texts, names, multi) for texts in (predictions, references))
    sums = np.concatenate([given & true, given, true], axis=1).sum(axis=0).astype(np.float64)
    scores, rows = per_label(sums), true.sum(axis=0)
    table = {
        name: {**{key: float(values[i]) for key, values in scores.items()}, "rows": int(rows[i])}
        for i, name in enumerate(names)
    }
    confusion = None if multi else (true.astype(int).T @ given.astype(int)).tolist()
    return {"names": list(names), "multi": multi, "per_label": table, "confusion": confusion}
