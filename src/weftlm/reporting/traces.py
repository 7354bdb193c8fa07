"""The chart of the expert or gate weight of each token: one component of reports, trace pages and the inspector.

`templates/trace.js` draws it (legend, coloured text, course along the text, usage and entropy by layer) in the colours
and frames of `templates/trace.css`. A page of this package holds the weights as JSON: `trace_block` makes a block of a
`Trace`, which `render_page` writes together with the script. The inspector asks its server for the same packed weights
(`packed(quantise(weights_TE))`), serves trace.js and trace.css beside its own files (`page.page_file`), and imports
`unpack`, `palette`, `coloured`, `weightLegend`, `course`, `usage`, `workers` and `Pane` from the script.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weftlm.errors import ConfigError, NumericsError
from weftlm.reporting.page import Block, Page, Section, Text, TraceBlock, exact, write_page
from weftlm.routing.trace import Trace, layer_of
from weftlm.text import printable

SCALE = 1000
"""Weights are packed as integers of 1 / SCALE."""
ENTRIES = 1_600_000
"""Weights a page holds per trace, about 3 bytes each; beyond, modules are added up to layers."""
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
TYPICAL = 8
"""Characteristic tokens shown per expert."""
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and line feed, lone surrogates, and marks that reorder text."""

LabelledTrace = tuple[str, Trace, Sequence[str]]
"""A name, a trace, and the text of each of its tokens."""


@dataclass(frozen=True)
class TypicalToken:
    """A token text whose weight on an expert exceeds the expert's share.

    Attributes:
        text: the token as text.
        count: occurrences.
        weight: the expert's mean weight there.
    """

    text: str
    count: int
    weight: float


def write_trace_page(traces: Sequence[LabelledTrace], path: str | Path, title: str) -> Path:
    """Write one page about one trace or several.

    Args:
        traces: label, trace, and the text of each token. An expert has the same colour in all traces of its pool.
        path: the file to write; written whole or not at all.
        title: heading of the page.
    Returns:
        `path` as a path.
    Raises:
        ConfigError: no trace is given, one is empty, or its texts are not one per token.
        NumericsError: a weight is not a number between 0 and 1.
        DataError: the page cannot be written.
    """
    return write_page(trace_page(traces, title), path)


def trace_page(traces: Sequence[LabelledTrace], title: str) -> Page:
    """The page of `write_trace_page`."""
    if not traces:
        raise ConfigError("a trace page needs at least one trace; none was given")
    sections = []
    for place, one in enumerate(traces):
        key = f"trace-{place}"
        blocks: list[Block] = [Text(trace_size(one[1]), "lead"), trace_block(one, key)]
        sections.append(Section(f"{key}-section", one[0], one[0], blocks))
    return Page(
        title=title,
        kicker="Routing trace" if len(traces) == 1 else f"{len(traces)} routing traces",
        headline="; ".join(largest_share(label, trace) for label, trace, _ in traces[:4]),
        sections=sections,
    )


def trace_block(labelled: LabelledTrace, key: str, *, fold: str = "", full: bool = True) -> TraceBlock:
    """The chart of one trace as a block of a page.

    Args:
        labelled: a name, a trace, and the text of each token.
        key: id in the page.
        fold: the line that opens it; empty where it is shown.
        full: whether usage by layer and characteristic tokens are shown too.
    Raises:
        ConfigError: there are no tokens, no modules or no experts, or not one text per token.
        NumericsError: a weight is not a number between 0 and 1.
    """
    label, trace, texts = labelled
    texts = [str(text) for text in texts]
    weights_STE = _checked(label, trace, texts)
    token_TE = weights_STE.mean(axis=0, dtype=np.float64)
    share_E, packed_TE = token_TE.mean(axis=0), quantise(token_TE)
    best_T = packed_TE.max(axis=1, keepdims=True)
    leads_TE = (packed_TE == best_T) & (best_T > 0) & ((packed_TE == best_T).sum(axis=1, keepdims=True) == 1)
    experts = [
        (
            trace.experts[e],
            e,
            exact(float(share_E[e]), percent(float(share_E[e]))),
            int(leads_TE[:, e].sum()),
            typical_tokens(texts, token_TE[:, e]),
        )
        for e in np.argsort(-share_E, kind="stable").tolist()
    ]
    text = _UNSHOWABLE.sub("\ufffd", "".join(texts))
    return TraceBlock(key, text, trace_data(trace, texts, weights_STE), experts, fold, full)


def _checked(label: str, trace: Trace, texts: Sequence[str]) -> NDArray[np.float32]:
    """The weights of a trace as an array."""
    shape = (len(trace.sites), len(trace.tokens), len(trace.experts))
    if 0 in shape:
        raise ConfigError(
            f"the trace {label!r} has {shape[0]} modules, {shape[1]} tokens and {shape[2]} experts; a page needs "
            "at least one of each; trace a text of at least one token"
        )
    if len(texts) != len(trace.tokens):
        raise ConfigError(
            f"the trace {label!r} has {len(trace.tokens)} tokens but {len(texts)} token texts came; give one text "
            "per token, for example tokenizer.decode([token])"
        )
    if tuple(trace.weights_STE.shape) != shape:
        raise ConfigError(
            f"the trace {label!r} has weights of shape {tuple(trace.weights_STE.shape)}; its modules, tokens and "
            f"experts make {shape}"
        )
    weights_STE: NDArray[np.float32] = trace.weights_STE.detach().float().cpu().numpy()
    if not (np.isfinite(weights_STE).all() and weights_STE.min() >= 0 and weights_STE.max() <= 1 + 1e-3):
        raise NumericsError(
            f"the trace {label!r} holds weights outside [0, 1]: {weights_STE.min()} to {weights_STE.max()}; "
            "routing weights are shares of one"
        )
    return weights_STE


def trace_data(trace: Trace, texts: Sequence[str], weights_STE: NDArray[np.float32]) -> dict[str, Any]:
    """What trace.js reads: every weight that is not 0, per module (per layer, or the mean alone, if too many).

    Equal rows are held once: a router that decides for the whole sequence costs one row.
    """
    layers = trace.layers()
    labels = layer_labels(list(layers))
    modules = [
        (printable(site.removeprefix(layer_of(site)).removeprefix(".") or site), layer_of(site), quantise(weights_TE))
        for site, weights_TE in zip(trace.sites, weights_STE, strict=True)
    ]
    by_layer = [(labels[layer], layer, quantise(weights_STE[rows].mean(axis=0))) for layer, rows in layers.items()]
    options = {"modules": modules, "layers": by_layer, "none": []}
    kind = next(
        name
        for name, rows in options.items()
        if sum(int(np.count_nonzero(weights_TE)) for _, _, weights_TE in rows) <= ENTRIES
    )
    held: dict[str, int] = {}
    parts = [
        {"name": name, "layer": list(layers).index(layer), "row": held.setdefault(packed(row), len(held))}
        for name, layer, row in options[kind]
    ]  # fmt: skip
    return {
        "experts": [printable(name) for name in trace.experts],
        "tokens": list(texts),
        "layers": [{"name": printable(layer), "label": labels[layer]} for layer in layers],
        "modules": [
            {"name": printable(site), "layer": printable(layer_of(site)), "entropy": entropy,
             "usage": [round(share, 5) for share in usage_E]}
            for site, entropy, usage_E in zip(
                trace.sites, trace.entropy_S.tolist(), trace.usage_SE.tolist(), strict=True
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


def packed(weights_TE: NDArray[np.int64]) -> str:
    """Quantised weights of each token as text: the number of experts with a weight, then expert and weight of each.

    Numbers are written in base 64 with the digits 0-9 A-Z a-z - _: one digit for a count or an expert (two where there
    are more than 63 experts), two for a weight. `1D8C` is one expert, number 13, with 8 * 64 + 12 = 524 / SCALE.
    """
    pairs = [first + second for first in DIGITS for second in DIGITS]
    small: Sequence[str] = DIGITS if weights_TE.shape[1] < 64 else pairs
    tokens_N, experts_N = np.nonzero(weights_TE)
    found = zip(experts_N.tolist(), weights_TE[tokens_N, experts_N].tolist(), strict=True)
    entries = [small[expert] + pairs[weight] for expert, weight in found]
    ends_T = np.cumsum(np.count_nonzero(weights_TE, axis=1)).tolist()
    return "".join(small[end - start] + "".join(entries[start:end]) for start, end in itertools.pairwise([0, *ends_T]))


def typical_tokens(texts: Sequence[str], weight_T: NDArray[np.float64], limit: int = TYPICAL) -> list[TypicalToken]:
    """The token texts with the largest excess of an expert's weight.

        excess(text) = sum over occurrences t of ( w_t - mean of w )

    A text that is frequent and one on which the expert is alone both count; a text with no excess is left out.
    """
    weights: dict[str, list[float]] = {}
    for text, weight in zip(texts, weight_T.tolist(), strict=True):
        weights.setdefault(text, []).append(weight)
    share = float(weight_T.mean())
    excess = {text: math.fsum(held) - len(held) * share for text, held in weights.items()}
    found = sorted((text for text in excess if excess[text] > 1e-6), key=lambda text: -excess[text])[:limit]
    return [TypicalToken(text, len(weights[text]), math.fsum(weights[text]) / len(weights[text])) for text in found]


def percent(share: float) -> str:
    """`41%`, `3.2%`, `<0.1%`: never a positive share as nothing."""
    if share >= 0.0995:
        return f"{share:.0%}"
    return f"{share:.1%}" if share >= 0.0005 or share == 0 else "<0.1%"


def largest_share(label: str, trace: Trace) -> str:
    """`a trace: prose 28% of the weight`."""
    share_E = trace.usage_SE.mean(dim=0)
    if not len(share_E) or not float(share_E.max()) > 0:
        return f"{label}: the base alone"
    return f"{label}: {trace.experts[int(share_E.argmax())]} {percent(float(share_E.max()))} of the weight"


def trace_size(trace: Trace) -> str:
    """`120 tokens · 12 modules in 6 layers · 8 experts`."""
    layers = len(trace.layers())
    inside = f" in {layers} layers" if 1 < layers < len(trace.sites) else ""
    return f"{len(trace.tokens)} tokens · {len(trace.sites)} modules{inside} · {len(trace.experts)} experts"
