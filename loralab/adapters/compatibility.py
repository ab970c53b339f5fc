"""Checks that an adapter from disk fits a base, in any engine: the base's weights, its modules, every shape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loralab.adapters.files import AdapterFiles, missing_modules
from loralab.adapters.fingerprint import Fingerprint, difference
from loralab.adapters.target_modules import why_not_shared
from loralab.errors import AdapterError, nearest

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BaseDescription:
    """The base that an adapter has to fit."""

    name: str
    maps: Mapping[str, Shape]
    """The modules that LoRA can adapt -> [out, in]."""
    parameters: Mapping[str, Shape]
    """Every parameter under its name in Hugging Face's files, and its shape there."""
    fingerprint: Callable[[Iterable[str]], Fingerprint]
    """Fingerprint of the parameters of these names, as far as the base has them."""
    shared: Collection[str]
    """Parameters with a second use."""
    holds: Callable[[str, np.ndarray], bool]
    """Tells whether the parameter of this name has these values, as far as its dtype can tell."""


def check_compatibility(stored: AdapterFiles, base: BaseDescription, folder: str | Path) -> AdapterFiles:
    """The adapter for this base, without the copies of the base's own weights that PEFT may have saved beside it.

    Raises:
        AdapterError: it was trained on another base, has tensors too many or too few, or of another shape, or changes a weight
            with several uses.
    """
    stored = replace(
        stored, tuned={n: array for n, array in stored.tuned.items() if not _is_copy(n, array, stored, base)}
    )
    _check_base(stored, base, folder)
    _check_names(stored, base, folder)
    for target, arrays in stored.updates.items():
        _check_update(stored, target, arrays, base.maps[target], folder)
    for parameter, array in stored.tuned.items():
        _check_shape(parameter, array, base.parameters[parameter], folder)
    if reason := why_not_shared(stored.updates, stored.tuned, base.shared):
        raise AdapterError(f"{folder}: {reason}")
    return stored


def _is_copy(name: str, array: np.ndarray, stored: AdapterFiles, base: BaseDescription) -> bool:
    """Tells whether this is an embedding or head as the base has it, which no setting trains: PEFT's `save_embedding_layers`."""
    if not name.endswith(".weight") or any(f".{module}." in f".{name}" for module in stored.spec.modules_to_save):
        return False
    names = [name] if name in base.parameters else base.shared  # a tied head has no name of its own in every model
    return any(base.parameters.get(each) == array.shape and base.holds(each, array) for each in names)


def _check_base(stored: AdapterFiles, base: BaseDescription, folder: str | Path) -> None:
    record = stored.card.get("base", {}).get("fingerprint")
    problem = difference(record, base.fingerprint(record)) if record else None
    if problem:
        raise AdapterError(
            f"{folder} was trained on the base {stored.base_name!r}, but this model ({base.name}) is another: {problem}."
        )


def _check_names(stored: AdapterFiles, base: BaseDescription, folder: str | Path) -> None:
    extra = [name for name in stored.updates if name not in base.maps]
    extra += [name for name in stored.tuned if name not in base.parameters]
    if unwrapped := [name for name in extra if f"{name}.weight" in base.parameters]:
        raise AdapterError(
            f"{folder} has LoRA on {unwrapped[0]!r}, which is here, but of a kind that loralab does not adapt."
        )
    if extra:
        raise AdapterError(
            f"{folder} holds {len(extra)} tensors for modules that this model does not have, such as {extra[0]!r}. "
            f"{nearest(extra[0], [*base.maps, *base.parameters])}"
        )
    if missing := missing_modules(stored, base.maps):
        raise AdapterError(
            f"{folder} lacks the tensors of {len(missing)} modules that its target_modules selects here, such as {missing[0]!r}."
        )


def _check_update(
    stored: AdapterFiles, target: str, arrays: dict[str, np.ndarray], shape: Shape, folder: str | Path
) -> None:
    rank, (outputs, inputs) = stored.spec.rank_of(target), shape
    expected: dict[str, Shape] = {"A": (rank, inputs), "B": (outputs, rank)}
    if stored.spec.use_dora:
        expected["magnitude"] = (outputs,)
    if set(arrays) != set(expected):
        raise AdapterError(
            f"{folder} holds {', '.join(sorted(arrays))} for {target!r}; its settings call for {', '.join(sorted(expected))}."
        )
    for part, of_part in expected.items():
        _check_shape(f"{part} of {target}", arrays[part], of_part, folder)


def _check_shape(what: str, array: np.ndarray, expected: Shape, folder: str | Path) -> None:
    if array.shape != expected:
        raise AdapterError(
            f"{folder}: {what} has the shape {array.shape}; this base and these settings need {expected}."
        )
