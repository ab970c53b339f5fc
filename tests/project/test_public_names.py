"""What others build on: the public names, the commands with their options, and what the wheel holds.

A name that is added, renamed or removed is changed here too, on purpose, and told in CHANGELOG.md.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel
from sizes import LONG

import loralab
from loralab.cli import app

ROOT = Path(__file__).parents[2]

INTERFACE = {
    "Adapter": "disable disabled enable merge parameters save to_files total trainable unload",
    "LoRASpec": "rank rules alpha dropout shared_dropout tune_vectors bias modules_to_save rank_pattern alpha_pattern "
    "use_rslora use_dora init seed disabled",
    "LoralabError": "",
    "Recipe": "name description model data mixture lora training optimizer validation evaluation forgetting variants published "
    "published_epochs published_source next_steps",
    "UserError": "",
    "attach": "model spec name",
    "compare": "recipe overrides * out resume",
    "evaluate": "trained overrides * base",
    "generate": "model tokenizer texts * max_new_tokens beams length_penalty early_stopping sample temperature top_k top_p "
    "repetition_penalty stop seed overrides base text_pairs",
    "load_adapter": "model folder name",
    "load_model": "name dtype device quantize quantize_except",
    "load_recipe": "name_or_path overrides",
    "plan": "recipe overrides * measure tokens_per_second",
    "score": "files metrics * predictions references source group",
    "train": "recipe overrides * out resume",
}
COMMANDS = {
    "train": "recipe overrides --data --json --out --resume",
    "compare": "recipe overrides --data --json --out --resume",
    "plan": "recipe overrides --json --measure --price-per-hour --tokens-per-second",
    "evaluate": "trained overrides --base --json",
    "score": "files --group --json --metrics --prediction --predictions --reference --source",
    "generate": "trained overrides --base --input --json --max-new-tokens --out --sample --seed --stop --text --text-pair --top-p",
    "merge": "trained --base --json --out",
    "runs": "folder --json",
    "recipes": "--json",
    "schema": "",
}


def interface_of(public: Any) -> str:
    """A function's parameters, those after * given by name alone; a record's fields; another class's public names."""
    if not inspect.isclass(public):
        kinds = {parameter.name: parameter.kind for parameter in inspect.signature(public).parameters.values()}
        by_name = [name for name, kind in kinds.items() if kind == inspect.Parameter.KEYWORD_ONLY]
        by_place = [name for name in kinds if name not in by_name]
        return " ".join([*by_place, *(["*", *by_name] if by_name else [])])
    if issubclass(public, BaseModel):
        return " ".join(public.model_fields)
    return " ".join(sorted(name for name in vars(public) if not name.startswith("_")))


def options_of(command: Any) -> str:
    """A command's arguments in their order, then its options in the alphabet's."""
    arguments = [parameter.name for parameter in command.params if parameter.param_type_name == "argument"]
    options = [option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)]
    return " ".join([*arguments, *sorted(option for option in options if option.startswith("-"))])


def test_the_public_names_are_these() -> None:
    assert sorted(loralab.__all__) == sorted(INTERFACE)
    assert set(dir(loralab)) >= set(INTERFACE)


@pytest.mark.parametrize("name", INTERFACE)
def test_each_public_name_keeps_its_interface_and_explains_itself(name: str) -> None:
    public = getattr(loralab, name)
    assert interface_of(public) == INTERFACE[name]
    assert inspect.getdoc(public)
    assert public.__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="atach"):
        _ = loralab.atach


def test_the_commands_and_their_options_are_these() -> None:
    group: Any = typer.main.get_command(app)
    assert {name: options_of(command) for name, command in group.commands.items()} == COMMANDS


def test_the_version_is_that_of_the_installed_package() -> None:
    assert loralab.__version__ == version("loralab")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = {path for path in (ROOT / "loralab").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert held == {str(path.relative_to(ROOT)) for path in source}
    assert {"loralab/py.typed", "loralab/recipes/flan-t5-base-dialogsum.yaml"} <= held
    assert {"loralab/recipes/quickstart.yaml", "loralab/builtin_data/tiny-t5/model.safetensors"} <= held
    base = sum((ROOT / name).stat().st_size for name in held if name.startswith("loralab/builtin_data/tiny-t5/"))
    assert base <= 12_000_000, "the embedded base is at most 12 MB"


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Installed anywhere, in an empty folder, without a network: the four ways of training, and floors."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    variants = ["zero-shot", "lora-8", "lora-32", "full"] if LONG else ["zero-shot", "lora-8"]
    few = ["data.max_train_rows=60", "data.max_validation_rows=10", "data.max_test_rows=20", "training.epochs=1"]
    few += [] if LONG else ["variants=[zero-shot,lora-8]", "evaluation.max_new_tokens=8"]
    command = [sys.executable, "-m", "loralab", "compare", "quickstart", *few, "--json", "--out", "first"]
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [row["variant"] for row in results["rows"]][: len(variants)] == variants
    assert len(results["rows"]) == len(variants) + 2 and results["failures"] == {} and len(results["samples"]) == 3
    where = subprocess.run(
        [sys.executable, "-c", "import loralab; print(loralab.__file__)"], cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(site)), "it was the wheel's that ran"
