"""Results of the Python functions. A notebook shows each with its tables and pictures; `print` shows what a command prints."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MetricValue:
    """One number of a table."""

    value: float
    low: float | None = None
    """The ends of the 95 % interval; None where there is none."""
    high: float | None = None
    p_vs_first: float | None = None
    """P-value of the difference from the first system on the same rows."""

    def __float__(self) -> float:
        return self.value


def metrics_of(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, MetricValue]:
    """Returns the metrics of a row or a record, by name."""
    return {
        name: MetricValue(each["value"], each.get("low"), each.get("high"), each.get("p_vs_first"))
        for name, each in stored.items()
    }


@dataclass(frozen=True)
class Shown:
    """A result as text, and as HTML with the pictures of its folder."""

    text: str = field(repr=False)

    def __str__(self) -> str:
        return self.text

    @property
    def pictures(self) -> Sequence[Path]:
        """The pictures that belong to it."""
        return ()

    def _repr_html_(self) -> str:
        images = (base64.b64encode(file.read_bytes()).decode() for file in self.pictures if file.exists())
        pictures = "".join(f'<img src="data:image/png;base64,{image}" style="max-width: 100%">' for image in images)
        return f"<pre>{html.escape(self.text)}</pre>{pictures}"


@dataclass(frozen=True)
class TrainingRun(Shown):
    """A finished training."""

    folder: Path
    """The run's folder; `loralab generate FOLDER` answers with it."""
    saved: Path | None
    """The adapter, or the model where all of it was trained; None where nothing was."""
    metrics: Mapping[str, MetricValue]
    steps: int
    seconds: float
    """Time of the steps."""
    tokens_per_second: float
    record: Mapping[str, Any] = field(repr=False)
    """All that record.json holds."""

    @property
    def pictures(self) -> Sequence[Path]:
        return [self.folder / "curves.png", self.folder / "confusion.png"]


@dataclass(frozen=True)
class ComparisonRow:
    """A variant or a floor of a comparison."""

    variant: str
    method: str
    """lora, head, full, none, or floor."""
    metrics: Mapping[str, MetricValue]
    trainable: int
    """Parameters that were trained, and below those of the whole."""
    total: int
    seconds: float
    """Time of the steps, the mean of all seeds."""
    peak_memory_bytes: int
    failed: bool


@dataclass(frozen=True)
class Comparison(Shown):
    """A finished comparison."""

    folder: Path
    rows: Sequence[ComparisonRow]
    failures: Mapping[str, str]
    """Run -> why it failed."""
    results: Mapping[str, Any] = field(repr=False)
    """All that results.json holds."""

    def __getitem__(self, variant: str) -> ComparisonRow:
        return next(row for row in self.rows if row.variant == variant)

    @property
    def pictures(self) -> Sequence[Path]:
        return sorted(self.folder.glob("*.png"))


@dataclass(frozen=True)
class Evaluation(Shown):
    """The scores of a run, an adapter or a base."""

    metrics: Mapping[str, MetricValue]
    row: Mapping[str, Any] = field(repr=False)
    """All that `loralab evaluate --json` prints."""


@dataclass(frozen=True)
class Plan(Shown):
    """Predicted cost of a recipe's variants."""

    variants: Sequence[Mapping[str, Any]]
    """For each variant, as `loralab plan --json` prints it: trainable, total, flops_per_step, memory_bytes, …"""
    found: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class FileScores(Shown):
    """The scores of predictions in files."""

    systems: Mapping[str, Mapping[str, MetricValue]]
    """System -> column -> number."""
    pairs: Sequence[Mapping[str, Any]]
    """The differences between any two systems, with interval and p."""
    results: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class GeneratedAnswers(Shown):
    """The answers of a trained model, in the order of the texts."""

    answers: Sequence[Any]
    """A text each; of a classifier its label with probabilities; of a regression its number."""

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, place: int) -> Any:
        return self.answers[place]
