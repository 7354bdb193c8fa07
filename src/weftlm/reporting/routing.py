"""The routing part of a report: routers beside the base on held-out text, and the expert weights of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weftlm.reporting.page import Block, Number, Text
from weftlm.reporting.score_table import ScoreTable, score_tables
from weftlm.reporting.traces import LabelledTrace, largest_share, trace_block, trace_size


@dataclass(frozen=True)
class RoutingFacts:
    """What a report shows of routing.

    Attributes:
        table: Held-out bits per byte and accuracies by router.
        relative_forward_time: Time of a routed forward pass over the base's, where it was measured.
        traces: Label, trace and token texts of routed texts; the first is shown open.
    """

    table: ScoreTable
    relative_forward_time: float | None = None
    traces: Sequence[LabelledTrace] = ()


def routing_blocks(facts: RoutingFacts) -> list[Block]:
    """Table, time, traces.

    Raises:
        ConfigError: a trace does not fit its texts.
        NumericsError: a weight is not a number between 0 and 1.
    """
    blocks = score_tables(facts.table)
    time = facts.relative_forward_time
    if time is not None and math.isfinite(time):
        blocks.append(Text(("Time of a routed forward pass over the base's: ", Number(time, f"{time:.2f}"), ".")))
    for place, labelled in enumerate(facts.traces):
        heading = f"Expert weights by token: {labelled[0]}"
        if place == 0:
            blocks += [Text(heading, "h3"), Text(f"{largest_share(labelled)} · {trace_size(labelled)}", "lead")]
        blocks.append(trace_block(labelled, f"routing-trace-{place}", heading if place else ""))
    return blocks
