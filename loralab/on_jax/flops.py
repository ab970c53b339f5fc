"""FLOPs of a program, counted in the program itself: the same number on every device, exact under scan, grad and remat.

    dot_general    2 · (numbers that come out) · (length of what each sums over)
    convolution    the same, of the places where kernel and input truly meet: no padding, no holes of dilation

Other operations are not counted, as is the field's custom, nor products that no result needs, which compilers leave out.
XLA's own `cost_analysis` counts a scan's body once, however often it runs, and leaves out products that it hands to a library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from loralab.errors import UserError


def count(f: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of f(*args, **kwargs). The arguments may be arrays or `jax.ShapeDtypeStruct`s: nothing is computed.

    Of branches the dearest is counted.

    Raises:
        UserError: the program has a while loop, in which nothing says how often it runs.
    """
    return _flops(jax.make_jaxpr(f)(*args, **kwargs).jaxpr)


def _flops(jaxpr: Jaxpr) -> int:
    """Of what the program's results need."""
    needed, total = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, 0
    for equation in reversed(jaxpr.eqns):
        if needed.isdisjoint(equation.outvars) and not equation.effects:
            continue
        needed.update(v for v in equation.invars if not isinstance(v, Literal))
        total += COSTS.get(equation.primitive.name, _of_what_it_holds)(equation)
    return total


def _of_what_it_holds(equation: JaxprEqn) -> int:
    """An operation that runs the programs it holds once: jit, remat, custom derivatives."""
    return sum(map(_flops, _programs(equation.params.values())))


def _programs(values: Iterable[Any]) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _programs(value)


def _scan(equation: JaxprEqn) -> int:
    return int(equation.params["length"]) * _of_what_it_holds(equation)


def _branch(equation: JaxprEqn) -> int:
    return max(map(_flops, _programs(equation.params["branches"])))


def _while(equation: JaxprEqn) -> int:
    if _of_what_it_holds(equation):
        raise UserError(
            "The program has a while loop with products in it, and nothing in it says how often that runs. "
            "Count its body alone, or use lax.scan or a fori_loop with fixed bounds."
        )
    return 0


def _shard_map(equation: JaxprEqn) -> int:
    """The program of one device, on all of them."""
    return int(equation.params["mesh"].size) * _of_what_it_holds(equation)


def _dot(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = _shape(equation.invars[0])
    return 2 * prod(_shape(equation.outvars[0])) * prod(shape[axis] for axis in contracted)


def _convolution(equation: JaxprEqn) -> int:
    params: dict[str, Any] = equation.params
    x, kernel, y = map(_shape, (*equation.invars, *equation.outvars))
    numbers = params["dimension_numbers"]
    meetings = [
        _meetings(x[i], kernel[k], y[o], *how)
        for i, k, o, *how in zip(
            numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], params["window_strides"],
            params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True,
        )
    ]  # fmt: skip
    batch, features = (y[axis] for axis in numbers.out_spec[:2])
    return 2 * batch * features * kernel[numbers.rhs_spec[1]] * prod(meetings)


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _meetings(
    inputs: int, kernel: int, outputs: int, stride: int, padding: tuple[int, int], spread: int, dilation: int
) -> int:
    """Along one axis: the pairs of output and kernel element that meet an element of the input."""
    at = np.arange(outputs)[:, None] * stride + np.arange(kernel) * dilation - padding[0]
    return int(((at >= 0) & (at <= (inputs - 1) * spread) & (at % spread == 0)).sum())


COSTS: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "scan": _scan,
    "while": _while,
    "cond": _branch,
    "shard_map": _shard_map,
}
