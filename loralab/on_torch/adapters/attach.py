"""`attach`: puts LoRA on any PyTorch model, in place, and returns the Adapter that trains, saves and merges it.

Each selected module is replaced by an `Adapted` one that holds it. Parameters that an adapter trains whole (biases,
norms, a task head) are copies that stand in the base's place while the adapter is enabled; the base's own parameters
are never written to.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loralab.adapters import files
from loralab.adapters.files import AdapterFiles
from loralab.adapters.target_modules import refuse_shared
from loralab.atomic_files import whole_folder
from loralab.config.lora import LoRASpec
from loralab.errors import AdapterError
from loralab.on_torch.adapters.base import (
    ATTRIBUTE,
    base_parameters,
    base_shapes,
    fingerprint,
    follow,
    in_files,
    is_turned,
    plain_modules,
    quantization_of,
    shared_parameters,
    size,
)
from loralab.on_torch.adapters.describe import adapter_table
from loralab.on_torch.adapters.lora import AdaptedModule, DropoutMasks, LoRAWeights, wrap
from loralab.on_torch.adapters.selection import selected, trained_whole
from loralab.on_torch.models.registry import find_family
from loralab.on_torch.ops.linear import dense_weight, is_linear, is_transposed, write_dense_weight


@dataclass
class Attachment:
    """State that loralab keeps on a model: its adapters, the modules that it wrapped, and the base parameters that adapters replace."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    wrapped: dict[str, AdaptedModule] = field(default_factory=dict)
    masks: dict[str, DropoutMasks] = field(default_factory=dict)
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    active: str | None = None


def attach(model: nn.Module, spec: LoRASpec, name: str = "default") -> Adapter:
    """Adds an adapter to the model, in place, and enables it; everything else of the model is frozen.

    Args:
        model: ours, Transformers', or any module that holds Linear, Conv1D or Embedding modules.
        name: several adapters may sit on one model; one at a time is enabled.

    Raises:
        TargetError: a rule or pattern selects nothing, or something that LoRA cannot wrap.
        AdapterError: there is an adapter of this name already.
    """
    attachment = attachment_for(model, name)
    if spec.disabled:
        model.requires_grad_(True)
        return Adapter(model, spec, name, {}, dict(model.named_parameters()))
    modules = plain_modules(model)
    targets = selected(model, spec, modules)
    whole = trained_whole(spec, modules, targets)
    refuse_shared(targets, whole, shared_parameters(model, modules))
    return install(model, attachment, spec, name, targets, whole)


def attachment_for(model: nn.Module, name: str) -> Attachment:
    """Returns what the model has attached already, if there is room for an adapter of this name."""
    if not name or "." in name:
        raise AdapterError(f"An adapter's name is a word without dots, not {name!r}.")
    attachment: Attachment = getattr(model, ATTRIBUTE, None) or Attachment()
    if name in attachment.adapters:
        raise AdapterError(f"The model has an adapter named {name!r} already; give another name to add a second one.")
    return attachment


def install(
    model: nn.Module, attachment: Attachment, spec: LoRASpec, name: str, targets: list[str], tuned_names: list[str]
) -> Adapter:
    """Puts an adapter on exactly these modules and parameters, and enables it."""
    base = base_parameters(model)
    if not attachment.adapters:
        model.requires_grad_(False)
        setattr(model, ATTRIBUTE, attachment)
    for target in targets:
        adapted = attachment.wrapped.get(target) or _wrap(model, attachment, target)
        adapted.updates[name] = LoRAWeights(spec, target, adapted.base)
    tuned = {parameter: nn.Parameter(base[parameter].detach().clone()) for parameter in tuned_names}
    attachment.originals |= {parameter: base[parameter] for parameter in tuned_names}
    updates = {target: _update(attachment.wrapped[target], name) for target in targets}
    adapter = attachment.adapters[name] = Adapter(model, spec, name, updates, tuned)
    adapter.enable()
    return adapter


def _wrap(model: nn.Module, attachment: Attachment, target: str) -> AdaptedModule:
    base, parent = model.get_submodule(target), target.rpartition(".")[0]
    adapted = wrap(base, attachment.masks.setdefault(parent, DropoutMasks())).train(base.training)
    model.set_submodule(target, adapted)
    attachment.wrapped[target] = adapted
    return adapted


def _update(adapted: AdaptedModule, name: str) -> LoRAWeights:
    update = adapted.updates[name]
    assert isinstance(update, LoRAWeights)
    return update


def _activate(model: nn.Module, attachment: Attachment, name: str | None) -> None:
    """Switches to the adapter of this name, or to none: which updates apply, and which parameters stand in the model."""
    attachment.active = name
    for adapted in attachment.wrapped.values():
        adapted.active = name if name is not None and name in adapted.updates else None
    tuned = attachment.adapters[name].tuned if name else {}
    for parameter, original in attachment.originals.items():
        path, _, leaf = parameter.rpartition(".")
        module = attachment.wrapped[path].base if path in attachment.wrapped else model.get_submodule(path)
        standing = module.get_parameter(leaf)
        module.register_parameter(leaf, follow(tuned.get(parameter, original), standing))


class Adapter:
    """One adapter on one model. `print(adapter)` shows what it adapts."""

    def __init__(
        self,
        model: nn.Module,
        spec: LoRASpec,
        name: str,
        updates: dict[str, LoRAWeights],
        tuned: dict[str, nn.Parameter],
    ) -> None:
        self.model, self.spec, self.name = model, spec, name
        self.updates, self.tuned = updates, tuned
        self.card: dict[str, Any] = {}
        self.note: str | None = None
        """How this base is stored otherwise than the one that the adapter was trained on."""

    def parameters(self) -> list[nn.Parameter]:
        """Returns what is trained; what requires no gradient is saved, but left as it is."""
        own = [p for update in self.updates.values() for p in update.parameters()] + list(self.tuned.values())
        return [parameter for parameter in own if parameter.requires_grad]

    @property
    def trainable(self) -> int:
        """Counts how many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def total(self) -> int:
        """Counts how many numbers the base and this adapter's updates hold together."""
        return size(self.model) + sum(p.numel() for update in self.updates.values() for p in update.parameters())

    def enable(self) -> None:
        """Makes this the model's active adapter."""
        _activate(self.model, self._attachment(), self.name)

    def disable(self) -> None:
        """Gives the base's outputs back, exactly."""
        attachment = self._attachment()
        if attachment.active == self.name:
            _activate(self.model, attachment, None)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Gives the base's outputs back, exactly, while it holds: `with adapter.disabled(): …`. What was active is so afterwards."""
        attachment = self._attachment()
        before = attachment.active
        self.disable()
        try:
            yield
        finally:
            if attachment.active != before:
                _activate(self.model, attachment, before)

    def unload(self) -> nn.Module:
        """Takes this adapter off its model and returns the model. The last one leaves the model as it was before `attach`.

        The adapter cannot be used afterwards; save it before.
        """
        attachment = self._attachment()
        self.disable()
        del attachment.adapters[self.name]
        for adapted in attachment.wrapped.values():
            if self.name in adapted.updates:
                del adapted.updates[self.name]
        for target in [target for target, adapted in attachment.wrapped.items() if not adapted.updates]:
            self.model.set_submodule(target, attachment.wrapped.pop(target).base)
        if not attachment.adapters:
            delattr(self.model, ATTRIBUTE)
            self.model.requires_grad_(True)
        return self.model

    def merge(self) -> nn.Module:
        """Returns a new, plain model that computes in one product what base and adapter compute together; nothing here is changed.

        Of a packed base the original weights are read again: nothing is merged into rounded ones.

        Raises:
            AdapterError: a weight of the adapter is NaN or infinite.
        """
        self._attachment()
        self._check_finite()
        if quantization_of(self.model) is not None:
            held = next(self.model.parameters())
            return self._onto(self.model.original(held.dtype, held.device)).merge()  # type: ignore[operator]
        model = copy.deepcopy(self.model)
        attachment: Attachment = getattr(model, ATTRIBUTE)
        _activate(model, attachment, self.name)
        for target, adapted in attachment.wrapped.items():
            if (update := adapted.update()) is not None:
                write_dense_weight(adapted.base, update.merged(dense_weight(adapted.base)))
            model.set_submodule(target, adapted.base)
        delattr(model, ATTRIBUTE)
        return model.requires_grad_(True)

    def _check_finite(self) -> None:
        named = {f"{part} of {target}": p for target, u in self.updates.items() for part, p in u.named_parameters()}
        files.check_finite({name: bool(p.isfinite().all()) for name, p in (named | self.tuned).items()}, "The adapter")

    def _onto(self, model: nn.Module) -> Adapter:
        """Returns the same adapter on another copy of the base."""
        attachment = attachment_for(model, self.name)
        other = install(model, attachment, self.spec, self.name, list(self.updates), list(self.tuned))
        with torch.no_grad():
            for target, update in self.updates.items():
                other.updates[target].load_state_dict(update.state_dict())
            for name, parameter in self.tuned.items():
                other.tuned[name].copy_(parameter)
        return other

    def save(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Writes PEFT's folder with our `loralab.json`, and the tokenizer beside it where one is given."""
        self._attachment()
        content = self.to_files()
        with whole_folder(Path(folder)) as part:
            files.write_adapter(part, content)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)

    def to_files(self) -> AdapterFiles:
        """This adapter as arrays."""
        modules = plain_modules(self.model)
        base_name = str(getattr(self.model, "name_or_path", "") or "") or None
        return AdapterFiles(
            spec=self.spec,
            updates={
                target: {part: _array(p) for part, p in update.named_parameters()}
                for target, update in self.updates.items()
            },
            tuned={name: _array(in_files(self.model, name, parameter)) for name, parameter in self.tuned.items()},
            embeddings=frozenset(target for target in self.updates if isinstance(modules[target], nn.Embedding)),
            transposed=any(is_transposed(modules[t]) or is_turned(self.model, f"{t}.weight") for t in self.updates),
            base_name=base_name,
            task_type=task_type(self.model, self.tuned),
            card={"base": {"name": base_name, **self._about_base()}, **self.card},
        )

    def _about_base(self) -> dict[str, Any]:
        """Returns the base's storage, and the fingerprint of what the adapter does not replace: a classifier's head may be random."""
        own = [name for name in base_shapes(self.model) if name not in self.tuned]
        return {"quantize": quantization_of(self.model), "fingerprint": fingerprint(self.model, own)}

    def __str__(self) -> str:
        linear = sum(is_linear(module) for module in plain_modules(self.model).values())
        tuned = {} if self.spec.disabled else self.tuned
        table = adapter_table(self.spec, self.updates, tuned, linear, self.trainable, self.total)
        return f"{table}\n{self.note}" if self.note else table

    def _attachment(self) -> Attachment:
        attachment: Attachment | None = getattr(self.model, ATTRIBUTE, None)
        if attachment is None or attachment.adapters.get(self.name) is not self:
            if self.spec.disabled:
                raise AdapterError(
                    "LoRASpec(disabled=True) trains the whole model: there is no adapter to switch, save or merge. Save the model."
                )
            raise AdapterError(f"The adapter {self.name!r} has been taken off its model. Attach or load it again.")
        return attachment


def task_type(model: nn.Module, tuned: Iterable[str]) -> str | None:
    """PEFT's name for what the model does. Under SEQ_CLS it expects the whole head in the file, so without it it is None."""
    family = find_family(model)
    task = None if family is None else family.peft_task(model)
    if task == "SEQ_CLS":
        head = {name for name in base_parameters(model) if re.match(r"((pre_)?classifier|score)\.", name)}
        return task if head and head <= set(tuned) else None
    return task


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array
