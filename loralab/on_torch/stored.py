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
    stored = check_fits(model, folder)
    adapter = install(model, attachment, stored.spec, name, list(stored.updates), list(stored.tuned))
    fill_from(adapter, stored)
    adapter.card = {key: value for key, value in stored.card.items() if key not in ("format", "base")}
    return adapter


def check_fits(model: nn.Module, folder: str | Path) -> AdapterFiles:
    """An adapter from disk, if it fits this model; raises AdapterError where it does not."""
    stored = files.read(folder)
    _check_base(model, stored, folder)
    modules, parameters = plain_modules(model), base_parameters(model)
    _check_names(modules, parameters, stored, folder)
    for target, arrays in stored.updates.items():
        _check_update(stored, target, arrays, dense_weight(modules[target]), folder)
    for parameter, array in stored.tuned.items():
        _check_shape(parameter, array, tuple(parameters[parameter].shape), folder)
    return stored


def continue_from(adapter: Adapter, model: nn.Module, folder: Path) -> None:
    """Gives a fresh adapter the weights of one on disk, from which its training goes on; one of a head alone gives its head.

    Raises:
        AdapterError: the one on disk was trained on another base, or adapts other modules, or with another rank or scale.
    """
    stored = check_fits(model, folder)
    here = set(adapter.updates) if stored.updates else set()
    odd = sorted((here ^ set(stored.updates)) | (set(stored.tuned) - set(adapter.tuned)))
    if odd:
        raise AdapterError(
            f"{folder} and the recipe's lora block differ in {len(odd)} modules, such as {odd[0]!r}. "
            "To go on with an adapter, adapt the same modules; or merge it (`loralab merge`) and start anew from the result."
        )
    for name in stored.updates:
        update = adapter.updates[name]
        rank, scale = stored.spec.rank_of(name), stored.spec.scale_of(name)
        if (rank, scale) != (len(update.A), update.scale):
            raise AdapterError(
                f"{folder} has rank {rank} and scale {scale:g} at {name}; the recipe's lora block says rank {len(update.A)} "
                f"and scale {update.scale:g}. To go on with an adapter, keep its rank and alpha."
            )
    fill_from(adapter, stored)


def fill_from(adapter: Adapter, stored: AdapterFiles) -> None:
    """Gives an adapter the weights of a stored one, as far as that has them."""
    with torch.no_grad():
        for target, arrays in stored.updates.items():
            for part, parameter in adapter.updates[target].named_parameters():
                parameter.copy_(torch.from_numpy(arrays[part].copy()))
        for name, array in stored.tuned.items():
            adapter.tuned[name].copy_(torch.from_numpy(array.copy()))


def _check_base(model: nn.Module, stored: AdapterFiles, folder: str | Path) -> None:
    record = stored.card.get("base", {}).get("fingerprint")
    problem = difference(record, fingerprint(model, record)) if record else None
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
