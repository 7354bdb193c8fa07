"""The routing part of a report: routers beside the base on held-out text, and the expert weights of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weftlm.errors import ConfigError
from weftlm.reporting.page import Block, Number, Text
from weftlm.reporting.score_table import Role, ScoreRow, ScoreTable, score_tables
from weftlm.reporting.traces import LabelledTrace, largest_share, trace_block, trace_size


@dataclass(frozen=True)
class RoutingFacts:
    """What a report shows of routing.

    Attributes:
        table: held-out bits per byte by row and set.
        roles: what a row is; one that is not here is a router.
        relative_forward_time: time of a routed forward pass over the base's, where it was measured.
        traces: label, trace and token texts of routed texts; the first is shown open.
        accuracy: share of right answers by row and task, where any was asked.
        chance: accuracy of guessing, by task.
        window: tokens of the windows of the table.
    """

    table: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    roles: Mapping[str, Role] = field(default_factory=dict)
    relative_forward_time: float | None = None
    traces: Sequence[LabelledTrace] = ()
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)
    window: int | None = None


def routing_blocks(facts: RoutingFacts) -> list[Block]:
    """Table, time, traces.

    Raises:
        ConfigError: there is neither a table nor a trace, or a trace does not fit its texts.
        NumericsError: a weight is not a number between 0 and 1.
    """
    if not facts.table and not facts.traces:
        raise ConfigError("routing facts came without a table and without traces; give one of them, or routing=None")
    rows = {
        label: ScoreRow(row, facts.roles.get(label, "router"), facts.accuracy.get(label, {}))
        for label, row in facts.table.items()
    }
    blocks = score_tables(ScoreTable(rows, chance=facts.chance, window=facts.window)) if rows else []
    time = facts.relative_forward_time
    if time is not None and math.isfinite(time):
        blocks.append(Text(("Time of a routed forward pass over the base's: ", Number(time, f"{time:.2f}"), ".")))
    for place, labelled in enumerate(facts.traces):
        label, trace, _ = labelled
        heading, key = f"Expert weights by token: {label}", f"routing-trace-{place}"
        if place == 0:
            blocks += [Text(heading, "h3"), Text(f"{largest_share(label, trace)} · {trace_size(trace)}", "lead")]
        blocks.append(trace_block(labelled, key, fold=heading if place else "", full=False))
    return blocks
