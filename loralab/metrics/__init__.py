"""The metrics that a recipe's `evaluation.metrics` can name. A new one is a module beside this file and a METRICS line."""

from __future__ import annotations

from collections.abc import Mapping

from loralab.metrics import bleu, chrf, classification, copied, length, names, regression, rouge
from loralab.metrics.metric import Column, Metric

METRICS: Mapping[str, Metric] = {
    "rouge": rouge,
    "chrf": chrf,
    "bleu": bleu,
    "length": length,
    "copied": copied,
    "names": names,
    "classification": classification,
    "regression": regression,
}
LABELS = "classification"  # the metric of labels
NUMBERS = "regression"  # the metric of numbers; all others are of texts

LOSS = Column("loss", "loss", better="lower", digits=3)  # nats per target token, measured by the model itself
PERPLEXITY = Column("perplexity", "perplexity", better="lower")  # its exponential, of texts without a source
BITS = Column(
    "bits_per_byte", "bits/byte", better="lower", digits=3
)  # the same per byte, in bits, where all bytes are counted
COLUMNS: Mapping[str, Column] = {
    column.name: column
    for column in (LOSS, PERPLEXITY, BITS, *(column for metric in METRICS.values() for column in metric.COLUMNS))
}
