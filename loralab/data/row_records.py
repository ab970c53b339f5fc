"""Records of the rows that a run used: where they are from, how many, what was found in them, their hash."""

from __future__ import annotations

from typing import Any

from loralab import builtin_data
from loralab.data.auto_split import IN_WORDS
from loralab.data.encoded import Encoded
from loralab.data.rows import Findings
from loralab.data.splits import AnySplit


def hashes_of(about: dict[str, Any]) -> dict[str, str]:
    """Returns those of all rows that a run which goes on must find as they were."""
    mixture = about.get("trained_on", {}).get("mixture", {})
    return {what.replace("_", " "): rows["hash"] for what, rows in about.items()} | {
        f"trained on as {name}": rows["hash"] for name, rows in mixture.items()
    }


def builtin_card(rows: AnySplit) -> dict[str, Any]:
    """The card of an embedded data set: what it was made from on this machine."""
    return {"card": builtin_data.card(rows.name)} if rows.name.startswith(builtin_data.PREFIX) else {}


def describe_rows(rows: AnySplit, encoded: Encoded | None = None) -> dict[str, Any]:
    """Returns what a record says of the rows that it used, and of what was found in them by row number."""
    facts = {} if encoded is None else encoded.facts
    findings = Findings(rows.findings | (encoded.findings if encoded is not None else {}))
    return {
        "data": rows.name,
        "split": rows.split,
        "rows": facts.pop("rows", len(rows)),
        **{name: value for name, value in facts.items() if name != "shots"},
        "parted": IN_WORDS if rows.parted else None,
        "findings": findings.as_json(),
        "hash": rows.content_hash,
        **({"shots": facts["shots"]} if "shots" in facts else {}),
    }
