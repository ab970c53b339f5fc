"""Several data sets in one training: shares over an epoch, passes, exact resume, each set's own prompt, leaks, mistakes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dying import train_until
from folders import read, real_rows, write_jsonl

from loralab.config.loading import load_recipe
from loralab.config.recipe import Recipe
from loralab.data.mixture import Mixture
from loralab.data.prompts import Prompt
from loralab.data.span_corruption import encode_documents
from loralab.data.tokenization import encode
from loralab.data.tokenized_split import EncodedSplit
from loralab.errors import DataError, RecipeError
from loralab.runs.record import read_lines, read_record
from loralab.training import from_scratch as scratch
from loralab.training.loop import plan_epochs, plan_steps
from loralab.training.mixture import mix
from loralab.training.train import train

PROMPTS = {"main": "Summarize: {dialogue}", "chats": "Chat: {dialogue}\nIn short: "}
QUICK = ["data.max_train_rows=20", "evaluation.metrics=[]", "validation.every=null", "training.epochs=2"]


@pytest.fixture(scope="module")
def sets(data_folder: Path, t5: Any) -> dict[str, EncodedSplit]:
    """40 rows of DialogSum, 30 of SAMSum, each with a prompt of its own."""
    rows = {
        "main": read(data_folder / "dialogsum", "validation", max_validation_rows=40),
        "chats": read(data_folder / "samsum", "validation", max_validation_rows=30),
    }
    return {name: encode(rows[name], t5, Prompt(PROMPTS[name], "dialogue"), 64, 16) for name in rows}


def some_recipe(seed: int = 0, **weights: float | None) -> Recipe:
    columns = {"name": "x", "source": "dialogue", "target": "summary"}
    mixture = {name: {**columns, "weight": weight} for name, weight in weights.items()}
    training = {"epochs": 5, "tokens_per_batch": 400, "seed": seed}
    return Recipe.model_validate(
        {"name": "x", "model": {"name": "x"}, "data": columns, "mixture": mixture, "training": training}
    )


def rows_by_set(mixture: Mixture, rows: Any) -> list[list[int]]:
    """Of each set the rows, counted from 0, whichever pass they are of."""
    number = len(mixture.parts)
    return [
        [int(row) // number % len(part) for row in rows if row % number == p] for p, part in enumerate(mixture.parts)
    ]


@pytest.mark.parametrize(("weight", "count"), [(0.5, 20), (0.31, 12), (1, 40), (2.25, 90), (None, 30)])
def test_an_epoch_has_the_shares_that_the_weights_say(
    weight: float | None, count: int, sets: dict[str, EncodedSplit]
) -> None:
    """In the very batches of the training; and a row comes again only when all others of its set have come."""
    recipe = some_recipe(chats=weight)
    mixture = mix(recipe, sets["main"], {"chats": sets["chats"]})
    seen: Counter[int] = Counter()
    for epoch in plan_epochs(recipe, mixture):
        main, chats = rows_by_set(mixture, np.concatenate([batch for step in epoch for batch in step]))
        assert sorted(main) == list(range(40)) and len(chats) == count
        seen.update(dict.fromkeys(range(30), 0) | Counter(chats))
        assert max(seen.values()) - min(seen.values()) <= 1
    assert sum(seen.values()) == 5 * count


def test_the_order_is_made_of_seed_and_epoch_alone(sets: dict[str, EncodedSplit]) -> None:
    def plan(seed: int, weight: float) -> list[list[int]]:
        recipe = some_recipe(seed, chats=weight)
        steps = plan_steps(recipe, mix(recipe, sets["main"], {"chats": sets["chats"]}))
        return [rows.tolist() for step in steps for rows in step]

    first, again, other = plan(1, 0.5), plan(1, 0.5), plan(2, 0.5)
    assert first == again != other
    recipe = some_recipe(1, chats=0.5)
    mixture = mix(recipe, sets["main"], {"chats": sets["chats"]})
    chats = [rows_by_set(mixture, mixture.rows_of(epoch))[1] for epoch in range(4)]
    assert len({tuple(rows) for rows in chats}) == 4
    assert sorted([*chats[0], *chats[1][:10]]) == list(range(30)), "the first pass takes one epoch and half of the next"
    assert sorted([*chats[1][10:], *chats[2]]) == list(range(30))


def test_one_set_alone_is_planned_as_ever(sets: dict[str, EncodedSplit]) -> None:
    """A set that adds nothing to the plan's input adds nothing to the plan."""
    recipe = some_recipe()
    plain = plan_steps(recipe, sets["main"])
    alone = plan_steps(recipe, Mixture(("main",), (sets["main"],), (40,), 0))
    assert [[rows.tolist() for rows in step] for step in plain] == [[rows.tolist() for rows in step] for step in alone]


def test_rows_keep_their_own_prompt_and_tokens(sets: dict[str, EncodedSplit], t5: Any) -> None:
    recipe = some_recipe(chats=0.5)
    mixture = mix(recipe, sets["main"], {"chats": sets["chats"]})
    rows = mixture.rows_of(3)
    batch = mixture.collate(rows, 0)
    for p, (name, part) in enumerate(sets.items()):
        mine = rows % 2 == p
        texts = t5.batch_decode(batch.source_ids[mine])
        assert mine.any() and all(text.startswith(PROMPTS[name][:5]) for text in texts)
        for at, row in zip(np.flatnonzero(mine), rows_by_set(mixture, rows)[p], strict=True):
            assert batch.source_ids[at][batch.source_mask[at]].tolist() == part.source(row).tolist()
            assert batch.labels[at][batch.labels[at] != -100].tolist() == part.target(row).tolist()
    np.testing.assert_array_equal(mixture.lengths_of(rows)[0], batch.source_mask.sum(axis=1))
    np.testing.assert_array_equal(mixture.lengths_of(rows)[1], (batch.labels != -100).sum(axis=1))
    told = mixture.numbers_of(np.array([2 * 4, 2 * 6, 2 * 7 + 1]))
    assert told == f"{sets['main'].numbers[4]}, {sets['main'].numbers[6]} of x; {sets['chats'].numbers[7]} of chats"


def test_documents_are_masked_anew_in_every_pass(sets: dict[str, EncodedSplit], data_folder: Path, t5: Any) -> None:
    texts = read(
        data_folder / "imdb",
        "validation",
        source="text",
        target=None,
        objective="span-corruption",
        max_validation_rows=3,
    )
    chunks = encode_documents(texts, t5, "span-corruption", 48, 24, seed=0)
    recipe = some_recipe(chats=None, text=0.25)
    mixture = mix(recipe, sets["main"], {"chats": sets["chats"], "text": chunks})
    assert mixture.counts == (40, 30, 10) and 10 < len(chunks) < 40
    seen: Counter[int] = Counter()
    for epoch in range(8):
        for row in mixture.rows_of(epoch)[-10:]:
            chunk = int(row) // 3 % len(chunks)
            np.testing.assert_array_equal(mixture.target(row), chunks.target(chunk + seen[chunk] * len(chunks)))
            seen[chunk] += 1
    assert set(seen.values()) == {80 // len(chunks), -(-80 // len(chunks))}


# A run


@pytest.fixture(scope="module")
def chats(workshop: Path, data_folder: Path) -> dict[str, Any]:
    """25 rows of SAMSum; two of them stand among the rows that are evaluated, white space apart."""
    rows = [row for row in real_rows(data_folder / "samsum", "validation") if len(row["dialogue"]) < 400][:23]
    evaluated = read_lines(workshop / "data/validation.jsonl")[3:5]
    rows += [{"dialogue": row["dialogue"].replace("\n", "\n\n"), "summary": "Copied."} for row in evaluated]
    (workshop / "mixed-in").mkdir(exist_ok=True)
    write_jsonl(workshop / "mixed-in/train.jsonl", rows)
    columns = {"source": "dialogue", "target": "summary", "prompt": PROMPTS["chats"], "max_source_length": 128}
    return {"name": str(workshop / "mixed-in"), **columns, "max_target_length": 24, "weight": 0.75}


def recipe(workshop: Path, chats: dict[str, Any], *overrides: str) -> Recipe:
    return load_recipe(workshop / "tiny.yaml", [*QUICK, f"mixture={json.dumps({'chats': chats})}", *overrides])


def test_a_run_says_and_records_its_shares(
    workshop: Path, chats: dict[str, Any], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"name": chats["name"], "source": "dialogue", "target": "summary"}
    write_jsonl(workshop / "mixed-in/test.jsonl", read_lines(workshop / "mixed-in/train.jsonl")[:4])
    _, record = train(recipe(workshop, chats, f"forgetting={json.dumps({'own': own})}"), tmp_path / "run")
    told = capsys.readouterr().err
    about = record["trained_on"]
    mixed = about["mixture"]["chats"]
    assert (about["rows"], about["rows_per_epoch"], about["share"]) == (20, 20, pytest.approx(20 / 35, abs=1e-6))
    assert (mixed["rows"], mixed["rows_per_epoch"], mixed["share"]) == (25, 15, pytest.approx(15 / 35, abs=1e-6))
    assert mixed["leaked"] == record["evaluated"]["leaked"] == 2 and mixed["data"] == chats["name"]
    assert record["forgetting"]["own"]["leaked"] == 4, "what is mixed in is trained on"
    assert (
        f"mixture.chats: {chats['name']}, train: 25 rows" in told
        and "2 of the 12 validation rows have a source" in told
    )
    assert "\n         20 rows of " in told and ", 57.1 % (1.00 passes over its 20)" in told
    assert "\n         15 rows of chats, 42.9 % (0.60 passes over its 25)" in told
    train(recipe(workshop, chats, "lora.rank=2"), tmp_path / "again")
    told = capsys.readouterr().err
    assert "reusing tokens of 20 rows" in told and "reusing tokens of 25 rows" in told


def test_a_run_that_was_killed_goes_on_exactly(workshop: Path, chats: dict[str, Any], tmp_path: Path) -> None:
    """In the middle of the second epoch, with further data in every batch."""
    settings = recipe(workshop, chats, "training.save_every=2", "lora.dropout=0.1")
    whole, record = train(settings, tmp_path / "whole")
    train_until(record["steps"] // 2 + 2, settings, tmp_path / "killed")
    killed, again = train(settings, tmp_path / "killed", resume=True)
    for file in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    losses = [[line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in (whole, killed)]
    assert losses[0] == losses[1] and again["metrics"] == read_record(whole)["metrics"]


def test_a_tokenizer_is_trained_on_all_sets(
    workshop: Path, chats: dict[str, Any], data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    monkeypatch.setattr(scratch, "train_tokenizer", lambda given, *_: texts.extend(given))
    monkeypatch.setattr(scratch, "create_base", lambda *_: None)
    new = [
        "model={name: t5-small, init: random, tokenizer: train}",
        "training.method=full",
        "variants={}",
        "published={}",
    ]
    settings = recipe(workshop, chats, *new)
    rows = [read(workshop / "data", max_train_rows=5), read(workshop / "mixed-in", max_train_rows=5)]
    scratch._write(settings, rows, workshop / "never")
    assert texts == [text for split in rows for row in split for text in (row.source, *row.targets)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mixture.chats.wieght=2"], "mixture.chats.wieght: unknown key. Did you mean 'weight'"),
        (["mixture.chats.weight=0"], "mixture.chats.weight: expected greater than 0; got 0"),
        (["mixture.chats.weight=-1"], "mixture.chats.weight: expected greater than 0; got -1"),
        (["mixture.chats.max_test_rows=5"], "mixture.chats: max_test_rows means nothing here; validation and evaluation are"),
        (["mixture.more={name: x, target: summary}"], "mixture.more.source: missing; the recipe must give it"),
        (["data.weight=2"], "data.weight: unknown key."),
    ],
)  # fmt: skip
def test_mistakes_in_the_block(overrides: list[str], message: str, workshop: Path, chats: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(workshop, chats, *overrides)
    assert message in str(caught.value) and str(caught.value).count("\n") == 1


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("mixture.chats.target=sumary", DataError, r"mixture.chats: .*no column 'sumary' \(Did you mean 'summary'"),
        ("mixture.chats.name=./nowhere", DataError, "mixture.chats: ./nowhere: there is no such folder"),
        ("mixture.chats.source=null", RecipeError, "mixture.chats: data.source is null.*is for decoder-only models"),
        ("mixture.chats.weight=0.01", RecipeError, "mixture.chats.weight is 0.01: beside the 20 rows .* no row of it"),
    ],
)
def test_mistakes_leave_nothing_behind(
    override: str, error: type[Exception], message: str, workshop: Path, chats: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train(recipe(workshop, chats, override), tmp_path / "run")
    assert not (tmp_path / "run").exists()
