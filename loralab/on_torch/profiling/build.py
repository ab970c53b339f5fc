"""A model from its settings alone, without files: on the meta device to be traced, or on a real one with random weights to be timed."""

from __future__ import annotations

import torch
from torch import nn

from loralab.models.lookup import Base
from loralab.on_torch.models.registry import family_for

META = torch.device("meta")


def build(base: Base, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model of these settings, in this dtype; on the meta device it has no numbers.

    Raises:
        ModelError: there is no such class.
    """
    config = {**base.config, "model_type": base.family}
    return family_for(config, classifies=base.labels is not None).build(base, dtype, device)
