"""Checks that a recipe can train a checkpoint, by its config.json, before any weight is read.

A recipe teaches a model to write: it must be an encoder-decoder (T5, BART, …) or a decoder-only language model (Llama,
GPT-2, …). All others are named with the reason, and with what to use instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.errors import ModelError, nearest
from loralab.models.checkpoint_files import read_config
from loralab.models.pretrained import refuse_code
from loralab.on_torch.models.causal import CausalFamily
from loralab.on_torch.models.own_family import OwnFamily
from loralab.on_torch.models.registry import family_for, family_of

# Keys of config.json that models of pictures and of sound have.
SENSES = ("vision_config", "image_size", "patch_size", "num_channels", "audio_config", "num_mel_bins", "conv_kernel")
REASONS = {
    "ForMaskedLM": "fills gaps in a text that it reads both ways, and cannot write one",
    "ForPreTraining": "fills gaps in a text that it reads both ways, and cannot write one",
    "ForSequenceClassification": "chooses among labels (for which the recipe names their column as data.label), and this target is a text",
    "ForTokenClassification": "labels each token, and a recipe's target is a text",
    "ForMultipleChoice": "chooses among answers, and a recipe's target is a text",
    "ForQuestionAnswering": "points at words of its source, and a recipe's target is a text",
}


def check_supported(folder: Path, classify: bool = False) -> None:
    """Raises ModelError where the folder's architecture is no language model that writes; says which one would be.

    Args:
        classify: it is to choose among labels instead, which any family can for which Transformers has a sequence classifier.
    """
    refuse_code(folder)
    config = read_config(folder)
    if classify:
        return _check_classifier(folder, str(config.get("model_type")))
    names = config.get("architectures") or ["T5ForConditionalGeneration" if config.get("model_type") == "t5" else ""]
    if isinstance(family_for(config, classifies=False), OwnFamily) or names[0] in _writers():
        return
    raise ModelError(
        f"{folder} is a {names[0] or 'model without a class in its config.json'}, which recipes cannot train: "
        f"it {_reason(names[0], config)}. They train encoder-decoders (T5, BART, …) and decoder-only language models "
        f"(Llama, GPT-2, …). {_instead(str(config.get('model_type')))} "
        "For a loop of your own, loralab.attach puts LoRA on any PyTorch model."
    )


def _check_classifier(folder: Path, model_type: str) -> None:
    from transformers.models.auto import modeling_auto as auto

    known = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if model_type not in known:
        raise ModelError(
            f"{folder} is of the family {model_type!r}, for which Transformers has no sequence classifier. {nearest(model_type, known)} "
            "With data.label name such a base, such as a BERT or a DistilBERT."
        )


def _writers() -> set[str]:
    from transformers.models.auto import modeling_auto as auto

    return {
        *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    }


def _reason(name: str, config: Mapping[str, Any]) -> str:
    if reason := next((reason for suffix, reason in REASONS.items() if name.endswith(suffix)), None):
        return reason
    if any(key in config for key in SENSES):
        return "reads pictures or sound, and a recipe's source is a text"
    if name.endswith("Model"):
        return "has no language-model head, so that it gives states and no words"
    return "is none of Transformers' classes that write text"


def _instead(model_type: str) -> str:
    """The class of the same family that writes, where the family is made for writing."""
    from transformers.models.auto import modeling_auto as auto

    reads_both_ways = model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    writer = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if writer is None and not reads_both_ways:
        writer = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if writer is None:
        return "Name one of these as model.name."
    return f"Name a checkpoint of the same family whose config.json says {writer}."


@torch.no_grad()
def check_looks_back(model: nn.Module) -> None:
    """Raises ModelError where a decoder-only model sees later tokens (a BERT without `is_decoder`), which would tell it the answer."""
    family = family_of(model)
    assert isinstance(family, CausalFamily)
    ids = torch.tensor([[0, 1], [0, 2]], device=next(model.parameters()).device)
    first, second = model(**family.joined_inputs(model, ids, torch.ones_like(ids))).logits[:, 0]
    if not torch.allclose(first, second, atol=1e-3 * float(first.abs().max())):
        raise ModelError(
            f"{type(model).__name__} sees the tokens that follow, so that it would read each target instead of learning it. "
            "Where its class has a decoder's mode, is_decoder: true in its config.json switches it on."
        )
