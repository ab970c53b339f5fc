"""Tables for people: the rows of a comparison as text of at most 80 columns, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loralab.progress import clock

Row = dict[str, Any]
Cell = list[str]
"""The lines of one cell."""

TITLES = {"loss": "loss", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}


def empty_row(name: str, method: str) -> Row:
    """A row with every key that others may rely on, before anything is known."""
    return {
        "variant": name, "method": method, "trainable": 0, "total": 0, "adapter_bytes": 0,
        "seconds": 0.0, "flops": None, "peak_memory_bytes": 0,
    }  # fmt: skip


def terminal_tables(rows: Sequence[Row], published: dict[str, dict[str, float]]) -> str:
    """What each variant cost, then what it scored: value, 95 % interval, p against the first row, and the published figure."""
    names = score_names(rows)
    cost = [[[row["variant"]], *cost_cells_of(row), score_cell(row, "loss", published)] for row in rows]
    scores = [[[row["variant"]], *(score_cell(row, name, published) for name in names)] for row in rows]
    return "\n\n".join(
        [
            layout(["variant", "trained", "saved", "time", "peak memory", "loss"], cost),
            layout(["variant", *(TITLES.get(name, name) for name in names)], scores),
        ]
    )


def markdown_table(rows: Sequence[Row], published: dict[str, dict[str, float]]) -> str:
    """One wide table for documents."""
    names = ["loss", *score_names(rows)]
    header = ["variant", "trained", "saved", "time", "peak memory", *(TITLES.get(name, name) for name in names)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [[row["variant"]], *cost_cells_of(row), *(score_cell(row, name, published) for name in names)]
        lines.append("| " + " | ".join("<br>".join(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


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
    digits = 3 if name == "loss" else 2
    value, low, high = (f"{metric[key]:.{digits}f}" for key in ("value", "low", "high"))
    cell = [f"{value} {p_text(metric['p_vs_first'])}".rstrip(), f"[{low}, {high}]"]
    figure = published.get(row["variant"], {}).get(name)
    return cell if figure is None else [*cell, f"pub. {figure:.2f}"]


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


def layout(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Columns as wide as their widest line; the first to the left, the others to the right."""
    cells = [[[title] for title in header], *rows]
    widths = [max(len(line) for row in cells for line in row[column]) for column in range(len(header))]
    lines = [_lines(row, widths) for row in cells]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
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
