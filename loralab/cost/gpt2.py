"""GPT-2 on shapes: its modules, and the forward pass of on_torch/models/gpt2.py in the same order.

B rows   L source and target of the longest row
"""

from __future__ import annotations

from collections.abc import Iterator

from loralab.cost import operations as ops
from loralab.cost.attention import attention, merge_heads, split_heads
from loralab.cost.layers import Weights, dropped, layer_norm, linear
from loralab.cost.loss import token_loss
from loralab.cost.model import Module, Shape
from loralab.cost.operations import LONG
from loralab.cost.tape import Tensor
from loralab.models.gpt2 import GPT2Config


def modules(config: GPT2Config) -> Iterator[Module]:
    """Everything that holds a weight, in the model's order."""
    width = config.n_embd
    yield Module("transformer.wte", "Embedding", (config.vocab_size, width))
    yield Module("transformer.wpe", "Embedding", (config.n_positions, width))
    for number in range(config.n_layer):
        block = f"transformer.h.{number}"
        yield Module(f"{block}.ln_1", "LayerNorm", (width,), bias=True)
        yield Module(f"{block}.attn.c_attn", "Linear", (3 * width, width), bias=True)
        yield Module(f"{block}.attn.c_proj", "Linear", (width, width), bias=True)
        yield Module(f"{block}.ln_2", "LayerNorm", (width,), bias=True)
        yield Module(f"{block}.mlp.c_fc", "Linear", (config.inner, width), bias=True)
        yield Module(f"{block}.mlp.c_proj", "Linear", (width, config.inner), bias=True)
    yield Module("transformer.ln_f", "LayerNorm", (width,), bias=True)
    if not config.tie_word_embeddings:
        yield Module("lm_head", "Linear", (config.vocab_size, width), head=True)


def forward(config: GPT2Config, model: Weights, shape: Shape) -> Tensor:
    """The loss of a batch, in which every place but the first is predicted where there is no source."""
    B, L = shape.rows, shape.source + shape.target
    inputs = [model.meter.new((B, L), LONG) for _ in range(4)]
    x = ops.look_up(model.weight("transformer.wte"), (B, L))
    places = ops.look_up(model.weight("transformer.wpe"), (B if shape.packed else 1, L))
    x = dropped(model, ops.add(x, places), config.embd_pdrop)
    del places
    bias = model.meter.new((B, 1, L, L), model.itemsize) if shape.packed else None
    for number in range(config.n_layer):
        x = _block(config, model, f"transformer.h.{number}", x, bias)
    states = layer_norm(model, "transformer.ln_f", x)
    del x
    chosen = ops.choose_rows(states, shape.target_tokens)
    del states
    head = "lm_head" if "lm_head.weight" in model.parameters else "transformer.wte"
    assert inputs
    return token_loss(model, chosen, model.weight(head), head in model.updates)


def _block(config: GPT2Config, model: Weights, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
    def run(x: Tensor) -> Tensor:
        y = _attend(config, model, f"{name}.attn", layer_norm(model, f"{name}.ln_1", x), bias)
        x = ops.add(x, dropped(model, y, config.resid_pdrop))
        del y
        wide = ops.activation(linear(model, f"{name}.mlp.c_fc", layer_norm(model, f"{name}.ln_2", x)), keeps_input=True)
        return ops.add(x, dropped(model, linear(model, f"{name}.mlp.c_proj", wide), config.resid_pdrop))

    return ops.checkpointed(run, x) if model.checkpointing else run(x)


def _attend(config: GPT2Config, model: Weights, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
    whole = linear(model, f"{name}.c_attn", x)
    q, k, v = (split_heads(part, config.n_head) for part in ops.split(whole, [config.n_embd] * 3))
    del whole, x
    rate = model.rate_or(config.attn_pdrop)
    mixed = merge_heads(attention(model, q, k, v, bias, rate, own_path=True, scaled=True))
    del q, k, v
    return linear(model, f"{name}.c_proj", mixed)
