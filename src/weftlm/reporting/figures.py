"""Charts as SVG text: stacked mixtures, and curves in a grid of frames.

Usable alone: every function takes plain arrays and gives a matplotlib `Figure`, laid out by matplotlib itself; `to_svg`
turns it into text. The same input gives the same bytes. Nothing touches pyplot or its global state.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from itertools import cycle
from typing import Literal

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from weftlm.text import printable, shorten

WIDTH = 10.0
"""Figure width in inches; the page scales it to the text's width."""
POINTS = 240
"""Points of a curve or steps of a stack that are drawn."""
LATE = 0.25
"""Share of the way after which the rest of a steep curve is shown again on a scale of its own."""
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
        label: what it is, also the key of its colour.
        x_N: positions, increasing.
        y_N: values; NaN leaves a gap.
        error_N: half-width of a band around the line.
    """

    label: str
    x_N: NDArray[np.float64]
    y_N: NDArray[np.float64]
    error_N: NDArray[np.float64] | None = None

    @property
    def known(self) -> bool:
        """Whether there is a value to draw."""
        return bool(np.isfinite(self.y_N).any())

    @property
    def last(self) -> float:
        """The last value that is known."""
        return float(self.y_N[np.isfinite(self.y_N)][-1])


@dataclass(frozen=True)
class Panel:
    """One frame of a chart.

    Attributes:
        title: what is drawn, with its unit.
        curves: the lines.
        value_text: format of the last value in the frame's legend.
        from_zero: whether the vertical axis starts at 0.
    """

    title: str
    curves: tuple[Curve, ...]
    value_text: Callable[[float], str] = "{:.3f}".format
    from_zero: bool = False


@dataclass(frozen=True)
class Line:
    """How a run or a domain is drawn, the same in every chart."""

    colour: str
    dash: Dash = "-"
    width: float = 1.6


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

    def means(values_N: NDArray[np.float64]) -> NDArray[np.float64]:
        known_N = np.isfinite(values_N)
        sums = np.add.reduceat(np.where(known_N, values_N, 0.0), edges)
        counts = np.add.reduceat(known_N.astype(np.float64), edges)
        result: NDArray[np.float64] = np.divide(sums, counts, out=np.full(points, np.nan), where=counts > 0)
        return result

    error_N = None if curve.error_N is None else means(curve.error_N)
    return Curve(curve.label, means(curve.x_N), means(curve.y_N), error_N)


# ------------------------------------------------------------------------------------------------------------- charts


def stacked_areas(
    panels: Sequence[Panel], lines: Mapping[str, Line], *, x_label: str = "training tokens", columns: int = 3
) -> Figure:
    """Shares of a whole over time, one frame per run, one legend in the order of the stack.

    A share holds from its point to the next (a mixture is constant between two updates), so areas are steps. Beyond
    `POINTS` updates every k-th is drawn, never a mean, so that a restless mixture still looks restless.
    """
    with _styled():
        rows = -(-len(panels) // min(columns, len(panels)))
        figure, axes = _frames(len(panels), columns, max(2.45 * rows + 0.5, 0.19 * len(lines) + 0.75))
        for panel, axis in zip(panels, axes, strict=True):
            by_name = {curve.label: curve for curve in panel.curves}
            drawn = [by_name[name] for name in lines if name in by_name and len(by_name[name].x_N)]
            axis.set_title(shorten(panel.title, 40))
            axis.set_ylim(0, 1)
            axis.grid(visible=False)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            if not drawn:
                _not_recorded(axis)
                continue
            x_N = drawn[0].x_N
            keep = np.unique(np.append(np.arange(0, len(x_N), -(-len(x_N) // POINTS)), len(x_N) - 1))
            axis.stackplot(
                x_N[keep],
                *(np.nan_to_num(curve.y_N[keep]) for curve in drawn),
                colors=[lines[curve.label].colour for curve in drawn],
                edgecolor="white",
                linewidth=0.35,
                step="post",
            )
            axis.set_xlim(x_N[0], x_N[-1] if x_N[-1] > x_N[0] else x_N[0] + 1)
            _count_axis(axis, x_label)
        handles = [Patch(facecolor=lines[name].colour, label=shorten(name)) for name in reversed(list(lines))]
        figure.legend(handles=handles, loc="outside right upper", handlelength=1.0, handleheight=1.0)
        return figure


def curve_grid(
    panels: Sequence[Panel],
    lines: Mapping[str, Line],
    *,
    x_label: str = "training tokens",
    y_label: str = "",
    columns: int = 2,
    row_height: float = 2.9,
    legend: Sequence[str] | None = None,
    zero: bool = False,
    logarithmic: bool = False,
) -> Figure:
    """Curves in a grid of frames, each with a vertical scale that shows all of its values.

    Args:
        panels: the frames.
        lines: colour and dash by label; a curve without one is drawn in pale grey.
        x_label: of the last row's axes.
        y_label: of the first column's axes.
        columns: frames in a row.
        row_height: inches.
        legend: labels explained above the grid. None: a legend beside each frame with the last values, and a second
            frame for the rest of the way where the first `LATE` of it is what stretches a frame.
        zero: mark the zero line.
        logarithmic: scale of the frames whose values are all positive.
    """
    if legend is None:
        rest = [_later(panel) for panel in panels]
        panels = [*panels, *(one or Panel("", ()) for one in rest)] if any(rest) else panels
    with _styled():
        figure, axes = _frames(len(panels), columns, row_height * -(-len(panels) // min(columns, len(panels))) + 0.3)
        small = columns > 2
        for place, (panel, axis) in enumerate(zip(panels, axes, strict=True)):
            axis.set_title(shorten(panel.title, 22 if small else 60))
            if place % columns == 0:
                axis.set_ylabel(y_label)
            _count_axis(axis, x_label if place + columns >= len(panels) else "")
            known = [thin(curve) for curve in panel.curves if curve.known]
            if not known:
                axis.set_visible(bool(panel.title))
                _not_recorded(axis)
                continue
            if logarithmic and min(np.nanmin(curve.y_N) for curve in known) > 0:
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(MaxNLocator(3))
                axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.yaxis.set_minor_locator(NullLocator())
            for curve in known:
                line = lines.get(curve.label, Line(PALE, width=0.6))
                if curve.error_N is not None:
                    low, high = curve.y_N - curve.error_N, curve.y_N + curve.error_N
                    axis.fill_between(curve.x_N, low, high, color=line.colour, alpha=0.13, linewidth=0)
                axis.plot(
                    curve.x_N,
                    curve.y_N,
                    color=line.colour,
                    linestyle=line.dash,
                    linewidth=line.width,
                    marker="o" if np.isfinite(curve.y_N).sum() == 1 else None,
                    markersize=4,
                    label=f"{shorten(curve.label, 20)}  {panel.value_text(curve.last)}",
                )
            if zero:
                axis.axhline(0.0, color=MUTED, linewidth=0.8)
            if panel.from_zero:
                axis.set_ylim(bottom=0)
                axis.yaxis.set_major_formatter(EngFormatter(sep=""))
            if legend is None:
                axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
        if legend:
            _legend_above(figure, [_handle(lines[label], label) for label in legend])
        return figure


# ---------------------------------------------------------------------------------------------------------------- SVG


def to_svg(figure: Figure) -> str:
    """A complete SVG document; text stays text, no date, the same bytes for the same figure."""
    with _styled():
        stream = io.StringIO()
        FigureCanvasSVG(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    path = re.compile(r'(<path [^<>]*?\bd=")([^"]*)"')
    return path.sub(lambda match: f'{match[1]}{_round_path(match[2])}"', stream.getvalue())


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


def _round_path(path: str) -> str:
    return re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", path).replace("\n", " ").strip()


# -------------------------------------------------------------------------------------------------------------- parts


@contextmanager
def _styled() -> Iterator[None]:
    """The style of all charts while a figure is made or drawn; a name that no font can show is not worth a warning."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _frames(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Equal frames in reading order."""
    columns = min(columns, count)
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(-(-count // columns), columns, squeeze=False).ravel().tolist()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _later(panel: Panel) -> Panel | None:
    """The curves after the first `LATE` share of the way; None where that would show little more."""
    known = [curve for curve in panel.curves if curve.known]
    if panel.from_zero or not known:
        return None
    start = LATE * max(float(curve.x_N[-1]) for curve in known)
    rest = [
        replace(curve, x_N=curve.x_N[after_N], y_N=curve.y_N[after_N],
                error_N=None if curve.error_N is None else curve.error_N[after_N])
        for curve in known
        for after_N in [curve.x_N >= start]
    ]  # fmt: skip
    if min(np.isfinite(curve.y_N).sum() for curve in rest) < 2 or _height(rest) > 0.5 * _height(known):
        return None
    return replace(panel, title=f"{panel.title}, last {1 - LATE:.0%}", curves=tuple(rest))


def _height(drawn: Sequence[Curve]) -> float:
    values_N = np.concatenate([curve.y_N for curve in drawn])
    return float(np.nanmax(values_N) - np.nanmin(values_N))


def _count_axis(axis: Axes, label: str) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel(label)


def _not_recorded(axis: Axes) -> None:
    axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", va="center", color=MUTED)
    axis.set_yticks([])
    axis.grid(visible=False)


def _handle(line: Line, label: str) -> Line2D:
    return Line2D([], [], color=line.colour, linestyle=line.dash, linewidth=1.8, label=shorten(label))


def _legend_above(figure: Figure, handles: Sequence[Line2D]) -> None:
    """One legend above all frames, in fewer columns where names are long."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    columns = max(1, min(6, len(handles), 110 // (longest + 8)))
    figure.legend(handles=list(handles), loc="outside upper left", ncols=columns)
