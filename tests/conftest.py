"""What all tests share: no network, and the folder of real data and models."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before any test module is
os.environ.setdefault("LORALAB_TRACEBACK", "1")  # of an unforeseen error, where a test shows what a command has printed
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of several processes on few cores wait for one another
os.environ["LORALAB_CACHE"] = tempfile.mkdtemp(prefix="loralab-tests-")  # never the user's; processes inherit it

import pytest
from processes import ServedRun

from loralab.experiments import run_variants

atexit.register(shutil.rmtree, os.environ["LORALAB_CACHE"], ignore_errors=True)
REPOSITORY = Path(__file__).resolve().parent.parent
LONGEST = (
    "commands",
    "resume",
    "generation",
    "compare",
    "trajectory",
    "documents",
    "recipes",
    "public_names",
    "streaming",
    "benchmarks",
    "jax_lora",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: a worker that gets one of them last would go on alone."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data: LORALAB_TEST_DATA, else ../shared/data beside the repository.

    Without it the test skips; under CI=true it fails, so that a green run has tested everything.
    """
    folder = Path(os.environ.get("LORALAB_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if folder.is_dir():
        return folder
    message = f"There is no data folder {folder}. Set LORALAB_TEST_DATA to it."
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def workshop(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See workshop.py."""
    from workshop import furnish

    return furnish(tmp_path_factory.mktemp("workshop"), data_folder)


@pytest.fixture(scope="session")
def tokenizers(data_folder: Path) -> dict[str, Any]:
    """Two published tokenizers, by name."""
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(data_folder / "tokenizers" / name) for name in ("t5", "gpt2")}


@pytest.fixture(scope="session")
def t5(tokenizers: dict[str, Any]) -> Any:
    """T5's tokenizer."""
    return tokenizers["t5"]


@pytest.fixture(scope="session")
def dialogues(data_folder: Path) -> Any:
    """DialogSum's 500 validation rows."""
    from folders import read

    return read(data_folder / "dialogsum", "validation")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def bases(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny classifiers, rows, and a recipe for each; see classifiers.py."""
    from classifiers import make_bases, write_recipe, write_rows

    folder = tmp_path_factory.mktemp("classifiers")
    make_bases(folder, data_folder / "tokenizers/bert-base-uncased")
    for name in ("bert", "distilbert", "roberta"):
        write_recipe(folder / f"{name}.yaml", folder / name, write_rows(folder / "data"))
    return folder


@pytest.fixture(scope="session")
def classifiers(bases: Path) -> dict[str, Path]:
    """Finished runs of classifiers by name: "<base> <what>"."""
    from loralab.config.loading import load_recipe
    from loralab.training.train import train

    done: dict[str, Path] = {}
    for name, overrides in {
        "bert lora": [],
        "bert head": ["training.method=head"],
        "distilbert lora": [],
        "distilbert both": ["training.head=trained"],
        "distilbert head after lora": ["training.method=head", f"training.start_from={bases}/distilbert lora"],
        "distilbert lora after head after lora": [f"training.start_from={bases}/distilbert head after lora"],
        "bert lora after head": [f"training.start_from={bases}/bert head"],
        "bert full after lora": ["training.method=full", f"training.start_from={bases}/bert lora"],
    }.items():
        recipe = load_recipe(bases / f"{name.split()[0]}.yaml", overrides)
        done[name], record = train(recipe, bases / name)
        assert record["proof"]["reloaded_equal"]
        assert record["proof"]["merged_error"] is None or record["proof"]["merged_error"] < 1e-4
    return done


@pytest.fixture(autouse=True, scope="session")
def served_runs() -> Iterator[None]:
    """The runs of comparisons that tests start themselves are forked from a server (processes.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_variants, "subprocess", SimpleNamespace(Popen=ServedRun, DEVNULL=subprocess.DEVNULL))
        yield
