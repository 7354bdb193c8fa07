"""Experts made by a worker process are those this one makes, and ranks deal experts out among themselves."""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_expert import llama
from support.tiny_project import recipe_value, write_corpora

from weftlm.experts.files import encode
from weftlm.experts.library import ExpertLibrary
from weftlm.fan_out import processes
from weftlm.pipeline import experts
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.recipe import Recipe, load_recipe

NAMES = ["cooking", "sailing"]


def dealt(rank: int) -> list[str]:
    """The experts that one of two ranks leaves to the worker process beside it, which trains alone."""
    asked: list[str] = []
    group = SimpleNamespace(
        process_index=rank, num_processes=2, is_main_process=rank == 0, main_process_first=nullcontext,
        wait_for_everyone=lambda: None,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "process_group", lambda recipe: group)
        patch.setattr(experts, "fan_out", lambda _, tasks, *__, **___: asked.extend(each[2] for each in tasks.values()))
        patch.setattr(ExpertLibrary, "card", lambda *_: {})
        experts.train_experts(load_recipe("recipe.yaml", ["run=three"]), progress=False)
    return asked


@pytest.mark.slow
@pytest.mark.distributed
def test_a_worker_process_makes_what_this_one_makes_and_ranks_deal_experts_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path / "corpora")
    value: dict[str, Any] = {
        "run": "one",
        "prepared": "prepared",
        "data": recipe_value()["data"],
        "experts": {
            "base": "base",
            "domains": NAMES,
            "lora": {"rank": 2},
            # Three sequences cannot be shared by two ranks: each expert is made by one process alone.
            "training": {"sequence_length": 16, "batch_sequences": 3, "steps": 2, "device": "cpu"},
            "validate_every_steps": 1,
            "gate": {"steps": 1},
            "statistics_examples": 4,
        },
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(value))
    data = prepare(Recipe.model_validate(value).data, tmp_path / "prepared", progress=False)
    llama(vocab_size=data.tokenizer.vocab_size).save_pretrained(tmp_path / "base")
    data.tokenizer.save(tmp_path / "base")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with processes(1) as executor:
        executor.submit(import_module, experts.__name__)  # it starts while this process trains
        experts.train_experts(load_recipe("recipe.yaml"), progress=False)
        torch.set_num_threads(threads)
        assert [dealt(rank) for rank in (0, 1)] == [[name] for name in NAMES]
        experts.train_experts(load_recipe("recipe.yaml", ["run=two"]), executor=executor, progress=False)
    one, two = ExpertLibrary.open(tmp_path / "one/experts"), ExpertLibrary.open(tmp_path / "two/experts")
    assert one.names == two.names == NAMES
    for name in NAMES:
        expected, found = one.load(name), two.load(name)
        for file in ("adapter_model.safetensors", "statistics.safetensors"):
            assert encode(found)[file] == encode(expected)[file]
        assert expected.gate is not None
        assert found.gate is not None
        for module, v_I in expected.gate.vectors.items():
            assert torch.equal(found.gate.vectors[module], v_I), (name, module)
