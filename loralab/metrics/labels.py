"""Labels of texts: a cell of the label column -> its text, and the texts of a training split -> an ordered set of labels.

A label is a name, a whole number or a truth value; a list of them gives a row several labels, or none. As text:

    pos      0      true      ["joy", "love"]      []        (lists as JSON, sorted; a CSV holds them so too)

The order of labels, which is that of the model's outputs: as in the recipe's `data.labels` where it is given; else that
of the base's own head where its labels are the same ones; else whole numbers rise and names are in the alphabet's order.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.errors import DataError

SHOWN = 8  # labels named in a message
IMBALANCED = 3.0  # times that the most frequent label may outnumber the rarest before it is remarked
PLACES = ("", "LABEL_")  # before a label's number: nothing, or what Transformers writes where a label has no name
MOST_WITHOUT_DOUBT = 20  # labels; more need at least two rows each


@dataclass(frozen=True)
class Labels:
    """The labels of a classifier."""

    names: tuple[str, ...]
    """In the order of the model's outputs."""
    values: tuple[tuple[str, str], ...] = ()
    """Other values for labels in the data: (value, name)."""
    multi: bool = False
    """A row may have several labels, or none."""

    @property
    def problem_type(self) -> str:
        """Returns what Transformers calls the task of such a head."""
        return "multi_label_classification" if self.multi else "single_label_classification"

    def places(self, text: str) -> list[int]:
        """Returns the outputs that a label's text, or a list's, names. Raises KeyError for an unknown one."""
        known = {name: place for place, name in enumerate(self.names)}
        known |= {value: known[name] for value, name in self.values}
        return [known[each] for each in members(text, self.multi)]

    def targets(self, text: str) -> Sequence[float]:
        """Returns what the loss compares with: the one output's number; with several labels a 0 or 1 for each output."""
        places = self.places(text)
        return [int(place in places) for place in range(len(self.names))] if self.multi else places

    def named(self, text: str) -> str:
        """Returns the same text with the labels' names, in canonical form."""
        names = [self.names[place] for place in self.places(text)]
        return as_list(names) if self.multi else names[0]

    def check(self, counts: Mapping[str, int], title: str) -> None:
        """Raises DataError where rows, counted by their labels' texts, have labels that are none of these."""
        known = {*self.names, *(value for value, _ in self.values)}
        tally = count_members(counts, self.multi, title)
        unknown = {label: count for label, count in tally.items() if label not in known}
        if not unknown:
            return
        numbers = all(map(is_whole, unknown)) != all(map(is_whole, known))
        clash = " Numbers stand in one place and names in the other." if numbers else ""
        raise DataError(
            f"{title}: {sum(unknown.values()):,} rows have labels that the model was not trained on: {listed(unknown)}. "
            f"Its labels are: {', '.join(self.names[:SHOWN])}{', …' if len(self.names) > SHOWN else ''}.{clash} Mend the rows, or say "
            f"what stands for what: data.labels='{{{next(iter(unknown))!s}: {self.names[0]}, …}}'."
        )

    def absent(self, counts: Mapping[str, int], title: str) -> list[str]:
        """The labels that none of these rows has."""
        seen = {place for text in counts for place in self.places(text)}
        return [name for place, name in enumerate(self.names) if place not in seen]

    def also(self, given: Mapping[str, str]) -> Labels:
        """With more that may stand in data: value -> name; what names none of these labels is left out."""
        more = {value: name for value, name in given.items() if name in self.names and value not in self.names}
        return Labels(self.names, tuple((dict(self.values) | more).items()), self.multi)

    def as_json(self) -> dict[str, Any]:
        """For an adapter's card."""
        return {"names": list(self.names), "values": dict(self.values), "multi": self.multi}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Labels:
        """Returns what `as_json` gave."""
        if stored.get("problem_type") == RegressionOutput().problem_type:
            return RegressionOutput()
        return cls(tuple(stored["names"]), tuple(stored["values"].items()), stored["multi"])


@dataclass(frozen=True)
class RegressionOutput(Labels):
    """The one output of a head that gives a number; it has the name that Transformers gives a label without one."""

    names: tuple[str, ...] = ("LABEL_0",)

    @property
    def problem_type(self) -> str:
        return "regression"

    def targets(self, text: str) -> Sequence[float]:
        return [float(text)]

    def also(self, given: Mapping[str, str]) -> Labels:
        return self

    def as_json(self) -> dict[str, Any]:
        return super().as_json() | {"problem_type": self.problem_type}


# A cell


def number_text(value: object, where: str, column: str) -> str | None:
    """Returns a cell of numbers as text, in Python's shortest spelling; "" for a blank one, None for a missing one.

    Raises:
        DataError: the cell holds no finite number.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str) and not value.strip():
        return ""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        got = f"{value!r:.60} ({type(value).__name__})"
        raise DataError(f"{where}: column {column!r} holds {got}, where a number is needed.")
    return repr(number)


def label_text(value: object, where: str, column: str) -> str | None:
    """The cell as text; "" for a blank one, None for a missing one.

    Raises:
        DataError: the cell is none of what a label can be.
    """
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, list):
        texts = [label_text(each, where, column) for each in value]
        if not all(texts):
            raise DataError(f"{where}: column {column!r} holds a list with an empty label. Remove it from the list.")
        return as_list([text for text in texts if text])
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str):
        return " ".join(value.split())
    got = f"{value!r:.60} ({type(value).__name__})"
    raise DataError(
        f"{where}: column {column!r} holds {got}. A label is a name, a whole number or true or false, or a list of these."
    )


def _parsed(text: str) -> object:
    """A list where the text is one in JSON, else the text."""
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def as_list(names: Iterable[str]) -> str:
    """The text of several labels."""
    return json.dumps(sorted(set(names)), ensure_ascii=False)


def is_list(text: str) -> bool:
    """Tells whether a text is that of several labels."""
    return text.startswith("[") and isinstance(_parsed(text), list)


def members(text: str, multi: bool) -> list[str]:
    """The labels in a text."""
    return [str(each) for each in json.loads(text)] if multi else [text]


def is_whole(text: str) -> bool:
    return re.fullmatch(r"-?\d+", text) is not None


# A split


def count_members(counts: Mapping[str, int], multi: bool, title: str) -> Counter[str]:
    """Rows of each single label.

    Raises:
        DataError: some rows have a list of labels and others a single one.
    """
    lists = sum(count for text, count in counts.items() if is_list(text))
    total = sum(counts.values())
    if lists not in (0, total) or (multi and not lists) or (lists and not multi):
        kind = "a list of labels" if multi else "a single label"
        raise DataError(
            f"{title}: {lists:,} of {total:,} rows have a list of labels, the others a single one, and {kind} is expected. "
            "Write all of them in one way."
        )
    tally: Counter[str] = Counter()
    for text, count in counts.items():
        for label in members(text, multi):
            tally[label] += count
    return tally


def settle(counts: Mapping[str, int], given: Mapping[str, str], title: str) -> Labels:
    """The labels of a training split.

    Args:
        counts: rows by their label's text.
        given: the recipe's `data.labels`: what stands in the data -> name.

    Raises:
        DataError: there is but one label, or nearly as many as rows, or one that `given` lacks.
    """
    multi = max(counts, key=lambda text: counts[text], default="").startswith("[")
    tally, rows = count_members(counts, multi, title), sum(counts.values())
    if given:
        labels = Labels(tuple(dict.fromkeys(given.values())), tuple(given.items()), multi)
        labels.check(counts, title)
    else:
        labels = Labels(tuple(ordered(tally)), (), multi)
    used = [name for name in labels.names if name not in labels.absent(counts, title)]
    if len(used) < 2:
        only = f"all {rows:,} have the label {used[0]!r}" if used and not multi else listed(tally) or "none has any"
        raise DataError(
            f"{title}: of {rows:,} training rows {only}, and there is nothing to choose between. "
            "Where the file is sorted by label, data.max_train_rows takes its first rows alone: data.pick_rows=random takes any."
        )
    if len(tally) > max(MOST_WITHOUT_DOUBT, rows // 2):
        raise DataError(
            f"{title}: {rows:,} rows have {len(tally):,} different labels, such as {listed(tally)}. Does data.label name the right column?"
        )
    return labels


def ordered(values: Iterable[str]) -> list[str]:
    """Whole numbers rise; names are in the alphabet's order."""
    values = list(values)
    return sorted(values, key=int) if all(map(is_whole, values)) else sorted(values)


def listed(tally: Mapping[str, int]) -> str:
    """ "'pos' (5,000 rows), 'neg' (1 row)", the most frequent first."""
    most = sorted(tally, key=lambda label: -tally[label])
    shown = [f"{label!r} ({tally[label]:,} row{'s' if tally[label] > 1 else ''})" for label in most[:SHOWN]]
    return ", ".join(shown + (["…"] if len(most) > SHOWN else []))


def balance(counts: Mapping[str, int], labels: Labels, title: str) -> list[str]:
    """In words: how many rows each label has, and what follows where that is uneven."""
    tally, rows = count_members(counts, labels.multi, title), sum(counts.values())
    named: Counter[str] = Counter()
    for label, count in tally.items():
        named[labels.names[labels.places(as_list([label]) if labels.multi else label)[0]]] += count
    shares = [f"{name} {named[name]:,} ({100 * named[name] / rows:.0f} %)" for name in labels.names[:SHOWN]]
    more = f", and {len(labels.names) - SHOWN} more" if len(labels.names) > SHOWN else ""
    lines = [f"{title}, labels: {', '.join(shares)}{more}"]
    if absent := labels.absent(counts, title):
        lines.append(f"{title}: no row has the label {' or '.join(map(repr, absent[:SHOWN]))}.")
    most, least = max(named.values()), min(named.get(name, 0) for name in labels.names)
    if least and most > IMBALANCED * least and not labels.multi:
        often = max(named, key=lambda name: named[name])
        lines.append(
            f"{title} is imbalanced: always {often!r} would be right in {100 * most / rows:.1f} % of the rows. "
            "F1 says more than accuracy."
        )
    return lines


# A base's head


def aligned(labels: Labels, base: Sequence[str]) -> Labels | None:
    """Returns the same labels in the order, and with the names, of a base's head; None where they are not the same ones.

    Names agree without regard to capitals, or where one is the start of the other (neg, NEGATIVE); numbers from 0 on are
    the head's own places.
    """
    if len(base) != len(labels.names):
        return None
    places = _same_names(labels.names, base)
    if places is None and any(list(labels.names) == [f"{prefix}{n}" for n in range(len(base))] for prefix in PLACES):
        places = list(range(len(base)))
    if places is None:
        return None
    new = dict(zip(labels.names, (base[place] for place in places), strict=True))
    values = {old: name for old, name in new.items() if old != name} | {
        value: new[name] for value, name in labels.values
    }
    return Labels(tuple(base), tuple(values.items()), labels.multi)


def _same_names(names: Sequence[str], base: Sequence[str]) -> list[int] | None:
    lower, base = [name.lower() for name in names], [name.lower() for name in base]
    for same in (str.__eq__, lambda a, b: not is_whole(a) and (a.startswith(b) or b.startswith(a))):
        found = [[place for place, other in enumerate(base) if same(name, other)] for name in lower]
        places = [hits[0] for hits in found if len(hits) == 1]
        if len(set(places)) == len(base):
            return places
    return None
