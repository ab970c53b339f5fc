"""Transformers' sequence classifiers: from a base with or without a head to a model with the data's labels; losses.

B  rows        C  labels
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralab.adapters import files
from loralab.errors import ModelError
from loralab.metrics.labels import Labels, RegressionOutput, aligned
from loralab.models.checkpoint_files import read_config, weight_files
from loralab.models.pretrained import from_pretrained
from loralab.on_torch.loading.load import quiet_transformers
from loralab.on_torch.models.heads import head_parameters
from loralab.on_torch.ops.onednn_linear import by_onednn
from loralab.on_torch.quantization.quantize import Quantization, load_quantized
from loralab.on_torch.training.loss import log_probabilities, smoothed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MULTI, SINGLE, REGRESSION = "multi_label_classification", "single_label_classification", "regression"
# The matrix that gives the logits: of a single layer, or of a head of several, as RoBERTa's and BART's.
LAST_OF_HEAD = re.compile(r"(^|\.)(classifier|score|out_proj)\.weight$")
NO_BOUND = 10**9  # what tokenizers say that know no longest text


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
    """Of an adapter made elsewhere, which has no names: one for each output of the head in it."""
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


def prepare_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Decoders look for the last token that is no padding: they must know which token that is."""
    config: Any = model.config
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def positions(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The longest text in tokens; None where there is no bound. RoBERTa's kin counts positions from its padding's number on."""
    config: Any = model.config
    number = getattr(config, "max_position_embeddings", None)
    shifted = re.search("roberta|camembert|longformer|mpnet|esm", str(config.model_type)) is not None
    bounds = (
        [] if not isinstance(number, int) or number <= 0 else [number - (config.pad_token_id + 1 if shifted else 0)]
    )
    bounds += [tokenizer.model_max_length] if tokenizer.model_max_length < NO_BOUND else []
    return min(bounds, default=None)


def logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, token_types: Tensor | None = None) -> Tensor:
    """[B, C] in fp32. `token_types`: [B, S], of pairs of texts."""
    types = {} if token_types is None or not takes_token_types(model) else {"token_type_ids": token_types}
    found: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, **types).logits
    return found.float()


def takes_token_types(model: nn.Module) -> bool:
    """Tells whether a model can be told which of two texts a token is of; DistilBERT and RoBERTa cannot."""
    known = "token_type_ids" in inspect.signature(model.forward).parameters
    return known and getattr(model.config, "type_vocab_size", 2) > 1


def label_losses(logits_BC: Tensor, labels: Tensor, problem_type: str = SINGLE, smoothing: float = 0.0) -> Tensor:
    """The losses that Transformers means by a problem type.

    Returns:
        [B], cross-entropy in nats against labels [B, 1]; or, of several labels, [B · C], each one's against labels [B, C] of
        0 and 1; or, of a regression, [B], squared errors against numbers [B, 1].
    """
    if problem_type == REGRESSION:
        return (logits_BC[:, 0] - labels[:, 0].to(logits_BC.dtype)) ** 2
    if problem_type == SINGLE:
        return smoothed(log_probabilities(logits_BC), labels[:, 0], smoothing)
    wanted = labels.to(logits_BC.dtype) * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits_BC, wanted, reduction="none").flatten()


def token_losses(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    smoothing: float = 0.0,
    token_types: Tensor | None = None,
) -> Tensor:
    """The losses of these rows, row by row."""
    kind = str(model.config.problem_type or SINGLE)  # type: ignore[union-attr]
    return label_losses(logits(model, input_ids, attention_mask, token_types), labels, kind, smoothing)
