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
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

from loralab.errors import UserError


def count(f: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of f(*args, **kwargs). The arguments may be arrays or `jax.ShapeDtypeStruct`s: nothing is computed.

    Of branches the dearest is counted.

    Raises:
        UserError: the program has a while loop with products, in which nothing says how often it runs, or a kernel of Pallas.
    """
    program = jax.make_jaxpr(f)(*args, **kwargs).jaxpr
    needed, _ = dce_jaxpr(program, [True] * len(program.outvars))
    return _flops(needed)


def _flops(jaxpr: Jaxpr) -> int:
    return sum(COSTS.get(equation.primitive.name, _of_what_it_holds)(equation) for equation in jaxpr.eqns)


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


def _kernel(equation: JaxprEqn) -> int:
    raise UserError(
        "The program has a kernel of Pallas, whose products cannot be counted: count the program without it."
    )


def _shard_map(equation: JaxprEqn) -> int:
    """The program of one device, on all of them: along the mesh's axes that it parts by hand."""
    mesh, names = equation.params["mesh"], ("newly_manual_axes", "manual_axes")  # of newer JAX, of older
    by_hand = next((equation.params[name] for name in names if name in equation.params), mesh.axis_names)
    return prod(mesh.shape[axis] for axis in by_hand) * _of_what_it_holds(equation)


def _solve(equation: JaxprEqn) -> int:
    """The solver alone: the products beside it are for its derivatives."""
    return _flops(equation.params["jaxprs"].solve.jaxpr)


def _scaled_dot(equation: JaxprEqn) -> int:
    """Returns the FLOPs of [B, M, K] and [B, N, K] in few bits, with a scale for each block of K."""
    return 2 * prod(_shape(equation.outvars[0])) * _shape(equation.invars[0])[-1]


def _dot(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = _shape(equation.invars[0])
    return 2 * prod(_shape(equation.outvars[0])) * prod(shape[axis] for axis in contracted)


def _ragged_dot(equation: JaxprEqn) -> int:
    """Each row meets the matrix of its group alone; where groups divide what is summed over, each has a result of its own."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    shape, results = _shape(equation.invars[0]), prod(_shape(equation.outvars[0]))
    if set(numbers.lhs_ragged_dimensions) <= set(contracted):
        results //= _shape(equation.invars[2])[-1]
    return 2 * results * prod(shape[axis] for axis in contracted)


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
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "scaled_matmul_wrapper": _scaled_dot,
    "custom_linear_solve": _solve,
    "pallas_call": _kernel,
    "scan": _scan,
    "while": _while,
    "cond": _branch,
    "shard_map": _shard_map,
}
