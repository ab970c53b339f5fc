"""Adapters on disk: ours in PEFT, PEFT's in ours, with equal logits; and every way in which one may not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import BROKEN, CPU, T5_CASES, bert, gpt2, hf_t5, logits, randomise, t5
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_t5
from torch import nn

from loralab import LoRASpec, attach, load_adapter
from loralab.adapters.files import read_adapter
from loralab.errors import AdapterError
from loralab.on_torch.loading.load import load_weights


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_t5(tmp_path / "base", "untied")


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
    for module, parts in read_adapter(tmp_path / "a").updates.items():
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
