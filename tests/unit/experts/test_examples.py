"""Experts of tasks: trained on prompts and targets, for decoder-only and encoder-decoder bases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from support.experts import llama as llama_64
from support.experts import make_expert, t5
from support.tiny_expert import Fingerprint, cyclic_source, llama

from weftlm.corpora.examples import ExampleSource, examples_of
from weftlm.errors import ConfigError, NumericsError
from weftlm.experts.adapted import adapted
from weftlm.experts.companions import check_gate, check_statistics
from weftlm.experts.config import AdapterTraining, ExpertTraining
from weftlm.experts.examples import (
    ExampleLoss,
    ExampleNumbers,
    domain_trainer,
    training_source,
)
from weftlm.experts.expert import BaseReference, Expert
from weftlm.experts.lora import write_lora
from weftlm.experts.statistics import collect_statistics, embed_tokens
from weftlm.experts.train import train_expert
from weftlm.models.factory import peft_warnings
from weftlm.models.prompted import PromptedExamples, is_encoder_decoder, target_nats
from weftlm.training.config import TrainingConfig
from weftlm.training.loop import Trainer
from weftlm.training.runtime import choose_runtime

CPU, EOS, LENGTH = torch.device("cpu"), 63, 12
BASES = {"llama": llama, "t5": t5}
SETTINGS: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8},
    "training": {
        "steps": 16, "lr": 0.02, "sequence_length": LENGTH, "batch_sequences": 8, "micro_batch_sequences": 3,
        "device": "cpu", "threads": 1, "save_every_steps": 3,
    },
    "validate_every_steps": 8,
    "gate": {"steps": 3},
    "statistics_examples": 12,
}  # fmt: skip


def task(count: int = 60, seed: int = 0) -> ExampleSource:
    """The answer to some numbers is the last of them, one more and two more."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 40, rng.integers(1, 9)) for _ in range(count)]
    return ExampleSource(
        [
            (prompt, [int(prompt[-1]), int(prompt[-1]) + 1, int(prompt[-1]) + 2][: 1 + i % 3])
            for i, prompt in enumerate(prompts)
        ],
        eos_id=EOS,
        target_bytes=[2 * (1 + i % 3) for i in range(count)],
    )


def train(model: Any, folder: Path, **changes: Any) -> Expert:
    given: dict[str, Any] = {
        "base": BaseReference("tiny-base"), "source": task(), "config": {}, "name": "task", "folder": folder,
        "seed": 3, "heldout": task(20, seed=7), **changes,
    }  # fmt: skip
    given["config"] = ExpertTraining.model_validate({**SETTINGS, **given["config"]})
    return train_expert(model, **given)


@pytest.mark.parametrize("kind", BASES)
def test_an_expert_of_a_task_learns_its_targets(kind: str, tmp_path: Path) -> None:
    model = BASES[kind]()
    before = Fingerprint(model)
    expert = train(model, tmp_path)
    before.check(model)
    card = expert.card
    assert card["losses"]["after"]["nats_per_token"] < card["losses"]["before"]["nats_per_token"] - 0.15
    check_gate(expert.lora, expert.gate)
    check_statistics(expert.lora, expert.statistics)
    if kind == "t5":
        assert {"encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.v"} <= set(
            expert.lora.modules
        )
        assert any(expert.gate.vectors[name].any() for name in expert.gate.vectors if "encoder" in name)
    assert "lm_head" not in expert.lora.modules
    # The card's numbers are those of the expert that came out.
    held = task(20, seed=7)
    prompted = PromptedExamples(held.examples, LENGTH, kind == "t5")
    model.eval()
    with adapted(model, expert.lora), torch.no_grad():
        nats = sum(float(target_nats(model, [row], CPU, encoder=kind == "t5")) for row in prompted.rows(range(20)))
    scored = card["losses"]["after"]["scored_tokens"]
    assert scored == sum(len(row.target_C) for row in prompted.rows(range(20)))
    assert card["losses"]["after"]["nats_per_token"] == pytest.approx(nats / scored, rel=1e-5)
    assert card["losses"]["after"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / held.bytes, rel=1e-5)
    # As many tokens as the epochs hold.
    source = PromptedExamples(task().examples, LENGTH, kind == "t5")
    mean = float((source.prompts_N + source.targets_N).mean())
    assert card["adapter"]["tokens"] == round(16 * 8 * mean)
    assert card["adapter"]["epochs"] == pytest.approx(16 * 8 / 60)


def test_peft_loads_an_expert_of_an_encoder_decoder(tmp_path: Path) -> None:
    model = t5()
    quick = {"training": {**SETTINGS["training"], "steps": 3}, "gate": {"steps": 0}, "statistics_examples": 0}
    expert = train(model, tmp_path / "work", config=quick)
    write_lora(tmp_path / "adapter", expert.lora)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, EOS]]), "decoder_input_ids": torch.tensor([[0, 8, 9]])}
    with torch.no_grad():
        plain_BTV = model(**inputs).logits
        with adapted(model, expert.lora):
            ours_BTV = model(**inputs).logits
        with peft_warnings():
            theirs = PeftModel.from_pretrained(t5(), str(tmp_path / "adapter")).eval()
        assert theirs.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
        torch.testing.assert_close(theirs(**inputs).logits, ours_BTV, rtol=1e-5, atol=1e-5)
    assert (ours_BTV - plain_BTV).abs().max() > 1e-3


@pytest.mark.parametrize("kind", BASES)
def test_a_step_is_the_mean_over_its_target_tokens_however_it_is_cut(kind: str, tmp_path: Path) -> None:
    gradients = []
    for size in (None, 1, 3):
        model = BASES[kind]().double()
        section = AdapterTraining.model_validate({**SETTINGS["training"], "micro_batch_sequences": size})
        trainer = domain_trainer(
            model, "task", task(), section, folder=tmp_path / str(size), seed=1,
            runtime=choose_runtime(section, parameters=0),
        )  # fmt: skip
        assert isinstance(trainer.loss, ExampleLoss)
        batch = trainer.loss.prepare(trainer.mixture.draw())
        loss, _ = trainer._backward(batch)
        rows = trainer.loss.prompted.rows(batch.tokens_BT1[:, 0].numpy())
        with torch.no_grad():
            nats = sum(float(target_nats(model, [row], CPU, encoder=is_encoder_decoder(model))) for row in rows)
        assert loss == pytest.approx(nats / sum(len(row.target_C) for row in rows), rel=1e-6)  # weights are float32
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-8)


def test_a_killed_training_continues_to_the_same_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = 10
    model, original, taken = t5(), Trainer.train_step, 0
    whole = train(model, tmp_path / "whole")

    def killed(self: Trainer) -> tuple[float, float]:
        nonlocal taken
        if taken == at:
            raise KeyboardInterrupt
        taken += 1
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path / "killed")
    resumed = train(model, tmp_path / "killed")
    for name, factors in whole.lora.modules.items():
        assert torch.equal(resumed.lora.modules[name].A_RI, factors.A_RI)
        assert torch.equal(resumed.lora.modules[name].B_OR, factors.B_OR)
        assert torch.equal(resumed.gate.vectors[name], whole.gate.vectors[name])
        assert torch.equal(resumed.statistics.means[name], whole.statistics.means[name])
    assert resumed.card["losses"] == whole.card["losses"]


def test_every_example_comes_once_an_epoch(tmp_path: Path) -> None:
    section = TrainingConfig.model_validate({**SETTINGS["training"], "batch_sequences": 10})
    trainer = domain_trainer(
        llama(), "task", task(), section, folder=tmp_path, seed=1, runtime=choose_runtime(section, parameters=0)
    )
    drawn = [trainer.mixture.loader.next().tokens_BT1 for _ in range(12)]
    assert all(bool((rows == rows[:, :1]).all()) for rows in drawn)
    numbers = torch.cat(drawn)[:, 0].tolist()
    assert sorted(numbers[:60]) == sorted(numbers[60:]) == list(range(60))
    assert numbers[:60] != numbers[60:] != list(range(60))
    assert ExampleNumbers(task().examples, 5).read(3, 4).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_statistics_of_examples_know_no_padding(kind: str) -> None:
    model = {"llama": llama_64, "t5": t5}[kind]()
    expert = make_expert(model).lora
    source, sizes = task(30), {"examples": 20, "sequence_length": LENGTH, "seed": 5}
    found = collect_statistics(model, expert, source, batch_sequences=7, **sizes)
    alone = collect_statistics(model, expert, source, batch_sequences=1, **sizes)
    for name in expert.modules:
        torch.testing.assert_close(found.means[name], alone.means[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(found.token_counts_V, alone.token_counts_V)
    assert torch.equal(found.bigram_counts_K, alone.bigram_counts_K)
    assert found.facts["examples"] == 20
    prompted = PromptedExamples(source.examples, LENGTH, kind == "t5")
    drawn_N = np.sort(np.random.default_rng(5).choice(30, size=20, replace=False, shuffle=False))
    rows = prompted.rows(drawn_N)
    assert int(found.token_counts_V.sum()) == sum(len(row.prompt_P) + len(row.target_C) for row in rows)
    prompts = {tuple(embed_tokens(torch.from_numpy(row.prompt_P)[None])[0].tolist()) for row in rows}
    assert {tuple(row) for row in found.embeddings_NF.tolist()} == prompts


def test_what_is_trained_on_follows_the_setting(tmp_path: Path) -> None:
    source = task()
    assert training_source(source, "task", None) is source
    assert training_source(source, "task", True) is source
    text = training_source(source, "task", False)
    assert examples_of(text) is None
    assert (len(text), text.fingerprint, text.bytes) == (len(source), source.fingerprint, source.bytes)
    assert text.read(3, 5).tolist() == source.read(3, 5).tolist()
    plain = cyclic_source()
    assert training_source(plain, "text", False) is plain
    with pytest.raises(ConfigError, match="'text' have no prompts"):
        training_source(plain, "text", True)
    quick = {"training": {**SETTINGS["training"], "steps": 2}, "gate": {"steps": 0}, "statistics_examples": 0}
    windows = train(llama(), tmp_path / "w", config={**quick, "examples": False})
    examples = train(llama(), tmp_path / "e", config=quick)
    assert windows.card["adapter"]["tokens"] == 2 * 8 * LENGTH
    assert windows.card["data"]["fingerprint"] == examples.card["data"]["fingerprint"]
    name = next(iter(windows.lora.modules))
    assert not torch.equal(windows.lora.modules[name].B_OR, examples.lora.modules[name].B_OR)


def test_what_cannot_be_trained_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learns from examples; give its corpora a prompt_field"):
        train(t5(), tmp_path / "a", source=cyclic_source())
    with pytest.raises(ConfigError, match="sequence_length is 1; an example needs at least 2"):
        train(llama(), tmp_path / "b", config={"training": {**SETTINGS["training"], "sequence_length": 1}})
    broken = llama()
    with torch.no_grad():
        broken.lm_head.weight[0] = float("nan")
    with pytest.raises(NumericsError, match="held-out examples"):
        train(broken, tmp_path / "c", heldout=task())
