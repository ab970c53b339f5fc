"""The documents keep their word: their commands parse, their programs run, their map shows the tree.

The info string of a fenced block says what is checked:

    ```bash run       run, in the order of the document, together with ```python run; one temporary folder a document,
    ```python run     one Python for all its blocks, no network
    ```bash           each `loralab …` is parsed by the real command line and its recipe resolved, `make …` is a target
    ```python         compiles
    ```yaml, ```json  parses
    ```text           nothing
    ```text map       one path a line, indented below its folder: each exists, and each folder of loralab/ is there, and each
                      file beside a folder
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML, YAMLError
from sizes import LONG, sized

from loralab.cli import app
from loralab.config.loading import load_recipe, shipped_recipes
from loralab.errors import UserError

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAP = ROOT / "docs" / "architecture.md"


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    place: str
    """`README.md:12`, the line of the opening fence"""
    line: int
    info: str
    text: str


def blocks_of(document: Path) -> list[Block]:
    """The fenced blocks of a document, in order, also those indented in a list."""
    found, fence, start, held = [], "", 0, []
    for number, line in enumerate(document.read_text("utf-8").splitlines(), 1):
        mark = re.match(r"( *)(`{3,}|~{3,})\s*(.*)", line)
        if not fence and mark:
            indent, fence, info, start, held = len(mark[1]), mark[2], mark[3].strip(), number, []
        elif fence and line.strip() == fence:
            found.append(Block(f"{document.name}:{start}", start, info, "\n".join(held) + "\n"))
            fence = ""
        elif fence:
            held.append(line[indent:] if not line[:indent].strip() else line)
    assert not fence, f"{document.name}:{start}: the block is never closed"
    return found


# What is wrong with a block: one line for each problem.


def problems_of(block: Block) -> list[str]:
    """The problems of a block that is not run."""
    if block.info not in CHECKS:
        tags = ", ".join(CHECKS)
        return [
            f"{block.place}: the block is tagged {block.info!r}; the tags are {tags} (see tests/project/test_documents.py)"
        ]
    return [f"{block.place}: {problem}" for problem in CHECKS[block.info](block.text)]


def nothing(text: str) -> Iterable[str]:
    return ()


def python_problems(text: str) -> Iterable[str]:
    try:
        compile(text, "<block>", "exec")
    except SyntaxError as error:
        yield f"{error}"


def yaml_problems(text: str) -> Iterable[str]:
    try:
        YAML(typ="safe").load(text)
    except YAMLError as error:
        yield " ".join(str(error).split())


def json_problems(text: str) -> Iterable[str]:
    try:
        json.loads(text)
    except ValueError as error:
        yield str(error)


def bash_problems(text: str) -> Iterable[str]:
    """Unknown commands, options, recipes, overrides and targets in the lines of a shell."""
    for line in text.replace("\\\n", " ").splitlines():
        try:
            commands = list(shell_commands(line))
        except ValueError as error:
            yield f"{line!r} cannot be read: {error}"
            continue
        for program, *words in commands:
            if Path(program).name == "loralab":
                yield from loralab_problems(words)
            elif Path(program).name == "make":
                yield from (f"make has no target {word!r}" for word in words if unknown_target(word))


def shell_commands(line: str) -> Iterable[list[str]]:
    """The simple commands of a line as words, without what may stand before them, and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";<>|&")
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if token and set(token) <= set(";|&"):
            if words := before_redirection(words):
                yield words
            words = []
        elif words or not re.fullmatch(r"\w+=.*|do|then|else|time|!", token):
            words.append(token)


def before_redirection(words: list[str]) -> list[str]:
    return words[: next((at for at, word in enumerate(words) if word and set(word) <= set("<>&")), len(words))]


def unknown_target(word: str) -> bool:
    targets = re.findall(r"^([\w.-]+):(?!=)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    return "=" not in word and not word.startswith("-") and word not in targets


def loralab_problems(words: list[str]) -> Iterable[str]:
    """What the real command line, and the real recipe, say to `loralab words…`."""
    group: Any = typer.main.get_command(app)
    if not words or words[0].startswith("-"):
        known = {option for parameter in group.get_params(typer.Context(group)) for option in parameter.opts}
        yield from (f"loralab has no option {word}" for word in words if word not in known)
        return
    if words[0] not in group.commands:
        yield f"loralab has no command {words[0]!r}"
        return
    command = group.commands[words[0]]
    context = typer.Context(command, info_name=words[0])
    try:
        values, _, _ = command.make_parser(context).parse_args(words[1:])
    except Exception as error:  # the parser's own classes differ between releases of typer
        yield f"loralab {words[0]}: {error}"
        return
    if "--help" in words:
        return
    missing = [parameter.name for parameter in command.params if parameter.required and not values.get(parameter.name)]
    yield from (f"loralab {words[0]}: {name} is missing" for name in missing)
    recipe, overrides = values.get("recipe"), [*(values.get("overrides") or ())]
    if values.get("data"):  # needs no recipe, so that an override may stand first
        overrides += [recipe] if recipe and "=" in recipe else []
        recipe = recipe if recipe and "=" not in recipe else "own-data"
    elif "recipe" in values and not recipe:
        yield f"loralab {words[0]}: recipe is missing"
    yield from recipe_problems(recipe, overrides)


def recipe_problems(recipe: str | None, overrides: Iterable[str]) -> Iterable[str]:
    """A shipped recipe resolves with the overrides; a path or a PLACEHOLDER is free; any other name is a mistake."""
    if recipe is None or recipe.isupper() or "/" in recipe or recipe.endswith((".yaml", ".yml")):
        return
    if recipe not in shipped_recipes():
        yield f"no recipe named {recipe!r} is shipped"
        return
    try:
        load_recipe(recipe, [override for override in overrides if not override.isupper()])
    except UserError as error:
        yield f"{recipe}: {error}"


CHECKS: dict[str, Callable[[str], Iterable[str]]] = {
    "bash": bash_problems,
    "bash run": bash_problems,
    "python": python_problems,
    "python run": python_problems,
    "yaml": yaml_problems,
    "json": json_problems,
    "text": nothing,
    "text map": nothing,  # tested on its own
}


# Running a document.

DRIVER = """
import json, subprocess, sys
names = {"__name__": "__main__"}
for kind, place, text in json.load(sys.stdin):
    print("==", place, file=sys.stderr, flush=True)
    if kind == "bash run":
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True, stdin=subprocess.DEVNULL)
    else:
        exec(compile(text, place, "exec"), names)
"""


def run(blocks: list[Block], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the blocks tagged `run` in the folder, with this Python's programs first on the path, until one fails."""
    steps = [(block.info, block.place, block.text) for block in blocks if block.info.endswith(" run")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(steps),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )


def map_problems(block: Block, root: Path) -> list[str]:
    """Returns the paths of a map that do not exist, and what it lacks: folders of loralab/, and the files beside those folders."""
    shown, folders = set(), []  # folders: (indentation, path)
    for line in filter(str.strip, block.text.splitlines()):
        indent, entry = len(line) - len(line.lstrip()), line.split()[0]
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = f"{folders[-1][1] if folders else ''}{entry}"
        shown.add(path)
        if entry.endswith("/"):
            folders.append((indent, path))
    found = [path for path in (root / "loralab").rglob("*.py") if path.name != "__init__.py"]
    packages = {path.parent for path in (root / "loralab").rglob("__init__.py")}
    divided = {package.parent for package in packages}  # their own files are on the map by name
    needed = {f"{package.relative_to(root)}/" for package in packages}
    needed |= {str(path.relative_to(root)) for path in found if path.parent in divided}
    absent = [f"{block.place}: {path} does not exist" for path in sorted(shown) if not (root / path).exists()]
    return absent + [f"{block.place}: {path} is not on the map" for path in sorted(needed - shown)]


# The documents as they are.


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_block_is_true(document: Path) -> None:
    assert [problem for block in blocks_of(document) for problem in problems_of(block)] == []


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_what_is_tagged_run_runs(document: Path, tmp_path: Path) -> None:
    done = run(blocks_of(document), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_script_of_the_jax_page_keeps_to_pytorch(data_folder: Path, tmp_path: Path) -> None:
    """On DialogSum, with the lines that the page gives for it and for trainings that stay together, each left alone."""
    blocks = blocks_of(ROOT / "docs" / "jax-t5.md")
    (of_dialogsum,) = [block.text for block in blocks if "load_dataset" in block.text]
    (of_last_layer,) = [block.text for block in blocks if "LAST =" in block.text]
    (begin,) = [block for block in blocks if block.info == "python run" and "MODEL, STEPS" in block.text]
    local = {
        "google/flan-t5-small": f"{data_folder}/models/chat-t5-mini",
        "knkarthick/dialogsum": f"{data_folder}/dialogsum",
        "[:100]": "[:4]",
    }
    for published, here in local.items():
        assert published in of_dialogsum
        of_dialogsum = of_dialogsum.replace(published, here)
    of_dialogsum = re.sub(r"(MODEL, STEPS = .*), 200", rf"\1, {sized(200, 12)}", of_dialogsum)
    lines = begin.text[: begin.text.index("MODEL, STEPS")] + of_dialogsum + of_last_layer
    done = run([replace(begin, text=lines) if block is begin else block for block in blocks], tmp_path)
    assert done.returncode == 0, done.stderr
    apart = [float(number) for number in re.findall(r"(?:PyTorch are|same weights,) (\S+) ", done.stdout)]
    assert len(apart) == 4 and max(apart) < 1e-4, done.stdout
    if not LONG:
        return
    courses = re.findall(r"loss (\S+) in the first quarter of the steps, (\S+) in the last", done.stdout)
    assert len(courses) == 2 and all(float(late) < float(early) - 0.1 for early, late in courses), "and learns"


def test_the_map_shows_the_tree() -> None:
    (block,) = [block for block in blocks_of(MAP) if block.info == "text map"]
    assert map_problems(block, ROOT) == []


def test_the_help_of_each_command_shows_an_example_that_works() -> None:
    commands: Any = typer.main.get_command(app).commands
    examples = {name: re.findall(r"Example: (.+)", command.help) for name, command in commands.items()}
    assert [name for name, found in examples.items() if len(found) != 1] == []
    assert [problem for (example,) in examples.values() for problem in bash_problems(example)] == []


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_the_next_steps_of_a_recipe_can_be_typed(recipe: str) -> None:
    steps = load_recipe(recipe, []).next_steps
    assert [problem for step in steps for problem in bash_problems(step)] == []
    assert max(map(len, steps), default=0) <= 78, "with an indentation of two, 80 columns"


# The checks themselves: each finds what it is for.

BAD_BLOCKS = {
    "no tag": ("", "loralab recipes", "the block is tagged ''"),
    "an unknown tag": ("bash rum", "", "the block is tagged 'bash rum'"),
    "python": ("python", "import = 3", "invalid syntax"),
    "python run": ("python run", "f(", "was never closed"),
    "yaml": ("yaml", "a: [1, 2", "expected"),
    "json": ("json", "{'a': 1}", "Expecting property name"),
    "a command": ("bash", "loralab trian quickstart", "loralab has no command 'trian'"),
    "a command after another": ("bash", "cd x && FOO=1 .venv/bin/loralab trian", "loralab has no command 'trian'"),
    "a command in a loop": ("bash", "for x in 1 2; do loralab trian; done", "loralab has no command 'trian'"),
    "an open quotation": ("bash", "loralab generate runs/x --text 'hello", "No closing quotation"),
    "an option": ("bash", "loralab schema --jsno", "--jsno"),
    "an option of the whole": ("bash", "loralab --verison", "loralab has no option --verison"),
    "a missing argument": ("bash", "loralab train --json  # a comment", "loralab train: recipe is missing"),
    "an override of data": ("bash", "loralab train --data x.csv data.sauce=x", "data.sauce: unknown key"),
    "a recipe": ("bash", "loralab train flan-t5-bsae-dialogsum", "no recipe named 'flan-t5-bsae-dialogsum' is shipped"),
    "an override on another line": ("bash", "loralab compare flan-t5-base-dialogsum \\\n  lora.rnak=3", "lora.rnak"),
    "a target": ("bash", "make setup chekc", "make has no target 'chekc'"),
}


@pytest.mark.parametrize(("info", "text", "message"), BAD_BLOCKS.values(), ids=BAD_BLOCKS)
def test_each_false_block_is_found(info: str, text: str, message: str) -> None:
    problems = problems_of(Block("x.md:3", 3, info, text + "\n"))
    assert len(problems) == 1, problems
    assert problems[0].startswith("x.md:3: ") and message in problems[0]


TRUE_COMMANDS = """
make VENV=.x -j2 setup test
loralab train RECIPE --json > row.json | tee x; loralab --help
echo 'loralab x'  # loralab x
loralab compare flan-t5-base-dialogsum lora.rank=4 data.name=../folder --json
loralab train mine.yaml a.b=3
loralab train --data my.csv lora.rank=4
loralab compare flan-t5-base-dialogsum --data my.csv lora.rank=4
"""


def test_true_commands_pass() -> None:
    assert problems_of(Block("x.md:1", 1, "bash", TRUE_COMMANDS)) == []


def test_blocks_are_found_where_they_stand(tmp_path: Path) -> None:
    document = tmp_path / "x.md"
    document.write_text(
        "# x\n```bash run\na\n  b\n```\ntext\n1. list\n   ```python\n   if x:\n       y\n   ```\n", "utf-8"
    )
    assert blocks_of(document) == [
        Block("x.md:2", 2, "bash run", "a\n  b\n"),
        Block("x.md:8", 8, "python", "if x:\n    y\n"),
    ]
    document.write_text("```bash\na\n", "utf-8")
    with pytest.raises(AssertionError, match=r"x.md:1: the block is never closed"):
        blocks_of(document)


def test_blocks_run_in_order_and_share_their_folder_and_names(tmp_path: Path) -> None:
    blocks = [
        Block("x.md:1", 1, "bash run", "echo 20 > number\n"),
        Block("x.md:4", 4, "python", "raise SystemExit('not run')\n"),
        Block("x.md:7", 7, "python run", "number = int(open('number').read())\n"),
        Block("x.md:9", 9, "python run", "open('number', 'w').write(str(number + 1))\n"),
    ]
    done = run(blocks, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "number").read_text() == "21"


@pytest.mark.parametrize(("info", "text"), [("bash run", "false | true\ntouch after"), ("python run", "1 / 0")])
def test_a_block_that_fails_is_named(info: str, text: str, tmp_path: Path) -> None:
    done = run([Block("x.md:1", 1, info, text), Block("x.md:5", 5, "bash run", "touch after")], tmp_path)
    assert done.returncode != 0 and "== x.md:1" in done.stderr and "x.md:5" not in done.stderr
    assert not (tmp_path / "after").exists()


def test_the_map_misses_nothing_and_invents_nothing(tmp_path: Path) -> None:
    for name in (
        "loralab/__init__.py",
        "loralab/cli.py",
        "loralab/data/__init__.py",
        "loralab/data/rows.py",
        "loralab/on_torch/__init__.py",
        "Makefile",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = "Makefile  setup, check, test\nloralab/\n  cli.py   parse and call\n  data/    sources\n  on_torch/\n"
    assert map_problems(Block("x.md:1", 1, "text map", text), tmp_path) == []
    text = "Makefile\nloralab/   the package\n  data/\n    batches.py\n"
    assert map_problems(Block("x.md:1", 1, "text map", text), tmp_path) == [
        "x.md:1: loralab/data/batches.py does not exist",
        "x.md:1: loralab/cli.py is not on the map",
        "x.md:1: loralab/on_torch/ is not on the map",
    ]
