"""Adapter folders as PEFT leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapter_cases import hf_t5, randomise
from peft import LoraConfig, PeftModel, get_peft_model


def saved_with_embeddings(base: Path, folder: Path, **settings: Any) -> PeftModel:
    """PEFT's T5, moved, and its folder, where embedding and head of the base lie beside LoRA."""
    config = LoraConfig(r=4, lora_alpha=6, **{"target_modules": ["q", "v"], **settings})
    peft = get_peft_model(hf_t5(base), config).eval()
    randomise(p for p in peft.parameters() if p.requires_grad)
    peft.save_pretrained(folder, save_embedding_layers=True)
    return peft
