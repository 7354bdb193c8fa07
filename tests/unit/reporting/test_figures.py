"""Charts: the same bytes for the same numbers, all values in the frame, nothing foreign."""

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
    curve_grid,
    domain_lines,
    inline_svg,
    run_lines,
    stacked_areas,
    thin,
    to_svg,
)

X = np.linspace(0, 1e6, 50)
SVG = "{http://www.w3.org/2000/svg}"


def curve(label: str, level: float = 1.0) -> Curve:
    return Curve(label, X, level + np.exp(-X / 2e5), np.full(50, 0.05))


def every_chart() -> dict[str, Any]:
    runs, domains = ["uniform", "dga"], ["a", "$b_1$", OTHER]
    weights = tuple(Curve(name, X, np.full(50, 1 / 3)) for name in domains)
    return {
        "stacked": stacked_areas([Panel(run, weights) for run in runs], domain_lines(domains)),
        "curves": curve_grid([Panel("Target", tuple(curve(run) for run in runs))], run_lines(runs, "uniform")),
        "multiples": curve_grid(
            [Panel(name, tuple(curve(run) for run in runs)) for name in domains],
            run_lines(runs, "uniform"),
            y_label="bits per byte",
            columns=5,
            legend=runs,
            zero=True,
        ),
    }


@pytest.mark.parametrize("name", ["stacked", "curves", "multiples"])
def test_a_chart_is_well_formed_and_the_same_every_time(name: str) -> None:
    first, second = to_svg(every_chart()[name]), to_svg(every_chart()[name])
    assert first == second
    texts = [element.text for element in ET.fromstring(first).iter(f"{SVG}text")]
    wanted = {"stacked": "$b_1$", "curves": "dga  1.007", "multiples": "$b_1$"}[name]
    assert wanted in texts  # as text, and not as a formula


def test_making_a_chart_leaves_matplotlibs_settings_alone() -> None:
    before = dict(mpl.rcParams)
    for chart in every_chart().values():
        to_svg(chart)
    assert dict(mpl.rcParams) == before


def test_a_name_no_font_can_show_is_no_warning() -> None:
    chart = curve_grid([Panel("目标 \U0001f9f5", (curve("織物"),))], run_lines(["織物"]))
    assert "織物" in to_svg(chart)


def test_inline_svg_keeps_its_ids_to_itself_and_names_no_address() -> None:
    svg = to_svg(every_chart()["curves"])
    first, second = inline_svg(svg, "one", 'what "it" <shows>'), inline_svg(svg, "two", "x")
    ids = [set(re.findall(r'\sid="([^"]*)"', text)) for text in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    references = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', first))
    assert references
    assert {a or b for a, b in references} <= ids[0]
    assert "http" not in first
    assert "<?xml" not in first
    assert 'aria-label="what &#34;it&#34; &lt;shows&gt;"' in first
    assert not re.search(r"<svg[^>]*\swidth=", first)


def test_empty_panels_say_so() -> None:
    nothing = Curve("dga", np.zeros(0), np.zeros(0))
    lines = run_lines(["dga"])
    for chart in (
        curve_grid([Panel("Target", (nothing,))], lines),
        curve_grid([Panel("a", (nothing,))], lines, legend=[]),
        stacked_areas([Panel("dga", ())], domain_lines(["a"])),
    ):
        assert "not recorded" in to_svg(chart)


def test_one_point_is_a_mark() -> None:
    one = Curve("dga", np.array([5.0]), np.array([2.0]))
    root = ET.fromstring(to_svg(curve_grid([Panel("Target", (one,))], run_lines(["dga"]))))
    assert "dga  2.000" in [element.text for element in root.iter(f"{SVG}text")]
    assert root.findall(f".//{SVG}use")


def test_a_mixture_is_drawn_as_steps_of_what_was_recorded() -> None:
    weights = np.array([0.25, 0.75, 0.5])
    x = np.array([0.0, 100.0, 200.0])
    panel = Panel("dga", (Curve("a", x, weights), Curve("b", x, 1 - weights)))
    axis = stacked_areas([panel], domain_lines(["a", "b"])).axes[0]
    corners = axis.collections[0].get_paths()[0].vertices
    top = sorted({(float(px), float(py)) for px, py in corners if py > 0})
    assert (0.0, 0.25) in top
    assert (100.0, 0.25) in top
    assert (100.0, 0.75) in top
    assert not any(0.25 < y < 0.75 for _, y in top if y != 0.5)


def test_runs_keep_their_colours_and_the_baseline_is_apart() -> None:
    labels = [f"run {i}" for i in range(20)]
    lines = run_lines(labels, "run 3")
    assert list(lines) == labels
    assert len({(line.colour, str(line.dash)) for line in lines.values()}) == 20
    assert run_lines(labels[:5], "run 3")["run 1"] == lines["run 1"]


def test_thinning_keeps_means_and_gaps() -> None:
    y = np.arange(1000.0)
    y[500:600] = np.nan
    thinned = thin(Curve("a", np.arange(1000.0), y), 100)
    assert len(thinned.x_N) == 100
    assert thinned.y_N[0] == pytest.approx(4.5)
    assert np.isnan(thinned.y_N[50:60]).all()
    assert np.isfinite(np.delete(thinned.y_N, np.arange(50, 60))).all()
    short = Curve("a", X, X)
    assert thin(short, 50) is short


def test_a_frame_holds_every_value_and_a_steep_curve_is_shown_again_without_its_start() -> None:
    steep = Curve("dga", X, 1 + 50 * np.exp(-X / 5e4))
    chart = curve_grid([Panel("Target", (steep,))], run_lines(["dga"]), columns=1)
    whole, rest = chart.axes
    low, high = whole.get_ylim()
    assert low <= steep.y_N.min()
    assert high >= steep.y_N.max()
    assert rest.get_title(loc="left") == "Target, last 75%"
    assert min(rest.lines[0].get_xdata()) >= 0.25e6
    assert len(curve_grid([Panel("Target", (Curve("dga", X, X),))], run_lines(["dga"])).axes) == 1
