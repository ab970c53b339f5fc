"""A recipe's model without numbers: its counts, and what its steps and its answers take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.files import EMBEDDING_PARTS, LINEAR_PARTS
from loralab.config.recipe import Recipe
from loralab.engine import BatchShape, ModelFacts, StepCost, StepSettings
from loralab.models import HEADS
from loralab.models.lookup import Base
from loralab.on_torch.adapters.attach import Adapter
from loralab.on_torch.adapters.base import base_parameters, plain_modules, size
from loralab.on_torch.models.causal import CausalFamily
from loralab.on_torch.models.classifier import label_losses
from loralab.on_torch.models.heads import head_parameters
from loralab.on_torch.models.registry import family_of
from loralab.on_torch.ops.linear import dense_shape
from loralab.on_torch.profiling.build import META, build
from loralab.on_torch.profiling.inference import answer, answered
from loralab.on_torch.profiling.meta_trace import Trace, tracing
from loralab.on_torch.quantization.quantize import load_settled, modules_to_quantize, quantization
from loralab.on_torch.training.forward import token_losses
from loralab.on_torch.training.frozen_prefix import FrozenEncoder, encoder_of
from loralab.on_torch.training.loss import CHUNK
from loralab.on_torch.training.set_trainable import set_trainable

FLOAT = 4  # bytes
KEPT = 8  # models of a plan that are built once: variants share bases and methods


@dataclass(frozen=True)
class _Request:
    """A recipe and its base, equal to others that make the same model and train the same of it."""

    recipe: Recipe = field(compare=False)
    base: Base = field(compare=False)
    key: str


def traced_model(recipe: Recipe, base: Base) -> TracedModel:
    """Returns the model of a recipe without numbers, built once for all recipes that need the same. See engine.trace."""
    training, spec = recipe.training, recipe.spec().model_dump_json() if recipe.training.method == "lora" else ""
    settings = (training.method, training.head, training.frozen_dropout, training.start_from)
    model = (
        recipe.model.dropout,
        recipe.model.quantize_except,
        recipe.evaluation.beams,
        recipe.evaluation.max_new_tokens,
    )
    return _build(_Request(recipe, base, f"{base.family} {base.config} {base} {settings} {model} {spec}"))


@lru_cache(maxsize=KEPT)
def _build(request: _Request) -> TracedModel:
    return TracedModel(request.recipe, request.base)


class TracedModel:
    """See engine.TracedModel."""

    def __init__(self, recipe: Recipe, base: Base) -> None:
        self.recipe, self.base = recipe, base
        self.prepared = cache(self._prepared)
        self._costs = cache(self._step_cost)
        self._inference_peaks = cache(self._inference_peak)

    def step_cost(self, settings: StepSettings, shapes: Sequence[BatchShape], first: bool = False) -> StepCost:
        """See engine.TracedModel. What was traced already is known."""
        return self._costs(replace(settings, accumulate=1), tuple(shapes), first)

    def _prepared(self, dtype: str, quantize: str | None, checkpointing: bool) -> tuple[nn.Module, Adapter | None]:
        """The model of these settings, made ready for the recipe's method."""
        training = self.recipe.training.model_copy(update={"gradient_checkpointing": checkpointing})
        recipe = self.recipe.model_copy(update={"training": training})
        kind = getattr(torch, dtype)
        model = build(self.base, kind, META)
        if how := quantization(quantize, recipe.model.quantize_except if quantize else ()):
            model = load_settled(model, kind, META, how)
        fresh = [] if self.base.brings_head else head_parameters(model)
        return set_trainable(model, recipe, None, None, fresh)

    @cached_property
    def facts(self) -> ModelFacts:
        model, adapter = self.prepared("float32", None, False)
        modules = plain_modules(model)
        packed = [modules[name] for name in modules_to_quantize(model)]
        return ModelFacts(
            trainable=sum(parameter.numel() for parameter in _trained(model, adapter)),
            total=size(model) if adapter is None else adapter.total,
            base_parameters=size(model),
            matrices=[dense_shape(each) for each in packed],
            saved={} if adapter is None else dict(_saved(adapter, modules)),
            causal=family_of(model).causal,
            positions=_positions(model),
        )

    def _step_cost(self, settings: StepSettings, shapes: tuple[BatchShape, ...], first: bool) -> StepCost:
        model, adapter = self.prepared(settings.dtype, settings.quantize, settings.checkpointing)
        trained = _trained(model, adapter)
        with tracing(Trace([], "cpu")):
            family_of(model).run_once_before_training(model)
        trace, weights = self._trace(model, adapter, settings)
        held, activations, alike = trace.live, 0, len(shapes) > 1 and len(set(shapes)) == 1
        with tracing(trace):
            moments = [] if first else _moments(trained)
            model.train()
            if alike:  # the last of them finds the gradients of the others
                for parameter in trained:
                    parameter.grad = torch.empty(parameter.shape, dtype=parameter.dtype, device=META)
            before = trace.live
            for shape in shapes[:1] if alike else shapes:
                loss = self._loss(model, trace, shape)
                activations = max(activations, trace.live - before)
                if loss.requires_grad:
                    loss.backward()
                del loss
                before = trace.live
            gradients = sum(trace.bytes_of(p.grad) for p in trained if p.grad is not None)
            if first:
                moments = _moments(trained)
            _widen_gradients(trained)
        return StepCost(
            flops=trace.flops * len(shapes) if alike else trace.flops,
            weights=weights,
            adapter=held - weights,
            gradients=gradients,
            optimizer=sum(map(trace.bytes_of, moments)),
            activations=activations,
            logits=_widest_logits(model, shapes),
            peak=trace.peak,
        )

    def _trace(self, model: nn.Module, adapter: Adapter | None, settings: StepSettings) -> tuple[Trace, int]:
        """(a trace that knows of base and adapter; the bytes of what is not an update)."""
        updates = [] if adapter is None else [p for update in adapter.updates.values() for p in update.parameters()]
        own = {id(parameter) for parameter in updates}
        held = [*base_parameters(model).values(), *model.parameters(), *model.buffers()]
        trace = Trace([each for each in held if id(each) not in own], settings.device)
        weights = trace.live
        trace.see(*updates)
        return trace, weights

    def _loss(self, model: nn.Module, trace: Trace, shape: BatchShape) -> Tensor:
        """Sum of a batch's losses; of a head that is trained alone, on stored states."""
        trace.shape = shape
        ids, mask = (_whole(shape.rows, shape.source) for _ in range(2))
        if self.base.labels is None:
            return _text_loss(model, shape, ids, mask)
        labels = _whole(shape.rows, 1)
        if self.trains_head_alone:
            encoder_of(model).eval()
            cut = FrozenEncoder(model)
            states = torch.empty(shape.rows, 1, cut.width, dtype=next(model.parameters()).dtype, device=META)
            return label_losses(cut.logits(states, ids, mask), labels).sum()
        return token_losses(model, ids, mask, labels).sum()

    def inference_peak(self, settings: StepSettings, shape: BatchShape) -> int:
        """See engine.TracedModel."""
        return self._inference_peaks(settings.dtype, settings.quantize, settings.device, shape)

    def _inference_peak(self, dtype: str, quantize: str | None, device: str, shape: BatchShape) -> int:
        model, adapter = self.prepared(dtype, quantize, False)
        settings = StepSettings(dtype, device, quantize=quantize)
        if self.base.labels is None:
            shape = answered(shape, self.recipe.evaluation)
        trace, _ = self._trace(model, adapter, settings)
        trace.shape = shape
        with tracing(trace), torch.no_grad():
            answer(model.eval(), shape, self.recipe.evaluation.beams)
        return trace.peak

    def held_bytes(self, settings: StepSettings) -> int:
        """See engine.TracedModel."""
        model, adapter = self.prepared(settings.dtype, settings.quantize, settings.checkpointing)
        trace, _ = self._trace(model, adapter, settings)
        return trace.live + sum(map(trace.bytes_of, _moments(_trained(model, adapter))))

    @property
    def trains_head_alone(self) -> bool:
        """Tells whether steps run on stored states of a frozen encoder (training/feature_cache.py)."""
        training = self.recipe.training
        return training.method == "head" and not training.frozen_dropout and self.base.family in HEADS

    def forward_flops(self, settings: StepSettings, shape: BatchShape) -> int:
        """See engine.TracedModel."""
        model, adapter = self.prepared(settings.dtype, settings.quantize, settings.checkpointing)
        trace, _ = self._trace(model, adapter, settings)
        trace.shape = shape
        with tracing(trace), torch.no_grad():
            ids, mask = (_whole(shape.rows, shape.source) for _ in range(2))
            token_losses(model.eval(), ids, mask, _whole(shape.rows, max(shape.target, 1)))
        return trace.flops


def _whole(rows: int, width: int) -> Tensor:
    """Integers without numbers."""
    return torch.empty(rows, width, dtype=torch.long, device=META)


def _text_loss(model: nn.Module, shape: BatchShape, ids: Tensor, mask: Tensor) -> Tensor:
    """Returns the loss of a model that writes text; a decoder's source and target are joined here, as their length needs no numbers."""
    family = family_of(model)
    if not isinstance(family, CausalFamily):
        return family.token_losses(model, ids, mask, _whole(shape.rows, shape.target)).sum()
    del ids, mask
    length = shape.source + shape.target
    ids, mask, following = (_whole(shape.rows, length) for _ in range(3))
    if shape.packed:
        return family.token_losses(model, ids, mask, following, documents=mask).sum()
    return family.joined_losses(model, ids, mask, following).sum()


def _trained(model: nn.Module, adapter: Adapter | None) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad] if adapter is None else adapter.parameters()


def _saved(adapter: Adapter, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor in the adapter's file (adapters/files.py)."""
    for target, update in adapter.updates.items():
        parts = EMBEDDING_PARTS if isinstance(modules[target], nn.Embedding) else LINEAR_PARTS
        yield from ((f"{target}.{parts[part]}", tuple(p.shape)) for part, p in update.named_parameters())
    yield from ((name, tuple(parameter.shape)) for name, parameter in adapter.tuned.items())


def _moments(trained: Sequence[Tensor]) -> list[Tensor]:
    """Returns what the optimizer holds: of each parameter two moments in fp32 and a count, and an fp32 copy of what is not in fp32."""
    held = []
    for parameter in trained:
        shapes = [parameter.shape, parameter.shape, (), *([parameter.shape] if parameter.itemsize < FLOAT else [])]
        held += [torch.empty(shape, dtype=torch.float32, device=META) for shape in shapes]
    return held


def _widen_gradients(trained: Sequence[Tensor]) -> None:
    """Gradients that are not in fp32 become so, one after the other, as in the optimizer's step."""
    wide = []
    for parameter in trained:
        if parameter.grad is not None and parameter.itemsize < FLOAT:
            wide.append(parameter.grad.float())
        parameter.grad = None


def _widest_logits(model: nn.Module, shapes: Sequence[BatchShape]) -> int:
    """Bytes of the logits that are there at one time."""
    tokens, family = max(shape.target_tokens for shape in shapes), family_of(model)
    width: Any = model.config.num_labels if family.classifies else model.config.vocab_size  # type: ignore[union-attr]
    return (min(tokens, CHUNK) if family.logits_in_chunks else tokens) * int(width) * FLOAT


def _positions(model: nn.Module) -> int | None:
    """Tokens of the longest row of a classifier; None for any other, and where positions are not learnt."""
    if not family_of(model).classifies:
        return None
    tables = [m for name, m in plain_modules(model).items() if name.endswith("position_embeddings")]
    return min((table.num_embeddings for table in tables if isinstance(table, nn.Embedding)), default=None)
