"""What nobody foresaw: one line, a file with the traceback, exit code 70. And recipes as odd as can be, which are all foreseen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loralab import cli
from loralab.config.loading import load_recipe, recipe_from_tree
from loralab.config.recipe import Recipe
from loralab.console import crash
from loralab.errors import RecipeError

TREE = {
    "name": "r",
    "model": {"name": "base"},
    "data": {"name": "data", "source": "dialogue", "target": "summary"},
    "lora": {"rank": 4, "alpha": 8},
    "variants": {"zero-shot": {"training.method": "none"}, "full": {"training.method": "full"}},
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for reports, and a command that fails as its test says."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("LORALAB_TRACEBACK", raising=False)
    monkeypatch.setattr("sys.argv", ["loralab", "recipes", "--json"])
    return tmp_path


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.mark.parametrize(
    "error",
    [
        KeyError("model"),
        AssertionError(),
        RuntimeError("two\nlines \x1b[31m" + "and more" * 1000),
        OSError(5, "Input/output error"),
        MemoryError(),
        RecursionError("maximum recursion depth exceeded"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_unforeseen_error_is_one_line_and_a_file(
    error: Exception, broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(error, monkeypatch) == crash.EXIT_CODE == 70
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and len(said.err) < 900 and "\x1b" not in said.err
    assert "Traceback" not in said.err and type(error).__name__ in said.err and "send that file" in said.err
    found = re.search(rf"({re.escape(str(broken))}/\S+\.txt)", said.err)
    assert found is not None
    details = Path(found[1]).read_text(encoding="utf-8")
    assert details.startswith("command: loralab recipes --json\n") and "Traceback (most recent call last)" in details
    assert (
        "torch " in details
        and "Python 3" in details
        and details.rstrip().splitlines()[-1][:9] in str(repr(error)) + details
    )


def test_the_traceback_is_printed_where_a_developer_asks_for_it(
    broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORALAB_TRACEBACK", "1")
    assert fail_with(KeyError("model"), monkeypatch) == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_without_room_for_the_file_the_traceback_is_printed(
    broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(broken / "not there"))
    assert fail_with(KeyError("model"), monkeypatch) == 70
    said = capsys.readouterr().err
    assert "could not be stored" in said and "Traceback (most recent call last)" in said


def test_the_projects_page_is_named_where_the_package_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from email.message import Message

    about = Message()
    about["Project-URL"] = "Homepage, https://example.org"
    about["Project-URL"] = "Issues, https://example.org/issues"
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: about)
    assert crash.how_to_report().startswith("Report it at https://example.org/issues with that file")


# Odd recipes


def of_tree(tmp_path: Path, text: str, *overrides: str) -> str:
    """What is wrong with the recipe of this text."""
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_recipe(file, overrides)
    assert len(str(error.value)) < 2000
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model: expected"),
        ({"model": 3}, "model: expected .*got 3"),
        ({"modle": {"name": "x"}, "model": ...}, r"model: missing(.|\n)*modle: unknown key. Did you mean 'model'"),
        ({"training": 3, "lora": {"disabled": True}}, "training: expected .*got 3"),
        ({"lora": {"rank": "A" * 100_000}}, "lora.rank: expected a valid integer; got 'AAA.* … A"),
        ({"A" * 100_000: 1}, "AAA.*: unknown key"),
        ({"lora": {"dropout": False}}, "lora.dropout: expected a valid number; got false"),
        ({"lora": {"use_rslora": "yes"}}, "lora.use_rslora: expected true or false; got 'yes'"),
        ({"lora": {"use_dora": 1}}, "lora.use_dora: expected true or false; got 1"),
        ({"optimizer": {"learning_rate": "1e-2"}}, "optimizer.learning_rate: expected a valid number or 'pilot'; got '1e-2'"),
        ({"evaluation": {"temperature": True, "sample": True}}, "evaluation.temperature: expected a valid number; got true"),
        ({"published": {"full": {"rouge1": "40"}}}, "published.full: expected a valid number; got '40'"),
        ({"training": {"accumulate": 10**23}}, r"training.accumulate: expected a number below 2\^63; got one of 77 bits"),
        ({"variants": {"full": {"optimizer.learning_rate": 10**5000}}}, r"variants.full.*below 2\^63"),
        ({f"k{number}": 1 for number in range(500)}, "and 480 more"),
    ],
)  # fmt: skip
def test_an_odd_recipe_is_told_in_few_words(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tree = {key: value for key, value in (TREE | change).items() if value is not ...}
    with pytest.raises(RecipeError) as error:
        recipe_from_tree(tree, [], "r.yaml")
    assert re.search(message, str(error.value)), str(error.value)
    assert len(str(error.value)) < 8000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora={null: 2}"], "lora.null: expected a name as key; got null"),
        (["lora={1: 2}"], "lora.1: expected a name as key; got 1"),
        (["variants={a: {1: 2}}"], "variants.a.1: expected a name as key"),
        (["variants=[[full]]"], r"there is no variant \['full'\]"),
        (["variants=[null]"], "there is no variant null"),
        (["variants=3", "variants=[full]"], "names of variants can be chosen where the recipe has some; it has 3"),
        (["variants.full.model=null"], "variants.full: model: expected"),
        (["variants.full.model=3"], "variants.full: model: expected"),
        (["lora.rules=" + "[" * 1000 + "]" * 1000], "not a YAML value"),
        (["lora.rules=" + "[" * 50 + "]" * 50], "nested too deeply"),
        (["lora.rank=" + "9" * 5000], "lora.rank: expected a valid integer; got '999.* … 9"),
        (["lora.rank=0x" + "f" * 5000], r"lora.rank: expected a number below 2\^63"),
        (["model=3", "model.name=x"], "'model' holds the value 3, not settings"),
        (["A" * 100_000], "an override is written key=value"),
    ],
)  # fmt: skip
def test_an_odd_override_is_told_in_few_words(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_from_tree(TREE, overrides, "r.yaml")
    assert re.search(message, str(error.value)), str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 1000 + "]" * 1000, "nested too deeply"),
        ("a: &a [*a]", "nested too deeply"),
        ("\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]" for n in range(12)), "more than 100,000"),
        ("lora: {rank: " + "9" * 5000 + "}", "cannot be read"),
        ("a: 2024-13-45", "cannot be read"),
        ("a: !!bool x", "cannot be read"),
        ("[1, 2]: 3", "expected a name as key"),
    ],
)  # fmt: skip
def test_an_odd_file_is_told_in_few_words(text: str, message: str, tmp_path: Path) -> None:
    assert re.search(message, of_tree(tmp_path, text))


def test_columns_of_labels_may_hold_what_is_no_text() -> None:
    data = {"name": "d", "source": "s", "label": "l", "labels": {0: "no", True: "yes"}}
    recipe = recipe_from_tree(TREE | {"data": data, "variants": {"a": {"data.labels": {0: "x", 1: "y"}}}}, [], "r.yaml")
    assert recipe.data.labels == {"0": "no", "true": "yes"} and recipe.variant("a").data.labels == {"0": "x", "1": "y"}


def keys() -> Iterator[tuple[str, ...]]:
    """Every block of a recipe and every key of the blocks."""
    for name, field in Recipe.model_fields.items():
        yield (name,)
        for key in getattr(field.annotation, "model_fields", {}):
            yield name, key


ODD = (None, 3, -1.5, True, "x", "", [], [[1]], [None], {}, {"x": 1}, {"x": None}, {"x": {"x": [1]}})


@pytest.mark.parametrize("key", [*keys()], ids=".".join)
def test_every_key_takes_every_odd_value_or_refuses_it(key: tuple[str, ...]) -> None:
    """Alone, as an override, and in a variant, a value is a setting or a mistake of the recipe, and no other error."""
    for value in ODD:
        dotted, text = ".".join(key), json.dumps(value)
        changed: dict[str, Any] = json.loads(json.dumps(TREE))
        place = changed if len(key) == 1 else changed.setdefault(key[0], {})
        place[key[-1]] = value
        for tree, overrides in (
            (changed, []),
            (changed, ["variants=[full]"]),
            (TREE, [f"{dotted}={text}"]),
            (TREE, [f"variants={json.dumps({'a': {dotted: value}})}"]),
        ):
            try:
                recipe_from_tree(tree, overrides, "r.yaml")
            except RecipeError:
                continue
