"""PEFT's `adapter_config.json` as a LoRASpec, or why it cannot be one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loralab.config.lora import LoRASpec
from loralab.errors import AdapterError, invalid_settings

# PEFT's settings that change what an adapter computes and that we do not compute, with the value that leaves them out.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_qalora": (False, None), "use_bdlora": (False, None), "lora_bias": (False, None), "trainable_token_indices": (None,),
    "target_parameters": (None, []), "layer_replication": (None,), "alora_invocation_tokens": (None,), "megatron_config": (None,),
    "arrow_config": (None,), "kasa_config": (None,), "monteclora_config": (None,), "velora_config": (None,),
}  # fmt: skip
NO_MODULES = "dummy-target-modules"  # PEFT's word for an adapter that trains modules whole and wraps none
NARROWING = ("layers_to_transform", "exclude_modules")  # with these, target_modules selects more than was adapted
# Initialisations that also change the base's weights: their adapters only fit that changed base.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def read_settings(config: Mapping[str, Any], folder: Path) -> LoRASpec:
    """The spec of a config.

    Raises:
        AdapterError: it is no LoRA's, uses something that we do not compute, or has a value that a LoRASpec cannot take.
    """
    _refuse_unsupported(config, folder)
    try:
        return _spec(config)
    except ValidationError as error:
        raise AdapterError(f"{folder}: adapter_config.json cannot be a LoRASpec: {invalid_settings(error)}.") from error


def _refuse_unsupported(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} is a PEFT adapter of type {config.get('peft_type')!r}; only LORA can be loaded.")
    for key, neutral in UNSUPPORTED.items():
        if key in config and config[key] not in neutral:
            raise AdapterError(f"{folder} uses PEFT's {key} = {config[key]!r}, which loralab does not compute.")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGES_BASE):
        raise AdapterError(
            f"{folder} was started with {start!r}, which changes the base's weights too, so it fits no published base. "
            "Save it from PEFT with path_initial_model_for_weight_conversion."
        )


def _spec(config: Mapping[str, Any]) -> LoRASpec:
    targets = () if config.get("target_modules") == NO_MODULES else config.get("target_modules")
    return LoRASpec.model_validate(
        {
            "rank": config.get("r", 8),
            "alpha": config.get("lora_alpha", 8),
            "rules": f"re:{targets}" if isinstance(targets, str) else targets or (),
            "dropout": config.get("lora_dropout", 0.0),
            "bias": config.get("bias", "none"),
            "modules_to_save": config.get("modules_to_save") or (),
            "rank_pattern": config.get("rank_pattern") or {},
            "alpha_pattern": config.get("alpha_pattern") or {},
            "use_rslora": bool(config.get("use_rslora")),
            "use_dora": bool(config.get("use_dora")),
            "init": "gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        }
    )
