"""The picture of a run's curves, and the line that says how a run is going."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loralab.atomic_files import write_lines
from loralab.config.loading import load_recipe
from loralab.console import progress
from loralab.console.progress import Progress
from loralab.reports.run_plots import Curves, draw_run, write_curves
from loralab.reports.turning_point import smooth
from loralab.runs.checkpoint import Position
from loralab.training.loop import _notes

STEPS = [{"step": step, "loss": 4 / step, "learning_rate": 1e-3 * (10 - step)} for step in range(1, 10)]
VALIDATIONS = [
    {"step": 3, "epoch": 0.3, "loss": 3.0, "rouge2": 5.0, "seconds": 0.1},
    {"step": 6, "epoch": 0.7, "loss": 2.0, "rouge2": None, "seconds": 0.1},
    {"step": 9, "epoch": 1.0, "loss": 2.5, "rouge2": 4.0, "seconds": 0.1},
]
X, LOSSES, RATES = (np.array([line[name] for line in STEPS]) for name in ("step", "loss", "learning_rate"))


def drawn(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """Label -> points; lines without a label under their number."""
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.lines}


@pytest.mark.parametrize(
    ("metric", "panel", "best"), [("loss", 0, (6, 2.0, "loss 2.000")), ("rouge2", 1, (3, 5.0, "ROUGE-2 5.000"))]
)
def test_everything_that_was_measured_is_drawn(metric: str, panel: int, best: tuple[int, float, str]) -> None:
    losses, scores, rates = draw_run(Curves(X, LOSSES, RATES, VALIDATIONS), "a run", metric).axes
    raw, thick = (line.get_xydata() for line in losses.lines[:2])
    np.testing.assert_array_equal(raw, np.stack([X, LOSSES], axis=1))
    np.testing.assert_array_equal(thick, np.stack([X, smooth(LOSSES)], axis=1))
    assert drawn(losses)["validation"] == [(3, 3.0), (6, 2.0), (9, 2.5)]
    assert drawn(scores)["ROUGE-2"] == [(3, 5.0), (9, 4.0)], "what was not finite is left out"
    np.testing.assert_array_equal(rates.lines[0].get_xydata(), np.stack([X, RATES], axis=1))
    step, value, words = best
    assert drawn((losses, scores)[panel])[f"best: {words} at step {step}"] == [(step, value)]
    assert losses.get_ylabel() == "loss (nats per target token)" and rates.get_xlabel() == "step"
    assert losses.get_xlim() == rates.get_xlim()


def test_without_validations_there_is_nothing_but_loss_and_rate() -> None:
    losses, rates = draw_run(Curves(X, LOSSES, RATES, []), "a run", "loss").axes
    assert len(losses.lines) == 3 and len(rates.lines) == 1 and drawn(losses)["validation"] == []


def test_the_picture_is_800_pixels_wide(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [])
    write_curves(tmp_path, "loss")
    assert not (tmp_path / "curves.png").exists(), "nothing to draw"
    write_lines(tmp_path / "metrics.jsonl", STEPS)
    write_lines(tmp_path / "validation.jsonl", VALIDATIONS)
    write_curves(tmp_path, "loss")
    content = (tmp_path / "curves.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", content[16:20]) == (800,)
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "validation.jsonl", "curves.png"}


# The line on a terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch, workshop: Path) -> None:
    monkeypatch.setattr(progress, "EVERY_TERMINAL", 0)
    monkeypatch.setenv("COLUMNS", "80")
    engine: Any = SimpleNamespace(peak_memory=lambda: 4_030_000_000)
    position = Position(12000, 123_456_789, 10_000.0, tuple(VALIDATIONS))
    line = {"loss": 3.2141, "learning_rate": 9.4e-4}
    notes = list(_notes(engine, load_recipe(workshop / "tiny.yaml"), position, line))
    stream = Terminal()
    shown = Progress("train", 20000, stream)
    shown.started -= 3000
    shown.update(12000, *notes)
    shown.started -= 3000
    shown.update(12000, *notes)
    shown.say("validation after step 12000: loss 3.105")
    shown.update(20000, *notes)
    _, short, long, news, last = stream.getvalue().split("\r")
    assert short.rstrip() == "train 12000/20000 loss 3.214 lr 9.4e-4 12k tok/s best 2.000 4.03 GB 33:20 left"
    assert long.rstrip() == "train 12000/20000 loss 3.214 lr 9.4e-4 12k tok/s best 2.000 1:06:40 left"
    assert len(short) == len(long) == 79 and "\n" not in short + long, "it covers what stood there before"
    assert news == "validation after step 12000: loss 3.105".ljust(79) + "\n" and last.rstrip().endswith("in 1:40:00")


def test_a_file_gets_a_line_now_and_then() -> None:
    stream = io.StringIO()
    shown = Progress("train", 3, stream)
    shown.update(1, "loss 2.0")
    shown.shown -= progress.EVERY_FILE
    shown.update(2, "loss 1.5")
    shown.update(3, "loss 1.0")
    assert stream.getvalue() == "train 2/3  loss 1.5  0:00 left\ntrain 3/3  loss 1.0  in 0:00\n"
    Progress("validate", 1, stream, transient=True).update(1)
    assert stream.getvalue().count("\n") == 2, "its end is no news"
