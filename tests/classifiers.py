"""Tiny classifiers, with and without a head, and rows that a word tells apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folders import write_jsonl
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)

WORDS = [
    "the",
    "film",
    "was",
    "a",
    "story",
    "of",
    "two",
    "friends",
    "who",
    "met",
    "by",
    "chance",
    "and",
    "went",
    "to",
    "see",
    "it",
    "again",
]
NAMES = {0: "NEGATIVE", 1: "POSITIVE"}
VOCABULARY = 30522  # of BERT's tokenizer


def make_bases(place: Path, tokenizer: Path) -> dict[str, Path]:
    """A BERT and a RoBERTa without a classifier's head, a DistilBERT with one. Weights are large, so that little things show."""
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, initializer_range=0.3,
    )  # fmt: skip
    distilbert = DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40, initializer_range=0.3,
        id2label=NAMES, label2id={name: place for place, name in NAMES.items()},
    )  # fmt: skip
    roberta = RobertaConfig(**{**bert.to_dict(), "max_position_embeddings": 26, "pad_token_id": 1})
    models = {
        "bert": BertModel(bert), "distilbert": DistilBertForSequenceClassification(distilbert),
        "roberta": RobertaForMaskedLM(roberta),
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(place / name)
        for file in tokenizer.iterdir():
            shutil.copy(file, place / name)
    return {name: place / name for name in models}


def write_rows(place: Path, labels: tuple[Any, Any] = ("neg", "pos"), counts: Mapping[str, int] | None = None) -> Path:
    """Texts with "good" or "bad" in them, of 6 to 16 words; a folder of train and validation."""
    place.mkdir(exist_ok=True)
    for seed, (split, count) in enumerate((counts or {"train": 64, "validation": 24}).items()):
        generator = np.random.default_rng(seed)
        rows = []
        for number in range(count):
            words = list(generator.choice(WORDS, size=generator.integers(6, 16)))
            words.insert(int(generator.integers(len(words))), ("bad", "good")[number % 2])
            rows.append({"text": " ".join(words), "label": labels[number % 2]})
        write_jsonl(place / f"{split}.jsonl", rows)
    return place


def write_recipe(file: Path, base: Path, data: Path, **variants: Any) -> Path:
    """A recipe of two quick epochs."""
    recipe = {
        "model": {"name": str(base), "dtype": "float32", "device": "cpu"},
        "data": {"name": str(data), "source": "text", "label": "label", "max_source_length": 20},
        "lora": {"rank": 2, "alpha": 4},
        "training": {"batch_size": 16, "epochs": 2},
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": {"split": "validation"},
        "validation": {"every": None},
        "variants": variants,
    }
    file.write_text(json.dumps(recipe))
    return file
