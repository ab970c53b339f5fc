"""Transformers' sequence classifiers: from a base with or without a head to a model with the data's labels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.adapters import files
from loralab.errors import ModelError
from loralab.metrics.labels import Labels, RegressionOutput, aligned
from loralab.models.checkpoint_files import read_config, weight_files
from loralab.models.pretrained import from_pretrained
from loralab.on_torch.loading.weights import quiet_transformers
from loralab.on_torch.models.classifier import MULTI, REGRESSION
from loralab.on_torch.models.heads import head_parameters
from loralab.on_torch.ops.onednn_linear import by_onednn
from loralab.on_torch.quantization.quantize import Quantization, load_quantized

# The matrix that gives the logits: of a single layer, or of a head of several, as RoBERTa's and BART's.
LAST_OF_HEAD = re.compile(r"(^|\.)(classifier|score|out_proj)\.weight$")


def base_labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels of the head that a folder's files hold, in its order; None where they hold none."""
    if not str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification"):
        return None
    named: dict[str, str] = config.get("id2label") or {}
    count = len(named) or int(config.get("num_labels") or 2)
    return tuple(str(named.get(str(place), f"LABEL_{place}")) for place in range(count))


def stored_labels(folder: Path) -> Labels | None:
    """The labels that a saved adapter or a model brings along; None where it brings none."""
    if labels := files.read_card(folder).get("labels"):
        return Labels.from_json(labels)
    if (folder / files.CONFIG).exists():
        return _labels_by_shape(folder)
    if not (folder / "config.json").exists():
        return None
    config = read_config(folder)
    names = base_labels(config)
    return None if names is None else _labels(names, config)


def _labels_by_shape(folder: Path) -> Labels | None:
    """Returns labels for an adapter made elsewhere, which has no names: one for each output of the head in it."""
    stored = files.read_adapter(folder)
    last = [array for name, array in stored.tuned.items() if LAST_OF_HEAD.search(name)]
    if stored.task_type != "SEQ_CLS" or not last:
        return None
    names = tuple(f"LABEL_{place}" for place in range(len(last[0])))
    return _labels(names, {})


def _labels(names: tuple[str, ...], config: Mapping[str, Any]) -> Labels:
    """Returns the labels of a head with these names. A single output gives a number, as Transformers takes it."""
    if config.get("problem_type") == REGRESSION or len(names) == 1:
        return RegressionOutput()
    return Labels(names, _numbers(names), config.get("problem_type") == MULTI)


def _numbers(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The places of labels, by which data may name them too."""
    return tuple((str(place), name) for place, name in enumerate(names) if str(place) not in names)


def fitted_labels(labels: Labels | None, folder: Path) -> tuple[Labels, bool]:
    """(the labels, in the order and with the names of the base's head where they are the same; whether its head can be kept).

    Raises:
        ModelError: nobody says what the labels are.
    """
    config = read_config(folder)
    base = base_labels(config)
    if labels is None:
        if base is None:
            raise ModelError(f"{folder} has no head for labels, and there are no rows that say what they are.")
        return _labels(base, config), True
    if isinstance(labels, RegressionOutput):
        return labels, base is not None and isinstance(_labels(base, config), RegressionOutput)
    kept = None if base is None else aligned(labels, base)
    return (labels, False) if kept is None else (kept, True)


def load_classifier(
    folder: Path,
    labels: Labels,
    keep_head: bool,
    dtype: torch.dtype | None,
    device: torch.device,
    seed: int,
    how: Quantization | None = None,
) -> tuple[nn.Module, list[str]]:
    """A base as a classifier of these labels, and the parameters of its head that the files lack, which are random.

    Args:
        how: the linear maps below the head in fewer bits.

    Raises:
        ModelError: the files are damaged, or lack more than a head.
    """
    from transformers import AutoModelForSequenceClassification

    if how is not None:
        assert dtype is not None, "a packed base needs a dtype to compute in"
        lacks: list[str] = []

        def load(dtype: torch.dtype | None, device: torch.device) -> nn.Module:
            model, lacks[:] = load_classifier(folder, labels, keep_head, dtype, device, seed)
            return model

        return load_quantized(load, dtype, device, how), lacks
    weight_files(folder)
    names = dict(enumerate(labels.names))
    torch.manual_seed(seed)
    try:
        with quiet_transformers(warnings=False):
            model, found = from_pretrained(
                AutoModelForSequenceClassification, folder,
                dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True,
                num_labels=len(names), id2label=names, label2id={name: place for place, name in names.items()},
                problem_type=labels.problem_type,
            )  # fmt: skip
    except ModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} cannot be read as a classifier: {str(error).splitlines()[0]}") from error
    head = set(head_parameters(model))
    fresh = {*found["missing_keys"], *(_name(each) for each in found["mismatched_keys"])}
    if missing := sorted(fresh - head):
        raise ModelError(
            f"{folder} lacks {len(missing)} of the weights that a {type(model).__name__} has, such as {missing[0]}; "
            "they would be random. Is its config.json that of another class?"
        )
    if not keep_head and not fresh:  # a head of as many labels, but of others
        _start_anew(model, head)
        fresh = head
    return by_onednn(model.to(device).eval()), sorted(fresh)


def _name(mismatched: Any) -> str:
    return str(mismatched if isinstance(mismatched, str) else mismatched[0])


@torch.no_grad()
def _start_anew(model: nn.Module, head: set[str]) -> None:
    """New weights for a head whose labels are others, as Transformers begins one: N(0, σ²), biases 0."""
    sigma = float(getattr(model.config, "initializer_range", 0.02))
    for name, parameter in model.named_parameters():
        if name in head:
            parameter.normal_(0, sigma) if parameter.ndim > 1 else parameter.zero_()
