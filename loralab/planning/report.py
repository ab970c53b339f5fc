"""A plan in words and tables of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from loralab.console.progress import clock
from loralab.console.tables import WIDTH, Cell, layout, memory

Row = dict[str, Any]

PARTS = ("gradients", "optimizer", "activations", "logits")


def report(found: dict[str, Any]) -> str:
    """Everything that `loralab plan` prints."""
    rows = found["variants"]
    tables = [_counts(rows), _compute(rows), _memory(rows)]
    if any("measured" in row for row in rows):
        tables.append(_measured(rows))
    lines = [*_base(rows), *_fits(rows, found["machine"]), *_answering(rows), *_times(rows), *_saves(rows)]
    lines += [f"{note}." for note in found["notes"]] + [_meaning()]
    return "\n\n".join([*tables, "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)])


def _meaning() -> str:
    return (
        "A step is the largest one: every row as long as it may be. FLOPs are those of matrix products, two for a multiplication "
        "and an addition. Memory is that of tensors; its parts are each at their largest, the peak is what is there at one time. "
        "Activations are what is held for the backward pass."
    )


def _counts(rows: Sequence[Row]) -> str:
    header = ["variant", "trained", "of", "share", "saved"]
    cells = [
        [
            [row["variant"]],
            [f"{row['trainable']:,}" if row["trainable"] else "-"],
            [f"{row['total']:,}"],
            [f"{row['trainable_percent']:.2f} %" if row["trainable"] else "-"],
            [memory(row["adapter_bytes"])],
        ]
        for row in rows
    ]
    return layout(header, cells)


def _compute(rows: Sequence[Row]) -> str:
    header = ["variant", "batch", "tokens", "dtype", "FLOPs a step", "steps", "FLOPs in all"]
    cells = [
        [
            [row["variant"]],
            [_batch(row["batch"])],
            [_tokens(row)],
            [row["dtype"]],
            [operations(row["flops_per_step"])],
            [f"{row['steps']:,}" if row["steps"] else "-"],
            [operations(row["flops"])],
        ]
        for row in rows
    ]
    return layout(header, cells)


def _batch(batch: dict[str, int]) -> str:
    rows = str(batch["rows"])
    return rows if batch["accumulate"] == 1 else f"{batch['accumulate']} x {rows}"


def _tokens(row: Row) -> str:
    batch = row["batch"]
    return f"{batch['source']} + {batch['target']}"


def operations(flops: float | None) -> str:
    """With a unit: 373.8 GFLOP."""
    if not flops:
        return "-"
    unit, name = next(
        (each for each in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")) if flops >= each[0]),
        (1e6, "MFLOP"),
    )
    return f"{flops / unit:.1f} {name}"


def _memory(rows: Sequence[Row]) -> str:
    cells = [[[row["variant"]], *_parts(row["memory_bytes"])] for row in rows]
    return layout(["memory of a step", "peak", "base + adapter", *PARTS], cells)


def _parts(parts: dict[str, int]) -> list[Cell]:
    held = [memory(parts[key]) for key in ("weights", "adapter") if parts[key]]
    return [[memory(parts["peak"])], [" + ".join(held)], *([memory(parts[key])] for key in PARTS)]


def _measured(rows: Sequence[Row]) -> str:
    """Predicted beside measured."""
    cells = []
    for row in rows:
        if "measured" in row:
            measured, peak = row["measured"], row["memory_bytes"]["peak"]
            flops = _beside(row["flops_per_step"], measured["flops"], operations)
            cells.append(
                [
                    [row["variant"]],
                    flops,
                    _beside(peak, measured["peak_bytes"], memory),
                    [f"{measured['seconds']:.2f} s"],
                ]
            )
    return "Predicted, measured, and how far the prediction is off:\n" + layout(
        ["variant", "FLOPs a step", "peak memory", "a step takes"], cells
    )


def _beside(predicted: int, measured: int, show: Callable[[int], str]) -> Cell:
    return [show(predicted), show(measured), f"{100 * (predicted / measured - 1):+.1f} %"]


def _base(rows: Sequence[Row]) -> list[str]:
    """Once for each base."""
    said = {
        f"The base takes {memory(sizes['float32'])} in float32, {memory(sizes['bfloat16'])} in bfloat16, "
        f"{memory(sizes['int8'])} in int8, {memory(sizes['nf4'])} in nf4.": None
        for sizes in (row["base_bytes"] for row in rows)
        if sizes
    }
    return list(said)


def _fits(rows: Sequence[Row], machine: dict[str, Any]) -> list[str]:
    """Returns which variants this machine has room for, and what would make the others fit."""
    known = [row for row in rows if row.get("fits") is not None]
    room = (
        f"{memory(machine['room'])} that there is room for on this {'GPU' if machine['kind'] == 'cuda' else 'machine'}"
    )
    lines = []
    if fitting := [row for row in known if row["fits"]]:
        most = max(row["memory_bytes"]["peak"] for row in fitting)
        who = "All fit" if len(fitting) == len(rows) else f"These fit: {', '.join(row['variant'] for row in fitting)}"
        lines.append(f"{who}; at most {memory(most)} of {room}.")
    for row in known:
        if row["fits"]:
            continue
        start = f"{row['variant']} does NOT fit: {memory(row['memory_bytes']['peak'])}, of {room}"
        if fix := row["remedy"]:
            lines.append(f"{start}. It would, with {memory(fix['peak'])}: {' '.join(fix['overrides'])}")
        else:
            lines.append(f"{start}; nor would it by any of shorter batches, bfloat16, checkpointing, int8 and nf4.")
    return lines


def _answering(rows: Sequence[Row]) -> list[str]:
    """The memory of inference, of the variant that takes most."""
    known = [row for row in rows if row.get("inference_bytes")]
    if not known:
        return []
    most = max(known, key=lambda row: int(row["inference_bytes"]))
    batch = "a batch of rows" if most["batch"]["target"] else "a batch"
    return [
        f"Inference takes at most {memory(most['inference_bytes'])} ({most['variant']}), for {batch} of full length."
    ]


def _times(rows: Sequence[Row]) -> list[str]:
    """Hours and their price, where a time is known."""
    return [
        f"{row['variant']} takes about {clock(row['hours'] * 3600)} in all"
        + (f", which costs {row['price']:.2f}." if "price" in row else ".")
        for row in rows
        if "hours" in row
    ]


def _saves(rows: Sequence[Row]) -> list[str]:
    """LoRA's honest limits: what it saves of memory, and how much less of time."""
    lines = []
    full = next((row["measured"]["seconds"] for row in rows if row["method"] == "full" and "measured" in row), None)
    for row in rows:
        if "saves" not in row:
            continue
        memory_saved, flops_saved = (100 * row["saves"][key] for key in ("memory", "flops"))
        if full and "measured" in row:
            time = f"{100 * (1 - row['measured']['seconds'] / full):.0f} % of the time, measured"
        else:
            time = f"at most {flops_saved:.0f} % of the time, counted by products alone"
        saved = f"On this model {row['variant']} saves {memory_saved:.0f} % of the memory and {time}"
        lines.append(f"{saved}, against training all weights on the same batch.")
    return lines
