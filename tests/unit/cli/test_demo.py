"""What the demonstration prints is of the project it was given."""

from __future__ import annotations

from typing import Any

import pytest

from weftlm.cli import demo

SUMMARY: dict[str, Any] = {
    "mixture": {
        "target_bpb": {"dga": 2.5}, "target_bpb_se": {"dga": 0.1}, "generic_bpb": {"dga": 2.4}, "train_tokens": 1000,
        "seconds": {"dga": {"train": 1.0, "alignment": 0.5}}, "epochs_of_the_most_read_domain": {"dga": 1.5},
    },
    "routing": {
        "experts": ["a", "b"], "heldout_bpb": {"base": 2.0, "best_single": 1.5}, "unseen_bpb": {"base": 2.25},
        "relative_forward_time": None,
    },
    "robust": {
        "unit": "token", "worst_domain_regret": {"fixed_share": 0.125}, "worst_domain": {"fixed_share": "json"},
        "mean_regret": {"fixed_share": 0.0625}, "capacity_bound": 0.5, "z": 0.75,
    },
}  # fmt: skip


def test_tables_name_the_base_and_an_untimed_pass_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("weftlm.pipeline.demo.run_demo", lambda project: SUMMARY)
    demo.run(set_=["experts.baseline=importance"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 experts over the model of the mixture importance, by router" in printed
    assert "2.5000 ± 0.1000" in printed
    assert "forward pass" not in printed
    SUMMARY["routing"]["relative_forward_time"] = 1.25
    demo.run(set_=["experts.baseline=null"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "over the model of the mixture dga" in printed
    assert "takes 1.25 times the base's" in printed
