"""The routing part of a report: routers beside the base on held-out text, and what one of them did with a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weft.errors import ConfigError
from weft.reporting.compare import difference_text
from weft.reporting.html import DASH, Cell, column_head, data, details, escape, table
from weft.reporting.trace_parts import heat_map, trace_headline, trace_script, trace_size, trace_style
from weft.reporting.traces import LabelledTrace, Palette, TraceFacts

BASE, ORACLE = "base", "oracle"
"""Rows with a meaning of their own: what differences are taken to, and a bound that no method can claim."""
COLUMN_SETS = 7
"""Sets with a column of their own; of more, the sets become the rows of a second table."""


@dataclass(frozen=True)
class RoutingFacts:
    """What a report shows of routing.

    Attributes:
        table: held-out bits per byte by router and set; `base` and `oracle` are rows like the others.
        relative_forward_time: time of a routed forward pass over the base's, where it was measured.
        traces: label, trace and token texts, of what a router did; the first is shown open.
    """

    table: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    relative_forward_time: float | None = None
    traces: Sequence[LabelledTrace] = ()

    @property
    def sets(self) -> list[str]:
        """Every set any router was scored on, in order."""
        return list(dict.fromkeys(name for row in self.table.values() for name in row))

    def mean(self, router: str) -> float:
        """A router's mean over all sets, each counting once; NaN where one is missing, for it would not compare."""
        values = [self.table[router].get(name, math.nan) for name in self.sets]
        return math.fsum(values) / len(values) if values else math.nan


def routing_style(facts: RoutingFacts) -> str:
    """What a page's style sheet needs for the section: nothing where there is no trace."""
    return "\n" + trace_style() if facts.traces else ""


def routing_section(facts: RoutingFacts) -> str:
    """The section's inside: table, time, traces. A page that shows traces needs `routing_style` in its style sheet.

    Raises:
        ConfigError: there is neither a table nor a trace, or a trace does not fit its texts.
        NumericsError: a weight is not a number between 0 and 1.
    """
    if not facts.table and not facts.traces:
        raise ConfigError("routing facts came without a table and without traces; give one of them, or routing=None")
    text = routers_table(facts) if facts.table else ""
    time = facts.relative_forward_time
    if time is not None and math.isfinite(time):
        text += f"\n<p>A routed forward pass takes {data(time, f'{time:.2f}')} times as long as the base's.</p>"
    if not facts.traces:
        return text
    taken = [TraceFacts.of(one) for one in facts.traces]
    for place, (one, palette) in enumerate(zip(taken, Palette.each(taken), strict=True)):
        heading = f"Who worked on which token: {escape(one.label)}"
        said = f'<p class="lead">{escape(trace_headline([one]))} {escape(trace_size(one))}.</p>'
        inside = f"{said}\n{heat_map(one, palette, f'routing-trace-{place}')}"
        text += f"\n<h3>{heading}</h3>\n{inside}" if place == 0 else "\n" + details(heading, inside)
    return f"{text}\n<script>{trace_script()}</script>"


def routers_table(facts: RoutingFacts) -> str:
    """Bits per byte by router, mean and sets, with differences to the base; the best router of a column is bold."""
    sets = facts.sets
    wide = len(sets) > COLUMN_SETS
    columns = [] if wide else sets
    rows = []
    for router in facts.table:
        cells = [Cell(_value(facts, router, None))] if len(sets) > 1 else []
        cells += [Cell(_value(facts, router, name)) for name in columns]
        rows.append([Cell(escape(router), "text", header=True), *cells])
    heads = ["Router", *(["Mean over<br>sets"] if len(sets) > 1 else []), *(escape(name) for name in columns)]
    text = table(_caption(facts), column_head(heads), rows, kind="routers")
    if wide:
        rows = [
            [Cell(escape(name), "text", header=True), *(Cell(_value(facts, router, name)) for router in facts.table)]
            for name in sets
        ]
        head = column_head(["Set", *(escape(router) for router in facts.table)])
        caption = "Held-out bits per byte by set, as above."
        text += details(f"All {len(sets)} sets", table(caption, head, rows, kind="dense routers"))
    return text


def _caption(facts: RoutingFacts) -> str:
    caption = "Held-out bits per byte by router; lower is better."
    if BASE in facts.table and len(facts.table) > 1:
        caption += " Under each value its difference to the base."
    caption += " The lowest value of a column is bold"
    if _is_bound(facts):
        caption += ", the oracle aside: it picks each set's best expert by the very text it is scored on"
    return caption + "."


def _is_bound(facts: RoutingFacts) -> bool:
    return any(_bound(router) for router in facts.table)


def _bound(router: str) -> bool:
    return router.split(" ", maxsplit=1)[0].lower() == ORACLE


def _score(facts: RoutingFacts, router: str, name: str | None) -> float:
    return facts.mean(router) if name is None else facts.table[router].get(name, math.nan)


def _value(facts: RoutingFacts, router: str, name: str | None) -> str:
    """One cell: value, bold where it is the lowest of the methods, and the difference to the base."""
    value = _score(facts, router, name)
    if not math.isfinite(value):
        return DASH
    methods = [_score(facts, other, name) for other in facts.table if not _bound(other)]
    known = [other for other in methods if math.isfinite(other)]
    text = data(value, f"{value:.3f}")
    if len(known) > 1 and not _bound(router) and value == min(known):
        text = f'<strong class="best">{text}</strong><span class="unseen"> (lowest)</span>'
    base = _score(facts, BASE, name) if BASE in facts.table and router != BASE else math.nan
    if math.isfinite(base):
        text += f'<span class="sub">{data(value - base, difference_text(value - base, math.nan))}</span>'
    return text
