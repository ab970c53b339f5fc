"""What a step does: accumulation, smoothing, the loss in chunks, recomputed activations, LoRA+, and numbers that are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import make_t5
from torch import Tensor, nn

from loralab import LoRASpec, attach
from loralab.config.loading import load_recipe
from loralab.config.training import OptimizerSettings
from loralab.data.batches import Batch
from loralab.on_torch.engine import TorchEngine, open_engine
from loralab.on_torch.loading.load import load_weights
from loralab.on_torch.models.registry import family_of
from loralab.on_torch.models.t5 import T5
from loralab.on_torch.training import loss as loss_module
from loralab.on_torch.training.diagnose import first_not_finite
from loralab.on_torch.training.forward import inputs_of
from loralab.on_torch.training.loss import token_losses
from loralab.on_torch.training.optimizer import Optimizer


@pytest.fixture
def engine(workshop: Path) -> TorchEngine:
    """A fresh one, with a B that is not zero, so that A has gradients too."""
    engine = open_engine(load_recipe(workshop / "tiny.yaml", ["model.dropout=0", "optimizer.max_grad_norm=null"]))
    assert engine.adapter is not None
    torch.manual_seed(0)
    with torch.no_grad():
        for update in engine.adapter.updates.values():
            update.B.normal_(std=0.1)
    return engine


def batch(rows: list[int]) -> Batch:
    """Rows of very unequal target lengths, out of one fixed set."""
    coins = np.random.default_rng(0)
    sources, labels = coins.integers(2, 30000, (4, 20)), coins.integers(2, 30000, (4, 12))
    for row, length in enumerate((12, 3, 7, 1)):
        labels[row, length:] = -100
    sources, labels = sources[rows], labels[rows]
    return Batch(
        np.array(rows), sources, np.ones_like(sources, dtype=bool), labels, sources.size, int((labels != -100).sum())
    )


def gradients(engine: TorchEngine, batches: list[Batch]) -> tuple[float, list[Tensor]]:
    """Loss and gradients of one step; the step itself has a rate of 0."""
    kept: list[Tensor] = []
    engine.optimizer.adamw.register_step_pre_hook(
        lambda *_: kept.extend(p.grad.clone() for p in engine.optimizer.masters)
    )
    result = engine.train_step(batches, 0.0)
    return result.loss, kept


def test_a_split_batch_is_the_whole_batch(engine: TorchEngine, workshop: Path) -> None:
    loss, whole = gradients(engine, [batch([0, 1, 2, 3])])
    engine._optimizer = None
    split_loss, split = gradients(engine, [batch([0]), batch([1, 3]), batch([2])])
    assert split_loss == pytest.approx(loss, rel=1e-6)
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a, b)
    assert any(g.abs().max() > 1e-3 for g in whole)


def test_the_reported_loss_is_the_mean_over_target_tokens(engine: TorchEngine) -> None:
    whole = batch([0, 1, 2, 3])
    per_row = engine.losses(whole)
    assert engine.train_step([whole], 0.0).loss == pytest.approx(per_row.sum() / whole.num_target_tokens, rel=1e-6)
    for row in range(4):
        assert engine.losses(batch([row]))[0] == pytest.approx(per_row[row], rel=1e-5)  # sums in another order


# The loss in chunks


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_the_loss_in_chunks_is_cross_entropy(head: str, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", 3)
    torch.manual_seed(0)
    labels, upstream = torch.randint(0, 50, (10,)), torch.randn(10, dtype=torch.float64)
    results = []
    for chunked in (True, False):
        states = torch.linspace(-1, 1, 80, dtype=torch.float64).view(10, 8).requires_grad_()
        weight = torch.linspace(2, -1, 400, dtype=torch.float64).view(50, 8).sin().requires_grad_(head == "trained")
        if chunked:
            losses = token_losses(
                states, lambda x, w=weight: x @ w.T, None if weight.requires_grad else weight, labels, smoothing
            )
        else:
            losses = F.cross_entropy(states @ weight.T, labels, reduction="none", label_smoothing=smoothing)
        losses.backward(upstream)
        results.append([losses.detach(), states.grad, weight.grad])
    for ours, expected in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(ours, expected)
    assert (results[0][2] is None) == (head == "frozen")


def test_no_whole_matrix_of_logits_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", 16)
    model = load_weights(make_t5(tmp_path / "t5", "untied", vocabulary=2000), torch.float32, torch.device("cpu"))
    attach(model, LoRASpec(rank=2, rules=["q"]))
    ids, labels = torch.randint(2, 2000, (4, 30)), torch.randint(2, 2000, (4, 40))
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model.train().token_losses(ids, None, labels)
    weight = 2000 * 32
    assert max(size for size in sizes if size != weight) < 160 * 2000 / 4


# Recomputed activations


def kept_numbers(model: T5, ids: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The loss, and how many numbers are kept for its backward pass."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = model.train().token_losses(ids, None, labels).mean()
    return loss, sum(kept)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recomputed_activations_give_the_same_gradients(method: str, tmp_path: Path) -> None:
    folder = make_t5(tmp_path / "t5", "untied")
    results = []
    for recompute in (False, True):
        model = load_weights(folder, torch.float32, torch.device("cpu"))
        assert isinstance(model, T5)
        if method == "lora":
            adapter = attach(model, LoRASpec(rank=2, rules=["q", "v"], dropout=0.3))
            with torch.no_grad():
                for update in adapter.updates.values():
                    update.B.fill_(0.1)
        if recompute:
            family_of(model).checkpoint_activations(model)
        torch.manual_seed(3)
        ids, labels = torch.randint(2, 120, (4, 30)), torch.randint(2, 120, (4, 10))
        loss, kept = kept_numbers(model, ids, labels)
        loss.backward()
        results.append((loss, kept, [p.grad for p in model.parameters() if p.requires_grad]))
    assert torch.equal(results[0][0], results[1][0]), "dropout's coins fall the same way the second time"
    for a, b in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(a, b)
    assert results[1][1] < 0.5 * results[0][1], "and much less is kept"


# The optimizer


def test_lora_plus_gives_b_a_rate_of_its_own() -> None:
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = Optimizer([a, b], [b], OptimizerSettings(lora_plus_ratio=16))
    (a.sum() + b.sum()).backward()
    optimizer.step(1e-3)
    torch.testing.assert_close(b.detach(), 16 * a.detach())
    assert a[0].item() == pytest.approx(-1e-3, rel=1e-5)


def test_a_scaled_step_is_relative_to_the_size_of_each_tensor() -> None:
    """Adam's first step is the rate in every element, whatever the gradient; so it shows the rate that each tensor has."""
    parameters = [nn.Parameter(torch.full((3, 5), size)) for size in (2.0, 0.01, 0.0)]
    settings = OptimizerSettings(scale_parameter=True, max_grad_norm=None)
    optimizer = Optimizer(parameters, [], settings)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, -0.5)
    optimizer.step(0.1)
    for parameter, size, counted in zip(parameters, (2.0, 0.01, 0.0), (2.0, 0.01, 1e-3), strict=True):
        torch.testing.assert_close(parameter.detach() - size, torch.full((3, 5), 0.1 * counted))


def test_state_goes_round(engine: TorchEngine, tmp_path: Path) -> None:
    for _ in range(3):
        engine.train_step([batch([0, 1, 2, 3])], 1e-2)
    engine.save_state(tmp_path / "state.safetensors")
    expected = engine.train_step([batch([0, 1])], 1e-2), [p.detach().clone() for p in engine.parameters]
    engine.load_state(tmp_path / "state.safetensors")
    again = engine.train_step([batch([0, 1])], 1e-2), engine.parameters
    assert again[0] == expected[0] and all(torch.equal(a, b) for a, b in zip(again[1], expected[1], strict=True))


# Numbers that are not finite


@pytest.fixture
def broken(engine: TorchEngine) -> Iterator[TorchEngine]:
    """An engine whose second feed-forward layer overflows."""
    block = engine.model.get_submodule("encoder.block.1.layer.1.DenseReluDense.wo")
    hook = block.register_forward_hook(lambda _, __, output: output * float("inf"))
    yield engine
    hook.remove()


def test_a_loss_that_is_not_finite_changes_nothing_and_names_the_module(broken: TorchEngine) -> None:
    before = [p.detach().clone() for p in broken.parameters]
    result = broken.train_step([batch([0, 1])], 1e-2)
    assert not np.isfinite(result.loss) or not np.isfinite(result.grad_norm)
    assert all(torch.equal(p, old) for p, old in zip(broken.parameters, before, strict=True))
    assert (
        broken.diagnose([batch([0, 1])])
        == "The first module to give such a number is encoder.block.1.layer.1.DenseReluDense.wo."
    )


def test_a_weight_that_is_not_finite_is_named(engine: TorchEngine) -> None:
    tensors: list[Any] = [inputs_of(engine.model, batch([0]))]
    assert first_not_finite(engine.model, tensors) == "The forward pass is finite; the gradient is not."
    with torch.no_grad():
        engine.model.get_parameter("encoder.final_layer_norm.weight")[3] = float("nan")
    assert (
        first_not_finite(engine.model, tensors)
        == "The weight encoder.final_layer_norm.weight holds numbers that are not finite."
    )


@pytest.mark.parametrize(
    ("save_every", "said"), [(1, r"The checkpoint of step \d+ is whole\."), (1000, r"There is no checkpoint yet\.")]
)
def test_a_run_stops_with_the_rows_named(save_every: int, said: str, workshop: Path) -> None:
    from loralab.errors import RunError
    from loralab.training.train import train

    recipe = load_recipe(
        workshop / "tiny.yaml",
        ["optimizer.learning_rate=1e38", "optimizer.max_grad_norm=null", f"training.save_every={save_every}"],
    )
    with pytest.raises(
        RunError,
        match=rf"Step \d+: the loss or its gradient is not a finite number\. .* training rows \d+, .*{said}",
    ):
        train(recipe, workshop / f"diverged-{save_every}")
    assert bool(list((workshop / f"diverged-{save_every}").glob("checkpoints/step-*"))) is (save_every == 1)
