"""Base and adapter as one plain model in a folder: sums in fp32, rounded once to the dtype that the base has on disk.

The base is read from its own full-precision files, whatever the adapter was trained on. Where files have
each parameter as it is (a T5's), one shard at a time is in memory, so that a model may be larger than that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loralab.adapters.files import write_card
from loralab.atomic_files import whole_folder
from loralab.models.checkpoint_files import INDEX, SAFETENSORS, copy_configs, load_tokenizer, model_folder
from loralab.on_torch.adapters.adapter_io import load_adapter
from loralab.on_torch.adapters.attach import Adapter
from loralab.on_torch.adapters.base import base_parameters, plain_modules
from loralab.on_torch.loading.classifier import fitted_labels, load_classifier, stored_labels
from loralab.on_torch.loading.load import load_weights, save_model
from loralab.on_torch.models.registry import family_of
from loralab.on_torch.ops.linear import dense_weight, is_transposed

SHARD = 5 * 10**9  # bytes: what Transformers takes


def merge_folder(base: str, adapter: Path, out: Path) -> str:
    """Writes the merged model, with the adapter's tokenizer, or else the base's; gives the dtype that it is written in."""
    folder, labels, cpu = model_folder(base), stored_labels(adapter), torch.device("cpu")
    if labels is None:
        model = load_weights(folder, None, cpu)  # mapped
    else:
        labels, keep = fitted_labels(labels, folder)
        model, _ = load_classifier(folder, labels, keep, None, cpu, seed=0)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    model.name_or_path = base  # type: ignore[assignment]
    loaded = load_adapter(model, adapter)
    tokenizer = load_tokenizer(adapter if (adapter / "tokenizer_config.json").exists() else folder)
    with whole_folder(out) as part:
        if family_of(model).files_hold_parameters:
            write_merged(loaded, part)
            copy_configs(folder, part, dtype)
            tokenizer.save_pretrained(part)
        else:
            save_model(loaded.merge(), part, folder, tokenizer)
        if labels is not None:
            write_card(part, {"labels": labels.as_json()})
    return dtype


def write_merged(adapter: Adapter, folder: Path) -> None:
    """Writes the merged weights under the names of their modules, in files of at most SHARD bytes or one tensor, with an index
    where there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    plain, modules = base_parameters(adapter.model), plain_modules(adapter.model)
    shards = list(_shards({name: parameter.nbytes for name, parameter in plain.items()}))
    files = [f"model-{place:05}-of-{len(shards):05}.safetensors" for place in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SAFETENSORS]
    for file, names in zip(files, shards, strict=True):
        weights = {name: merged_weight(adapter, name, plain[name].detach(), modules) for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        size = sum(parameter.nbytes for parameter in plain.values())
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    names, held = list[str](), 0
    for name, size in sizes.items():
        if names and held + size > SHARD:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


@torch.no_grad()
def merged_weight(adapter: Adapter, name: str, own: Tensor, modules: dict[str, nn.Module]) -> Tensor:
    """The merged weight of this name, as the base stores its `own`."""
    module, _, leaf = name.rpartition(".")
    if name in adapter.tuned:
        return adapter.tuned[name].detach().to(own.dtype)
    if leaf != "weight" or module not in adapter.updates:
        return own.contiguous()
    base = modules[module]
    merged_OI = adapter.updates[module].merged(dense_weight(base))
    stored = merged_OI.T if is_transposed(base) or isinstance(base, nn.Embedding) else merged_OI
    return stored.to(own.dtype).contiguous()
