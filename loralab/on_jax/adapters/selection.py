"""Selection by a LoRASpec in a tree of weights: those that get an update, and those that are trained whole."""

from __future__ import annotations

from loralab.adapters.target_modules import check_patterns, resolve, select
from loralab.config.lora import LoRASpec
from loralab.errors import TargetError
from loralab.on_jax.adapters.weights import Weight, modules, refuse_unsaid


def selected(spec: LoRASpec, weights: list[Weight]) -> list[str]:
    """The names of the modules that get an update.

    Raises:
        TargetError: a rule or pattern selects nothing, or something that LoRA cannot adapt.
    """
    if not spec.rules:
        raise TargetError("A function has no default rules: say which weights to adapt, such as rules=['all-linear'].")
    refuse_unsaid(spec.rules, weights)
    targets = resolve(spec.rules, modules(weights), "matrices")
    names = [weight.module for weight in weights]
    if twice := [target for target in targets if names.count(target) > 1]:
        raise TargetError(f"Two weights are called {twice[0]!r} where kernel, weight and embedding are left out.")
    check_patterns(spec.rank_pattern, targets, "rank_pattern")
    check_patterns(spec.alpha_pattern, targets, "alpha_pattern")
    if spec.use_dora and (tables := [w.module for w in weights if w.module in targets and w.embedding]):
        raise TargetError(f"use_dora adapts linear maps only; {tables[0]!r} is an embedding.")
    return targets


def trained_whole(spec: LoRASpec, weights: list[Weight], targets: list[str]) -> set[str]:
    """Paths of what is trained whole."""
    chosen = _chosen_whole(spec, weights, targets)
    paths = [*targets, *(weight.path for weight in weights if weight.path in chosen)]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise TargetError(f"Two places in the tree that are trained have the path {twice[0]!r}. Rename one.")
    return chosen


def _chosen_whole(spec: LoRASpec, weights: list[Weight], targets: list[str]) -> set[str]:
    trained = [weight for weight in weights if weight.trainable]
    if spec.disabled:
        return {weight.path for weight in trained}
    chosen = {path for rule in spec.modules_to_save for path in _saved_whole(rule, weights)}
    if spec.tune_vectors:
        chosen |= {weight.path for weight in trained if weight.vector}
    if spec.bias != "none":
        biases = {weight.path for weight in trained if weight.leaf == "bias"}
        chosen |= {b for b in biases if spec.bias == "all" or b.rpartition(".")[0] in targets}
        if not chosen & biases:
            raise TargetError(f"bias: {spec.bias} trains nothing: the weights that it means have no bias.")
    if clash := [w.module for w in trained if w.path in chosen and w.module in targets]:
        raise TargetError(f"{clash[0]!r} is selected both for LoRA and to be trained whole.")
    return chosen


def _saved_whole(rule: str, weights: list[Weight]) -> set[str]:
    """Paths of what a rule of modules_to_save selects."""
    groups = select([rule], [module.name for module in modules(weights)], "modules_to_save")
    inside = tuple(f"{group}." for group in groups)
    found = {w.path for w in weights if w.trainable and (w.module in groups or w.path.startswith(inside))}
    if not found:
        raise TargetError(f"modules_to_save {rule!r} selects {groups[0]!r}, in which nothing can be trained.")
    return found
