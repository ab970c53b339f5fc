"""Benchmarks can be started; and the one of both engines on real rows, run at a small size."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sizes import LONG, sized

from loralab.builtin_data import model_folder

FOLDER = Path(__file__).parents[2] / "benchmarks"


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
    words = ("--steps", f"{sized(200, 30)}", "--source", "64", "--target", "24")
    found = trained_by_both(model_folder("embedded:tiny-t5"), *words)
    assert found["jax to torch"]["most"] < 1e-4
    assert found["jax"]["last 20"] < found["jax"]["first"] - (0.5 if LONG else 0.1), "and something was learnt"


@pytest.mark.slow
def test_without_rounding_both_engines_do_the_same(trained_by_both: Callable[..., Any], data_folder: Path) -> None:
    """In fp64, on a base whose training multiplies every rounding error: by a thousand and more within these steps."""
    words = ("--float64", "--steps", f"{sized(12, 6)}", "--source", "96", "--target", "32")
    found = trained_by_both(data_folder / "models" / "chat-t5-mini", *words)["jax to torch"]
    assert found["step 1"] < 1e-14 and found["most"] < 1e-10


@pytest.mark.slow
def test_each_step_from_the_same_weights_is_the_same(trained_by_both: Callable[..., Any], data_folder: Path) -> None:
    """On that base in fp32."""
    words = ("--together", "--steps", f"{sized(8, 4)}", "--source", "96", "--target", "32")
    found = trained_by_both(data_folder / "models" / "chat-t5-mini", *words)
    assert found["jax to torch"]["most"] < 1e-4
    assert found["jax's steps off torch's"]["median"] < 0.1, "of a step's length: gradients cancel in this model"


# benchmarks/gpu.py, without a GPU

PARTS = ("core", "peft", "xl", "nanogpt", "xxl")


@pytest.fixture
def on_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs benchmarks/gpu.py; gives the exit code, and each part's JSON."""

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)])
        monkeypatch.setattr(sys, "path", [*sys.path])  # the script puts the repository in front
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(FOLDER / "gpu.py"), run_name="__main__")
        found, printed = (
            {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")},
            capsys.readouterr(),
        )
        assert all(f"{part}: {state['status']}" in printed.out for part, state in found.items())
        return int(str(ended.value.code)), found

    return run


@pytest.mark.slow
def test_the_parts_for_a_gpu_run_dry_on_a_cpu(on_cpu: Callable[..., Any]) -> None:
    code, found = on_cpu("all", "--tiny")
    assert code == 0 and {part: state["status"] for part, state in found.items()} == dict.fromkeys(PARTS, "done")
    names = {part: " ".join(result["name"] for result in state["results"]) for part, state in found.items()}
    for word in ("live = reloaded", "merged", "logits of PEFT and Transformers", "the same tokens, 4 beams"):
        assert all(f"{family} fp32: {word}" in names["core"] for family in ("t5-small", "gpt2"))
    for model in ("t5-small", "t5-base", "gpt2"):
        assert all(
            f"{model} {dtype}: seconds of {what}" in names["peft"]
            for dtype in ("fp32", "bf16")
            for what in ("a step", "writing")
        )
    assert "flan-t5-xl bf16: seconds of a step" in names["xl"] and "flan-t5-xxl int8: losses" in names["xxl"]
    assert "plain and ours: loss in fp32" in names["nanogpt"]
    assert all(state["machine"]["tiny"] and state["seconds"] > 0 for state in found.values())


def test_a_part_whose_time_is_spent_stops_and_says_so(on_cpu: Callable[..., Any]) -> None:
    code, found = on_cpu("peft", "--tiny", "--seconds", "0")
    assert code == 0 and found["peft"]["status"] == "stopped" and "0 s are left" in found["peft"]["reason"]


def test_a_part_that_cannot_run_says_why(on_cpu: Callable[..., Any]) -> None:
    code, found = on_cpu("all")
    assert code == 0 and {state["status"] for state in found.values()} == {"cannot run"}
    assert "there is no GPU; --tiny --device cpu is the dry run" in found["xxl"]["reason"]


@pytest.mark.slow
def test_a_check_that_fails_is_told_and_fails(on_cpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    correct = importlib.import_module("gpu_parts.correct")
    monkeypatch.setitem(correct.AS_PEERS, torch.float32, -1.0)
    code, found = on_cpu("core", "--tiny")
    assert code == 1 and found["core"]["status"] == "failed"
    assert "t5-small fp32: logits of PEFT and Transformers" in found["core"]["reason"]
    assert "merged" not in found["core"]["reason"]


def test_a_part_that_breaks_leaves_the_others_their_turn(
    on_cpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = importlib.import_module("gpu_parts.large")

    def broken(*_: Any) -> None:
        raise RuntimeError("a kernel failed")

    for part in ("correct", "against_peft", "nanogpt"):
        monkeypatch.setattr(importlib.import_module(f"gpu_parts.{part}"), "run", broken)
    monkeypatch.setattr(large, "run_xl", broken)
    code, found = on_cpu("all", "--tiny")
    assert code == 1 and found["core"]["reason"] == "RuntimeError: a kernel failed"
    assert found["xxl"]["status"] == "done"


def test_what_must_be_carried_to_a_machine_without_a_network() -> None:
    """Of loralab's requirements those that PyTorch, Transformers, PEFT and JAX do not bring."""
    needs = importlib.import_module("gpu_parts.needs")
    importlib.import_module("loralab.config.loading")
    carried, looked_for = (needs.pinned(each) for each in needs.needed())
    assert "ruamel.yaml==" in carried and "torch" not in carried and "bitsandbytes" not in carried
    assert "numpy==" in looked_for and "pydantic==" in carried + looked_for
    assert carried in needs.listing()
