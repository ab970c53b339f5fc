"""Worked examples before evaluated rows: which ones, in what words, how many fit, and what the scores are then made from."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import INSTRUCTION, index, real_rows, split_of, write_jsonl
from stories import CHATML, make_stories
from transformers import AutoModelForCausalLM, AutoTokenizer
from workshop import PROMPT

from loralab.config.loading import load_recipe
from loralab.data.chat_template import Chat, open_chat
from loralab.data.few_shot import Shots, draw_shots, shots_in_words, with_shots
from loralab.data.prompts import Prompt
from loralab.data.rows import Example
from loralab.data.splits import Split
from loralab.data.tokenization import NO_LIMIT, encode_sources
from loralab.errors import DataError, RecipeError
from loralab.experiments.compare import compare
from loralab.inference.generate import GenerateRequest, run_request
from loralab.inference.saved_model import evaluate_saved
from loralab.reports.summary import report
from loralab.runs.record import read_lines, read_record
from loralab.training.train import train

# The words.


def test_an_example_is_its_prompt_and_its_target_and_a_blank_line() -> None:
    prompt = Prompt("Question: {text}\nAnswer: ", "text")
    assert prompt.fill(prompt.with_examples([("a {b}", "c"), ("d", "e")], "f")) == (
        "Question: a {b}\nAnswer: c\n\nQuestion: d\nAnswer: e\n\nQuestion: f\nAnswer: "
    )
    assert prompt.fill(prompt.with_examples([], "f")) == "Question: f\nAnswer: "


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{text}", "a\nb\n\nc"),
        ("summarize: {text}", "summarize: a\nb\n\nsummarize: c"),
        ("{text} TL;DR:", "a TL;DR:\nb\n\nc TL;DR:"),
    ],
)
def test_a_target_never_runs_into_its_prompt(template: str, expected: str) -> None:
    prompt = Prompt(template, "text")
    assert prompt.fill(prompt.with_examples([("a", "b")], "c")) == expected


def test_in_a_chat_they_are_earlier_turns_after_the_rows_own_system_message() -> None:
    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    earlier = [said("system", "Be rude."), said("user", "Hi?"), said("assistant", "No."), said("user", "Why?")]
    own = [said("system", "Be kind."), said("user", "And é?")]
    source = Chat("", "", 0).with_examples([(json.dumps(earlier), "So."), ("Plain", "Yes.")], json.dumps(own))
    examples = [*earlier[1:], said("assistant", "So."), said("user", "Plain"), said("assistant", "Yes.")]
    assert json.loads(source) == [own[0], *examples, own[1]]


# Which examples.


def numbered(rows: Split) -> list[tuple[int, str]]:
    return [(example.row, example.source) for example in rows.examples]


def test_examples_are_training_rows_of_no_evaluated_source(data_folder: Path, dialogues: Split) -> None:
    """DialogSum's training rows share 32 dialogues with its validation rows, and repeat others."""
    training = index(data_folder / "dialogsum")
    assert np.isin(training.source_hashes, dialogues.source_hashes).any()
    drawn = draw_shots(numbered(dialogues), dialogues.source_hashes, training, 3, 42)
    assert [len(examples) for examples in drawn] == [3] * 500
    lines = real_rows(data_folder / "dialogsum", "train")
    evaluated = {" ".join(example.source.split()) for example in dialogues.examples}
    for examples in drawn:
        for example in examples:
            line = lines[example.row - 1]
            assert (example.source, example.targets) == (line["dialogue"].replace("\r\n", "\n"), (line["summary"],))
        sources = {" ".join(example.source.split()) for example in examples}
        assert len(sources) == 3 and not sources & evaluated
    assert len({example.row for examples in drawn for example in examples}) > 1300, "all over the training rows"


def test_draws_are_a_function_of_the_seed_and_the_rows_number(data_folder: Path, dialogues: Split) -> None:
    training, avoid, rows = index(data_folder / "dialogsum"), dialogues.source_hashes, numbered(dialogues)[:30]
    drawn = draw_shots(rows, avoid, training, 2, 42)
    assert draw_shots(rows[7:9][::-1], avoid, training, 2, 42) == drawn[7:9][::-1]
    assert [row[:1] for row in drawn] == draw_shots(rows, avoid, training, 1, 42), "one more leaves the first as it is"
    other = draw_shots(rows, avoid, training, 2, 43)
    assert sum(a != b for a, b in zip(drawn, other, strict=True)) == 30
    (again,) = draw_shots([(rows[3][0], "another text")], avoid, training, 2, 42)
    assert again == drawn[3]
    same = draw_shots([rows[0], (400, rows[0][1])], avoid, training, 2, 42)
    assert same == [drawn[0], drawn[0]], "rows of one source are asked alike"


def test_white_space_makes_no_other_source() -> None:
    training = split_of(("a  b", "1"), ("c", "2"), ("a b", "3"), ("d\n", "4"))
    asked = split_of(("a b ", "x"))
    for seed in range(20):
        ((first, second),) = draw_shots(numbered(asked), asked.source_hashes, training, 2, seed)
        assert {first.source, second.source} == {"c", "d\n"}
    with pytest.raises(DataError, match=r"evaluation.shots is 3, and name, train has 2 different sources beside"):
        draw_shots(numbered(asked), asked.source_hashes, training, 3, 0)


# How many fit.


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_a_row_gets_as_many_as_fit_whole(
    name: str, tokenizers: dict[str, Any], data_folder: Path, dialogues: Split
) -> None:
    """Against brute force over every choice of the examples, by the tokenizer's own ids of the whole text."""
    tokenizer, limit, rows = tokenizers[name], 400, dialogues.examples[:90]
    prompt = Prompt(INSTRUCTION, "dialogue", causal=name == "gpt2")
    sources = [example.source for example in rows]
    drawn = draw_shots(numbered(dialogues)[:90], dialogues.source_hashes, index(data_folder / "dialogsum"), 3, 1)
    alone, num_cut = encode_sources(sources, tokenizer, prompt, limit)
    ids, shots = with_shots(
        alone, sources, drawn, prompt, lambda text: encode_sources([text], tokenizer, prompt, NO_LIMIT)[0][0], limit
    )

    def asked(examples: tuple[Example, ...], source: str) -> list[int]:
        pairs = [*((example.source, example.targets[0]) for example in examples), (source, "")]
        texts = [f"Summarize the following conversation.\n\n{text}\n\nSummary: {answer}" for text, answer in pairs]
        return list(tokenizer("\n\n".join(texts), verbose=False).input_ids)

    for row, examples in enumerate(drawn):
        choices = [choice for size in (3, 2, 1) for choice in combinations(examples, size)]
        fitting = [choice for choice in choices if len(asked(choice, sources[row])) <= limit]
        best = max(map(len, fitting), default=0)
        kept = tuple(example for example in examples if example.row in shots.rows[row])
        assert len(shots.rows[row]) == len(kept) == best and (not best or kept in fitting)
        assert ids[row] == (asked(kept, sources[row]) if best else alone[row])
    counts = Counter(map(len, shots.rows))
    assert num_cut and counts[0] > num_cut and counts[1] and counts[2]
    assert shots.as_json() == {"wanted": 3, "within": 400, "rows": {str(n): counts[n] for n in (3, 2, 1, 0)}}


def test_in_a_chat_as_many_as_fit_too_by_the_templates_own_tokens(data_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_stories(tmp_path / "model", data_folder))
    tokenizer.chat_template = CHATML
    chat, asked = open_chat(tokenizer), json.dumps([{"role": "user", "content": "Who saw the cat?"}])
    examples = [Example(n, f"Who saw the {word}?", (f"Tom saw the {word}.",)) for n, word in ((3, "dog"), (1, "bird"))]

    def turns(*contents: str) -> list[int]:
        messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert isinstance(ids, list)
        return ids

    bird = turns("Who saw the bird?", "Tom saw the bird.", "Who saw the cat?")
    both = turns("Who saw the dog?", "Tom saw the dog.", "Who saw the bird?", "Tom saw the bird.", "Who saw the cat?")
    dog = turns("Who saw the dog?", "Tom saw the dog.", "Who saw the cat?")
    shorter, first = (dog, (3,)) if len(dog) <= len(bird) else (bird, (1,))
    for limit, expected, shown in ((len(both), both, (3, 1)), (len(both) - 1, shorter, first), (9, [7], ())):
        ids, shots = with_shots(
            [[7]],
            [asked],
            [examples],
            chat,
            lambda text: encode_sources([text], tokenizer, chat, NO_LIMIT)[0][0],
            limit,
        )
        assert ids == [expected] and shots.rows == (shown,)


def test_the_counts_in_words() -> None:
    told = Shots(2, 1024, ((7, 3), (4,), (), ()) + ((5, 6),) * 1000).as_json()
    assert shots_in_words(told) == (
        "worked examples of training rows: 2 before 1,001 rows, 1 before 1 row, none before 2 rows, as more would not fit whole "
        "into 1,024 tokens (data.max_source_length)"
    )
    assert shots_in_words(Shots(1, 9, ((1,), (2,))).as_json()) == "worked examples of training rows: 1 before 2 rows"


# From the recipe to the table.

VARIANTS = {"zero-shot": {"training.method": "none"}, "one-shot": {"training.method": "none", "evaluation.shots": 1}}


@pytest.fixture(scope="module")
def compared(workshop: Path) -> tuple[dict[str, Any], Path]:
    """Two ways of asking an untrained T5, on real rows of which two share their dialogue with others."""
    settings = [f"variants={json.dumps(VARIANTS)}", "published={}", "data.max_source_length=450"]
    out = workshop / "prompted"
    return compare(load_recipe(workshop / "tiny.yaml", settings), out), out


def test_compare_shows_how_many_rows_got_their_example(compared: tuple[dict[str, Any], Path]) -> None:
    results, out = compared
    plain, shot = results["rows"][:2]
    lines = read_lines(out / "one-shot/predictions.jsonl")
    counts = Counter(len(line["shots"]) for line in lines)
    assert set(counts) == {0, 1} and sum(counts.values()) == 12
    told = {"wanted": 1, "within": 450, "rows": {"1": counts[1], "0": counts[0]}}
    assert shot["shots"] == read_record(out / "one-shot")["evaluated"]["shots"] == told
    assert "shots" not in plain and "shots" not in read_record(out / "zero-shot")["evaluated"]
    words = " ".join(report(results).split())
    assert (
        f"one-shot: worked examples of training rows: 1 before {counts[1]} rows, none before {counts[0]} rows," in words
    )
    assert words.index("one-shot: worked") > words.index("ROUGE-1") and "zero-shot: worked" not in words


def test_the_scores_are_of_the_prompt_with_its_example(compared: tuple[dict[str, Any], Path], workshop: Path) -> None:
    """Each row's loss against Transformers', on the text that is documented; a row without an example as in zero-shot."""
    from transformers import T5ForConditionalGeneration

    _, out = compared
    training = read_lines(workshop / "data/train.jsonl")
    model = T5ForConditionalGeneration.from_pretrained(workshop / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(workshop / "base")
    plain, shot = (read_lines(out / name / "predictions.jsonl") for name in VARIANTS)
    for before, after in zip(plain, shot, strict=True):
        shown = [training[number - 1] for number in after["shots"]]
        assert not shown or shown[0]["dialogue"] != after["source"]
        pairs = [*((row["dialogue"], row["summary"]) for row in shown), (after["source"], "")]
        text = "\n\n".join(PROMPT.format(dialogue=source) + target for source, target in pairs)
        ids = tokenizer(text, return_tensors="pt", truncation=not shown, max_length=450)
        labels = tokenizer(after["references"][0], truncation=True, max_length=24, return_tensors="pt").input_ids
        assert ids.input_ids.shape[1] <= 450
        with torch.no_grad():
            loss = float(model(**ids, labels=labels).loss)
        if len(tokenizer(PROMPT.format(dialogue=after["source"]), verbose=False).input_ids) <= 450:
            assert after["loss"] == pytest.approx(loss, abs=2e-5)  # six digits
        same = after["loss"] == pytest.approx(
            before["loss"], abs=2e-5
        )  # six digits; other rows in its batch pad it otherwise
        assert same == (not shown)
    dialogues = {line["source"]: (line["shots"], line["prediction"]) for line in shot}
    assert all((line["shots"], line["prediction"]) == dialogues[line["source"]] for line in shot), "asked alike"


def test_evaluate_and_generate_ask_as_the_comparison_did(compared: tuple[dict[str, Any], Path], capsys: Any) -> None:
    results, out = compared
    again = evaluate_saved(out / "zero-shot", ["evaluation.shots=1"], None)
    assert again["evaluated"]["shots"] == results["rows"][1]["shots"]
    for name, metric in results["rows"][1]["metrics"].items():
        assert again["metrics"][name]["value"] == pytest.approx(metric["value"], abs=1e-6)  # six digits
    assert "Worked examples of training rows: 1 before" in capsys.readouterr().err
    lines = read_lines(out / "one-shot/predictions.jsonl")
    for line in (next(line for line in lines if line["shots"]), lines[-1]):
        sampled, _ = run_request(out / "one-shot", GenerateRequest(sample=f"validation:{line['row']}"), [], None, None)
        assert sampled["prediction"] == line["prediction"]
    own, _ = run_request(out / "one-shot", GenerateRequest(texts=["Tom: Lunch? Ann: At one."]), [], None, None)
    assert own["answers"] and "1 before 1 row." in capsys.readouterr().err
    trained_on, _ = run_request(out / "one-shot", GenerateRequest(sample="train:4"), [], None, None)
    assert trained_on["prediction"] and "1 before 1 row." in capsys.readouterr().err


def test_a_decoder_only_model_is_asked_so_too_also_after_training(data_folder: Path, tmp_path: Path) -> None:
    make_stories(tmp_path / "model", data_folder)
    animals = ("cat", "dog", "bird", "frog", "fish", "bear", "duck", "hen", "cow", "fox")
    rows = [{"asked": f"Tom saw a {animal}.", "told": f"The {animal} was happy."} for animal in animals]
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data/train.jsonl", rows[:7])
    write_jsonl(tmp_path / "data/validation.jsonl", rows[7:])
    recipe = {
        "model": {"name": str(tmp_path / "model"), "dtype": "float32", "device": "cpu"},
        "data": {
            "name": str(tmp_path / "data"), "source": "asked", "target": "told",
            "prompt": "Once. {asked}\nThen: ", "max_source_length": 300,
        },
        "lora": {"rank": 2}, "training": {"batch_size": 4}, "validation": {"every": None},
        "evaluation": {"split": "validation", "max_new_tokens": 8, "shots": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    _, record = train(load_recipe(tmp_path / "recipe.yaml", ["training.method=none"]), tmp_path / "base")
    assert record["evaluated"]["shots"]["rows"] == {"2": 3, "1": 0, "0": 0}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for line in read_lines(tmp_path / "base/predictions.jsonl"):
        pairs = [*((rows[n - 1]["asked"], rows[n - 1]["told"]) for n in line["shots"]), (line["source"], "")]
        source = tokenizer("\n\n".join(f"Once. {asked}\nThen: {told}" for asked, told in pairs)).input_ids
        target = [*tokenizer(line["references"][0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(source) + target])
        with torch.no_grad():
            loss = float(model(input_ids=torch.tensor([source + target]), labels=labels).loss)
        assert len(line["shots"]) == 2 and line["loss"] == pytest.approx(loss, abs=1e-5)  # six digits
    _, trained = train(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "lora")
    assert trained["evaluated"] == record["evaluated"]
    assert trained["metrics"]["loss"]["value"] != record["metrics"]["loss"]["value"]
    chosen = [[line["shots"] for line in read_lines(tmp_path / f"{run}/predictions.jsonl")] for run in ("base", "lora")]
    assert chosen[0] == chosen[1]


# Mistakes.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.shots=-1"], "evaluation.shots: expected"),
        (["evaluation.shots=1.5"], "evaluation.shots: expected a valid integer"),
        (["evaluation.shots=true"], "evaluation.shots: expected a valid integer"),
        (["evaluation.shot=1"], "evaluation.shot: unknown key. Did you mean 'shots'"),
        (["validation.shots=1"], "validation.shots: unknown key"),
        (
            ["evaluation.shots=1", "evaluation.split=train"],
            "shots are examples from the training rows, and split train",
        ),
        (["evaluation.shots=1", "data.source=null", 'data.prompt="{source}"'], "with data.source: null no row asks"),
        (
            ["evaluation.shots=1", "data.target=null", "data.objective=mixed", 'data.prompt="{source}"'],
            "with data.objective no row asks",
        ),
        (["variants.full.evaluation.shots=many"], "variants.full: evaluation.shots: expected a valid integer"),
    ],
    ids=str,
)
def test_a_mistake_is_one_clear_error(overrides: list[str], message: str, workshop: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(workshop / "tiny.yaml", overrides)
    assert message in str(error.value)


def test_too_few_training_rows_leave_nothing_behind(workshop: Path, tmp_path: Path) -> None:
    given = ["training.method=none", "evaluation.shots=4", "data.max_train_rows=3"]
    with pytest.raises(DataError, match=r"evaluation.shots is 4, and .* has 3 different sources beside those"):
        train(load_recipe(workshop / "tiny.yaml", given), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_base_alone_has_no_training_rows_to_show(workshop: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation.shots needs training rows: give data.name"):
        run_request(workshop / "base", GenerateRequest(texts=["a"]), ["evaluation.shots=1"], None, None)
