"""A model from its settings alone, without files: on the meta device to be traced, or on a real one with random weights to be timed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loralab.errors import ModelError, nearest
from loralab.models import gpt2, t5
from loralab.models.lookup import Base
from loralab.models.pretrained import from_config
from loralab.on_torch.loading.load import quiet_transformers
from loralab.on_torch.models.gpt2 import GPT2
from loralab.on_torch.models.t5 import T5
from loralab.on_torch.ops.onednn_linear import by_onednn

META = torch.device("meta")
NARROW = 0.02  # random weights lie within so much of zero: nothing overflows, and no denormal number slows a step down


def build(base: Base, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model of these settings, in this dtype; on the meta device it has no numbers.

    Raises:
        ModelError: Transformers has no such class.
    """
    if not (base.published and base.family in ("t5", "gpt2")):
        return by_onednn(_of_transformers(base, device).to(device, dtype))
    with META:
        model = _ours(base).to(dtype)
    if device == META:
        return model
    model = model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-NARROW, NARROW)
    return model


def _ours(base: Base) -> nn.Module:
    if base.family == "t5":
        return T5(t5.parse_config(base.config), base.own_head)
    return GPT2(gpt2.parse_config(base.config))


def _of_transformers(base: Base, device: torch.device) -> nn.Module:
    import transformers

    config = _config(base)
    kind = "classifier" if base.labels is not None else "encoder-decoder" if config.is_encoder_decoder else "decoder"
    kinds: dict[str, Any] = {
        "classifier": transformers.AutoModelForSequenceClassification,
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
        "decoder": transformers.AutoModelForCausalLM,
    }
    if base.labels is not None:
        config.num_labels, config.problem_type = base.labels, "single_label_classification"
    try:
        with device, quiet_transformers(warnings=False):
            model: nn.Module = from_config(kinds[kind], config)
    except ValueError as error:
        raise ModelError(
            f"{base.origin} is of the architecture {base.family!r}, of which Transformers has no {kind} to train with this recipe."
        ) from error
    return model


def _config(base: Base) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto import configuration_auto

    known: Mapping[str, str] = configuration_auto.CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
    if base.family not in known:
        raise ModelError(
            f"{base.origin}: Transformers knows no architecture {base.family!r}. {nearest(base.family, known)}"
        )
    settings = {key: value for key, value in base.config.items() if key not in ("model_type", "architectures")}
    return AutoConfig.for_model(base.family, **settings)
