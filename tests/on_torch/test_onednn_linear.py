"""Products by oneDNN beside PyTorch's own: values, gradients, what is kept for them, and weights that are laid out once."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import make_gpt2, make_t5
from torch import Tensor, nn

from loralab.config.generation import Decoding
from loralab.on_torch.generation.generate import generate_ids
from loralab.on_torch.loading.load import load_weights
from loralab.on_torch.ops import onednn_linear as ours
from loralab.on_torch.ops.onednn_linear import Linear, by_onednn, linear, prepacked_weights

pytestmark = pytest.mark.skipif(not ours.HAS_ONEDNN, reason="PyTorch without oneDNN, or no x86 processor")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' small products count as large ones."""
    monkeypatch.setattr(ours, "SMALL", 1)


def operands(*shape: int, learning: tuple[bool, bool, bool] = (True, True, True)) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = (*shape, 33), (20, 33), (20,)
    return [
        torch.randn(size, generator=draw).requires_grad_(learns) for size, learns in zip(sizes, learning, strict=True)
    ]


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 4), (0,), (1, 1)])
@pytest.mark.parametrize("learning", list(product((False, True), repeat=3)))
def test_values_and_gradients_are_pytorchs(shape: tuple[int, ...], learning: tuple[bool, bool, bool]) -> None:
    mine, theirs = (operands(*shape, learning=learning) for _ in range(2))
    for given, times in ((mine, linear), (theirs, F.linear)):
        y = times(*given)
        assert y.requires_grad == any(learning)
        if y.requires_grad:
            (y.sin() * torch.linspace(0, 1, 20)).sum().backward()
    torch.testing.assert_close(linear(*mine), F.linear(*theirs))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)  # up to 24 rows of such sums are added


def test_gradients_that_are_views_and_inputs_with_gaps() -> None:
    mine, theirs = operands(4, 6), operands(4, 6)
    for given, times in ((mine, linear), (theirs, F.linear)):
        x, weight, bias = given
        times(x.transpose(0, 1)[::2], weight, bias).sum().backward()  # the gradient is one number, expanded
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_small_products_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """To start oneDNN takes longer than they do."""
    monkeypatch.setattr(ours, "SMALL", 4 * 33 * 20 + 1)
    given = operands(4)
    assert torch.equal(linear(*given), F.linear(*given))
    assert type(linear(*given).grad_fn) is type(F.linear(*given).grad_fn)
    assert "Product" in type(linear(*operands(5)).grad_fn).__name__


def test_a_second_derivative_is_refused() -> None:
    x, weight, bias = operands(4)
    (first,) = torch.autograd.grad(linear(x, weight, bias).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def kept(learning: tuple[bool, bool, bool]) -> set[tuple[int, ...]]:
    """Shapes of what is kept for the backward pass."""
    shapes = set()

    def pack(tensor: Tensor) -> Tensor:
        shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(*operands(5, learning=learning))
    return shapes


def test_no_more_is_kept_than_gradients_need() -> None:
    assert kept((True, False, False)) == {(20, 33)}
    assert kept((False, True, True)) == {(5, 33)}
    assert kept((False, False, True)) == set()


def test_pytorch_has_the_product_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_onednn", lambda *_: pytest.fail("by oneDNN"))
    x, weight, bias = (t.detach() for t in operands(5))
    linear(x.double(), weight.double())
    linear(x.bfloat16(), weight.bfloat16())
    linear(x.to("meta"), weight.to("meta"))
    linear(x[0], weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    linear(x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_laid_out_for_a_while(dtype: torch.dtype) -> None:
    model = by_onednn(nn.Sequential(nn.Linear(40, 70), nn.Linear(70, 9, bias=False))).to(dtype)
    assert all(type(each) is Linear for each in model)
    x = torch.randn(3, 40, dtype=dtype)
    with torch.no_grad():
        before = model(x)
        with prepacked_weights(model):
            laid_out = ours.LAID_OUT.works(dtype)  # bfloat16 needs AVX-512
            assert all((each.layout is not None) == laid_out for each in model)
            within = model(x)
            model[0].layout, held = torch.full_like(x, torch.nan), model[0].layout
            with torch.enable_grad():
                torch.testing.assert_close(model(x), before)  # where gradients flow, the weight itself is multiplied by
            model[0].layout = held
        assert all(each.layout is None for each in model)
    torch.testing.assert_close(within, before)
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight"}


def test_inside_another_nothing_is_laid_out_again() -> None:
    model = nn.Sequential(Linear(40, 70))
    with prepacked_weights(model):
        once = model[0].layout
        with prepacked_weights(model):
            assert model[0].layout is once
        assert model[0].layout is once
    assert model[0].layout is None


def test_a_large_model_is_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Linear(40, 70))
    monkeypatch.setattr(ours, "TWICE_AT_MOST", 40 * 70 * 4 - 1)
    with prepacked_weights(model):
        assert model[0].layout is None


@pytest.mark.parametrize("make", [make_t5, lambda folder: make_gpt2(folder, n_positions=80)], ids=["t5", "gpt2"])
def test_generation_lays_out_and_changes_no_token(
    make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tied heads too."""
    model = load_weights(make(tmp_path / "model"), torch.float32, CPU)  # type: ignore[operator]
    sources, decoding = [[5, 9, 11, 4], [7, 3]], Decoding(max_new_tokens=70)  # more steps than the room begins with
    asked: list[bool] = []
    times = ours._onednn

    def watched(x: Tensor, weight: Tensor, *more: Any) -> Tensor:
        asked.append(weight.is_mkldnn)
        return times(x, weight, *more)

    monkeypatch.setattr(ours, "_onednn", watched)
    answers = generate_ids(model, sources, decoding, 0)
    assert asked and all(asked), "every product meets a weight that was laid out"
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert generate_ids(model, sources, decoding, 0) == answers
