"""The notebook is clean, its commands resolve, and it runs: each cell in IPython's own shell, as Jupyter and Colab run it.

IPython alone does that, without a kernel, a server and their thirty packages.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_documents import ROOT, bash_problems

NOTEBOOK = ROOT / "docs" / "loralab.ipynb"

# Runs the cells on stdin one after another, as long as neither their Python nor their commands fail.
SHELL = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for number, cell in enumerate(json.load(sys.stdin)):
    shell.user_ns["_exit_code"] = 0
    if not shell.run_cell(cell).success or shell.user_ns["_exit_code"]:
        sys.exit(f"code cell {number} failed: {cell}")
"""


def notebook() -> dict[str, Any]:
    book: dict[str, Any] = json.loads(NOTEBOOK.read_text("utf-8"))
    return book


def code_cells(**parameters: object) -> list[str]:
    """The sources of the code cells; parameters take the place of those that the notebook has."""
    given = [f"\n{name} = {value!r}" for name, value in parameters.items()]
    cells = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    return ["".join([*cell["source"], *(given if holds_parameters(cell) else ())]) for cell in cells]


def holds_parameters(cell: dict[str, Any]) -> bool:
    return "parameters" in cell["metadata"].get("tags", ())


def test_the_notebook_is_clean() -> None:
    """Version 4 of the format, every cell with an id of its own, and nothing of a run in it."""
    book = notebook()
    cells = book["cells"]
    assert (book["nbformat"], book["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
    assert len([cell for cell in cells if holds_parameters(cell)]) == 1
    assert re.search(r"find_spec\(.*\n +%pip install -q loralab", code_cells()[0])


def test_its_commands_resolve() -> None:
    cells = code_cells()
    names: dict[str, Any] = {}
    for cell in cells[1:3]:  # the parameters, and the settings made of them
        exec(cell, names)
    commands = [line[1:].format(**names) for cell in cells for line in cell.splitlines() if line.startswith("!")]
    assert [command.split()[1] for command in commands] == ["train", "compare", "merge"]
    assert [problem for command in commands for problem in bash_problems(command)] == []


@pytest.mark.slow
def test_it_runs(workshop: Path, tmp_path: Path) -> None:
    """With a tiny base and few rows, in a few steps; comparisons of several variants have tests of their own."""
    data = tmp_path / "data"
    shutil.copytree(workshop / "data", data)
    shutil.copy(data / "validation.jsonl", data / "test.jsonl")
    base = str(workshop / "base")
    cells = code_cells(BASE=base, DATA=str(data), ROWS=20, TEST_ROWS=4, LENGTH=6, VARIANTS="[zero-shot]")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", SHELL],
        input=json.dumps(cells),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "IPYTHONDIR": str(tmp_path / "ipython")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/notebook/merged/model.safetensors").exists()
    assert re.search(r"with the adapter: .*\nwithout it: .*\n", done.stdout), done.stdout


def test_a_cell_whose_command_fails_is_noticed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHELL], input=json.dumps(["!true", "!false"]), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "code cell 1 failed: !false\n")
