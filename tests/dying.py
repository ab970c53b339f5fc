"""A training that dies in the middle, in this process: what lies on disk is what a kill leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loralab.config.recipe import Recipe
from loralab.training import loop
from loralab.training.train import train


def train_until(step: int, recipe: Recipe, out: Path) -> None:
    """Trains, and dies before the step after this one."""
    take = loop._take

    def dying(*arguments: Any) -> Any:
        if arguments[4].step == step:
            raise KeyError("killed")
        return take(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(loop, "_take", dying)
        train(recipe, out)
