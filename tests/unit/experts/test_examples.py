"""Experts of tasks: trained on prompts and targets, for decoder-only and encoder-decoder bases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.experts import llama as llama_64
from support.experts import make_expert, t5
from support.tiny_expert import cyclic_source, llama, task

from weftlm.corpora.examples import examples_of
from weftlm.errors import ConfigError
from weftlm.experts.config import AdapterTraining
from weftlm.experts.examples import ExampleLoss, ExampleNumbers, domain_trainer, training_source
from weftlm.experts.statistics import collect_statistics, embed_tokens
from weftlm.models.prompted import PromptedExamples, is_encoder_decoder, target_nats
from weftlm.training.loop import Trainer
from weftlm.training.runtime import choose_runtime

CPU, LENGTH = torch.device("cpu"), 12
BASES = {"llama": llama, "t5": t5}


def trainer_of(model: torch.nn.Module, folder: Path, batch: int = 8, micro: int | None = None) -> Trainer:
    section = AdapterTraining.model_validate({
        "steps": 16, "sequence_length": LENGTH, "batch_sequences": batch, "micro_batch_sequences": micro,
        "device": "cpu", "threads": 1,
    })  # fmt: skip
    runtime = choose_runtime(section, parameters=0)
    return domain_trainer(model, "task", task(), section, folder=folder, seed=1, runtime=runtime)


@pytest.mark.parametrize("kind", BASES)
def test_a_step_is_the_mean_over_its_target_tokens_however_it_is_cut(kind: str, tmp_path: Path) -> None:
    gradients = []
    for size in (None, 1, 3):
        model = BASES[kind]().double()
        trainer = trainer_of(model, tmp_path / str(size), micro=size)
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


def test_every_example_comes_once_an_epoch(tmp_path: Path) -> None:
    trainer = trainer_of(llama(), tmp_path, batch=10)
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


def test_what_is_trained_on_follows_the_setting() -> None:
    source, plain = task(), cyclic_source()
    assert training_source(source, "task", None) is training_source(source, "task", True) is source
    assert training_source(plain, "text", False) is plain
    text = training_source(source, "task", False)
    assert examples_of(text) is None
    assert (len(text), text.fingerprint, text.bytes) == (len(source), source.fingerprint, source.bytes)
    assert text.read(3, 5).tolist() == source.read(3, 5).tolist()
    with pytest.raises(ConfigError, match="'text' have no prompts"):
        training_source(plain, "text", True)
