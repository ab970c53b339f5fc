"""The random streams of the CPU and of the accelerators: kept in checkpoints, and drawn again where activations are recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PLAIN_CHECKPOINT = getattr(
    checkpoint, "__wrapped__", checkpoint
)  # its wrapper imports the compiler, a second at its first use


def random_state() -> dict[str, Tensor]:
    """The states of all streams: the CPU's, every CUDA GPU's, Apple's GPU's."""
    streams = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        streams |= {f"random.cuda.{i}": stream for i, stream in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        streams["random.mps"] = torch.mps.get_rng_state()
    return streams


def set_random_state(state: dict[str, Tensor]) -> None:
    """Goes back to what `random_state` gave. Streams that it lacks, as those of a run on another machine, stay as they are."""
    torch.set_rng_state(state["random.cpu"])
    if torch.cuda.is_available() and "random.cuda.0" in state:
        torch.cuda.set_rng_state_all([state[f"random.cuda.{i}"] for i in range(torch.cuda.device_count())])
    if torch.backends.mps.is_available() and "random.mps" in state:
        torch.mps.set_rng_state(state["random.mps"])


def checkpointed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what the function gives; its activations are computed again in the backward pass, with the same draws, instead of kept."""
    return PLAIN_CHECKPOINT(function, *arguments, use_reentrant=False, context_fn=same_draws)


def checkpoint_settings() -> dict[str, Any]:
    """Returns the same as the arguments that Transformers hands on to PyTorch."""
    return {"use_reentrant": False, "context_fn": same_draws}


def same_draws() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """(around a forward pass, around its repetition): PyTorch repeats the draws of the CPU and of CUDA, but not those of Apple's GPU.

    Without it dropout would drop other elements in the repetition, and gradients would be wrong.
    """
    if not torch.backends.mps.is_available():
        return nullcontext(), nullcontext()
    return nullcontext(), _drawing_from(torch.mps.get_rng_state())


@contextmanager
def _drawing_from(state: Tensor) -> Iterator[None]:
    """Apple's stream at this state; afterwards at the one that it had."""
    before = torch.mps.get_rng_state()
    torch.mps.set_rng_state(state)
    try:
        yield
    finally:
        torch.mps.set_rng_state(before)
