"""Distillation of gates: weights of samples, stopping, resumption, real text, refusals."""

import dataclasses
import math
import os
import signal

import numpy as np
import pytest
import torch
from support.distillation import Language
from support.faults import stopped
from support.gating import kl

from weftlm.distillation import structural
from weftlm.distillation.config import DistilConfig
from weftlm.distillation.structural import DistilState, distil_structural, student_kl, weigh
from weftlm.errors import CheckpointError, ConfigError, DataError, NumericsError
from weftlm.gating import Features, ScoredSequences
from weftlm.gating.bayes import BayesGate
from weftlm.gating.constant import ConstantGate
from weftlm.gating.gate import init_gate

QUICK = DistilConfig(steps=20, batch_sequences=16, evaluate_every_steps=5, patience=None)


@pytest.fixture(scope="module")
def language():
    return Language(0, length=4)


def linear(language, size=0.3, seed=0):
    """A linear gate that is no constant, not normalised."""
    gate = init_gate("linear", language.experts, language.features)
    generator = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(gate.tensors["weight_EF"].shape, generator=generator, dtype=torch.float64)
    return gate.replaced({"weight_EF": weight})


@pytest.mark.parametrize("weighting", ["gate", "balance"])
def test_weights_make_the_experts_texts_the_gated_models(language, weighting):
    gate = linear(language)
    pi = language.model(gate)
    found = weigh(gate, language.enumerated(), weighting=weighting)
    assert found.z == pytest.approx(pi.sum(), rel=1e-12)
    places = torch.cat([one.features.points_B for one in found.samples])
    total = torch.zeros(len(pi), dtype=torch.float64).index_add(0, places, found.mass_B)
    assert total.numpy() == pytest.approx(pi, rel=1e-10)
    assert found.exact
    assert found.log_model_B.exp().numpy() == pytest.approx(pi[places], rel=1e-10)


def test_both_weightings_are_unbiased_and_balance_is_the_less_noisy(language):
    gate, student = linear(language), BayesGate.of([0.2, 0.3, 0.5])
    pi = language.model(gate)
    truth = kl(pi / pi.sum(), language.causal_model(student))
    found = {
        weighting: np.array(
            [student_kl(gate, student, language.draws(400, seed), weighting=weighting) for seed in range(40)]
        )
        for weighting in ("gate", "balance")
    }
    for values, errors in (each.T for each in found.values()):
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(40)
        assert 0.8 < errors.mean() / values.std() < 1.25
    assert found["balance"][:, 1].mean() < found["gate"][:, 1].mean()


def test_unequal_numbers_of_samples_are_balanced(language):
    gate = linear(language)
    draws = language.draws(3000, 0)
    uneven = [draws[0], draws[1].rows(torch.arange(400)), draws[2].rows(torch.arange(1500))]
    assert weigh(gate, uneven).z == pytest.approx(language.model(gate).sum(), abs=0.03)


def test_clusters_widen_the_error(language):
    gate, student = linear(language), BayesGate.of([0.2, 0.3, 0.5])
    twice = [one.rows(torch.arange(len(one)).repeat(4)) for one in language.draws(200, 1)]
    clustered = [dataclasses.replace(one, clusters_N=torch.arange(len(one)) % 200) for one in twice]
    (plain_kl, plain), (same_kl, wide) = (student_kl(gate, student, each) for each in (twice, clustered))
    assert same_kl == pytest.approx(plain_kl)
    assert wide == pytest.approx(2 * plain, rel=0.02)


def test_a_causal_teacher_has_no_divergence_from_itself(language):
    teacher = BayesGate.of([0.2, 0.3, 0.5])
    assert student_kl(teacher, teacher, language.enumerated()) == (pytest.approx(0.0, abs=1e-12), 0.0)
    with pytest.raises(ConfigError, match="use 'balance'"):
        weigh(teacher, language.enumerated(), weighting="gate")


def test_a_constant_gates_student_is_exact_before_training_and_after(language):
    gate = ConstantGate.of([0.6, 0.1, 0.3])
    for batch in (None, 16):
        config = DistilConfig(steps=200, batch_sequences=batch, patience=None)
        found = distil_structural(gate, language.enumerated(), config=config)
        assert found.history[0].kl == pytest.approx(0.0, abs=1e-6)
        assert found.kl < 1e-6
        last = found.state.student
        assert kl(language.model(gate), language.causal_model(last.to("cpu", torch.float64))) < 1e-3
    untrained = distil_structural(gate, language.enumerated(), config=QUICK, until=0)
    assert untrained.step == 0
    torch.testing.assert_close(
        untrained.gate.log_weights(language.features).exp(),
        BayesGate.of([0.6, 0.1, 0.3]).log_weights(language.features).exp(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_best_student_is_kept_and_training_stops(language):
    gate = ConstantGate.of([0.6, 0.1, 0.3])
    config = DistilConfig(steps=500, batch_sequences=2, lr=0.2, evaluate_every_steps=3, patience=4)
    seen = []
    found = distil_structural(
        gate, language.draws(200, 0), config=config, on_progress=lambda line, state: seen.append((line, state.step))
    )
    assert found.state.step < 200
    assert found.state.finished
    assert [line for line, _ in seen] == list(found.history)
    assert [step for _, step in seen] == [line.step for line in found.history]
    best = min(found.history, key=lambda line: line.kl)
    assert (found.step, found.held_out_kl) == (best.step, pytest.approx(best.kl, abs=1e-9))
    assert found.held_out_error == pytest.approx(best.error, rel=1e-6)
    assert not found.exact


def test_an_error_that_one_sequence_cannot_give_is_kept(tmp_path, language):
    state = distil_structural(linear(language), language.draws(20, 0), config=QUICK, until=5).state
    first, *rest = state.history
    alone = dataclasses.replace(state, history=(dataclasses.replace(first, error=math.nan), *rest))
    alone.save(tmp_path / "state.safetensors")
    read = DistilState.load(tmp_path / "state.safetensors").history
    assert math.isnan(read[0].error)
    assert read[1:] == tuple(rest)


@pytest.mark.parametrize("batch", [None, 16])
def test_stopped_and_continued_is_as_never_stopped(tmp_path, language, batch):
    gate, samples = linear(language), language.draws(100, 0)
    config = QUICK.model_copy(update={"batch_sequences": batch})
    whole = distil_structural(gate, samples, config=config)
    path = tmp_path / "state.safetensors"
    distil_structural(gate, samples, config=config, until=8).state.save(path)
    middle = distil_structural(gate, samples, config=config, state=DistilState.load(path), until=13)
    middle.state.save(path)
    again = distil_structural(gate, samples, config=config, state=DistilState.load(path))
    assert again.history == whole.history
    assert (again.kl, again.held_out_kl, again.step) == (whole.kl, whole.held_out_kl, whole.step)
    for name, tensor in whole.gate.tensors.items():
        assert torch.equal(again.gate.tensors[name], tensor)
    other = config.model_copy(update={"lr": 0.5})
    with pytest.raises(CheckpointError, match="start afresh"):
        distil_structural(gate, samples, config=other, state=DistilState.load(path))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="torn"):
        DistilState.load(path)


def test_the_seed_decides_everything(language):
    gate, samples = linear(language), language.draws(100, 0)
    one, same, other = (
        distil_structural(gate, samples, config=QUICK.model_copy(update={"seed": seed})) for seed in (1, 1, 2)
    )
    assert one.history == same.history
    assert one.history != other.history


def test_real_text_pulls_the_student_towards_its_domain(language):
    gate = ConstantGate.of([1 / 3] * 3)
    real = {"own": language.support(language.q_XE[:, 1], "own"), "other": language.support(language.q_XE[:, 2])}
    config = DistilConfig(steps=150, batch_sequences=None, real_fraction=0.8, lr=0.05, patience=None)
    found = distil_structural(gate, language.enumerated(), real=real, lam=[1.0, 0.0], config=config)
    assert kl(language.q_XE[:, 1], language.causal_model(found.gate)) < 0.5 * kl(
        language.q_XE[:, 1], language.model(gate)
    )
    assert found.step > 0
    assert found.kl > 0.01
    drawn = [one.draws(100, 3)[1] for one in (language, language)]
    assert distil_structural(gate, language.draws(100, 0), real=drawn, config=config, until=5).state.step == 5
    for wrong in ({"real": real, "config": QUICK}, {"config": config}):
        with pytest.raises(ConfigError, match="both or neither"):
            distil_structural(gate, language.enumerated(), **wrong)


def test_samples_of_different_lengths_and_masks_train_together(language):
    longer = Language(0, length=5)
    gate = ConstantGate.of([0.5, 0.2, 0.3])
    draws = [language.draws(60, 0)[0], longer.draws(60, 1)[1], longer.draws(60, 2)[2]]
    mask = torch.ones(60, 5, dtype=torch.bool)
    draws[2] = dataclasses.replace(
        draws[2],
        features=dataclasses.replace(draws[2].features, mask_BT=mask, sequence_BF=None, points_B=None, names=()),
    )
    found = distil_structural(gate, draws, config=QUICK)
    assert math.isfinite(found.kl)


def test_a_student_of_another_kind_and_one_to_go_on_from(language):
    gate = ConstantGate.of([0.6, 0.1, 0.3])
    config = DistilConfig(steps=400, batch_sequences=None, lr=0.05, precision="float64")
    found = distil_structural(gate, language.enumerated(), student="bayes", config=config)
    assert found.kl < 1e-4
    assert isinstance(found.gate, BayesGate)
    on = distil_structural(gate, language.enumerated(), student=found.gate, config=QUICK)
    assert on.kl <= found.kl + 1e-6
    still = distil_structural(gate, language.enumerated(), student="causal_uniform", config=QUICK)
    assert still.state.step == 0
    pi = language.model(gate)
    assert still.kl == pytest.approx(kl(pi, language.routed(np.full(language.logp_XTE.shape, 1 / 3))))


def test_samples_that_no_expert_drew_are_noticed(language, caplog):
    gate, draws = linear(language), language.draws(400, 0)
    distil_structural(gate, draws, config=QUICK)
    assert not caplog.records
    greedy = language.logq_XE.argmax(dim=0)
    same = [language.scored(torch.full((400,), int(x))) for x in greedy]
    same = [dataclasses.replace(one, logq_NE=one.logq_NE - torch.tensor([2.0, 0.0, 0.0])) for one in same]
    distil_structural(ConstantGate.of([0.9, 0.05, 0.05]), same, config=QUICK)
    assert "temperature 1" in caplog.text


def test_refusals(language):
    gate, samples = ConstantGate.of([0.6, 0.1, 0.3]), language.draws(30, 0)
    with pytest.raises(ConfigError, match="not causal"):
        distil_structural(gate, samples, student="linear", config=QUICK)
    with pytest.raises(ConfigError, match="samples of 2 experts"):
        distil_structural(gate, samples[:2], config=QUICK)
    with pytest.raises(ConfigError, match="all of one kind"):
        weigh(gate, [*samples[:2], language.enumerated()[2]])
    bare = [ScoredSequences.of(one.logq_NE, tokens_N=one.tokens_N) for one in samples]
    with pytest.raises(ConfigError, match="logp_BTE"):
        distil_structural(gate, bare, config=QUICK)
    with pytest.raises(DataError, match="cannot be split"):
        distil_structural(gate, language.draws(1, 0), config=QUICK)
    dead = torch.full((4, 2, 3), -1.0, dtype=torch.float64)
    dead[:, :, 0] = -math.inf
    tokens = ScoredSequences.of(dead.sum(dim=1), features=Features(logp_BTE=dead))
    with pytest.raises(NumericsError, match="no probability"):
        student_kl(gate, BayesGate.of([1.0, 0.0, 0.0]), [tokens] * 3)


def test_a_distillation_that_is_asked_to_stop_keeps_its_last_step(tmp_path, language, monkeypatch):
    gate, samples = linear(language), language.draws(100, 0)
    whole = distil_structural(gate, samples, config=QUICK)
    step, path = structural._step, tmp_path / "state.safetensors"

    def asked(state, *rest):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(structural, "_step", asked)
        stopped(lambda: distil_structural(gate, samples, config=QUICK, on_stop=lambda state: state.save(path)))
    assert DistilState.load(path).step == 3
    again = distil_structural(gate, samples, config=QUICK, state=DistilState.load(path))
    assert (again.history, again.kl) == (whole.history, whole.kl)
