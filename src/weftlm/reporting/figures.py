"""Charts as SVG text: stacked mixtures, compared curves, small multiples, grouped bars.

Usable alone: every function takes plain arrays and gives a matplotlib `Figure`; `to_svg` turns it into text. The same
input gives the same bytes. Nothing touches pyplot or its global state.
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from weftlm.progress import count_text
from weftlm.reporting.html import escape
from weftlm.text import shorten

WIDTH = 10.0
"""Figure width in inches; the page scales it to the text's width."""

OTHER = "(all others)"

LEGEND_COLUMNS = 6

INK, MUTED, RULE, PALE = "#1f2933", "#5b6673", "#d9dee4", "#c3c9d1"
DOMAIN_COLOURS = (
    "#332288", "#88ccee", "#117733", "#ddcc77", "#cc6677", "#44aa99", "#882255", "#999933", "#aa4499",
)  # fmt: skip
"""Paul Tol's "muted" scheme, told apart under the common kinds of colour blindness."""
RUN_COLOURS = ("#0072b2", "#b84e00", "#007a5a", "#a8467c", "#8a5f00", "#6a4fb3")
"""Okabe and Ito's scheme, its light hues darkened so that text in them can be read on white."""
BASELINE = "#4b5563"
_DARK = {
    INK: "#e4e9ee", MUTED: "#9aa7b4", RULE: "#333d47", PALE: "#55616e", BASELINE: "#a9b4c0", "#ffffff": "#14191e",
    "#0072b2": "#56b4e9", "#b84e00": "#f0924a", "#007a5a": "#2fc79a", "#a8467c": "#de8fbc", "#8a5f00": "#e0b040",
    "#6a4fb3": "#a99bf0", "#332288": "#8a78e0", "#117733": "#3fae66", "#882255": "#d0588f", "#aa4499": "#cc78bd",
}  # fmt: skip
"""What stands for a colour on a dark page; a colour that is not here stays."""
Dash = Literal["-"] | tuple[float, Sequence[float]]
DASHES: tuple[Dash, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.5, 1.4, 1.5)))

_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 6.0,
    "axes.titley": 1.0,  # given, so that matplotlib need not measure every label to find it
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "xtick.major.width": 0.7,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "weftlm",
    "path.simplify": True,
}


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


def three_decimals(value: float) -> str:
    """`1.784`, the default text of a value."""
    return f"{value:.3f}"


@dataclass(frozen=True)
class Panel:
    """One frame of a chart.

    Attributes:
        title: what is drawn, with its unit.
        curves: the lines.
        value_text: how a value is written at the end of a line; None writes none.
        from_zero: whether the vertical axis starts at 0.
    """

    title: str
    curves: tuple[Curve, ...]
    value_text: Callable[[float], str] | None = three_decimals
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
    styles = {}
    for i, label in enumerate(others):
        styles[label] = Line(RUN_COLOURS[i % len(RUN_COLOURS)], DASHES[i // len(RUN_COLOURS) % len(DASHES)], 1.7)
    if baseline in labels:
        styles[str(baseline)] = Line(BASELINE, DASHES[1], 1.5)
    return {label: styles[label] for label in labels}


def domain_lines(domains: Sequence[str]) -> dict[str, Line]:
    """A colour per domain, in order; `other` is pale grey."""
    named = [domain for domain in domains if domain != OTHER]
    styles = {name: Line(colour) for name, colour in zip(named, islice(cycle(DOMAIN_COLOURS), len(named)), strict=True)}
    if OTHER in domains:
        styles[OTHER] = Line(PALE)
    return styles


def paint(colour: str) -> str:
    """A colour of a chart as CSS, in both themes."""
    return f"light-dark({colour}, {_DARK[colour]})" if colour in _DARK else colour


def thin(curve: Curve, points: int) -> Curve:
    """At most `points` points: means of equal runs of neighbours, so that noise shrinks and no peak is invented."""
    count = len(curve.x_N)
    if count <= points:
        return curve
    edges = np.linspace(0, count, points + 1).round().astype(int)
    means = [_bin_means(values_N, edges) for values_N in (curve.x_N, curve.y_N)]
    error_N = None if curve.error_N is None else _bin_means(curve.error_N, edges)
    return Curve(curve.label, means[0], means[1], error_N)


def _bin_means(values_N: NDArray[np.float64], edges: NDArray[np.int64]) -> NDArray[np.float64]:
    known_N = np.isfinite(values_N)
    sums = np.add.reduceat(np.where(known_N, values_N, 0.0), edges[:-1])
    counts = np.add.reduceat(known_N.astype(np.float64), edges[:-1])
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return means


# ------------------------------------------------------------------------------------------------------------- charts


def stacked_areas(
    panels: Sequence[Panel],
    lines: Mapping[str, Line],
    *,
    x_label: str = "training tokens",
    columns: int = 3,
    points: int = 240,
) -> Figure:
    """Shares of a whole over time, one frame per run, one legend in the order of the stack.

    A share holds from its point to the next (a mixture is constant between two updates), so areas are steps. Beyond
    `points` updates every k-th is drawn, never a mean, so that a restless mixture still looks restless.
    """
    with _styled():
        columns = min(columns, len(panels))
        rows = -(-len(panels) // columns)
        names = list(lines)
        legend = 0.35 + _text_width([shorten(name) for name in names], 8.0) + 0.1
        height = max(2.45 * rows + 0.5, 0.185 * len(names) + 0.75)
        figure = Figure(figsize=(WIDTH, height))
        axes = _grid(figure, rows, columns, left=0.42, right=legend, top=0.32, bottom=0.5, gap=(0.3, 0.62))
        for index, (panel, axis) in enumerate(zip(panels, axes, strict=False)):
            by_name = {curve.label: curve for curve in panel.curves}
            drawn = [by_name[name] for name in names if name in by_name and len(by_name[name].x_N)]
            axis.set_title(shorten(panel.title, 40))
            axis.set_ylim(0, 1)
            axis.grid(visible=False)
            axis.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            if index % columns:
                axis.tick_params(labelleft=False)
            if drawn:
                x_N = drawn[0].x_N
                keep = np.unique(np.append(np.arange(0, len(x_N), -(-len(x_N) // points)), len(x_N) - 1))
                axis.stackplot(
                    x_N[keep],
                    *(np.nan_to_num(curve.y_N[keep]) for curve in drawn),
                    colors=[lines[curve.label].colour for curve in drawn],
                    edgecolor="white",
                    linewidth=0.35,
                    step="post",
                )
                axis.set_xlim(x_N[0], x_N[-1] if x_N[-1] > x_N[0] else x_N[0] + 1)
            else:
                _say_nothing(axis)
            _token_axis(axis, x_label if index + columns >= len(panels) else None)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        handles = [Patch(facecolor=lines[name].colour, label=shorten(name)) for name in reversed(names)]
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(1 - (legend - 0.12) / WIDTH, 1 - 0.3 / height),
            borderaxespad=0.0,
            borderpad=0.0,
            handlelength=1.0,
            handleheight=1.0,
            labelspacing=0.42,
        )
        return figure


def compared_curves(
    panels: Sequence[Panel],
    lines: Mapping[str, Line],
    *,
    x_label: str = "training tokens",
    late: float = 0.25,
    height: float = 3.0,
    points: int = 300,
) -> Figure:
    """Curves of several runs in one frame per quantity, each named and valued at its right end.

    Every frame shows all of its values. Where the first `late` share of the way is what stretches a frame, a second row
    shows the rest by itself, on a scale of its own.

    Args:
        late: share of the way after which the second row begins; 0 for no second row.
    """
    rows_of_panels = [list(panels), [part for panel in panels if (part := _later(panel, late)) is not None]]
    with _styled():
        columns, rows = len(panels), 2 if rows_of_panels[1] else 1
        figure = Figure(figsize=(WIDTH, height * rows))
        ends = [_end_text(curve, panel.value_text) for panel in panels for curve in panel.curves if _known(curve)]
        room = 0.22 + _text_width(ends, 8.0)
        axes = _grid(figure, rows, columns, left=0.45, right=room, top=0.32, bottom=0.5, gap=(room + 0.5, 0.75))
        for axis in axes:
            axis.set_visible(False)
        placed = [(panel, axes[row * columns + place]) for row in range(rows)
                  for place, panel in enumerate(rows_of_panels[row])]  # fmt: skip
        for panel, axis in placed:
            axis.set_visible(True)
            axis.set_title(shorten(panel.title, 60))
            curves = [thin(curve, points) for curve in panel.curves if _known(curve)]
            _token_axis(axis, x_label)
            if not curves:
                _say_nothing(axis)
                continue
            for curve in curves:
                line = lines[curve.label]
                if curve.error_N is not None:
                    low, high = curve.y_N - curve.error_N, curve.y_N + curve.error_N
                    axis.fill_between(curve.x_N, low, high, color=line.colour, alpha=0.13, linewidth=0)
                lone = np.isfinite(curve.y_N).sum() == 1
                axis.plot(
                    curve.x_N,
                    curve.y_N,
                    color=line.colour,
                    linestyle=line.dash,
                    linewidth=line.width,
                    marker="o" if lone else None,
                    markersize=4,
                )
            _frame(axis, curves)
            if panel.from_zero:
                axis.set_ylim(bottom=0)
                axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick_count(value)))
            _label_ends(axis, panel, lines, (height - 0.82) * 72)
        return figure


def _later(panel: Panel, late: float) -> Panel | None:
    """The curves after the first `late` share of the way; None where that would show little more."""
    curves = [curve for curve in panel.curves if _known(curve)]
    if not late or panel.from_zero or not curves:
        return None
    start = late * max(float(curve.x_N[-1]) for curve in curves)
    cut = []
    for curve in curves:
        after_N = curve.x_N >= start
        error_N = None if curve.error_N is None else curve.error_N[after_N]
        cut.append(Curve(curve.label, curve.x_N[after_N], curve.y_N[after_N], error_N))
    whole, part = _range(curves), _range([curve for curve in cut if _known(curve)])
    if part is None or whole is None or min(np.isfinite(curve.y_N).sum() for curve in cut) < 2:
        return None
    if part[1] - part[0] > 0.5 * (whole[1] - whole[0]):
        return None
    return replace(panel, title=f"{panel.title}, last {1 - late:.0%}", curves=tuple(cut))


def small_multiples(
    panels: Sequence[Panel],
    lines: Mapping[str, Line],
    *,
    y_label: str,
    x_label: str = "training tokens",
    columns: int = 5,
    legend: Sequence[str] = (),
    points: int = 120,
    zero: bool = False,
    logarithmic: bool = False,
    row_height: float = 1.5,
) -> Figure:
    """A grid of small frames with their own vertical scales, one legend above.

    Args:
        legend: the labels to explain above the grid; none when empty.
        zero: mark the zero line.
        logarithmic: scale of the frames whose values are all positive.
    """
    with _styled():
        columns = min(columns, len(panels))
        rows = -(-len(panels) // columns)
        top = 0.3 + (0.14 + 0.17 * -(-len(legend) // _legend_columns(legend)) if legend else 0.0)
        height = top + row_height * rows + 0.42
        figure = Figure(figsize=(WIDTH, height))
        wide = columns <= 2
        axes = _grid(figure, rows, columns, left=0.58, right=0.1, top=top, bottom=0.5, gap=(0.5, 0.42))
        last_x = max(
            (float(curve.x_N[-1]) for panel in panels for curve in panel.curves if len(curve.x_N)), default=1.0
        )
        for index, (panel, axis) in enumerate(zip(panels, axes, strict=False)):
            axis.set_title(shorten(panel.title, 40 if wide else 22), fontsize=9.0 if wide else 8.0)
            curves = [thin(curve, points) for curve in panel.curves if _known(curve)]
            for curve in curves:
                line = lines.get(curve.label, Line(PALE, "-", 0.6))
                lone = np.isfinite(curve.y_N).sum() == 1
                axis.plot(
                    curve.x_N,
                    curve.y_N,
                    color=line.colour,
                    linestyle=line.dash,
                    linewidth=line.width * (1.0 if wide else 0.8),
                    marker="o" if lone else None,
                    markersize=3,
                    zorder=2 if curve.label in lines else 1.5,
                )
            if zero:
                axis.axhline(0.0, color=MUTED, linewidth=0.8, zorder=1.8)
            _token_axis(axis, x_label if index % columns == 0 and index + columns >= len(panels) else None)
            if curves:
                _frame(axis, curves, logarithmic=logarithmic)
            else:
                _say_nothing(axis)
            axis.set_xlim(0, last_x if last_x > 0 else 1)
            axis.yaxis.set_major_locator(MaxNLocator(4 if wide else 3))
            if axis.get_yscale() == "log":
                axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.yaxis.set_minor_locator(NullLocator())
            if index + columns < len(panels):
                axis.tick_params(labelbottom=False)
            else:
                axis.xaxis.set_major_locator(MaxNLocator(5 if wide else 3))
            if index % columns == 0:
                axis.set_ylabel(y_label)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        if legend:
            _legend_above(figure, legend, lines, height)
        return figure


def grouped_bars(
    names: Sequence[str],
    values: Mapping[str, Sequence[float]],
    lines: Mapping[str, Line],
    *,
    x_label: str,
    mark: float | None = None,
    mark_label: str = "",
) -> Figure:
    """Horizontal bars: one group per name, one bar per run, the longest valued at its end.

    Args:
        names: the groups, from top to bottom.
        values: by run, one per name; NaN draws nothing.
        mark: a value to rule a line at.
    """
    with _styled():
        runs = list(values)
        bar = min(0.115, 0.5 / max(1, len(runs)))
        group = bar * len(runs) + 0.11
        top, bottom = 0.25 + 0.17 * -(-len(runs) // _legend_columns(runs)), 0.5
        height = top + group * len(names) + bottom
        figure = Figure(figsize=(WIDTH, height))
        left = min(3.2, 0.2 + _text_width([shorten(name) for name in names], 8.0))
        axis = _grid(figure, 1, 1, left=left, right=0.55, top=top, bottom=bottom, gap=(0, 0))[0]
        largest = max((value for row in values.values() for value in row if math.isfinite(value)), default=0.0)
        for position, run in enumerate(runs):
            y_N = np.arange(len(names)) * group + 0.055 + bar * (position + 0.5)
            widths = np.nan_to_num(np.asarray(values[run], dtype=np.float64), posinf=0.0, neginf=0.0)
            axis.barh(y_N, widths, height=bar * 0.86, color=lines[run].colour, linewidth=0)
            for y, value in zip(y_N, values[run], strict=True):
                if math.isfinite(value):
                    axis.annotate(
                        _figures(value),
                        (value, y),
                        xytext=(3, -0.4),
                        textcoords="offset points",
                        va="center",
                        fontsize=6.3 if bar > 0.1 else 5.6,
                        color=MUTED,
                    )
        axis.set_ylim(len(names) * group, 0)
        axis.set_xlim(0, max(largest, mark or 0.0, 1e-9) * 1.02)
        axis.yaxis.set_major_locator(FixedLocator([(i + 0.5) * group for i in range(len(names))]))
        axis.set_yticklabels([shorten(name) for name in names], fontsize=8.0, color=INK)
        axis.spines["left"].set_visible(False)
        axis.grid(visible=False)
        axis.xaxis.grid(visible=True)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel(x_label)
        if mark is not None:
            axis.axvline(mark, color=PALE, linewidth=1.2, zorder=0.6)
            axis.annotate(
                mark_label,
                (mark, 0),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=6.8,
                color=MUTED,
                annotation_clip=False,
            )
        _legend_above(figure, runs, lines, height, bars=True)
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


def inline_svg(svg: str, key: str, description: str) -> str:
    """An SVG document as an element for an HTML page.

    The XML prologue and namespaces go (HTML needs none), ids get the prefix `key` so that several figures can stand on
    one page, the size gives way to the page's, colours follow the page's theme, and `description` is what a screen
    reader says. Tags alone are rewritten: text between them is data.
    """
    body = svg[svg.index("<svg") :].strip()
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)

    def tag(match: re.Match[str]) -> str:
        inside = match[0].replace("xlink:href=", "href=")
        inside = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{key}-", inside)
        return re.sub(r"#[0-9a-f]{6}\b", lambda colour: paint(colour[0]), inside)

    body = re.sub(r"<[^<>]*>", tag, body)
    viewbox = re.search(r'viewBox="([^"]*)"', body)
    assert viewbox is not None, "matplotlib wrote an SVG without a viewBox"
    end = body.index(">")
    return f'<svg viewBox="{viewbox[1]}" role="img" aria-label="{escape(description)}"' + body[end:]


def _round_path(path: str) -> str:
    return re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", path).replace("\n", " ").strip()


# -------------------------------------------------------------------------------------------------------------- parts


@contextmanager
def _styled() -> Iterator[None]:
    """The house style, for as long as a figure is made or drawn; a name no font can show is not worth a warning."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _grid(
    figure: Figure,
    rows: int,
    columns: int,
    *,
    left: float,
    right: float,
    top: float,
    bottom: float,
    gap: tuple[float, float],
) -> list[Axes]:
    """Equal frames in reading order; margins and gaps (across, down) in inches."""
    total_width, total_height = figure.get_size_inches()
    width = (total_width - left - right - gap[0] * (columns - 1)) / columns
    height = (total_height - top - bottom - gap[1] * (rows - 1)) / rows
    return [
        figure.add_axes(
            (
                (left + column * (width + gap[0])) / total_width,
                (bottom + (rows - 1 - row) * (height + gap[1])) / total_height,
                width / total_width,
                height / total_height,
            )
        )
        for row in range(rows)
        for column in range(columns)
    ]


def _text_width(texts: Sequence[str], size: float) -> float:
    """Inches the longest text takes, a little generously: a page may show it in another font."""
    return max((sum(map(_ems, text)) for text in texts), default=0.0) * size / 72


def _ems(character: str) -> float:
    wide = character in "mMwW@%" or unicodedata.east_asian_width(character) in "WF"
    return 1.0 if wide else 0.64


def _known(curve: Curve) -> bool:
    return bool(np.isfinite(curve.y_N).any())


def _figures(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def _token_axis(axis: Axes, label: str | None) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick_count(value)))
    if label is not None:
        axis.set_xlabel(label)


def _tick_count(value: float) -> str:
    text = count_text(value)
    number, suffix = (text[:-1], text[-1]) if text[-1:] in ("k", "M", "G") else (text, "")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + suffix


def _say_nothing(axis: Axes) -> None:
    axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", va="center", color=MUTED)
    axis.set_yticks([])
    axis.grid(visible=False)


def _frame(axis: Axes, curves: Sequence[Curve], *, logarithmic: bool = False) -> None:
    """Limits that hold every value and every band."""
    found = _range(curves)
    if found is None:
        return
    low, high = found
    if logarithmic and low > 0:
        axis.set_yscale("log")
        margin = max((high / low) ** 0.06, 1.01)
        axis.set_ylim(low / margin, high * margin)
    else:
        margin = 0.06 * (high - low) or max(abs(high) * 0.05, 1e-9)
        axis.set_ylim(low - margin, high + margin)
    first = min(float(curve.x_N[0]) for curve in curves)
    last = max(float(curve.x_N[-1]) for curve in curves)
    left = first if first > 0.1 * last else min(0.0, first)
    axis.set_xlim(left, last if last > left else left + 1)


def _range(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """The least and the largest value, bands included; None where there is none."""
    ends = []
    for curve in curves:
        half_N = 0.0 if curve.error_N is None else np.nan_to_num(curve.error_N)
        ends += [curve.y_N - half_N, curve.y_N + half_N]
    known = [end_N[np.isfinite(end_N)] for end_N in ends]
    values = np.concatenate(known) if known else np.empty(0)
    return (float(values.min()), float(values.max())) if len(values) else None


def _end_text(curve: Curve, value_text: Callable[[float], str] | None) -> str:
    name = shorten(curve.label, 20)
    last = float(curve.y_N[np.isfinite(curve.y_N)][-1])
    return name if value_text is None else f"{name}  {value_text(last)}"


def _label_ends(axis: Axes, panel: Panel, lines: Mapping[str, Line], height_points: float) -> None:
    """Name each curve beside its last value, moved apart where names would overlap."""
    known = [curve for curve in panel.curves if _known(curve)]
    low, high = axis.get_ylim()
    ends = np.array([curve.y_N[np.isfinite(curve.y_N)][-1] for curve in known])
    heights = np.clip((ends - low) / (high - low), 0.0, 1.0)
    for curve, height, wanted in zip(known, spread(heights, 10.5 / height_points), heights, strict=True):
        colour = lines[curve.label].colour
        axis.annotate(
            _end_text(curve, panel.value_text),
            (1.0, wanted),
            xytext=(1.0 + 0.13 / (axis.get_position().width * WIDTH), height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8.0,
            color=colour,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def spread(positions: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """Move positions in [0, 1] apart to at least `gap` (less, where they would not fit), keeping their order.

    The least-squares solution by pooling: neighbours that would collide form a block about their common mean.
    """
    if len(positions) == 0:
        return positions
    gap = min(gap, 1.0 / max(1, len(positions) - 1))
    order = np.argsort(positions, kind="stable")
    blocks: list[tuple[float, int]] = []  # (mean of position - rank * gap, members)
    for rank, value in enumerate(positions[order]):
        mean, members = float(value) - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, members = (mean * members + before * count) / (members + count), members + count
        blocks.append((mean, members))
    base = np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])
    highest = 1.0 - (len(positions) - 1) * gap
    result = np.empty(len(positions))
    result[order] = np.clip(base, 0.0, max(highest, 0.0)) + np.arange(len(positions)) * gap
    return result


def _legend_columns(labels: Sequence[str]) -> int:
    """Columns of a legend: fewer where long names would leave the figure."""
    width = _text_width([shorten(label) for label in labels], 8.0) + 0.4
    return max(1, min(len(labels), LEGEND_COLUMNS, int(WIDTH / width)))


def _legend_above(
    figure: Figure, labels: Sequence[str], lines: Mapping[str, Line], height: float, *, bars: bool = False
) -> None:
    handles = [
        Patch(facecolor=lines[label].colour, label=shorten(label))
        if bars
        else Line2D([], [], color=lines[label].colour, linestyle=lines[label].dash, linewidth=1.8, label=shorten(label))
        for label in labels
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.02 / height),
        ncols=_legend_columns(labels),
        borderaxespad=0.0,
        borderpad=0.1,
        handlelength=1.0 if bars else 2.0,
        handleheight=0.9,
        columnspacing=1.6,
    )
