"""What runs are compared with, their differences with errors, and the first sentence of a report."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from weftlm.evaluation.result import load_windows, paired_window_difference
from weftlm.reporting.compare import (
    Contender,
    baseline_of,
    caveats,
    contenders_of,
    generic_gap,
    headline,
    target_gap,
)
from weftlm.reporting.differences import decimals_for, difference_text, interval, verdict
from weftlm.reporting.runs import Run, read_runs


def bits(folder: Path, key: str = "target") -> float:
    result = json.loads((folder / "result.json").read_text())
    return float(result["generic"]["bits_per_byte"] if key == "generic" else result["sets"][key]["bits_per_byte"])


def edit(folder: Path, **values: object) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def by_label(runs: list[Run]) -> dict[str, Contender]:
    return {one.label: one for one in contenders_of(runs)}


def test_differences_are_paired_over_the_same_windows(three_runs: list[Path]) -> None:
    runs = by_label(read_runs(three_runs))
    gap = target_gap(runs["dga"], runs["uniform"])
    assert gap is not None
    first, second = (load_windows(three_runs[i] / "windows.safetensors")["target"] for i in (2, 0))
    expected = paired_window_difference(first, second)
    assert gap.paired
    assert gap.value == pytest.approx(bits(three_runs[2]) - bits(three_runs[0]), abs=1e-12)
    assert gap.value == pytest.approx(expected.bits_per_byte, rel=1e-9)
    assert gap.error == expected.bits_per_byte_se
    generic = generic_gap(runs["dga"], runs["uniform"])
    assert generic is not None
    assert generic.paired
    assert generic.value == pytest.approx(bits(three_runs[2], "generic") - bits(three_runs[0], "generic"), abs=1e-12)


def test_without_window_losses_errors_add_up(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = [make_run(tmp_path / policy, policy, windows=policy == "uniform") for policy in ("uniform", "dga")]
    runs = by_label(read_runs(folders))
    gap = target_gap(runs["dga"], runs["uniform"])
    assert gap is not None
    assert not gap.paired
    assert gap.error == pytest.approx(math.hypot(*(one.target.bits_per_byte_se for one in runs.values())))
    assert "Not every run kept its window losses" in caveats(read_runs(folders))[-1]


def test_a_lead_is_said_with_its_size_and_error(three_runs: list[Path]) -> None:
    gain = bits(three_runs[0]) - bits(three_runs[2])
    assert headline(read_runs(three_runs)) == (
        f"dga: {bits(three_runs[2]):.3f} ± 0.009 bits per byte on the target, −{gain:.3f} ± 0.002 "
        f"(−{gain / bits(three_runs[0]):.1%}) against uniform: better."
    )
    assert caveats(read_runs(three_runs)) == []


@pytest.mark.parametrize(
    ("target", "said"), [(1.95, "against uniform: worse."), (1.8995, "against uniform: not significant.")]
)
def test_a_loss_and_a_difference_within_the_error_are_said_as_plainly(
    target: float, said: str, tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    folders = [make_run(tmp_path / p, p, target_bits=b) for p, b in (("dga", target), ("uniform", 1.9))]
    runs = read_runs(folders)
    assert baseline_of(contenders_of(runs)).label == "uniform"
    assert headline(runs).startswith("dga: ")
    assert headline(runs).endswith(said)


def test_an_unknown_error_makes_no_lead(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = [make_run(tmp_path / p, p, windows=False) for p in ("uniform", "dga")]
    for folder in folders:
        sets = json.loads((folder / "result.json").read_text())["sets"]
        sets["target"]["bits_per_byte_se"] = None
        edit(folder, sets=sets)
    assert headline(read_runs(folders)).endswith("against uniform: no error known.")


def test_one_run_stands_alone(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "demo", "dga")
    expected = f"dga: {bits(folder):.3f} ± 0.009 bits per byte on the target after 3.28M training tokens."
    assert headline(read_runs([folder])) == expected


def test_unequal_costs_and_other_text_are_said(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = [make_run(tmp_path / p, p) for p in ("uniform", "dga")]
    edit(folders[1], train_tokens=4_000_000)
    sets = json.loads((folders[1] / "result.json").read_text())["sets"]
    sets["target"]["tokens"] = 5
    edit(folders[1], sets=sets)
    details = " ".join(caveats(read_runs(folders)))
    assert "differ in training tokens (3.28M to 4.00M)" in details
    assert "different target text" in details


def test_without_a_target_there_is_nothing_to_claim(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert headline(read_runs([tmp_path / "run"])) == "No run has a result on the target yet."


def test_differences_have_a_true_minus_and_enough_decimals() -> None:
    assert difference_text(-0.0434, 0.0026) == "−0.043 ± 0.003"
    assert difference_text(0.0434) == "+0.043"
    assert decimals_for([0.01, 0.0004]) == 4
    assert decimals_for([0.01, math.nan, 0.0]) == 3


def test_a_verdict_is_the_95_percent_intervals() -> None:
    assert interval(-0.05, 0.02) == pytest.approx((-0.0892, -0.0108))
    assert [verdict(value, 0.02) for value in (-0.05, -0.039, 0.039, 0.05)] == [
        "better",
        "not significant",
        "not significant",
        "worse",
    ]
    assert verdict(-0.05, math.nan) == "no error known"


def nine_runs(root: Path, make_run: Callable[..., Path], levels: dict[str, list[float]]) -> list[Path]:
    return [
        make_run(root / f"{policy}-{seed}", policy, ["a", "b"], seed=seed, target_bits=level)
        for policy, row in levels.items()
        for seed, level in enumerate(row)
    ]


def test_repeated_runs_speak_through_their_mean(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = nine_runs(tmp_path, make_run, {"uniform": [1.90, 1.91, 1.92], "dga": [1.80, 1.84, 1.82]})
    runs = read_runs(folders)
    groups = by_label(runs)
    assert {label: len(one.runs) for label, one in groups.items()} == {"uniform": 3, "dga": 3}
    values = {policy: [bits(f) for f in folders if f.name.startswith(policy)] for policy in groups}
    for policy, one in groups.items():
        assert one.target.bits_per_byte == pytest.approx(np.mean(values[policy]))
        assert one.target.bits_per_byte_se == pytest.approx(np.std(values[policy], ddof=1) / math.sqrt(3))
    gap = target_gap(groups["dga"], groups["uniform"])
    assert gap is not None
    assert gap.value == pytest.approx(np.mean(values["dga"]) - np.mean(values["uniform"]))
    assert gap.error == pytest.approx(math.hypot(*(one.target.bits_per_byte_se for one in groups.values())))
    assert headline(runs).startswith(f"dga: {np.mean(values['dga']):.3f} ± ")
    assert "on the target, mean over 3 runs, −" in headline(runs)
    assert groups["dga"].weight("a") == pytest.approx(
        np.mean([json.loads((f / "result.json").read_text())["weights"]["a"] for f in folders if "dga" in f.name])
    )


def test_a_lucky_seed_is_no_lead(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = nine_runs(tmp_path, make_run, {"uniform": [1.85, 1.86, 1.87], "dga": [1.70, 1.95, 1.92]})
    assert headline(read_runs(folders)).endswith("against uniform: not significant.")


def test_a_single_seed_beside_repeated_ones_has_no_known_error(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = nine_runs(tmp_path, make_run, {"uniform": [1.90, 1.91], "dga": [1.80]})
    assert headline(read_runs(folders)).endswith("against uniform: no error known.")


def test_runs_of_other_settings_are_not_repetitions(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = nine_runs(tmp_path, make_run, {"dga": [1.8, 1.9]})
    recipe = folders[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("eta: 5.0", "eta: 1.0"))
    contenders = contenders_of(read_runs(folders))
    assert [one.label for one in contenders] == ["dga-0", "dga-1"]
    assert not contenders[0].repeated


def test_repetitions_of_one_setting_alone_give_a_mean(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    said = headline(read_runs(nine_runs(tmp_path, make_run, {"dga": [1.8, 1.9]})))
    assert said.startswith("dga: 1.8")
    assert said.endswith("bits per byte on the target, mean over 2 runs.")
