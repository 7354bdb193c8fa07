"""Charts: the same bytes for the same numbers, nothing foreign, frames that show what was recorded."""

import re
import xml.etree.ElementTree as ET
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from weftlm.reporting.figures import (
    OTHER,
    Curve,
    Panel,
    domain_lines,
    draw,
    inline_svg,
    run_lines,
    shares,
    thin,
    to_svg,
)

X = np.linspace(0, 1e6, 50)
SVG = "{http://www.w3.org/2000/svg}"


def chart(kind: str) -> Any:
    runs, domains = ["uniform", "織物 \U0001f9f5"], ["a", "$b_1$", OTHER]
    if kind == "stacked":
        weights = tuple(Curve(name, X, np.full(50, 1 / 3)) for name in domains)
        return draw([Panel(run, weights) for run in runs], domain_lines(domains), columns=3, stacked=True)
    curves = tuple(Curve(run, X, 1 + np.exp(-X / 2e5)) for run in runs)
    options: dict[str, Any] = {"zoomed": True} if kind == "curves" else {"columns": 5, "zero": True}
    return draw([Panel(name, curves) for name in domains], run_lines(runs, "uniform"), **options)


@pytest.mark.parametrize("kind", ["stacked", "curves", "multiples"])
def test_a_chart_is_well_formed_the_same_every_time_and_leaves_matplotlibs_settings_alone(kind: str) -> None:
    before = dict(mpl.rcParams)
    first, second = to_svg(chart(kind)), to_svg(chart(kind))
    assert first == second
    assert dict(mpl.rcParams) == before
    texts = [element.text for element in ET.fromstring(first).iter(f"{SVG}text")]
    assert {"$b_1$", "織物 \U0001f9f5"} <= set(texts), "as text, and not as a formula; no font is no warning"


def test_inline_svg_keeps_its_ids_to_itself_and_names_no_address() -> None:
    svg = to_svg(chart("curves"))
    first, second = inline_svg(svg, "one", 'what "it" <shows>'), inline_svg(svg, "two", "x")
    ids = [set(re.findall(r'\sid="([^"]*)"', text)) for text in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    references = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', first))
    assert references
    assert {a or b for a, b in references} <= ids[0]
    assert ["http" in first, "<?xml" in first] == [False, False]
    assert 'aria-label="what &#34;it&#34; &lt;shows&gt;"' in first


def test_empty_panels_say_so_and_one_point_is_a_mark() -> None:
    nothing, one = Curve("dga", np.zeros(0), np.zeros(0)), Curve("dga", np.array([5.0]), np.array([2.0]))
    lines = run_lines(["dga"])
    assert "not recorded" in to_svg(draw([Panel("Target", (nothing,))], lines))
    assert "not recorded" in to_svg(draw([Panel("dga", ())], lines, stacked=True))
    assert ET.fromstring(to_svg(draw([Panel("Target", (one,))], lines, zoomed=True))).findall(f".//{SVG}use")


def test_a_mixture_is_drawn_as_steps_of_what_was_recorded() -> None:
    weights, x = np.array([0.25, 0.75, 0.5]), np.array([0.0, 100.0, 200.0])
    panel = Panel("dga", tuple(shares({"a": weights, "b": 1 - weights}, x, ["a", "b"])))
    axis = draw([panel], domain_lines(["a", "b"]), stacked=True).axes[0]
    corners: Any = axis.collections[0].get_paths()[0].vertices
    top = sorted({(float(px), float(py)) for px, py in corners if py > 0})
    assert {(0.0, 0.25), (100.0, 0.25), (100.0, 0.75)} <= set(top)
    assert not any(0.25 < y < 0.75 for _, y in top if y != 0.5)
    gathered = shares({"a": weights, "b": weights / 2, "c": weights / 4}, x, ["a"])
    assert [one.label for one in gathered] == ["a", OTHER]
    assert gathered[1].y_N.tolist() == (0.75 * weights).tolist()


def test_runs_keep_their_colours_and_thinning_keeps_means_and_gaps() -> None:
    labels = [f"run {i}" for i in range(20)]
    lines = run_lines(labels, "run 3")
    assert (list(lines), len(set(lines.values()))) == (labels, 20)
    assert run_lines(labels[:5], "run 3")["run 1"] == lines["run 1"]
    y = np.arange(1000.0)
    y[500:600] = np.nan
    thinned = thin(Curve("a", np.arange(1000.0), y), 100)
    assert (len(thinned.x_N), thinned.y_N[0]) == (100, pytest.approx(4.5))
    assert np.isnan(thinned.y_N).tolist() == [50 <= place < 60 for place in range(100)]


def test_the_end_of_a_steep_curve_decides_the_scale_of_a_zoomed_frame() -> None:
    steep = Curve("dga", X, 1 + 50 * np.exp(-X / 5e4))
    late = steep.y_N[X >= 0.25e6]
    low, high = draw([Panel("Target", (steep,))], run_lines(["dga"]), zoomed=True).axes[0].get_ylim()
    assert low < late.min()
    assert late.max() < high < 2 * late.max()
