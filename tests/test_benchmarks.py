"""Benchmarks can be started; and the one of both engines on real rows, run at a small size."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
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


@pytest.fixture(params=[("lora", "1e-3"), ("full", "1e-4")], ids=lambda pair: pair[0])
def trained_by_both(
    request: pytest.FixtureRequest, data_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> Callable[..., Any]:  # fmt: skip
    """Trains a model on real dialogues by benchmarks/jax_t5.py; gives what it prints."""
    method, rate = request.param

    def train(model: Path, *words: str) -> Any:
        places = (model, data_folder / "dialogsum", "--out", tmp_path / "out", "--method", method, "--rate", rate)
        monkeypatch.setattr(sys, "argv", ["jax_t5.py", *map(str, places), *words])
        runpy.run_path(str(FOLDER / "jax_t5.py"), run_name="__main__")
        return json.loads(capsys.readouterr().out)

    return train


@pytest.mark.slow
def test_both_engines_keep_together_for_two_hundred_steps(trained_by_both: Callable[..., Any]) -> None:
    """The trained T5 that comes with loralab, in fp32, at one rate for all weights."""
    words = ("--steps", "200", "--source", "64", "--target", "24")
    found = trained_by_both(model_folder("embedded:tiny-t5"), *words)
    assert found["jax to torch"]["most"] < 1e-4
    assert found["jax"]["last 20"] < found["jax"]["first"] - 0.5, "and something was learnt"


@pytest.mark.slow
def test_without_rounding_both_engines_do_the_same(trained_by_both: Callable[..., Any], data_folder: Path) -> None:
    """In fp64, on a base whose training multiplies every rounding error: by a thousand and more within these steps."""
    words = ("--float64", "--steps", "12", "--source", "96", "--target", "32")
    found = trained_by_both(data_folder / "models" / "chat-t5-mini", *words)["jax to torch"]
    assert found["step 1"] < 1e-14 and found["most"] < 1e-10


@pytest.mark.slow
def test_each_step_from_the_same_weights_is_the_same(trained_by_both: Callable[..., Any], data_folder: Path) -> None:
    """On that base in fp32."""
    words = ("--together", "--steps", "8", "--source", "96", "--target", "32")
    found = trained_by_both(data_folder / "models" / "chat-t5-mini", *words)
    assert found["jax to torch"]["most"] < 1e-4
    assert found["jax's steps off torch's"]["median"] < 0.1, "of a step's length: gradients cancel in this model"
