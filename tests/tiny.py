"""Tiny random T5 and GPT-2 folders as Transformers writes them, T5's in the three layouts of the published checkpoints; a tiny
tokenizer."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from loralab.on_torch.loading.load import load_weights
from loralab.on_torch.models.gpt2 import GPT2
from loralab.on_torch.models.t5 import T5

LAYOUTS = ("tied-scaled", "tied-unscaled", "untied")
CPU = torch.device("cpu")


def ours(folder: Path) -> T5:
    model = load_weights(folder, torch.float32, CPU)
    assert isinstance(model, T5)
    return model


def theirs(folder: Path) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def make_t5(
    folder: Path,
    layout: str = "tied-scaled",
    seed: int = 0,
    tokenizer: Path | None = None,
    vocabulary: int = 120,
    width: int = 32,
) -> Path:
    """A random T5 of a few thousand weights; v1.0 for the first layout, gated v1.1 for the others. More encoder than decoder layers."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocabulary, "d_model": width, "d_kv": width // 4, "d_ff": 2 * width,
        "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0, "initializer_factor": 1.0,
        "feed_forward_proj": "relu" if layout == "tied-scaled" else "gated-gelu",
    }  # fmt: skip
    if layout != "tied-scaled":
        settings["tie_word_embeddings"] = False
    model = T5ForConditionalGeneration(T5Config(**settings))
    if layout == "tied-unscaled":
        model.shared.weight.data *= width**-0.5  # logits of about 1, whose last bits are within the default tolerance
    model.save_pretrained(folder)
    if layout == "untied":  # as the published FLAN files are: a head of its own, and the config of older libraries
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = torch.randn(vocabulary, width) * width**-0.5
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = False
        config.pop("scale_decoder_outputs", None)
        (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            shutil.copy(file, folder)
    return folder


def end_with(folder: Path, answers: list[list[int]]) -> Path:
    """Makes the token that stands in about half of these answers the one that ends a text."""
    rows = Counter(token for answer in answers for token in set(answer))
    token = min(rows, key=lambda token: abs(rows[token] - len(answers) / 2))
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": token}))
    return folder


def make_gpt2(
    folder: Path, vocabulary: int = 97, tied: bool = True, tokenizer: Path | None = None, **sizes: int
) -> Path:
    """A random GPT-2 of three layers; its biases and norms are random too. A tokenizer's folder brings its end token."""
    torch.manual_seed(0)
    end = 1 if tokenizer is None else 50256
    settings = {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": end, "eos_token_id": end}
    config = GPT2Config(vocab_size=vocabulary, tie_word_embeddings=tied, initializer_range=0.2, **(settings | sizes))
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            shutil.copy(file, folder)
    return folder


def our_gpt2(folder: Path) -> GPT2:
    model = load_weights(folder, torch.float32, CPU)
    assert isinstance(model, GPT2)
    return model


def their_gpt2(folder: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


def make_bart(folder: Path, tokenizer: Path) -> Path:
    """A random BART that speaks T5's tokens: an architecture that is not one of ours."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=32128, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=0, eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def make_llama(folder: Path, tokenizer: Path) -> Path:
    """Writes a random Llama with GPT-2's tokens: a decoder-only architecture that is not one of ours."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=50256, eos_token_id=50256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def shard(folder: Path, count: int = 3) -> Path:
    """Splits the folder's weight file into shards with an index, as large models come."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    index = {}
    for part in range(count):
        file = f"model-{part + 1:05}-of-{count:05}.safetensors"
        chunk = names[part::count]
        save_file({name: weights[name] for name in chunk}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(chunk, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose tokens are the words of these texts."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=10**6
    )
