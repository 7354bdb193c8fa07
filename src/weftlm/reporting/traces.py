"""The expert or gate weights of each token: one chart for reports, trace pages and the inspector; routing in reports.

`templates/trace.js` draws it (legend, coloured text, shares along the text, usage and entropy by layer) in the colours
and frames of `templates/trace.css`. A page of this package holds the weights as JSON: `trace_block` makes a block of a
`Trace`, which `render_page` writes together with the script. The inspector asks its server for the same data
(`trace_data`), serves trace.js and trace.css beside its own files (`page.page_file`), and imports
`unpack`, `palette`, `coloured`, `weightLegend`, `course`, `usage`, `workers` and `Pane` from the script.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weftlm.errors import ConfigError, NumericsError
from weftlm.reporting.page import Block, Page, Section, Text, TraceBlock
from weftlm.reporting.score_table import ScoreTable, score_tables
from weftlm.routing.trace import Trace, layer_of
from weftlm.text import printable

SCALE = 1000
"""Weights are packed as integers of 1 / SCALE."""
ENTRIES = 600_000
"""Weights a page holds per trace, about 8 bytes each; beyond, modules are added up to layers."""
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and line feed, lone surrogates, and marks that reorder text."""

LabelledTrace = tuple[str, Trace, Sequence[str]]
"""A name, a trace, and the text of each of its tokens."""


def trace_page(traces: Sequence[LabelledTrace], title: str) -> Page:
    """A page about one trace or several.

    Args:
        traces: Label, trace, and the text of each token. An expert has the same colour in all traces of its pool.
        title: Heading of the page.
    Raises:
        ConfigError: no trace is given, one is empty, or its texts are not one per token.
        NumericsError: a weight is not a number between 0 and 1.
    """
    if not traces:
        raise ConfigError("a trace page needs at least one trace; none was given")
    sections = [
        Section(f"trace-{place}-section", one[0], [Text(trace_size(one), "lead"), trace_block(one, f"trace-{place}")])
        for place, one in enumerate(traces)
    ]
    kicker = "Routing trace" if len(traces) == 1 else f"{len(traces)} routing traces"
    return Page(title, kicker, "; ".join(map(largest_share, traces[:4])), sections)


def trace_block(labelled: LabelledTrace, key: str, fold: str = "") -> TraceBlock:
    """The chart of one trace as a block of a page.

    Args:
        labelled: A name, a trace, and the text of each token.
        key: Id in the page.
        fold: Line that opens it; empty where it is shown.
    Raises:
        ConfigError: there are no tokens, no modules or no experts, or not one text per token.
        NumericsError: a weight is not a number between 0 and 1.
    """
    label, trace, texts = labelled
    texts = [str(text) for text in texts]
    modules, tokens, experts = (len(one) for one in (trace.modules, trace.tokens, trace.experts))
    if 0 in (modules, tokens, experts) or len(texts) != tokens:
        raise ConfigError(
            f"the trace {label!r} has {modules} modules, {tokens} tokens and {experts} experts, and {len(texts)} token "
            "texts came; a page needs at least one of each, and one text per token"
        )
    weights_STE: NDArray[np.float32] = trace.weights_STE.detach().float().cpu().numpy()
    if not ((weights_STE >= 0) & (weights_STE <= 1 + 1e-3)).all():
        raise NumericsError(
            f"the trace {label!r} holds weights outside [0, 1]: {weights_STE.min()} to {weights_STE.max()}; "
            "routing weights are shares of one"
        )
    return TraceBlock(key, _UNSHOWABLE.sub("\ufffd", "".join(texts)), trace_data(trace, texts, weights_STE), fold)


def trace_data(trace: Trace, texts: Sequence[str], weights_STE: NDArray[np.float32]) -> dict[str, Any]:
    """What trace.js reads: every weight that is not 0, per module (per layer, if these are too many).

    Equal rows are held once: a router that decides for the whole sequence costs one row.
    """
    layers = trace.layers()
    labels = layer_labels(list(layers))
    rows = [
        (
            printable(target.removeprefix(layer_of(target)).removeprefix(".") or target),
            layer_of(target),
            quantise(weights_TE),
        )
        for target, weights_TE in zip(trace.modules, weights_STE, strict=True)
    ]
    kind = "modules"
    if sum(int(np.count_nonzero(weights_TE)) for _, _, weights_TE in rows) > ENTRIES:
        kind = "layers"
        rows = [(labels[layer], layer, quantise(weights_STE[inside].mean(axis=0))) for layer, inside in layers.items()]
    held: dict[tuple[int, ...], int] = {}
    parts = [
        {"name": name, "layer": list(layers).index(layer), "row": held.setdefault(packed(row), len(held))}
        for name, layer, row in rows
    ]
    return {
        "experts": [printable(name) for name in trace.experts],
        "tokens": list(texts),
        "layers": [{"name": printable(layer), "label": labels[layer]} for layer in layers],
        "modules": [
            {"name": printable(target), "layer": printable(layer_of(target)), "entropy": entropy,
             "usage": [round(share, 5) for share in usage_E]}
            for target, entropy, usage_E in zip(
                trace.modules, trace.entropy_S.tolist(), trace.usage_SE.tolist(), strict=True
            )
        ],
        "kind": kind,
        "parts": parts,
        "rows": list(held),
        "mean": packed(quantise(weights_STE.mean(axis=0, dtype=np.float64))),
    }  # fmt: skip


def layer_labels(layers: Sequence[str]) -> dict[str, str]:
    """What layers are called: `layer 3` where all names differ in their last number only, else in full."""
    heads = {layer.rpartition(".")[0] for layer in layers}
    numbered = len(heads) == 1 and all(layer.rpartition(".")[2].isdigit() for layer in layers)
    return {layer: f"layer {layer.rpartition('.')[2]}" if numbered else printable(layer) for layer in layers}


def quantise(weights: NDArray[Any]) -> NDArray[np.int64]:
    """Weights as integers of 1 / SCALE."""
    return np.clip(np.rint(np.asarray(weights, dtype=np.float64) * SCALE), 0, SCALE).astype(np.int64)


def packed(weights_TE: NDArray[np.int64]) -> tuple[int, ...]:
    """Quantised weights of each token in a row: the number of experts with a weight, then expert and weight of each.

    Two tokens, of which the second has no weight on any expert: (2, 0, 750, 13, 250, 0).
    """
    entries: list[int] = []
    for row_E in weights_TE:
        experts = np.flatnonzero(row_E)
        entries += [len(experts), *np.stack([experts, row_E[experts]], axis=1).ravel().tolist()]
    return tuple(entries)


def largest_share(labelled: LabelledTrace) -> str:
    """`a trace: prose 28% of the weight`."""
    label, trace, _ = labelled
    share_E = trace.usage_SE.mean(dim=0)
    if not len(share_E) or not float(share_E.max()) > 0:
        return f"{label}: the base alone"
    return f"{label}: {trace.experts[int(share_E.argmax())]} {float(share_E.max()):.0%} of the weight"


def trace_size(labelled: LabelledTrace) -> str:
    """`120 tokens · 12 modules in 6 layers · 8 experts`."""
    trace = labelled[1]
    layers = len(trace.layers())
    inside = f" in {layers} layers" if 1 < layers < len(trace.modules) else ""
    return f"{len(trace.tokens)} tokens · {len(trace.modules)} modules{inside} · {len(trace.experts)} experts"


@dataclass(frozen=True)
class RoutingFacts:
    """What a report shows of routing.

    Attributes:
        table: Held-out bits per byte and accuracies by router.
        traces: Label, trace and token texts of routed texts; the first is shown open.
    """

    table: ScoreTable
    traces: Sequence[LabelledTrace] = ()


def routing_blocks(facts: RoutingFacts) -> list[Block]:
    """The tables of routers, and the traces."""
    blocks = score_tables(facts.table)
    for place, labelled in enumerate(facts.traces):
        heading = f"Expert weights by token: {labelled[0]}"
        if place == 0:
            blocks += [Text(heading, "h3"), Text(f"{largest_share(labelled)} · {trace_size(labelled)}", "lead")]
        blocks.append(trace_block(labelled, f"routing-trace-{place}", heading if place else ""))
    return blocks
