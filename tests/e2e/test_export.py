"""`weftlm export` in one test: a checkpoint, adapters, a refusal that says what else there is."""

from __future__ import annotations

from pathlib import Path

from support import served
from support.command_line import Call
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_a_routed_model_leaves_as_a_checkpoint_or_as_adapters(tmp_path: Path, call: Call) -> None:
    routed = served.write_model(tmp_path, "routed")
    assert "--router merged" in call("export", routed, "--output", "out", code=2)
    facts = call("export", routed, "--output", "out", "--router", "single:expert=b", "--json")
    assert facts["experts"] == {"a": 0.0, "b": 1.0, "c": 0.0}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == facts["parameters"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")("mast")["input_ids"]) > 0
    assert "is not empty" in call("export", routed, "--output", "out", "--router", "merged", code=2)
    assert "b: 1.0" in call("export", routed, "--output", "one", "--expert", "b", "--dtype", "bfloat16")
    printed = call("export", routed, "--output", "adapters", "--format", "peft")
    assert f"base: {tmp_path / 'base'}" in printed
    assert "no expert 'x'" in call("export", routed, "--output", "more", "--expert", "x", code=1)
