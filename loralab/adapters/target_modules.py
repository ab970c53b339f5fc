"""Rules -> the names of the modules that LoRA wraps, or an error that says what was meant.

A rule selects modules by their dotted name, such as `decoder.block.0.layer.1.EncDecAttention.q`:

    q, SelfAttention.q      the name ends in these whole components (PEFT's `target_modules` list)
    Attention.q             the first component may be the tail of a CamelCase one: SelfAttention.q and EncDecAttention.q
    decoder.*.q             a glob, from any component to the end; `*` crosses dots
    re:decoder\\..*[qv]      a regular expression for the whole name (PEFT's `target_modules` string)
    all-linear              every linear module except task heads, poolers and the output embedding

A rule that selects nothing is an error with the nearest names, never a silence.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from loralab.config.lora import LoRASpec, pattern_matches
from loralab.errors import TargetError, nearest

# Names of modules that stand for a task, not for the language model: `all-linear` leaves them alone in every family.
HEADS = frozenset(
    {"lm_head", "classifier", "pre_classifier", "score", "pooler", "qa_outputs", "classification_head", "embed_out"}
)


@dataclass(frozen=True, slots=True)
class Module:
    """Facts about a module that rules can use: its dotted name, its class, and whether LoRA can wrap it."""

    name: str
    kind: str
    wrappable: bool = False
    linear: bool = False
    head: bool = False


def resolve(
    rules: Iterable[str], modules: Iterable[Module], wraps: str = "Linear, Conv1D and Embedding modules"
) -> list[str]:
    """The names of the wrappable modules that any rule selects, in the model's order.

    Raises:
        TargetError: for all the rules at once that select nothing, or nothing that LoRA can wrap.
    """
    modules = list(modules)
    chosen: set[str] = set()
    mistakes = []
    for rule in rules:
        hits = [module for module in modules if _matches(rule, module)]
        wrapped = [module.name for module in hits if module.wrappable]
        if not wrapped:
            mistakes.append(_explain(rule, hits, modules, wraps))
        chosen.update(wrapped)
    if mistakes:
        raise TargetError("\n".join(mistakes))
    return [module.name for module in modules if module.name in chosen]


def select(rules: Iterable[str], names: Iterable[str], purpose: str) -> list[str]:
    """The names that any rule selects, of whatever kind of module; a rule that selects none is an error that names its purpose."""
    names = list(names)
    chosen = {name for rule in rules for name in _some(rule, names, purpose)}
    return [name for name in names if name in chosen]


def check_patterns(patterns: Mapping[str, object], names: list[str], purpose: str) -> None:
    """Raises TargetError where a pattern of `rank_pattern` or `alpha_pattern` reaches none of the adapted modules."""
    for pattern in patterns:
        if not any(pattern_matches(pattern, name) for name in names):
            raise TargetError(
                f"{purpose} {pattern!r} matches none of the {len(names)} adapted modules. It must reach the end of a name, "
                f"such as {names[0]!r}. {nearest(pattern, _tails(names))}"
            )


def why_not_shared(targets: Iterable[str], whole: Iterable[str], shared: Container[str]) -> str | None:
    """Why what is chosen cannot be: it is a parameter with a second use. None where nothing is.

    An update would reach only one of the uses, in PEFT and Transformers without a word; and where it reached all, its files would
    not say so.

    Args:
        targets: modules that get an update.
        whole: parameters that are trained whole.
        shared: parameters with a second use.
    """
    for name in (*(f"{target}.weight" for target in targets), *whole):
        if name in shared:
            return (
                f"{name.removesuffix('.weight')!r} shares its weight with another module, as embeddings of encoder and decoder do, "
                "or of input and output: an adapter would change it for one of them alone."
            )
    return None


def refuse_shared(targets: Iterable[str], whole: Iterable[str], shared: Container[str]) -> None:
    """Raises TargetError where `why_not_shared` has a reason."""
    if reason := why_not_shared(targets, whole, shared):
        raise TargetError(f"{reason} Leave it out, or train the whole model.")


def tuned_names(
    spec: LoRASpec, modules: Iterable[str], parameters: Mapping[str, int], targets: Iterable[str]
) -> list[str]:
    """The base's parameters that are trained whole beside the updates, in the model's order.

    Args:
        parameters: name -> number of axes.

    Raises:
        TargetError: a setting selects nothing, or what has an update already.
    """
    targets, chosen = list(targets), set[str]()
    if spec.modules_to_save:
        roots = select(spec.modules_to_save, modules, "modules_to_save")
        chosen |= {name for name in parameters if name.startswith(tuple(root + "." for root in roots))}
    if spec.tune_vectors:
        chosen |= {name for name, axes in parameters.items() if axes == 1}
    if spec.bias != "none":
        biases = {name for name in parameters if name.rpartition(".")[2] == "bias"}
        chosen |= {b for b in biases if spec.bias == "all" or b.rpartition(".")[0] in targets}
        if not chosen & biases:
            raise TargetError(f"bias: {spec.bias} trains nothing: the modules that it means have no bias.")
    if clash := [name for name in chosen if name.endswith(".weight") and name.removesuffix(".weight") in targets]:
        raise TargetError(f"{clash[0]!r} is selected both for LoRA and to be trained whole.")
    return [name for name in parameters if name in chosen]


def _some(rule: str, names: list[str], purpose: str) -> list[str]:
    hits = [name for name in names if matches(rule, name)]
    if not hits:
        raise TargetError(f"{purpose} {rule!r} matches no module. {nearest(rule, _tails(names))}")
    return hits


def _matches(rule: str, module: Module) -> bool:
    if rule == "all-linear":
        return module.linear and not module.head and not HEADS & set(module.name.split("."))
    return matches(rule, module.name)


def matches(rule: str, name: str) -> bool:
    """Tells whether a rule (other than `all-linear`) selects a module of this dotted name."""
    if rule.startswith("re:"):
        return _full_match(rule[3:], name)
    if any(sign in rule for sign in "*?["):
        parts = name.split(".")
        return any(fnmatch.fnmatchcase(".".join(parts[start:]), rule) for start in range(len(parts)))
    return _ends_in(name.split("."), rule.split("."))


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise TargetError(f"The rule 're:{pattern}' is not a regular expression: {error}.") from error


def _ends_in(parts: list[str], rule: list[str]) -> bool:
    if len(rule) > len(parts) or parts[len(parts) - len(rule) + 1 :] != rule[1:]:
        return False
    first = parts[-len(rule)]
    return first == rule[0] or _camel_tail(first, rule[0])


def _camel_tail(word: str, tail: str) -> bool:
    """`Attention` is a tail of `SelfAttention`, but `q` is none of `seq` and `wo` none of `two`."""
    return tail[:1].isupper() and word.endswith(tail) and word[: -len(tail)][-1:].islower()


def _explain(rule: str, hits: list[Module], modules: list[Module], wraps: str) -> str:
    wrappable = [module.name for module in modules if module.wrappable]
    if not hits:
        return f"The rule {rule!r} matches no module of this model. {nearest(rule, _tails(wrappable))}"
    inside = [name for name in wrappable if any(name.startswith(hit.name + ".") for hit in hits)]
    advice = f" Name the linear modules inside: {', '.join(_tails(inside)[:6])}." if inside else ""
    return f"The rule {rule!r} matches {hits[0].name!r}, a {hits[0].kind}; LoRA wraps {wraps}.{advice}"


def _tails(names: Iterable[str]) -> list[str]:
    """The last component of each name and the last two, once each, without counters such as `block.0`."""
    tails: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for tail in (".".join(parts[-2:]), parts[-1]):
            if not any(part.isdigit() for part in tail.split(".")):
                tails[tail] = None
    return list(tails)
