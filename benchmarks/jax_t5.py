"""One training by both engines: a T5 on rows of a data set, the same start, the same batches, AdamW, no dropout, in fp32 or fp64.

    python benchmarks/jax_t5.py MODEL DATA --method lora --rate 1e-3 --steps 200 --out lora

MODEL and DATA are what `model.name` and `data.name` are in a recipe. Prints one object: the losses of both engines, how far
apart they ever were, and the seconds of a step. With --peers, Transformers' own two ways of computing attention are trained
beside them with PEFT: how far rounding alone leads; with --float64 nearly all rounding is gone. With --together JAX begins
every step with PyTorch's weights, so that no step pays for the rounding of those before it. Answers to validation rows, by
base and both engines, go to OUT/answers.jsonl for `loralab score`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import torch
from torch import Tensor

from loralab.config.generation import Decoding
from loralab.config.loading import load_recipe
from loralab.config.recipe import Recipe
from loralab.data.batches import Batch, plan_batches
from loralab.data.prompts import Prompt
from loralab.data.splits import read_split
from loralab.data.tokenization import encode, encode_sources
from loralab.models.checkpoint_files import model_folder
from loralab.on_jax import adapt, load_adapter
from loralab.on_jax.generation.generate import generate_ids
from loralab.on_jax.loading.load import load_weights
from loralab.on_jax.names import from_hugging_face
from loralab.on_torch.engine import TorchEngine, open_engine
from loralab.on_torch.generation import generate as on_torch
from loralab.training.lr_schedule import rate_at


def main() -> None:
    options = parse()
    with jax.enable_x64(options.float64):
        compare(options)


def compare(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    engine = open_engine(recipe)
    if options.float64:
        engine.model.double()
    batches = fixed_batches(recipe, engine, options)
    in_jax = InJax(engine, recipe, options)
    before = in_jax.write()
    runs: dict[str, Callable[[Batch, int], float]] = {"jax": in_jax.step}
    runs["torch"] = partial(in_torch, engine, recipe, len(batches))
    if options.peers:
        runs |= {name: Peer(engine, recipe, name, len(batches)).step for name in ("sdpa", "eager")}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for step, batch in enumerate(batches):
        for name, train in runs.items():  # JAX first: it may take over weights from which PyTorch begins this step
            begun = time.perf_counter()
            losses[name].append(train(batch, step))
            seconds[name].append(time.perf_counter() - begun)
    print(json.dumps(summary(vars(options), losses, seconds, in_jax.strayed), indent=1))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "losses.json").write_text(json.dumps(losses))
    if options.answers:
        after, there = in_jax.write(), write_in_torch(engine, recipe, options)
        rows = read_split(recipe.data, "validation").examples[: options.answers]
        with open(options.out / "answers.jsonl", "w", encoding="utf-8") as file:
            for row, base, mine, other in zip(rows, before, after, there, strict=True):
                line = {"source": row.source, "summary": row.targets[0], "base": base, "jax": mine, "torch": other}
                file.write(json.dumps(line) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--rules", default="q, k, v, o", help="what LoRA is on")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--source", type=int, default=256, help="tokens that sources are cut to, and batches padded to")
    parser.add_argument("--target", type=int, default=64, help="the same of targets")
    parser.add_argument("--answers", type=int, default=0, help="validation rows that are answered before and after")
    parser.add_argument("--peers", action="store_true", help="train Transformers with PEFT too, in two ways")
    parser.add_argument("--float64", action="store_true", help="weights, products and optimizers in fp64")
    parser.add_argument("--together", action="store_true", help="JAX takes over PyTorch's weights before every step")
    parser.add_argument("--out", type=Path, default=Path("jax-t5"))
    options = parser.parse_args()
    if options.together and options.float64:
        parser.error(
            "--together takes weights over through an adapter's folder, which is in fp32: leave --float64 out."
        )
    return options


def recipe_of(options: argparse.Namespace) -> Recipe:
    lora = ["lora.dropout=0", f"lora.rules=[{options.rules}]", "lora.rank=8", "lora.alpha=16"]
    return load_recipe(
        "flan-t5-base-dialogsum",
        [
            f"model.name={options.model}", f"data.name={options.data}", "model.dtype=float32", "model.device=cpu",
            "model.dropout=0", *(lora if options.method == "lora" else []),
            f"training.method={options.method}", f"optimizer.learning_rate={options.rate}",
        ],
    )  # fmt: skip


def fixed_batches(recipe: Recipe, engine: TorchEngine, options: argparse.Namespace) -> list[Batch]:
    """The first batches of the training split, all of one shape, so that JAX compiles one program."""
    data = recipe.data.model_copy(update={"max_train_rows": options.rows * options.steps})
    prompt = Prompt(data.prompt, data.source or "source")
    encoded = encode(read_split(data, "train"), engine.tokenizer, prompt, options.source, options.target)
    lengths = encoded.source_lengths, encoded.target_lengths
    plan = plan_batches(*lengths, tokens_per_batch=None, batch_size=options.rows, seed=1, epoch=0)
    return [widened(encoded.collate(each, engine.pad_id), options) for each in plan]


def widened(batch: Batch, options: argparse.Namespace) -> Batch:
    def to(width: int, array: np.ndarray, value: int) -> Any:
        return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=value)

    return replace(
        batch,
        source_ids=to(options.source, batch.source_ids, 0),
        source_mask=to(options.source, batch.source_mask, False),
        labels=to(options.target, batch.labels, -100),
    )


# The two engines


def in_torch(engine: TorchEngine, recipe: Recipe, steps: int, batch: Batch, step: int) -> float:
    return engine.train_step([batch], rate_at(step, steps, recipe.optimizer)).loss


class InJax:
    """The JAX side. Begins where the other engine does, through an adapter's folder."""

    def __init__(self, engine: TorchEngine, recipe: Recipe, options: argparse.Namespace) -> None:
        self.engine, self.recipe, self.options = engine, recipe, options
        self.dtype = np.dtype("float64" if options.float64 else "float32")
        self.model, self.base = load_weights(model_folder(recipe.model.name), self.dtype)
        spec = recipe.lora.model_copy(update={"disabled": engine.adapter is None})
        self.adapted = adapt(spec, self.model.token_losses, self.base)
        self.optimizer = optax.chain(shortened(1.0), optax.adamw(self.rate, weight_decay=0.0))
        self.trained = self.theirs()
        self.state = self.optimizer.init(self.trained)
        self.update = jax.jit(self.updated, donate_argnums=(0, 1))
        self.begun: Any = None
        self.strayed: list[float] = []

    def rate(self, count: Any) -> Any:  # optax.linear_schedule computes in fp32
        return self.options.rate * (1 - count.astype(self.dtype) / self.options.steps)

    def updated(self, trained: Any, state: Any, base: Any, ids: Any, mask: Any, labels: Any) -> Any:
        def mean_loss(trained: Any) -> Any:
            return self.adapted(base, trained, ids, mask, labels).sum() / (labels != -100).sum()

        loss, gradient = jax.value_and_grad(mean_loss)(trained)
        updates, state = self.optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    def step(self, batch: Batch, step: int) -> float:
        if self.options.together:
            self.take_over()
        batched = batch.source_ids, batch.source_mask, batch.labels
        self.trained, self.state, loss = self.update(self.trained, self.state, self.base, *batched)
        return float(loss)

    def take_over(self) -> None:
        """Goes on from the other engine's weights, and notes how far the last step has led elsewhere, as a part of that step."""
        now = self.theirs()
        if self.begun is not None:
            self.strayed.append(distance(now, self.trained) / distance(now, self.begun))
        self.trained, self.begun = now, jax.tree.map(jax.numpy.copy, now)

    def theirs(self) -> Any:
        """What the other engine trains, as it is now."""
        if self.engine.adapter is None:
            weights = {name: weight.detach().numpy() for name, weight in self.engine.model.named_parameters()}
            return self.adapted.start(jax.tree.map(jax.numpy.array, from_hugging_face(weights)))
        self.engine.adapter.save(self.options.out / "now")
        _, trained = load_adapter(self.options.out / "now", self.model, self.base)
        return jax.tree.map(lambda array: array.astype(self.dtype), trained)

    def write(self) -> list[str]:
        merged = self.adapted.merge(self.base, self.trained)
        sources = sources_of(self.recipe, self.engine, self.options)
        answers = generate_ids(self.model, merged, sources, Decoding(max_new_tokens=self.options.target))
        return list(self.engine.tokenizer.batch_decode(answers, skip_special_tokens=True))


def distance(one: Any, other: Any) -> float:
    return float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, one, other)))


def shortened(length: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm with the 1e-6 that PyTorch's clip_grad_norm_ adds to the gradient's length."""

    def update(gradient: Any, state: Any, trained: Any = None) -> Any:
        factor = jax.numpy.minimum(1.0, length / (optax.tree.norm(gradient) + 1e-6))
        return jax.tree.map(lambda array: array * factor, gradient), state

    return optax.GradientTransformation(lambda trained: optax.EmptyState(), update)


def sources_of(recipe: Recipe, engine: TorchEngine, options: argparse.Namespace) -> list[list[int]]:
    """Of the first validation rows."""
    texts = [row.source for row in read_split(recipe.data, "validation").examples[: options.answers]]
    prompt = Prompt(recipe.data.prompt, recipe.data.source or "source")
    return encode_sources(texts, engine.tokenizer, prompt, options.source)[0]


def write_in_torch(engine: TorchEngine, recipe: Recipe, options: argparse.Namespace) -> list[str]:
    answers = on_torch.generate_ids(
        engine.model, sources_of(recipe, engine, options), Decoding(max_new_tokens=options.target), engine.pad_id
    )
    return list(engine.tokenizer.batch_decode(answers, skip_special_tokens=True))


class Peer:
    """Transformers' T5 with PEFT and PyTorch's AdamW, from the same start."""

    def __init__(self, engine: TorchEngine, recipe: Recipe, attention: str, steps: int) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import T5ForConditionalGeneration

        self.recipe, self.steps = recipe, steps
        self.model: Any = T5ForConditionalGeneration.from_pretrained(
            model_folder(recipe.model.name),
            dtype=next(engine.model.parameters()).dtype,
            attn_implementation=attention,
            dropout_rate=0.0,
        )
        if engine.adapter is not None:
            config = LoraConfig(
                r=8, lora_alpha=16, target_modules=sorted(engine.adapter.updates), task_type="SEQ_2_SEQ_LM"
            )
            self.model = get_peft_model(self.model, config)
            self.take(engine)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0
        )

    @torch.no_grad()
    def take(self, engine: TorchEngine) -> None:
        assert engine.adapter is not None
        theirs = dict(self.model.named_parameters())
        for module, update in engine.adapter.updates.items():
            for part in "AB":
                theirs[f"base_model.model.{module}.lora_{part}.default.weight"].copy_(getattr(update, part))

    def step(self, batch: Batch, step: int) -> float:
        ids, mask, labels = map(torch.from_numpy, (batch.source_ids, batch.source_mask, batch.labels))
        loss: Tensor = self.model.train()(input_ids=ids, attention_mask=mask, labels=labels).loss
        self.optimizer.zero_grad()
        loss.backward()
        (group,) = self.optimizer.param_groups
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = rate_at(step, self.steps, self.recipe.optimizer)
        self.optimizer.step()
        return float(loss.detach())


def summary(
    options: dict[str, Any], losses: dict[str, list[float]], seconds: dict[str, list[float]], strayed: list[float]
) -> dict[str, Any]:
    def apart(one: Iterable[float], other: Iterable[float]) -> dict[str, float]:
        difference = np.abs(np.subtract(list(one), list(other)))
        places = sorted({0, 9, 19, 49, 99, len(difference) - 1} & set(range(len(difference))))
        return {"most": float(difference.max()), **{f"step {at + 1}": float(difference[at]) for at in places}}

    result: dict[str, Any] = {"options": {key: str(value) for key, value in options.items()}}
    for name, values in losses.items():
        last = float(np.mean(values[-20:]))
        result[name] = {"first": values[0], "last 20": last, "seconds a step": float(np.median(seconds[name][1:]))}
    result["jax to torch"] = apart(losses["jax"], losses["torch"])
    if strayed:
        result["jax's steps off torch's"] = {"median": float(np.median(strayed)), "most": max(strayed)}
    if "eager" in losses:
        result["sdpa to eager"] = apart(losses["sdpa"], losses["eager"])
        result["torch to sdpa"] = apart(losses["torch"], losses["sdpa"])
    return result


if __name__ == "__main__":
    main()
