"""The frozen base in fewer bits, through bitsandbytes: two kinds of PackedLinear, and the loader that makes them.

    int8   W ≈ q · s        q int8 [out, in], s fp32 [out]: a row's largest weight / 127
    nf4    W ≈ code[q] · s  q 4 bits, s fp32 [out, in/64]: a block's largest weight; 16 quantiles of N(0, 1), scaled to [-1, 1]

                            Dettmers et al. 2022, https://arxiv.org/abs/2208.07339; 2023, https://arxiv.org/abs/2305.14314

Weights alone are rounded: inputs stay as they are on every device, unlike in bitsandbytes' own int8 layer on CUDA, whose
product rounds them to 8 bits too. Output embeddings, task heads and embeddings keep the compute dtype.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loralab import errors
from loralab.adapters.fingerprint import sampled_positions, spread
from loralab.adapters.target_modules import resolve
from loralab.errors import MissingExtra, ModelError
from loralab.on_torch.adapters.base import describe_modules, is_turned, plain_modules, quantization_of
from loralab.on_torch.ops.linear import QuantizedLinear, dense_weight, is_conv1d
from loralab.on_torch.ops.onednn_linear import Linear
from loralab.on_torch.quantization.nf4 import BLOCK, NF4, unpack

Loader = Callable[[torch.dtype | None, torch.device], nn.Module]
COMPARED = 4  # modules: enough to tell how far two storages are apart
ROWS = 2**19  # weights that are packed at a time, so that packing needs little memory of its own


@dataclass(frozen=True)
class Quantization:
    """Quantization settings of a base."""

    kind: str
    """int8 or nf4."""
    but: tuple[str, ...] = ()
    """Rules of the linear modules that keep the compute dtype."""


def quantization(kind: str | None, but: Sequence[str]) -> Quantization | None:
    """The settings of a recipe or of `load_model`.

    Raises:
        ModelError: the kind is unknown, or rules are given without one.
    """
    if kind is None and but:
        raise ModelError("quantize_except means something only with quantize: int8 or nf4.")
    if kind is not None and kind not in KINDS:
        raise ModelError(f"quantize {kind!r} is not one of {', '.join(KINDS)}.")
    return None if kind is None else Quantization(kind, tuple(but))


class Int8Linear(QuantizedLinear):
    """8 bits a weight."""

    kind = "int8"
    codes: Tensor
    scales: Tensor

    def __init__(self, codes_OI: Tensor, scales_O: Tensor, *about: Any) -> None:
        super().__init__((codes_OI.shape[0], codes_OI.shape[1]), *about)
        self.register_buffer("codes", codes_OI)
        self.register_buffer("scales", scales_O)

    def part(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        return self.codes[rows, columns].float().mul_(self.scales[rows, None]).to(dtype)


class Nf4Linear(QuantizedLinear):
    """4 bits a weight, two in a byte, and a scale for each block of 64."""

    kind = NF4
    block = BLOCK
    codes: Tensor
    scales: Tensor

    def __init__(self, codes_OI: Tensor, scales_OI: Tensor, *about: Any) -> None:
        """`codes_OI`: [out, in/2]; `scales_OI`: [out, in/64]."""
        super().__init__((len(codes_OI), 2 * codes_OI.shape[1]), *about)
        self.register_buffer("codes", codes_OI)
        self.register_buffer("scales", scales_OI)

    def part(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        start, stop = columns.start, columns.stop
        codes = self.codes[rows, start // 2 : stop // 2].contiguous()
        scales = self.scales[rows, start // self.block : stop // self.block].contiguous().view(-1)
        return unpack(codes, scales, (len(codes), stop - start), dtype)


def _pack_int8(part_OI: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import int8_vectorwise_quant

    # Its CUDA kernel takes fp16 alone, its CPU one any dtype.
    part_OI = (part_OI.half() if part_OI.is_cuda else part_OI.float()).contiguous()
    codes, largest, _ = int8_vectorwise_quant(part_OI)
    return codes.masked_fill_(largest[:, None] == 0, 0), largest / 127


def _pack_nf4(part_OI: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    outputs = len(part_OI)
    codes, state = quantize_4bit(part_OI.contiguous(), blocksize=Nf4Linear.block, quant_type="nf4")
    return codes.view(outputs, -1), state.absmax.view(outputs, -1)


def _without_numbers(kind: str, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales on the meta device, as large as real ones."""
    outputs, inputs = weight_OI.shape
    if kind == NF4:
        codes = weight_OI.new_empty(outputs, inputs // 2, dtype=torch.uint8)
        return codes, weight_OI.new_empty(outputs, inputs // BLOCK, dtype=torch.float32)
    codes = weight_OI.new_empty(outputs, inputs, dtype=torch.int8)
    return codes, weight_OI.new_empty(outputs, dtype=torch.float32)


KINDS: dict[str, Any] = {"int8": (Int8Linear, _pack_int8), "nf4": (Nf4Linear, _pack_nf4)}


@torch.no_grad()
def quantize_linear(
    kind: str, base: nn.Module, device: torch.device, name: str = "", turned: bool = False
) -> QuantizedLinear:
    """A Linear or Conv1D in fewer bits, on the device.

    Args:
        turned: its file has the matrix the other way round.

    Raises:
        ModelError: its shape cannot be packed so, or it holds weights that are not finite.
    """
    make, pack_part = KINDS[kind]
    weight_OI, stored, bias = dense_weight(base), base.get_parameter("weight"), getattr(base, "bias", None)
    inputs = weight_OI.shape[1]
    if inputs % make.block:
        raise ModelError(
            f"{name} has {inputs} inputs, and {kind} packs blocks of {make.block}: it needs a multiple of them. "
            "Take int8, which packs any shape, or leave such modules as they are with model.quantize_except."
        )
    if weight_OI.is_meta:
        return make(*_without_numbers(kind, weight_OI), bias, is_conv1d(base), ())
    codes, scales = _pack_in_parts(pack_part, weight_OI, device)
    if not bool(torch.isfinite(scales).all()):
        raise ModelError(f"{name} holds weights that are not finite, which cannot be packed. Is the file damaged?")
    in_file = stored.T if turned else stored
    positions = torch.from_numpy(sampled_positions(in_file.shape)).to(in_file.device)
    samples = tuple(in_file.reshape(-1)[positions].float().tolist())
    return make(codes, scales, bias, is_conv1d(base), samples)


def load_quantized(load: Loader, dtype: torch.dtype, device: torch.device, how: Quantization) -> nn.Module:
    """A model in fewer bits.

    Args:
        load: (dtype, device) -> the plain model; with a dtype of None, on the CPU, its weights are mapped from its files.
    """
    model = load_settled(load(None, torch.device("cpu")), dtype, device, how)
    model.original = load  # type: ignore[assignment]
    return model


def _pack_in_parts(pack_part: Any, weight_OI: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes and scales of a few rows at a time: what stays is allocated before what goes, so that the heap gets no holes."""
    step = max(ROWS // weight_OI.shape[1], 1)
    one = pack_part(weight_OI[:1].to(device))
    codes, scales = (each.new_empty(len(weight_OI), *each.shape[1:]) for each in one)
    for start in range(0, len(weight_OI), step):
        codes[start : start + step], scales[start : start + step] = pack_part(
            weight_OI[start : start + step].to(device)
        )
    return codes, scales


def load_settled(model: nn.Module, dtype: torch.dtype, device: torch.device, how: Quantization) -> nn.Module:
    """Brings a model whose weights lie in mapped files into memory, a tensor at a time: packed, or cast, on the device.

    Raises:
        MissingExtra, ModelError: there is no bitsandbytes, or it does not work here.
        ModelError, TargetError: a module cannot be packed; a rule of `how.but` selects none.
    """
    if device.type != "meta":
        check_installed(how.kind, device)
    for name in modules_to_quantize(model, how.but):
        module = model.get_submodule(name)
        packed = quantize_linear(how.kind, module, device, name, is_turned(model, f"{name}.weight"))
        model.set_submodule(name, packed.train(module.training))
    for module in model.modules():
        _place(module, dtype, device)
    return model


def modules_to_quantize(model: nn.Module, but: Sequence[str] = ()) -> list[str]:
    """The linear modules of a base but its heads, those that share their weight, and those that the rules select."""
    modules = plain_modules(model)
    described = list(describe_modules(model, modules))
    kept = set(resolve(but, described)) if but else set()
    shared = _shared(modules.values())
    return [
        name
        for name in resolve(["all-linear"], described)
        if name not in kept
        and (type(modules[name]) in (nn.Linear, Linear) or is_conv1d(modules[name]))
        and id(modules[name].weight) not in shared
    ]


def _shared(modules: Iterable[nn.Module]) -> set[int]:
    """Parameters that several modules hold."""
    seen, twice = set[int](), set[int]()
    for module in modules:
        for parameter in module.parameters(recurse=False):
            (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _place(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Parameters in the dtype; what is no parameter keeps its own, as the angles of rotary embeddings must."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))


def storage_differs(model: nn.Module, then: str | None, adapted: Sequence[str]) -> str | None:
    """Returns how far the adapted weights are from those that an adapter was trained on, in words; None where both are stored alike.

    Args:
        then: what the base was packed as in training.
    """
    now = quantization_of(model)
    if now == then:
        return None
    before = "was not packed" if then is None else f"was stored as {then}"
    here = now or str(next(model.parameters()).dtype).removeprefix("torch.")
    words = f"The adapter was trained on a base that {before}, and this one is stored as {here}"
    try:
        apart = _apart(model, then, spread(adapted, COMPARED))
    except MissingExtra:
        return f"{words}; how far apart they are is not known without bitsandbytes."
    return f"{words}: the weights that it adapts differ by {100 * apart:.2g} % (root mean square, of their own size)."


@torch.no_grad()
def _apart(model: nn.Module, then: str | None, names: Sequence[str]) -> float:
    """‖W now − W then‖ / ‖W now‖ over these modules."""
    modules = plain_modules(model)
    cpu = torch.device("cpu")
    plain = dict(model.original(None, cpu).named_modules()) if quantization_of(model) else modules  # type: ignore[operator]
    if then is not None:
        check_installed(then, cpu)
    apart = size = 0.0
    for name in names:
        now = dense_weight(modules[name]).float().cpu()
        before = plain[name] if then is None else quantize_linear(then, plain[name], cpu, name)
        apart += float((now - dense_weight(before).float().cpu()).square().sum())
        size += float(now.square().sum())
    return (apart / size) ** 0.5 if size else 0.0


# bitsandbytes


def check_installed(kind: str, device: torch.device) -> None:
    """Raises MissingExtra where there is no bitsandbytes, and ModelError, in one line, where it does not work on the device."""
    errors.check_installed("bitsandbytes", "quantize")
    # It says at import which further kernels it lacks, and how its library failed; the latter is said below.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    try:
        make, pack_part = KINDS[kind]
        layer = make(*pack_part(torch.ones(1, 64, device=device)), None, False, ())
        layer.part(slice(0, 1), slice(0, 64), torch.float32)
    except Exception as error:  # a library that is not found, a kernel that the device lacks: each raises its own
        raise ModelError(
            f"bitsandbytes {importlib.metadata.version('bitsandbytes')} is installed but does not work on {device.type} here: "
            f"{_first_line(error)}. Install its build for this machine, take model.device cpu, or set model.quantize to null."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
