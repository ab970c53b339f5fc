"""What a terminal of 80 columns, a pipe and a notebook show, and what is said to a name that is nearly right."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from loralab.cli import app
from loralab.config.loading import load_recipe
from loralab.console import progress
from loralab.console.progress import Progress, say
from loralab.errors import UserError, nearest_file
from loralab.runs.arguments import recipe_and_folder
from loralab.runs.find_saved_model import find_saved_model
from loralab.runs.folder import write_recipe

COMMANDS: list[str] = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(*words: str) -> str:
    done = CliRunner().invoke(app, words, env={"COLUMNS": "80"}, terminal_width=80)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_list_of_commands_is_not_cut_off() -> None:
    assert "..." not in printed("--help").partition("Commands:")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_and_its_example_can_be_copied(command: str) -> None:
    text = printed(command, "--help")
    assert max(map(len, text.splitlines())) <= 80
    help_text: Any = typer.main.get_command(app).commands[command].help  # type: ignore[attr-defined]
    (example,) = [line.strip() for line in help_text.splitlines() if "Example: " in line]
    assert f"  {example}\n" in text, "in one line"


def test_recipes_are_a_line_each() -> None:
    lines = printed("recipes").splitlines()
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert [line for line in lines if len(line) > 80] == []


# News


LINE = "my.csv, train: " + ", ".join(["some rows"] * 12)
TABLE = "a row of a table that is left as it is" + " " * 60 + "|"


def test_a_terminal_gets_sentences_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    say(f"\n{LINE}\n{TABLE}")
    empty, *lines, table, last = stream.getvalue().split("\n")
    assert (empty, table, last) == ("", TABLE, "") and len(lines) == 2
    assert max(map(len, lines)) <= 80 and " ".join(line.strip() for line in lines) == LINE


def test_a_pipe_gets_lines_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"{LINE}\n{TABLE}")
    shown = Progress("train", 1000)
    for done in range(1, 1001):
        shown.update(done, "loss 1.0")
    assert capsys.readouterr().err == f"{LINE}\n{TABLE}\ntrain 1000/1000  loss 1.0  in 0:00\n"


def test_a_notebooks_line_renews_itself_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    shown = Progress("train", 2, stream)
    shown.shown -= progress.EVERY_TERMINAL
    shown.update(1)
    shown.update(2)
    assert (
        stream.getvalue()
        == "".join(f"\r{text.ljust(79)}" for text in ("train 1/2  0:00 left", "train 2/2  in 0:00")) + "\n"
    )


# Names that are nearly right


def test_files_beside_are_named(tmp_path: Path) -> None:
    (tmp_path / "chats.csv").touch()
    assert nearest_file(tmp_path / "chat.csv") == f" Did you mean '{tmp_path}/chats.csv'?"
    assert nearest_file(tmp_path / "chats.csv") == "", "what was given is no advice"
    assert nearest_file(tmp_path / "nowhere/chat.csv") == nearest_file(tmp_path / "chats.csv/x") == ""


def test_a_run_a_recipe_and_a_file_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/rank-32").mkdir(parents=True)
    write_recipe(tmp_path / "runs/rank-32", load_recipe("quickstart"))
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "chats.csv").touch()
    with pytest.raises(UserError, match=r"no folder runs/rank-23\. Did you mean 'runs/rank-32'\?"):
        find_saved_model(Path("runs/rank-23"), [], None)
    for words, message in (
        (("mien.yaml", None), r"no recipe file mien\.yaml\. Did you mean 'mine\.yaml'\?"),
        (("quickstart.yml", None), r"no recipe file quickstart\.yml\. Did you mean 'quickstart'\?"),
        (("quikstart", None), r"no recipe 'quikstart'.*Did you mean 'quickstart'\?"),
        ((None, "chat.csv"), r"no such file .*Did you mean 'chats\.csv'\?"),
        ((None, "chats.cvs"), r"no folder or file of this name.*Did you mean 'chats\.csv'\?"),
        (("runs/rank-32", None), r"is a run.*`loralab train runs/rank-32 --resume`.*runs/rank-32/recipe\.yaml`"),
    ):
        with pytest.raises(UserError, match=message):
            recipe_and_folder("train", words[0], [], words[1], None, False)


@pytest.mark.parametrize(("words", "meant"), [(["trian"], "'train'"), (["train", "--resum"], "--resume")])
def test_a_command_and_an_option_that_are_not_there(words: list[str], meant: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and meant in done.stderr
