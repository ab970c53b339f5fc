"""Between Hugging Face's names of weights and a nested dictionary of arrays.

    encoder.block.0.layer.0.SelfAttention.q.weight [out, in]  <->  {"encoder": {… {"q": {"kernel": [in, out]}}}}

The last component says how an array lies: `kernel` is a matrix transposed, `embedding` and `weight` are as on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from loralab.errors import UserError
from loralab.on_jax.adapters.weights import dotted

EMBEDDINGS = ("shared", "relative_attention_bias")


def from_hugging_face(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The nested dictionary of a file's tensors."""
    params: dict[str, Any] = {}
    for name, array in tensors.items():
        *modules, leaf = name.split(".")
        if leaf == "weight" and array.ndim == 2:
            leaf = "embedding" if modules[-1] in EMBEDDINGS else "kernel"
        place = params
        for module in modules:
            place = place.setdefault(module, {})
        place[leaf] = array.T if leaf == "kernel" else array
    return params


def check_params(params: Any) -> None:
    """Raises UserError where this is no T5's weights; what was trained on them stands often in their place."""
    if isinstance(params, Mapping) and "encoder" in params:
        return
    found = ", ".join(map(str, params)) if isinstance(params, Mapping) else repr(params)
    raise UserError(
        f"params must be a T5's weights, and not {found[:60] or 'empty'}. Of an adapted model give what merge_fn makes of what was trained."
    )


def to_hugging_face(params: Any) -> dict[str, np.ndarray]:
    """The dictionary's arrays under Hugging Face's names, lying as there."""
    return {name_on_disk(path): as_on_disk(path, np.asarray(array)) for path, array in leaves(params)}


def leaves(params: Any) -> list[tuple[str, Any]]:
    """Each array with its path, the components joined by dots."""
    return [(dotted(path), array) for path, array in jax.tree_util.tree_flatten_with_path(params)[0]]


def name_on_disk(path: str) -> str:
    """Hugging Face's name of the array of this path."""
    module, _, leaf = path.rpartition(".")
    return f"{module}.weight" if leaf in ("kernel", "embedding") else path


def as_on_disk(path: str, array: Any) -> Any:
    """The array of this path as Hugging Face has it; and of one of theirs, as we have it."""
    return array.T if transposed(path) else array


def transposed(path: str) -> bool:
    """Tells whether the two lie the other way round."""
    return path.endswith(".kernel")
