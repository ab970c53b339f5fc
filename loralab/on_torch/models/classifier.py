"""Transformers' sequence classifiers: what they take, and the losses of their logits.

B  rows        C  labels
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from loralab.on_torch.training.loss import log_probabilities, smoothed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MULTI, SINGLE, REGRESSION = "multi_label_classification", "single_label_classification", "regression"
NO_BOUND = 10**9  # what tokenizers say that know no longest text


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
