"""The routing part of a report: means, differences, the best router, the trace, and nothing where nothing is given."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.blocks import render_blocks

from weftlm.errors import ConfigError
from weftlm.reporting.report import write_report
from weftlm.reporting.routing import RoutingFacts, routing_blocks
from weftlm.reporting.score_table import Role, ScoreRow, ScoreTable, score_tables
from weftlm.routing.trace import Trace

ROLES: dict[str, Role] = {"base": "base", "oracle": "bound"}
TABLE: dict[str, dict[str, float | None]] = {
    "base": {"code": 1.5, "prose": 1.2},
    "arrow": {"code": 1.3, "prose": 1.1},
    "phatgoose": {"code": 1.2, "prose": 1.15},
    "oracle": {"code": 1.1, "prose": 1.0},
}
TRACE = (
    "phatgoose <1>",
    Trace((7, 8), ("a", "b"), ("l.0.up",), torch.tensor([[[0.75, 0.25], [0.0, 1.0]]])),
    ["x", "y"],
)


def scored(
    table: Mapping[str, Mapping[str, float | None]],
    accuracy: Mapping[str, Mapping[str, float]] | None = None,
    chance: Mapping[str, float] | None = None,
) -> str:
    """The tables of some rows as HTML."""
    rows = {
        name: ScoreRow(row, ROLES.get(name, "router"), (accuracy or {}).get(name, {})) for name, row in table.items()
    }
    return render_blocks(score_tables(ScoreTable(rows, chance=chance or {})))


def routing_section(facts: RoutingFacts) -> str:
    return render_blocks(routing_blocks(facts))


def rows_of(text: str) -> dict[str, list[str]]:
    rows = re.findall(r'<tr><th scope="row" class="text">(.*?)</th>(.*?)</tr>', text)
    return {name.split("<")[0]: re.findall(r"<td.*?>(.*?)</td>", cells) for name, cells in rows}


def values(cell: str) -> list[float]:
    return [float(value) for value in re.findall(r'<data value="(.*?)"', cell)]


def test_values_means_and_differences_are_the_tables() -> None:
    rows = rows_of(scored(TABLE))
    assert list(rows) == list(TABLE)
    for router, cells in rows.items():
        scores = [sum(TABLE[router].values()) / 2, *TABLE[router].values()]
        base = [1.35, 1.5, 1.2]
        for cell, score, below in zip(cells, scores, base, strict=True):
            expected = [score] if router == "base" else [score, score - below]
            assert values(cell) == pytest.approx(expected)
    assert "−0.300" in rows["phatgoose"][1]


def test_the_best_method_is_bold_and_the_oracle_is_a_bound() -> None:
    text = scored(TABLE)
    rows = rows_of(text)
    best = [[router for router, cells in rows.items() if "best" in cells[column]] for column in range(3)]
    assert best == [["phatgoose"], ["phatgoose"], ["arrow"]]
    assert "the bound aside" in text
    assert "the bound aside" not in scored({"base": {"a": 1.0}, "arrow": {"a": 0.9}})


def test_a_missing_score_is_a_dash_and_leaves_no_mean() -> None:
    table = {"base": {"a": 1.0, "b": 2.0}, "arrow": {"a": 0.9, "b": None}, "other": {"a": math.nan, "b": 1.0}}
    rows = rows_of(scored(table))
    assert rows["arrow"][0] == rows["arrow"][2] == rows["other"][1] == "–"
    assert values(rows["arrow"][1]) == pytest.approx([0.9, -0.1])


def test_without_a_base_there_are_no_differences() -> None:
    text = scored({"arrow": {"a": 0.9}, "phatgoose": {"a": 0.8}})
    assert "difference" not in text
    assert [values(cells[0]) for cells in rows_of(text).values()] == [[0.9], [0.8]]


def test_many_sets_become_rows() -> None:
    table = {name: {f"set {i}": 1.0 + i + shift for i in range(20)} for name, shift in (("base", 0.1), ("arrow", 0.0))}
    text = scored(table)
    assert "All 20 sets" in text
    rows = rows_of(text)
    assert len(rows["arrow"]) == 1
    assert values(rows["set 3"][1]) == pytest.approx([4.0, -0.1])
    assert "best" in rows["set 3"][1]


def test_the_section_shows_time_and_traces() -> None:
    text = routing_section(RoutingFacts(TABLE, ROLES, 1.336, [TRACE, TRACE]))
    assert 'routed forward pass over the base&#39;s: <data value="1.336">1.34</data>' in text
    assert text.count('class="trace"') == 2
    assert text.count("<details") == 1, "the first trace is shown open"
    assert "phatgoose &lt;1&gt;" in text
    assert "phatgoose <1>" not in text
    held = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text)[0])
    assert held["experts"] == ["a", "b"]
    ids = re.findall(r'id="([^"]*)"', text)
    assert ids == ["routing-trace-0", "routing-trace-1"]


def test_a_table_alone_brings_no_script_and_no_style() -> None:
    facts = RoutingFacts(TABLE, ROLES, math.nan)
    assert "<script" not in routing_section(facts)
    assert "forward pass" not in routing_section(facts)
    assert "<table" not in routing_section(RoutingFacts(traces=[TRACE]))


def test_empty_facts_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match="without a table and without traces"):
        routing_section(RoutingFacts())


def test_names_are_escaped() -> None:
    text = routing_section(RoutingFacts({"<b>": {"<i>": 1.0, "c": 2.0}}))
    assert "<b>" not in text
    assert "<i>" not in text


def test_a_report_has_the_section_where_facts_are_given(three_runs: list[Path], tmp_path: Path) -> None:
    without = write_report(three_runs[:1], tmp_path / "a.html").read_text(encoding="utf-8")
    facts = RoutingFacts(TABLE, ROLES, 1.2, [TRACE])
    given = write_report(three_runs[:1], tmp_path / "b.html", routing=facts).read_text(encoding="utf-8")
    assert 'id="routing"' not in without
    assert without.count("<script") == 1, "the theme's alone"
    assert 'href="#routing"' in given
    assert given.count('<section id="routing"') == 1
    assert ".tokens {" in given
    assert ".tokens {" not in without
    assert "://" not in given.replace("http://www.w3.org/2000/svg", ""), "the name of the format alone"


ACCURACY = {"base": {"code": 0.25, "prose": 0.5}, "arrow": {"code": 0.75, "prose": 0.25}}


def test_differences_are_taken_to_the_row_that_is_the_base() -> None:
    rows = {"own": ScoreRow({"a": 1.5}, "baseline"), "rival": ScoreRow({"a": 1.0}, "base")}
    text = render_blocks(score_tables(ScoreTable(rows, "model")))
    assert "its difference to rival" in text
    assert values(rows_of(text)["own"][0]) == pytest.approx([1.5, 0.5])
    assert values(rows_of(text)["rival"][0]) == [1.0]


def test_accuracies_are_shown_beside_guessing() -> None:
    text = scored(TABLE, ACCURACY, {"code": 0.25, "prose": 0.5})
    rows = rows_of(text.partition("Share of right answers")[2])
    assert list(rows) == ["base", "arrow", "chance"]
    assert [values(cell) for cell in rows["base"]] == [[0.375], [0.25], [0.5]]
    assert [values(cell) for cell in rows["chance"]] == [[0.375], [0.25], [0.5]]
    best = [[name for name, cells in rows.items() if "best" in cells[column]] for column in range(3)]
    assert best == [["arrow"], ["arrow"], ["base"]]
    assert "50.0%" in rows["base"][2]
    assert "Share of right answers" not in scored(TABLE)
    assert "Share of right answers by router" in routing_section(RoutingFacts(table=TABLE, accuracy=ACCURACY))


def test_many_tasks_are_folded_away() -> None:
    names = [f"task {number}" for number in range(9)]
    text = scored(TABLE, {"base": dict.fromkeys(names, 0.5), "arrow": {"task 0": 1.0}})
    assert "All 9 tasks" in text
    assert values(rows_of(text.partition("Share of right answers")[2])["base"][0]) == [0.5]
    assert list(rows_of(text.partition("All 9 tasks")[2])) == names
