"""An adapter on disk: PEFT's folder, and beside it `loralab.json`, which says what the adapter belongs to.

    adapter_config.json          PEFT's settings (format of PEFT 0.21)
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight …, in fp32
    loralab.json                 base name and fingerprint, the recipe, versions
    tokenizer files              as the tokenizer saves them

Everything here is NumPy: both engines read and write through this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from loralab.adapters.peft_config import NARROWING, NO_MODULES, read_settings
from loralab.config.lora import LoRASpec
from loralab.errors import AdapterError

Arrays = dict[str, np.ndarray]

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "loralab.json"
PREFIX = "base_model.model."
FORMAT = 1  # of loralab.json

# Our names for the parts of an update -> PEFT's, for linear maps and for embeddings.
LINEAR_PARTS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
EMBEDDING_PARTS = {"A": "lora_embedding_A", "B": "lora_embedding_B", "magnitude": "lora_magnitude_vector"}
PART_OF = {suffix: part for parts in (LINEAR_PARTS, EMBEDDING_PARTS) for part, suffix in parts.items()}
PART_OF["lora_magnitude_vector.weight"] = "magnitude"  # older PEFT


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as arrays."""

    spec: LoRASpec
    updates: dict[str, Arrays]
    """Module -> {"A": [r, in], "B": [out, r], "magnitude": [out] with DoRA}."""
    tuned: Arrays
    """Parameters of the base that the adapter replaces whole, by their names in the base."""
    embeddings: frozenset[str] = frozenset()
    """Names of the updated modules that are embeddings."""
    transposed: bool = False
    """True if updated modules store their weight as [in, out] (GPT-2)."""
    base_name: str | None = None
    task_type: str | None = None
    targets: tuple[str, ...] | str | None = None
    """PEFT's `target_modules` as read: suffixes, or one regular expression. None when writing: they are worked out from the updates."""
    card: dict[str, Any] = field(default_factory=dict)
    """Content of loralab.json; empty for an adapter made elsewhere."""


# Writing


def write_adapter(folder: Path, adapter: AdapterFiles) -> None:
    """Writes the three files into an existing folder."""
    settings = dict(sorted(peft_config(adapter).items()))  # but patterns in their own order: the first match wins
    config = json.dumps(settings, indent=2)
    (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
    safetensors.numpy.save_file(peft_tensors(adapter), folder / WEIGHTS, metadata={"format": "pt"})
    write_card(folder, adapter.card)


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Writes loralab.json: of an adapter, or of a model that was trained whole.

    Args:
        card: all that inference needs beside the weights: recipe, lengths, labels.
    """
    (folder / CARD).write_text(json.dumps({"format": FORMAT, **card}, indent=2) + "\n", encoding="utf-8")


def peft_tensors(adapter: AdapterFiles) -> Arrays:
    """All arrays under PEFT's keys, fp32 and contiguous."""
    tensors: Arrays = {}
    for module, arrays in adapter.updates.items():
        parts = EMBEDDING_PARTS if module in adapter.embeddings else LINEAR_PARTS
        tensors |= {f"{module}.{parts[part]}": array for part, array in arrays.items()}
    for name, array in adapter.tuned.items():
        module, _, leaf = name.rpartition(".")
        tensors[f"{module}.base_layer.{leaf}" if module in adapter.updates else name] = array
    return {PREFIX + key: np.ascontiguousarray(array, dtype=np.float32) for key, array in tensors.items()}


def peft_config(adapter: AdapterFiles) -> dict[str, Any]:
    """PEFT's adapter_config.json."""
    spec, modules = adapter.spec, list(adapter.updates)
    modules_to_save, bias = _tuned_settings(adapter)
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_name,
        "r": spec.rank,
        "lora_alpha": _alpha_for(spec, spec.scale_of(""), spec.rank) if spec.alpha is None else spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": _target_modules(spec, modules),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": _alpha_pattern(spec, modules),
        "modules_to_save": modules_to_save or None,
        "bias": bias,
        "fan_in_fan_out": adapter.transposed,
        "use_rslora": spec.use_rslora,
        "use_dora": spec.use_dora,
        "init_lora_weights": "gaussian" if spec.init == "gaussian" else True,
        "inference_mode": True,
    }


def _target_modules(spec: LoRASpec, modules: list[str]) -> list[str] | str:
    """The rules as they are where they are suffixes that PEFT reads as we do; else every module by its name."""
    if not modules:
        return NO_MODULES
    rules = list(spec.rules or ())
    plain = rules and all(re.fullmatch(r"[\w.]+", rule) and rule != "all-linear" for rule in rules)
    covered = plain and all(_is_suffix(rules, module) for module in modules)
    return sorted(rules) if covered else modules


def _alpha_for(spec: LoRASpec, scale: float, rank: int) -> float:
    """The alpha that gives this scale: `alpha: null` has no spelling in PEFT."""
    return scale * (rank**0.5 if spec.use_rslora else rank)


def _alpha_pattern(spec: LoRASpec, modules: list[str]) -> dict[str, float]:
    if spec.alpha is not None or not spec.rank_pattern:
        return dict(spec.alpha_pattern)
    return {
        "^" + re.escape(module): _alpha_for(spec, spec.scale_of(module), spec.rank_of(module)) for module in modules
    }


def _tuned_settings(adapter: AdapterFiles) -> tuple[list[str], str]:
    """PEFT's `modules_to_save` and `bias` for the parameters that the adapter replaces."""
    roots = adapter.spec.modules_to_save
    modules = sorted({_root(name, roots) for name in adapter.tuned})
    biases_only = [
        module
        for module in modules
        if {name for name in adapter.tuned if name.rpartition(".")[0] == module} == {f"{module}.bias"}
    ]
    whole = [module for module in modules if module not in biases_only]
    if not biases_only:
        return whole, "none"
    return whole, "lora_only" if set(biases_only) <= set(adapter.updates) else "all"


def _root(name: str, roots: Iterable[str]) -> str:
    """The module that a parameter is saved with: one that the settings name, or else its own."""
    return next((root for root in roots if name.startswith(root + ".")), name.rpartition(".")[0])


# Reading


def read_adapter(folder: str | Path) -> AdapterFiles:
    """Reads an adapter of ours or of PEFT's.

    Raises:
        AdapterError: a file is missing or damaged, a value is NaN or infinite, or the adapter uses something that we do not compute.
    """
    folder = Path(folder)
    config = _read_json(folder / CONFIG, "an adapter's folder holds adapter_config.json and adapter_model.safetensors")
    spec = read_settings(config, folder)
    arrays = _read_tensors(folder / WEIGHTS)
    check_finite({name: bool(np.isfinite(array).all()) for name, array in arrays.items()}, str(folder / WEIGHTS))
    updates, tuned, embeddings = _sort_tensors(arrays, folder)
    targets = () if config.get("target_modules") == NO_MODULES else config.get("target_modules") or ()
    if any(config.get(key) not in (None, []) for key in NARROWING):
        targets = tuple(updates)
        spec = spec.model_copy(update={"rules": targets})
    return AdapterFiles(
        spec=spec,
        updates=updates,
        tuned=tuned,
        embeddings=embeddings,
        transposed=bool(config.get("fan_in_fan_out")),
        base_name=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
        targets=targets if isinstance(targets, str) else tuple(targets),
        card=read_card(folder),
    )


def read_card(folder: Path) -> dict[str, Any]:
    """Our own file beside PEFT's, or nothing where there is none. Raises AdapterError where it is damaged."""
    card = _read_json(folder / CARD, "") if (folder / CARD).exists() else {}
    base = card.get("base", {})
    if not isinstance(base, dict) or not _holds_samples(base.get("fingerprint")):
        raise AdapterError(f"{folder / CARD} is damaged: {base!r:.200} is no description of a base.")
    for key, needed in (("recipe", {"name"}), ("labels", {"names", "values", "multi"})):
        block = card.get(key)
        if block is not None and not (isinstance(block, dict) and needed <= block.keys()):
            raise AdapterError(f"{folder / CARD} is damaged: under {key!r} stands {block!r:.200}.")
    return card


def _holds_samples(fingerprint: object) -> bool:
    """Tells whether it is a fingerprint (fingerprint.py), or none."""
    if not isinstance(fingerprint, dict):
        return fingerprint is None
    return all(isinstance(each, dict) and {"shape", "values"} <= each.keys() for each in fingerprint.values())


def read_file_tensors(path: Path) -> Arrays:
    """Every tensor of a safetensors file as fp32; NumPy itself knows no bf16."""
    return {name: _to_float32(tensor) for name, tensor in safetensors.deserialize(path.read_bytes())}


def _to_float32(tensor: Mapping[str, Any]) -> np.ndarray:
    shape, data, dtype = tensor["shape"], tensor["data"], tensor["dtype"]
    if dtype == "BF16":
        bits = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    known = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
    if dtype not in known:
        raise AdapterError(f"An adapter's tensors are F32, F16, BF16 or F64; this one is {dtype}.")
    return np.frombuffer(data, known[dtype]).astype(np.float32).reshape(shape)


def missing_modules(adapter: AdapterFiles, names: Iterable[str]) -> list[str]:
    """Returns the wrappable modules of a base that `target_modules` selects and the file has nothing for. PEFT gives no LoRA to
    what it trains whole."""
    if adapter.targets is None or not adapter.targets:
        return []
    whole = [re.compile(rf"(.*\.)?{re.escape(module)}($|\.)") for module in adapter.spec.modules_to_save]
    missing = (name for name in names if name not in adapter.updates and selects(adapter.targets, name))
    return [name for name in missing if not any(pattern.match(name) for pattern in whole)]


def selects(targets: tuple[str, ...] | str, name: str) -> bool:
    """PEFT's `target_modules`: one regular expression for the whole name, or suffixes of whole components."""
    if not isinstance(targets, str):
        return _is_suffix(targets, name)
    try:
        return re.fullmatch(targets, name) is not None
    except re.error as error:
        raise AdapterError(f"{targets!r} in the adapter's target_modules is no regular expression: {error}.") from error


def _is_suffix(targets: Iterable[str], name: str) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def check_finite(finite: Mapping[str, bool], what: str) -> None:
    """Raises AdapterError where a tensor holds values that are NaN or infinite.

    Args:
        finite: of each tensor by name, True where all its values are finite.
        what: the adapter or its file, for the message.
    """
    if damaged := [name for name, is_finite in finite.items() if not is_finite]:
        raise AdapterError(
            f"{what} holds NaN or infinite values in {len(damaged)} of {len(finite)} tensors, such as {damaged[0]}: "
            "its training diverged, or the file is damaged. Use an earlier checkpoint, or train again at a lower learning rate."
        )


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    if not path.exists():
        raise AdapterError(f"{path} does not exist; {hint}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path} holds {type(content).__name__}, not an object.")
    return content


def _read_tensors(path: Path) -> Arrays:
    if not path.exists():
        pickled = path.with_name("adapter_model.bin").exists()
        hint = (
            " adapter_model.bin is a pickle, which may run code when read: save it again as safetensors."
            if pickled
            else ""
        )
        raise AdapterError(f"{path} does not exist.{hint}")
    try:
        return read_file_tensors(path)
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path} is damaged or cut off: {error}.") from error


def _sort_tensors(arrays: Arrays, folder: Path) -> tuple[dict[str, Arrays], Arrays, frozenset[str]]:
    """File keys -> updates, replaced parameters, and which updates are of embeddings."""
    updates: dict[str, Arrays] = {}
    tuned: Arrays = {}
    embeddings = set()
    for key, array in arrays.items():
        name = key.removeprefix(PREFIX)
        suffix = next((suffix for suffix in PART_OF if name.endswith("." + suffix)), None)
        if suffix:
            module = name[: -len(suffix) - 1]
            updates.setdefault(module, {})[PART_OF[suffix]] = array
            if suffix in EMBEDDING_PARTS.values() and suffix not in LINEAR_PARTS.values():
                embeddings.add(module)
        elif "lora_" in name:
            raise AdapterError(f"{folder} holds {key!r}, a part of LoRA that loralab does not know.")
        elif ".original_module." not in f".{name}":
            tuned[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = array
    for module, parts in updates.items():
        if absent := {"A", "B"} - set(parts):
            raise AdapterError(
                f"{folder} holds no {LINEAR_PARTS[absent.pop()]} for {module!r}: the file is incomplete."
            )
    return updates, tuned, frozenset(embeddings)
