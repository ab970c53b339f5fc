"""Memory of a compiled program, as its compiler planned it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.stages import Wrapped

from loralab.errors import UserError


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    arguments: int
    outputs: int
    temporary: int
    """Memory of the program while it runs: activations, gradients on their way."""
    shared: int
    """Outputs that take the place of donated arguments."""

    @property
    def peak(self) -> int:
        """All that is there at once. Constants in the program are not: pass weights as arguments."""
        return self.arguments + self.outputs + self.temporary - self.shared


def measure(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Memory:
    """Returns the memory that f(*args, **kwargs) takes, compiled for the default device and not run.

    A jitted f is compiled as it is, with what it donates; arguments may be `jax.ShapeDtypeStruct`s.
    """
    compiled = (f if isinstance(f, Wrapped) else jax.jit(f)).lower(*args, **kwargs).compile()
    found = compiled.memory_analysis()
    if found is None:
        raise UserError("The compiler of this device does not say what memory a program takes.")
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        temporary=found.temp_size_in_bytes,
        shared=found.alias_size_in_bytes,
    )
