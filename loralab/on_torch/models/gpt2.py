"""GPT-2: a decoder alone, with learnt positions, a norm before each layer and a GELU between two products.

Radford et al. 2019, https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf;
module names are those of Hugging Face's checkpoints, so that LoRA rules and PEFT's adapters fit as they are. Files hold
the matrices of c_attn, c_proj and c_fc as [in, out]; here they are [out, in] like every other (`from_files`, `in_file_layout`).
q, k and v stay one matrix, c_attn, which is what adapters wrap. How large new weights are: models/gpt2.py.

Shapes:  B rows   S tokens of a row   N predicted tokens of a batch   D n_embd   H heads   E size of a head   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralab.errors import ModelError
from loralab.models.gpt2 import HEAD, PREFIX, TIED_TO, TURNED, UNUSED, GPT2Config, names
from loralab.on_torch.models.output import IGNORED, Output
from loralab.on_torch.ops.attention import attention
from loralab.on_torch.ops.dropout import Dropout
from loralab.on_torch.ops.onednn_linear import Linear, times, times_gelu
from loralab.on_torch.ops.random_streams import checkpointed
from loralab.on_torch.training.loss import token_losses


class Attention(nn.Module):
    """Causal self-attention; q, k and v by one product."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.heads, self.scale = config.n_head, (config.n_embd // config.n_head) ** -0.5
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.attn_dropout, self.resid_dropout = Dropout(config.attn_pdrop), Dropout(config.resid_pdrop)

    def forward(self, x_BSD: Tensor, bias_B1SS: Tensor | None) -> Tensor:
        """`bias_B1SS` hides what a token must not see; without one that is what follows it."""
        q_BHSE, k_BHSE, v_BHSE = self.queries_keys_values(x_BSD)
        rate = self.attn_dropout.rate if self.training else 0.0
        mixed_BHSE = attention(q_BHSE, k_BHSE, v_BHSE, bias_B1SS, rate, self.scale, causal=bias_B1SS is None)
        return self.resid_dropout(self.out(mixed_BHSE))

    def queries_keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, S, E] each."""
        parts_BS3HE = self.c_attn(x_BSD).unflatten(-1, (3, self.heads, -1))
        q_BHSE, k_BHSE, v_BHSE = parts_BS3HE.permute(2, 0, 3, 1, 4)
        return q_BHSE, k_BHSE, v_BHSE

    def out(self, mixed_BHSE: Tensor) -> Tensor:
        """The heads' findings as one, [B, S, D]."""
        y_BSD: Tensor = self.c_proj(mixed_BHSE.transpose(1, 2).flatten(2))
        return y_BSD


class FeedForward(nn.Module):
    """gelu(x c_fc) c_proj."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.inner)
        self.c_proj = Linear(config.inner, config.n_embd)
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.dropout(self.c_proj(times_gelu(x_BSD, self.c_fc)))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and added to the stream."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = FeedForward(config)

    def forward(self, x_BSD: Tensor, bias_B1SS: Tensor | None) -> Tensor:
        x_BSD = x_BSD + self.attn(self.ln_1(x_BSD), bias_B1SS)
        return x_BSD + self.mlp(self.ln_2(x_BSD))


class Transformer(nn.Module):
    """Tokens and their positions -> states."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.checkpointing = False
        """Keep only the stream between blocks for the backward pass, and compute the rest again there."""

    def forward(self, input_ids: Tensor, positions_BS: Tensor, bias_B1SS: Tensor | None) -> Tensor:
        x_BSD: Tensor = self.drop(self.wte(input_ids) + self.wpe(positions_BS))
        for block in self.blocks():
            if self.checkpointing and self.training:
                x_BSD = checkpointed(block, x_BSD, bias_B1SS)
            else:
                x_BSD = block(x_BSD, bias_B1SS)
        states_BSD: Tensor = self.ln_f(x_BSD)
        return states_BSD

    def blocks(self) -> Iterator[Block]:
        """The layers in turn."""
        for block in self.h:
            assert isinstance(block, Block)
            yield block


class GPT2(nn.Module):
    """GPT2LMHeadModel. `forward` is Hugging Face's; training uses `token_losses`, generation gpt2_decoding.py."""

    turned = TURNED

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of a weight in Transformers' class -> ours."""
        return {HEAD: TIED_TO} if self.lm_head is None else {}

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.n_embd, config.vocab_size, bias=False)
        self.ends: tuple[int, ...] = (config.eos_token_id,)
        """Tokens that end a text."""
        self.name_or_path = ""

    @property
    def shared_parameters(self) -> tuple[str, ...]:
        """Parameters with a second use: the embedding that is also the output head."""
        return () if self.lm_head is not None else ("transformer.wte.weight",)

    @property
    def tied_head(self) -> nn.Embedding | None:
        """The embedding, if it is the output head too."""
        return self.transformer.wte if self.lm_head is None else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Output:
        """Logits of every token [B, S, V]; with labels, which stand at the places of their own tokens, the loss."""
        logits_BSV = self.logits(self.states(input_ids, attention_mask, document_ids))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits_BSV[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
        return Output(loss, logits_BSV)

    def token_losses(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        following: Tensor,
        smoothing: float = 0.0,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in nats of each token that is to be predicted, [N], row by row.

        Args:
            following: [B, S], what each place must say; -100 where that counts for nothing.
        """
        states_BSD = self.states(input_ids, attention_mask, document_ids)
        predicts_BS = following != IGNORED
        return token_losses(
            states_BSD[predicts_BS], self.logits, self._frozen_head(), following[predicts_BS], smoothing
        )

    def states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> Tensor:
        """[B, S, D] before the head.

        Args:
            attention_mask: [B, S], 0 in padding on either side; positions count the real tokens.
            document_ids: [B, S], for rows of several documents: equal numbers side by side are one document, which no
                other sees and whose positions begin at 0; below 0 is padding. In the place of a mask.

        Raises:
            ModelError: a text is longer than the model has positions.
        """
        assert attention_mask is None or document_ids is None, "documents say where padding is"
        bias_B1SS: Tensor | None
        if document_ids is not None:
            positions_BS, bias_B1SS = in_documents(document_ids, self.dtype)
        else:
            positions_BS, bias_B1SS = beside_padding(input_ids, attention_mask, self.dtype)
        if input_ids.shape[1] > self.config.n_positions and int(positions_BS.max()) >= self.config.n_positions:
            raise ModelError(
                f"A text of {int(positions_BS.max()) + 1} tokens is longer than the {self.config.n_positions} positions "
                "that this GPT-2 knows. Cut it, or take a model with more positions."
            )
        states_BSD: Tensor = self.transformer(input_ids, positions_BS, bias_B1SS)
        return states_BSD

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and products."""
        return self.transformer.wte.weight.dtype

    def logits(self, states_D: Tensor) -> Tensor:
        """[.., V]."""
        if self.lm_head is None:
            return times(states_D, self.transformer.wte)
        logits_V: Tensor = self.lm_head(states_D)
        return logits_V

    def _frozen_head(self) -> Tensor | None:
        """The output matrix, if it is nothing but a frozen product."""
        head = self.transformer.wte if self.lm_head is None else self.lm_head
        plain = type(head) in (nn.Embedding, Linear) and not head.weight.requires_grad
        return head.weight if plain else None


# Who sees whom


def beside_padding(
    input_ids: Tensor, attention_mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(positions [B, S] or [1, S], what to add to the scores), for one text a row. Padding on the right needs nothing added: no real token
    looks there."""
    if attention_mask is None or bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None], None
    real_BS = attention_mask.bool()
    positions_BS = (real_BS.cumsum(1) - 1).clamp(min=0)
    return positions_BS, _hiding(_past(input_ids) & real_BS[:, None, :], dtype)


def in_documents(document_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(positions [B, S] in each document, what to add to the scores), for rows of several documents."""
    places_S = torch.arange(document_ids.shape[1], device=document_ids.device)
    begins_BS = torch.ones_like(document_ids, dtype=torch.bool)
    begins_BS[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    positions_BS = places_S - (places_S * begins_BS).cummax(1).values
    same_BSS = document_ids[:, :, None] == document_ids[:, None, :]
    real_B1S = (document_ids >= 0)[:, None, :]
    return positions_BS.where(document_ids >= 0, 0), _hiding(_past(document_ids) & same_BSS & real_B1S, dtype)


def _past(row_BS: Tensor) -> Tensor:
    """[S, S]: each place sees itself and those before it."""
    length = row_BS.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=row_BS.device).tril()


def _hiding(seen_BSS: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where it is seen, the least number elsewhere, [B, 1, S, S]."""
    bias_BSS = torch.zeros_like(seen_BSS, dtype=dtype).masked_fill(~seen_BSS, torch.finfo(dtype).min)
    return bias_BSS[:, None]


# Files


def from_files(tensors: Iterable[tuple[str, Tensor]], config: GPT2Config) -> Iterator[tuple[str, Tensor]]:
    """Weights of a file under any of their names -> under ours, matrices turned to [out, in], as views. Unknown names stay as they are."""
    known = names(config)
    for name, tensor in tensors:
        ours = known.get(name, name)
        if ours.removeprefix(PREFIX).startswith("h.") and ours.endswith(UNUSED):
            continue
        if ours.endswith(TURNED):
            tensor = tensor.flatten(0, -2).T  # OpenAI's have a first dimension of 1: convolutions over one token
        yield ours, tensor


def in_file_layout(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights as Hugging Face's files have them."""
    return {name: tensor.T if name.endswith(TURNED) else tensor for name, tensor in weights.items()}


def drop_tied_head(weights: dict[str, Tensor], config: GPT2Config) -> None:
    """Removes the copy of the embedding that some files have as their head.

    Raises:
        ModelError: it is no copy.
    """
    head = weights.pop(HEAD, None) if config.tie_word_embeddings else None
    if head is not None and not torch.equal(head, weights.get(TIED_TO, head)):
        raise ModelError(
            f"{HEAD} differs from {TIED_TO}, and config.json ties them. Set tie_word_embeddings to false there, "
            "if the head is its own."
        )
