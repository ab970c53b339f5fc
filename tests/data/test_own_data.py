"""A messy file of somebody's own: what is found in it, which columns are taken, and a run on it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from classifiers import make_bases
from folders import write_jsonl
from safetensors import safe_open
from tiny import make_bart, make_gpt2, make_llama, make_t5

from loralab.config.loading import load_recipe
from loralab.config.recipe import Recipe
from loralab.data.column_detection import TARGETS, choose, look_at
from loralab.data.own_data import name_of, recipe_for
from loralab.data.readers import Record
from loralab.errors import DataError, RecipeError, UserError
from loralab.runs.arguments import recipe_and_folder
from loralab.training.train import train

LONG = " ".join(["word"] * 5000)


def messy_rows() -> list[list[str]]:
    """40 rows of number, day, mail, subject, language; each second one has something."""
    rows = [
        [
            str(n),
            f"2024-03-{n % 28 + 1:02}",
            f"Dear team, matter {n} is settled at last. Yours, Ann",
            f"Matter {n}",
            "en",
        ]
        for n in range(1, 41)
    ]
    rows[1][2] = ""
    rows[3][3] = "  "
    rows[5][2] = "Dear team,\r\nlines end twice here.\r\nAnn"
    rows[7][2] += ' \U0001f600 she said "no, never", twice'
    rows[9][2] = LONG
    rows[11] = ["12", "", *rows[10][2:]]
    rows[13][2] += " <br /> and on"
    for row in rows[15::2]:
        row[1] = "" if int(row[0]) % 4 else row[1]
    return rows


def write_messy(path: Path, header: str = "Nr.,day,the mail,what it says,lang", delimiter: str = ",") -> Path:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([header.split(","), *messy_rows()])
    content = text.getvalue().encode("utf-8-sig")
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


def own(data: Path | str, name: str | None = None, *overrides: str) -> Recipe:
    return recipe_for(str(data), name, overrides, "train")


def taken(recipe: Recipe) -> tuple[str | None, str | None]:
    return recipe.data.source, recipe.data.target


SAID = """\
{path}: 40 rows, 5 columns
  Nr.           numbers, such as '1'
  day           dates, such as '2024-03-02'
  the mail      text, 691 bytes on average, such as 'Dear team, matter 1 is s...
  what it says  text, 9 bytes on average, such as 'Matter 1'
  lang          nearly always 'en', such as 'en'
It is read: 'the mail', the longer text
It is written: 'what it says', the shorter text
For others add: data.source=COLUMN data.target=COLUMN
37 of the rows can be used.
  2 with an empty cell, skipped (rows 2, 4)
  1 with CRLF line ends, made LF (row 6)
  1 equal to an earlier row, skipped (row 12)
  1 with HTML breaks, kept (row 14)
"""


@pytest.mark.parametrize("name", ["mails.csv", "mails.csv.gz", "mails.CSV", "mails.Csv.GZ"])
def test_a_messy_file_is_understood_and_told(
    name: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_messy(tmp_path / name)
    recipe = own(path)
    assert capsys.readouterr().err.splitlines()[1:] == SAID.format(path=path).splitlines()[1:]
    assert taken(recipe) == ("the mail", "what it says")
    assert (recipe.name, recipe.data.name, recipe.evaluation.split) == ("mails", str(path), "test")
    assert recipe.evaluation.max_new_tokens == 16  # 9 bytes need no more


def test_other_separators_are_read_too(tmp_path: Path, cache: Path) -> None:
    for name, delimiter in (("semicolons.csv", ";"), ("tabs.csv", "\t")):
        assert taken(own(write_messy(tmp_path / name, delimiter=delimiter))) == ("the mail", "what it says")


# Which columns.

TEXT = [f"A long text of some dozen words, the number {n} of its kind, and on." for n in range(40)]
SHORT = [f"Short text {n}" for n in range(40)]
VALUES = ["good" if n % 3 else "bad" for n in range(40)]
NAME, OTHER, AGAIN = "by its name", "the only other text", "its values come again"
LONGER, SHORTER = "the longer text", "the shorter text"
CHOICES: dict[str, tuple[dict[str, list[Any]], tuple[str, str], tuple[str, str]]] = {
    "names": ({"summary": TEXT, "article": SHORT}, ("article", "summary"), (NAME, NAME)),
    "names in capitals": ({"Text": TEXT, " LABEL": VALUES}, ("Text", " LABEL"), (NAME, NAME)),
    "words of names": ({"newsText": TEXT, "text_summary": SHORT}, ("newsText", "text_summary"), (NAME, NAME)),
    "a whole name first": ({"text": TEXT, "text_2": SHORT, "title": SHORT}, ("text", "title"), (NAME, NAME)),
    "numbers": ({"question": TEXT, "answer": [str(n) for n in range(40)]}, ("question", "answer"), (NAME, NAME)),
    "a source's name": ({"a": SHORT, "document": TEXT}, ("document", "a"), (NAME, OTHER)),
    "a source's name and labels": ({"kind": VALUES, "document": TEXT}, ("document", "kind"), (NAME, AGAIN)),
    "a target's name": ({"a": SHORT, "headline": TEXT}, ("a", "headline"), (OTHER, NAME)),
    "lengths": ({"a": SHORT, "b": TEXT}, ("b", "a"), (LONGER, SHORTER)),
    "labels": ({"a": VALUES, "b": TEXT}, ("b", "a"), ("the only text", AGAIN)),
    "several references": (
        {"summary": [[None, f"one {n}", f"two {n}"] for n in range(40)], "b": TEXT},
        ("b", "summary"),
        (OTHER, NAME),
    ),
    "what is ruled out": (
        {
            "x": [f"row_{n}" for n in range(40)],
            "when": [f"3.4.{1990 + n % 30}" for n in range(40)],
            "y": ["", *[None] * 26, *TEXT[:13]],
            "z": ["same"] * 40,
            "n": list(range(40)),
            "see": [f"https://x.org/{n}" for n in range(40)],
            "author": SHORT,
            "b": TEXT,
            "a": SHORT,
        },
        ("b", "a"),
        (LONGER, SHORTER),
    ),
}


def table_of(columns: dict[str, list[Any]]) -> Any:
    rows = zip(*columns.values(), strict=True)
    return look_at("x", (Record(n, f"row {n}", dict(zip(columns, row, strict=True))) for n, row in enumerate(rows, 1)))


@pytest.mark.parametrize(("columns", "chosen", "reasons"), CHOICES.values(), ids=CHOICES)
def test_the_columns_that_are_taken(
    columns: dict[str, list[Any]], chosen: tuple[str, str], reasons: tuple[str, str]
) -> None:
    choices = choose(table_of(columns), {}, "loralab train --data x.csv")
    assert {role: choice.column for role, choice in choices.items()} == dict(
        zip(("source", "target"), chosen, strict=True)
    )
    assert {role: choice.reason for role, choice in choices.items()} == dict(
        zip(("source", "target"), reasons, strict=True)
    )


UNCLEAR: dict[str, tuple[dict[str, list[Any]], str]] = {
    "two targets": ({"text": TEXT, "title": SHORT, "summary": SHORT}, "each of 'title', 'summary' may be the target"),
    "three texts": ({"a": TEXT, "b": SHORT, "c": SHORT}, "3 columns of text"),
    "one text": ({"a": TEXT, "id": SHORT}, "1 column of text"),
    "no text": ({"a": list(range(40)), "b": ["x"] * 40}, "no columns of text"),
    "equal lengths": ({"a": TEXT, "b": TEXT}, "'a' and 'b' are about equally long"),
    "nothing to write": ({"document": TEXT, "id": SHORT}, "no columns may be the target"),
    "numbers among texts": ({"a": TEXT, "b": [7, *SHORT[1:]]}, r"b  no text: 7 \(int\) in row 1"),
}


@pytest.mark.parametrize(("columns", "why"), UNCLEAR.values(), ids=UNCLEAR)
def test_what_is_not_clear_is_one_error_with_the_command(columns: dict[str, list[Any]], why: str) -> None:
    with pytest.raises(DataError, match=why) as caught:
        choose(table_of(columns), {}, "loralab train --data x.csv")
    message = str(caught.value)
    assert message.endswith("\n  loralab train --data x.csv data.source=COLUMN data.target=COLUMN")
    assert all(f"\n  {name} " in message for name in columns)
    assert ("such as 'A long text of some dozen" in message) == (TEXT in columns.values())


def test_what_the_user_says_stands_and_the_rest_is_found(tmp_path: Path, cache: Path) -> None:
    path = write_messy(tmp_path / "x.csv", "id,text,summary,title,lang")
    path.write_text(path.read_text("utf-8").replace("2024-", "Day 2024-"), "utf-8")
    with pytest.raises(DataError, match="each of 'summary', 'title' may be the target"):
        own(path)
    assert taken(own(path, None, "data.target=title")) == ("text", "title")
    assert taken(own(path, None, "data.source=title", "data.target=text")) == ("title", "text")
    with pytest.raises(DataError, match=r"no column 'tilte'. Did you mean 'title'\?"):
        own(path, None, "data.target=tilte")


@pytest.mark.parametrize("values", [[n % 3 for n in range(40)], [n % 2 == 0 for n in range(40)]])
def test_labels_that_are_no_text_are_for_a_classifier(values: list[Any]) -> None:
    command, advice = (
        "loralab train --data x.jsonl",
        r"such as minilm-imdb, and add:\n  data.source=COLUMN data.label=kind$",
    )
    with pytest.raises(DataError, match=advice) as caught:
        choose(table_of({"text": TEXT, "kind": values}), {}, command)
    assert "data.target=COLUMN" not in str(caught.value)
    with pytest.raises(DataError, match=rf"data.target=COLUMN\n'kind' holds no text.*{advice}"):
        choose(table_of({"a": TEXT, "b": TEXT, "kind": values}), {}, command)
    with pytest.raises(DataError, match=rf"^x: 'kind' holds no text.*{advice}"):
        choose(table_of({"text": TEXT, "kind": values}), {"target": "kind"}, command)


@pytest.mark.parametrize("name", [None, "minilm-imdb"])
def test_a_label_needs_nothing_else(name: str | None, tmp_path: Path, cache: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"a": text, "b": n % 2} for n, text in enumerate(TEXT)])
    recipe = own(path, name, "data.source=a", "data.label=b")
    assert (recipe.data.source, recipe.data.label, recipe.data.target) == ("a", "b", None)
    assert recipe.evaluation.metrics == ("classification",)


def test_whole_texts_need_no_lengths(tmp_path: Path, cache: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"a": text} for text in TEXT])
    assert own(path, None, "data.source=a", "data.objective=mixed").data.max_source_length == 512
    assert own(path, None, "data.source=null", "data.target=a", "data.packing=true").data.row_length == 128


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.name=other.csv", r"--data .*x\.csv and data\.name=other\.csv are both given"),
        ("data=foo", r"^data: expected settings, such as data\.source=COLUMN; got 'foo'"),
        ("data.source.x=1", r"^data\.source: expected the name of a column; got \{'x': 1\}"),
    ],
)
def test_overrides_that_cannot_go_with_the_file(override: str, message: str, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        own(write_messy(tmp_path / "x.csv"), None, override)


def test_a_chat_is_its_own_column(tmp_path: Path, cache: Path) -> None:
    turns = [{"role": "user", "content": "Lunch?"}, {"role": "assistant", "content": "At one."}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"id": str(n), "talk": turns} for n in range(5)])
    recipe = own(path, None, "data.duplicate_rows=keep")
    assert (recipe.data.messages, recipe.data.source, recipe.data.target) == ("talk", None, None)


# What becomes of it.


def test_a_recipe_keeps_all_but_its_data_and_what_it_says_of_them(tmp_path: Path, cache: Path) -> None:
    shipped = load_recipe("flan-t5-base-dialogsum")
    recipe = own(
        write_messy(tmp_path / "my own.csv"), "flan-t5-base-dialogsum", "lora.rank=4", "data.max_source_length=64"
    )
    other = {"name", "data", "lora", "published", "published_source", "description"}
    assert recipe.model_dump(exclude=other) == shipped.model_dump(exclude=other)
    assert recipe.lora == shipped.lora.model_copy(update={"rank": 4})
    assert (recipe.name, recipe.published, recipe.published_source, recipe.description) == ("my-own", {}, "", "")
    assert recipe.data == own(tmp_path / "my own.csv", None, "data.max_source_length=64").data


def test_folders_with_one_file_or_with_splits(tmp_path: Path, cache: Path) -> None:
    place = tmp_path / "data"
    place.mkdir()
    write_messy(place / "export-7.csv")
    assert own(place).data.name == str(place / "export-7.csv")
    (place / "export-7.csv").rename(place / "train.csv")
    write_messy(place / "validation.csv")
    recipe = own(place)
    assert (recipe.data.name, recipe.name, recipe.evaluation.split) == (str(place), "data", "validation")


def test_a_file_without_rows(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x.csv").write_text("text,summary\n")
    with pytest.raises(DataError, match=r"x\.csv has no rows\."):
        own(tmp_path / "x.csv")


def test_names_of_runs() -> None:
    given = ["a.csv", "../x/my mails.jsonl.gz", "data/", "owner/set-1", "?.csv", "v1.2", "UP.CSV"]
    assert [name_of(name) for name in given] == ["a", "my-mails", "data", "set-1", "own-data", "v1.2", "UP"]


def test_the_words_of_the_command_line(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_messy(tmp_path / "x.csv")
    recipe, folder = recipe_and_folder("train", "lora.rank=2", ["training.epochs=7"], "x.csv", Path("out"), False)
    assert (recipe.lora.rank, recipe.training.epochs, folder) == (2, 7, Path("out"))
    for name in (None, "lora.rank=2"):
        with pytest.raises(RecipeError, match=r"Which recipe.*flan-t5-base-dialogsum.*loralab compare --data my.csv"):
            recipe_and_folder("compare", name, [], None, None, False)
    with pytest.raises(RecipeError, match=r"x.csv is no recipe but data. Use it so: `loralab train --data x.csv`"):
        recipe_and_folder("train", "x.csv", [], None, None, False)
    with pytest.raises(UserError, match=r"data.sauce: unknown key. Did you mean 'source'"):
        recipe_and_folder("train", "data.sauce=x", [], "x.csv", None, False)


def test_a_plan_is_told_what_it_can_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_messy(tmp_path / "my x.csv")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").touch()
    columns = "data.source=COLUMN data.target=COLUMN`"
    for name, message in (
        (None, f"`loralab plan own-data data.name=my.csv {columns}"),
        ("my x.csv", f"`loralab plan own-data 'data.name=my x.csv' {columns}"),
        ("run", r"Plan it: `loralab plan run/recipe\.yaml`"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            recipe_and_folder("plan", name, [], None, None, False)
        assert "--" not in str(caught.value)
    given = ["data.name=my x.csv", "data.source=the mail", "data.target=day"]
    assert recipe_and_folder("plan", "own-data", given, None, None, False)[0].data.name == "my x.csv"


def test_no_name_is_on_both_sides() -> None:
    from loralab.data.column_detection import OTHERS, SOURCES

    assert not SOURCES & TARGETS and not (SOURCES | TARGETS) & OTHERS


def test_a_run_on_it_can_be_done_again(
    workshop: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_messy(tmp_path / "mails.csv")
    base = (f"model.name={workshop / 'base'}", "model.device=cpu", "model.dtype=float32", "training.epochs=1")
    recipe = own(path, None, *base)
    folder, record = train(recipe, tmp_path / "run")
    assert record["trained_on"]["findings"]["long_sources"]["rows"] == [10]  # the longest row alone is cut
    assert "1 with a source over data.max_source_length, cut (row 10)" in capsys.readouterr().err
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert (
        json.loads((folder / "adapter/loralab.json").read_text("utf-8"))["recipe"]["data"]["target"] == "what it says"
    )


@pytest.mark.parametrize(
    ("kind", "adapted"),
    [
        ("t5", {"q", "v"}),
        ("bart", {"q_proj", "v_proj"}),
        ("gpt2", {"c_attn"}),
        ("llama", {"q_proj", "v_proj"}),
        ("bert", {"query", "key", "value"}),
    ],
)
def test_lora_goes_where_the_base_has_its_default(
    kind: str, adapted: set[str], data_folder: Path, tmp_path: Path, cache: Path
) -> None:
    tokenizer = data_folder / "tokenizers"
    if kind == "t5":
        base = make_t5(tmp_path / "base", "untied", tokenizer=tokenizer / "t5", vocabulary=32128)
    elif kind == "bart":
        base = make_bart(tmp_path / "base", tokenizer / "t5")
    elif kind == "gpt2":
        base = make_gpt2(tmp_path / "base", 50257, tokenizer=tokenizer / "gpt2")
    elif kind == "llama":
        base = make_llama(tmp_path / "base", tokenizer / "gpt2")
    else:
        base = make_bases(tmp_path, tokenizer / "bert-base-uncased")["bert"]
    rows = [
        {"mail": f"Dear Ann, the train leaves at {n}.", "subject": f"train {n}", "kind": "ab"[n % 2]} for n in range(40)
    ]
    write_jsonl(tmp_path / "mails.jsonl", rows)
    columns = ["data.source=mail", "data.label=kind"] if kind == "bert" else ["evaluation.max_new_tokens=4"]
    settings = [
        f"model.name={base}",
        "model.device=cpu",
        "model.dtype=float32",
        "training.epochs=1",
        *columns,
    ]
    folder, _ = train(own(tmp_path / "mails.jsonl", None, *settings), tmp_path / "run")
    with safe_open(folder / "adapter/adapter_model.safetensors", framework="np") as file:
        assert {key.split(".lora_")[0].rpartition(".")[2] for key in file.keys() if ".lora_" in key} == adapted  # noqa: SIM118
