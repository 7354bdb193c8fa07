"""One domain in, one expert out, of text or of prompts and targets, and the base none the wiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from support.experts import t5
from support.tiny_expert import LENGTH, Fingerprint, cyclic_source, llama, task

from weftlm.corpora.source import ArraySource
from weftlm.errors import CheckpointError, ConfigError, DataError, ExpertError, NumericsError
from weftlm.experts import train as module
from weftlm.experts.adapted import adapted
from weftlm.experts.config import AdapterTraining, ExpertTraining
from weftlm.experts.expert import BaseReference, Expert
from weftlm.experts.files import encode
from weftlm.experts.train import held_out_losses, train_expert
from weftlm.models.fingerprint import base_fingerprint
from weftlm.models.prompted import PromptedExamples
from weftlm.training.loop import Trainer

SETTINGS: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8},
    "training": {
        "steps": 16, "lr": 0.02, "sequence_length": LENGTH, "batch_sequences": 8, "device": "cpu", "threads": 1,
        "save_every_steps": 5,
    },
    "validate_every_steps": 8,
    "gate": {"steps": 3},
    "statistics_examples": 12,
}  # fmt: skip
QUICK: dict[str, Any] = {"gate": {"steps": 0}, "statistics_examples": 0}
KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]] = {
    "text": (llama, cyclic_source, lambda: cyclic_source(300, seed=7)),
    "examples": (llama, task, lambda: task(20, seed=7)),
    "encoder-decoder": (t5, task, lambda: task(20, seed=7)),
}


def train(model: Any, folder: Path, kind: str = "text", **changes: Any) -> Expert:
    given: dict[str, Any] = {
        "base": BaseReference("tiny-base"), "source": KINDS[kind][1](), "config": {}, "name": "cycle",
        "folder": folder, "seed": 3, "heldout": KINDS[kind][2](), **changes,
    }  # fmt: skip
    given["config"] = ExpertTraining.model_validate({**SETTINGS, **given["config"]})
    return train_expert(model, **given)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_lowers_its_domains_loss_and_the_base_is_as_before(kind: str, tmp_path: Path) -> None:
    model, heldout = KINDS[kind][0](), KINDS[kind][2]()
    before = Fingerprint(model)
    expert = train(model, tmp_path, kind, about={"licence": "CC0"})
    before.check(model)
    card, source = expert.card, KINDS[kind][1]()
    assert expert.name == card["name"] == "cycle"
    assert expert.lora.base == BaseReference("tiny-base", None, base_fingerprint(model))
    assert "lm_head" not in expert.lora.modules
    assert {factors.scale for factors in expert.lora.modules.values()} == {2.0}
    if kind == "encoder-decoder":
        wanted = {"encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.v"}
        assert wanted <= set(expert.lora.modules)
        assert any(v_I.any() for name, v_I in expert.gate.vectors.items() if "encoder" in name)
    assert set(encode(expert)) > {"gate.safetensors", "statistics.safetensors"}
    assert card["losses"]["after"]["nats_per_token"] < card["losses"]["before"]["nats_per_token"] - 0.1
    per_sequence = float(LENGTH)
    if kind != "text":
        read = PromptedExamples(source.examples, LENGTH, kind == "encoder-decoder")
        per_sequence = float((read.prompts_N + read.targets_N).mean())
    assert card["adapter"]["tokens"] == round(16 * 8 * per_sequence)
    assert card["data"] == {"fingerprint": source.fingerprint, "tokens": len(source), "bytes": source.bytes}
    assert (card["about"], card["gate"]["steps"], card["statistics"]["examples"]) == ({"licence": "CC0"}, 3, 12)
    # The card's numbers are those of the expert that came out, and of the bare base.
    model.eval()
    how = ExpertTraining.model_validate(SETTINGS), torch.device("cpu")
    assert card["losses"]["before"] == pytest.approx(held_out_losses(model, heldout, *how))
    with adapted(model, expert.lora):
        found = held_out_losses(model, heldout, *how)
    assert found == pytest.approx(card["losses"]["after"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(
        found["nats_per_token"] * found["scored_tokens"] / math.log(2) / heldout.bytes
    )


def test_first_values_are_the_papers_or_pefts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[dict[str, torch.Tensor]] = []
    original = Trainer.__init__

    def spy(self: Trainer, model: Any, *args: Any, **kwargs: Any) -> None:
        first.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        original(self, model, *args, **kwargs)

    monkeypatch.setattr(Trainer, "__init__", spy)
    for number, init_std in enumerate((0.01, 0.01, None)):
        config = {"training": {**SETTINGS["training"], "steps": 1}, "lora": {"rank": 16, "init_std": init_std}}
        train(llama(), tmp_path / str(number), config={**QUICK, **config}, heldout=None)
    a, b, c = first
    assert all(torch.equal(a[name], b[name]) for name in a)
    A = torch.cat([value.flatten() for name, value in a.items() if "lora_A" in name])
    assert float(A.std()) == pytest.approx(0.01, rel=0.05)
    assert not any(value.any() for name, value in a.items() if "lora_B" in name)
    C = torch.cat([value.flatten() for name, value in c.items() if "lora_A" in name and value.shape[1] == 32])
    assert float(C.abs().max()) == pytest.approx(1 / math.sqrt(32), rel=0.01)


def test_the_best_step_by_validation_is_kept_and_the_last_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation losses are made to fall and rise again: the adapter of the lowest is the one that comes out."""
    model, training = llama(), {**SETTINGS["training"], "warmup_steps": 1}
    short = {**QUICK, "training": {**training, "steps": 16}}
    last = train(model, tmp_path / "short", config=short, heldout=None)
    assert (last.card["losses"], last.card["adapter"]["kept_step"]) == (None, 16)
    scores = iter([4.0, 3.0, 2.0, 2.5])  # steps 0, 8, 16, 24
    monkeypatch.setattr(
        module, "held_out_losses",
        lambda *_: {"nats_per_token": next(scores), "bits_per_byte": None, "scored_tokens": 1},
    )  # fmt: skip
    longer = {**QUICK, "training": {**training, "steps": 24}}
    expert = train(model, tmp_path / "long", config=longer)
    assert expert.card["adapter"]["kept_step"] == 16
    assert [expert.card["losses"][key]["nats_per_token"] for key in ("before", "after")] == [4.0, 2.0]
    for name, factors in expert.lora.modules.items():
        assert torch.equal(factors.B_OR, last.lora.modules[name].B_OR)
    assert train(model, tmp_path / "long", config=longer).card == expert.card


@pytest.mark.parametrize("kind", ["text", "encoder-decoder"])
def test_a_run_killed_several_times_continues_to_the_same_expert(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = KINDS[kind][0]()
    before, original = Fingerprint(model), Trainer.train_step
    whole = train(model, tmp_path / "whole", kind)
    for at in (3, 12, 2):  # in the adapter's training twice, and in the gate's

        def killed(self: Trainer, at: int = at) -> tuple[float, float]:
            if self.step == at:
                raise KeyboardInterrupt
            return original(self)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", killed)
            with pytest.raises(KeyboardInterrupt):
                train(model, tmp_path / "killed", kind)
        before.check(model)
    for other in (train(model, tmp_path / "killed", kind), train(model, tmp_path / "killed", kind)):
        files, expected = encode(other), encode(whole)
        for file in ("adapter_model.safetensors", "statistics.safetensors"):
            assert files[file] == expected[file]
        for name, v_I in whole.gate.vectors.items():
            assert torch.equal(other.gate.vectors[name], v_I)
        assert other.card["losses"] == whole.card["losses"]
        assert other.card["adapter"]["kept_step"] == whole.card["adapter"]["kept_step"]


def test_another_recipe_in_the_folder_is_refused(tmp_path: Path) -> None:
    model, quick = llama(), {**QUICK, "training": {**SETTINGS["training"], "steps": 2}}
    train(model, tmp_path, config=quick)
    for change in (
        {"seed": 4}, {"source": cyclic_source(seed=5)}, {"heldout": None}, {"config": {**quick, "lora": {"rank": 2}}},
        {"base": BaseReference("other")},
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="another recipe"):
            train(model, tmp_path, **{"config": quick, **change})
    other = {**quick, "training": {**quick["training"], "log_every_steps": 3}}
    assert train(model, tmp_path, name="renamed", config=other).name == "renamed"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_what_cannot_be_trained_is_said_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model, broken = llama(), llama()
    before = Fingerprint(model)
    short = {"training": {**SETTINGS["training"], "sequence_length": 1}}
    for error, message, change in (
        (
            ConfigError,
            "target_modules: 'nowhere' matches no module",
            {"config": {"lora": {"target_modules": "nowhere"}}},
        ),
        (DataError, "one training sequence", {"source": cyclic_source(LENGTH)}),
        (DataError, "0 tokens", {"heldout": cyclic_source(0)}),
        (ExpertError, "name 'a/b' is not allowed", {"name": "a/b"}),
        (ConfigError, "sequence_length is 1; an example needs at least 2", {"source": task(), "config": short}),
    ):
        with pytest.raises(error, match=message):
            train(model, tmp_path / message[:6], **change)
        before.check(model)
    with pytest.raises(ConfigError, match="learns from examples; give its corpora a prompt_field"):
        train(t5(), tmp_path / "a")
    with pytest.raises(ExpertError, match="carries PEFT adapters already"):
        train(get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear")), tmp_path / "b")
    how = ExpertTraining.model_validate(SETTINGS), torch.device("cpu")
    assert held_out_losses(model, ArraySource([1, 2, 3]), *how)["bits_per_byte"] is None
    with torch.no_grad():
        broken.lm_head.weight[0] = float("nan")
    for heldout, what in ((cyclic_source(50), "held-out windows"), (task(), "held-out examples")):
        with pytest.raises(NumericsError, match=what):
            held_out_losses(broken, heldout, *how)


def test_the_sections_defaults_are_the_papers() -> None:
    section = ExpertTraining()
    training = section.training
    assert (section.lora.rank, section.lora.alpha, section.lora.init_std) == (16, 1, 0.01)
    assert (training.total_steps, training.lr, training.weight_decay) == (1000, 5e-3, 0.0)
    assert (training.schedule, training.warmup_steps, training.clip_norm) == ("constant", 60, 1.0)
    assert (section.gate.steps, section.gate.lr, section.validate_every_steps) == (100, 5e-3, 100)
    assert ExpertTraining.model_validate({"training": {"steps": 200}}).training.warmup_steps == 12
    by_tokens = AdapterTraining.model_validate({"tokens": 100 * 4 * 10, "batch_sequences": 4, "sequence_length": 10})
    assert (by_tokens.total_steps, by_tokens.warmup_steps) == (100, 6)
    assert AdapterTraining.model_validate({"steps": 200, "warmup_steps": 0}).warmup_steps == 0
    assert ExpertTraining.model_validate(section.model_dump(mode="json")) == section
    for wrong in ({"steps": "many"}, {"tokens": 10, "steps": 10}, {"step": 10}, {"steps": 0}):
        with pytest.raises(ValidationError):
            AdapterTraining.model_validate(wrong)
