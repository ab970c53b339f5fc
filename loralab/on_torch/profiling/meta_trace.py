"""A model of any architecture without numbers (PyTorch's device "meta"): its parameters, and what a step computes and holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.config.recipe import Recipe
from loralab.errors import ModelError, nearest
from loralab.models.pretrained import from_config
from loralab.on_torch.loading.classifier import label_losses
from loralab.on_torch.loading.load import quiet_transformers
from loralab.on_torch.models.heads import head_parameters
from loralab.on_torch.profiling.meter import Meter
from loralab.on_torch.training import loss
from loralab.on_torch.training.set_trainable import set_trainable

META = torch.device("meta")


class _Meter(Meter):
    """Answers what models ask of their masks, which have no numbers either: all is real, and nothing is packed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        return super().__torch_dispatch__(func, types, args, kwargs)


@dataclass(frozen=True)
class Traced:
    """What was found."""

    trainable: int
    total: int
    linear: int
    """Parameters of matrices, heads and embeddings apart: what could be quantised."""
    flops: int | None
    """Of one step; None where the class cannot run without numbers, for the reason in `failure`."""
    weights: int
    activations: int
    peak: int
    failure: str


def trace(recipe: Recipe, file: Path, rows: int, lengths: tuple[int, int], dtype: str, labels: int | None) -> Traced:
    """Builds the class that the config names and takes one step of it.

    Raises:
        ModelError: Transformers knows no such class.
    """
    model, kind = _model(file, labels)
    model = model.to(getattr(torch, dtype))
    fresh = head_parameters(model) if labels is not None else []
    total, linear = sum(p.numel() for p in model.parameters()), _linear(model)
    model, adapter = set_trainable(model, recipe, None, None, fresh)
    trained = adapter.parameters() if adapter else [p for p in model.parameters() if p.requires_grad]
    total = adapter.total if adapter else total
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    meter = _Meter([*model.parameters(), *model.buffers(), *trained])
    state = sum(p.numel() * 4 for p in trained) * 2 + sum(p.numel() * 4 for p in trained if p.element_size() < 4)
    flops, failure, held = None, "", 0
    try:
        with meter:
            value = _loss(model.train(), kind, rows, lengths)
            held = meter.live - weights
            if value.requires_grad:
                value.backward()
        flops = meter.flops
    except Exception as error:  # any class may fail in its own way
        failure = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    count = sum(p.numel() for p in trained)
    return Traced(count, total, linear, flops, weights, max(held, 0), meter.peak + state, failure)


def _model(file: Path, labels: int | None) -> tuple[nn.Module, str]:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )
    from transformers.models.auto import configuration_auto

    known = configuration_auto.CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
    raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if raw["model_type"] not in known:
        raise ModelError(
            f"{file}: Transformers knows no architecture {raw['model_type']!r}. {nearest(raw['model_type'], known)}"
        )
    config = AutoConfig.for_model(**raw)
    name = "classifier" if labels is not None else "encoder-decoder" if config.is_encoder_decoder else "decoder"
    kinds: dict[str, Any] = {
        "classifier": AutoModelForSequenceClassification,
        "encoder-decoder": AutoModelForSeq2SeqLM,
        "decoder": AutoModelForCausalLM,
    }
    if labels is not None:
        config.num_labels = labels
    try:
        with META, quiet_transformers(warnings=False):
            return from_config(kinds[name], config), name
    except ValueError as error:
        raise ModelError(
            f"{file} is of the architecture {raw['model_type']!r}, of which Transformers has no {name} to train with this recipe."
        ) from error


def _linear(model: nn.Module) -> int:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    found = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not output]
    return sum(m.weight.numel() for m in found)


def _loss(model: nn.Module, kind: str, rows: int, lengths: tuple[int, int]) -> Tensor:
    """The loss of a batch without padding."""
    source, target = lengths
    ids = torch.zeros(rows, source + (target if kind == "decoder" else 0), dtype=torch.long, device=META)
    labels = torch.zeros(rows, max(target, 1), dtype=torch.long, device=META)
    if kind == "classifier":
        return label_losses(model(input_ids=ids).logits.float(), labels[:, :1], False).sum()
    if kind == "encoder-decoder":
        logits = model(input_ids=ids, decoder_input_ids=labels).logits
        return loss.smoothed(loss.log_probabilities(logits.flatten(0, 1)), labels.flatten(), 0.0).sum()
    head = model.get_output_embeddings()  # type: ignore[operator]
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        caught.append(args[0])
        return (args[0][:, :0],)

    hook = head.register_forward_pre_hook(catch)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    states = caught[0][:, -target - 1 : -1].flatten(0, 1)
    frozen = None if head.weight.requires_grad or getattr(head, "bias", None) is not None else head.weight
    return loss.token_losses(states, head, frozen, labels.flatten()[: len(states)]).sum()
