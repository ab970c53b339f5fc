"""Curves of runs as pictures: the loss with its validations, the scores, the learning rate, over one axis of steps.

The parts draw on axes that they are given, so that several runs can share a picture. Colours are Okabe and Ito's, which
people with any colour vision tell apart (https://jfly.uni-koeln.de/color).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loralab.atomic_files import write_bytes
from loralab.metrics import COLUMNS
from loralab.reports.turning_point import smooth
from loralab.runs.folder import CURVES, METRICS, VALIDATION
from loralab.runs.record import read_lines
from loralab.runs.validation_lines import best_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#555555"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY)


@dataclass(frozen=True)
class Curves:
    """Learning curves of a run, from its files."""

    steps: Floats
    """[steps], from 1"""
    losses: Floats
    """[steps], nats per target token"""
    rates: Floats
    """[steps]"""
    validations: list[dict[str, Any]]


def read_curves(run: Path) -> Curves:
    """From metrics.jsonl and validation.jsonl."""
    lines = read_lines(run / METRICS)
    steps, losses, rates = (
        np.array([line[name] for line in lines], dtype=np.float64) for name in ("step", "loss", "learning_rate")
    )
    return Curves(steps, losses, rates, read_lines(run / VALIDATION) if (run / VALIDATION).exists() else [])


def draw_losses(axes: Axes, label: str, curves: Curves, colour: str) -> None:
    """The loss of each step, thin, and its smoothed course."""
    axes.plot(curves.steps, curves.losses, color=colour, linewidth=0.7, alpha=0.35)
    axes.plot(curves.steps, smooth(curves.losses), color=colour, linewidth=1.8, label=label)


def draw_validations(axes: Axes, label: str, curves: Curves, column: str, colour: str, size: float = 4.5) -> None:
    """One column of the validations, as points joined by a line."""
    points = [(line["step"], line[column]) for line in curves.validations if line[column] is not None]
    steps, values = [step for step, _ in points], [value for _, value in points]
    axes.plot(steps, values, color=colour, label=label, marker="o", markersize=size, linewidth=1.2)


def mark(axes: Axes, label: str, step: float, value: float, colour: str = "black") -> None:
    """A ring around one point."""
    axes.plot(
        [step], [value], color=colour, label=label, marker="o", markersize=11, markerfacecolor="none",
        markeredgewidth=1.8, linestyle="", zorder=5,
    )  # fmt: skip


def draw_rates(axes: Axes, label: str, curves: Curves, colour: str) -> None:
    """The learning rate of each step."""
    axes.plot(curves.steps, curves.rates, color=colour, linewidth=1.5, label=label)


def side_by_side(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """An empty picture of so many panels beside one another."""
    return _figure((1, count), (max(6.5, 4.6 * count), 4.2), title)


def panels(count: int, heights: Sequence[float], title: str) -> tuple[Figure, list[Axes]]:
    """An empty picture of panels under one another over one axis of steps, 800 pixels wide."""
    from matplotlib.ticker import MaxNLocator

    size = (8.0, 0.6 + 1.3 * sum(heights))
    figure, all_axes = _figure((count, 1), size, title, sharex=True, height_ratios=heights)
    all_axes[-1].set_xlabel("step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, all_axes


def _figure(grid: tuple[int, int], size: tuple[float, float], title: str, **layout: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(*grid, squeeze=False, **layout).flat)
    for axes in all_axes:
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure, all_axes


def write_figure(figure: Figure, file: Path) -> Path:
    """As PNG, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(file, picture.getvalue())
    return file


def draw_run(curves: Curves, title: str, metric: str) -> Figure:
    """One run: its losses, the scores where there are any, its rate; the best validation by `metric` has a ring."""
    scores = [name for name in (curves.validations or [{}])[0] if name not in ("step", "epoch", "loss", "seconds")]
    heights = [3.0, 1.8, 1.2] if scores else [3.0, 1.2]
    figure, (losses, *middle, rates) = panels(len(heights), heights, title)
    draw_losses(losses, "training (thin: each step, thick: smoothed)", curves, BLUE)
    draw_validations(losses, "validation", curves, "loss", VERMILION)
    losses.set_ylabel("loss (nats per target token)")
    for axes in middle:
        looks = ((GREEN, 9.0), (ORANGE, 7.0), (PURPLE, 5.5), (GREY, 3.5))  # equal curves show under one another
        for name, (colour, size) in zip(scores, looks * len(scores), strict=False):
            draw_validations(axes, COLUMNS[name].title, curves, name, colour, size)
        axes.set_ylabel("validation score")
    if (best := best_of(curves.validations, metric)) is not None:
        chosen = losses if metric == "loss" else middle[0]
        text = f"best: {COLUMNS[metric].title} {best[metric]:.3f} at step {best['step']}"
        mark(chosen, text, best["step"], best[metric])
    draw_rates(rates, "learning rate", curves, GREY)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (losses, *middle):
        axes.legend(frameon=False, fontsize=9, loc="best", ncols=2 if axes is not losses else 1)
    return figure


def write_curves(run: Path, metric: str) -> None:
    """Draws a run's curves into its folder; nothing where it has not made a step."""
    curves = read_curves(run)
    if len(curves.steps):
        write_figure(draw_run(curves, run.resolve().name, metric), run / CURVES)
