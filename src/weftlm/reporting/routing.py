"""The routing part of a report: routers beside the base on held-out text, and what one of them did with a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weftlm.errors import ConfigError
from weftlm.reporting.html import data, details, escape
from weftlm.reporting.score_table import ScoreTable, score_table
from weftlm.reporting.trace_parts import heat_map, trace_headline, trace_size, trace_style
from weftlm.reporting.traces import LabelledTrace, Palette, TraceFacts


@dataclass(frozen=True)
class RoutingFacts:
    """What a report shows of routing.

    Attributes:
        table: held-out bits per byte by router and set; `base` and `oracle` are rows like the others.
        relative_forward_time: time of a routed forward pass over the base's, where it was measured.
        traces: label, trace and token texts, of what a router did; the first is shown open.
        accuracy: share of right answers by router and task, where any was asked.
        chance: accuracy of guessing, by task.
        window: tokens of the windows of the table.
    """

    table: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    relative_forward_time: float | None = None
    traces: Sequence[LabelledTrace] = ()
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)
    window: int | None = None


def routing_style(facts: RoutingFacts) -> str:
    """What a page's style sheet needs for the section: nothing where there is no trace."""
    return "\n" + trace_style() if facts.traces else ""


def routing_section(facts: RoutingFacts) -> str:
    """The section's inside: table, time, traces. A page that shows traces needs `routing_style` and `trace_script`.

    Raises:
        ConfigError: there is neither a table nor a trace, or a trace does not fit its texts.
        NumericsError: a weight is not a number between 0 and 1.
    """
    if not facts.table and not facts.traces:
        raise ConfigError("routing facts came without a table and without traces; give one of them, or routing=None")
    shown = ScoreTable(facts.table, accuracy=facts.accuracy, chance=facts.chance, window=facts.window)
    text = score_table(shown) if facts.table else ""
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
    return text
