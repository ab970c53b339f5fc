"""Names that other tools give to settings, and settings that were given without their block: what to type instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from loralab.config.recipe import Recipe

OTHER_NAMES: Mapping[str, str] = {
    "lr": "optimizer.learning_rate",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.rules",
    "lora_target_modules": "lora.rules",
    "init_lora_weights": "lora.init",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "micro_batch_size": "training.batch_size",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulate",
    "grad_accum": "training.accumulate",
    "save_steps": "training.save_every",
    "report_to": "training.trackers",
    "label_smoothing_factor": "training.label_smoothing",
    "lr_scheduler_type": "optimizer.schedule",
    "scheduler": "optimizer.schedule",
    "max_length": "data.max_source_length",
    "max_seq_length": "data.max_source_length",
    "cutoff_len": "data.max_source_length",
    "max_input_length": "data.max_source_length",
    "dataset": "data.name",
    "dataset_name": "data.name",
    "train_file": "data.name",
    "text_column": "data.source",
    "summary_column": "data.target",
    "source_prefix": "data.prompt",
    "base_model": "model.name",
    "model_id": "model.name",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype=bfloat16",
    "load_in_8bit": "model.quantize=int8",
    "load_in_4bit": "model.quantize=nf4",
    "num_beams": "evaluation.beams",
    "do_sample": "evaluation.sample",
    "eval_steps": "validation.every",
    "early_stopping_patience": "validation.patience",
    "metric_for_best_model": "validation.metric",
}
"""Another tool's name, such as PEFT's or the Trainer's -> ours."""
OPTIONS: Mapping[str, str] = {"output_dir": "--out", "output": "--out", "resume_from_checkpoint": "--resume"}
"""Another tool's name for what is an option of a command here."""


def suggestion(key: str) -> str | None:
    """Returns what to type in the place of an unknown key: our name for it, or the key with its block.

    Args:
        key: as it was given, dotted or not, with _ or - between words.
    """
    last = key.strip().strip("-").replace("-", "_").rpartition(".")[2].lower()
    if last in OTHER_NAMES or last in OPTIONS:
        return OTHER_NAMES.get(last) or OPTIONS[last]
    return next((known for known in _keys(Recipe) if known.rpartition(".")[2] == last and known != key), None)


def _keys(model: Any, block: str = "") -> Iterator[str]:
    """Every dotted key of a recipe's blocks."""
    for name, field in model.model_fields.items():
        held = field.annotation
        if isinstance(held, type) and issubclass(held, BaseModel):
            yield from _keys(held, f"{block}{name}.")
        elif block:
            yield f"{block}{name}"
