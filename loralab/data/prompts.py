"""The text around a source, and the one place where a source that is too long is cut.

A template such as "Summarize the following conversation.\\n\\n{dialogue}\\n\\nSummary: " has one placeholder, named
after the source column (or `{source}`); `{{` and `}}` stand for braces. It is split once into prefix and suffix, and
data are joined to them, never formatted, so braces in data are plain characters.

Cutting the end of the tokens would lose the suffix, which tells the model what to do: the source is cut instead.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loralab.errors import DataError, RecipeError, nearest
from loralab.metrics.labels import Labels

Tokenize = Callable[..., Mapping[str, Any]]  # a tokenizer's call


@dataclass(frozen=True, slots=True)
class Prompt:
    """A template whose placeholder is `{column}` or `{source}`. Raises `RecipeError` where the template is not one.

    `causal`: a decoder-only model reads it, and goes on from its last token with the target. `begins`: what it reads is the
    beginning of a plain text, with the start before it. `labels`: a classifier reads it.
    """

    template: str
    column: str = "source"
    causal: bool = False
    begins: bool = False
    labels: Labels | None = None
    prefix: str = field(init=False, repr=False)
    suffix: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        prefix, suffix = split_template(self.template, self.column)
        object.__setattr__(self, "prefix", prefix)
        object.__setattr__(self, "suffix", suffix)

    def fill(self, source: str) -> str:
        return self.prefix + source + self.suffix

    def with_examples(self, examples: Sequence[tuple[str, str]], source: str) -> str:
        """A source that, filled in, has worked examples, (source, target) each, before its prompt (few_shot.py)."""
        gap = "" if self.suffix[-1:].isspace() else "\n"
        return "".join(f"{asked}{self.suffix}{gap}{answer}\n\n{self.prefix}" for asked, answer in examples) + source

    def cut(self, source: str, tokenizer: Tokenize, max_length: int) -> list[int]:
        """Token ids of the prompt around the longest start of `source` with which they are at most `max_length`.

        A start ends where a token of the whole text ends. It is tokenised anew together with prefix and suffix, since a
        tokenizer may join the characters beside the cut; from the first guess the cut moves until it fits and one more
        token does not. Raises `DataError` where the prompt alone leaves no room.
        """
        num_tokens, ends = token_ends(self, source, tokenizer)
        surplus = num_tokens - max_length
        assert surplus > 0, "nothing to cut"
        stops = sorted({0, *ends})  # several tokens may end at one character

        def ids_up_to(stop: int) -> list[int]:
            return list(tokenizer(self.fill(source[: stops[stop]]), verbose=False)["input_ids"])

        stop = stops.index(ends[-surplus - 1]) if surplus < len(ends) else 0
        ids = ids_up_to(stop)
        while stop and len(ids) > max_length:
            stop -= 1
            ids = ids_up_to(stop)
        while stop + 1 < len(stops) and len(longer := ids_up_to(stop + 1)) <= max_length:
            stop, ids = stop + 1, longer
        if not stop:
            raise DataError(
                f"The prompt alone takes {len(ids)} tokens, which leaves no room for a source within "
                f"max_source_length {max_length}. Shorten the prompt or raise max_source_length."
            )
        return ids


def split_template(template: str, column: str) -> tuple[str, str]:
    """(text before the placeholder, text after it), with doubled braces made single."""
    known = (column, "source")
    literals, fields = [""], []
    try:
        for literal, name, spec, conversion in string.Formatter().parse(template):
            literals[-1] += literal
            if name is not None:
                fields.append(name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else ""))
                literals.append("")
    except ValueError as error:
        raise RecipeError(
            f"The prompt {template!r} has an unbalanced brace ({error}). Write {{{{ or }}}} for a brace itself."
        ) from error
    for name in fields:
        if name not in known:
            raise RecipeError(
                f"The prompt has an unknown placeholder {{{name}}}. {nearest(name, known)} "
                "Write {{ and }} for braces themselves."
            )
    if len(fields) != 1:
        found = " and ".join(f"{{{name}}}" for name in fields) or "none"
        raise RecipeError(
            f"The prompt {template!r} must have {{{column}}} exactly once, where the source goes; it has {found}."
        )
    return literals[0], literals[1]


def token_ends(prompt: Prompt, source: str, tokenizer: Tokenize) -> tuple[int, list[int]]:
    """(tokens of the whole text, where those that end within the source end: character offsets into it, in order)."""
    start = len(prompt.prefix)
    offsets = tokenizer(prompt.fill(source), return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return len(offsets), [end - start for _, end in offsets if start < end <= start + len(source)]
