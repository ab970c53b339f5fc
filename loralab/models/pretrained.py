"""The one way in which classes of Transformers are loaded from a folder: Python code in that folder never runs.

Transformers runs such code where it is told to, and asks on stdin where it is told nothing. Here it is always told not to, and
a folder that cannot be used without its code is refused before anything of it is loaded. All other files load through these
functions; tests/test_foreign_code.py reads the source and finds no other call.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loralab.errors import ModelError

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
CUSTOM_GENERATE = Path("custom_generate/generate.py")
KERNELS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
)  # may name a repository of compiled code
FAILURES = (OSError, ValueError, KeyError, AttributeError, ImportError)  # of Transformers, where a class is missing


def from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """Loads a model or a tokenizer by one of Transformers' classes, from local files, without the folder's code.

    Raises:
        ModelError: the folder cannot be used without code of its own.
    """
    refuse_code(folder)
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except FAILURES as error:
        if code := [*_named_code(folder, CONFIG), *_named_code(folder, TOKENIZER_CONFIG)]:
            raise _refusal(folder, code[0]) from error
        raise


def from_config(kind: Any, config: Any) -> Any:
    """Builds a model with new weights by one of Transformers' Auto classes, without code that the config names."""
    return kind.from_config(config, trust_remote_code=False)


def refuse_code(folder: Path) -> None:
    """Raises ModelError where a folder needs Python code of its own, or where Transformers might run code that it brings."""
    if code := next(_needed_code(folder), None):
        raise _refusal(folder, code)
    if (folder / CUSTOM_GENERATE).exists():
        raise ModelError(
            f"{folder} brings Python code, {CUSTOM_GENERATE}, which some versions of Transformers run, and loralab never runs code "
            f"of a model's folder. Remove {folder / CUSTOM_GENERATE.parent}: the settings of generation are the recipe's."
        )
    for key, value in _entries(_read(folder / CONFIG)):
        if key in KERNELS and "/" in str(value):
            raise ModelError(
                f"{folder / CONFIG} asks for compiled code from the hub ({key}: {value!r}), and loralab never runs code that a model "
                f"names. Remove {key} from the file."
            )


def _needed_code(folder: Path) -> Iterator[str]:
    """The code that stands for a class which Transformers lacks."""
    import transformers
    from transformers.models.auto import configuration_auto

    known = configuration_auto.CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
    if _read(folder / CONFIG).get("model_type") not in known:
        yield from _named_code(folder, CONFIG)
    name = str(_read(folder / TOKENIZER_CONFIG).get("tokenizer_class") or "")
    if name and not any(hasattr(transformers, each) for each in (name, name.removesuffix("Fast"))):
        yield from _named_code(folder, TOKENIZER_CONFIG)


def _named_code(folder: Path, file: str) -> Iterator[str]:
    """Returns what the auto_map of a JSON file names, in words."""
    named = _read(folder / file).get("auto_map")
    if named:
        classes = named.values() if isinstance(named, dict) else [named]
        yield f"auto_map in {file} names {', '.join(map(str, classes))}"


def _refusal(folder: Path, code: str) -> ModelError:
    return ModelError(
        f"{folder} needs Python code of its own ({code}), and loralab never runs code of a model's folder. Use a base of an "
        "architecture that Transformers itself has. If the code is yours, load the model in Python and give it to loralab.attach."
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none, which the loading itself reports."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of a config, those of its nested configs too."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield key, value
        yield from _entries(value)
