"""A classifier's head: what stands between the states of its encoder and its logits."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from loralab.metrics.labels import Labels
from loralab.models import HEADS

POOLER = "pooler"  # of the encoder, and yet a part of the head


def has_label_head(model: nn.Module) -> bool:
    """Tells a sequence classifier of Transformers', by the name of its class."""
    return type(model).__name__.endswith("ForSequenceClassification")


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules that a classifier's head consists of, in the model's order; none of another model's.

    Those of a known family are data; any other's are all beside the encoder, and the encoder's pooler.
    """
    if not has_label_head(model):
        return ()
    kind = str(model.config.model_type)  # type: ignore[union-attr]
    if kind in HEADS:
        return HEADS[kind]
    prefix = str(getattr(model, "base_model_prefix", ""))
    inside = getattr(model, prefix, None)
    pooler = [f"{prefix}.{POOLER}"] if _has_weights(getattr(inside, POOLER, None)) else []
    return (*pooler, *(name for name, child in model.named_children() if name != prefix and _has_weights(child)))


def head_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters of a classifier's head."""
    roots = tuple(f"{name}." for name in head_modules(model))
    return [name for name, _ in model.named_parameters() if roots and name.startswith(roots)]


def head_in_words(
    model: nn.Module, trained: Iterable[nn.Parameter], saved: Collection[str], fresh: bool, labels: Labels
) -> str:
    """Returns what is to be known of a classifier's head: where it came from, and what becomes of it."""
    names, ids = set(head_parameters(model)), {id(parameter) for parameter in trained}
    origin = "freshly initialised" if fresh else "the base's"
    state = "trained" if any(id(p) in ids for name, p in model.named_parameters() if name in names) else "frozen"
    with_adapter = " and saved with the adapter" if names & set(saved) else ""
    return f"Head: {origin}, {state}{with_adapter}. Labels: {', '.join(labels.names)}."


def _has_weights(module: object) -> bool:
    return isinstance(module, nn.Module) and any(True for _ in module.parameters())
