"""Experts made by several processes, or dealt out to the ranks of torchrun, are those one process makes."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import Call
from support.tiny_expert import llama
from support.tiny_project import WORDS, command, environment, recipe_value, write_corpora

from weftlm.experts.library import ExpertLibrary
from weftlm.pipeline.experts import train_experts
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.recipe import Recipe, load_recipe


def assert_same(first: Path, second: Path) -> None:
    one, two = ExpertLibrary.open(first), ExpertLibrary.open(second)
    assert one.names == two.names == sorted(WORDS)
    for name in one.names:
        expected, found = one.load(name), two.load(name)
        assert expected.gate is not None
        assert found.gate is not None
        for module, factors in expected.lora.modules.items():
            assert torch.equal(found.lora.modules[module].B_OR, factors.B_OR), (name, module)
            assert torch.equal(found.gate.vectors[module], expected.gate.vectors[module]), (name, module)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small recipe over a base without training behind it; data prepared."""
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path / "corpora")
    value: dict[str, Any] = {
        "run": "one",
        "prepared": "prepared",
        "data": recipe_value()["data"],
        "experts": {
            "base": "base",
            "lora": {"rank": 2},
            "training": {"sequence_length": 16, "batch_sequences": 3, "steps": 4, "device": "cpu"},
            "validate_every_steps": 2,
            "gate": {"steps": 2},
            "statistics_examples": 4,
        },
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(value))
    data = prepare(Recipe.model_validate(value).data, tmp_path / "prepared", progress=False)
    llama(vocab_size=data.tokenizer.vocab_size).save_pretrained(tmp_path / "base")
    data.tokenizer.save(tmp_path / "base")
    return "recipe.yaml"


@pytest.mark.slow
@pytest.mark.distributed
def test_many_processes_make_what_one_makes(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_experts(load_recipe(recipe), progress=False)
    torch.set_num_threads(threads)
    result = Call(capsys)("experts", "train", recipe, "--set", "run=two", "--processes", "2", "--json")
    assert {facts["status"] for facts in result["experts"].values()} == {"made"}
    assert_same(tmp_path / "one/experts", tmp_path / "two/experts")

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    python, *weftlm = command("experts", "train", recipe, "--set", "run=three", "--json")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}")
    # Three sequences cannot be shared by two ranks: each expert is made by one process alone.
    finished = subprocess.run(
        [python, *launcher, *weftlm],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert set(json.loads(finished.stdout)["experts"]) == set(WORDS), "the first rank alone prints"
    assert_same(tmp_path / "one/experts", tmp_path / "three/experts")
