"""A tokenizer of one's own: BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) over bytes, with the special tokens of its
family.

Every text is representable and comes back exactly, as bytes are the alphabet: line ends and indentation too, which T5's
own tokenizer drops. For a T5 <pad> is 0, </s> is 1, <unk> is 2 (no text gives it), and the sentinels <extra_id_0> …
<extra_id_99> stand at the end of the vocabulary, the first of them last, as in T5's. For a GPT-2 <|endoftext|> is 0, both start
and end, and nothing else is special, as in GPT-2's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loralab.errors import DataError, RecipeError

DEFAULT_VOCABULARY = 8192
BYTES = 256


@dataclass(frozen=True)
class Special:
    """The tokens that no text gives."""

    names: dict[str, str]
    """Transformers' name for each: eos_token, …"""
    sentinels: tuple[str, ...]
    """At the end of the vocabulary."""
    closes: bool
    """True if the end token is added to every text."""

    @property
    def fewest(self) -> int:
        """Tokens of the smallest vocabulary."""
        return len(set(self.names.values())) + len(self.sentinels) + BYTES


T5 = Special(
    {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    tuple(f"<extra_id_{i}>" for i in range(100)),
    True,
)
GPT2 = Special({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, (), False)


def train_tokenizer(texts: Iterable[str], vocabulary: int, folder: Path, special: Special = T5) -> None:
    """Writes a tokenizer of exactly `vocabulary` tokens, learnt from the texts, that Transformers' AutoTokenizer reads.

    Raises:
        RecipeError: fewer tokens are asked for than there are bytes and special tokens.
        DataError: the texts are too few for so many tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names, sentinels = list(dict.fromkeys(special.names.values())), special.sentinels
    if vocabulary < special.fewest:
        raise RecipeError(
            f"model.vocabulary is {vocabulary}; it must be at least {special.fewest}: {BYTES} bytes, {len(names)} special "
            f"token{'s' * (len(names) > 1)} and {len(sentinels)} sentinels."
        )
    tokenizer = Tokenizer(models.BPE())
    docstring_quotes = pre_tokenizers.Split(
        Regex("\"\"\"|'''"), "isolated"
    )  # so that a docstring's text begins and ends at a token
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [docstring_quotes, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(sentinels),
        special_tokens=names,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (learnt := tokenizer.get_vocab_size() + len(sentinels)) < vocabulary:
        raise DataError(
            f"The training texts give {learnt} tokens, and model.vocabulary asks for {vocabulary}. Ask for fewer, or give more text."
        )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in reversed(sentinels)])
    if special.closes:
        end = special.names["eos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, names.index(end))]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special.names,
        extra_special_tokens=list(sentinels),
        clean_up_tokenization_spaces=False,
        model_max_length=10**6,
    ).save_pretrained(folder)
