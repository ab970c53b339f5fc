"""Tables for people: rows of scores as text of at most 80 columns, and as Markdown.

What does not fit beside each other stands below each other, each part with the names of the rows.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from loralab.config.recipe import PUBLISHED_COSTS
from loralab.console.progress import clock
from loralab.metrics import COLUMNS

Row = dict[str, Any]
Cell = list[str]
"""The lines of one cell."""

WIDTH = 80  # of a terminal
LONGEST_NAME = 28  # of a row, in one line
MARKDOWN_COLUMNS = 10
LATEX = {character: "\\" + character for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
}  # fmt: skip
COST = ("trained", "saved", "time", "peak memory")


def empty_row(name: str, method: str) -> Row:
    """A row with every key that others may rely on, before anything is known."""
    return {
        "variant": name, "method": method, "trainable": 0, "total": 0, "adapter_bytes": 0,
        "seconds": 0.0, "flops": None, "peak_memory_bytes": 0,
    }  # fmt: skip


def terminal_tables(rows: Sequence[Row], published: dict[str, dict[str, float]]) -> str:
    """Returns what each variant cost, then what it scored: value, 95 % interval, p against the first row, and the published figure."""
    names = score_names(rows)
    cost = [[[row["variant"]], *cost_cells_of(row), score_cell(row, "loss", published)] for row in rows]
    tables = [layout(["variant", *COST, COLUMNS["loss"].title], cost)]
    if names:
        scores = [[[row["variant"]], *(score_cell(row, name, published) for name in names)] for row in rows]
        tables.append(layout(["variant", *titles(names)], scores))
    if elsewhere := forgetting_names(rows):
        cells = [[[row["variant"]], *(forgetting_cell(row, name) for name in elsewhere)] for row in rows]
        tables.append(layout(["variant", *forgetting_titles(elsewhere)], cells))
    if costs := _published_costs(published):
        tables.append(layout(*costs))
    return "\n\n".join(tables)


def _published_costs(published: dict[str, dict[str, float]]) -> tuple[list[str], list[list[Cell]]] | None:
    """Published figures that are no scores: parameters, compute, memory, time."""
    known = [key for key in PUBLISHED_COSTS if any(key in figures for figures in published.values())]
    if not known:
        return None
    rows = [
        [[name], *([f"{figures[key]:g}" if key in figures else "-"] for key in known)]
        for name, figures in published.items()
    ]
    return ["published", *(PUBLISHED_COSTS[key] for key in known)], rows


def markdown_table(rows: Sequence[Row], published: dict[str, dict[str, float]]) -> str:
    """Wide tables for documents: one, where ten columns are enough."""
    names, elsewhere = ["loss", *score_names(rows)], forgetting_names(rows)
    header = ["variant", *COST, *titles(names), *forgetting_titles(elsewhere)]
    cells = [[[row["variant"]], *_all_cells(row, names, elsewhere, published)] for row in rows]
    parts = range(1, len(header), MARKDOWN_COLUMNS - 1)
    tables = [markdown_cells(*_columns(header, cells, start, start + MARKDOWN_COLUMNS - 1)) for start in parts]
    return "\n".join([*tables, *(markdown_cells(*costs) for costs in [_published_costs(published)] if costs)])


def latex_table(rows: Sequence[Row], published: dict[str, dict[str, float]]) -> str:
    """Returns the same for papers, by the package booktabs."""
    names, elsewhere = ["loss", *score_names(rows)], forgetting_names(rows)
    header = ["variant", *COST, *titles(names), *forgetting_titles(elsewhere)]
    cells = [[row["variant"], *map(" ".join, _all_cells(row, names, elsewhere, published))] for row in rows]
    lines = [" & ".join(map(_latex, line)) + r" \\" for line in (header, *cells)]
    columns = "l" + "r" * (len(header) - 1)
    body = [lines[0], r"\midrule", *lines[1:]]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex(text: str) -> str:
    """With LaTeX's special characters as themselves."""
    return "".join(LATEX.get(character, character) for character in text)


def _all_cells(
    row: Row, names: Sequence[str], elsewhere: Sequence[str], published: dict[str, dict[str, float]]
) -> list[Cell]:
    scores = (score_cell(row, name, published) for name in names)
    return [*cost_cells_of(row), *scores, *(forgetting_cell(row, name) for name in elsewhere)]


def markdown_cells(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """One table."""
    lines = [header, *(["<br>".join(cell) for cell in row] for row in rows)]
    texts = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([texts[0], "|" + "---|" * len(header), *texts[1:]]) + "\n"


def titles(names: Sequence[str]) -> list[str]:
    """The columns' names for people."""
    return [COLUMNS[name].title for name in names]


def directions(names: Sequence[str]) -> str:
    """In words: in which of these columns more is better, in which less, in which neither."""
    said = []
    for better in ("higher", "lower", "neither"):
        if found := titles([name for name in names if COLUMNS[name].better == better]):
            said.append(f"{better} is better: {', '.join(found)}")
    text = "; ".join(said)
    return text[:1].upper() + text[1:] + "."


def score_names(rows: Sequence[Row]) -> list[str]:
    """Every metric of any row but the loss, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["metrics"] if name != "loss"))


def cost_cells_of(row: Row) -> list[Cell]:
    """Trained parameters, size on disk, time and memory; floors and zero-shot train nothing."""
    if row["method"] in ("floor", "none") or row.get("failed"):
        return [["-"], ["-"], ["-"], [memory(row["peak_memory_bytes"])]]
    share = f"{100 * row['trainable'] / row['total']:.2f} %"
    return [
        [f"{row['trainable']:,}", share],
        [memory(row["adapter_bytes"])],
        [clock(row["seconds"])],
        [memory(row["peak_memory_bytes"])],
    ]


def score_cell(row: Row, name: str, published: dict[str, dict[str, float]]) -> Cell:
    """Value and p, interval, published figure."""
    metric = row["metrics"].get(name)
    if metric is None:
        return ["failed" if row.get("failed") else "-"]
    cell = value_cell(name, metric, metric["p_vs_first"])
    figure = published.get(row["variant"], {}).get(name)
    return cell if figure is None else [*cell, f"pub. {figure:.2f}"]


def forgetting_names(rows: Sequence[Row]) -> list[str]:
    """The recipe's names of the other data on which forgetting was measured."""
    return list(dict.fromkeys(name for row in rows for name in row.get("forgetting", {})))


def forgetting_titles(names: Sequence[str]) -> list[str]:
    """The columns' names for people."""
    return [f"loss on {name}" for name in names]


def forgetting_cell(row: Row, name: str) -> Cell:
    """The loss after the training, what the training added to it, and the interval of that."""
    measured = row.get("forgetting", {}).get(name)
    if measured is None:
        return ["failed" if row.get("failed") else "-"]
    digits, added = COLUMNS["loss"].digits, measured["difference"]
    low, high = (f"{added[key]:+.{digits}f}" for key in ("low", "high"))
    return [f"{measured['after']['value']:.{digits}f} ({added['value']:+.{digits}f})", f"[{low}, {high}]"]


def value_cell(name: str, metric: dict[str, Any], p: float | None = None, sign: str = "") -> Cell:
    """Value and p, interval; `sign` "+" marks differences."""
    value, low, high = (f"{metric[key]:{sign}.{COLUMNS[name].digits}f}" for key in ("value", "low", "high"))
    return [f"{value} {p_text(p)}".rstrip(), f"[{low}, {high}]"]


def p_text(p: float | None) -> str:
    if p is None:
        return ""
    return "p<.001" if p < 0.001 else "p=" + f"{p:.3f}".removeprefix("0")


def memory(size: int | None) -> str:
    """Bytes in decimal units, as disks and papers count them."""
    if not size:
        return "-"
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{size / unit:.2f} {name}" if name == "GB" else f"{size / unit:.1f} {name}"


def layout(header: Sequence[str], rows: Sequence[Sequence[Cell]], width: int = WIDTH) -> str:
    """Columns as wide as their widest line; the first to the left, the others to the right.

    As many columns as fit into the width; the others follow below, under the first column again.
    """
    rows = [[_folded(row[0]), *row[1:]] for row in rows]
    cells = [[[title] for title in header], *rows]
    widths = [max(len(line) for row in cells for line in row[column]) for column in range(len(header))]
    parts: list[str] = []
    start = 1
    while start < len(header) or not parts:
        end = start + 1
        while end < len(header) and _rule(widths, start, end + 1) <= width:
            end += 1
        parts.append(_part(*_columns(header, rows, start, end), [widths[0], *widths[start:end]]))
        start = end
    return "\n\n".join(parts)


def _rule(widths: Sequence[int], start: int, end: int) -> int:
    """Returns how wide the first column and those from `start` to `end` are together, two spaces between them."""
    return widths[0] + sum(width + 2 for width in widths[start:end])


def _columns(
    header: Sequence[str], rows: Sequence[Sequence[Cell]], start: int, end: int
) -> tuple[list[str], list[list[Cell]]]:
    """The first column and those from `start` to `end`."""
    return [header[0], *header[start:end]], [[row[0], *row[start:end]] for row in rows]


def _folded(name: Cell) -> Cell:
    """A long name on several lines, broken where it must be."""
    return [part for line in name for part in textwrap.wrap(line, LONGEST_NAME, subsequent_indent=" ") or [""]]


def _part(header: Sequence[str], rows: Sequence[Sequence[Cell]], widths: Sequence[int]) -> str:
    lines = [_lines(row, widths) for row in [[[title] for title in header], *rows]]
    rule = "-" * _rule(widths, 1, len(widths))
    return "\n".join([*lines[0], rule, *(line for row in lines[1:] for line in row)])


def _lines(row: Sequence[Cell], widths: Sequence[int]) -> list[str]:
    height = max(len(cell) for cell in row)
    padded = [[*cell, *[""] * (height - len(cell))] for cell in row]
    return [
        "  ".join(
            line.ljust(width) if column == 0 else line.rjust(width)
            for column, (line, width) in enumerate(zip(lines, widths, strict=True))
        ).rstrip()
        for lines in zip(*padded, strict=True)
    ]
