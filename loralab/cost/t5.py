"""T5 on shapes: its modules, and the forward pass of on_torch/models/t5.py in the same order.

B batch   S source length   T target length   N real target tokens
"""

from __future__ import annotations

from collections.abc import Iterator

from loralab.cost import operations as ops
from loralab.cost.attention import attention, merge_heads, split_heads
from loralab.cost.layers import Weights, dropped, linear, project, rms_norm
from loralab.cost.loss import token_loss
from loralab.cost.model import Module, Shape
from loralab.cost.operations import LONG
from loralab.cost.tape import Tensor
from loralab.models.t5 import T5Config


def modules(config: T5Config, own_head: bool) -> Iterator[Module]:
    """Everything that holds a weight, in the model's order."""
    yield Module("shared", "Embedding", (config.vocab_size, config.d_model))
    yield from _stack(config, "encoder", config.num_layers)
    yield from _stack(config, "decoder", config.num_decoder_layers)
    if own_head:
        yield Module("lm_head", "Linear", (config.vocab_size, config.d_model), head=True)


def _stack(config: T5Config, stack: str, layers: int) -> Iterator[Module]:
    cross = ["EncDecAttention"] if stack == "decoder" else []
    for block in range(layers):
        for place, kind in enumerate(["SelfAttention", *cross]):
            layer = f"{stack}.block.{block}.layer.{place}"
            yield from _attention(config, f"{layer}.{kind}")
            if block == 0 and kind == "SelfAttention":
                shape = (config.relative_attention_num_buckets, config.num_heads)
                yield Module(f"{layer}.{kind}.relative_attention_bias", "Embedding", shape)
            yield Module(f"{layer}.layer_norm", "RMSNorm", (config.d_model,))
        layer = f"{stack}.block.{block}.layer.{1 + len(cross)}"
        for name in ["wi_0", "wi_1"] if config.gated else ["wi"]:
            yield Module(f"{layer}.DenseReluDense.{name}", "Linear", (config.d_ff, config.d_model))
        yield Module(f"{layer}.DenseReluDense.wo", "Linear", (config.d_model, config.d_ff))
        yield Module(f"{layer}.layer_norm", "RMSNorm", (config.d_model,))
    yield Module(f"{stack}.final_layer_norm", "RMSNorm", (config.d_model,))


def _attention(config: T5Config, name: str) -> Iterator[Module]:
    inner = config.num_heads * config.d_kv
    for each in "qkv":
        yield Module(f"{name}.{each}", "Linear", (inner, config.d_model))
    yield Module(f"{name}.o", "Linear", (config.d_model, inner))


def forward(config: T5Config, model: Weights, shape: Shape) -> Tensor:
    """The loss of a batch."""
    B, S, T = shape.rows, shape.source, shape.target
    inputs = [model.meter.new((B, length), LONG) for length in (S, S, T, T)]
    source = ops.look_up(model.weight("shared"), (B, S))
    hidden = model.meter.new((B, 1, 1, S), model.itemsize) if shape.padded else None
    states = _encode(config, model, source, hidden)
    del source
    target = ops.look_up(model.weight("shared"), (B, T))
    states = _decode(config, model, target, states, hidden)
    del target
    chosen = ops.choose_rows(states, shape.target_tokens)
    del states
    if config.scale_decoder_outputs:
        chosen = ops.elementwise(chosen)
    head = "lm_head" if "lm_head.weight" in model.parameters else "shared"
    assert inputs
    return token_loss(model, chosen, model.weight(head), head in model.updates)


def _encode(config: T5Config, model: Weights, x: Tensor, hidden: Tensor | None) -> Tensor:
    bias = _position_bias(config, model, "encoder", x.shape[1])
    if hidden is not None:
        bias = ops.add(bias, hidden)
    x = dropped(model, x, config.dropout_rate)
    for block in range(config.num_layers):
        name = f"encoder.block.{block}.layer"
        x = _add_self_attention(config, model, f"{name}.0", x, bias)
        x = _add_feed_forward(config, model, f"{name}.1", x)
    return dropped(model, rms_norm(model, "encoder.final_layer_norm", x), config.dropout_rate)


def _decode(config: T5Config, model: Weights, x: Tensor, encoded: Tensor, hidden: Tensor | None) -> Tensor:
    bias = _position_bias(config, model, "decoder", x.shape[1])
    bias = ops.elementwise(bias)  # the future is masked
    x = dropped(model, x, config.dropout_rate)
    for block in range(config.num_decoder_layers):
        name = f"decoder.block.{block}.layer"
        x = _add_self_attention(config, model, f"{name}.0", x, bias)
        x = _add_cross_attention(config, model, f"{name}.1", x, encoded, hidden)
        x = _add_feed_forward(config, model, f"{name}.2", x)
    return dropped(model, rms_norm(model, "decoder.final_layer_norm", x), config.dropout_rate)


def _position_bias(config: T5Config, model: Weights, stack: str, length: int) -> Tensor:
    """[1, H, Q, Q], the same for every row."""
    meter, buckets = model.meter, (length, length)
    temporary = [meter.new(buckets, LONG) for _ in range(4)]
    name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
    bias = ops.look_up(model.weight(name), buckets)
    temporary.clear()
    return bias.view(1, config.num_heads, length, length)


def _added(config: T5Config, model: Weights, layer: object, x: Tensor, *others: Tensor) -> Tensor:
    """The stream after a layer."""

    def run(x: Tensor, *others: Tensor) -> Tensor:
        return ops.add(x, dropped(model, layer(x, *others), config.dropout_rate))  # type: ignore[operator]

    return ops.checkpointed(run, x, *others) if model.checkpointing else run(x, *others)


def _add_self_attention(config: T5Config, model: Weights, name: str, x: Tensor, bias: Tensor) -> Tensor:
    def layer(x: Tensor, bias: Tensor) -> Tensor:
        normed = rms_norm(model, f"{name}.layer_norm", x)
        names = [f"{name}.SelfAttention.{each}" for each in "qkv"]
        q, k, v = (split_heads(y, config.num_heads) for y in project(model, names, normed))
        del normed
        return _attend(config, model, f"{name}.SelfAttention", q, k, v, bias)

    return _added(config, model, layer, x, bias)


def _add_cross_attention(
    config: T5Config, model: Weights, name: str, x: Tensor, encoded: Tensor, hidden: Tensor | None
) -> Tensor:
    names = [f"{name}.EncDecAttention.{each}" for each in "kv"]
    k, v = (split_heads(y, config.num_heads) for y in project(model, names, encoded))

    def layer(x: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        normed = rms_norm(model, f"{name}.layer_norm", x)
        q = split_heads(linear(model, f"{name}.EncDecAttention.q", normed), config.num_heads)
        del normed
        return _attend(config, model, f"{name}.EncDecAttention", q, k, v, *bias)

    return _added(config, model, layer, x, k, v, *([] if hidden is None else [hidden]))


def _attend(
    config: T5Config, model: Weights, name: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> Tensor:
    mixed = merge_heads(attention(model, q, k, v, bias, model.rate_or(config.dropout_rate), own_path=True))
    return linear(model, f"{name}.o", mixed)


def _add_feed_forward(config: T5Config, model: Weights, name: str, x: Tensor) -> Tensor:
    dense = f"{name}.DenseReluDense"

    def layer(x: Tensor) -> Tensor:
        normed = rms_norm(model, f"{name}.layer_norm", x)
        if config.gated:
            gate, value = project(model, (f"{dense}.wi_0", f"{dense}.wi_1"), normed)
            hidden = ops.multiply(ops.activation(gate, keeps_input=True), value)
            del gate, value
        else:
            hidden = ops.activation(linear(model, f"{dense}.wi", normed), keeps_input=False)
        del normed
        return linear(model, f"{dense}.wo", dropped(model, hidden, config.dropout_rate))

    return _added(config, model, layer, x)
