"""What runs are compared with, their differences with errors, and the first sentence of a report."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.blocks import render_blocks

from weftlm.evaluation.result import load_windows, paired_difference
from weftlm.evaluation.suite import TARGET
from weftlm.reporting.compare import View, caveats, run_table
from weftlm.reporting.runs import GENERIC, read_runs
from weftlm.reporting.score_table import ScoreTable, answer, headline

MakeRun = Callable[..., Path]


def bits(folder: Path, key: str = "target") -> float:
    result = json.loads((folder / "result.json").read_text())
    return float(result["generic"]["bits_per_byte"] if key == "generic" else result["sets"][key]["bits_per_byte"])


def edit(folder: Path, **values: object) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def compared(folders: list[Path]) -> ScoreTable:
    return run_table(View.of(read_runs(folders)))


def two(root: Path, make_run: MakeRun, **options: object) -> list[Path]:
    return [make_run(root / policy, policy, ["a", "b"], **options) for policy in ("uniform", "dga")]


def test_differences_are_paired_over_the_same_windows_and_a_lead_is_said(three_runs: list[Path]) -> None:
    found = compared(three_runs)
    gap = found.gap("dga", TARGET)
    first, second = (load_windows(three_runs[i] / "windows.safetensors")["target"] for i in (2, 0))
    expected = paired_difference(first, second)
    assert gap.value == pytest.approx(bits(three_runs[2]) - bits(three_runs[0]), abs=1e-12)
    assert gap == pytest.approx((expected.bits_per_byte, expected.bits_per_byte_se), rel=1e-9)
    generic = found.gap("dga", GENERIC)
    assert generic.value == pytest.approx(bits(three_runs[2], "generic") - bits(three_runs[0], "generic"), abs=1e-12)
    assert generic.error < found.score("dga", GENERIC).error / 2
    assert headline(found) == (
        f"dga: {bits(three_runs[2]):.3f} ± 0.009 bits per byte on the target, "
        f"−{-gap.value:.3f} ± 0.002 against uniform: better."
    )
    assert caveats(read_runs(three_runs)) == []


def test_without_window_losses_errors_add_up_and_without_errors_nothing_is_claimed(
    tmp_path: Path, make_run: MakeRun
) -> None:
    folders = two(tmp_path, make_run, windows=False)
    found = compared(folders)
    errors = [found.score(label, TARGET).error for label in ("uniform", "dga")]
    assert found.gap("dga", TARGET).error == pytest.approx(math.hypot(*errors))
    for folder in folders:
        sets = json.loads((folder / "result.json").read_text())["sets"]
        sets["target"]["bits_per_byte_se"] = None
        edit(folder, sets=sets)
    assert headline(compared(folders)).endswith("against uniform: no error known.")


def test_one_run_is_compared_with_nothing_and_served_where_it_left_a_model(tmp_path: Path, make_run: MakeRun) -> None:
    folders = two(tmp_path, make_run)
    assert headline(compared(folders[1:])) == f"dga: {bits(folders[1]):.3f} ± 0.009 bits per byte on the target."
    assert "weftlm serve" not in render_blocks(answer(compared(folders)))
    for folder in folders:
        (folder / "model").mkdir()
    assert f"weftlm serve {folders[1]}</pre>" in render_blocks(answer(compared(folders)))


def test_unequal_costs_other_text_and_a_missing_target_are_said(tmp_path: Path, make_run: MakeRun) -> None:
    folders = two(tmp_path, make_run)
    edit(folders[1], train_tokens=4_000_000)
    windows = folders[1] / "windows.safetensors"
    windows.write_bytes(windows.read_bytes().replace(b"fingerprint target", b"fingerprint tarpit"))
    details = " ".join(caveats(read_runs(folders)))
    assert "differ in training tokens (3.28M to 4.00M)" in details
    assert "different target text" in details
    for folder in folders:
        sets = json.loads((folder / "result.json").read_text())["sets"]
        edit(folder, sets={name: one for name, one in sets.items() if name != "target"})
    assert "bits per byte, mean over domains" in headline(compared(folders))


def test_another_seed_is_not_called_better(tmp_path: Path, make_run: MakeRun) -> None:
    folders = [make_run(tmp_path / f"seed{seed}", "dga", ["a"], target_bits=1.9 - seed / 10) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        recipe = {**yaml.safe_load((folder / "recipe.yaml").read_text()), "run": str(folder), "seed": seed}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert headline(compared(folders)).endswith("against seed0: no error known.")
    assert "seed0, seed1: the same settings with other seeds" in " ".join(caveats(read_runs(folders)))


@pytest.mark.parametrize(("target", "verdict"), [(1.95, "worse"), (1.8995, "not significant"), (1.8, "better")])
def test_a_verdict_is_the_95_percent_intervals(target: float, verdict: str, tmp_path: Path, make_run: MakeRun) -> None:
    folders = [make_run(tmp_path / p, p, ["a"], target_bits=bits) for p, bits in (("dga", target), ("uniform", 1.9))]
    assert headline(compared(folders)).endswith(f"against uniform: {verdict}.")
