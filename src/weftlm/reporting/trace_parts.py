"""The parts of a trace's picture as HTML: heat map, course, usage, entropy, typical tokens."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from weftlm.reporting.html import DASH, Cell, column_head, data, details, escape, figure, table
from weftlm.reporting.layout import page_file
from weftlm.reporting.traces import (
    BASE,
    OTHER,
    SCALE,
    TIE,
    Palette,
    TraceFacts,
    colour_rules,
    group_weights,
    leader_class,
    leaders,
    opacity,
    quantise,
    smoothed,
    strip_stride,
    strip_window,
    trace_data,
    typical_tokens,
)
from weftlm.text import shorten

STRIP_HEIGHT = 100
TITLE_EXPERTS = 4
"""Experts a token's plain title names; the script's own tip names all."""
OPEN_LAYERS = 12

_SPACES = re.compile(r"(\r\n|\r|\n|\t| +)")
_REORDERING = re.compile("[\u202a-\u202e\u2066-\u2069]")


def trace_style() -> str:
    """The style sheet of a trace's parts."""
    return page_file("trace.css") + "\n" + colour_rules()


def trace_script() -> str:
    """The program that recolours the tokens, without its tags."""
    return page_file("trace_script.html").removeprefix("<script>").removesuffix("</script>")


def percent(share: float) -> str:
    """`41%`, `3.2%`, `<0.1%`: never a positive share as nothing."""
    if share >= 0.0995:
        return f"{share:.0%}"
    return f"{share:.1%}" if share >= 0.0005 or share == 0 else "<0.1%"


def listed(facts: TraceFacts, weights_E: NDArray[np.float64], limit: int) -> str:
    """The largest weights by name, in percent."""
    order = np.argsort(-weights_E, kind="stable")[:limit]
    return ", ".join(f"{facts.experts[e]} {percent(float(weights_E[e]))}" for e in order.tolist() if weights_E[e] > 0)


# ------------------------------------------------------------------------------------------------------------ heat map


def heat_map(facts: TraceFacts, palette: Palette, key: str) -> str:
    """Legend, course and tokens, coloured by the mean over all modules; with the data that the script reads.

    Args:
        facts: the trace.
        palette: of its pool.
        key: prefix of ids.
    """
    held = trace_data(facts, palette)
    choices = {
        "modules": "the mean over all modules, a layer or one module",
        "layers": "the mean over all modules or a layer; single modules would make the page too large",
        "none": "the mean over all modules alone; more would make the page too large",
    }[str(held["kind"])]
    text = json.dumps(held, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")
    return (
        f'<div class="trace" id="{key}">\n{legend(facts, palette)}\n'
        '<div class="trace-controls" hidden><label>Coloured by <select></select></label>\n'
        '<span class="trace-hint">Point at a token or walk with the arrow keys to see its experts; '
        "press an expert above to see its weight alone.</span></div>\n"
        f"{course(facts, palette)}\n"
        f'<div class="stage"><div class="tokens" role="group" '
        f'aria-label="{len(facts.tokens)} tokens coloured by expert">{tokens_html(facts, palette)}</div>\n'
        f'<div class="tip" id="{key}-tip" role="status" hidden></div></div>\n'
        '<p class="trace-note">Colour: the expert with the largest weight. Strength: that weight; '
        f"{''.join(_strength(weight) for weight in (0.1, 0.25, 0.5, 1.0))}. Shown: {choices}."
        "<noscript> Without JavaScript the page keeps to the mean over all modules.</noscript></p>\n"
        f'<script type="application/json">{text}</script>\n</div>'
    )


def _strength(weight: float) -> str:
    return f'<span class="t x0 key" style="--a:{opacity(weight)}">{weight:g}</span>'


def legend(facts: TraceFacts, palette: Palette) -> str:
    """Every class with its share of all weight, the largest first; ties and the base alone where they occur."""
    shares = {group: float(weights_T.mean()) for group, weights_T in group_weights(facts, palette).items()}
    names = {group: [name for name in members if name in facts.experts] for group, members in palette.groups.items()}
    rows = [
        (group, f"{len(names[group])} others" if len(names[group]) > 1 else names[group][0], share, names[group])
        for group, share in sorted(shares.items(), key=lambda item: (item[0] == OTHER, -item[1]))
    ]
    items = [
        f'<li class="{group}" data-group="{group}" title="{escape(", ".join(members))}"><span class="dot"></span>'
        f'<span class="name">{escape(shorten(name, 32))}</span> '
        f'<span class="share">{data(share, percent(share))}</span></li>'
        for group, name, share, members in rows
    ]
    rest = max(0.0, 1.0 - float(facts.share_E.sum()))
    if -1 in leaders(quantise(facts.token_TE)):
        items.append(f'<li class="{TIE}"><span class="dot"></span><span class="name">several alike</span></li>')
    if rest > 0.0005:
        share = f'<span class="share">{data(rest, percent(rest))}</span>'
        items.append(f'<li class="{BASE}"><span class="dot"></span><span class="name">base alone</span> {share}</li>')
    return f'<ul class="legend" aria-label="Experts and their share of all weight">\n{chr(10).join(items)}\n</ul>'


def tokens_html(facts: TraceFacts, palette: Palette) -> str:
    """Every token as a span; their texts one after the other are the traced text."""
    classes = [palette.classes[name] for name in facts.experts]
    spans = []
    weights_TE = quantise(facts.token_TE)
    lead_T = leaders(weights_TE).tolist()
    for place, (text, row_E) in enumerate(zip(facts.tokens, weights_TE, strict=True)):
        group, weight = leader_class(lead_T[place], classes), int(row_E.max())
        order = np.argsort(-row_E, kind="stable")
        worked = [f"{facts.experts[e]} {row_E[e] / SCALE:.2f}" for e in order[:TITLE_EXPERTS].tolist() if row_E[e]]
        more = int(np.count_nonzero(row_E)) - len(worked)
        told = ", ".join(worked) + (f" and {more} more" if more > 0 else "") if worked else "base alone"
        spans.append(
            f'<span class="t {group}" style="--a:{opacity(weight / SCALE):g}" title="{place}: {escape(told)}">'
            f"{token_html(text)}</span>"
        )
    return "".join(spans)


def token_html(text: str) -> str:
    """A token's text as HTML that keeps it, with pale marks for what has no shape of its own.

    A single space beside letters stays bare: the colour shows whose it is. Marks are drawn by the style sheet and are
    not part of the text. What a page cannot hold (control characters, lone surrogates) or what would reorder the text
    around it becomes U+FFFD; a carriage return is a mark alone.
    """
    if not text:
        return '<i class="w" data-m="∅"></i>'
    pieces = []
    for piece in _SPACES.split(text):
        if piece == "\n":
            pieces.append('<i class="w" data-m="↵"></i>\n')
        elif piece in ("\r", "\r\n"):
            pieces.append('<i class="w" data-m="␍"></i>' + ('<i class="w" data-m="↵"></i>\n' if len(piece) > 1 else ""))
        elif piece == "\t":
            pieces.append('<i class="w over" data-m="→">\t</i>')
        elif piece.startswith(" ") and (len(piece) > 1 or not text.strip()):
            pieces.append(f'<i class="w over" data-m="{"·" * len(piece)}">{piece}</i>')
        else:
            pieces.append(escape(_visible(piece)))
    return "".join(pieces)


def _visible(text: str) -> str:
    return _REORDERING.sub("\ufffd", "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text))


# -------------------------------------------------------------------------------------------------------------- course


def course(facts: TraceFacts, palette: Palette) -> str:
    """Experts' weights along the text, stacked and smoothed: where the domain changes, the colours do."""
    groups = group_weights(facts, palette)
    count, window = len(facts.tokens), strip_window(len(facts.tokens))
    paths = [
        f'<path class="{group}" data-group="{group}" d="{path}"/>'
        for group, path in zip(groups, course_paths(np.stack(list(groups.values()), axis=1), window), strict=True)
    ]
    said = f"Weights of the experts along {count} tokens. Start: {_told(facts, True)}; end: {_told(facts, False)}."
    mean = f", means over {window} tokens" if window > 1 else ""
    return (
        '<div class="course">\n'
        f'<svg viewBox="0 0 {count} {STRIP_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(said)}">'
        f'{"".join(paths)}<line class="here" x1="0" x2="0" y1="0" y2="{STRIP_HEIGHT}" visibility="hidden"/></svg>\n'
        f'<div class="axis"><span>token 0</span><span>shares along the text{mean}</span>'
        f"<span>{count - 1}</span></div>\n</div>"
    )


def _told(facts: TraceFacts, first: bool) -> str:
    """Who works in the first or last third."""
    third = max(1, len(facts.tokens) // 3)
    token_TE = facts.token_TE[:third] if first else facts.token_TE[-third:]
    return listed(facts, token_TE.mean(axis=0), 2) or "base alone"


def course_paths(values_TG: NDArray[np.float64], window: int) -> list[str]:
    """One closed path per column, stacked from below; x is the token, y from STRIP_HEIGHT (nothing) to 0 (all)."""
    count = len(values_TG)
    stride = strip_stride(count)
    tops_TG = np.cumsum(smoothed(values_TG, window), axis=1)
    places = list(range(0, count, stride))
    x = [0.0, *(place + 0.5 for place in places), float(count)]
    rows = [places[0], *places, places[-1]]
    y_PG = STRIP_HEIGHT * (1 - np.clip(np.concatenate([np.zeros((len(x), 1)), tops_TG[rows]], axis=1), 0, 1))
    return [
        "M"
        + "L".join(f"{a:g} {b:.4g}" for a, b in zip(x, y_PG[:, column + 1].tolist(), strict=True))
        + "L"
        + "L".join(f"{a:g} {b:.4g}" for a, b in zip(reversed(x), y_PG[::-1, column].tolist(), strict=True))
        + "Z"
        for column in range(values_TG.shape[1])
    ]


# -------------------------------------------------------------------------------------------------- usage and entropy


def usage_bars(facts: TraceFacts, palette: Palette) -> str:
    """Experts' shares of the weight in each layer, as one stacked bar per layer."""
    rows = []
    usage_SE = facts.usage_SE
    for layer, sites in facts.layers.items():
        usage_E = usage_SE[sites].mean(axis=0)
        top = int(usage_E.argmax())
        most = f"{escape(shorten(facts.experts[top], 24))} {data(float(usage_E[top]), percent(float(usage_E[top])))}"
        rows.append(
            [
                Cell(escape(shorten(facts.layer_names[layer], 30)), "text", header=True),
                Cell(_bar(facts, palette, usage_E), "text"),
                Cell(most if usage_E[top] > 0 else DASH),
            ]
        )
    caption = "Share of each expert in a layer's weight, mean over its modules and all tokens."
    return table(caption, column_head(["Layer", "Usage", "Most used"]), rows, kind="dense bars")


def _bar(facts: TraceFacts, palette: Palette, usage_E: NDArray[np.float64]) -> str:
    groups = {
        group: [e for e, name in enumerate(facts.experts) if palette.classes[name] == group] for group in palette.groups
    }
    pieces = []
    for group, members in groups.items():
        share = float(usage_E[members].sum())
        if share > 0:
            shown_E = np.zeros_like(usage_E)
            shown_E[members] = usage_E[members]
            told = escape(listed(facts, shown_E, len(members)))
            pieces.append(f'<span class="{group}" style="width:{100 * share:.2f}%" title="{told}"></span>')
    said = escape(listed(facts, usage_E, len(usage_E)) or "base alone")
    return f'<span class="bar" role="img" aria-label="{said}">{"".join(pieces)}</span>'


def entropy_chart(facts: TraceFacts) -> str:
    """Entropy of every module's usage as a column, beside its maximum ln E; exact values in a table."""
    if len(facts.experts) < 2:
        return "<p>One expert: there is nothing to choose, and the entropy of its usage is 0.</p>"
    most = facts.max_entropy
    groups = []
    for place, (layer, sites) in enumerate(facts.layers.items()):
        columns = "".join(
            f'<span style="height:{100 * min(1.0, float(facts.entropy_S[row]) / most):.1f}%" '
            f'title="{escape(facts.sites[row])}: {facts.entropy_S[row]:.3f} nats"></span>'
            for row in sites
        )
        name = facts.layer_names[layer].removeprefix("layer ") if len(facts.layers) <= 48 else ""
        name = f"layer {name}" if place == 0 and name.isdigit() and len(facts.layers) <= 16 else name
        groups.append(
            f'<div class="layer" style="flex:{len(sites)}"><div class="columns">{columns}</div>'
            f'<div class="below" title="{escape(layer)}">{escape(shorten(name, 18))}</div></div>'
        )
    low, high = int(facts.entropy_S.argmin()), int(facts.entropy_S.argmax())
    said = (
        f"Entropy of the usage of {len(facts.sites)} modules, from {facts.entropy_S[low]:.3f} nats "
        f"({facts.sites[low]}) to {facts.entropy_S[high]:.3f} ({facts.sites[high]}); largest possible {most:.3f}."
    )
    chart = (
        f'<div class="entropy" role="img" aria-label="{escape(said)}">'
        f'<div class="most">ln {len(facts.experts)} = {most:.2f} nats: all experts alike</div>\n'
        f"{chr(10).join(groups)}</div>"
    )
    numbered = all(name.startswith("layer ") for name in facts.layer_names.values())
    caption = (
        "Entropy of each module's usage over this text, one column per module in the order of execution"
        + (", grouped by layer" if numbered else "")
        + ". Low: the module keeps to few experts. At the top: it uses all alike."
    )
    return figure(chart, escape(caption)) + details("All modules as a table", _entropy_table(facts))


def _entropy_table(facts: TraceFacts) -> str:
    usage_SE = facts.usage_SE
    rows = []
    for row, site in enumerate(facts.sites):
        entropy = float(facts.entropy_S[row])
        told = listed(facts, usage_SE[row], 3)
        rows.append(
            [
                Cell(escape(site), "text", header=True),
                Cell(data(entropy, f"{entropy:.3f}")),
                Cell(data(entropy / facts.max_entropy, f"{entropy / facts.max_entropy:.0%}")),
                Cell(escape(told) if told else DASH),
            ]
        )
    head = column_head(["Module", "Entropy<br>nats", "Of the<br>maximum", "Most used"])
    return table(f"Usage by module; ln {len(facts.experts)} = {facts.max_entropy:.3f} nats.", head, rows, kind="dense")


# -------------------------------------------------------------------------------------------------------------- tokens


def typical_table(facts: TraceFacts, palette: Palette) -> str:
    """Every expert's share, how many tokens it leads, and those it works on more than elsewhere."""
    found = typical_tokens(facts)
    lead_T = leaders(quantise(facts.token_TE))
    share_E = facts.share_E
    rows = []
    for e in np.argsort(-share_E, kind="stable").tolist():
        name = facts.experts[e]
        led = int((lead_T == e).sum())
        chips = " ".join(
            f'<span class="typical" title="{one.count} times, mean weight {one.weight:.3f}">'
            f'<span class="t {palette.classes[name]}" style="--a:{opacity(one.weight):g}">'
            f"{_short_token(one.text)}</span>"
            f'<span class="sub">{one.weight:.2f}{f" ×{one.count}" if one.count > 1 else ""}</span></span>'
            for one in found[name]
        )
        rows.append(
            [
                Cell(
                    f'<span class="swatch {palette.classes[name]}"></span>{escape(shorten(name, 32))}',
                    "text",
                    header=True,
                ),
                Cell(data(float(share_E[e]), percent(float(share_E[e])))),
                Cell(data(float(led), str(led))),
                Cell(chips or DASH, "text"),
            ]
        )
    caption = (
        "Tokens on which an expert's weight most exceeds its share, summed over their occurrences; under each its mean "
        "weight there and how often it occurs."
    )
    head = column_head(["Expert", "Share", "Leads<br>tokens", "Characteristic tokens"])
    return table(caption, head, rows, kind="dense typicals")


def _short_token(text: str) -> str:
    return token_html(text if len(text) <= 24 else text[:23] + "…").replace("\n", "")


def trace_sections(facts: TraceFacts, palette: Palette, key: str) -> str:
    """All parts of one trace, one after the other."""
    return "\n".join(
        [
            heat_map(facts, palette, key),
            "<h3>Usage by layer</h3>",
            _maybe_closed(facts, usage_bars(facts, palette)),
            "<h3>Entropy by module</h3>",
            entropy_chart(facts),
            "<h3>Characteristic tokens</h3>",
            typical_table(facts, palette),
        ]
    )


def _maybe_closed(facts: TraceFacts, inside: str) -> str:
    many = len(facts.layers) > 4 * OPEN_LAYERS
    return details(f"All {len(facts.layers)} layers", inside) if many else inside


def trace_headline(facts: Sequence[TraceFacts]) -> str:
    """Who did most of the work, in one sentence."""
    if len(facts) > 1:
        return " ".join(f"{one.label}: {_work(one)}." for one in facts[:4]) + (" …" if len(facts) > 4 else "")
    return f"{_work(facts[0])}."


def _work(facts: TraceFacts) -> str:
    """`prose did 28% of the work, then python 27% and mathematics 17%`."""
    share_E = facts.share_E
    order = [e for e in np.argsort(-share_E, kind="stable")[:3].tolist() if share_E[e] > 0]
    if not order:
        return "the base worked alone"
    first, *rest = (f"{facts.experts[e]} {percent(float(share_E[e]))}" for e in order)
    name = facts.experts[order[0]]
    text = f"{name} did {first.removeprefix(name + ' ')} of the work"
    return text + (", then " + " and ".join(rest) if rest else "")


def trace_size(facts: TraceFacts) -> str:
    """`120 tokens · 12 modules in 6 layers · 8 experts`."""
    parts = [(len(facts.tokens), "token"), (len(facts.sites), "module"), (len(facts.experts), "expert")]
    told = [f"{count} {name}{'s' if count != 1 else ''}" for count, name in parts]
    told[1] += f" in {len(facts.layers)} layers" if 1 < len(facts.layers) < len(facts.sites) else ""
    return " · ".join(told)
