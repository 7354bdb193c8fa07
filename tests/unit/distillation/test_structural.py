"""Distillation of gates: weights of samples, stopping, resumption, refusals."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from support.distillation import Language
from support.gating import kl

from weftlm.distillation.config import DistilConfig
from weftlm.distillation.structural import DistilState, distil_structural, student_kl, weigh
from weftlm.errors import CheckpointError, ConfigError, DataError, NumericsError
from weftlm.gating import Features, ScoredSequences
from weftlm.gating.bayes import BayesGate
from weftlm.gating.gate import init_gate
from weftlm.gating.linear import ConstantGate

QUICK = DistilConfig(steps=20, batch_sequences=16, evaluate_every_steps=5, patience=None)
TEACHER = ConstantGate.of([0.6, 0.1, 0.3])


@pytest.fixture(scope="module")
def language():
    return Language(0, length=4)


@pytest.fixture(scope="module")
def linear(language):
    """A linear gate that is no constant, not normalised."""
    gate = init_gate("linear", language.experts, language.features)
    generator = torch.Generator().manual_seed(0)
    weight = 0.3 * torch.randn(gate.tensors["weight_EF"].shape, generator=generator, dtype=torch.float64)
    return gate.replaced({"weight_EF": weight})


def same(one, other):
    assert (other.history, other.kl, other.held_out_kl, other.step) == (one.history, one.kl, one.held_out_kl, one.step)
    assert all(torch.equal(other.gate.tensors[name], tensor) for name, tensor in one.gate.tensors.items())


def test_weights_make_the_experts_texts_the_gated_models(language, linear):
    pi = language.model(linear)
    found = weigh(linear, language.enumerated())
    assert found.z == pytest.approx(pi.sum(), rel=1e-12)
    places = torch.cat([one.features.points_B for one in found.samples])
    total = torch.zeros(len(pi), dtype=torch.float64).index_add(0, places, found.mass_B)
    assert total.numpy() == pytest.approx(pi, rel=1e-10)
    assert found.log_model_B.exp().numpy() == pytest.approx(pi[places], rel=1e-10)
    draws = language.draws(3000, 0)
    uneven = [draws[0], draws[1].rows(torch.arange(400)), draws[2].rows(torch.arange(1500))]
    assert weigh(linear, uneven).z == pytest.approx(pi.sum(), abs=0.03)


def test_divergences_of_samples_are_unbiased_and_so_are_their_errors(language, linear):
    student, pi = BayesGate.of([0.2, 0.3, 0.5]), language.model(linear)
    truth = kl(pi / pi.sum(), language.causal_model(student))
    values, errors = np.array([student_kl(linear, student, language.draws(400, seed)) for seed in range(40)]).T
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(40)
    assert 0.8 < errors.mean() / values.std() < 1.25


def test_clusters_widen_the_error(language, linear):
    student = BayesGate.of([0.2, 0.3, 0.5])
    twice = [one.rows(torch.arange(len(one)).repeat(4)) for one in language.draws(200, 1)]
    clustered = [dataclasses.replace(one, clusters_N=torch.arange(len(one)) % 200) for one in twice]
    (plain_kl, plain), (same_kl, wide) = (student_kl(linear, student, each) for each in (twice, clustered))
    assert same_kl == pytest.approx(plain_kl)
    assert wide == pytest.approx(2 * plain, rel=0.02)
    assert student_kl(student, student, language.enumerated()) == (pytest.approx(0.0, abs=1e-12), 0.0)


def test_a_constant_gates_student_is_exact_before_training_and_after(language):
    for batch in (None, 16):
        config = DistilConfig(steps=100, batch_sequences=batch, patience=None)
        found = distil_structural(TEACHER, language.enumerated(), config=config)
        assert found.history[0].kl == pytest.approx(0.0, abs=1e-6)
        assert found.kl < 1e-6
        last = found.state.gate.to("cpu", torch.float64)
        assert kl(language.model(TEACHER), language.causal_model(last)) < 1e-3
    untrained = distil_structural(TEACHER, language.enumerated(), config=QUICK, until=0)
    assert untrained.step == 0
    expected = BayesGate.of([0.6, 0.1, 0.3]).log_weights(language.features).exp()
    torch.testing.assert_close(untrained.gate.log_weights(language.features).exp(), expected, rtol=1e-5, atol=1e-6)


def test_the_best_student_is_kept_and_training_stops(language):
    config, seen = DistilConfig(steps=500, batch_sequences=2, lr=0.2, evaluate_every_steps=3, patience=4), []
    found = distil_structural(
        TEACHER, language.draws(200, 0), config=config, on_progress=lambda line, state: seen.append((line, state.step))
    )
    assert found.state.step < 200
    assert found.state.finished
    assert seen == [(line, line.step) for line in found.history]
    best = min(found.history, key=lambda line: line.kl)
    assert (found.step, found.held_out_kl) == (best.step, pytest.approx(best.kl, abs=1e-9))
    assert found.held_out_error == pytest.approx(best.error, rel=1e-6)


@pytest.mark.parametrize("batch", [None, 16])
def test_stopped_and_continued_is_as_never_stopped(tmp_path, language, linear, batch):
    samples, config = language.draws(100, 0), QUICK.model_copy(update={"batch_sequences": batch})
    whole = distil_structural(linear, samples, config=config)
    path, state = tmp_path / "state.safetensors", None
    for until in (8, 13):
        distil_structural(linear, samples, config=config, state=state, until=until).state.save(path)
        state = DistilState.load(path)
    same(whole, distil_structural(linear, samples, config=config, state=state))
    with pytest.raises(CheckpointError, match="start afresh"):
        distil_structural(linear, samples, config=config.model_copy(update={"lr": 0.5}), state=state)
    first, *rest = state.history
    dataclasses.replace(state, history=(dataclasses.replace(first, error=math.nan), *rest)).save(path)
    read = DistilState.load(path).history  # an error that a single sequence cannot give
    assert math.isnan(read[0].error)
    assert read[1:] == tuple(rest)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="torn"):
        DistilState.load(path)


def test_a_student_of_another_kind_and_one_to_go_on_from(language):
    config = DistilConfig(steps=400, batch_sequences=None, lr=0.05, precision="float64")
    found = distil_structural(TEACHER, language.enumerated(), student="bayes", config=config)
    assert found.kl < 1e-4
    assert isinstance(found.gate, BayesGate)
    on = distil_structural(TEACHER, language.enumerated(), student=found.gate, config=QUICK)
    assert on.kl <= found.kl + 1e-6


def test_samples_that_no_expert_drew_are_noticed(language, linear, caplog):
    distil_structural(linear, language.draws(400, 0), config=QUICK)
    assert not caplog.records
    greedy = language.logq_XE.argmax(dim=0)
    drawn = [language.scored(torch.full((400,), int(x))) for x in greedy]
    drawn = [dataclasses.replace(one, logq_NE=one.logq_NE - torch.tensor([2.0, 0.0, 0.0])) for one in drawn]
    distil_structural(ConstantGate.of([0.9, 0.05, 0.05]), drawn, config=QUICK)
    assert "temperature 1" in caplog.text


def test_refusals(language):
    samples = language.draws(30, 0)
    bare = [ScoredSequences.of(one.logq_NE, tokens_N=one.tokens_N) for one in samples]
    for changed, options, error, match in (
        (samples, {"student": "linear"}, ConfigError, "not causal"),
        (samples, {"student": TEACHER}, ConfigError, "not causal"),
        (samples[:2], {}, ConfigError, "samples of 2 experts"),
        (bare, {}, ConfigError, "logp_BTE"),
        (language.draws(1, 0), {}, DataError, "cannot be split"),
    ):
        with pytest.raises(error, match=match):
            distil_structural(TEACHER, changed, config=QUICK, **options)
    with pytest.raises(ConfigError, match="all of one kind"):
        weigh(TEACHER, [*samples[:2], language.enumerated()[2]])
    dead = torch.full((4, 2, 3), -1.0, dtype=torch.float64)
    dead[:, :, 0] = -math.inf
    tokens = ScoredSequences.of(dead.sum(dim=1), features=Features(logp_BTE=dead))
    with pytest.raises(NumericsError, match="no probability"):
        student_kl(TEACHER, BayesGate.of([1.0, 0.0, 0.0]), [tokens] * 3)
