"""A few evaluated rows side by side: source, reference, what each variant wrote. Numbers do not replace reading."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.data.rows import subject
from loralab.runs.folder import PREDICTIONS
from loralab.runs.record import read_lines

IN_FILE, IN_TERMINAL = 20, 3
LINES_IN_TERMINAL = 8  # of a source


@dataclass(frozen=True)
class ComparedRow:
    """One row."""

    row: int
    source: str
    references: list[str]
    answers: dict[str, str]
    """Variant -> what it wrote."""


def read_compared_rows(folders: Mapping[str, Path], count: int) -> list[ComparedRow]:
    """So many rows, spread evenly over those evaluated, with the answers of every variant that has any.

    Rows of one source count once, with the references of all.
    """
    lines_of = {name: read_lines(folder / PREDICTIONS) for name, folder in folders.items()}
    answers = {name: lines for name, lines in lines_of.items() if "prediction" in lines[0]}
    if not answers:
        return []
    by_source = {name: {_subject(row): row["prediction"] for row in lines} for name, lines in answers.items()}
    rows: dict[str, ComparedRow] = {}
    for row in next(iter(answers.values())):
        texts = {name: predictions[_subject(row)] for name, predictions in by_source.items()}
        sample = rows.setdefault(_subject(row), ComparedRow(row["row"], row["source"], [], texts))
        sample.references.extend(row["references"])
    return evenly_spaced(list(rows.values()), count)


def _subject(row: Mapping[str, Any]) -> str:
    return subject(row["source"], row["references"])


def evenly_spaced(rows: Sequence[ComparedRow], count: int) -> list[ComparedRow]:
    """`count` of them, evenly from the first to the last."""
    step = max(1.0, len(rows) / count)
    return [rows[int(place * step)] for place in range(min(count, len(rows)))]


def samples_markdown(samples: Sequence[ComparedRow]) -> str:
    """samples.md."""
    return "\n".join(["# The same rows, answered by every variant", "", *(_section(sample) for sample in samples)])


def _section(sample: ComparedRow) -> str:
    reference = "Reference" if len(sample.references) == 1 else "References"
    parts = [f"## Row {sample.row}", _quoted(sample.source), f"**{reference}**", *map(_quoted, sample.references)]
    for name, text in sample.answers.items():
        parts += [f"**{name}**", _quoted(text)]
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    """As a block that shows the text as it is: indented by four, which Markdown leaves alone."""
    return "\n".join("    " + line for line in text.splitlines()) if text.strip() else "*(nothing)*"


def samples_in_terminal(samples: Sequence[ComparedRow], width: int = 80) -> str:
    """For the end of a comparison; long sources are cut."""
    return "\n\n".join(_lines(sample, width) for sample in samples)


def _lines(sample: ComparedRow, width: int) -> str:
    wrapped = [part for line in sample.source.splitlines() for part in textwrap.wrap(line, width - 2) or [""]]
    shown = wrapped[:LINES_IN_TERMINAL] + (["…"] if len(wrapped) > LINES_IN_TERMINAL else [])
    labels = {"reference": sample.references[0], **sample.answers}
    wide = max(map(len, labels)) + 2
    answers = [
        textwrap.fill(
            " ".join(text.split()) or "(nothing)", width, initial_indent=f"{name:<{wide}}", subsequent_indent=" " * wide
        )
        for name, text in labels.items()
    ]
    return "\n".join([f"Row {sample.row}", *(f"| {line}" for line in shown), *answers])
