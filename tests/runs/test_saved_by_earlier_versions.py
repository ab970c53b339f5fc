"""What an earlier version wrote is read by this one: recipes, runs, adapters, results, and the cache's entries.

`saved_by_0_1_0/` is what version 0.1.0 left of `loralab compare recipe.yaml --out comparison --json > compare.json` in
that folder, without pictures and without the tokenizer that it saved beside the adapter (the base has the same one).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from workshop import loralab

from loralab import load_recipe
from loralab.config.loading import parse_tree, recipe_from_tree, to_yaml
from loralab.data import tokenization as encode
from loralab.data.lengths import resolve_lengths
from loralab.data.splits import index_split
from loralab.models.checkpoint_files import load_tokenizer, model_folder
from loralab.tasks import task_of

STORED = Path(__file__).parent / "saved_by_0_1_0"
ENTRIES = {"lengths-8bf984988976dc1638aa1adaa643ef6d", "tokens-dc2a0b8550b0e17cdd3aee18672fc0ee"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return shutil.copytree(STORED, tmp_path / "place")


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def predictions(run: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in (run / "predictions.jsonl").read_text().splitlines()]


def within(stored: Any, written: Any) -> bool:
    """Tells whether all that was stored is written again, where newer settings may stand beside it."""
    if isinstance(stored, dict):
        return all(key in written and within(value, written[key]) for key, value in stored.items())
    return bool(stored == written)


def test_a_recipe_is_read_as_it_was_written() -> None:
    for file in STORED.glob("**/recipe.yaml"):
        if file.parent != STORED:  # that one was typed by a person
            recipe, stored = load_recipe(file), parse_tree(file.read_text(), str(file))
            written = parse_tree(to_yaml(recipe), str(file))
            assert within(stored, written) and recipe_from_tree(written, [], "written") == recipe


def test_a_finished_comparison_goes_on_without_training(place: Path) -> None:
    before = read(place / "comparison/results.json")
    done = loralab(place, "compare", "comparison", "--resume", "--json")
    assert done.stderr.count("It has finished already.") == 2
    found = json.loads(done.stdout)
    assert found.keys() >= before.keys()
    for row, stored in zip(found["rows"], before["rows"], strict=True):
        memory, memory_before = ((each.get("predicted") or {}).get("peak_bytes", []) for each in (row, stored))
        assert memory == pytest.approx(memory_before, rel=0.01), "predictions of memory may become better"
        memory_before[:] = memory
    for key in before:
        assert found[key] == before[key], key
    assert read(place / "comparison/results.json") == found
    assert json.loads((place / "compare.json").read_text()).keys() <= found.keys()


def test_runs_are_listed_with_their_scores(place: Path) -> None:
    listed = json.loads(loralab(place, "runs", "comparison", "--json").stdout)
    for name in ("zero-shot", "lora-2"):
        assert f"{read(place / f'comparison/{name}/record.json')['metrics']['rouge1']['value']:.2f}"[:4] in str(listed)


@pytest.mark.parametrize("run", ["zero-shot", "lora-2"])
def test_a_run_is_evaluated_as_it_was(run: str, place: Path) -> None:
    found = json.loads(loralab(place, "evaluate", f"comparison/{run}", "--json").stdout)["metrics"]
    stored = read(place / f"comparison/{run}/record.json")["metrics"]
    assert found.keys() == stored.keys()
    for name, metric in stored.items():
        assert found[name]["value"] == pytest.approx(metric["value"], rel=1e-5), name


def test_an_adapter_alone_answers_as_it_did(place: Path, tmp_path: Path) -> None:
    adapter = shutil.move(place / "comparison/lora-2/adapter", tmp_path / "adapter")
    rows = [json.loads(line) for line in (STORED / "data/test.jsonl").read_text().splitlines()]
    texts = [argument for row in rows for argument in ("--text", row["dialogue"])]
    shutil.rmtree(place)
    done = loralab(tmp_path, "generate", str(adapter), *texts, "--json")
    answers = json.loads(done.stdout)["answers"]
    assert answers == predictions(STORED / "comparison/lora-2")


def test_cached_tokens_are_found_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda library: "0")  # they are part of the key
    monkeypatch.setenv("LORALAB_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    data = load_recipe(place / "comparison/lora-2/recipe.yaml").data
    tokenizer, rows = load_tokenizer(model_folder("embedded:tiny-t5")), index_split(data, "train")
    prompt = task_of(data).prompt(tokenizer, causal=False)
    lengths = resolve_lengths(rows, tokenizer, data.max_source_length, data.max_target_length, prompt)
    assert lengths == tuple(read(place / "comparison/lora-2/record.json")["lengths"])
    encode.encode(rows, tokenizer, prompt, *lengths)
    assert {entry.name for entry in (place / "cache").iterdir()} >= ENTRIES
