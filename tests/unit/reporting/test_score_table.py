"""Tables of scores: values, differences, what is best, what helped, and the command that serves it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.blocks import render_blocks, table_rows

from weftlm.reporting.score import Score, score_text
from weftlm.reporting.score_table import ScoreTable, answer, headline, model_table, score_tables
from weftlm.reporting.traces import RoutingFacts, routing_blocks
from weftlm.routing.trace import Trace

SETS: dict[str, dict[str, float]] = {
    "base": {"target": 2.0, "code": 3.0},
    "routed: merged": {"target": 1.9, "code": 2.8},
    "gate: student": {"target": 1.7, "code": 3.2},
    "single": {"target": 2.01, "code": 3.0},
    "oracle": {"target": 1.0, "code": 1.0},
}
ROLES = {"base": "base", "routed: merged": "router", "gate: student": "student", "single": "expert", "oracle": "bound"}
GAPS = {
    "routed: merged": {"mean": (-0.15, 0.01), "target": (-0.1, 0.02), "code": (-0.2, 0.01)},
    "gate: student": {"mean": (-0.05, 0.04), "target": (-0.3, 0.02), "code": (0.2, 0.01)},
    "single": {"mean": (0.005, 0.001), "target": (0.01, 0.001), "code": (0.0, 0.001)},
}
PATHS = {"base": "owner/base", "routed: merged": "runs/my project/routed/merged", "gate: student": "runs/x/student"}


def measured(value: float | None, error: float | None = None) -> dict[str, float | None]:
    return {"bits_per_byte": value, "bits_per_byte_se": error}


def table(sets: Mapping[str, Mapping[str, Any]] = SETS, *, gaps: bool = False, **more: Any) -> ScoreTable:
    models: dict[str, dict[str, Any]] = {}
    for name, row in sets.items():
        models[name] = {"role": ROLES.get(name, "router"), "sets": {key: measured(value) for key, value in row.items()}}
        if gaps:
            models[name]["path"] = PATHS.get(name, "")
        if gaps and name in GAPS:
            given = {key: measured(*gap) for key, gap in GAPS[name].items()}
            models[name]["difference"] = {"mean": given.pop("mean"), "sets": given}
        models[name] |= {key: values[name] for key, values in more.items() if name in values}
    return model_table(models, "model", 128)


def values(cells: list[tuple[str, list[float]]]) -> list[list[float]]:
    return [found for _, found in cells]


def best(found: Mapping[str, list[tuple[str, list[float]]]], word: str = "(lowest)") -> list[str]:
    """The best row of each of three columns."""
    return [" ".join(name for name, cells in found.items() if word in cells[column][0]) for column in range(3)]


def test_differences_have_a_true_minus_enough_decimals_and_a_verdict() -> None:
    assert score_text(Score(-0.0434, 0.0026), signed=True) == "−0.043 ± 0.003"
    assert score_text(Score(0.0434), signed=True) == "+0.043"
    assert score_text(Score(0.0434, 0.0004)) == "0.0434 ± 0.0004"
    assert [score_text(Score(-0.0001)), score_text(Score())] == ["0.000", "–"]
    found = [Score(value, 0.02).verdict for value in (-0.05, -0.039, 0.039, 0.05)]
    assert found == ["better", "not significant", "not significant", "worse"]
    assert Score(-0.05).verdict == "no error known"


def test_values_means_and_differences_are_the_models_and_a_bound_is_never_the_best() -> None:
    found = table_rows(score_tables(table()))
    assert list(found) == list(SETS)
    for name, row in SETS.items():
        scores = [sum(row.values()) / 2, *row.values()]
        differences = [score - base for score, base in zip(scores, (2.5, 2.0, 3.0), strict=True)]
        expected = [[one] if name == "base" else [one, gap] for one, gap in zip(scores, differences, strict=True)]
        assert values(found[name]) == [pytest.approx(one) for one in expected]
    assert best(found) == ["routed: merged", "gate: student", "routed: merged"]
    text = render_blocks(score_tables(table()))
    assert "by model, in windows of 128 tokens; lower is better" in text
    assert "bounds aside" in text


def test_a_missing_score_is_a_dash_and_leaves_no_mean_and_without_a_base_there_are_no_differences() -> None:
    given = {"base": {"a": 1.0, "b": 2.0}, "arrow": {"a": 0.9, "b": None}, "other": {"a": math.nan, "b": 1.0}}
    found = table_rows(score_tables(table(given)))
    assert [found["arrow"][0][0], found["arrow"][2][0], found["other"][1][0]] == ["–"] * 3
    assert found["arrow"][1][1] == pytest.approx([0.9, -0.1])
    blocks = score_tables(table({"arrow": {"a": 0.9}, "phatgoose": {"a": 0.8}}))
    assert "difference" not in render_blocks(blocks)
    assert values(table_rows(blocks)["arrow"]) == [[0.9]], "one set has no mean"


def test_many_sets_become_rows() -> None:
    given = {name: {f"set {i}": 1.0 + i + shift for i in range(20)} for name, shift in (("base", 0.1), ("arrow", 0.0))}
    blocks = score_tables(table(given))
    assert "All 20 one by one" in render_blocks(blocks)
    assert len(table_rows(blocks)["arrow"]) == 1
    cells = table_rows(blocks, "The same values")["set 3"]
    assert cells[1][1] == pytest.approx([4.0, -0.1])
    assert "(lowest)" in cells[1][0]


def test_accuracies_are_shown_beside_guessing() -> None:
    shares = {"base": {"code": 0.25, "prose": 0.5}, "single": {"code": 0.75, "prose": 0.25}}
    chance = {"code": 0.25, "prose": 0.5}
    tasks = {
        name: {task: {"accuracy": share, "chance": chance[task]} for task, share in row.items()}
        for name, row in shares.items()
    }
    found = table_rows(score_tables(table(tasks=tasks)), "Share of right answers")
    assert values(found["base"]) == values(found["chance"]) == [[0.375], [0.25], [0.5]]
    assert best(found, "(highest)") == ["single", "single", "base"]
    assert found["base"][2][0].startswith("50.0%")


def test_the_best_model_comes_with_its_command_and_its_gain() -> None:
    blocks = answer(table(gaps=True))
    text = render_blocks(blocks)
    first, second = text.split("<pre>")[1:]
    assert first.startswith("weftlm serve &#39;runs/my project/routed/merged&#39;</pre>"), "quoted for a shell"
    assert second.startswith("weftlm serve runs/x/student</pre>"), "the target has another best model"
    found = table_rows(blocks)
    assert list(found) == ["routed: merged", "gate: student", "single"], "the best first"
    assert found["routed: merged"] == [
        ("−0.150 ± 0.010better", [-0.15, 0.01]),
        ("−0.170 to −0.130", pytest.approx([-0.1696, -0.1304])),
    ]
    assert all(f'<span class="sub">{role}</span>' in text for role in ("router", "student", "expert"))
    assert headline(table(gaps=True)) == (
        "routed: merged: 2.350 bits per byte of held-out text, mean over the sets, −0.150 ± 0.010 against base: better."
    )
    claimless = render_blocks(answer(table()))
    assert ["no error known" in claimless, ">better<" in claimless, "weftlm serve" in claimless] == [True, False, False]
    assert (answer(table({})), headline(table({}))) == ([], "Nothing was measured on held-out text.")


def test_routing_shows_its_table_and_the_traces() -> None:
    weights_STE = torch.tensor([[[0.75, 0.25], [0.0, 1.0]]])
    trace = ("phatgoose <1>", Trace((7, 8), ("a", "b"), ("l.0.up",), weights_STE), ["x", "y"])
    text = render_blocks(routing_blocks(RoutingFacts(table({"<b>": {"<i>": 1.0}}), [trace, trace])))
    assert text.count('class="trace"') == 2
    assert text.count("<details") == 1, "the first trace is shown open"
    assert "phatgoose &lt;1&gt;" in text
    assert not any(raw in text for raw in ("phatgoose <1>", "<b>", "<i>"))
