"""The base below an attached adapter: its modules and weights by name, packed or not, and its fingerprint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from loralab.adapters.fingerprint import Fingerprint, take
from loralab.adapters.target_modules import Module
from loralab.on_torch.adapters.lora import AdaptedModule
from loralab.on_torch.models.heads import head_modules
from loralab.on_torch.ops.linear import QuantizedLinear, is_linear, is_wrappable

ATTRIBUTE = "_loralab"  # of a model: what is attached to it


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base by name, as if nothing were attached."""
    modules: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, AdaptedModule):
            inside = (*inside, name + ".")
            module = module.base
        modules[name] = module
    return modules


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the base by name, as if nothing were attached."""
    attachment = getattr(model, ATTRIBUTE, None)
    originals: dict[str, nn.Parameter] = {} if attachment is None else attachment.originals
    found = {
        f"{name}.{leaf}".lstrip("."): parameter
        for name, module in plain_modules(model).items()
        for leaf, parameter in module.named_parameters(recurse=False)
    }
    return {name: follow(originals.get(name, parameter), parameter) for name, parameter in found.items()}


def follow(parameter: nn.Parameter, standing: Tensor) -> nn.Parameter:
    """Moves a parameter, in place, to the device and dtype of the one that stands in the model in its stead.

    `model.to(...)` reaches only what is registered in the model. An original that an adapter replaces, and the replacements
    of an adapter that is not enabled, are moved when they are next used.
    """
    if (parameter.device, parameter.dtype) != (standing.device, standing.dtype):
        grad, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.to(standing.device, standing.dtype)
        parameter.grad = None if grad is None else grad.to(standing.device, standing.dtype)
    return parameter


def quantized_modules(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The base's packed linear maps by name."""
    return {name: module for name, module in plain_modules(model).items() if isinstance(module, QuantizedLinear)}


def quantization_of(model: nn.Module) -> str | None:
    """Returns what the base's linear maps are packed as; None where they are not."""
    return next((module.kind for module in quantized_modules(model).values()), None)


def storage_in_words(model: nn.Module) -> str:
    """Counts how many of the linear maps are packed, and what that spares; "" where none is."""
    packed = quantized_modules(model)
    if not packed:
        return ""
    saved = sum(2 * m.in_features * m.out_features - sum(b.nbytes for b in m.buffers()) for m in packed.values())
    return f"{len(packed)} linear maps are stored as {quantization_of(model)}, which takes {saved / 1e9:.2g} GB less than bfloat16."


def size(model: nn.Module) -> int:
    """Counts how many numbers the base holds, packed or not."""
    held = {id(parameter): parameter.numel() for parameter in base_parameters(model).values()}
    return sum(held.values()) + sum(m.out_features * m.in_features for m in quantized_modules(model).values())


def model_type(model: nn.Module) -> str:
    """Hugging Face's name of the architecture."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def shared_parameters(model: nn.Module, modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """The names of the parameters with a second use, under each of their names."""
    named = [(f"{n}.{leaf}", p) for n, m in modules.items() for leaf, p in m.named_parameters(recurse=False)]
    uses = Counter(id(p) for _, p in named)
    return frozenset({name for name, p in named if uses[id(p)] > 1} | {*getattr(model, "shared_parameters", ())})


def is_turned(model: nn.Module, name: str) -> bool:
    """Tells whether the files have this weight the other way round: of our GPT-2 some were turned on the way in."""
    return name.endswith(getattr(model, "turned", ()))


def in_files(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """The weight of this name as its files have it; and of one of theirs, as the model has it."""
    return weight.T if is_turned(model, name) else weight


def base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the base's weights, as its files have them."""
    shapes = {name: tuple(parameter.shape) for name, parameter in base_parameters(model).items()}
    shapes |= {f"{name}.weight".lstrip("."): module.base_shape for name, module in quantized_modules(model).items()}
    shapes = {name: shape[::-1] if is_turned(model, name) else shape for name, shape in shapes.items()}
    return shapes | {alias: shapes[name] for alias, name in getattr(model, "aliases", {}).items()}


def fingerprint(model: nn.Module, names: Iterable[str] | None = None) -> Fingerprint:
    """The fingerprint of the model's base; of the weights of these names alone, as far as the base has them."""
    shapes, parameters, packed = base_shapes(model), base_parameters(model), quantized_modules(model)
    aliases: dict[str, str] = getattr(model, "aliases", {})
    if names is not None:
        shapes = {name: shapes[name] for name in names if name in shapes}

    def read(name: str, positions: np.ndarray) -> Sequence[float]:
        name = aliases.get(name, name)
        if name not in parameters:
            return packed[name.removesuffix("weight").rstrip(".")].samples
        flat = in_files(model, name, parameters[name].detach()).reshape(-1)
        values: list[float] = flat[torch.from_numpy(positions).to(flat.device)].float().tolist()
        return values

    return take(shapes, read)


def describe_modules(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[Module]:
    """Returns what rules may know of the modules."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = head_modules(model)
    for name, module in modules.items():
        if name:
            # PyTorch's own attention reads its projection's weight and never calls it: an update would do nothing.
            called = not isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
            wrappable, linear = called and is_wrappable(module), called and is_linear(module)
            yield Module(
                name, type(module).__name__, wrappable, linear, head=module is output or name.startswith(heads)
            )
