"""One domain in, one expert out, and the base none the wiser."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from support.tiny_expert import LENGTH, Fingerprint, cyclic_source, llama

from weftlm.corpora.source import ArraySource
from weftlm.errors import CheckpointError, ConfigError, DataError, ExpertError, NumericsError
from weftlm.experts import train as module
from weftlm.experts.adapted import adapted
from weftlm.experts.companions import check_gate, check_statistics
from weftlm.experts.config import AdapterTraining, ExpertTraining
from weftlm.experts.expert import BaseReference, Expert
from weftlm.experts.train import held_out_losses, train_expert
from weftlm.models.fingerprint import base_fingerprint
from weftlm.training.loop import Trainer

SETTINGS: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8},
    "training": {
        "steps": 24, "lr": 0.02, "sequence_length": LENGTH, "batch_sequences": 8, "device": "cpu", "threads": 1,
        "save_every_steps": 5,
    },
    "validate_every_steps": 8,
    "gate": {"steps": 4},
    "statistics_examples": 12,
}  # fmt: skip


def train(model: Any, folder: Path, **changes: Any) -> Expert:
    given: dict[str, Any] = {
        "base": BaseReference("tiny-base"), "source": cyclic_source(), "config": {}, "name": "cycle",
        "folder": folder, "seed": 3, "heldout": cyclic_source(300, seed=7), **changes,
    }  # fmt: skip
    given["config"] = ExpertTraining.model_validate({**SETTINGS, **given["config"]})
    return train_expert(model, **given)


def test_an_expert_lowers_its_domains_loss_and_the_base_is_as_before(tmp_path: Path) -> None:
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].train()
    before = Fingerprint(model)
    source, heldout = cyclic_source(), cyclic_source(300, seed=7)
    expert = train(model, tmp_path, source=source, heldout=heldout, about={"licence": "CC0"})
    before.check(model)
    card = expert.card
    assert expert.name == card["name"] == "cycle"
    assert expert.lora.base == BaseReference("tiny-base", None, base_fingerprint(model))
    assert len(expert.lora.modules) == 2 * 7
    assert "lm_head" not in expert.lora.modules
    assert {factors.scale for factors in expert.lora.modules.values()} == {2.0}
    check_gate(expert.lora, expert.gate)
    check_statistics(expert.lora, expert.statistics)
    assert card["losses"]["after"]["nats_per_token"] < card["losses"]["before"]["nats_per_token"] - 0.15
    assert card["adapter"]["tokens"] == 24 * 8 * LENGTH
    assert card["data"] == {"fingerprint": source.fingerprint, "tokens": 2000, "bytes": 6000}
    assert card["about"] == {"licence": "CC0"}
    assert card["settings"]["training"]["steps"] == 24
    assert card["gate"]["steps"] == 4
    assert card["statistics"]["examples"] == 12
    nats = card["losses"]["before"]["nats_per_token"]
    assert card["losses"]["before"]["bits_per_byte"] == pytest.approx(nats * 299 / math.log(2) / 900)
    # The card's numbers are those of the expert that came out, and of the bare base.
    model.eval()
    how = ExpertTraining.model_validate(SETTINGS), torch.device("cpu")
    assert card["losses"]["before"] == pytest.approx(held_out_losses(model, heldout, *how))
    with adapted(model, expert.lora):
        found = held_out_losses(model, heldout, *how)
    assert found == pytest.approx(card["losses"]["after"], rel=1e-5)


def test_first_values_are_the_papers_or_pefts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[dict[str, torch.Tensor]] = []
    original = Trainer.__init__

    def spy(self: Trainer, model: Any, *args: Any, **kwargs: Any) -> None:
        first.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        original(self, model, *args, **kwargs)

    monkeypatch.setattr(Trainer, "__init__", spy)
    quick = {"training": {**SETTINGS["training"], "steps": 1}, "gate": {"steps": 0}, "statistics_examples": 0}
    train(llama(), tmp_path / "a", config={**quick, "lora": {"rank": 16}})
    train(llama(), tmp_path / "b", config={**quick, "lora": {"rank": 16}})
    train(llama(), tmp_path / "c", config={**quick, "lora": {"rank": 16, "init_std": None}})
    a, b, c = first
    assert all(torch.equal(a[name], b[name]) for name in a)
    A = torch.cat([value.flatten() for name, value in a.items() if "lora_A" in name])
    assert float(A.std()) == pytest.approx(0.01, rel=0.05)
    assert not any(value.any() for name, value in a.items() if "lora_B" in name)
    C = torch.cat([value.flatten() for name, value in c.items() if "lora_A" in name and value.shape[1] == 32])
    assert float(C.abs().max()) == pytest.approx(1 / math.sqrt(32), rel=0.01)


def test_the_best_step_by_validation_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation losses are made to fall and rise again: the adapter of the lowest is the one that comes out."""
    model = llama()
    quick = {"gate": {"steps": 0}, "statistics_examples": 0}
    short = train(
        model, tmp_path / "short",
        config={**quick, "training": {**SETTINGS["training"], "steps": 16, "warmup_steps": 1}},
    )  # fmt: skip
    scores = iter([4.0, 3.0, 2.0, 2.5])  # steps 0, 8, 16, 24
    monkeypatch.setattr(
        module, "held_out_losses",
        lambda *_: {"nats_per_token": next(scores), "bits_per_byte": None, "scored_tokens": 1},
    )  # fmt: skip
    longer = {**quick, "training": {**SETTINGS["training"], "warmup_steps": 1}}
    expert = train(model, tmp_path / "long", config=longer)
    assert expert.card["adapter"]["kept_step"] == 16
    assert expert.card["adapter"]["steps"] == 24
    assert [expert.card["losses"][key]["nats_per_token"] for key in ("before", "after")] == [4.0, 2.0]
    for name, factors in expert.lora.modules.items():
        assert torch.equal(factors.B_OR, short.lora.modules[name].B_OR)
    again = train(model, tmp_path / "long", config=longer)
    assert again.card == expert.card


def test_without_validation_the_last_is_kept(tmp_path: Path) -> None:
    model, quick = llama(), {"gate": {"steps": 0}, "statistics_examples": 0}
    plain = train(model, tmp_path / "plain", heldout=None, config=quick)
    assert plain.card["losses"] is None
    assert plain.card["heldout"] is None
    assert plain.card["adapter"]["kept_step"] == 24
    measured = train(model, tmp_path / "measured", config={**quick, "validate_every_steps": 0})
    assert measured.card["losses"]["after"]["nats_per_token"] < measured.card["losses"]["before"]["nats_per_token"]
    assert not (tmp_path / "measured" / "best.safetensors").exists()
    for name, factors in plain.lora.modules.items():
        assert torch.equal(factors.B_OR, measured.lora.modules[name].B_OR)


def test_a_run_killed_several_times_continues_to_the_same_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    before, original = Fingerprint(model), Trainer.train_step
    whole = train(model, tmp_path / "whole")
    for at in (3, 12, 22):

        def killed(self: Trainer, at: int = at) -> tuple[float, float]:
            if self.step == at:
                raise KeyboardInterrupt
            return original(self)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", killed)
            with pytest.raises(KeyboardInterrupt):
                train(model, tmp_path / "killed")
        before.check(model)
    resumed = train(model, tmp_path / "killed")
    for other in (resumed, train(model, tmp_path / "killed")):
        for name, factors in whole.lora.modules.items():
            assert torch.equal(other.lora.modules[name].A_RI, factors.A_RI)
            assert torch.equal(other.lora.modules[name].B_OR, factors.B_OR)
            assert torch.equal(other.gate.vectors[name], whole.gate.vectors[name])
            assert torch.equal(other.statistics.means[name], whole.statistics.means[name])
        assert other.card["losses"] == whole.card["losses"]
        assert other.card["adapter"]["kept_step"] == whole.card["adapter"]["kept_step"]


def test_the_same_data_running_out_early_still_gives_an_expert(tmp_path: Path) -> None:
    training = {**SETTINGS["training"], "exhaustion": "stop"}
    expert = train(llama(), tmp_path, source=cyclic_source(8 * LENGTH * 10 + 1), config={"training": training})
    assert expert.card["adapter"]["steps"] == 10
    assert expert.card["adapter"]["stopped_early"]
    assert expert.card["adapter"]["kept_step"] == 10


def test_another_recipe_in_the_folder_is_refused(tmp_path: Path) -> None:
    model = llama()
    quick = {"gate": {"steps": 0}, "statistics_examples": 0}
    train(model, tmp_path, config=quick)
    for change in (
        {"seed": 4}, {"source": cyclic_source(seed=5)}, {"heldout": None}, {"config": {**quick, "lora": {"rank": 2}}},
        {"base": BaseReference("other")},
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="another recipe"):
            train(model, tmp_path, **{"config": quick, **change})
    other = {**quick, "training": {**SETTINGS["training"], "log_every_steps": 3}}
    assert train(model, tmp_path, name="renamed", config=other).name == "renamed"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_what_cannot_be_trained_is_said_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model = llama()
    before = Fingerprint(model)
    with pytest.raises(ConfigError, match="target_modules: 'nowhere' matches no module"):
        train(model, tmp_path, config={"lora": {"target_modules": "nowhere"}})
    with pytest.raises(ConfigError, match="embedder is 'bert'"):
        train(model, tmp_path, config={"embedder": "bert"})
    with pytest.raises(ConfigError, match=r"sentence-transformers|decode"):
        train(model, tmp_path, config={"embedder": "sentence-transformers:x"})
    assert not list(tmp_path.iterdir()), "an embedder is asked for before anything is trained"
    with pytest.raises(DataError, match="one training sequence"):
        train(model, tmp_path, source=cyclic_source(LENGTH))
    with pytest.raises(DataError, match="0 tokens"):
        train(model, tmp_path / "unheld", heldout=cyclic_source(0))
    with pytest.raises(ExpertError, match="name 'a/b' is not allowed"):
        train(model, tmp_path, name="a/b")
    before.check(model)
    with pytest.raises(ExpertError, match="carries PEFT adapters already"):
        train(get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear")), tmp_path)


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


def test_held_out_losses_without_bytes_or_with_a_diverged_adapter() -> None:
    model, how = llama(), (ExpertTraining.model_validate(SETTINGS), torch.device("cpu"))
    assert held_out_losses(model, ArraySource([1, 2, 3]), *how)["bits_per_byte"] is None
    with torch.no_grad():
        model.lm_head.weight[0] = float("inf")
    with pytest.raises(NumericsError, match="held-out"):
        held_out_losses(model, cyclic_source(50), *how)
