"""BERT as data: where LoRA goes, what its head is, and the published sizes (Devlin et al. 2019,
https://arxiv.org/abs/1810.04805; the small ones Turc et al. 2019, https://arxiv.org/abs/1908.08962)."""

from __future__ import annotations

from loralab.models.architecture import Architecture

DEFAULT_RULES = ("query", "key", "value")
HEAD = ("bert.pooler", "classifier")  # of BertForSequenceClassification

SIZES: dict[str, dict[str, int]] = {
    name: {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    for name, layers, width, heads in (
        ("bert-tiny", 2, 128, 2),
        ("bert-mini", 4, 256, 4),
        ("bert-small", 4, 512, 8),
        ("bert-medium", 8, 512, 8),
        ("bert-base-uncased", 12, 768, 12),
        ("bert-large-uncased", 24, 1024, 16),
        ("MiniLM-L6-H384-uncased", 6, 384, 12),
    )
}

ARCHITECTURE = Architecture("bert", DEFAULT_RULES, SIZES, HEAD)
