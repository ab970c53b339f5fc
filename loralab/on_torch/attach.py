"""`attach`: puts LoRA on any PyTorch model, in place, and returns the Adapter that trains, saves and merges it.

Each selected module is replaced by an `Adapted` one that holds it. Parameters that an adapter trains whole (biases,
norms, a task head) are copies that stand in the base's place while the adapter is enabled; the base's own parameters
are never written to.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab import adapter as files
from loralab.adapter import AdapterFiles
from loralab.errors import AdapterError, TargetError
from loralab.families import ATTENTION_RULES, DEFAULT_RULES
from loralab.fingerprint import Fingerprint, take
from loralab.on_torch.describe import adapter_table
from loralab.on_torch.heads import head_modules
from loralab.on_torch.linear import LINEAR, WRAPPABLE, dense_weight, write_dense_weight
from loralab.on_torch.lora import Adapted, DropoutMasks, Update, wrap
from loralab.spec import LoRASpec
from loralab.targets import Module, check_patterns, resolve, select


@dataclass
class Attachment:
    """What loralab keeps on a model: its adapters, the modules that it wrapped, and the base parameters that adapters replace."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    wrapped: dict[str, Adapted] = field(default_factory=dict)
    masks: dict[str, DropoutMasks] = field(default_factory=dict)
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    active: str | None = None


ATTRIBUTE = "_loralab"


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
    targets = _targets(model, spec, modules)
    tuned_names = _tuned_names(spec, modules, targets)
    return install(model, attachment, spec, name, targets, tuned_names)


def attachment_for(model: nn.Module, name: str) -> Attachment:
    """What the model has attached already, if there is room for an adapter of this name."""
    if not name or "." in name:
        raise AdapterError(f"An adapter's name is a word without dots, not {name!r}.")
    attachment: Attachment = getattr(model, ATTRIBUTE, None) or Attachment()
    if name in attachment.adapters:
        raise AdapterError(f"The model has an adapter named {name!r} already; give another name to add a second one.")
    return attachment


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base by name, as if nothing were attached."""
    modules: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, Adapted):
            inside = (*inside, name + ".")
            module = module.base
        modules[name] = module
    return modules


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the base by name, as if nothing were attached."""
    attachment: Attachment = getattr(model, ATTRIBUTE, None) or Attachment()
    found = {
        f"{name}.{leaf}".lstrip("."): parameter
        for name, module in plain_modules(model).items()
        for leaf, parameter in module.named_parameters(recurse=False)
    }
    return {name: attachment.originals.get(name, parameter) for name, parameter in found.items()}


def _as_stored(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The matrix as the files have it: of our GPT-2 it was turned on the way in."""
    return parameter.T if name.endswith(getattr(model, "turned", ())) else parameter


def model_type(model: nn.Module) -> str:
    """Hugging Face's name of the architecture."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def fingerprint(model: nn.Module, names: Iterable[str] | None = None) -> Fingerprint:
    """The fingerprint of the model's base; of the parameters of these names alone, as far as the base has them."""
    parameters = {name: _as_stored(model, name, parameter) for name, parameter in base_parameters(model).items()}
    parameters |= {alias: parameters[name] for alias, name in getattr(model, "aliases", {}).items()}
    if names is not None:
        parameters = {name: parameters[name] for name in names if name in parameters}

    def read(name: str, positions: np.ndarray) -> list[float]:
        flat = parameters[name].detach().reshape(-1)
        values: list[float] = flat[torch.from_numpy(positions).to(flat.device)].float().tolist()
        return values

    return take({name: tuple(parameter.shape) for name, parameter in parameters.items()}, read)


# What the spec selects


def _targets(model: nn.Module, spec: LoRASpec, modules: dict[str, nn.Module]) -> list[str]:
    rules = spec.rules if spec.rules is not None else _default_rules(model, modules)
    if not rules:
        raise TargetError(
            f"loralab has no default rules for {type(model).__name__}: say which modules to adapt, such as rules=['all-linear']."
        )
    targets = resolve(rules, _describe(model, modules))
    check_patterns(spec.rank_pattern, targets, "rank_pattern")
    check_patterns(spec.alpha_pattern, targets, "alpha_pattern")
    _refuse_tied(model, modules, targets)
    if spec.use_dora and (embeddings := [name for name in targets if isinstance(modules[name], nn.Embedding)]):
        raise TargetError(f"use_dora adapts linear modules only; {embeddings[0]!r} is an Embedding.")
    return targets


def _default_rules(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, ...] | None:
    """The family's, or those of attention in a model of Transformers'."""
    kind = model_type(model)
    if not kind or kind in DEFAULT_RULES:
        return DEFAULT_RULES.get(kind)
    leaves = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, WRAPPABLE)}
    return next((rules for rules in ATTENTION_RULES if leaves.issuperset(rules)), None)


def _describe(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[Module]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = head_modules(model)
    for name, module in modules.items():
        if name:
            wrappable, linear = isinstance(module, WRAPPABLE), isinstance(module, LINEAR)
            yield Module(
                name, type(module).__name__, wrappable, linear, head=module is output or name.startswith(heads)
            )


def _refuse_tied(model: nn.Module, modules: dict[str, nn.Module], targets: list[str]) -> None:
    """An update of a weight that two places share would reach only one of them, and could not be merged."""
    uses = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
    functional = getattr(model, "tied_modules", ())
    for name in targets:
        if name in functional or uses[id(modules[name].weight)] > 1:
            raise TargetError(
                f"{name!r} shares its weight with another module (input and output embedding are tied): LoRA cannot adapt it."
            )


def _tuned_names(spec: LoRASpec, modules: dict[str, nn.Module], targets: list[str]) -> list[str]:
    """The base parameters that are trained whole."""
    names = [
        (f"{name}.{leaf}".lstrip("."), p)
        for name, m in modules.items()
        for leaf, p in m.named_parameters(recurse=False)
    ]
    chosen = set()
    if spec.modules_to_save:
        roots = select(spec.modules_to_save, [name for name in modules if name], "modules_to_save")
        chosen |= {name for name, _ in names if name.startswith(tuple(root + "." for root in roots))}
    if spec.tune_vectors:
        chosen |= {name for name, parameter in names if parameter.ndim == 1}
    if spec.bias != "none":
        biases = {name for name, _ in names if name.rpartition(".")[2] == "bias"}
        chosen |= {b for b in biases if spec.bias == "all" or b.rpartition(".")[0] in targets}
        if not chosen & biases:
            raise TargetError(f"bias: {spec.bias} trains nothing: the modules that it means have no bias.")
    if clash := [name for name in chosen if name.endswith(".weight") and name.removesuffix(".weight") in targets]:
        raise TargetError(f"{clash[0]!r} is selected both for LoRA and to be trained whole.")
    return [name for name, _ in names if name in chosen]


# Putting it there


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
        adapted.updates[name] = Update(spec, target, adapted.base)
    tuned = {parameter: nn.Parameter(base[parameter].detach().clone()) for parameter in tuned_names}
    attachment.originals |= {parameter: base[parameter] for parameter in tuned_names}
    updates = {target: _update(attachment.wrapped[target], name) for target in targets}
    adapter = attachment.adapters[name] = Adapter(model, spec, name, updates, tuned)
    adapter.enable()
    return adapter


def _wrap(model: nn.Module, attachment: Attachment, target: str) -> Adapted:
    base, parent = model.get_submodule(target), target.rpartition(".")[0]
    adapted = wrap(base, attachment.masks.setdefault(parent, DropoutMasks())).train(base.training)
    model.set_submodule(target, adapted)
    attachment.wrapped[target] = adapted
    return adapted


def _update(adapted: Adapted, name: str) -> Update:
    update = adapted.updates[name]
    assert isinstance(update, Update)
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
        module.register_parameter(leaf, tuned.get(parameter, original))


class Adapter:
    """One adapter on one model. `print(adapter)` shows what it adapts."""

    def __init__(
        self, model: nn.Module, spec: LoRASpec, name: str, updates: dict[str, Update], tuned: dict[str, nn.Parameter]
    ) -> None:
        self.model, self.spec, self.name = model, spec, name
        self.updates, self.tuned = updates, tuned
        self.card: dict[str, Any] = {}

    def parameters(self) -> list[nn.Parameter]:
        """What is trained; what requires no gradient is saved, but left as it is."""
        own = [p for update in self.updates.values() for p in update.parameters()] + list(self.tuned.values())
        return [parameter for parameter in own if parameter.requires_grad]

    @property
    def trainable(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def total(self) -> int:
        """How many numbers the base and this adapter's updates hold together."""
        base = {id(p): p.numel() for p in base_parameters(self.model).values()}
        return sum(base.values()) + sum(p.numel() for update in self.updates.values() for p in update.parameters())

    def enable(self) -> None:
        """Makes this the model's active adapter."""
        _activate(self.model, self._attachment(), self.name)

    def disable(self) -> None:
        """Gives the base's outputs back, exactly."""
        attachment = self._attachment()
        if attachment.active == self.name:
            _activate(self.model, attachment, None)

    def merge(self) -> nn.Module:
        """A new, plain model that computes in one product what base and adapter compute together; nothing here is changed."""
        self._attachment()
        model = copy.deepcopy(self.model)
        attachment: Attachment = getattr(model, ATTRIBUTE)
        _activate(model, attachment, self.name)
        for target, adapted in attachment.wrapped.items():
            if (update := adapted.update()) is not None:
                write_dense_weight(adapted.base, update.merged(dense_weight(adapted.base)))
            model.set_submodule(target, adapted.base)
        delattr(model, ATTRIBUTE)
        return model.requires_grad_(True)

    def save(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Writes PEFT's folder with our `loralab.json`, and the tokenizer beside it where one is given."""
        self._attachment()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder, self.to_files())
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

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
            tuned={name: _array(parameter) for name, parameter in self.tuned.items()},
            embeddings=frozenset(target for target in self.updates if isinstance(modules[target], nn.Embedding)),
            transposed=any(
                isinstance(modules[target], Conv1D) or f"{target}.weight".endswith(getattr(self.model, "turned", ()))
                for target in self.updates
            ),
            base_name=base_name,
            task_type=task_type(self.model, self.tuned),
            card={"format": 1, "base": {"name": base_name, "fingerprint": self._fingerprint()}, **self.card},
        )

    def _fingerprint(self) -> Fingerprint:
        """Of what the adapter does not replace: a classifier's head may be random in the base."""
        return fingerprint(self.model, [name for name in base_parameters(self.model) if name not in self.tuned])

    def __str__(self) -> str:
        linear = sum(isinstance(module, LINEAR) for module in plain_modules(self.model).values())
        tuned = {} if self.spec.disabled else self.tuned
        return adapter_table(self.spec, self.updates, tuned, linear, self.trainable, self.total)

    def _attachment(self) -> Attachment:
        attachment: Attachment | None = getattr(self.model, ATTRIBUTE, None)
        if attachment is None or attachment.adapters.get(self.name) is not self:
            raise AdapterError(
                "LoRASpec(disabled=True) trains the whole model: there is no adapter to switch, save or merge. Save the model."
            )
        return attachment


def task_type(model: nn.Module, tuned: Iterable[str]) -> str | None:
    """PEFT's name for what the model does. Under SEQ_CLS it expects the head in the file, so without the head it is None."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    if ours := getattr(model, "peft_task", None):
        return str(ours)
    kind = type(model).__name__
    if kind.endswith("ForSequenceClassification"):
        return "SEQ_CLS" if any(re.fullmatch(r"(classifier|score)\.(.*\.)?weight", name) for name in tuned) else None
    return "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array
