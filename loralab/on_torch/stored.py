"""`load_adapter`: an adapter from disk, ours or PEFT's, onto the base that it was trained on, or an error that says
what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from loralab import adapter as files
from loralab.adapter import AdapterFiles
from loralab.errors import AdapterError, nearest
from loralab.fingerprint import difference
from loralab.on_torch.attach import Adapter, attachment_for, base_parameters, fingerprint, install, plain_modules
from loralab.on_torch.linear import WRAPPABLE, dense_weight


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> Adapter:
    """Attaches an adapter from disk, ours or PEFT's, in place, and enables it.

    Raises:
        AdapterError: the adapter was trained on another base; it has too many or too few tensors for this one; a shape does not fit.
    """
    attachment = attachment_for(model, name)
    stored = files.read(folder)
    _check_base(model, stored, folder)
    modules = plain_modules(model)
    _check_names(modules, base_parameters(model), stored, folder)
    for target, arrays in stored.updates.items():
        _check_update(stored, target, arrays, dense_weight(modules[target]), folder)
    for parameter, array in stored.tuned.items():
        _check_shape(parameter, array, tuple(base_parameters(model)[parameter].shape), folder)
    adapter = install(model, attachment, stored.spec, name, list(stored.updates), list(stored.tuned))
    _fill(adapter, stored)
    adapter.card = {key: value for key, value in stored.card.items() if key not in ("format", "base")}
    return adapter


def continue_from(adapter: Adapter, model: nn.Module, folder: Path) -> None:
    """Gives a fresh adapter the weights of one on disk, from which its training goes on.

    Raises:
        AdapterError: the one on disk was trained on another base, or adapts other modules, or with another rank or scale.
    """
    stored = files.read(folder)
    _check_base(model, stored, folder)
    here, there = ({*one.updates, *one.tuned} for one in (adapter, stored))
    if here != there:
        odd = sorted(here ^ there)
        raise AdapterError(
            f"{folder} and the recipe's lora block differ in {len(odd)} modules, such as {odd[0]!r}. "
            "To go on with an adapter, adapt the same modules; or merge it (`loralab merge`) and start anew from the result."
        )
    for name, update in adapter.updates.items():
        rank, scale = stored.spec.rank_of(name), stored.spec.scale_of(name)
        if (rank, scale) != (len(update.A), update.scale):
            raise AdapterError(
                f"{folder} has rank {rank} and scale {scale:g} at {name}; the recipe's lora block says rank {len(update.A)} "
                f"and scale {update.scale:g}. To go on with an adapter, keep its rank and alpha."
            )
    _fill(adapter, stored)


def _fill(adapter: Adapter, stored: AdapterFiles) -> None:
    with torch.no_grad():
        for target, update in adapter.updates.items():
            for part, parameter in update.named_parameters():
                parameter.copy_(torch.from_numpy(stored.updates[target][part].copy()))
        for name, parameter in adapter.tuned.items():
            parameter.copy_(torch.from_numpy(stored.tuned[name].copy()))


def _check_base(model: nn.Module, stored: AdapterFiles, folder: str | Path) -> None:
    record = stored.card.get("base", {}).get("fingerprint")
    problem = difference(record, fingerprint(model)) if record else None
    if problem:
        name = str(getattr(model, "name_or_path", "") or type(model).__name__)
        raise AdapterError(
            f"{folder} was trained on the base {stored.base_name!r}, but this model ({name}) is another: {problem}."
        )


def _check_names(
    modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter], stored: AdapterFiles, folder: str | Path
) -> None:
    wrappable = [name for name, module in modules.items() if isinstance(module, WRAPPABLE)]
    extra = [name for name in stored.updates if name not in wrappable] + [
        name for name in stored.tuned if name not in parameters
    ]
    if extra:
        raise AdapterError(
            f"{folder} holds {len(extra)} tensors for modules that this model does not have, such as {extra[0]!r}. "
            f"{nearest(extra[0], [*wrappable, *parameters])}"
        )
    if missing := files.missing_modules(stored, wrappable):
        raise AdapterError(
            f"{folder} lacks the tensors of {len(missing)} modules that its target_modules selects here, such as {missing[0]!r}."
        )


def _check_update(
    stored: AdapterFiles, target: str, arrays: dict[str, np.ndarray], weight_OI: Tensor, folder: str | Path
) -> None:
    rank, (outputs, inputs) = stored.spec.rank_of(target), weight_OI.shape
    expected: dict[str, tuple[int, ...]] = {"A": (rank, inputs), "B": (outputs, rank)}
    if stored.spec.use_dora:
        expected["magnitude"] = (outputs,)
    if set(arrays) != set(expected):
        raise AdapterError(
            f"{folder} holds {', '.join(sorted(arrays))} for {target!r}; its settings call for {', '.join(sorted(expected))}."
        )
    for part, shape in expected.items():
        _check_shape(f"{part} of {target}", arrays[part], shape, folder)


def _check_shape(what: str, array: np.ndarray, expected: tuple[int, ...], folder: str | Path) -> None:
    if array.shape != expected:
        raise AdapterError(
            f"{folder}: {what} has the shape {array.shape}; this base and these settings need {expected}."
        )
