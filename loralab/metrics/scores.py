"""Scores of rows: values by column, and their summary with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from loralab.metrics import BITS, COLUMNS, LABELS, METRICS, PERPLEXITY, classification
from loralab.metrics.classification import ACCURACY
from loralab.metrics.metric import Floats
from loralab.metrics.significance import Bootstrap, mcnemar


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
    """Results per label of a classifier (metrics/classification.details)."""
    plain: bool = False
    """True if the rows are texts without a source: then their perplexity is reported too."""
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
