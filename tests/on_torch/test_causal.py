"""Decoder-only models: the loss and its gradients are those of Transformers on one sequence a row, target tokens alone counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from loralab import LoRASpec, attach
from loralab.errors import ModelError
from loralab.on_torch.loading.supported_models import check_looks_back
from loralab.on_torch.models.causal import head_is_last, join
from loralab.on_torch.models.registry import family_of
from loralab.on_torch.training.diagnose import first_not_finite
from loralab.on_torch.training.forward import token_losses
from loralab.on_torch.training.loss import CHUNK

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=40, n_embd=16, n_layer=2, n_head=2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=12)),
    "phi, whose head has a bias": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "gemma2, which caps its logits": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)
    ),
    "cohere, which scales them": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases too
    return model


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Four rows of very unequal sources and targets: ids, mask, labels."""
    torch.manual_seed(1)
    ids, labels = torch.randint(1, 97, (4, 9)), torch.randint(1, 97, (4, 7))
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 6])[:, None]
    labels[torch.arange(7) >= torch.tensor([1, 7, 3, 5])[:, None]] = -100
    return ids.masked_fill(~mask, 0), mask, labels


def theirs(model: nn.Module) -> Tensor:
    """[4]: the summed loss of each row by Transformers' own loss, one row at a time, without padding."""
    losses = []
    for ids, mask, labels in zip(*rows(), strict=True):
        source, target = ids[mask], labels[labels != -100]
        marked = torch.cat([torch.full_like(source, -100), target])[None]
        losses.append(model(input_ids=torch.cat([source, target])[None], labels=marked).loss * len(target))
    return torch.stack(losses)


def ours(model: nn.Module) -> Tensor:
    """[4]: the same from one padded batch."""
    counts = (rows()[2] != -100).sum(1)
    return torch.stack([part.sum() for part in token_losses(model, *rows()).split(counts.tolist())])


def gradients(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    losses.sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_gradients_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each to fp32's usual tolerance of its own largest element: 20 tokens are summed in another order."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = 1e-5 * float(gradient.abs().max()) + 1e-6  # some are zero but for rounding: keys' biases
        torch.testing.assert_close(found[name], gradient, atol=atol, rtol=1e-4)


def test_a_row_becomes_one_sequence() -> None:
    ids, mask = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    labels = torch.tensor([[1, 2], [3, -100]])
    joined, joined_mask, following = join(ids, mask, labels)
    assert joined.tolist() == [[5, 6, 7, 1, 2], [8, 3, 0, 0, 0]]
    assert joined_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert following.tolist() == [[-100, -100, 1, 2, -100], [3, -100, -100, -100, -100]]


def test_a_batch_is_no_wider_than_its_longest_row() -> None:
    ids, mask, labels = rows()
    longest = int((mask.sum(1) + (labels != -100).sum(1)).max())
    assert join(ids, mask, labels)[0].shape == (4, longest) and longest < 9 + 7


def test_losses_and_all_gradients_are_transformers(model: nn.Module) -> None:
    torch.testing.assert_close(ours(model), theirs(model))
    assert_gradients_equal(gradients(model, ours(model)), gradients(model, theirs(model)))


@pytest.mark.parametrize("recompute", [False, True])
def test_loras_gradients_are_transformers(model: nn.Module, recompute: bool) -> None:
    """Under a frozen head, whose gradient is made in the sweep of the loss; with recomputed activations too."""
    adapter = attach(model, LoRASpec(rank=3))
    with torch.no_grad():
        for update in adapter.updates.values():
            update.B.normal_(std=0.1)
    expected = gradients(model, theirs(model))
    assert len(expected) == 2 * len(adapter.updates)
    if recompute:
        family_of(model).checkpoint_activations(model.train())
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
    calls: list[None] = []
    model.get_submodule(next(iter(adapter.updates))).register_forward_pre_hook(lambda *_: calls.append(None))
    losses = ours(model)
    calls.clear()
    assert_gradients_equal(gradients(model, losses), expected)
    assert len(calls) == recompute, "computed again in the backward pass"


def test_a_trained_and_an_adapted_head_work_too() -> None:
    torch.manual_seed(0)
    for spec in (LoRASpec(rules=["q_proj"], modules_to_save=["lm_head"]), LoRASpec(rules=["q_proj", "lm_head"])):
        model = MODELS["llama"]().eval()
        attach(model, spec)
        torch.testing.assert_close(ours(model), theirs(model))
        assert_gradients_equal(gradients(model, ours(model)), gradients(model, theirs(model)))


def test_smoothing_is_pytorchs() -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]()
    ids, mask, following = join(*rows())
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        expected = F.cross_entropy(
            logits[following != -100], following[following != -100], label_smoothing=0.1, reduction="none"
        )
        torch.testing.assert_close(token_losses(model, *rows(), 0.1), expected)


def test_the_vocabulary_is_met_by_target_tokens_alone(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    head, met = model.get_output_embeddings(), []
    plain = head_is_last(model)
    head.register_forward_hook(lambda _, __, output: met.append(output.numel() // 97))
    with torch.no_grad():
        losses = token_losses(model, *rows())
    assert sum(met) == len(losses) == 16 < CHUNK
    assert plain == (type(model).__name__ not in ("Gemma2ForCausalLM", "CohereForCausalLM"))


def test_nothing_is_left_on_the_model(model: nn.Module) -> None:
    with torch.no_grad():
        before = model(input_ids=rows()[0]).logits
        token_losses(model, *rows())
        assert torch.equal(model(input_ids=rows()[0]).logits, before)


def test_padding_changes_nothing(model: nn.Module) -> None:
    ids, mask, labels = rows()
    with torch.no_grad():
        alone = [token_losses(model, *(x[row : row + 1] for x in (ids, mask, labels))) for row in range(4)]
        torch.testing.assert_close(torch.cat(alone), token_losses(model, ids, mask, labels))


def test_a_module_that_breaks_is_named() -> None:
    model = MODELS["llama"]()
    assert (
        first_not_finite(model, [family_of(model).inputs(model, *rows())])
        == "The forward pass is finite; the gradient is not."
    )
    hook = model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda _, __, output: output * float("inf"))
    assert "model.layers.1.mlp." in first_not_finite(model, [family_of(model).inputs(model, *rows())])
    hook.remove()


def test_positions_are_the_configs(model: nn.Module) -> None:
    assert family_of(model).positions(model, tokenizer=None) == 40


def test_a_model_that_sees_what_follows_is_refused(model: nn.Module) -> None:
    check_looks_back(model)
    settings = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    check_looks_back(BertLMHeadModel(BertConfig(**settings, is_decoder=True)).eval())
    with pytest.raises(ModelError, match=r"BertLMHeadModel sees the tokens that follow.*is_decoder: true"):
        check_looks_back(BertLMHeadModel(BertConfig(**settings)).eval())
