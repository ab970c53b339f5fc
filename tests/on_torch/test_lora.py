"""LoRA in PyTorch: values and gradients against the NumPy oracle and PEFT in fp64, and the properties that make it
LoRA."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForMaskedLM
from transformers.pytorch_utils import Conv1D

from loralab import LoRASpec, attach
from loralab.errors import AdapterError, TargetError
from loralab.models.t5 import SIZES
from loralab.on_torch.adapters.base import base_parameters
from loralab.on_torch.models.t5 import T5
from loralab.on_torch.ops.linear import project

INPUTS, OUTPUTS, ROWS = 24, 16, 10


class Projections(nn.Module):
    """Three linear maps of one input, as in attention."""

    def __init__(self, inputs: int = INPUTS, outputs: int = OUTPUTS, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(inputs, outputs, bias=bias) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


class Language(nn.Module):
    """An embedding and a Conv1D, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.c_attn = nn.Embedding(50, INPUTS), Conv1D(OUTPUTS, INPUTS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.c_attn(self.embed(ids))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def randomise(module: nn.Module) -> None:
    """Gives every update a B, and an embedding's an A, that is not zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".updates." in name and name.rsplit(".", 1)[1] in "AB":
                parameter.normal_()


def oracle_inputs(model: nn.Module, module: str) -> tuple[np.ndarray, ...]:
    adapted = model.get_submodule(module)
    update = adapted.updates["default"]
    return tuple(t.detach().double().numpy() for t in (adapted.base.weight, update.A, update.B))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_values_and_gradients_equal_the_oracle(rate: float) -> None:
    model = Projections().double()
    adapter = attach(model, LoRASpec(rank=4, alpha=6, rules=["q"], dropout=rate))
    randomise(model)
    model.train()
    x, dy = (
        torch.randn(ROWS, INPUTS, dtype=torch.float64, requires_grad=True),
        torch.randn(ROWS, OUTPUTS, dtype=torch.float64),
    )
    y = model(x)[0]
    y.backward(dy)
    mask = model.q.masks._mask.numpy() if rate else np.ones((ROWS, INPUTS))
    W, A, B = oracle_inputs(model, "q")
    numbers = x.detach().numpy()
    np.testing.assert_allclose(y.detach().numpy(), oracle.forward(numbers, W, A, B, 1.5, mask, rate), rtol=1e-12)
    grads = oracle.backward(numbers, W, A, B, 1.5, mask, dy.numpy(), rate)
    update = adapter.updates["q"]
    for ours, theirs in ((x.grad, grads.x), (update.A.grad, grads.A), (update.B.grad, grads.B)):
        assert ours is not None
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12, atol=1e-13)


def test_dora_equals_the_oracle() -> None:
    model = Projections().double()
    adapter = attach(model, LoRASpec(rank=4, alpha=6, rules=["q"], use_dora=True))
    randomise(model)
    update = adapter.updates["q"]
    assert update.magnitude is not None
    with torch.no_grad():
        update.magnitude.mul_(1.5)
    x, dy = torch.randn(ROWS, INPUTS, dtype=torch.float64), torch.randn(ROWS, OUTPUTS, dtype=torch.float64)
    y = model(x)[0]
    y.backward(dy)
    W, A, B = oracle_inputs(model, "q")
    m = update.magnitude.detach().numpy()
    np.testing.assert_allclose(
        y.detach().numpy(), x.numpy() @ oracle.dora_merged(W, A, B, 1.5, m).T, rtol=1e-11, atol=1e-13
    )
    assert update.magnitude.grad is not None
    expected = oracle.dora_backward_magnitude(x.numpy(), W, A, B, 1.5, dy.numpy())
    np.testing.assert_allclose(update.magnitude.grad.numpy(), expected, rtol=1e-11)


PEFT_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "dora": ({"use_dora": True}, {"use_dora": True}),
    "patterns": ({"rank_pattern": {"k": 2}, "alpha_pattern": {"v": 5}},) * 2,
}


@pytest.mark.parametrize("case", PEFT_CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_equal_peft_in_fp64(case: str, bias: bool) -> None:
    ours, theirs = PEFT_CASES[case]
    model = Projections(bias=bias).double()
    reference = copy.deepcopy(model)
    adapter = attach(model, LoRASpec(rank=4, alpha=6, rules=["q", "k", "v"], **ours))
    randomise(model)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q", "k", "v"], **theirs)
    peft = get_peft_model(reference, config, autocast_adapter_dtype=False).double()
    layers = {name: peft.base_model.model.get_submodule(name) for name in adapter.updates}
    with torch.no_grad():
        for name, update in adapter.updates.items():
            layers[name].lora_A["default"].weight.copy_(update.A)
            layers[name].lora_B["default"].weight.copy_(update.B)
    x = torch.randn(ROWS, INPUTS, dtype=torch.float64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs, expected = torch.cat(model(mine), -1), torch.cat(peft(other), -1)
    weights = torch.randn_like(outputs)
    (outputs * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(mine.grad, other.grad)
    for name, update in adapter.updates.items():
        torch.testing.assert_close(update.A.grad, layers[name].lora_A["default"].weight.grad)
        torch.testing.assert_close(update.B.grad, layers[name].lora_B["default"].weight.grad)
        if update.magnitude is not None:
            torch.testing.assert_close(update.magnitude.grad, layers[name].lora_magnitude_vector["default"].weight.grad)


def test_embedding_and_conv1d_equal_peft_in_fp64() -> None:
    model = Language().double()
    reference = copy.deepcopy(model)
    adapter = attach(model, LoRASpec(rank=4, alpha=6, rules=["embed", "c_attn"]))
    randomise(model)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["embed", "c_attn"], fan_in_fan_out=True)
    peft = get_peft_model(reference, config, autocast_adapter_dtype=False).double()
    inner = peft.base_model.model
    with torch.no_grad():
        inner.c_attn.lora_A["default"].weight.copy_(adapter.updates["c_attn"].A)
        inner.c_attn.lora_B["default"].weight.copy_(adapter.updates["c_attn"].B)
        inner.embed.lora_embedding_A["default"].copy_(adapter.updates["embed"].A)
        inner.embed.lora_embedding_B["default"].copy_(adapter.updates["embed"].B)
    ids = torch.randint(0, 50, (3, 7))
    ours, theirs = model(ids), peft(ids)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(adapter.updates["embed"].A.grad, inner.embed.lora_embedding_A["default"].grad)
    torch.testing.assert_close(adapter.updates["c_attn"].A.grad, inner.c_attn.lora_A["default"].weight.grad)


# What makes it LoRA


def test_output_is_the_bases_at_the_start_and_when_disabled() -> None:
    model, ids = Language(), torch.randint(0, 50, (3, 7))
    before = model(ids)
    adapter = attach(model, LoRASpec(rank=4, rules=["embed", "c_attn"]))
    assert torch.equal(model(ids), before)
    randomise(model)
    assert not torch.allclose(model(ids), before)
    adapter.disable()
    assert torch.equal(model(ids), before)


def test_a_step_changes_the_adapter_alone() -> None:
    model = Projections(bias=True)
    base = {name: p.detach().clone() for name, p in base_parameters(model).items()}
    adapter = attach(model, LoRASpec(rank=4, rules=["q", "v"], bias="lora_only"))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    before = [p.detach().clone() for p in adapter.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        sum(y.square().sum() for y in model(torch.randn(ROWS, INPUTS))).backward()
        optimizer.step()
    assert all(torch.equal(p, base[name]) for name, p in base_parameters(model).items())
    assert not any(torch.equal(p, old) for p, old in zip(adapter.parameters(), before, strict=True))
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}


def test_dora_learns_where_a_weight_begins_at_zero() -> None:
    """PEFT gives NaN there."""
    model, x = Projections(), torch.randn(ROWS, INPUTS)
    with torch.no_grad():
        model.q.weight[1] = 0.0
    adapter = attach(model, LoRASpec(rank=4, rules=["q"], use_dora=True))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    losses = []
    for _ in range(40):
        loss = (model(x)[0][:, 1] - x[:, 0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dora", [False, True])
def test_merge_gives_a_new_plain_model(dora: bool) -> None:
    model = Projections(bias=True).double()
    adapter = attach(model, LoRASpec(rank=4, alpha=2, rules=["q", "v"], use_dora=dora, bias="all"))
    randomise(model)
    with torch.no_grad():
        adapter.tuned["k.bias"].add_(1.0)
    x = torch.randn(ROWS, INPUTS, dtype=torch.float64)
    live, state = torch.cat(model(x)), {name: t.clone() for name, t in model.state_dict().items()}
    merged = adapter.merge()
    assert list(merged.state_dict()) == list(Projections(bias=True).state_dict())
    torch.testing.assert_close(torch.cat(merged(x)), live)
    assert torch.equal(torch.cat(adapter.merge()(x)), torch.cat(merged(x))), "merging twice is merging once"
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items()), "nothing here is changed"


def test_merging_embedding_and_conv1d() -> None:
    model, ids = Language().double(), torch.randint(0, 50, (3, 7))
    adapter = attach(model, LoRASpec(rank=4, rules=["embed", "c_attn"]))
    randomise(model)
    torch.testing.assert_close(adapter.merge()(ids), model(ids))


def test_no_forward_and_no_mode_changes_a_weight() -> None:
    model = Projections()
    attach(model, LoRASpec(rank=4, rules=["q", "v"], dropout=0.5))
    randomise(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for mode in (True, False, True):
        model.train(mode)(torch.randn(ROWS, INPUTS))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_several_named_adapters_one_active() -> None:
    model, x = Projections(bias=True), torch.randn(ROWS, INPUTS)
    base = torch.cat(model(x))
    outputs = {}
    adapters = {
        name: attach(model, LoRASpec(rank=rank, rules=rules, bias="all"), name)
        for name, rank, rules in (("a", 2, "q"), ("b", 4, ["q", "k"]))
    }
    randomise(model)
    with torch.no_grad():
        adapters["a"].tuned["v.bias"].add_(1.0)
    for name, adapter in adapters.items():
        adapter.enable()
        outputs[name] = torch.cat(model(x))
        torch.testing.assert_close(torch.cat(adapter.merge()(x)), outputs[name])
    adapters["a"].enable()
    assert torch.equal(torch.cat(model(x)), outputs["a"])
    adapters["b"].disable()  # not active: nothing happens
    assert torch.equal(torch.cat(model(x)), outputs["a"])
    adapters["a"].disable()
    assert torch.equal(torch.cat(model(x)), base)
    with pytest.raises(AdapterError, match="an adapter named 'a' already"):
        attach(model, LoRASpec(rank=2, rules="q"), "a")
    with pytest.raises(AdapterError, match="a word without dots"):
        attach(model, LoRASpec(rank=2, rules="q"), "a.b")


def test_moving_the_model_moves_what_no_adapter_has_enabled() -> None:
    x = torch.randn(ROWS, INPUTS, dtype=torch.float64)
    model = Projections(bias=True)
    expected = {"base": copy.deepcopy(model).double()(x)}
    spec = LoRASpec(rank=2, rules=["q"], modules_to_save=["k"], bias="all")
    adapters = {name: attach(model, spec, name) for name in "ab"}
    randomise(model)
    for name, adapter in adapters.items():
        adapter.enable()
        with torch.no_grad():
            for parameter in adapter.tuned.values():
                parameter.normal_()
        expected[name] = copy.deepcopy(model).double()(x)
    model.double()
    late = attach(model, spec, "late")
    for name, adapter in adapters.items():
        adapter.enable()
        torch.testing.assert_close(model(x), expected[name])
        torch.testing.assert_close(adapter.merge()(x), expected[name])
    adapters["b"].disable()
    torch.testing.assert_close(model(x), expected["base"])
    assert {weight.dtype for weight in base_parameters(model).values()} == {torch.float64}
    late.enable()
    torch.testing.assert_close(model(x), expected["base"])
    model.k.float()  # a part alone
    late.disable()
    assert model.k.weight.dtype == torch.float32


def test_moving_a_model_moves_the_gradient_of_a_disabled_adapter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    adapter = attach(model, LoRASpec(rank=2, rules=["0"], modules_to_save=["1"]))
    model(torch.ones(1, 4)).sum().backward()
    adapter.disable()
    model.double()
    adapter.enable()
    model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(adapter.tuned["1.bias"].grad, torch.full((2,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["0.A", "1.weight"])
def test_an_adapter_that_is_not_finite_is_not_merged(part: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    adapter = attach(model, LoRASpec(rank=2, rules=["0"], modules_to_save=["1"]))
    with torch.no_grad():
        (adapter.updates["0"].A if part == "0.A" else adapter.tuned[part]).view(-1)[1] = value
    with pytest.raises(AdapterError, match=r"The adapter holds NaN or infinite values in 1 of 4 tensors, such as"):
        adapter.merge()


@pytest.mark.parametrize(
    ("init", "std"),
    [("kaiming", 2048**-0.5 / 3**0.5), ("gaussian", 1 / 8), ("normal", 1.0), ("kaiming_normal", 1 / 32)],
)
def test_initialisation(init: str, std: float) -> None:
    model = Projections(inputs=2048)
    adapter = attach(model, LoRASpec(rank=8, rules=["q", "k"], init=init, seed=3))
    A = adapter.updates["q"].A
    assert not adapter.updates["q"].B.any()
    assert A.std().item() == pytest.approx(std, rel=0.05)  # the sample's own spread: 16,384 draws
    if init == "kaiming":
        assert A.abs().max() <= 2048**-0.5
    assert not torch.equal(A, adapter.updates["k"].A), "each module has a start of its own"
    again = attach(Projections(inputs=2048), LoRASpec(rank=8, rules=["k", "q"], init=init, seed=3))
    assert torch.equal(again.updates["q"].A, A), "which depends on seed and name alone"
    other = attach(Projections(inputs=2048), LoRASpec(rank=8, rules=["q"], init=init, seed=4))
    assert not torch.equal(other.updates["q"].A, A)


@pytest.mark.parametrize(
    ("spec", "scale"),
    [
        (LoRASpec(rank=8, alpha=None), 1.0),
        (LoRASpec(rank=8, alpha=32), 4.0),
        (LoRASpec(rank=16, alpha=32, use_rslora=True), 8.0),
        (LoRASpec(rank=8, alpha=16, rank_pattern={"q": 4}), 4.0),
        (LoRASpec(rank=8, alpha=16, alpha_pattern={"SelfAttention.q": 2}), 0.25),
    ],
)
def test_scale(spec: LoRASpec, scale: float) -> None:
    assert spec.scale_of("block.0.SelfAttention.q") == scale


# Dropout


def train_outputs(share: bool) -> tuple[Tensor, Tensor]:
    """x, and the updates of q and k for an A of ones and a B that sums: what each has dropped shows."""
    model = Projections(64, 64)
    attach(model, LoRASpec(rank=64, alpha=64, rules=["q", "k"], dropout=0.5, shared_dropout=share))
    with torch.no_grad():
        for name in ("q", "k"):
            update = getattr(model, name).updates["default"]
            update.A.copy_(torch.eye(64))
            update.B.copy_(torch.eye(64))
            getattr(model, name).base.weight.zero_()
    q, k, _ = model.train()(torch.ones(32, 64))
    return q, k


def test_one_mask_for_projections_of_one_input_or_one_each() -> None:
    q, k = train_outputs(share=True)
    assert torch.equal(q, k)
    assert set(q.unique().tolist()) == {0.0, 2.0}
    assert q.mean().item() == pytest.approx(1.0, abs=0.1)  # four standard errors of 2,048 coins
    q, k = train_outputs(share=False)
    assert not torch.equal(q, k)


def test_a_second_pass_over_the_same_input_draws_anew() -> None:
    model, x = Projections(64, 64), torch.ones(32, 64)
    attach(model, LoRASpec(rank=4, rules=["q", "k"], dropout=0.5))
    randomise(model)
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])
    assert torch.equal(model.eval()(x)[0], model(x)[0])


def test_adapted_models_can_be_copied_and_pickled() -> None:
    model, x = Projections(), torch.randn(ROWS, INPUTS)
    attach(model, LoRASpec(rank=4, rules=["q"], dropout=0.5))
    randomise(model)
    model.train()(x)
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x)[0], model(x)[0])


# Projections of one input, computed together


@pytest.mark.parametrize("rules", [["q", "k", "v"], ["q", "v"], ["k"]])
@pytest.mark.parametrize(
    "settings", [{}, {"dropout": 0.5}, {"dropout": 0.5, "shared_dropout": False}, {"use_dora": True}], ids=str
)
def test_project_equals_one_product_each(rules: list[str], settings: dict[str, Any]) -> None:
    model = Projections(bias=True).double()
    adapter = attach(model, LoRASpec(rank=4, alpha=6, rules=rules, rank_pattern={rules[0]: 2}, **settings))
    randomise(model)
    results = []
    for together in (True, False):
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, ROWS * INPUTS, dtype=torch.float64).view(ROWS, INPUTS).requires_grad_()
        model.train().zero_grad()
        outputs = torch.cat(project(x, (model.q, model.k, model.v)) if together else model(x))
        outputs.square().sum().backward()
        results.append([outputs.detach(), x.grad, *(p.grad.clone() for p in adapter.parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


# Memory


def saved_units(dtype: torch.dtype, rate: float) -> float:
    """Bytes kept for backward by q, k and v of one input, in units of that input."""
    model = Projections(512, 512).to(dtype)
    attach(model, LoRASpec(rank=8, alpha=8, rules=["q", "k", "v"], dropout=rate))
    model.train()
    x = torch.randn(1024, 512, dtype=dtype, requires_grad=True) * 1.0001
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(x)
    assert all(y.requires_grad for y in outputs)
    size = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)
    return size / (x.numel() * x.element_size())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rate", "limit"), [(0.0, 1.1), (0.1, 2.2)])
def test_what_is_kept_for_backward(dtype: torch.dtype, rate: float, limit: float) -> None:
    assert 1.0 <= saved_units(dtype, rate) <= limit


def test_few_rows_meet_factors_that_stay_in_fp32() -> None:
    """A step of generation in bf16: the rank-sized products are not rounded, and q, k and v agree with each alone."""
    model = Projections().bfloat16()
    attach(model, LoRASpec(rank=4, alpha=8, rules=["q", "k", "v"]))
    randomise(model)
    x = torch.randn(3, INPUTS, dtype=torch.bfloat16)
    with torch.no_grad():
        model.q.base.weight.zero_()
        update = model.q.update()
        unrounded = F.linear(F.linear(x.float(), update.A) * 2.0, update.B)
        assert torch.equal(model.q(x), unrounded.bfloat16())
        together = project(x, [model.q, model.k, model.v])
        assert all(map(torch.equal, together, model(x)))


def test_adapters_are_fp32_on_a_bf16_base() -> None:
    model = Projections().bfloat16()
    adapter = attach(model, LoRASpec(rank=4, rules=["q"]))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    y = model(torch.randn(ROWS, INPUTS, dtype=torch.bfloat16))[0]
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert adapter.updates["q"].B.grad is not None and adapter.updates["q"].B.grad.dtype == torch.float32


# What is selected


@pytest.mark.parametrize(("rank", "count"), [(8, 589_824), (32, 2_359_296)])
def test_t5_small_has_the_published_number_of_parameters(rank: int, count: int) -> None:
    with torch.device("meta"):
        model = T5(SIZES["t5-small"])
    model.to_empty(device="cpu")
    rules = ["Attention.o", "Attention.q", "Attention.v", "Attention.k"]
    adapter = attach(model, LoRASpec(rank=rank, rules=rules))
    assert adapter.trainable == count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter.total == 60_506_624 + count
    table = str(adapter)
    assert (
        "encoder.block.*.layer.0.SelfAttention.q" in table
        and f"Trained: {count:,} of" in table
        and "72 modules adapted" in table
    )
    assert max(map(len, table.splitlines()[:-1])) <= 80


def test_tune_vectors_trains_biases_and_norms() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    adapter = attach(model, LoRASpec(rank=2, rules=["0"], tune_vectors=True))
    assert set(adapter.tuned) == {"0.bias", "1.weight", "1.bias", "2.bias"}


def test_modules_to_save_are_trained_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    adapter = attach(model, LoRASpec(rank=2, rules=["0"], modules_to_save=["2"]))
    assert set(adapter.tuned) == {"2.weight", "2.bias"}
    with pytest.raises(TargetError, match="both for LoRA and to be trained whole"):
        attach(nn.Sequential(nn.Linear(4, 4)), LoRASpec(rank=2, rules=["0"], modules_to_save=["0"]))


def test_a_setting_that_does_nothing_is_an_error() -> None:
    with pytest.raises(TargetError, match="bias: all trains nothing"):
        attach(Projections(), LoRASpec(rank=2, rules=["q"], bias="all"))
    with pytest.raises(TargetError, match="rank_pattern 'w'"):
        attach(Projections(), LoRASpec(rank=2, rules=["q"], rank_pattern={"w": 4}))
    with pytest.raises(TargetError, match="no default rules for Projections"):
        attach(Projections(), LoRASpec(rank=2))


@pytest.mark.parametrize("spec", [{"rules": ["q", "shared"]}, {"rules": ["q"], "modules_to_save": ["shared"]}], ids=str)
@pytest.mark.parametrize("whose", ["ours, tied", "ours", "theirs"])
def test_a_weight_with_several_uses_is_refused(whose: str, spec: dict[str, Any], tmp_path: Path) -> None:
    """T5's encoder and decoder read one embedding, whether or not it is the output head too."""
    folder = tiny.make_t5(tmp_path, "tied-unscaled" if whose == "ours, tied" else "untied")
    model = tiny.theirs(folder) if whose == "theirs" else tiny.ours(folder)
    with pytest.raises(TargetError, match="'shared' shares its weight"):
        attach(model, LoRASpec(rank=2, **spec))


def test_the_bias_of_a_tied_head_is_its_own() -> None:
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 30}
    adapter = attach(DistilBertForMaskedLM(DistilBertConfig(**sizes)), LoRASpec(rules=["q_lin"], bias="all"))
    assert "vocab_projector.bias" in adapter.tuned


def test_a_failed_attach_leaves_the_model_as_it_was() -> None:
    model = Projections()
    state = list(model.state_dict())
    with pytest.raises(TargetError):
        attach(model, LoRASpec(rank=2, rules=["q", "nope"]))
    assert list(model.state_dict()) == state and all(p.requires_grad for p in model.parameters())


def test_disabled_means_the_whole_model() -> None:
    model = Projections()
    adapter = attach(model, LoRASpec(disabled=True))
    assert adapter.trainable == adapter.total == sum(p.numel() for p in model.parameters())
    with pytest.raises(AdapterError, match="trains the whole model"):
        adapter.save("nowhere")
