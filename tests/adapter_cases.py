"""Models, adapters and damaged adapter folders that several tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
)

from loralab.on_torch.loading.load import load_weights

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
