"""The first screen: what helped, by how much with its error, and the command that serves the best model."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.blocks import render_blocks

from weftlm.reporting.page import render_page
from weftlm.reporting.report import report_page
from weftlm.reporting.runs import Run, read_runs
from weftlm.reporting.score_table import Role, ScoreRow, ScoreTable, answer, headline, score_tables

SETS: dict[str, dict[str, float | None]] = {
    "base": {"target": 2.0, "code": 3.0},
    "routed: merged": {"target": 1.9, "code": 2.8},
    "gate: student": {"target": 1.7, "code": 3.2},
    "single": {"target": 2.01, "code": 3.0},
}
ROLES: dict[str, Role] = {"base": "base", "routed: merged": "router", "gate: student": "student", "single": "expert"}
GAPS: dict[str, dict[str | None, tuple[float, float]]] = {
    "routed: merged": {None: (-0.15, 0.01), "target": (-0.1, 0.02), "code": (-0.2, 0.01)},
    "gate: student": {None: (-0.05, 0.04)},
    "single": {None: (0.005, 0.001)},
}
PATHS = {"base": "owner/base", "routed: merged": "runs/my project/routed/merged", "gate: student": "runs/x/student"}
ROWS = {
    name: ScoreRow(sets, ROLES[name], gaps=GAPS.get(name, {}), path=PATHS.get(name, "")) for name, sets in SETS.items()
}
TABLE = ScoreTable(ROWS, "model", window=128)


def rendered(runs: Sequence[Run], models: ScoreTable | None = None) -> str:
    return render_page(report_page(runs, models=models))


def test_the_best_model_comes_with_its_command_and_its_gain() -> None:
    text = render_blocks(answer(TABLE))
    first, second = text.split("<pre>")[1:]
    assert first.startswith("weftlm serve &#39;runs/my project/routed/merged&#39;</pre>"), "quoted for a shell"
    assert second.startswith("weftlm serve runs/x/student</pre>"), "the target has another best model"
    for row in ("−0.150 ± 0.010", "−0.170 to −0.130", "better", "−0.128 to +0.028", "not significant", "worse"):
        assert row in text
    assert text.index(">routed: merged<span") < text.index(">gate: student<span") < text.index(">single<span")
    for role in ("router", "student", "expert"):
        assert f'<span class="sub">{role}</span>' in text, "a row carries its role"
    assert headline(TABLE) == (
        "routed: merged: 2.350 bits per byte of held-out text, mean over the sets, −0.150 ± 0.010 against base: better."
    )


def test_differences_without_a_known_error_claim_nothing() -> None:
    rows = {name: ScoreRow(sets, ROLES[name]) for name, sets in SETS.items()}
    text = render_blocks(answer(ScoreTable(rows, "model")))
    assert "no error known" in text
    assert ">better<" not in text
    assert "weftlm serve" not in text, "no path, no command"
    assert answer(ScoreTable({}, "model")) == []


def test_the_answer_stands_before_everything_else(three_runs: list[Path]) -> None:
    page = rendered(read_runs(three_runs), models=TABLE)
    assert page.index('<p class="headline">routed: merged') < page.index('class="answer"') < page.index("<nav")
    assert "Mixtures alone: dga: 1.7" in page, "the mixtures' finding follows"


def test_a_run_with_a_model_says_how_to_serve_it(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    runs = [make_run(tmp_path / policy, policy) for policy in ("uniform", "dga")]
    assert "weftlm serve" not in rendered(read_runs(runs))
    for run in runs:
        (run / "model").mkdir()
    assert f"weftlm serve {runs[1]}</pre>" in rendered(read_runs(runs))
    assert f"weftlm serve {runs[0]}</pre>" in rendered(read_runs(runs[:1]))


def test_tables_say_in_which_windows_they_were_measured(three_runs: list[Path]) -> None:
    assert "by model, in windows of 128 tokens; lower is better" in render_blocks(score_tables(TABLE))
    page = rendered(read_runs(three_runs))
    assert page.count("in windows of 256 tokens") == 2


@pytest.mark.parametrize("window", [None, 64])
def test_a_table_without_a_window_names_none(window: int | None) -> None:
    assert ("windows of" in render_blocks(score_tables(ScoreTable(ROWS, window=window)))) == (window is not None)
