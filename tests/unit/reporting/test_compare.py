"""What runs are compared with, their differences with errors, and the first sentence of a report."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.blocks import render_blocks

from weftlm.evaluation.result import load_windows, paired_difference
from weftlm.evaluation.suite import TARGET
from weftlm.reporting.compare import View, caveats, run_table
from weftlm.reporting.runs import GENERIC, read_runs
from weftlm.reporting.score_table import ScoreTable, answer, headline


def bits(folder: Path, key: str = "target") -> float:
    result = json.loads((folder / "result.json").read_text())
    return float(result["generic"]["bits_per_byte"] if key == "generic" else result["sets"][key]["bits_per_byte"])


def edit(folder: Path, **values: object) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def compared(folders: list[Path]) -> ScoreTable:
    return run_table(View.of(read_runs(folders)))


def test_differences_are_paired_over_the_same_windows(three_runs: list[Path]) -> None:
    found = compared(three_runs)
    gap = found.gap("dga", TARGET)
    first, second = (load_windows(three_runs[i] / "windows.safetensors")["target"] for i in (2, 0))
    expected = paired_difference(first, second)
    assert gap.value == pytest.approx(bits(three_runs[2]) - bits(three_runs[0]), abs=1e-12)
    assert gap.value == pytest.approx(expected.bits_per_byte, rel=1e-9)
    assert gap.error == expected.bits_per_byte_se
    generic = found.gap("dga", GENERIC)
    assert generic.value == pytest.approx(bits(three_runs[2], "generic") - bits(three_runs[0], "generic"), abs=1e-12)
    assert generic.error < found.score("dga", GENERIC).error / 2


def test_without_window_losses_errors_add_up(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = [make_run(tmp_path / policy, policy, windows=policy == "uniform") for policy in ("uniform", "dga")]
    found = compared(folders)
    errors = [found.score(label, TARGET).error for label in ("uniform", "dga")]
    assert found.gap("dga", TARGET).error == pytest.approx(math.hypot(*errors))


def test_a_lead_is_said_with_its_size_and_error(three_runs: list[Path]) -> None:
    gain = bits(three_runs[0]) - bits(three_runs[2])
    assert headline(compared(three_runs)) == (
        f"dga: {bits(three_runs[2]):.3f} ± 0.009 bits per byte on the target, "
        f"−{gain:.3f} ± 0.002 against uniform: better."
    )
    assert caveats(read_runs(three_runs)) == []


@pytest.mark.parametrize(("target", "verdict"), [(1.95, "worse"), (1.8995, "not significant"), (1.8, "better")])
def test_a_verdict_is_the_95_percent_intervals(
    target: float, verdict: str, tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    folders = [make_run(tmp_path / p, p, ["a"], target_bits=b) for p, b in (("dga", target), ("uniform", 1.9))]
    assert headline(compared(folders)).startswith("dga: ")
    assert headline(compared(folders)).endswith(f"against uniform: {verdict}.")


def test_an_unknown_error_makes_no_lead(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = [make_run(tmp_path / p, p, ["a"], windows=False) for p in ("uniform", "dga")]
    for folder in folders:
        sets = json.loads((folder / "result.json").read_text())["sets"]
        sets["target"]["bits_per_byte_se"] = None
        edit(folder, sets=sets)
    assert headline(compared(folders)).endswith("against uniform: no error known.")


def test_one_run_is_compared_with_nothing_and_served_where_it_left_a_model(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    folders = [make_run(tmp_path / policy, policy, ["a"]) for policy in ("uniform", "dga")]
    assert headline(compared(folders[1:])) == f"dga: {bits(folders[1]):.3f} ± 0.009 bits per byte on the target."
    assert "weftlm serve" not in render_blocks(answer(compared(folders)))
    for folder in folders:
        (folder / "model").mkdir()
    assert f"weftlm serve {folders[1]}</pre>" in render_blocks(answer(compared(folders)))
    assert f"weftlm serve {folders[0]}</pre>" in render_blocks(answer(compared(folders[:1])))


def test_unequal_costs_and_other_text_are_said(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = [make_run(tmp_path / p, p, ["a"]) for p in ("uniform", "dga")]
    edit(folders[1], train_tokens=4_000_000)
    windows = folders[1] / "windows.safetensors"
    windows.write_bytes(windows.read_bytes().replace(b"fingerprint target", b"fingerprint tarpit"))
    details = " ".join(caveats(read_runs(folders)))
    assert "differ in training tokens (3.28M to 4.00M)" in details
    assert "different target text" in details


def test_without_a_target_the_mean_over_domains_decides(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = [make_run(tmp_path / p, p, ["a", "b"]) for p in ("uniform", "dga")]
    for folder in folders:
        sets = json.loads((folder / "result.json").read_text())["sets"]
        edit(folder, sets={name: one for name, one in sets.items() if name != "target"})
    assert "bits per byte, mean over domains" in headline(compared(folders))
    (tmp_path / "run").mkdir()
    assert headline(compared([tmp_path / "run"])) == "Nothing was measured on held-out text."


def several(root: Path, make_run: Callable[..., Path], levels: dict[str, list[float]]) -> list[Path]:
    return [
        make_run(root / f"{policy}-{seed}", policy, ["a", "b"], seed=seed, target_bits=level)
        for policy, row in levels.items()
        for seed, level in enumerate(row)
    ]


def test_repeated_runs_speak_through_their_mean(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = several(tmp_path, make_run, {"uniform": [1.90, 1.91, 1.92], "dga": [1.80, 1.84, 1.82]})
    view = View.of(read_runs(folders))
    assert {one.label: len(one.runs) for one in view.contenders} == {"uniform": 3, "dga": 3}
    found, errors = run_table(view), []
    values = {policy: [bits(f) for f in folders if f.name.startswith(policy)] for policy in ("uniform", "dga")}
    for policy, of_seeds in values.items():
        errors.append(np.std(of_seeds, ddof=1) / math.sqrt(3))
        assert found.score(policy, TARGET) == pytest.approx((np.mean(of_seeds), errors[-1]))
    difference = np.mean(values["dga"]) - np.mean(values["uniform"])
    assert found.gap("dga", TARGET) == pytest.approx((difference, math.hypot(*errors)))
    assert headline(found).startswith(f"dga: {np.mean(values['dga']):.3f} ± ")
    weights = [json.loads((f / "result.json").read_text())["weights"]["a"] for f in folders if "dga" in f.name]
    assert view.contenders[1].latest("weights", "a") == pytest.approx(np.mean(weights))


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [
        ({"uniform": [1.85, 1.86, 1.87], "dga": [1.70, 1.95, 1.92]}, "not significant"),
        ({"uniform": [1.90, 1.91], "dga": [1.80]}, "no error known"),
    ],
)
def test_a_lucky_or_a_single_seed_is_no_lead(
    levels: dict[str, list[float]], verdict: str, tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    assert headline(compared(several(tmp_path, make_run, levels))).endswith(f"against uniform: {verdict}.")


def test_runs_of_other_settings_are_not_repetitions(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = several(tmp_path, make_run, {"dga": [1.8, 1.9]})
    assert headline(compared(folders)).startswith("dga: 1.8")
    recipe = folders[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("eta: 5.0", "eta: 1.0"))
    contenders: Any = View.of(read_runs(folders)).contenders
    assert [(one.label, one.repeated) for one in contenders] == [("dga-0", False), ("dga-1", False)]
