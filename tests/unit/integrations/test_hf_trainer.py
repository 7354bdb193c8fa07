"""An online mixture inside transformers.Trainer: the numbers are those of weftlm's own loop, and it resumes exactly."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from support import mixtures
from support.mixtures import LENGTH, NAMES, PROBES, SOURCES, STEPS, TARGET, model, online, quiet, train_with_weftlm
from support.mixtures import updates_of as updates
from support.tiny_project import WORDS, write_corpora
from transformers import DataCollatorWithFlattening, GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

from weftlm.config import validate
from weftlm.corpora.source import ArraySource
from weftlm.errors import CheckpointError, ConfigError
from weftlm.integrations.hf_trainer import MixtureCallback, OnlineMixture, _token_losses
from weftlm.integrations.online_mixture import OnlineRun
from weftlm.pipeline.data_config import DataConfig
from weftlm.pipeline.prepare import prepare
from weftlm.training.mixture_run import Share

POLICIES: list[dict[str, Any]] = [
    {"policy": "dga"},
    {"policy": "dga", "normalize": "cosine"},
    {"policy": "dga", "precondition": "adam"},
    {"policy": "doge"},
    {"policy": "group_dro"},
    {"policy": "doremi"},
]


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with mixtures.light_collections():
        yield


def trainer(folder: Path, mixture: OnlineMixture, *, net: Any = None, **changes: Any) -> Trainer:
    more = {key: changes.pop(key) for key in ("data_collator", "eval_dataset", "callbacks") if key in changes}
    return Trainer(
        net if net is not None else model(),
        quiet(folder, **changes),
        train_dataset=mixture.dataset,
        **{"callbacks": [MixtureCallback(mixture)], **more},
    )


def gpt2(positions: int = LENGTH + 1) -> Any:
    """A model with dropout."""
    torch.manual_seed(0)
    sizes = {"n_positions": positions, "n_embd": 32, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, bos_token_id=0, eos_token_id=0, **sizes))


def weights_of(net: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def assert_same_bits(left: Any, right: Any) -> None:
    one, two = weights_of(left), weights_of(right)
    assert all(torch.equal(one[name], two[name]) for name in one)


# -- the same numbers as weftlm's own loop ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: "-".join(map(str, policy.values())))
def test_alignments_and_weights_are_those_of_our_own_loop(tmp_path: Path, policy: Mapping[str, Any]) -> None:
    module, expected = train_with_weftlm(tmp_path / "own", policy)
    run = trainer(tmp_path / "theirs", online(policy))
    run.train()
    found = updates(run)
    assert [entry["step"] for entry in found] == [4, 8, 12]
    for ours, theirs in zip(expected, found, strict=True):
        for name, value in ours.items():
            scale = max(abs(value) for key, value in ours.items() if "alignment" in key) if "alignment" in name else 1.0
            assert theirs[name] == pytest.approx(value, abs=1e-6 * max(1.0, scale)), name
    if policy["policy"] in ("dga", "doge"):
        assert {f"mixture/alignment/{name}" for name in NAMES} <= found[0].keys()
        assert found[-1]["mixture/a"] != pytest.approx(found[0]["mixture/a"], abs=1e-3)
    one, two = weights_of(module), weights_of(run.model)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", online({"policy": "dga"}))
    plain.train()
    ahead = trainer(tmp_path / "ahead", online({"policy": "dga"}), dataloader_num_workers=1)
    ahead.train()
    assert updates(ahead) == updates(plain)
    assert_same_bits(ahead.model, plain.model)


def test_epochs_and_evaluation_pass_over_the_mixture(tmp_path: Path) -> None:
    short = {name: ArraySource(SOURCES[name].read(0, 8 * LENGTH + 1)) for name in NAMES}  # 24 sequences, 3 batches
    held = datasets.Dataset.from_list([{"input_ids": SOURCES["a"].read(0, 17), "labels": SOURCES["a"].read(0, 17)}] * 3)
    policy = {"policy": "group_dro", "update_every_steps": 2}
    plain = trainer(tmp_path, OnlineMixture.of(short, policy, sequence_length=LENGTH), num_train_epochs=2, max_steps=-1)
    plain.train()
    assert plain.state.global_step == 6
    assert plain.state.epoch == 2.0
    watched = trainer(
        tmp_path, OnlineMixture.of(short, policy, sequence_length=LENGTH), num_train_epochs=2, max_steps=-1,
        eval_strategy="steps", eval_steps=1, eval_dataset=held, eval_on_start=True,
    )  # fmt: skip
    watched.train()
    assert sum("eval_loss" in entry for entry in watched.state.log_history) == 7
    assert updates(watched) == updates(plain)
    assert_same_bits(watched.model, plain.model)


def test_weights_are_logged_beside_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    mixture = online({"policy": "dga"})
    callback = MixtureCallback(mixture)
    run = trainer(tmp_path, mixture, callbacks=[callback, Reporter()])
    run.train()
    losses = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [5, 10]
    assert callback.run is not None
    assert {key for key in losses[-1] if key.startswith("mixture/")} == {f"mixture/{name}" for name in NAMES}
    assert seen[1]["mixture/b"] == losses[1]["mixture/b"] == updates(run)[1]["mixture/b"]
    assert "mixture/b" in capsys.readouterr().out
    assert "mixture/b" not in seen[-1]  # the summary of the whole training


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["dga", "group_dro"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, policy: str) -> None:
    short = {name: ArraySource(SOURCES[name].read(0, 8 * LENGTH + 1)) for name in NAMES}  # an epoch has 3 steps

    def mixture() -> OnlineMixture:
        section = {"update_every_steps": 3, "policy": policy}
        return OnlineMixture.of(short, section, target=TARGET, sequence_length=LENGTH, alignment=PROBES)

    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", mixture(), net=gpt2(), **saving)
    whole.train()
    for step in (4, 6):  # between two updates and within an epoch; after an update and at the end of one
        resumed = trainer(tmp_path / "resumed", mixture(), net=gpt2(), **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == STEPS
        assert_same_bits(resumed.model, whole.model)
        assert updates(resumed) == updates(whole)


def test_what_is_no_checkpoint_of_this_mixture_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, online({"policy": "dga"}), save_strategy="steps", save_steps=4, max_steps=4)
    run.train()
    with pytest.raises(CheckpointError, match=r"another mixture \(policy.eta: 5.0 before, 1.0 now\)"):
        trainer(tmp_path, online({"policy": "dga", "eta": 1.0})).train(resume_from_checkpoint=True)
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    saved = state["stateful_callbacks"]["MixtureCallback"]["attributes"]["saved"]
    saved["sampler"]["step"] = 3
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="contradicts itself"):
        trainer(tmp_path, online({"policy": "dga"})).train(resume_from_checkpoint=True)
    del saved["sampler"]
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="cannot be read: 'sampler' is missing"):
        trainer(tmp_path, online({"policy": "dga"})).train(resume_from_checkpoint=True)
    state["stateful_callbacks"].pop("MixtureCallback")
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="no state of a mixture"):
        trainer(tmp_path, online({"policy": "dga"})).train(resume_from_checkpoint=True)


def test_training_ends_when_the_domains_are_used_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = {name: ArraySource(SOURCES[name].read(0, 8 * LENGTH + 1)) for name in NAMES}
    mixture = OnlineMixture.of(short, "uniform", sequence_length=LENGTH, exhaustion="drop", max_epochs=2)
    run = trainer(tmp_path, mixture, save_strategy="steps", save_steps=100)
    with caplog.at_level(logging.WARNING, logger="weftlm"):
        run.train()
    assert run.state.global_step == 6  # 48 sequences, 8 a step
    assert "training ends at step 6" in caplog.text
    assert (tmp_path / "checkpoint-6").is_dir()


# -- the model is left alone ------------------------------------------------------------------------------------------


def test_an_update_leaves_gradients_optimizer_modes_and_random_numbers_as_they_were() -> None:
    net = gpt2()
    net.transformer.h[0].eval()
    optimizer = torch.optim.AdamW(net.parameters())
    run = OnlineRun(online({"policy": "dga", "update_every_steps": 1}), net, Share(batch_sequences=4, micro_batch=4))
    tokens_BT1 = run.take()
    net(input_ids=tokens_BT1, labels=tokens_BT1).loss.backward()
    optimizer.step()
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    moments = [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()]
    modes, weights = [module.training for module in net.modules()], weights_of(net)
    random = torch.get_rng_state()
    update = run.end_step(optimizer, 1.0)
    assert update is not None
    assert update.alignment is not None
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p.grad, before) for p, before in zip(net.parameters(), gradients, strict=True))
    for state, before in zip(optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(state[key], value) for key, value in before.items())
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(weights[name], tensor) for name, tensor in net.state_dict().items())


# -- misuse -----------------------------------------------------------------------------------------------------------

MISUSE: list[tuple[dict[str, Any], str]] = [
    ({"train_sampling_strategy": "group_by_length"}, "the mixture decides the order"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
    ({"data_collator": DataCollatorWithFlattening(return_flash_attn_kwargs=False)}, "one row per sequence"),
    ({"net": gpt2(positions=LENGTH)}, "set sequence_length to 15"),
    ({"callbacks": []}, "give it callbacks="),
    ({"callbacks": [MixtureCallback]}, r"give the trainer callbacks=\[MixtureCallback\(mixture\)\]"),
    ({"restore_callback_states_from_checkpoint": True}, "resume_from_checkpoint restores the mixture"),
    ({"callbacks": [MixtureCallback(online({"policy": "uniform"}))]}, "of the same mixture"),
]


@pytest.mark.parametrize(("changes", "message"), MISUSE, ids=[message for _, message in MISUSE])
def test_misuse_is_told_what_to_do(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, online({"policy": "uniform"}), **changes).train()


def test_a_dataset_of_another_kind_is_refused(tmp_path: Path) -> None:
    mixture, examples = online({"policy": "uniform"}), [{"input_ids": [1, 2], "labels": [1, 2]}] * 8
    run = Trainer(model(), quiet(tmp_path), train_dataset=examples, callbacks=[MixtureCallback(mixture)])
    with pytest.raises(ConfigError, match="MixtureCallback needs train_dataset="):
        run.train()


def test_a_callback_given_too_late_is_refused(tmp_path: Path) -> None:
    short = {name: ArraySource(SOURCES[name].read(0, 8 * LENGTH + 1)) for name in NAMES}
    mixture = OnlineMixture.of({"a": short["a"], "b": TARGET}, "uniform", sequence_length=LENGTH)
    run = trainer(tmp_path, mixture, callbacks=[])
    run.add_callback(MixtureCallback(mixture))
    with pytest.raises(ConfigError, match="to the trainer's constructor"):
        run.train()


def test_the_dataset_shows_one_example_and_cannot_be_prepared() -> None:
    dataset = online({"policy": "uniform"}).dataset
    example = next(iter(dataset))
    assert example["input_ids"] == example["labels"] == SOURCES["a"].read(0, LENGTH + 1).tolist()
    assert len(dataset) == dataset.num_rows == 3 * (3999 // LENGTH)
    with pytest.raises(ConfigError, match="skip_prepare_dataset"):
        dataset.map(lambda row: row)
    with pytest.raises(ConfigError, match="skip_prepare_dataset"):
        dataset.shuffle(seed=0)


def test_a_model_that_gives_no_loss_per_token_is_refused_by_policies_that_need_it() -> None:
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ConfigError, match="gave no logits"):
        _token_losses(SimpleNamespace(logits=None), tokens)
    with pytest.raises(ConfigError, match=r"gave logits of shape \(2, 8, 3\) for a batch of \(2, 5\)"):
        _token_losses(SimpleNamespace(logits=torch.zeros(2, 8, 3)), tokens)
    losses = _token_losses(SimpleNamespace(logits=torch.zeros(2, 5, 3)), tokens)
    assert torch.allclose(losses, torch.full((2, 4), 3.0).log())


def test_micro_batches_must_all_be_trained_on_once() -> None:
    net = model()
    run = OnlineRun(online({"policy": "group_dro"}), net, Share(batch_sequences=4, micro_batch=2))
    run.take()
    with pytest.raises(ConfigError, match="1 micro-batches short and 1 without losses"):
        run.end_step(None)
    run = OnlineRun(online({"policy": "uniform"}), net, Share(batch_sequences=4, micro_batch=4))
    run.take()
    with pytest.raises(ConfigError, match="more micro-batches were asked for in step 0"):
        run.take()
    run = OnlineRun(online({"policy": "group_dro"}), net, Share(batch_sequences=4, micro_batch=4))
    with pytest.raises(ConfigError, match="more often than it was given batches"):
        run.observe(lambda tokens: tokens.float())


# -- what a mixture is made of ----------------------------------------------------------------------------------------


def test_prepared_data_bring_their_target_and_its_histogram(tmp_path: Path) -> None:
    write_corpora(tmp_path)
    section = {
        "corpora": [{"path": str(tmp_path / f"{name}.jsonl"), "label": name} for name in WORDS],
        "target": [{"path": str(tmp_path / "target.jsonl")}],
        "tokenizer": {"train": {"vocab_size": 300}},
    }
    data = prepare(validate(DataConfig, section, "data"), tmp_path / "data", progress=False)
    mixture = OnlineMixture.of(tmp_path / "data", {"policy": "dga", "initial": "importance"}, sequence_length=LENGTH)
    assert set(mixture.task.domains) == set(WORDS)
    assert mixture.task.target is not None
    assert mixture.task.target.fingerprint == data.target_train.fingerprint
    assert OnlineMixture.of(data, target=TARGET, sequence_length=LENGTH).task.target is TARGET
    run = OnlineRun(mixture, mixtures.model(vocab_size=300), Share(batch_sequences=4, micro_batch=4))
    assert max(run.weights(), key=run.weights().__getitem__) == "sailing"


def test_a_policy_gets_what_it_needs_or_says_so() -> None:
    with pytest.raises(ConfigError, match="give target="):
        OnlineMixture.of(SOURCES, "dga", sequence_length=LENGTH)
    with pytest.raises(ConfigError, match="give reference="):
        OnlineMixture.of(SOURCES, "doremi", sequence_length=LENGTH)
