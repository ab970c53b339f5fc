"""A tokenizer of one's own: BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) over bytes, with T5's special tokens.

Every text is representable and comes back exactly, as bytes are the alphabet: line ends and indentation too, which T5's
own tokenizer drops. <pad> is 0, </s> is 1, <unk> is 2 (no text gives it), and the sentinels <extra_id_0> … <extra_id_99>
stand at the end of the vocabulary, the first of them last, as in T5's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loralab.errors import DataError, RecipeError

DEFAULT_VOCABULARY = 8192
SPECIAL = ("<pad>", "</s>", "<unk>")
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))
FEWEST = len(SPECIAL) + len(SENTINELS) + 256  # the bytes


def train_tokenizer(texts: Iterable[str], vocabulary: int, folder: Path) -> None:
    """Writes a tokenizer of exactly `vocabulary` tokens, learnt from the texts, that Transformers' AutoTokenizer reads.

    Raises:
        RecipeError: fewer tokens are asked for than there are bytes and special tokens.
        DataError: the texts are too few for so many tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < FEWEST:
        raise RecipeError(
            f"model.vocabulary is {vocabulary}; it must be at least {FEWEST}: 256 bytes, {len(SPECIAL)} special tokens "
            f"and {len(SENTINELS)} sentinels."
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
        vocab_size=vocabulary - len(SENTINELS),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (learnt := tokenizer.get_vocab_size() + len(SENTINELS)) < vocabulary:
        raise DataError(
            f"The training texts give {learnt} tokens, and model.vocabulary asks for {vocabulary}. Ask for fewer, or give more text."
        )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in reversed(SENTINELS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=list(SENTINELS),
        clean_up_tokenization_spaces=False,
        model_max_length=10**6,
    ).save_pretrained(folder)
