"""stories260K as a folder that Transformers loads: its weights are there as they are, its tokenizer as a list of pieces.

A piece's score is the rank at which SentencePiece's merges made it, so that the merges can be told from the list.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import LlamaTokenizer

# The format of ChatML: what most chat models of today read.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_stories(folder: Path, data_folder: Path) -> Path:
    """The real weights with a tokenizer.json beside them. The tokenizer begins every text with <s> and has no padding token."""
    folder.mkdir()
    source = data_folder / "models/stories260K"
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, folder)
        (folder / name).chmod(0o644)
    pieces = [piece for piece, _ in json.loads((source / "tok512.vocab.json").read_text(encoding="utf-8"))]
    pieces[1:3] = ["<s>", "</s>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[259:]  # after the special pieces and the bytes
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, add_eos_token=False).save_pretrained(folder)
    return folder
