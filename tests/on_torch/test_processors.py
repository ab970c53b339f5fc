"""Processors without the newest instructions, and builds of PyTorch without its private operations: the same commands work."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Process
from torch import Tensor, nn

from loralab.on_torch.loading.device import choose_dtype
from loralab.on_torch.models import kv_cache as written
from loralab.on_torch.ops import onednn_linear as product
from loralab.on_torch.ops.linear import dense_weight
from loralab.on_torch.ops.onednn_linear import by_onednn, linear, prepacked_weights
from loralab.on_torch.ops.probe import Probe, trial_numbers
from loralab.on_torch.profiling.meter import Meter
from loralab.on_torch.quantization import nf4
from loralab.on_torch.quantization.quantize import quantize_linear
from loralab.runs.environment import this_machine

CPU = torch.device("cpu")
BRIEF = ("data.max_train_rows=12", "training.epochs=1", "data.max_validation_rows=4", "evaluation.max_new_tokens=4")
PLACES = {"AVX2": (), "SSE41": (), "absent": ("mkldnn",)}
DTYPES = ("float32", "bfloat16")
ROUNDING = {"float32": 1e-3, "bfloat16": 2e-2}


@pytest.fixture(scope="module")
def command(workshop: Path) -> Callable[..., tuple[str, str]]:
    """Runs loralab in a process of its own; gives what it writes."""

    def run(*arguments: str, without: tuple[str, ...] = ()) -> tuple[str, str]:
        process = Process(workshop, arguments, without=without)
        assert process.wait() == 0, process.errors
        return process.output, process.errors

    return run


@pytest.fixture(scope="module")
def losses(command: Callable[..., tuple[str, str]]) -> dict[str, float]:
    """Of a run on this processor as it is, by dtype."""
    return {
        dtype: _loss(command("train", "tiny.yaml", f"model.dtype={dtype}", *BRIEF, "--json")[0]) for dtype in DTYPES
    }


def _loss(output: str) -> float:
    return float(json.loads(output)["metrics"]["loss"]["value"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", PLACES)
def test_train_evaluate_and_generate_do_the_same_everywhere(
    place: str, dtype: str, command: Callable[..., tuple[str, str]], losses: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    if place != "absent":
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", place)
    out, without = f"{place}-{dtype}", PLACES[place]
    given = ("tiny.yaml", f"model.dtype={dtype}", *BRIEF, "--json", "--out", out)
    trained, said = command("train", *given, without=without)
    assert _loss(trained) == pytest.approx(losses[dtype], rel=ROUNDING[dtype])
    evaluated, _ = command("evaluate", out, "--json", without=without)
    assert _loss(evaluated) == pytest.approx(_loss(trained), rel=1e-6)
    answer, _ = command("generate", out, "--text", "Tom: Lunch? Ann: At one.", without=without)
    assert answer.endswith("\n")
    lines = [line for line in said.splitlines() if "does not work" in line]
    expected = product.HAS_ONEDNN and (place == "absent" or dtype == "bfloat16")
    assert bool(lines) == expected
    assert len({line.split(" (")[0] for line in lines}) == len(lines), "each operation once"
    assert all(f"in {dtype} on this cpu" in line and "takes its place" in line for line in lines)


# One mechanism


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Nothing is known of any operation, before and after."""
    probes = (product.PRODUCT, product.LAID_OUT, written.BAG, nf4.FAST)
    known = [dict(probe._known) for probe in probes]
    for probe in probes:
        probe._known.clear()
    yield
    for probe, before in zip(probes, known, strict=True):
        probe._known.clear()
        probe._known.update(before)


class Trials:
    """A trial that counts its calls."""

    def __init__(self, found: Callable[[Tensor], Tensor]) -> None:
        self.found, self.calls = found, 0

    def __call__(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        self.calls += 1
        right = trial_numbers(4, dtype=dtype, device=device)
        return self.found(right), right


def _raise(_: Tensor) -> Tensor:
    raise RuntimeError("the path needs another cpu\nand ten lines more")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (lambda right: right, None),
        (_raise, "the path needs another cpu"),
        (lambda right: right * 1.5, "its result is off by 0.5 of the largest number"),
        (lambda right: right * torch.nan, "its result is off by nan of the largest number"),
    ],
)
def test_an_operation_is_tried_once_and_its_failure_is_one_line(
    found: Callable[[Tensor], Tensor], reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    trials = Trials(found)
    probe = Probe("A product", "another takes its place", trials)
    assert [probe.works(torch.float32) for _ in range(3)] == [reason is None] * 3
    assert trials.calls == 1
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == (
        []
        if reason is None
        else [f"A product does not work in float32 on this cpu ({reason}); another takes its place."]
    )


def test_a_trial_is_seen_by_nobody() -> None:
    """It may come within a count of operations, and must change no random stream."""
    trials = Trials(lambda right: (right[:, None] @ right[None])[0] / right[0])
    stream = torch.get_rng_state()
    with torch.inference_mode(), Meter() as meter, torch.device("meta"):
        assert Probe("A product", "", trials).works(torch.float32)
    assert meter.flops == 0 and torch.equal(torch.get_rng_state(), stream)


@pytest.fixture
def absent(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    monkeypatch.setattr(torch.ops, "bitsandbytes", object())

    def no_bags(*_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("no bags here")

    monkeypatch.setattr(torch.nn.functional, "embedding_bag", no_bags)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_operations_all_numbers_are_pytorchs_own(
    absent: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "SMALL", 1)
    model = by_onednn(nn.Sequential(nn.Linear(64, 70), nn.GELU())).to(dtype)
    weight, bias = model[0].weight, model[0].bias
    x = trial_numbers(3, 64, dtype=dtype)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    with torch.no_grad(), prepacked_weights(model):
        assert model[0].layout is None
        assert torch.equal(model(x), model[1](torch.nn.functional.linear(x, weight, bias)))
    weights, rows = trial_numbers(2, 2, 1, 5, dtype=dtype), trial_numbers(2, 2, 5, 8, dtype=dtype)
    assert torch.equal(written.summed(weights, rows), weights @ rows)
    assert choose_dtype("auto", CPU)[0] in (torch.float32, torch.bfloat16)


def test_nf4_unpacks_the_same_without_bitsandbytes_operation(absent: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # packing needs the library
    torch.manual_seed(0)
    layer = quantize_linear("nf4", nn.Linear(192, 50, bias=False), CPU)
    known = dense_weight(layer)
    for dtype in (torch.float32, torch.bfloat16):
        nf4.FAST._known[dtype, CPU] = False
    assert torch.equal(dense_weight(layer), known)
    columns = slice(64, 192)
    assert torch.equal(layer.part(slice(3, 9), columns, torch.bfloat16), known[3:9, columns].bfloat16())


@pytest.mark.parametrize("held", ["avx2", "SSE41", "AVX512_CORE"])
def test_a_plan_knows_that_onednn_is_held_back(held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.runs.environment._read", lambda _: "flags\t: avx512_bf16 amx_bf16\n")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert this_machine("cpu").bfloat16
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held)
    assert not this_machine("cpu").bfloat16
