"""BERT and DistilBERT as sequence classifiers on shapes, in the order of Transformers' classes.

B rows   S tokens of a row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loralab.cost import operations as ops
from loralab.cost.attention import attention, merge_heads, split_heads
from loralab.cost.layers import Weights, layer_norm, linear
from loralab.cost.loss import classifier_loss
from loralab.cost.model import Module, Shape
from loralab.cost.operations import BOOL, LONG
from loralab.cost.tape import Tensor


@dataclass(frozen=True, slots=True)
class Names:
    """How a family calls its parts."""

    prefix: str
    layer: str
    attention: tuple[str, str, str, str]
    """q, k, v and o."""
    norms: tuple[str, str]
    """After attention, and after the feed-forward layer."""
    feed_forward: tuple[str, str]
    head: tuple[str, str]


BERT = Names(
    "bert", "bert.encoder.layer",
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ("attention.output.LayerNorm", "output.LayerNorm"), ("intermediate.dense", "output.dense"),
    ("bert.pooler.dense", "classifier"),
)  # fmt: skip
DISTILBERT = Names(
    "distilbert", "distilbert.transformer.layer",
    ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    ("sa_layer_norm", "output_layer_norm"), ("ffn.lin1", "ffn.lin2"),
    ("pre_classifier", "classifier"),
)  # fmt: skip
# Hugging Face's names of the same sizes.
KEYS = {
    "bert": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_dropout_prob"),
    "distilbert": ("dim", "n_layers", "n_heads", "hidden_dim", "dropout"),
}


@dataclass(frozen=True, slots=True)
class Encoder:
    """The settings of either."""

    names: Names
    width: int
    layers: int
    heads: int
    inner: int
    dropout: float
    attention_dropout: float
    head_dropout: float
    vocabulary: int
    positions: int
    types: int
    """Kinds of segments; DistilBERT has none."""
    labels: int


def parse(raw: Mapping[str, Any], labels: int) -> Encoder:
    """From a config.json, or what of it families/ knows; the rest is as Transformers begins it."""
    family = str(raw["model_type"])
    width, layers, heads, inner, dropout = KEYS[family]
    rate = float(raw.get(dropout, 0.1))
    bert = family == "bert"
    own = raw.get("classifier_dropout") if bert else raw.get("seq_classif_dropout", 0.2)
    return Encoder(
        names=BERT if bert else DISTILBERT,
        width=raw[width],
        layers=raw[layers],
        heads=raw[heads],
        inner=raw.get(inner, 4 * raw[width]),
        dropout=rate,
        attention_dropout=float(raw.get("attention_probs_dropout_prob" if bert else "attention_dropout", 0.1)),
        head_dropout=rate if own is None else float(own),
        vocabulary=raw.get("vocab_size", 30522),
        positions=raw.get("max_position_embeddings", 512),
        types=raw.get("type_vocab_size", 2) if bert else 0,
        labels=labels,
    )


def modules(config: Encoder) -> Iterator[Module]:
    """Everything that holds a weight, in the model's order."""
    names, width = config.names, config.width
    tables = [("word", config.vocabulary), ("position", config.positions), ("token_type", config.types)]
    for table, rows in tables:
        if rows:
            yield Module(f"{names.prefix}.embeddings.{table}_embeddings", "Embedding", (rows, width))
    yield Module(f"{names.prefix}.embeddings.LayerNorm", "LayerNorm", (width,), bias=True)
    for number in range(config.layers):
        layer = f"{names.layer}.{number}"
        for name in names.attention:
            yield Module(f"{layer}.{name}", "Linear", (width, width), bias=True)
        yield Module(f"{layer}.{names.norms[0]}", "LayerNorm", (width,), bias=True)
        yield Module(f"{layer}.{names.feed_forward[0]}", "Linear", (config.inner, width), bias=True)
        yield Module(f"{layer}.{names.feed_forward[1]}", "Linear", (width, config.inner), bias=True)
        yield Module(f"{layer}.{names.norms[1]}", "LayerNorm", (width,), bias=True)
    yield Module(names.head[0], "Linear", (width, width), bias=True, head=True)
    yield Module(names.head[1], "Linear", (config.labels, width), bias=True, head=True)


def forward(config: Encoder, model: Weights, shape: Shape) -> Tensor:
    """The loss of a batch."""
    names, (B, S) = config.names, (shape.rows, shape.source)
    inputs = [model.meter.new((B, S), LONG) for _ in range(3)]
    x = _embed(config, model, B, S)
    hidden = model.meter.new((B, 1, S, S), BOOL) if shape.padded else None
    for number in range(config.layers):
        x = _layer(config, model, f"{names.layer}.{number}", x, hidden)
    first = ops.first_of_rows(x)
    del x
    assert inputs
    return head_loss(config, model, first)


def head_loss(config: Encoder, model: Weights, first: Tensor) -> Tensor:
    """What stands above the states of the first tokens, [B, D]."""
    pooled = ops.activation(linear(model, config.names.head[0], first), keeps_input=False)
    logits = linear(model, config.names.head[1], _dropped(model, pooled, config.head_dropout))
    return classifier_loss(logits)


def _embed(config: Encoder, model: Weights, rows: int, length: int) -> Tensor:
    name = f"{config.names.prefix}.embeddings"
    x = ops.look_up(model.weight(f"{name}.word_embeddings"), (rows, length))
    if config.types:
        x = ops.add(x, ops.look_up(model.weight(f"{name}.token_type_embeddings"), (rows, length)))
    x = ops.add(x, ops.look_up(model.weight(f"{name}.position_embeddings"), (1, length)))
    return _dropped(model, layer_norm(model, f"{name}.LayerNorm", x), config.dropout)


def _layer(config: Encoder, model: Weights, name: str, x: Tensor, hidden: Tensor | None) -> Tensor:
    def run(x: Tensor) -> Tensor:
        mixed = _attend(config, model, name, x, hidden)
        if config.types:  # DistilBERT drops nothing here
            mixed = _dropped(model, mixed, config.dropout)
        x = layer_norm(model, f"{name}.{config.names.norms[0]}", ops.add(mixed, x))
        del mixed
        wide, narrow = (f"{name}.{each}" for each in config.names.feed_forward)
        y = linear(model, narrow, ops.activation(linear(model, wide, x), keeps_input=True))
        y = ops.add(_dropped(model, y, config.dropout), x)
        del x
        return layer_norm(model, f"{name}.{config.names.norms[1]}", y)

    return ops.checkpointed(run, x) if model.checkpointing else run(x)


def _attend(config: Encoder, model: Weights, name: str, x: Tensor, hidden: Tensor | None) -> Tensor:
    q, k, v = (split_heads(linear(model, f"{name}.{each}", x), config.heads) for each in config.names.attention[:3])
    rate = model.rate_or(config.attention_dropout)
    bias = None if hidden is None else model.meter.new(hidden.shape, model.itemsize)
    mixed = merge_heads(attention(model, q, k, v, bias, rate, own_path=False))
    del q, k, v, bias
    return linear(model, f"{name}.{config.names.attention[3]}", mixed)


def _dropped(model: Weights, x: Tensor, rate: float) -> Tensor:
    """PyTorch's own dropout."""
    return ops.multiply(x, x.like().detached()) if model.rate_or(rate) else x
