"""Charts as SVG text: lines or stacked shares in a grid of frames, laid out by matplotlib itself.

`draw` takes plain arrays and gives a matplotlib `Figure`; `to_svg` turns it into text. The same input gives the same
bytes. Nothing touches pyplot or its global state.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import cycle
from typing import Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from weftlm.text import printable, shorten

WIDTH = 10.0
"""Figure width in inches; the page scales it to the text's width."""
POINTS = 240
"""Points of a curve or steps of a stack that are drawn."""
LATE = 0.25
"""Share of the way after which the values decide a zoomed frame's vertical scale."""
NAMED = 9
"""Domains with a colour of their own; the rest of a larger set is shown together."""
OTHER = "(all others)"

INK, MUTED, RULE, PALE = "#1f2933", "#5b6673", "#d9dee4", "#c3c9d1"
DOMAIN_COLOURS = (
    "#332288", "#88ccee", "#117733", "#ddcc77", "#cc6677", "#44aa99", "#882255", "#999933", "#aa4499",
)  # fmt: skip
"""Paul Tol's "muted" scheme, told apart under the common kinds of colour blindness."""
RUN_COLOURS = ("#0072b2", "#b84e00", "#007a5a", "#a8467c", "#8a5f00", "#6a4fb3")
"""Okabe and Ito's scheme, its light hues darkened so that they can be seen on white."""
BASELINE = "#4b5563"
_DARK = {
    INK: "#e4e9ee", MUTED: "#9aa7b4", RULE: "#333d47", PALE: "#55616e", BASELINE: "#a9b4c0", "#ffffff": "#14191e",
    "#0072b2": "#56b4e9", "#b84e00": "#f0924a", "#007a5a": "#2fc79a", "#a8467c": "#de8fbc", "#8a5f00": "#e0b040",
    "#6a4fb3": "#a99bf0", "#332288": "#8a78e0", "#117733": "#3fae66", "#882255": "#d0588f", "#aa4499": "#cc78bd",
}  # fmt: skip
"""The colour of a dark page in place of a light page's; one that is not here is the same on both."""
Dash = Literal["-", "--", ":", "-."]
DASHES: tuple[Dash, ...] = ("-", "--", ":", "-.")

_STYLE = mpl.rc_params_from_file(
    str(resources.files("weftlm.reporting") / "templates/figures.mplstyle"), use_default_template=False
)


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        label: Name, also the key of its colour.
        x_N: Positions, increasing.
        y_N: Values; NaN leaves a gap.
    """

    label: str
    x_N: NDArray[np.float64]
    y_N: NDArray[np.float64]

    @property
    def known(self) -> bool:
        """Whether there is a value to draw."""
        return bool(np.isfinite(self.y_N).any())


@dataclass(frozen=True)
class Panel:
    """One frame of a chart: what is drawn, with its unit, and the curves."""

    title: str
    curves: tuple[Curve, ...]


class Line(NamedTuple):
    """How a run or a domain is drawn, the same in every chart."""

    colour: str
    dash: Dash = "-"


def run_lines(labels: Sequence[str], baseline: str | None = None) -> dict[str, Line]:
    """A colour and a dash per run; the baseline is dark grey. Beyond the palette the dashes tell runs apart."""
    others = [label for label in labels if label != baseline]
    styles = [Line(colour, dash) for dash in DASHES for colour in RUN_COLOURS]
    lines = dict(zip(others, cycle(styles), strict=False))
    return {label: lines.get(label, Line(BASELINE, DASHES[1])) for label in labels}


def domain_lines(domains: Sequence[str]) -> dict[str, Line]:
    """A colour per domain, in order; `OTHER` is pale grey."""
    colours = cycle(DOMAIN_COLOURS)
    return {domain: Line(PALE if domain == OTHER else next(colours)) for domain in domains}


def paint(colour: str) -> str:
    """A colour of a chart as CSS, in both themes."""
    return f"light-dark({colour}, {_DARK[colour]})" if colour in _DARK else colour


def thin(curve: Curve, points: int = POINTS) -> Curve:
    """At most `points` points: means of equal runs of neighbours, so that noise shrinks and no peak is invented."""
    count = len(curve.x_N)
    if count <= points:
        return curve
    edges = np.linspace(0, count, points + 1).round().astype(int)[:-1]
    known_N = np.isfinite(curve.y_N)
    counts = np.add.reduceat(known_N.astype(np.float64), edges)
    sums = np.add.reduceat(np.where(known_N, curve.y_N, 0.0), edges)
    means = np.divide(sums, counts, out=np.full(points, np.nan), where=counts > 0)
    return Curve(curve.label, curve.x_N[edges], means)


def shares(weights_N: Mapping[str, NDArray[np.float64]], x_N: NDArray[np.float64], named: Sequence[str]) -> list[Curve]:
    """A mixture over time: a curve per named domain, and the sum of the others as `OTHER`."""
    found = [Curve(name, x_N, np.nan_to_num(weights_N[name])) for name in named if name in weights_N]
    rest = [np.nan_to_num(values_N) for name, values_N in weights_N.items() if name not in named]
    return [*found, Curve(OTHER, x_N, np.sum(rest, axis=0))] if rest else found


def draw(
    panels: Sequence[Panel],
    lines: Mapping[str, Line],
    *,
    x_label: str = "training tokens",
    columns: int = 2,
    stacked: bool = False,
    zoomed: bool = False,
    zero: bool = False,
) -> Figure:
    """Curves in a grid of frames under one legend, each frame with a vertical scale of its own.

    Args:
        panels: Frames in reading order.
        lines: Colour and dash by label; a curve without one is drawn in pale grey. The legend explains two or more.
        x_label: Label of the last row's axes.
        columns: Frames in a row.
        stacked: Whether curves are shares of a whole, each from its point to the next (a mixture is constant between
            two updates): areas in steps. Of more than `POINTS` updates every k-th is drawn, never a mean, so that a
            restless mixture still looks restless.
        zoomed: Whether the values after the first `LATE` of the way decide the vertical scale.
        zero: Whether the zero line is marked.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with _styled():
        figure = Figure(figsize=(WIDTH, 2.8 * rows + 0.5))
        axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for place, panel in enumerate(panels):
            axis, known = axes[place], [curve for curve in panel.curves if curve.known]
            axis.set_title(shorten(panel.title, 30 if columns > 2 else 60))
            axis.set_xlabel(x_label if place + columns >= len(panels) else "")
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            if not known:
                axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", va="center", color=MUTED)
                axis.set_yticks([])
            elif stacked:
                _stack(axis, known, lines)
            else:
                _curves(axis, [thin(curve) for curve in known], lines)
                if zoomed:
                    _zoom(axis, known)
                if zero:
                    axis.axhline(0.0, color=MUTED, linewidth=0.8)
        drawn = {curve.label for panel in panels for curve in panel.curves}
        _legend(figure, {label: line for label, line in lines.items() if label in drawn}, 5 if stacked else 1.8)
        return figure


def _stack(axis: Axes, known: Sequence[Curve], lines: Mapping[str, Line]) -> None:
    x_N = known[0].x_N
    keep = np.unique(np.append(np.arange(0, len(x_N), -(-len(x_N) // POINTS)), len(x_N) - 1))
    axis.stackplot(
        x_N[keep],
        *(np.nan_to_num(curve.y_N[keep]) for curve in known),
        colors=[lines[curve.label].colour for curve in known],
        edgecolor="white",
        linewidth=0.35,
        step="post",
    )
    axis.set_xlim(x_N[0], x_N[-1] if x_N[-1] > x_N[0] else x_N[0] + 1)
    axis.set_ylim(0, 1)
    axis.grid(visible=False)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def _curves(axis: Axes, known: Sequence[Curve], lines: Mapping[str, Line]) -> None:
    for curve in known:
        colour, dash = lines.get(curve.label, Line(PALE))
        marker = "o" if np.isfinite(curve.y_N).sum() == 1 else None
        axis.plot(curve.x_N, curve.y_N, color=colour, linestyle=dash, marker=marker, markersize=4)


def _zoom(axis: Axes, known: Sequence[Curve]) -> None:
    late_N = np.concatenate([curve.y_N[curve.x_N >= LATE * curve.x_N[-1]] for curve in known])
    late_N = late_N[np.isfinite(late_N)]
    if len(late_N) > 1 and np.ptp(late_N) > 0:
        margin = 0.1 * np.ptp(late_N)
        axis.set_ylim(late_N.min() - margin, late_N.max() + margin)


def _legend(figure: Figure, lines: Mapping[str, Line], width: float) -> None:
    """One legend above all frames, in fewer columns where names are long; none for a single name."""
    if len(lines) < 2:
        return
    handles = [
        Line2D([], [], color=colour, linestyle=dash, linewidth=width, label=shorten(label))
        for label, (colour, dash) in lines.items()
    ]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(6, len(handles), 110 // (longest + 8)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


@contextmanager
def _styled() -> Iterator[None]:
    """The style of all charts while a figure is made or drawn; a name that no font can show is not worth a warning."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def to_svg(figure: Figure) -> str:
    """A complete SVG document; text stays text, no date, the same bytes for the same figure."""
    with _styled():
        stream = io.StringIO()
        FigureCanvasSVG(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    path = re.compile(r'(<path [^<>]*?\bd=")([^"]*)"')
    return path.sub(lambda match: f'{match[1]}{_round_path(match[2])}"', stream.getvalue())


def _round_path(path: str) -> str:
    return re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", path).replace("\n", " ").strip()


def inline_svg(svg: str, key: str, description: str) -> Markup:
    """An SVG document as an element for an HTML page.

    The XML prologue and namespaces go (HTML needs none), ids get the prefix `key` so that a page can hold several
    figures, the size gives way to the page's, colours follow the page's theme, and `description` is read aloud. Tags
    alone are rewritten: text between them is data.
    """
    body = svg[svg.index("<svg") :].strip()
    body = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", body, flags=re.DOTALL)

    def tag(match: re.Match[str]) -> str:
        inside = match[0].replace("xlink:href=", "href=")
        inside = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{key}-", inside)
        return re.sub(r"#[0-9a-f]{6}\b", lambda colour: paint(colour[0]), inside)

    body = re.sub(r"<[^<>]*>", tag, body)
    viewbox = re.search(r'viewBox="([^"]*)"', body)
    assert viewbox is not None, "matplotlib wrote an SVG without a viewBox"
    label = escape(printable(description))
    return Markup(f'<svg viewBox="{viewbox[1]}" role="img" aria-label="{label}"' + body[body.index(">") :])
