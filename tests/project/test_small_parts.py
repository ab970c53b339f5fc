"""Fingerprints, schedules, dropout's coins, the optimizer's fp32 copies, progress lines, table cells."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from loralab.adapters.fingerprint import Fingerprint, difference, take
from loralab.config.training import OptimizerSettings
from loralab.console.progress import Progress, clock
from loralab.console.tables import layout, memory, p_text
from loralab.on_torch.adapters.base import fingerprint
from loralab.on_torch.loading.device import choose_device, choose_dtype
from loralab.on_torch.ops.attention import attention
from loralab.on_torch.ops.dropout import Dropout, keep_mask
from loralab.on_torch.training.optimizer import Optimizer
from loralab.training.lr_schedule import rate_at

# Fingerprints


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def test_a_fingerprint_survives_dtypes_and_tells_weights_apart() -> None:
    base = model()
    record = fingerprint(base)
    assert set(record) == {"0.weight", "2.weight"}
    assert difference(record, fingerprint(copy.deepcopy(base).bfloat16())) is None
    assert difference(record, fingerprint(copy.deepcopy(base).half())) is None
    assert "2 of 2 sampled weights have other values" in str(difference(record, fingerprint(model(1))))
    nudged = copy.deepcopy(base)
    with torch.no_grad():
        nudged[2].weight.mul_(1.02)
    assert "1 of 2 sampled weights have other values, 2.weight" in str(difference(record, fingerprint(nudged)))


def test_a_fingerprint_is_small_for_any_model() -> None:
    def read(name: str, positions: np.ndarray) -> Sequence[float]:
        return [float(p) for p in positions]

    record: Fingerprint = take({f"layer.{i}.weight": (1000, 1000) for i in range(500)}, read)
    assert len(record) == 64 and all(len(sample["values"]) == 8 for sample in record.values())
    assert {"layer.0.weight", "layer.99.weight"} <= set(record), "the first and the last by name"


# Schedules


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.25])
@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_rates_equal_transformers(schedule: str, reference, warmup_ratio: float) -> None:  # type: ignore[no-untyped-def]
    total = 40
    settings = OptimizerSettings(learning_rate=3e-4, schedule=schedule, warmup_ratio=warmup_ratio)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = reference(optimizer, int(np.ceil(warmup_ratio * total)), total)
    for step in range(total):
        assert rate_at(step, total, settings) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()


def test_a_constant_rate_is_constant_after_warmup() -> None:
    settings = OptimizerSettings(learning_rate=1.0, schedule="constant", warmup_ratio=0.5)
    assert [rate_at(step, 4, settings) for step in range(4)] == [0.0, 0.5, 1.0, 1.0]


# Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_coins_are_fair(dtype: torch.dtype, rate: float) -> None:
    torch.manual_seed(0)
    mask = keep_mask(torch.empty(501, 1999, dtype=dtype), rate)
    assert mask.dtype == dtype and set(mask.unique().tolist()) == {0.0, 1.0}
    dropped = 1 - mask.double()
    deviation = (rate * (1 - rate) / mask.numel()) ** 0.5
    assert abs(dropped.mean() - rate) < 4 * deviation + 1 / 65536  # four standard errors, and the rate's rounding
    columns = dropped.mean(0)
    assert (columns - rate).abs().max() < 6 * (rate * (1 - rate) / 501) ** 0.5, "no column is special"
    neighbours = ((dropped[:, 1:] - rate) * (dropped[:, :-1] - rate)).mean() / (rate * (1 - rate))
    assert abs(neighbours) < 4 / mask.numel() ** 0.5, "neighbours, drawn from one number, are independent"


def test_dropout_scales_and_rests_in_evaluation() -> None:
    torch.manual_seed(0)
    dropout, x = Dropout(0.25), torch.ones(100, 100, requires_grad=True)
    y = dropout(x)
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())
    assert dropout.eval()(x) is x


def test_attention_with_dropout_has_the_right_mean() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    expected = torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ v
    torch.testing.assert_close(attention(q, k, v, bias, 0.0), expected)
    torch.testing.assert_close(attention(q[:, :, :1], k, v, bias[:, :, :1], 0.0), expected[:, :, :1])
    draws = torch.stack([attention(q, k, v, bias, 0.3) for _ in range(4000)])
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / 4000**0.5)
    assert error.max() < 4.5, "80 means, each within its standard errors"


# The optimizer


def test_bf16_weights_learn_through_fp32_copies() -> None:
    settings = OptimizerSettings(learning_rate=1e-4, max_grad_norm=None)
    weights = [nn.Parameter(torch.ones(64, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    for weight in weights:
        optimizer = Optimizer([weight], [], settings)
        for _ in range(100):
            (weight.float() * torch.linspace(0.1, 1, 64)).sum().backward()
            optimizer.step(1e-4)
    assert torch.equal(weights[0], weights[1].detach().bfloat16()), "a step of 1e-4 alone would round to nothing"
    assert not torch.equal(weights[0], torch.ones(64, dtype=torch.bfloat16))


def test_the_gradient_is_clipped_and_its_length_told() -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = Optimizer([weight], [], OptimizerSettings(max_grad_norm=1.0))
    (weight * torch.tensor([3.0, 0.0, 4.0, 0.0])).sum().backward()
    assert optimizer.step(1e-3) == pytest.approx(5.0)


# Devices


def test_auto_takes_what_is_there() -> None:
    device = choose_device("auto")
    assert device.type == (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    dtype, reason = choose_dtype("auto", device)
    assert dtype in (torch.float32, torch.bfloat16) and "of its time in float32" in reason


# Progress and tables


def test_progress_in_a_file_is_whole_lines() -> None:
    stream = io.StringIO()
    progress = Progress("train", 3, stream)
    for done in (1, 2, 3):
        progress.update(done, "loss 1.0")
    assert stream.getvalue() == "train 3/3  loss 1.0  in 0:00\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3599.6, "1:00:00"), (7384, "2:03:04")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "-"), (999, "1.0 kB"), (1_234_567, "1.2 MB"), (2_500_000_000, "2.50 GB")]
)
def test_memory(size: int, text: str) -> None:
    assert memory(size) == text


@pytest.mark.parametrize(("p", "text"), [(None, ""), (0.0002, "p<.001"), (0.0312, "p=.031"), (1.0, "p=1.000")])
def test_p_values(p: float | None, text: str) -> None:
    assert p_text(p) == text


def test_layout_aligns_cells_of_several_lines() -> None:
    assert layout(["a", "long"], [[["x"], ["1", "22"]]]) == "a  long\n-------\nx     1\n     22"
