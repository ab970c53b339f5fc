"""DistilBERT as data: where LoRA goes, what its head is, and the published size (Sanh et al. 2019,
https://arxiv.org/abs/1910.01108)."""

from __future__ import annotations

from loralab.models.architecture import Architecture

DEFAULT_RULES = ("q_lin", "k_lin", "v_lin")
HEAD = ("pre_classifier", "classifier")  # of DistilBertForSequenceClassification

SIZES: dict[str, dict[str, int]] = {
    "distilbert-base-uncased": {"n_layers": 6, "dim": 768, "n_heads": 12, "hidden_dim": 3072},
}

ARCHITECTURE = Architecture("distilbert", DEFAULT_RULES, SIZES, HEAD)
