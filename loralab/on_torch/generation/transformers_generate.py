"""Writing with a model of Transformers', by its own `generate`, under the same settings.

What a checkpoint's generation_config.json says of how to write (a minimal length, n-grams that may not repeat, a number
of beams) is passed over: a recipe's settings are all there is. Its special tokens are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loralab.config.generation import Decoding, until
from loralab.data.stop_sequences import Stops
from loralab.on_torch.generation.sampling import Draws

Heard = Callable[[int], None]


@torch.inference_mode()
def transformers_decode(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    decoding: Decoding,
    rows: Sequence[int],
    begun: int,
    on_token: Heard | None = None,
    stops: Stops | None = None,
) -> list[list[int]]:
    """Answers to a batch, as ids without the prompt, the start and the end token; for the arguments see ModelFamily.write.

    Args:
        begun: tokens of a row before its answer: the start token, or a prompt.
    """
    with _settings_of_its_own_aside(model) as ends:
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,  # draws are a processor of ours: each row's are its own
            num_beams=decoding.beams,
            length_penalty=decoding.length_penalty,
            early_stopping=decoding.early_stopping,
            repetition_penalty=decoding.repetition_penalty,
            logits_processor=[_Draws(decoding, rows, begun)] if decoding.sample else [],
            stopping_criteria=[] if stops is None else [_Stopping(stops, begun)],
            streamer=None if on_token is None else _Streamer(on_token, ends),
        )
    return [until(row[begun:].tolist(), ends) for row in output]


class _Draws:
    """Leaves one token of each row possible: the drawn one. Transformers calls it after the repetition penalty."""

    def __init__(self, decoding: Decoding, rows: Sequence[int], begun: int) -> None:
        self.draws, self.begun = Draws(decoding, rows), begun

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self.draws(scores, torch.arange(len(scores)), input_ids.shape[1] - self.begun)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


class _Stopping:
    """Ends a row with a stop text. Transformers calls it with every token, and with the candidates of a beam search."""

    def __init__(self, stops: Stops, begun: int) -> None:
        self.stops, self.begun = stops, begun

    def __call__(self, input_ids: Tensor, _: Tensor, **__: Any) -> Tensor:
        return torch.tensor(self.stops.met(input_ids[:, self.begun :].tolist()), device=input_ids.device)


class _Streamer:
    """Passes on the tokens of one row, but for the prompt and the end."""

    def __init__(self, on_token: Heard, ends: Sequence[int]) -> None:
        self.on_token, self.ends, self.prompt_seen = on_token, ends, False

    def put(self, tokens: Tensor) -> None:
        """Transformers calls it with the prompt, and then with each token."""
        if self.prompt_seen and int(tokens[0]) not in self.ends:
            self.on_token(int(tokens[0]))
        self.prompt_seen = True

    def end(self) -> None:
        """Transformers calls it at the end."""


@contextmanager
def _settings_of_its_own_aside(model: Any) -> Iterator[Sequence[int]]:
    """The model with nothing but its special tokens in its generation config; gives those that end a text."""
    from transformers import GenerationConfig

    stored = model.generation_config
    tokens = {key: value for key, value in stored.to_dict().items() if "token_id" in key}
    ends = tokens.get("eos_token_id")
    ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    if tokens.get("pad_token_id") is None and ends:
        tokens["pad_token_id"] = ends[0]  # stands after the end only, where nobody looks
    model.generation_config = GenerationConfig(**tokens)
    try:
        yield ends
    finally:
        model.generation_config = stored
