"""The house rules that a reader of the imports can check: who may import whom, and how long a page is.

A module's folder is the first component of its name below `loralab`: `loralab/data/batches.py` belongs to `data`. A
module imports from its own folder and those below it in FOLDERS, wherever in the file the import stands, and no two
modules import each other. The engines stand beside the folders: nobody imports them but `engine.py` and the public
names of `__init__.py`, lazily, by a name in a string.
"""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

# From the bottom up: a folder (or a file at the top of loralab/) imports those above it in this list.
FOLDERS = (
    "errors",
    "atomic_files",
    "metrics",
    "config",
    "console",
    "builtin_data",
    "models",
    "adapters",
    "data",
    "tasks",
    "engine",
    "runs",
    "planning",
    "reports",
    "evaluation",
    "training",
    "inference",
    "experiments",
    "api",
    "cli",
    "__main__",
)
# What on_torch and on_jax may import of them.
ENGINE_MAY_IMPORT = {
    "atomic_files",
    "errors",
    "metrics",
    "config",
    "builtin_data",
    "models",
    "adapters",
    "data",
    "tasks",
    "engine",
}
MOST_FILES_AT_THE_TOP = 6
FRAMEWORKS = {"on_torch": {"torch", "bitsandbytes"}, "on_jax": {"jax", "flax", "optax", "orbax"}}

# The two files that name an engine in a string; what they import for a type checker alone is free.
LAZY = {"loralab", "loralab.engine"}
# Libraries that take a second or more to import: inside functions only, engines apart.
HEAVY = {"transformers", "datasets", "rouge_score", "sacrebleu", "nltk", "scipy", "pandas", "pyarrow"}
HEAVY |= {"matplotlib", "tensorboard", "wandb"}
NEVER_AT_START = {"torch", "jax", "flax", "peft", *HEAVY}

LONGEST_FUNCTION = 80
LONGEST_FILE = 400


class Import(NamedTuple):
    """One import statement, or one call of `import_module`."""

    place: str
    """`loralab/x.py:12`"""
    importer: str
    """The importing module: `loralab.data.batches`."""
    target: str
    """The imported module: `torch.nn`, `loralab.errors`; `?` for a name that is computed."""
    lazy: bool
    """Inside a function."""
    typing_only: bool
    """Under `if TYPE_CHECKING:`."""
    by_string: bool
    """Through `importlib.import_module` or `__import__`."""

    @property
    def library(self) -> str:
        return self.target.partition(".")[0]


def unit(module: str) -> str:
    """The folder's or engine's name: `data` of `loralab.data.batches`, `` of `loralab` itself."""
    return [*module.split("."), ""][1]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(root: Path) -> list[Path]:
    return sorted((root / "loralab").rglob("*.py"))


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands."""
    importer = module_name(path, root)
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    modules = {module_name(other, root) for other in python_files(root)}

    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        for target, by_string in targets_of(node, package, modules):
            yield Import(f"{path.relative_to(root)}:{node.lineno}", importer, target, lazy, typing_only, by_string)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = node.body if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") else []
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or inside, typing_only or child in guarded)

    yield from visit(ast.parse(path.read_text("utf-8"), str(path)), False, False)


def targets_of(node: ast.AST, package: str, modules: set[str]) -> Iterator[tuple[str, bool]]:
    """The modules that one node imports, and whether by a string."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, False) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        origin = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            submodule = f"{origin}.{alias.name}"
            known = submodule in modules or (origin == "loralab" and alias.name in FRAMEWORKS)
            yield (submodule if known else origin), False
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
        first = node.args[0] if node.args else None
        constant = isinstance(first, ast.Constant) and isinstance(first.value, str)
        yield (first.value if constant else "?"), True


def broken_rules(root: Path) -> list[str]:
    """One line for each import below `root`/loralab that breaks a rule, and for each file without a folder."""
    problems = [
        f"{path.relative_to(root)}: '{unit(module_name(path, root))}' has no place; "
        f"put the file into a folder, or give a new folder its place in FOLDERS in tests/project/test_imports.py"
        for path in python_files(root)
        if unit(module_name(path, root)) not in {"", *FRAMEWORKS, *FOLDERS}
    ]
    imports = [found for path in python_files(root) for found in imports_of(path, root)]
    problems += [f"{found.place}: {problem}" for found in imports if (problem := broken_rule(found))]
    return list(dict.fromkeys(problems)) + circles(imports)


def broken_rule(found: Import) -> str | None:
    """What is wrong with one import, if anything."""
    importer, target = unit(found.importer), unit(found.target)
    may_be_lazy = found.importer in LAZY and (found.by_string or found.typing_only)
    if importer in FRAMEWORKS:
        return broken_engine_rule(found, importer, target)
    if found.library == "peft":
        return "imports peft, which only the tests may"
    if found.library in set().union(*FRAMEWORKS.values()):
        return f"imports {found.library}; only the engines may: {', '.join(sorted(FRAMEWORKS))}"
    if found.library in HEAVY and not (found.lazy or found.typing_only):
        return f"imports {found.library} while being imported; import it inside the function that needs it"
    if found.target == "?" and not may_be_lazy:
        return f"imports a module by a computed name; only {' and '.join(sorted(LAZY))} may"
    if found.library != "loralab" or may_be_lazy:
        return None
    if target in FRAMEWORKS:
        return f"imports the engine {target}; engines are reached through loralab/engine.py"
    if not found.importer.startswith("loralab.") or height(target) > height(importer):
        return f"'{importer or 'loralab'}' imports '{target or 'loralab'}', which is above it"
    return None


def broken_engine_rule(found: Import, importer: str, target: str) -> str | None:
    others = set(FRAMEWORKS) - {importer}
    foreign = set().union(*(FRAMEWORKS[other] for other in others)) | {"peft"}
    if found.library in foreign:
        return f"{importer} imports {found.library}, which is not its own"
    if found.target == "?":
        return "imports a module by a computed name"
    if found.library == "loralab" and target not in ENGINE_MAY_IMPORT | {importer}:
        return (
            f"{importer} imports '{target or 'loralab'}'; an engine may import {', '.join(sorted(ENGINE_MAY_IMPORT))}"
        )
    return None


def height(name: str) -> int:
    """Returns the place in FOLDERS; the package itself, whose names come from everywhere, and unknown folders are on top."""
    return FOLDERS.index(name) if name in FOLDERS else len(FOLDERS)


def circles(imports: list[Import]) -> list[str]:
    """The first circle of modules that import each other, if there is one."""
    graph: dict[str, set[str]] = {}
    for found in imports:
        if (
            found.library == "loralab"
            and not found.by_string
            and not found.typing_only
            and found.target != found.importer
        ):
            graph.setdefault(found.importer, set()).add(found.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["a circle: " + " <- ".join(error.args[1])]
    return []


def too_long(root: Path) -> list[str]:
    """One line for each function and each file of `root`/loralab that is longer than a page."""
    problems = []
    for path in python_files(root):
        text, name = path.read_text("utf-8"), path.relative_to(root)
        if (lines := len(text.splitlines())) > LONGEST_FILE:
            problems.append(f"{name}: {lines} lines; allowed are {LONGEST_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    problems.append(
                        f"{name}:{node.lineno}: {node.name} has {lines} lines; allowed are {LONGEST_FUNCTION}"
                    )
    return problems


def undeclared(root: Path) -> list[str]:
    """Libraries that loralab imports and pyproject.toml does not name, outside the development extra."""
    needed = [line for line in requires("loralab") or [] if "extra == 'dev'" not in line.replace('"', "'")]
    declared = {normalised(re.split(r"[^\w.-]", line)[0]) for line in needed}
    installed = packages_distributions()
    problems = []
    for found in (found for path in python_files(root) for found in imports_of(path, root)):
        if found.target == "?" or found.library in {"loralab", *sys.stdlib_module_names}:
            continue
        if not declared & {normalised(name) for name in installed.get(found.library, [found.library])}:
            problems.append(f"{found.place}: imports {found.library}, which pyproject.toml does not declare")
    return problems


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_imports_follow_the_house_rules() -> None:
    assert broken_rules(ROOT) == []


def test_few_files_lie_at_the_top() -> None:
    assert len(list((ROOT / "loralab").glob("*.py"))) <= MOST_FILES_AT_THE_TOP


def test_every_folder_of_the_rule_exists() -> None:
    assert {name for name in FOLDERS if not list((ROOT / "loralab").glob(f"{name}*"))} == set()


def test_no_function_and_no_file_is_longer_than_a_page() -> None:
    assert too_long(ROOT) == []


def test_every_imported_library_is_declared() -> None:
    assert undeclared(ROOT) == []


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "loralab" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return root


BAD_TREES = {
    "torch outside the engine": (
        {"training/loop.py": "def f():\n    import torch.nn\n"},
        "loralab/training/loop.py:2: imports torch;",
    ),
    "torch for types": (
        {"data/rows.py": "if TYPE_CHECKING:\n    from torch import Tensor\n"},
        "loralab/data/rows.py:2: imports torch;",
    ),
    "torch by a string": (
        {"runs/folder.py": "importlib.import_module('torch')\n"},
        "loralab/runs/folder.py:1: imports torch;",
    ),
    "peft": ({"on_torch/lora.py": "import peft\n"}, "on_torch imports peft, which is not its own"),
    "one engine from another": (
        {"on_jax/lora.py": "from loralab.on_torch import lora\n", "on_torch/lora.py": ""},
        "on_jax imports 'on_torch'",
    ),
    "the other framework": ({"on_torch/lora.py": "import jax\n"}, "on_torch imports jax, which is not its own"),
    "an engine from above": (
        {"on_torch/engine.py": "from loralab.training import loop\n", "training/loop.py": ""},
        "on_torch imports 'training'",
    ),
    "an engine, lazily but by name": (
        {"training/loop.py": "def f():\n    from loralab import on_torch\n"},
        "loralab/training/loop.py:2: imports the engine on_torch",
    ),
    "an engine from the public names": (
        {"__init__.py": "from loralab.on_torch import lora\n", "on_torch/lora.py": ""},
        "loralab/__init__.py:1: imports the engine on_torch",
    ),
    "upwards": (
        {"config/lora.py": "from ..adapters.files import read\n", "adapters/files.py": ""},
        "'config' imports 'adapters', which is above it",
    ),
    "upwards, in a folder": (
        {"data/rows.py": "def f():\n    from ..cli import main\n", "cli.py": ""},
        "loralab/data/rows.py:2: 'data' imports 'cli', which is above it",
    ),
    "the package": ({"runs/folder.py": "import loralab\n"}, "'runs' imports 'loralab', which is above it"),
    "a circle in one folder": (
        {"data/a.py": "from loralab.data import b\n", "data/b.py": "from loralab.data import a\n"},
        "a circle: loralab.data.",
    ),
    "a file outside the folders": (
        {"helpers.py": ""},
        "loralab/helpers.py: 'helpers' has no place; put the file into a folder",
    ),
    "a computed name": ({"cli.py": "import_module(name)\n"}, "loralab/cli.py:1: imports a module by a computed name"),
    "a heavy library at the start": ({"data/rows.py": "import datasets\n"}, "imports datasets while being imported"),
}


@pytest.mark.parametrize(("files", "message"), BAD_TREES.values(), ids=BAD_TREES)
def test_each_broken_rule_is_found(files: dict[str, str], message: str, tmp_path: Path) -> None:
    problems = broken_rules(write_tree(tmp_path, files))
    assert len(problems) == 1 and message in problems[0], problems


def test_what_the_rules_allow_passes(tmp_path: Path) -> None:
    files = {
        "__init__.py": "if TYPE_CHECKING:\n    from loralab.on_torch.adapters.lora import attach\nimport_module(where)\n",
        "engine.py": "def load():\n    return importlib.import_module('loralab.on_torch')\n",
        "errors.py": "import difflib\n",
        "data/__init__.py": "from loralab.data.rows import read\n",
        "data/rows.py": "from loralab import errors\ndef f():\n    import datasets\n",
        "on_torch/lora.py": "import torch\nimport transformers\nfrom ..errors import nearest\nfrom . import linear\n",
        "on_torch/linear.py": "",
        "cli.py": "from loralab import data, errors\n",
    }
    assert broken_rules(write_tree(tmp_path, files)) == []


def test_too_long_is_found(tmp_path: Path) -> None:
    page = "def f():\n" + "    pass\n" * (LONGEST_FUNCTION - 1)
    longest = "\n" * (LONGEST_FILE - LONGEST_FUNCTION) + page
    assert too_long(write_tree(tmp_path, {"a.py": longest})) == []
    problems = too_long(write_tree(tmp_path, {"a.py": longest + "    pass\n"}))
    assert [problem.partition(";")[0] for problem in problems] == [
        f"loralab/a.py: {LONGEST_FILE + 1} lines",
        f"loralab/a.py:{LONGEST_FILE - LONGEST_FUNCTION + 1}: f has {LONGEST_FUNCTION + 1} lines",
    ]


def test_an_undeclared_library_is_found(tmp_path: Path) -> None:
    problems = undeclared(write_tree(tmp_path, {"a.py": "import json, numpy, ruamel.yaml\nimport pytest\n"}))
    assert problems == ["loralab/a.py:2: imports pytest, which pyproject.toml does not declare"]


IMPORT = "import sys, loralab; print(*sys.modules, sep='\\n')"
HELP = """
import contextlib, io, sys
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="loralab")
sys.argv = ["loralab", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as text:
    try:
        sys.exit(script.load()())
    except SystemExit as end:
        assert not end.code, end.code
assert "train" in text.getvalue(), text.getvalue()
print(*sys.modules, sep="\\n")
"""


@pytest.mark.parametrize("program", [IMPORT, HELP], ids=["import loralab", "loralab --help"])
def test_the_start_is_light(program: str) -> None:
    """Neither loads a framework or a heavy library."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}
    )
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.split())
    assert "loralab" in modules and not modules & NEVER_AT_START
