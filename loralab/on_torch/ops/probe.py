"""Operations that not every build of PyTorch and not every processor has: each is tried once, before its first use.

Where one is missing, fails or gives wrong numbers, a plain operation of PyTorch takes its place, and one line says so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Tolerance as a share of the largest number: sums in another order; two roundings to 8 bits."""
CPU = torch.device("cpu")

Trial = Callable[[torch.dtype, torch.device], tuple[Tensor, Tensor]]


class Probe:
    """One operation, and what is known of it on this machine."""

    def __init__(self, name: str, instead: str, trial: Trial) -> None:
        """
        Args:
            name: what the operation is called in messages; `instead`: what takes its place.
            trial: (what a small call of the operation gives, what it must give).
        """
        self.name, self.instead, self.trial = name, instead, trial
        self._known: dict[tuple[torch.dtype, torch.device], bool] = {}

    def works(self, dtype: torch.dtype, device: torch.device = CPU) -> bool:
        """Tells whether the operation gives the right numbers here; tried when first asked, and then known."""
        known = self._known.get((dtype, device))
        if known is None:
            failure = self._try(dtype, device)
            known = self._known[dtype, device] = failure is None
            if failure is not None:
                kind = str(dtype).removeprefix("torch.")
                logging.getLogger("loralab").warning(
                    f"{self.name} does not work in {kind} on this {device.type} ({failure}); {self.instead}."
                )
        return known

    def _try(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why the operation does not work, in one line. In a thread of its own, where no mode of the caller's (inference,
        autocast, counters of operations) is at work."""
        failures: list[str] = []

        def run() -> None:
            try:
                with torch.no_grad():
                    found, wanted = (each.float() for each in self.trial(dtype, device))
                    apart = float((found - wanted).abs().max() / wanted.abs().max())
                if not apart <= TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]):
                    failures.append(f"its result is off by {apart:.1g} of the largest number")
            except Exception as error:  # a missing operation, an unsupported processor: each raises its own
                failures.append(next(iter(str(error).strip().splitlines()), type(error).__name__))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return failures[0] if failures else None


def trial_numbers(*shape: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """Small known numbers that every dtype holds exactly; no random stream is touched."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 5 % 11 - 5) / 4).view(shape).to(device, dtype)
