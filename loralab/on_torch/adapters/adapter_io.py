"""`load_adapter`: an adapter from disk, ours or PEFT's, onto the base that it was trained on, or an error that says
what does not fit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from loralab.adapters import compatibility, files
from loralab.adapters.compatibility import BaseDescription
from loralab.adapters.files import AdapterFiles
from loralab.errors import AdapterError
from loralab.on_torch.adapters.attach import Adapter, attachment_for, install
from loralab.on_torch.adapters.base import (
    base_parameters,
    describe_modules,
    fingerprint,
    in_files,
    plain_modules,
    shared_parameters,
)
from loralab.on_torch.ops.linear import dense_shape
from loralab.on_torch.quantization.quantize import storage_differs


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> Adapter:
    """Attaches an adapter from disk, ours or PEFT's, in place, and enables it.

    Raises:
        AdapterError: the adapter was trained on another base; it has too many or too few tensors for this one; a shape does not fit.
    """
    attachment = attachment_for(model, name)
    stored = read_compatible(model, folder)
    adapter = install(model, attachment, stored.spec, name, list(stored.updates), list(stored.tuned))
    fill_from(adapter, stored)
    adapter.card = {key: value for key, value in stored.card.items() if key not in ("format", "base")}
    about = stored.card.get("base", {})
    if "quantize" in about and stored.updates:
        adapter.note = storage_differs(model, about["quantize"], list(stored.updates))
    return adapter


def read_compatible(model: nn.Module, folder: str | Path) -> AdapterFiles:
    """An adapter from disk, if it fits this model; raises AdapterError where it does not."""
    modules, parameters = plain_modules(model), base_parameters(model)
    base = BaseDescription(
        name=str(getattr(model, "name_or_path", "") or type(model).__name__),
        maps={m.name: dense_shape(modules[m.name]) for m in describe_modules(model, modules) if m.wrappable},
        parameters={name: tuple(in_files(model, name, weight).shape) for name, weight in parameters.items()},
        fingerprint=lambda names: fingerprint(model, names),
        shared=shared_parameters(model, modules),
        holds=lambda name, values: _holds(in_files(model, name, parameters[name]), torch.from_numpy(values.copy())),
    )
    return compatibility.check_compatibility(files.read_adapter(folder), base, folder)


def _holds(weight: Tensor, values: Tensor) -> bool:
    """Tells whether values [fp32] are the weight's, where one of the two may have been rounded to fewer bits."""
    values = values.to(weight.device)
    rounded = (weight.to(dtype).float() for dtype in (weight.dtype, torch.bfloat16, torch.float16))
    return torch.equal(values.to(weight.dtype), weight) or any(torch.equal(each, values) for each in rounded)


def continue_from(adapter: Adapter, model: nn.Module, folder: Path) -> None:
    """Gives a fresh adapter the weights of one on disk, from which its training goes on; one of a head alone gives its head.

    Raises:
        AdapterError: the one on disk was trained on another base, or adapts other modules, or with another rank or scale.
    """
    stored = read_compatible(model, folder)
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
            adapter.tuned[name].copy_(in_files(adapter.model, name, torch.from_numpy(array.copy())))
