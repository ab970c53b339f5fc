"""A base in int8 and nf4: products and gradients, what is packed, what an adapter, a merge and PEFT make of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional as bnb
from peft import PeftModel
from tiny import CPU, make_t5, ours, theirs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from loralab import LoRASpec, attach, load_adapter, load_model
from loralab.errors import AdapterError, MissingExtra, ModelError, TargetError
from loralab.on_torch.adapters.base import fingerprint, quantized_modules
from loralab.on_torch.loading.load import load_weights
from loralab.on_torch.models.t5 import T5
from loralab.on_torch.ops import linear
from loralab.on_torch.ops.linear import QuantizedLinear, dense_weight
from loralab.on_torch.ops.onednn_linear import Linear
from loralab.on_torch.quantization import quantize
from loralab.on_torch.quantization.quantize import Quantization, load_settled, quantize_linear

KINDS = ("int8", "nf4")
IDS = torch.randint(2, 100, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every inner width is a multiple of 64, as nf4 needs it."""
    return make_t5(tmp_path_factory.mktemp("quantize") / "t5", "untied", width=64)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("quantize") / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=64, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder


def packed(folder: Path, kind: str, *but: str, dtype: torch.dtype = torch.float32) -> Any:
    return load_weights(folder, dtype, CPU, Quantization(kind, but))


def outputs(model: nn.Module) -> Tensor:
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    labels = {"labels": IDS} if "T5" in type(inner).__name__ else {}
    return model(input_ids=IDS, **labels).logits


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return outputs(model)


def randomise(adapter: Any) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


# The layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(192, 70), lambda: Conv1D(70, 192)], ids=["Linear", "Conv1D"])
def test_product_and_gradient_are_those_of_the_unpacked_weight(
    kind: str, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "PART", 192 * 11)  # several parts, the last one shorter
    torch.manual_seed(0)
    layer = quantize_linear(kind, make(), CPU)
    x = torch.randn(70, 2, 192).transpose(0, 1).requires_grad_()
    again, grad = x.detach().clone().requires_grad_(), torch.randn(2, 70, 70)
    expected = F.linear(again, dense_weight(layer), layer.bias)
    layer(x).backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(x.grad, again.grad)
    assert torch.equal(layer.weight, dense_weight(layer).T if layer.transposed else dense_weight(layer))


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_weights_are_rounded_once_and_sums_are_not(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = quantize_linear(kind, nn.Linear(192, 70, bias=False), CPU), torch.randn(5, 192, dtype=torch.bfloat16)
    rounded = dense_weight(layer).bfloat16()
    torch.testing.assert_close(layer(x), x @ rounded.T, rtol=2**-7, atol=2**-9)  # bf16 keeps 8 bits of the sums


def test_codes_are_those_of_bitsandbytes_and_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "ROWS", 192 * 7)  # packed in several parts
    torch.manual_seed(0)
    weight = torch.randn(50, 192)
    weight[3] = 0
    module = nn.Linear(192, 50, bias=False)
    module.weight = nn.Parameter(weight.clone())
    layer = quantize_linear("int8", module, CPU)
    largest = weight.abs().amax(1).numpy().astype(np.float32)
    scales = 127 / np.where(largest == 0, np.float32(1), largest)
    expected = np.rint(weight.numpy() * scales[:, None].astype(np.float32)).astype(np.int8)
    assert np.array_equal(layer.codes.numpy(), expected) and np.array_equal(layer.scales.numpy(), largest / 127)
    assert not layer.codes[3].any() and not dense_weight(layer)[3].any(), "a row of zeros stays one"
    others = torch.arange(50) != 3
    theirs_, stats, _ = bnb.int8_vectorwise_quant(weight[others])
    assert torch.equal(layer.codes[others], theirs_) and torch.equal(layer.scales[others], stats / 127)
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(dense_weight(quantize_linear("nf4", module, CPU)), bnb.dequantize_4bit(codes, state))


def test_how_far_rounding_goes() -> None:
    torch.manual_seed(0)
    module = nn.Linear(512, 256)
    weight = module.weight.detach()
    apart = {
        kind: float((dense_weight(quantize_linear(kind, module, CPU)) - weight).norm() / weight.norm())
        for kind in KINDS
    }
    assert 0.003 < apart["int8"] < 0.01 and 0.05 < apart["nf4"] < 0.12


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_for_the_backward_pass(kind: str) -> None:
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    layer, x = quantize_linear(kind, nn.Linear(192, 70), CPU), torch.randn(4, 192, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad and sum(kept) == 0
    half = {"int8": 70 * 192 + 4 * 70, "nf4": 70 * 96 + 4 * 70 * 3}
    assert sum(buffer.nbytes for buffer in layer.buffers()) == half[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_moves_and_casts_leave_packed_weights_alone(kind: str) -> None:
    layer, x = quantize_linear(kind, nn.Linear(192, 70, bias=False), CPU), torch.randn(4, 192)
    before, expected = dense_weight(layer), layer(x)
    layer.to(torch.bfloat16).half().to("cpu")
    assert torch.equal(dense_weight(layer), before) and torch.equal(layer(x), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("kind", KINDS)
def test_on_cuda_inputs_are_not_rounded_either(kind: str) -> None:
    torch.manual_seed(0)
    layer = quantize_linear(kind, nn.Linear(512, 256), torch.device("cuda"))
    x = torch.randn(8, 512, device="cuda", requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, dense_weight(layer), layer.bias.cuda()), rtol=1e-3, atol=1e-3)  # TF32
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense_weight(layer).sum(0).expand(8, -1), rtol=1e-3, atol=1e-3)  # TF32


# What of a model is packed


def test_embeddings_heads_and_what_rules_name_stay_as_they_are(base: Path) -> None:
    model = packed(base, "nf4", dtype=torch.bfloat16)
    assert len(quantized_modules(model)) == 3 * 7 + 2 * 11
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and type(model.lm_head) is Linear
    kept = quantized_modules(packed(base, "nf4", "wo", "decoder.*.q"))
    assert not [name for name in kept if name.endswith("wo") or (name.startswith("decoder") and name.endswith(".q"))]
    assert len(kept) == 3 * 7 + 2 * 11 - 5 - 4
    with pytest.raises(TargetError, match="The rule 'w0' matches no module"):
        packed(base, "int8", "w0")


def test_our_gpt2_and_transformers_classes_are_packed_below_their_heads(gpt2: Path, bases: Path) -> None:
    mine, plain = packed(gpt2, "nf4"), AutoModelForCausalLM.from_pretrained(gpt2).eval()
    theirs_ = load_settled(AutoModelForCausalLM.from_pretrained(gpt2).eval(), torch.float32, CPU, Quantization("nf4"))
    assert len(quantized_modules(mine)) == len(quantized_modules(theirs_)) == 2 * 4
    assert all(module.transposed for module in quantized_modules(theirs_).values()), "Conv1D"
    assert theirs_.lm_head.weight is theirs_.transformer.wte.weight
    assert fingerprint(mine) == fingerprint(theirs_) == fingerprint(plain), "as the file has them"
    with torch.no_grad():
        for name, module in quantized_modules(theirs_).items():
            plain.get_submodule(name).weight.copy_(module.weight)
            assert torch.equal(dense_weight(module), dense_weight(quantized_modules(mine)[name]))
    torch.testing.assert_close(logits(theirs_), logits(plain))
    torch.testing.assert_close(logits(mine), logits(plain))
    heads = {"pre_classifier", "classifier"}
    classifier = packed(bases / "distilbert", "int8")
    assert len(quantized_modules(classifier)) == 2 * 6
    assert {name for name, module in classifier.named_modules() if type(module) is Linear} == heads


# Adapters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [{}, {"use_dora": True}, {"tune_vectors": True}], ids=["lora", "dora", "vectors"])
def test_an_adapter_learns_as_on_a_plain_base_of_the_unpacked_weights(
    kind: str, spec: dict[str, Any], base: Path, gpt2: Path
) -> None:
    for folder, rules in ((base, ["q", "wo"]), (gpt2, ["c_attn", "c_fc"])):
        model, plain = packed(folder, kind), load_weights(folder, torch.float32, CPU)
        untouched = logits(model)
        exact = not spec.get("use_dora")  # which divides by norms and multiplies by them again
        with torch.no_grad():
            for name, module in quantized_modules(model).items():
                plain.get_submodule(name).weight.copy_(module.weight)
        settings = LoRASpec(rank=4, alpha=8, rules=rules, **spec)
        ours_, theirs_ = attach(model, settings), attach(plain, settings)
        assert torch.equal(logits(model), untouched) or not exact
        torch.testing.assert_close(logits(model), untouched, rtol=1e-4, atol=1e-4)  # logits are tens here
        assert ours_.total == theirs_.total and ours_.trainable == theirs_.trainable
        for each in (ours_, theirs_):
            randomise(each)
            outputs(each.model).square().mean().backward()
        for a, b in zip(ours_.parameters(), theirs_.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)  # sums of parts, in another order
        ours_.disable()
        assert torch.equal(logits(model), untouched)


def test_whole_training_of_packed_modules_is_refused(base: Path) -> None:
    with pytest.raises(TargetError, match=r"trains 'decoder.block.0.*wo' whole, which is stored as int8 and cannot be"):
        attach(packed(base, "int8"), LoRASpec(rules=["q"], modules_to_save=["decoder.*.wo"]))
    attach(packed(base, "int8", "wo"), LoRASpec(rules=["q"], modules_to_save=["decoder.*.wo"]))


@pytest.mark.parametrize("kind", KINDS)
def test_reloaded_merged_and_in_peft(kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # so that both sum in one order
    model = packed(base, kind)
    adapter = attach(model, LoRASpec(rank=4, alpha=8, rules=["q", "v"]))
    randomise(adapter)
    adapter.save(tmp_path / "adapter")
    again = packed(base, kind)
    assert load_adapter(again, tmp_path / "adapter").note is None
    assert torch.equal(logits(again), logits(model))
    plain = ours(base)
    onto_plain = load_adapter(plain, tmp_path / "adapter")
    merged = adapter.merge()
    assert isinstance(merged, T5) and not quantized_modules(merged)
    for name, weight in onto_plain.merge().state_dict().items():
        assert torch.equal(weight, merged.state_dict()[name]), "the original weights, not the rounded ones"
    assert torch.equal(logits(again), logits(model)), "merging changes nothing"
    torch.testing.assert_close(logits(PeftModel.from_pretrained(theirs(base), tmp_path / "adapter")), logits(plain))


def test_storage_changes_no_fingerprint_and_other_weights_do(base: Path, gpt2: Path, tmp_path: Path) -> None:
    for folder in (base, gpt2):
        plain = fingerprint(load_weights(folder, torch.float32, CPU))
        assert fingerprint(packed(folder, "int8")) == fingerprint(packed(folder, "nf4")) == plain
    attach(packed(base, "int8"), LoRASpec(rules=["q"])).save(tmp_path / "adapter")
    other = make_t5(tmp_path / "other", "untied", width=64, seed=1)
    with pytest.raises(AdapterError, match=r"this model .* is another"):
        load_adapter(packed(other, "int8"), tmp_path / "adapter")


def test_another_storage_than_in_training_is_allowed_and_told(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, folder in (("int8", "a"), (None, "b")):
        model = ours(base) if kind is None else packed(base, kind)
        attach(model, LoRASpec(rules=["q"])).save(tmp_path / folder)
    adapter = load_adapter(load_weights(base, torch.bfloat16, CPU), tmp_path / "a")
    assert adapter.note is not None and adapter.note in str(adapter)
    assert (
        "was stored as int8, and this one is stored as bfloat16: the weights that it adapts differ by 0."
        in adapter.note
    )
    note = load_adapter(packed(base, "nf4"), tmp_path / "b").note
    assert note is not None and "was not packed, and this one is stored as nf4" in note and "% (root mean" in note
    note = load_adapter(packed(base, "nf4"), tmp_path / "a").note
    assert note is not None and "was stored as int8, and this one is stored as nf4" in note
    _without_bitsandbytes(monkeypatch)
    note = load_adapter(ours(base), tmp_path / "a").note
    assert note is not None and note.endswith("how far apart they are is not known without bitsandbytes.")


# Mistakes


def _without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))


def test_without_bitsandbytes_the_extra_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_bitsandbytes(monkeypatch)
    with pytest.raises(MissingExtra, match=r"pip install 'loralab\[quantize\]'"):
        packed(base, "int8")


def test_a_bitsandbytes_that_does_not_work_says_so_in_one_line(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> Any:
        raise RuntimeError("libcusparse.so.11: cannot open shared object file\nand forty lines of advice")

    monkeypatch.setitem(quantize.KINDS, "int8", (quantize.Int8Linear, fail))
    with pytest.raises(ModelError) as caught:
        packed(base, "int8")
    assert "does not work on cpu here: libcusparse.so.11: cannot open shared object file. Install" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shapes_and_numbers_that_cannot_be_packed_name_the_module(base: Path, tmp_path: Path) -> None:
    narrow = make_t5(tmp_path / "narrow")
    with pytest.raises(
        ModelError, match=r"encoder.block.0.*q has 32 inputs, and nf4 packs blocks of 64.*quantize_except"
    ):
        packed(narrow, "nf4")
    assert len(quantized_modules(packed(narrow, "int8"))) == 3 * 6 + 2 * 10
    kept = quantized_modules(packed(narrow, "nf4", "q", "k", "v", "o", "wi"))
    assert kept and all(name.endswith("wo") for name in kept)
    broken = nn.Linear(64, 4)
    broken.weight.data[2, 3] = float("nan")
    with pytest.raises(ModelError, match=r"x\.y holds weights that are not finite"):
        quantize_linear("int8", broken, CPU, "x.y")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "int4"}, "quantize 'int4' is not one of int8, nf4"),
        ({"quantize_except": ["wo"]}, "only with quantize"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str, base: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(base), **settings)


def test_a_packed_model_can_be_copied_but_not_written(base: Path, tmp_path: Path) -> None:
    import copy

    from loralab.on_torch.loading.load import save_model

    model = packed(base, "int8")
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert any(isinstance(module, QuantizedLinear) for module in copy.deepcopy(model).modules())
    with pytest.raises(AssertionError, match="what is written is a plain model"):
        save_model(model, tmp_path / "out", base, None)
