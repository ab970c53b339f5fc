"""What must be carried to a machine without a network: the libraries that the parts load and it lacks. No data, no models."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

THERE = ("torch", "transformers", "peft", "jax")
"""Libraries that the machine has, each with what it requires."""
DOWNLOAD = (
    "pip download --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 --no-deps --dest wheels"
)


def loaded() -> set[str]:
    """The distributions of all modules that this process has imported."""
    known = packages_distributions()
    names = {module.partition(".")[0] for module in sys.modules}
    return {canonicalize_name(each) for name in names for each in known.get(name, [])}


def required_by(name: str) -> list[str]:
    """What a distribution requires, extras apart; nothing where it is not installed here."""
    try:
        lines = [Requirement(line) for line in distribution(name).requires or []]
    except PackageNotFoundError:
        return []
    return [
        canonicalize_name(each.name) for each in lines if each.marker is None or each.marker.evaluate({"extra": ""})
    ]


def with_requirements(roots: Iterable[str]) -> set[str]:
    """These distributions and all that they require, as far as it is installed here."""
    found, waiting = set[str](), [str(canonicalize_name(root)) for root in roots]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += required_by(name)
    return found


def needed() -> tuple[list[Distribution], list[Distribution]]:
    """(to carry, to look for: a requirement of what is there, in the versions of this machine).

    Both are of loralab's own requirements, as far as they are loaded; loralab itself travels as source.
    """
    own = set(required_by("loralab")) & loaded() - set(THERE)
    there = with_requirements(THERE)
    carried = sorted(with_requirements(own - there) - there)
    return [distribution(name) for name in carried], [distribution(name) for name in sorted(own & there)]


def pinned(found: Iterable[Distribution]) -> str:
    return " ".join(f"{each.name}=={each.version}" for each in found)


def listing() -> str:
    """The list, and how to carry it."""
    carried, looked_for = needed()
    lines = ["Libraries to carry, beside this repository as it is; no data, no models and no tokenizers:"]
    for each in carried:
        pure = "Root-Is-Purelib: true" in (each.read_text("WHEEL") or "")
        size = sum(file.size or 0 for file in each.files or []) / 2**20
        lines.append(f"  {pinned([each]):<32} {'pure Python' if pure else 'a wheel for cp312':<18} {size:6.1f} MiB")
    return "\n".join(
        [
            *lines,
            "Fetch them where there is a network, and install them there without one:",
            f"  {DOWNLOAD} {pinned(carried)}",
            "  pip install --no-index --no-deps --target carried wheels/*.whl",
            "  PYTHONPATH=.:carried python benchmarks/gpu.py all",
            f"Supposed to be there: {', '.join(THERE)}, and with them these; what is not there is carried likewise:",
            f"  {pinned(looked_for)}",
        ]
    )
