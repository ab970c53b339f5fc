"""An adapter of our T5 on disk, PEFT's folder as `loralab/adapters/files.py` writes and reads it: from what `lora_init` trains, and
back. PyTorch is not needed for either."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loralab.adapters import files
from loralab.adapters.compatibility import BaseDescription, check_compatibility
from loralab.adapters.files import AdapterFiles
from loralab.adapters.fingerprint import Fingerprint, take
from loralab.adapters.target_modules import refuse_shared
from loralab.atomic_files import whole_folder
from loralab.config.lora import LoRASpec, pattern_matches
from loralab.errors import AdapterError
from loralab.on_jax.adapters.lora import Trainable, adapt
from loralab.on_jax.adapters.weights import weights_of_tree
from loralab.on_jax.models.t5 import T5
from loralab.on_jax.models.t5_layers import Params
from loralab.on_jax.names import as_on_disk, leaves, name_on_disk, transposed


def save_adapter(
    folder: str | Path,
    model: T5,
    params: Params,
    spec: LoRASpec,
    trainable: Trainable,
    base_name: str | None = None,
    tokenizer: Any = None,
) -> None:
    """Writes PEFT's folder with our `loralab.json`, and the tokenizer beside it where one is given.

    Args:
        params: the base's weights, as they were given to `lora_init`.
        base_name: the folder or hub id that the base was loaded from; PEFT's users look there for it.

    Raises:
        AdapterError: the model is no T5 of ours; the spec is disabled, so that there is nothing that PEFT's files could hold; or
            trainable is not of this spec.
        TargetError: the spec changes the embedding, see `why_not_shared`.
    """
    content = adapter_arrays(model, params, spec, trainable, base_name)
    with whole_folder(Path(folder)) as part:
        files.write_adapter(part, content)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)


def adapter_arrays(
    model: T5, params: Params, spec: LoRASpec, trainable: Trainable, base_name: str | None = None
) -> AdapterFiles:
    """The adapter as arrays."""
    _refuse_others(model)
    if spec.disabled:
        raise AdapterError(
            "LoRASpec(disabled=True) trains the whole model: there is no adapter. Save it with save_model."
        )
    adapt(spec, model.forward, params).check(trainable)
    updates = {name: parts for name, parts in trainable.items() if isinstance(parts, dict)}
    tuned = {
        name_on_disk(path): _array(as_on_disk(path, array)) for path, array in trainable.items() if path not in updates
    }
    refuse_shared(updates, tuned, model.shared_parameters)
    base = _base(model, params, base_name)
    return AdapterFiles(
        spec=spec,
        updates={name: {part: _array(array) for part, array in parts.items()} for name, parts in updates.items()},
        tuned=tuned,
        embeddings=frozenset(
            w.module for w in weights_of_tree(params, {}) if w and w.embedding and w.module in updates
        ),
        base_name=base_name,
        task_type="SEQ_2_SEQ_LM",
        card={
            "base": {
                "name": base_name,
                "fingerprint": base.fingerprint(name for name in base.parameters if name not in tuned),
            },
        },
    )


def _refuse_others(model: Any) -> None:
    if not isinstance(model, T5):
        raise AdapterError(
            f"An adapter's folder is for the T5 that load_model gives, whose modules PEFT knows; got {type(model).__name__}. "
            "Of any other function keep what lora_init trains, for example with orbax."
        )


def load_adapter(folder: str | Path, model: T5, params: Params) -> tuple[LoRASpec, Trainable]:
    """An adapter from disk, ours or PEFT's: the spec for `lora_init` with the same weights, and what it trained.

    Raises:
        AdapterError: the adapter was trained on another base; it has too many or too few tensors for this one; a shape does not
            fit; it has LoRA on a weight that it replaces; it changes the embedding.
    """
    _refuse_others(model)
    stored = check_compatibility(files.read_adapter(folder), _base(model, params), folder)
    if not stored.updates:
        raise AdapterError(f"{folder} holds no update of LoRA's, only parameters that it replaces; PyTorch loads it.")
    whole = {name.rpartition(".")[0] for name in stored.tuned}
    if both := sorted(whole & set(stored.updates)):
        raise AdapterError(f"{folder} replaces the weight of {both[0]!r} and has LoRA on it too; PyTorch loads it.")
    spec = _exact(stored, whole)
    start = adapt(spec, model.forward, params).start(params)
    trainable: Trainable = jax.tree.map(
        lambda old, new: jnp.asarray(new, old.dtype), {name: start[name] for name in stored.updates}, stored.updates
    )
    for path in start:
        if path not in stored.updates:
            trainable[path] = jnp.asarray(as_on_disk(path, stored.tuned[name_on_disk(path)]), start[path].dtype)
    return spec, trainable


def _exact(stored: AdapterFiles, whole: Iterable[str]) -> LoRASpec:
    """The settings, with the rules for what the file holds and nothing else."""
    spec = stored.spec

    def that_match(patterns: Mapping[str, Any]) -> dict[str, Any]:
        return {p: value for p, value in patterns.items() if any(pattern_matches(p, name) for name in stored.updates)}

    exact = {
        "rules": tuple(stored.updates),
        "modules_to_save": tuple(sorted(whole)),
        "bias": "none",
        "rank_pattern": that_match(spec.rank_pattern),
        "alpha_pattern": that_match(spec.alpha_pattern),
    }
    return spec.model_copy(update=exact)


def _base(model: T5, params: Params, name: str | None = None) -> BaseDescription:
    found = {name_on_disk(path): (path, array) for path, array in leaves(params)}
    shapes = {
        key: tuple(array.shape[::-1] if transposed(path) else array.shape) for key, (path, array) in found.items()
    }
    maps = {
        weight.module: (weight.shape[weight.axes.index("o")], weight.shape[weight.axes.index("i")])
        for weight in weights_of_tree(params, {})
        if weight is not None and weight.axes is not None
    }

    def fingerprint(names: Iterable[str]) -> Fingerprint:
        return take({key: shapes[key] for key in names if key in shapes}, values)

    def values(key: str, positions: np.ndarray) -> list[float]:
        (path, array), places = found[key], np.unravel_index(positions, shapes[key])
        chosen = array[places[::-1] if transposed(path) else places]
        return list(map(float, np.asarray(chosen)))  # one copy from the device, and not one for each value

    def holds(key: str, values: np.ndarray) -> bool:
        path, array = found[key]
        weight = as_on_disk(path, array)
        rounded = [weight.astype(dtype).astype(jnp.float32) for dtype in (weight.dtype, jnp.bfloat16, jnp.float16)]
        same = (values.astype(weight.dtype) == weight).all() or any((each == values).all() for each in rounded)
        return bool(same)

    return BaseDescription(name or "T5 in JAX", maps, shapes, fingerprint, model.shared_parameters, holds)


def _array(array: Any) -> np.ndarray:
    return np.asarray(array, np.float32)
