"""Adapters on disk: ours in PEFT, PEFT's in ours, with equal logits; and every way in which one may not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_t5
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
)

from loralab import LoRASpec, attach, load_adapter
from loralab.adapter import read
from loralab.errors import AdapterError
from loralab.on_torch.load import load_weights

CPU = torch.device("cpu")
IDS = torch.randint(2, 100, (3, 12), generator=torch.Generator().manual_seed(1))


def t5(folder: Path) -> nn.Module:
    return load_weights(folder, torch.float32, CPU)


def hf_t5(folder: Path) -> nn.Module:
    return T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def logits(model: nn.Module) -> Tensor:
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    labels = {"labels": IDS} if "T5" in type(inner).__name__ else {}
    with torch.no_grad():
        return model(input_ids=IDS, **labels).logits


def randomise(parameters: Any) -> None:
    """Fills what is trained with numbers that show, moderate enough to keep the logits well-conditioned."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_t5(tmp_path / "base", "untied")


T5_CASES: dict[str, dict[str, Any]] = {
    "plain": {"rules": ["q", "v"], "rank": 4, "alpha": 8},
    "tail": {"rules": ["Attention.q"], "rank": 4, "alpha": 8},
    "glob": {"rules": ["decoder.*.wi_0"], "rank": 4, "alpha": 8},
    "regex": {"rules": [r"re:encoder\..*\.(q|wo)"], "rank": 4, "alpha": 8},
    "all-linear": {"rules": "all-linear", "rank": 4, "alpha": 8},
    "alpha null": {"rules": ["q", "v"], "rank": 4},
    "alpha null, ranks, rslora": {
        "rules": ["q", "v"],
        "rank": 4,
        "rank_pattern": {"SelfAttention.q": 2},
        "use_rslora": True,
    },
    "rslora": {"rules": ["q", "v"], "rank": 4, "alpha": 8, "use_rslora": True},
    "dora": {"rules": ["q", "wo"], "rank": 4, "alpha": 8, "use_dora": True},
    "patterns": {
        "rules": ["q", "v"],
        "rank": 4,
        "alpha": 8,
        "rank_pattern": {"decoder.*.q": 2},
        "alpha_pattern": {"v": 3},
    },
    "norms": {"rules": ["q"], "rank": 4, "alpha": 8, "tune_vectors": True},
    "head": {"rules": ["q"], "rank": 4, "alpha": 8, "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", T5_CASES)
def test_peft_loads_ours(case: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # so that both sum in one order
    model = t5(base)
    plain = logits(model)
    adapter = attach(model, LoRASpec(**T5_CASES[case]))
    randomise(adapter.parameters())
    adapter.save(tmp_path / "adapter")
    live = logits(model)
    assert not torch.allclose(live, plain, atol=1e-3)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(hf_t5(base), tmp_path / "adapter").eval()), live)
    again = t5(base)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), live)


PEFT_CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "gpt2 conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2 embedding": (gpt2, {"target_modules": ["wpe", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 dora": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "bert lora_only": (bert, {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "bert all biases": (bert, {"target_modules": ["query"], "bias": "all"}),
    "bert head": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert regex": (bert, {"target_modules": r".*\.layer\.1\..*\.(query|key)"}),
    "bert rslora patterns": (
        bert,
        {
            "target_modules": ["query", "key"],
            "use_rslora": True,
            "rank_pattern": {"key": 2},
            "alpha_pattern": {"query": 3},
        },
    ),
    "bert gaussian": (bert, {"target_modules": ["dense"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_we_load_pefts_and_peft_loads_it_back(case: str, tmp_path: Path) -> None:
    make, settings = PEFT_CASES[case]
    peft = get_peft_model(make(), LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    randomise(p for p in peft.parameters() if p.requires_grad)
    peft.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    expected = logits(peft)
    model = make()
    adapter = load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(adapter.merge()), expected)
    adapter.save(tmp_path / "ours")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make(), tmp_path / "ours").eval()), expected)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_we_load_pefts_t5(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    peft = get_peft_model(
        hf_t5(base), LoraConfig(r=4, lora_alpha=6, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM", **settings)
    ).eval()
    randomise(p for p in peft.parameters() if p.requires_grad)
    peft.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    model = t5(base)
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(peft))


def test_the_folder_is_pefts(base: Path, tmp_path: Path) -> None:
    adapter = attach(t5(base), LoRASpec(rules=["q", "v"], rank=4, alpha=8, dropout=0.05))
    adapter.save(tmp_path / "a")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "loralab.json",
    ]
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "target_modules": ["q", "v"],
        "bias": "none",
    }
    assert expected.items() <= config.items()
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    key = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"
    assert tensors[key].shape == (4, 32) and {t.dtype for t in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * len(adapter.updates)


def test_a_bf16_adapter_of_pefts_is_read(base: Path, tmp_path: Path) -> None:
    adapter = attach(t5(base), LoRASpec(rules=["q"], rank=4, alpha=8))
    randomise(adapter.parameters())
    adapter.save(tmp_path / "a")
    file = tmp_path / "a/adapter_model.safetensors"
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})
    for module, parts in read(tmp_path / "a").updates.items():
        for part, array in parts.items():
            assert torch.equal(
                torch.from_numpy(array.copy()), rounded[f"base_model.model.{module}.lora_{part}.weight"].float()
            )


def test_several_adapters_from_disk(base: Path, tmp_path: Path) -> None:
    model, live = t5(base), {}
    for name in ("a", "b"):
        adapter = attach(model, LoRASpec(rules=["q"], rank=4, seed=len(live)), name)
        randomise(adapter.parameters())
        adapter.save(tmp_path / name)
        live[name] = logits(model)
    again = t5(base)
    loaded = {name: load_adapter(again, tmp_path / name, name) for name in live}
    for name, adapter in loaded.items():
        adapter.enable()
        assert torch.equal(logits(again), live[name])


# What does not fit


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Path:
    attach(t5(base), LoRASpec(rules=["q", "v"], rank=4, alpha=8)).save(tmp_path / "saved")
    return tmp_path / "saved"


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


KEY = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_{}.weight"


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def drop_module(tensors: dict[str, Tensor]) -> None:
    for part in "AB":
        del tensors[KEY.format(part)]


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors does not exist"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json does not exist"),
    "config is not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    "weights cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-8]),
        "damaged or cut off",
    ),
    "half an update": (
        lambda f: edit_tensors(f, lambda t: t.pop(KEY.format("B"))),
        r"no lora_B.weight for 'encoder.block.0",
    ),
    "a module missing": (
        lambda f: edit_tensors(f, drop_module),
        r"lacks the tensors of 1 modules .* 'encoder.block.0.layer.0.SelfAttention.q'",
    ),
    "a module too many": (
        lambda f: edit_tensors(
            f, lambda t: t.update({KEY.format(p).replace("block.0", "block.9"): t[KEY.format(p)].clone() for p in "AB"})
        ),
        r"holds 1 tensors for modules that this model does not have, such as 'encoder.block.9.*Did you mean",
    ),
    "an unknown part": (
        lambda f: edit_tensors(f, rename(KEY.format("A"), KEY.format("C"))),
        r"a part of LoRA that loralab does not know",
    ),
    "a wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({KEY.format("A"): torch.zeros(4, 31)})),
        r"A of encoder.block.0.layer.0.SelfAttention.q has the shape \(4, 31\).*need \(4, 32\)",
    ),
    "a value that is NaN": (
        lambda f: edit_tensors(f, lambda t: t[KEY.format("A")].view(-1)[3:4].fill_(float("nan"))),
        r"adapter_model.safetensors holds NaN or infinite values in 1 of \d+ tensors, such as .*SelfAttention.q.lora_A",
    ),
    "a value that is infinite": (
        lambda f: edit_tensors(f, lambda t: t[KEY.format("B")].view(-1)[3:4].fill_(float("-inf"))),
        r"NaN or infinite values in 1 of .*lora_B",
    ),
    "another rank in the config": (lambda f: edit_config(f, r=5), r"has the shape \(4, 32\).*need \(5, 32\)"),
    "magnitudes missing": (
        lambda f: edit_config(f, use_dora=True),
        r"holds A, B for .*; its settings call for A, B, magnitude",
    ),
    "a rank that is none": (
        lambda f: edit_config(f, r=None),
        r"adapter_config.json cannot be a LoRASpec: rank is None; it must be a valid integer",
    ),
    "targets that are no names": (
        lambda f: edit_config(f, target_modules=5),
        r"cannot be a LoRASpec: rules is 5; it must be a valid tuple",
    ),
    "targets that are no expression": (
        lambda f: edit_config(f, target_modules="("),
        r"'\(' in the adapter's target_modules is no regular expression",
    ),
    "a card of nothing": (
        lambda f: (f / "loralab.json").write_text('{"base": null}'),
        r"loralab.json is damaged: None is no description of a base",
    ),
    "another kind": (lambda f: edit_config(f, peft_type="IA3"), r"type 'IA3'; only LORA"),
    "unsupported setting": (lambda f: edit_config(f, layer_replication=[[0, 2]]), "layer_replication"),
    "changes the base": (
        lambda f: edit_config(f, init_lora_weights="pissa_niter_16"),
        "path_initial_model_for_weight_conversion",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_one_clear_error(case: str, base: Path, saved: Path) -> None:
    damage, message = BROKEN[case]
    damage(saved)
    model = t5(base)
    state = list(model.state_dict())
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, saved)
    assert list(model.state_dict()) == state, "the model is as it was"


def test_another_base_is_refused(base: Path, saved: Path, tmp_path: Path) -> None:
    other = make_t5(tmp_path / "other", "untied", seed=1)
    with pytest.raises(
        AdapterError,
        match=r"trained on the base .*, but this model \(.*\) is another: .* sampled weights have other values",
    ):
        load_adapter(t5(other), saved)
    narrow = tmp_path / "narrow"
    shutil.copytree(base, narrow)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"num_layers": 2}))
    tensors = {name: t for name, t in load_file(narrow / "model.safetensors").items() if "encoder.block.2" not in name}
    save_file(tensors, narrow / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"the base has no weight 'encoder\.block\.2"):
        load_adapter(t5(narrow), saved)


def test_the_same_base_in_bf16_is_accepted(base: Path, saved: Path) -> None:
    load_adapter(load_weights(base, torch.bfloat16, CPU), saved)
    load_adapter(hf_t5(base), saved)
