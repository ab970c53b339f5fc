"""Selection by a LoRASpec in a model: the modules that get an update, and the parameters that are trained whole; and what it
must not select."""

from __future__ import annotations

from torch import nn

from loralab.adapters.target_modules import check_patterns, resolve, select, tuned_names
from loralab.config.lora import LoRASpec
from loralab.errors import TargetError
from loralab.models import ATTENTION_RULES, DEFAULT_RULES
from loralab.on_torch.adapters.base import describe_modules, model_type
from loralab.on_torch.models.registry import find_family
from loralab.on_torch.ops.linear import QuantizedLinear, is_wrappable


def selected(model: nn.Module, spec: LoRASpec, modules: dict[str, nn.Module]) -> list[str]:
    """The names of the modules that get an update; `modules` are the model's, without adapters.

    Raises:
        TargetError: a rule or pattern selects nothing, or something that LoRA cannot wrap.
    """
    rules = spec.rules if spec.rules is not None else _default_rules(model, modules)
    if not rules:
        raise TargetError(
            f"loralab has no default rules for {type(model).__name__}: say which modules to adapt, such as rules=['all-linear']."
        )
    targets = resolve(rules, describe_modules(model, modules))
    check_patterns(spec.rank_pattern, targets, "rank_pattern")
    check_patterns(spec.alpha_pattern, targets, "alpha_pattern")
    return targets


def _default_rules(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, ...] | None:
    """The family's, or those of attention in a model of Transformers'."""
    family, kind = find_family(model), model_type(model)
    if family is not None and family.default_rules:
        return family.default_rules
    if not kind or kind in DEFAULT_RULES:
        return DEFAULT_RULES.get(kind)
    leaves = {name.rpartition(".")[2] for name, module in modules.items() if is_wrappable(module)}
    return next((rules for rules in ATTENTION_RULES if leaves.issuperset(rules)), None)


def trained_whole(spec: LoRASpec, modules: dict[str, nn.Module], targets: list[str]) -> list[str]:
    """The names of the base's parameters that are trained whole: biases, vectors, modules_to_save."""
    parameters = {
        f"{name}.{leaf}".lstrip("."): p.ndim
        for name, m in modules.items()
        for leaf, p in m.named_parameters(recurse=False)
    }
    names = [name for name in modules if name]
    if spec.modules_to_save:
        _refuse_packed(modules, select(spec.modules_to_save, names, "modules_to_save"))
    return tuned_names(spec, names, parameters, targets)


def _refuse_packed(modules: dict[str, nn.Module], roots: list[str]) -> None:
    """Packed weights cannot be trained."""
    inside = tuple(f"{root}." for root in roots)
    for name, module in modules.items():
        if isinstance(module, QuantizedLinear) and f"{name}.".startswith(inside):
            raise TargetError(
                f"modules_to_save trains {name!r} whole, which is stored as {module.kind} and cannot be. "
                "Leave it as it is with quantize_except, or give it LoRA."
            )
