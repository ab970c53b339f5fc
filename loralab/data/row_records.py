"""What a record says of rows that were used: where they are from, how many, what was found in them, their hash."""

from __future__ import annotations

from typing import Any

from loralab import builtin_data
from loralab.data.auto_split import IN_WORDS
from loralab.data.rows import Findings
from loralab.data.sequence_packing import PackedSplit
from loralab.data.span_corruption import Documents, Encoded, MaskedSplit
from loralab.data.splits import AnySplit
from loralab.data.tokenized_split import EncodedSplit


def hashes_of(about: dict[str, Any]) -> dict[str, str]:
    """Those of all rows that a run which goes on must find as they were."""
    mixture = about.get("trained_on", {}).get("mixture", {})
    return {what.replace("_", " "): rows["hash"] for what, rows in about.items()} | {
        f"trained on as {name}": rows["hash"] for name, rows in mixture.items()
    }


def builtin_card(rows: AnySplit) -> dict[str, Any]:
    """The card of an embedded data set: what it was made from on this machine."""
    return {"card": builtin_data.card(rows.name)} if rows.name.startswith(builtin_data.PREFIX) else {}


def describe_rows(rows: AnySplit, encoded: Encoded | None = None) -> dict[str, Any]:
    """What a record says of the rows that it used, and of what was found in them by row number."""
    findings = Findings(rows.findings | (encoded.findings if encoded is not None else {}))
    return {
        "data": rows.name,
        "split": rows.split,
        "rows": len(rows if encoded is None or isinstance(encoded, Documents) else encoded),
        **({"chunks": len(encoded)} if isinstance(encoded, MaskedSplit) else {}),
        **({"bytes": int(encoded.num_bytes.sum())} if isinstance(encoded, PackedSplit) else {}),
        "parted": IN_WORDS if rows.parted else None,
        "findings": findings.as_json(),
        "hash": rows.content_hash,
        **({"shots": encoded.shots.as_json()} if isinstance(encoded, EncodedSplit) and encoded.shots else {}),
    }
