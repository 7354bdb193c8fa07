"""Held-out bits per byte of several models as one table: differences to the base, the lowest value bold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from weft.reporting.compare import difference_text
from weft.reporting.html import DASH, Cell, column_head, data, details, escape, table

BASE, ORACLE = "base", "oracle"
"""Rows with a meaning of their own: what differences are taken to, and a bound that no method can claim."""
COLUMN_SETS = 7
"""Sets with a column of their own; of more, the sets become the rows of a second table."""


@dataclass(frozen=True)
class ScoreTable:
    """Bits per byte by row and set.

    Attributes:
        rows: by label; `base` and `oracle` are rows like the others.
        what: a row is, in one word.
    """

    rows: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    what: str = "router"

    @property
    def sets(self) -> list[str]:
        """Every set any row was scored on, in order."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))

    def mean(self, label: str) -> float:
        """A row's mean over all sets, each counting once; NaN where one is missing, for it would not compare."""
        values = [self.rows[label].get(name, math.nan) for name in self.sets]
        return math.fsum(values) / len(values) if values else math.nan


def score_table(facts: ScoreTable) -> str:
    """Bits per byte by row, mean and sets, with differences to the base; the best row of a column is bold."""
    sets = facts.sets
    wide = len(sets) > COLUMN_SETS
    columns = [] if wide else sets
    rows = []
    for label in facts.rows:
        cells = [Cell(_value(facts, label, None))] if len(sets) > 1 else []
        cells += [Cell(_value(facts, label, name)) for name in columns]
        rows.append([Cell(escape(label), "text", header=True), *cells])
    heads = [
        escape(facts.what.capitalize()),
        *(["Mean over<br>sets"] if len(sets) > 1 else []),
        *(escape(name) for name in columns),
    ]
    text = table(_caption(facts), column_head(heads), rows, kind="routers")
    if wide:
        rows = [
            [Cell(escape(name), "text", header=True), *(Cell(_value(facts, label, name)) for label in facts.rows)]
            for name in sets
        ]
        head = column_head(["Set", *(escape(label) for label in facts.rows)])
        caption = "Held-out bits per byte by set, as above."
        text += details(f"All {len(sets)} sets", table(caption, head, rows, kind="dense routers"))
    return text


def best_of(facts: ScoreTable | None) -> str:
    """In a sentence: which row has the lowest mean over the sets."""
    means = {} if facts is None else {label: facts.mean(label) for label in facts.rows if not _bound(label)}
    known = {label: mean for label, mean in means.items() if math.isfinite(mean)}
    if not known:
        return "Nothing was measured on held-out text."
    best = min(known, key=known.__getitem__)
    return f"{best} predicts held-out text best: {known[best]:.3f} bits per byte, mean over the sets."


def _caption(facts: ScoreTable) -> str:
    caption = f"Held-out bits per byte by {escape(facts.what)}; lower is better."
    if BASE in facts.rows and len(facts.rows) > 1:
        caption += " Under each value its difference to the base."
    caption += " The lowest value of a column is bold"
    if _is_bound(facts):
        caption += ", the oracle aside: it picks each set's best expert by the very text it is scored on"
    return caption + "."


def _is_bound(facts: ScoreTable) -> bool:
    return any(_bound(label) for label in facts.rows)


def _bound(label: str) -> bool:
    return label.split(" ", maxsplit=1)[0].lower() == ORACLE


def _score(facts: ScoreTable, label: str, name: str | None) -> float:
    return facts.mean(label) if name is None else facts.rows[label].get(name, math.nan)


def _value(facts: ScoreTable, label: str, name: str | None) -> str:
    """One cell: value, bold where it is the lowest of the methods, and the difference to the base."""
    value = _score(facts, label, name)
    if not math.isfinite(value):
        return DASH
    methods = [_score(facts, other, name) for other in facts.rows if not _bound(other)]
    known = [other for other in methods if math.isfinite(other)]
    text = data(value, f"{value:.3f}")
    if len(known) > 1 and not _bound(label) and value == min(known):
        text = f'<strong class="best">{text}</strong><span class="unseen"> (lowest)</span>'
    base = _score(facts, BASE, name) if BASE in facts.rows and label != BASE else math.nan
    if math.isfinite(base):
        text += f'<span class="sub">{data(value - base, difference_text(value - base, math.nan))}</span>'
    return text
