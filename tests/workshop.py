"""A folder in which commands run as a user types them: a tiny base, real rows, a recipe, and some damaged data sets."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from processes import Process
from tiny import make_bart, make_t5

PROMPT = "Summarize: {dialogue}\nSummary: "


def furnish(place: Path, data_folder: Path) -> Path:
    """A folder with a tiny base, 60 + 12 real rows (two dialogues stand there twice), and a recipe."""
    make_t5(place / "base", "untied", tokenizer=data_folder / "tokenizers/t5", vocabulary=32128)
    make_bart(place / "bart", tokenizer=data_folder / "tokenizers/t5")
    (place / "data").mkdir()
    for split, count in (("train", 60), ("validation", 10)):
        with gzip.open(data_folder / f"dialogsum/{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            lines = list(islice(file, count))
        if split == "validation":
            lines += [json.dumps(json.loads(line) | {"summary": "A second reference."}) + "\n" for line in lines[:2]]
        (place / f"data/{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    rows = (place / "data/train.jsonl").read_bytes()
    damaged = {"empty/train.jsonl": b"", "cut-off/train.jsonl.gz": gzip.compress(rows)[:-500]}
    damaged["no-json/train.jsonl"] = rows.replace(b'{"id": "train_1"', b'"id": "train_1"', 1)
    for name, content in damaged.items():
        (place / name).parent.mkdir()
        (place / name).write_bytes(content)
        (place / name).with_name("validation.jsonl").write_bytes((place / "data/validation.jsonl").read_bytes())
    recipe = {
        "model": {"name": str(place / "base"), "dtype": "float32", "device": "cpu"},
        "data": {
            "name": str(place / "data"), "source": "dialogue", "target": "summary", "prompt": PROMPT,
            "max_source_length": 160, "max_target_length": 24,
        },
        "lora": {"rank": 4, "alpha": 8},
        "training": {"tokens_per_batch": 512, "epochs": 2},
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": {"split": "validation", "max_new_tokens": 8},
        "variants": {
            "zero-shot": {"training.method": "none"}, "lora-4": {},
            "full": {"training.method": "full", "optimizer.learning_rate": 1e-3},
        },
        "published": {"lora-4": {"rouge1": 40.81, "gflops": 2.45}},
        "published_source": "a test",
    }  # fmt: skip
    (place / "tiny.yaml").write_text(json.dumps(recipe))
    return place


@dataclass(frozen=True)
class Done:
    """What a command has printed."""

    stdout: str
    stderr: str


def loralab(place: Path, *arguments: str, code: int = 0) -> Done:
    process = Process(place, arguments)
    assert process.wait() == code, process.errors
    done = Done(process.output, process.errors)
    assert "Traceback" not in done.stderr
    return done
