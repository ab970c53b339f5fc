"""Benchmarks can be started; and the one of both engines on real rows, run at a small size."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from loralab.embedded import model_folder

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks import what they share by its plain name, as scripts of one folder do."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_its_imports_are_there(script: Path) -> None:
    assert runpy.run_path(str(script), run_name="imported")["__doc__"]


def trained_by_both(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str | Path) -> Any:
    """What benchmarks/jax_t5.py prints."""
    monkeypatch.setattr(sys, "argv", ["jax_t5.py", *map(str, words)])
    runpy.run_path(str(FOLDER / "jax_t5.py"), run_name="__main__")
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rate"), [("lora", "1e-3"), ("full", "1e-4")])
def test_both_engines_keep_together_for_two_hundred_steps(
    method: str, rate: str, data_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On the trained T5 that comes with loralab, real dialogues, fp32."""
    places = (model_folder("embedded:tiny-t5"), data_folder / "dialogsum", "--out", tmp_path / "out")
    words = ("--steps", "200", "--source", "64", "--target", "24", "--method", method, "--rate", rate)
    found = trained_by_both(monkeypatch, capsys, *places, *words)
    assert found["jax to torch"]["most"] < 1e-4
    assert found["jax"]["last 20"] < found["jax"]["first"] - 0.5, "and something was learnt"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rate"), [("lora", "1e-3"), ("full", "1e-4")])
def test_without_rounding_both_engines_do_the_same(
    method: str, rate: str, data_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In fp64, on a published base whose training multiplies every rounding error: by a thousand within these steps."""
    places = (data_folder / "models" / "chat-t5-mini", data_folder / "dialogsum", "--out", tmp_path / "out")
    words = ("--float64", "--steps", "12", "--source", "96", "--target", "32", "--method", method, "--rate", rate)
    found = trained_by_both(monkeypatch, capsys, *places, *words)
    assert found["jax to torch"]["step 1"] < 1e-14
    assert found["jax to torch"]["most"] < 1e-10
