"""Python code that lies beside a stranger's model, data or working folder never runs, and nobody is asked whether it may."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY as ROOT
from datasets import Dataset
from tiny import CPU, make_bart
from transformers import AutoTokenizer

from loralab.data.sources import open_place
from loralab.errors import DataError, ModelError
from loralab.experiments.run_variants import python_of_loralab
from loralab.metrics.labels import Labels
from loralab.models.checkpoint_files import load_tokenizer
from loralab.models.pretrained import from_pretrained
from loralab.on_torch.loading.classifier import load_classifier
from loralab.on_torch.loading.load import load_weights
from loralab.on_torch.loading.supported_models import check_supported

MARKER = "RAN"
EVIL = f"""
open({MARKER!r}, "w").close()
class EvilConfig: pass
class EvilModel: pass
class EvilTokenizer: pass
"""


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings), encoding="utf-8")


@pytest.fixture
def evil(tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A BART's folder with code of its own; the test fails where that has run by its end, or where it is asked for."""

    def never(prompt: str = "") -> str:
        raise AssertionError(f"there was a question: {prompt}")

    monkeypatch.setattr("builtins.input", never)
    monkeypatch.chdir(tmp_path)
    folder = make_bart(tmp_path / "evil", data_folder / "tokenizers/t5")
    (folder / "evil.py").write_text(EVIL)
    return folder


def unknown_config(folder: Path) -> None:
    change(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})


def unknown_tokenizer(folder: Path) -> None:
    names = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=names)


def test_a_model_that_needs_code_of_its_own_is_refused_by_every_way_of_loading(evil: Path) -> None:
    unknown_config(evil)
    labels = Labels(("a", "b"), (("0", "a"), ("1", "b")), False)
    for load in (
        lambda: load_tokenizer(evil),
        lambda: check_supported(evil),
        lambda: check_supported(evil, classify=True),
        lambda: load_weights(evil, torch.float32, CPU),
        lambda: load_classifier(evil, labels, False, torch.float32, CPU, 0),
    ):
        with pytest.raises(ModelError, match=r"needs Python code.*config\.json names evil\.EvilConfig.*never runs"):
            load()
    assert not Path(MARKER).exists()


def test_a_tokenizer_that_needs_code_of_its_own_is_refused(evil: Path) -> None:
    unknown_tokenizer(evil)
    with pytest.raises(ModelError, match=r"needs Python code.*tokenizer_config\.json names.*evil\.EvilTokenizer"):
        load_tokenizer(evil)
    assert not Path(MARKER).exists()


def test_code_beside_classes_that_transformers_has_is_passed_over(evil: Path) -> None:
    change(evil / "config.json", auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForSeq2SeqLM": "evil.EvilModel"})
    change(evil / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.EvilTokenizer", None]})
    assert type(load_weights(evil, torch.float32, CPU)).__name__ == "BartForConditionalGeneration"
    assert load_tokenizer(evil)("A text.").input_ids
    assert not Path(MARKER).exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_implementation": "somebody/kernel"}, r"compiled code from the hub \(attn_implementation"),
        ({"text_config": {"_attn_implementation": "somebody/kernel"}}, "compiled code from the hub"),
        ({"architectures": ["AutoModelForSeq2SeqLM"]}, "none of them"),
        ({"architectures": ["Trainer", 3, None]}, "none of them"),
    ],
)
def test_what_config_json_may_name_is_a_model_class_of_transformers(
    settings: dict[str, Any], message: str, evil: Path
) -> None:
    change(evil / "config.json", **settings)
    with pytest.raises(ModelError, match=message):
        load_weights(evil, torch.float32, CPU)


def test_a_generate_function_of_the_folders_own_is_refused(evil: Path) -> None:
    (evil / "custom_generate").mkdir()
    (evil / "custom_generate/generate.py").write_text(EVIL)
    with pytest.raises(ModelError, match=r"custom_generate.*Remove"):
        load_weights(evil, torch.float32, CPU)
    assert not Path(MARKER).exists()


def test_a_question_on_stdin_is_never_answered(evil: Path) -> None:
    """Transformers' own default would read the y."""
    unknown_config(evil)
    unknown_tokenizer(evil)
    command = [sys.executable, "-m", "loralab", "generate", "evil", "--text", "x"]
    done = subprocess.run(command, input="y\n" * 20, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("loralab: evil needs Python code of its own") and "Traceback" not in done.stderr
    assert not Path(MARKER).exists()


def test_a_failure_without_foreign_code_keeps_its_reason(evil: Path) -> None:
    (evil / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no tokenizer that Transformers can read"):
        load_tokenizer(evil)
    change(evil / "config.json", auto_map={"AutoConfig": "evil.EvilConfig"})
    with pytest.raises(ModelError, match="needs Python code"):
        from_pretrained(AutoTokenizer, evil)


def test_a_data_set_with_a_script_is_not_loaded_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "rows"
    (folder / "data").mkdir(parents=True)
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(folder / "data/train-00000-of-00001.parquet")
    assert len(list(open_place(str(folder), "train").records())) == 2
    (folder / "rows.py").write_text(EVIL)
    with pytest.raises(DataError, match="cannot be read"):
        list(open_place(str(folder), "train").records())
    assert not Path(MARKER).exists()


def test_no_other_place_loads_a_class_of_transformers() -> None:
    """A new call of from_pretrained would ask on stdin again. The benchmarks may load by a class that they name themselves."""
    found = []
    for file in sorted([*(ROOT / "loralab").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr not in ("from_pretrained", "from_config"):
                continue
            owner = ast.unparse(node.func.value)
            concrete = file.parent.name == "benchmarks" and owner.endswith(("LMHeadModel", "Generation", "PeftModel"))
            if owner != "nn.Embedding" and not concrete:
                found.append((file.name, owner))
    assert found == [("pretrained.py", "kind"), ("pretrained.py", "kind")]


# The working folder


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A working folder with a json.py, which every program of Python would rather import than the standard library's."""
    (tmp_path / "json.py").write_text(EVIL + "raise ImportError('shadowed')\n")
    return tmp_path


@pytest.mark.parametrize("by", ["compare", "python -m loralab"])
def test_a_json_py_in_the_working_folder_is_not_imported(by: str, trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trap)
    command = python_of_loralab() if by == "compare" else [sys.executable, "-m", "loralab"]
    assert ("-P" in command) == (by == "compare")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    done = subprocess.run([*command, "recipes"], cwd=trap, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout and not (trap / MARKER).exists()


def test_a_comparison_runs_in_a_folder_with_a_json_py(workshop: Path, trap: Path) -> None:
    shutil.copy(workshop / "tiny.yaml", trap)
    few = ["variants=[zero-shot]", "data.max_validation_rows=2"]
    command = [sys.executable, "-P", "-m", "loralab", "compare", "tiny.yaml", *few, "--out", "o"]
    done = subprocess.run(command, cwd=trap, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (trap / MARKER).exists()


def test_a_checkout_that_is_not_installed_is_still_found_by_a_comparison(tmp_path: Path) -> None:
    """There `python -m loralab` imports loralab itself from the working folder."""
    shutil.copytree(ROOT / "loralab", tmp_path / "loralab", ignore=shutil.ignore_patterns("__pycache__"))
    program = "from loralab.experiments.run_variants import python_of_loralab; print(python_of_loralab())"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "-P" not in ast.literal_eval(done.stdout)
