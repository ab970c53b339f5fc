"""`loralab generate`: where the texts come from, where the answers go, what is seen meanwhile, and mistakes."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from workshop import PROMPT

from loralab import UserError, generate, load_model
from loralab.config.loading import load_recipe
from loralab.config.recipe import EvaluationSettings
from loralab.data.inputs import read_texts
from loralab.errors import ModelError, RunError
from loralab.inference.generate import NO_DATA, GenerateRequest, run_request
from loralab.inference.text_generator import TextGenerator
from loralab.models.checkpoint_files import model_folder
from loralab.runs.find_saved_model import find_saved_model
from loralab.runs.folder import write_recipe
from loralab.runs.record import read_lines

TEXTS = ["Tom: Lunch? Ann: At one, by the lake.", "Is the report done? No.", "I lost my dog in the park today!"]
SETTINGS = ["model.dtype=float32", "model.device=cpu", "evaluation.max_new_tokens=6"]


class Screen(io.StringIO):
    """A terminal that remembers what was written, and in how many pieces."""

    def __init__(self, typed: str = "") -> None:
        super().__init__(typed)
        self.pieces: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return len(text)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Pipe(io.TextIOWrapper):
    """What another program has written."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")


@pytest.fixture(autouse=True)
def nothing_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Pipe(b""))


@pytest.fixture(scope="module")
def base(workshop: Path) -> Path:
    return workshop / "base"


@pytest.fixture(scope="module")
def zero_shot(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder that trained nothing."""
    folder = tmp_path_factory.mktemp("runs") / "zero-shot"
    folder.mkdir()
    write_recipe(folder, load_recipe(workshop / "tiny.yaml", ["training.method=none", "variants={}", "published={}"]))
    return folder


@pytest.fixture(scope="module")
def expected(base: Path) -> list[str]:
    """The answers of the base to the bare texts, from Python."""
    model, tokenizer = load_model(str(base), dtype="float32", device="cpu")
    answers = [text.strip() for text in generate(model, tokenizer, TEXTS, max_new_tokens=6)]
    assert len(set(answers)) == 3 and all(answers)
    return answers


def ask(trained: Path, overrides: list[str] | None = None, **question: Any) -> tuple[dict[str, Any], str | None]:
    return run_request(trained, GenerateRequest(**question), [*SETTINGS, *(overrides or [])], None, None)


# Where texts come from and answers go


def test_texts_are_answered_in_their_order(base: Path, expected: list[str]) -> None:
    assert ask(base, texts=TEXTS) == ({"answers": expected}, "\n".join(expected))


def test_the_recipes_prompt_surrounds_a_text(zero_shot: Path, base: Path) -> None:
    model, tokenizer = load_model(str(base), dtype="float32", device="cpu")
    prompted = generate(model, tokenizer, [PROMPT.format(dialogue=TEXTS[0])], max_new_tokens=6)
    assert ask(zero_shot, texts=TEXTS[:1])[0]["answers"] == [prompted[0].strip()]


def test_overrides_say_how_it_writes(base: Path, expected: list[str]) -> None:
    model, tokenizer = load_model(str(base), dtype="float32", device="cpu")
    beams = generate(model, tokenizer, TEXTS, max_new_tokens=6, beams=3, length_penalty=2.0)
    drawn = generate(model, tokenizer, TEXTS, max_new_tokens=6, sample=True, top_k=9, seed=7)
    settings = {"evaluation.beams=3 evaluation.length_penalty=2.0": beams}
    settings["evaluation.sample=true evaluation.top_k=9 evaluation.seed=7"] = drawn
    for overrides, answers in settings.items():
        assert ask(base, overrides.split(), texts=TEXTS)[0]["answers"] == [text.strip() for text in answers] != expected
    assert (
        run_request(base, GenerateRequest(TEXTS), SETTINGS, None, 2)[0]
        == ask(base, ["evaluation.max_new_tokens=2"], texts=TEXTS)[0]
    )


def rows_of(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".jsonl":
        return read_lines(file)
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


INPUTS = {
    "rows.jsonl": "".join(json.dumps({"id": i, "source": text}) + "\n" for i, text in enumerate(TEXTS)),
    "rows.csv": "id,source\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS)),
    "rows.txt": "\ufeff" + "\r\n".join(TEXTS),
}


@pytest.mark.parametrize("out", ["out.jsonl", "out.csv"])
@pytest.mark.parametrize("name", INPUTS)
def test_a_file_goes_in_and_comes_out_with_a_column_more(
    name: str, out: str, base: Path, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(INPUTS[name], encoding="utf-8", newline="")
    result, _ = ask(base, input=str(tmp_path / name), out=tmp_path / out)
    assert result == {"out": str(tmp_path / out), "rows": 3, "blank": 0}
    rows = rows_of(tmp_path / out)
    assert [row["source"] for row in rows] == TEXTS and [row["prediction"] for row in rows] == expected
    assert name == "rows.txt" or [str(row["id"]) for row in rows] == ["0", "1", "2"]
    assert {file.name for file in tmp_path.iterdir()} == {name, out}
    assert "generate 3/3" in capsys.readouterr().err, "progress goes to stderr"


def test_a_row_without_text_keeps_its_place(
    base: Path, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"source": TEXTS[0]}, {"source": None}, {"source": "  "}, {"source": TEXTS[1], "tags": ["é", 1]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [expected[0], "", "", expected[1]]
    assert ask(base, input=str(tmp_path / "in.jsonl"))[0] == {"answers": answers}
    assert "2 of 4 rows have no text" in capsys.readouterr().err
    ask(base, input=str(tmp_path / "in.jsonl"), out=tmp_path / "out.csv")
    out = rows_of(tmp_path / "out.csv")
    assert [row["prediction"] for row in out] == answers and [row["tags"] for row in out] == ["", "", "", '["é", 1]']


def test_stdin_is_one_text_or_with_a_dash_a_text_a_line(
    base: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Pipe(("\n".join(TEXTS) + "\n").encode()))
    assert ask(base, input="-")[0] == {"answers": expected}
    monkeypatch.setattr(sys, "stdin", Pipe((TEXTS[1] + "\n").encode()))
    assert ask(base)[0] == {"answers": [expected[1]]}
    monkeypatch.setattr(sys, "stdin", Pipe("\n".join(TEXTS).encode()))
    assert ask(base)[0] == ask(base, texts=["\n".join(TEXTS)])[0]


def test_lines_end_on_stdin_where_they_end_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "one\u2028text\r\nanother\x0cone\n\nthe\rlast"
    (tmp_path / "in.txt").write_text(content, encoding="utf-8", newline="")
    monkeypatch.setattr(sys, "stdin", Pipe(content.encode()))
    texts = read_texts("-", "source").texts
    assert texts == read_texts(str(tmp_path / "in.txt"), "source").texts
    assert texts == ["one\u2028text", "another\x0cone", "", "the\rlast"]


def test_a_row_of_the_data_is_shown_beside_its_references(zero_shot: Path, workshop: Path) -> None:
    lines = (workshop / "data/validation.jsonl").read_text(encoding="utf-8").splitlines()
    result, words = ask(zero_shot, sample="validation")
    row = json.loads(lines[result["row"] - 1])
    assert (result["split"], result["source"], result["references"]) == (
        "validation",
        row["dialogue"],
        [row["summary"]],
    )
    assert ask(zero_shot, texts=[row["dialogue"]])[0]["answers"] == [result["prediction"]]
    assert words is not None and words.startswith(f"Row {result['row']} of validation;")
    assert row["summary"] in words and words.endswith(f"Prediction:\n{result['prediction']}")
    assert ask(zero_shot, sample=f"validation:{result['row']}")[0] == result


def test_the_row_is_left_to_chance(zero_shot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextGenerator, "__init__", lambda *_: None)
    monkeypatch.setattr(TextGenerator, "write", lambda *_: ["an answer"])
    assert len({ask(zero_shot, sample="train")[0]["row"] for _ in range(12)}) > 3


# At a terminal


@pytest.mark.parametrize("settings", [[], ["evaluation.sample=true"]], ids=str)
def test_one_text_appears_as_it_is_written(settings: list[str], base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = ask(base, settings, texts=TEXTS[:1])[0]["answers"]
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    result, words = ask(base, settings, texts=TEXTS[:1])
    assert result == {"answers": [whole]} and words is None
    assert screen.text == whole + "\n" and len([piece for piece in screen.pieces if piece.strip()]) > 2


@pytest.mark.parametrize("case", ["two texts", "beams", "json"])
def test_what_cannot_be_streamed_comes_whole(case: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    overrides = ["evaluation.beams=2"] if case == "beams" else []
    result, words = ask(base, overrides, texts=TEXTS[: 2 if case == "two texts" else 1], as_json=case == "json")
    assert screen.text == "" and words == "\n".join(result["answers"])


def test_a_character_of_several_tokens_is_shown_when_it_is_whole() -> None:
    pieces = {1: "é".encode()[:1], 2: "é".encode()[1:], 3: b"a"}

    class Tokenizer:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return b"".join(pieces[i] for i in ids).decode(errors="replace")

    class Engine:
        tokenizer = Tokenizer()

        def generate(self, sources: Any, decoding: Any, on_done: Any, on_token: Any) -> list[list[int]]:
            for token in (3, 1, 2, 3):
                on_token(token)
            return [[3, 1, 2, 3]]

    writer = object.__new__(TextGenerator)
    writer.engine, writer.decoding = Engine(), EvaluationSettings()  # type: ignore[assignment]
    writer._encode = lambda texts: [[]]  # type: ignore[method-assign]
    assert writer.stream("text", screen := Screen()) == "aéa"
    assert [piece for piece in screen.pieces if piece] == ["a", "é", "a", "\n"]


@pytest.mark.parametrize("settings", [[], ["evaluation.beams=2"]], ids=str)
def test_a_conversation_goes_on_until_an_empty_line(
    settings: list[str], base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [ask(base, settings, texts=[text])[0]["answers"][0] for text in (TEXTS[0], "a\nb")]
    for end in ("\n", ""):
        monkeypatch.setattr(sys, "stdin", Screen(f"{TEXTS[0]}\na\\nb\n{end}"))
        assert ask(base, settings) == ({"answers": answers}, None)
        shown = capsys.readouterr()
        assert shown.out.split("\n")[:2] == answers and "An empty line or Ctrl-D ends." in shown.err


def test_the_same_text_asked_twice_is_drawn_twice(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Screen(f"{TEXTS[0]}\n" * 2))
    first, second = ask(base, ["evaluation.sample=true"])[0]["answers"]
    assert first != second and [first] == ask(base, ["evaluation.sample=true"], texts=TEXTS[:1])[0]["answers"]


# Mistakes


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({}, "Nothing to answer: give --text TEXT, --input FILE or --sample SPLIT"),
        ({"texts": ["a", " "]}, "The text of --text number 2 is empty"),
        ({"texts": ["a"], "sample": "test"}, "--text and --sample are both given; give one of them"),
        ({"input": "missing.jsonl"}, "missing.jsonl: cannot be read"),
        ({"input": "rows.parquet"}, "rows.parquet: there is no such file"),
        (
            {"input": "rows.docx"},
            "not one that ends in '.docx'. There are: .csv, .csv.gz, .json,",
        ),
        ({"input": "empty.jsonl"}, "empty.jsonl: there is no text to answer in its 0 rows"),
        ({"input": "blank.txt"}, "blank.txt: there is no text to answer in its 2 rows"),
        ({"input": "other.csv"}, "other.csv, line 2: no column 'source' (Did you mean 'sauce'?)"),
        ({"input": "number.jsonl"}, "number.jsonl, line 1: column 'source' holds 5 (int), where text is needed"),
        ({"input": "latin.txt"}, "latin.txt, line 1: not UTF-8"),
        ({"input": "again.jsonl"}, "there is a column 'prediction' already"),
        ({"input": "good.txt", "out": Path("good.jsonl.gz")}, "expected a name that ends in .jsonl or .csv"),
        ({"input": "good.txt", "out": Path("other.csv")}, "--out other.csv is there already"),
        ({"input": "good.txt", "out": Path("nowhere/out.csv")}, "there is no folder nowhere"),
        ({"texts": ["a"], "out": Path("out.csv")}, "--out is given without --input FILE"),
        ({"sample": "test"}, "--sample needs rows: give data.name, data.source and data.target"),
    ],
    ids=str,
)
def test_a_mistake_is_one_clear_error_before_anything_is_loaded(
    question: dict[str, Any], message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"empty.jsonl": b"", "blank.txt": b" \n\n", "other.csv": b"sauce\nx\n", "number.jsonl": b'{"source": 5}\n'}
    files |= {"latin.txt": b"\xe9t\xe9\n", "again.jsonl": b'{"source": "a", "prediction": "b"}\n', "good.txt": b"a\n"}
    for name, content in files.items():
        Path(name).write_bytes(content)
    monkeypatch.setattr("loralab.inference.text_generator.open_trained", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError) as error:
        ask(base, **question)
    assert message in str(error.value)
    assert {file.name for file in tmp_path.iterdir()} == set(files), "nothing half-written"


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("tset", "Did you mean 'test'?"),
        ("test", "has no split 'test'"),
        ("train:x", "--sample train:x: there is no such row"),
        ("train:61", "Those of train are 1 to 60."),
    ],
)
def test_a_sample_that_is_not_there(sample: str, message: str, zero_shot: Path) -> None:
    with pytest.raises(UserError, match=message):
        ask(zero_shot, sample=sample)


def test_json_has_no_conversation(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Screen("text\n"))
    with pytest.raises(UserError, match="--json needs --text"):
        ask(base, as_json=True)


def test_a_failure_while_writing_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("a\n")
    monkeypatch.setattr("loralab.on_torch.engine.generate_ids", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ask(base, input=str(tmp_path / "in.txt"), out=tmp_path / "out.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["in.txt"]


def test_a_base_alone_is_asked_as_it_is(base: Path) -> None:
    recipe, saved = find_saved_model(base, [], None, NO_DATA)
    assert (saved, recipe.training.method, recipe.model.name, recipe.data.prompt) == (
        None,
        "none",
        str(base),
        "{source}",
    )
    with pytest.raises(UserError, match="data: missing"):
        find_saved_model(base, [], None)


def test_a_base_is_named_as_everywhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["model.dtype=float32", "evaluation.max_new_tokens=4"]
    question = GenerateRequest(texts=("def f(x): return x",))
    named = run_request(Path("embedded:tiny-t5"), question, settings, None)[0]
    assert named == run_request(model_folder("embedded:tiny-t5"), question, settings, None)[0]
    with pytest.raises(RunError, match=r"There is no folder runs/lora-8\. Expected a run"):
        run_request(Path("runs/lora-8"), question, settings, None)
    for name, error, message in (
        ("embedded:tiny-t6", ModelError, "Did you mean 'embedded:tiny-t5'"),
        (
            "google/flan-t5-smal",
            ModelError,
            "'google/flan-t5-smal' is no folder here, and could not be fetched from the hub",
        ),
        ("t5-small", ModelError, "'t5-small' is no folder here, and could not be fetched"),
        ("lora-8", RunError, "There is no folder lora-8. Expected a run"),
        ("runs/lora-8", RunError, r"There is no folder runs/lora-8. Did you mean .*lora-16"),
    ):
        (tmp_path / "runs/lora-16").mkdir(parents=True, exist_ok=True)
        with pytest.raises(error, match=message):
            run_request(Path(name), question, settings, None)
