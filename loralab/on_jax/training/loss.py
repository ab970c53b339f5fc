"""Cross-entropy of each target token, in fp32 or better.

Label smoothing ε as in Szegedy et al. 2016 (https://arxiv.org/abs/1512.00567): (1 − ε) · −log p(label) + ε · mean over
the vocabulary of −log p.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

IGNORED = -100  # a label that stands for padding


def token_losses(logits_BTV: Array, labels_BT: Array, smoothing: float = 0.0) -> Array:
    """[B, T], in nats; zero where the label is −100."""
    logits_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
    real_BT = labels_BT != IGNORED
    places_BT1 = jnp.where(real_BT, labels_BT, 0)[..., None]
    total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    losses_BT = total_BT - jnp.take_along_axis(logits_BTV, places_BT1, axis=-1)[..., 0]
    if smoothing:
        losses_BT = (1 - smoothing) * losses_BT + smoothing * (total_BT - logits_BTV.mean(-1))
    return jnp.where(real_BT, losses_BT, 0.0)
