"""Runs any JAX function with some of its weights replaced by factored ones.

The function is traced to a jaxpr with plain weights in their places, and that is gone through operation by operation: an
operation on a factored weight is done by its rule, every other one as it stands. Where a factored weight meets an operation
that has no rule, the sum is formed and the operation's name reported: always right, only dearer.

Loops and branches are run by JAX's own functions, with a body that is gone through in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Sharding

from loralab.on_jax.adapters.factored import STRUCTURE, Factored, dense, is_factored
from loralab.on_jax.adapters.products import PRODUCTS
from loralab.on_jax.ops.dropout import Masks

Report = Callable[[str, str], None]
ARRAY = object()  # in the place of an array


@dataclass(frozen=True)
class Scope:
    """State of one trace, beside its program."""

    report: Report
    """Is told a weight's name and the operation that its sum had to be formed for."""
    masks: Masks | None
    """Present while there is dropout."""

    def key(self) -> Array | None:
        """A fresh key for a trace within this one, while there is dropout."""
        return None if self.masks is None else self.masks.next_key()

    def inside(self, key: Array | None) -> Scope:
        """The scope of a trace within this one."""
        return replace(self, masks=None if self.masks is None or key is None else self.masks.inside(key))


def call(f: Callable[..., Any], scope: Scope, tree: Any, leaves: Sequence[Any], /, *args: Any, **kwargs: Any) -> Any:
    """f(base, *args, **kwargs), where base is a tree of these leaves, of which some may be Factored; f is given arrays."""
    weights = {at: leaf for at, leaf in enumerate(leaves) if isinstance(leaf, Factored)}
    returned: list[Any] = []  # the results' tree, and what of them is no array

    def program(*plain: Array) -> list[Array]:
        places = dict(zip(weights, plain, strict=True))
        base = jax.tree.unflatten(tree, [places.get(at, leaf) for at, leaf in enumerate(leaves)])
        results, tree_of_results = jax.tree.flatten(f(base, *args, **kwargs))
        returned[:] = tree_of_results, [ARRAY if isinstance(result, jax.Array) else result for result in results]
        return [result for result in results if isinstance(result, jax.Array)]

    traced = jax.make_jaxpr(program)(*[weight.W for weight in weights.values()])
    arrays = iter(_body(traced, scope, *weights.values()))
    tree_of_results, results = returned
    return jax.tree.unflatten(tree_of_results, [next(arrays) if result is ARRAY else result for result in results])


def _run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], scope: Scope) -> list[Any]:
    """The program's results, which may be factored, as its arguments may."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for equation in _needed(jaxpr):
        operands = [variable.val if isinstance(variable, Literal) else values[variable] for variable in equation.invars]
        values.update(zip(equation.outvars, _evaluate(jaxpr, equation, operands, scope), strict=True))
    return [variable.val if isinstance(variable, Literal) else values[variable] for variable in jaxpr.outvars]


def _needed(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """The operations whose results count, or that do something: tracing also writes down what nobody looks at, at any depth."""
    needed: list[JaxprEqn] = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0].eqns
    return needed


def _evaluate(jaxpr: Jaxpr, equation: JaxprEqn, operands: list[Any], scope: Scope) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    out: Any = None
    if any(map(is_factored, operands)):
        if name in CALLS:
            return CALLS[name](params, operands, scope)
        if name in PRODUCTS:
            out = PRODUCTS[name](params, scope.masks, *operands)
        elif name in STRUCTURE:
            out = STRUCTURE[name](params, *operands)
    if out is not None:
        return out if isinstance(out, list) else [out]
    plain = [_plain(operand, name, scope) for operand in operands]
    # As a program of one operation: how an operation is bound differs between releases of JAX, this does not.
    variables = {v: x for v, x in zip(equation.invars, plain, strict=True) if not isinstance(v, Literal)}
    alone = jaxpr.replace(constvars=[], invars=[*variables], outvars=equation.outvars, eqns=[equation])
    results = jax.core.eval_jaxpr(alone, (), *variables.values())
    if scope.masks is not None and name == "convert_element_type":
        scope.masks.take_for(plain[0], results[0])
    return results


def _plain(value: Any, operation: str, scope: Scope) -> Any:
    if isinstance(value, Factored):
        scope.report(value.name, operation)
    return dense(value)


# Operations that hold programs


def _body(program: ClosedJaxpr | Jaxpr, scope: Scope, *args: Any) -> list[Array]:
    """The results of a program within this one, plain."""
    return [_plain(out, "return", scope) for out in _run(*_opened(program), args, scope)]


def _opened(program: ClosedJaxpr | Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    return (program.jaxpr, program.consts) if isinstance(program, ClosedJaxpr) else (program, ())


def _jit(params: dict[str, Any], operands: list[Any], scope: Scope) -> list[Any]:
    """In place: a weight that goes in factored may come out so."""
    jaxpr, consts = _opened(params["jaxpr"])
    placed = map(_placed, operands, params["in_shardings"])
    return [*map(_placed, _run(jaxpr, consts, [*placed], scope), params["out_shardings"])]


def _placed(value: Any, sharding: Any) -> Any:
    """A value on the devices that an inner `jit` asks for, if it does."""
    if is_factored(value) or not isinstance(sharding, Sharding):
        return value
    return lax.with_sharding_constraint(value, sharding)


def _closed_call(params: dict[str, Any], operands: list[Any], scope: Scope) -> list[Any]:
    return _run(*_opened(params["call_jaxpr"]), operands, scope)


def _remat(params: dict[str, Any], operands: list[Any], scope: Scope) -> list[Any]:
    """Keeps what the program hands on unchanged, as NNX's does with a module: a weight in factors too."""
    jaxpr: Jaxpr = params["jaxpr"]
    came = dict(zip(jaxpr.invars, operands, strict=True))
    made = jaxpr.replace(outvars=[out for out in jaxpr.outvars if isinstance(out, Literal) or out not in came])

    def body(key: Array | None, *args: Any) -> list[Array]:
        return _body(made, scope.inside(key), *args)

    again = jax.checkpoint(body, policy=params["policy"], prevent_cse=params["prevent_cse"])
    results = iter(again(scope.key(), *operands))
    return [next(results) if isinstance(out, Literal) or out not in came else came[out] for out in jaxpr.outvars]


def _scan(params: dict[str, Any], operands: list[Any], scope: Scope) -> list[Array]:
    """Weights may be the same for every turn, or stacked, a layer for each."""
    held, carried = params["num_consts"], params["num_consts"] + params["num_carry"]
    consts, stacked = operands[:held], [_by_layer(x, scope) for x in operands[carried:]]
    start = [_plain(x, "scan's carry", scope) for x in operands[held:carried]]
    key = scope.key()
    keys = None if key is None else jax.random.split(key, params["length"])

    def body(carry: list[Array], turn: tuple[list[Any], Array | None]) -> tuple[list[Array], list[Array]]:
        layer = [x.one_layer() if isinstance(x, Factored) else x for x in turn[0]]
        outs = _body(params["jaxpr"], scope.inside(turn[1]), *consts, *carry, *layer)
        return outs[: len(start)], outs[len(start) :]

    how: dict[str, Any] = {name: params[name] for name in ("reverse", "unroll", "_split_transpose") if name in params}
    if not stacked and keys is None:  # elsewhere they say it, also where it is no number yet (jax.export)
        how["length"] = params["length"]
    carry, outs = lax.scan(body, start, (stacked, keys), **how)
    return [*carry, *outs]


def _by_layer(value: Any, scope: Scope) -> Any:
    """A value that a scan takes apart along its first axis: a factored one only if that numbers its layers."""
    return value if is_factored(value) and value.axes[0] == "l" else _plain(value, "scan", scope)


def _while(params: dict[str, Any], operands: list[Any], scope: Scope) -> list[Array]:
    asks, held = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    start = [_plain(x, "while's carry", scope) for x in operands[held:]]

    def goes_on(values: list[Array]) -> Array:
        """A truth value, or under vmap one for each row."""
        return _body(params["cond_jaxpr"], scope.inside(None), *operands[:asks], *values)[0]

    def ask(state: tuple[Array | None, list[Array]]) -> Array:
        return goes_on(state[1]).any()

    def turn(state: tuple[Array | None, list[Array]]) -> tuple[Array | None, list[Array]]:
        after, now = (None, None) if state[0] is None else jax.random.split(state[0])
        new, old = _body(params["body_jaxpr"], scope.inside(now), *operands[asks:held], *state[1]), state[1]
        if rows := jnp.ndim(params["cond_jaxpr"].out_avals[0]):  # a row that has ended stays as it is
            on = goes_on(old)
            new = [jnp.where(jnp.expand_dims(on, [*range(rows, x.ndim)]), x, y) for x, y in zip(new, old, strict=True)]
        return after, new

    return list(lax.while_loop(ask, turn, (scope.key(), start))[1])


def _branch(params: dict[str, Any], operands: list[Any], scope: Scope) -> list[Array]:
    def body(branch: ClosedJaxpr, key: Array | None, *args: Any) -> list[Array]:
        return _body(branch, scope.inside(key), *args)

    branches = [partial(body, branch) for branch in params["branches"]]
    return list(lax.switch(operands[0], branches, scope.key(), *operands[1:]))


CALLS: dict[str, Callable[[dict[str, Any], list[Any], Scope], list[Any]]] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _closed_call,
    "core_call": _closed_call,
    "checkpoint": _remat,
    "remat": _remat,
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _branch,
}
