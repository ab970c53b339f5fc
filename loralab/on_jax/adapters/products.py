"""Products with a weight and its update, in which their sum is never formed.

    x · W      x · W + s · (drop(x) · Aᵀ) · Bᵀ       dot_general, either way round, batched or not; convolutions
    W[ids]     W[ids] + s · Aᵀ[ids] · Bᵀ             rows of an embedding; no dropout, as in PyTorch

A product that contracts the outputs (x · Wᵀ) goes through B first; one that sums over layers too does so in the end. The scale
and dropout's 1/(1−p) act on the rank-sized factor. With DoRA, outputs are stretched after the product, or inputs before one that
contracts the outputs. The update is computed in the dtype of x; in the factors' own where x has whole numbers, truth values or
floats of eight bits.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from loralab.on_jax.adapters.factored import LETTERS, RANK, Factored
from loralab.on_jax.ops.dropout import Masks

FURTHER = string.ascii_uppercase  # einsum's letters of the axes of x that are no axes of W

# Each takes the operation's parameters, the masks if there is dropout, and the operands; None: the sum has to be formed.


def _dot(params: dict[str, Any], masks: Masks | None, lhs: Any, rhs: Any) -> Array | None:
    if isinstance(lhs, Factored) and isinstance(rhs, Factored):
        return None
    weight, x = (lhs, rhs) if isinstance(lhs, Factored) else (rhs, lhs)
    contracted, of_x, of_y = _einsum_letters(params["dimension_numbers"], weight, x.ndim, weight is lhs)
    layers, sides = contracted & {*weight.letters("l")}, {weight.axes[LETTERS.index(letter)] for letter in contracted}
    if sides - {"l"} == {"i"}:
        into, out_of = (weight.A, weight.letters("lzi")), (weight.B, weight.letters("loz"))
        if layers and weight.stretch is not None:
            return None
    elif sides - {"l"} == {"o"}:
        into, out_of = (weight.B, weight.letters("loz")), (weight.A, weight.letters("lzi"))
        if weight.stretch is not None:
            if not {*weight.letters("lo")} <= {*of_x}:
                return None
            x = weight.stretched(_seen(x, weight, masks), of_x)
    else:
        return None
    y = lax.dot_general(weight.W, x, **params) if weight is lhs else lax.dot_general(x, weight.W, **params)

    dropped, scale = _dropped(x, weight, masks)
    between = "".join(dict.fromkeys(letter for letter in of_x + into[1] if letter not in contracted - layers))
    how = {"precision": params["precision"], "preferred_element_type": params["preferred_element_type"]}
    small = jnp.einsum(f"{of_x},{into[1]}->{between}", dropped, (into[0] * scale).astype(dropped.dtype), **how)
    update = jnp.einsum(
        f"{between},{out_of[1]}->{of_y}", small.astype(dropped.dtype), out_of[0].astype(dropped.dtype), **how
    )
    y = y + update.astype(y.dtype)
    return weight.stretched(y, of_y) if into[0] is weight.A else y


def _einsum_letters(
    dimension_numbers: Any, weight: Factored, x_ndim: int, weight_first: bool
) -> tuple[set[str], str, str]:
    """einsum's letters of the contracted axes, of x, and of the product."""
    (left, right), (left_batch, right_batch) = dimension_numbers
    if not weight_first:
        left, right, left_batch, right_batch = right, left, right_batch, left_batch
    shared = dict(zip((*right, *right_batch), (*left, *left_batch), strict=True))  # axes of x -> axes of W
    of_x = "".join(LETTERS[shared[at]] if at in shared else FURTHER[at] for at in range(x_ndim))
    free_x = "".join(FURTHER[at] for at in range(x_ndim) if at not in shared)
    free_w = "".join(letter for letter in weight.letters() if letter not in of_x)
    batch = "".join(LETTERS[at] for at in left_batch)
    return {LETTERS[at] for at in left}, of_x, batch + (free_w + free_x if weight_first else free_x + free_w)


def _seen(x: Array, weight: Factored, masks: Masks | None) -> Array:
    """x in a dtype that the factors can be cast to without loss of what they are."""
    if jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize > 1:
        return x
    cast = x.astype(weight.A.dtype)
    if masks is not None:
        masks.take_for(x, cast)
    return cast


def _dropped(x: Array, weight: Factored, masks: Masks | None) -> tuple[Array, float]:
    """Returns what the update sees of x, and what it is scaled by."""
    x = _seen(x, weight, masks)
    return (x, weight.scale) if masks is None else (masks.drop(x), weight.scale / (1 - masks.rate))


def _convolve(params: dict[str, Any], masks: Masks | None, x: Any, weight: Any) -> Array | None:
    """A convolution with r outputs, then a product with B at every place."""
    numbers = params["dimension_numbers"]
    if isinstance(x, Factored) or params["feature_group_count"] > 1 or params["batch_group_count"] > 1:
        return None
    at = numbers.rhs_spec[0]
    if weight.axes[at] != "o" or set(weight.axes[:at] + weight.axes[at + 1 :]) != {"i"}:
        return None
    y: Array = lax.conv_general_dilated(x, weight.W, **params)
    dropped, scale = _dropped(x, weight, masks)
    kernel = jnp.moveaxis((weight.A * scale).astype(dropped.dtype), 0, at)
    small: Array = lax.conv_general_dilated(dropped, kernel, **params)
    feature, output = numbers.out_spec[1], weight.letters("o")
    of_y = FURTHER[:feature] + output + FURTHER[feature : y.ndim - 1]
    between = of_y.replace(output, RANK)
    update = jnp.einsum(f"{between},{output}{RANK}->{of_y}", small, weight.B.astype(small.dtype))
    y = weight.stretched(y + update.astype(y.dtype), of_y)
    return y


def _look_up(params: dict[str, Any], masks: Masks | None, weight: Any, indices: Any) -> Array | None:
    """Whole rows of a matrix."""
    numbers = params["dimension_numbers"]
    rows = (
        numbers.collapsed_slice_dims == (0,) and numbers.start_index_map == (0,) and not numbers.operand_batching_dims
    )
    if isinstance(indices, Factored) or weight.axes not in ("io", "oi") or not rows or weight.stretch is not None:
        return None
    if params["slice_sizes"] != (1, weight.W.shape[1]):
        return None

    def take(table: Array, fill: Any) -> Array:
        how = {name: params[name] for name in ("unique_indices", "indices_are_sorted", "mode")}
        taken: Array = lax.gather(table, indices, numbers, (1, table.shape[1]), **how, fill_value=fill)
        return taken

    table, other = (weight.A.T, weight.B.T) if weight.axes == "io" else (weight.B, weight.A)
    y, (row,) = take(weight.W, params["fill_value"]), numbers.offset_dims
    small = jnp.moveaxis(take(table * weight.scale, 0), row, -1).astype(y.dtype)  # what stands for no row has no update
    return y + jnp.moveaxis(small @ other.astype(y.dtype), -1, row)


PRODUCTS: dict[str, Callable[..., Array | None]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolve,
    "gather": _look_up,
}
