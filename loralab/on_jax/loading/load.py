"""T5 from a folder in Hugging Face's layout, or a hub id, to a dictionary of arrays; and back to a folder.

Only safetensors files are read, tensor by tensor, cast on the way in; each key of the files is used exactly once. How Hugging
Face's names and shapes become the dictionary's stands in names.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from loralab.atomic_files import whole_folder
from loralab.errors import ModelError, nearest
from loralab.models.checkpoint_files import (
    SAFETENSORS,
    check_shapes,
    check_tokens,
    copy_configs,
    load_tokenizer,
    model_folder,
    open_file,
    read_config,
    weight_files,
)
from loralab.models.t5 import drop_copies, parse_config
from loralab.on_jax.models.t5 import T5
from loralab.on_jax.models.t5_layers import Params
from loralab.on_jax.names import check_params, from_hugging_face, to_hugging_face

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16")


def load_model(name: str, dtype: str = "auto") -> tuple[T5, dict[str, Any], PreTrainedTokenizerBase]:
    """A T5, its weights on JAX's default device, and its tokenizer.

    Args:
        name: a folder, or a hub id such as google/flan-t5-small.
        dtype: "float32", "bfloat16", or "auto": float32 on a CPU, else bfloat16.

    Raises:
        ModelError: the folder or one of its files is missing, damaged, no T5, or not what its config says.
    """
    folder = model_folder(name)
    model, params = load_weights(folder, choose_dtype(dtype))
    tokenizer = load_tokenizer(folder)
    check_tokens(model.config.vocab_size, tokenizer, folder)
    return model, params, tokenizer


def choose_dtype(dtype: str) -> np.dtype[Any]:
    """Returns what `dtype` means on this machine."""
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}, auto. {nearest(dtype, DTYPES)}")
    return jnp.dtype(dtype)


def load_weights(folder: Path, dtype: np.dtype[Any] | None = None) -> tuple[T5, dict[str, Any]]:
    """The T5 of a folder; a dtype of None keeps the one on disk. Its head is `lm_head` iff the files have one."""
    config = read_config(folder)
    if config.get("model_type") != "t5":
        raise ModelError(
            f"{folder} holds a model of the type {config.get('model_type')!r}; on JAX loralab has T5 alone. "
            "For other models pass your own function and weights to lora_init."
        )
    tensors = read_weights(folder, dtype)
    drop_copies(tensors, folder, np.array_equal)
    model = T5(parse_config(config))
    expected = model.shapes(own_head="lm_head.weight" in tensors)
    check_shapes(expected, {name: array.shape for name, array in tensors.items()}, folder)
    params: dict[str, Any] = jax.tree.map(jnp.asarray, from_hugging_face(tensors))
    return model, params


def read_weights(folder: Path, dtype: np.dtype[Any] | None) -> dict[str, np.ndarray]:
    """Every tensor of the folder's weight files under its name there."""
    tensors = {}
    for shard in weight_files(folder):
        if shard.suffix != ".safetensors":
            raise ModelError(
                f"{shard} is a pickle, which only PyTorch reads. Write it as {SAFETENSORS}: "
                "load it with Transformers and `save_pretrained` it into another folder."
            )
        with open_file(shard) as file:
            for name in file.keys():  # noqa: SIM118 (a file, not a dict)
                tensor = file.get_tensor(name)
                tensors[name] = tensor if dtype is None else tensor.astype(dtype)
    return tensors


def save_model(
    folder: str | Path, model: T5, params: Params, base_name: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Writes weights in Hugging Face's layout, and the tokenizer beside them where one is given.

    Args:
        params: plain weights, such as `merge_fn` gives.
        base_name: the folder or hub id that the base was loaded from; the configs are those of there.

    Raises:
        UserError: there is no such base; params are no weights, or not this model's.
    """
    check_params(params)
    source, folder = model_folder(str(base_name)), Path(folder)
    weights = {name: np.ascontiguousarray(array) for name, array in to_hugging_face(params).items()}
    check_shapes(model.shapes("lm_head" in params), {name: array.shape for name, array in weights.items()}, folder)
    with whole_folder(folder) as part:
        save_file(weights, part / SAFETENSORS, metadata={"format": "pt"})
        copy_configs(source, part, dtype=str(weights["shared.weight"].dtype))
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
