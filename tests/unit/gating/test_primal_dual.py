"""Fitting: units, offsets, progress, states, early stopping, refusals."""

import math
import os
import signal

import numpy as np
import pytest
import torch
from support.faults import stopped
from support.gating import random_problem, reference

from weftlm.errors import CheckpointError, ConfigError, DataError, NumericsError
from weftlm.gating import (
    Box,
    Features,
    FitConfig,
    FitState,
    ScoredSequences,
    fit_robust_gate,
    primal_dual,
)
from weftlm.gating.gate import init_gate
from weftlm.gating.linear import ConstantGate
from weftlm.gating.primal_dual import _Draw
from weftlm.gating.problem import dual_value, evaluate, make_problem
from weftlm.gating.sequences import sequence_features

SHORT = FitConfig(steps=20, report_every_steps=10, best_response_steps=5)
HALF = ConstantGate.of([0.5, 0.5])


def sets(seed, count=40, experts=2, tokens=8, gap=1.0):
    """Sequences of as many domains as experts, each likelier under its own expert."""
    r = np.random.default_rng(seed)
    found = []
    for k in range(experts):
        logq = r.normal(-20.0, 2.0, size=(count, 1)) + r.normal(0.0, 1.0, size=(count, experts))
        logq[:, k] += gap
        found.append(ScoredSequences.of(logq, tokens_N=[tokens] * count, name=f"set {k}"))
    return found


def same(one, other):
    assert (other.history, other.worst, other.mu) == (one.history, one.worst, one.mu)
    assert all(torch.equal(other.gate.tensors[name], tensor) for name, tensor in one.gate.tensors.items())


def test_the_penalty_of_mini_batches_is_the_square_on_average():
    problem = make_problem(sets(0), sets(1, count=60))
    gate = init_gate("linear", 2, Features.joined([one.features for one in problem.samples]))
    tilt = torch.tensor([[0.0] * 4, [0.0, 0.0, -9.0, 9.0]], dtype=torch.float64)
    gate = gate.replaced({"weight_EF": tilt})
    draw = _Draw(problem, gate, FitConfig(batch_sequences=2, batch_samples=6))
    drawn = [draw.losses(gate, step, torch.ones(2, dtype=torch.float64))[1:] for step in range(800)]
    z, penalty = (torch.stack(each).numpy() for each in zip(*drawn, strict=True))
    truth = evaluate(gate, problem).z
    assert abs(z.mean() - truth) < 4 * z.std() / math.sqrt(800)
    assert abs(penalty.mean() - (truth - 1.0) ** 2) < 4 * penalty.std() / math.sqrt(800)
    assert ((z - 1.0) ** 2).mean() > (truth - 1.0) ** 2 + 4 * penalty.std() / math.sqrt(800)  # as one would have it


def test_tokens_divide_each_domain_by_its_own_length():
    domains = [
        ScoredSequences.of([[-10.0, -12.0], [-30.0, -36.0]], tokens_N=[10, 30]),
        ScoredSequences.of([[-9.0, -6.0]], tokens_N=[3]),
    ]
    found = evaluate(HALF, make_problem(domains, sets(1), unit="token", offsets="none"))
    ce = [-np.logaddexp(-10, -12) - np.logaddexp(-30, -36) + 2 * math.log(2), -np.logaddexp(-9, -6) + math.log(2)]
    assert found.ce_D == pytest.approx([ce[0] / 40, ce[1] / 3])
    own = make_problem(domains, sets(1), unit="token")
    assert own.offsets_D * own.report == pytest.approx([1.0, 2.0])
    given = make_problem(domains, sets(1), unit="token", offsets=[1.0, 2.0])
    assert given.offsets_D == pytest.approx(own.offsets_D)
    configs = [SHORT.model_copy(update={"unit": unit}) for unit in ("sequence", "token")]
    by_sequence, by_token = (fit_robust_gate(sets(0), sets(1), config=config) for config in configs)
    assert by_token.worst * 8 == pytest.approx(by_sequence.worst, rel=1e-9)
    assert by_token.lam == pytest.approx(by_sequence.lam, rel=1e-9)
    assert by_token.gap * 8 == pytest.approx(by_sequence.gap, rel=1e-6)


@pytest.mark.parametrize("batch", [None, 8])
def test_minus_infinity_is_legal(batch):
    domains = sets(0)
    logq = domains[0].logq_NE.clone()
    logq[:5, 1] = -math.inf
    domains[0] = ScoredSequences.of(logq, tokens_N=domains[0].tokens_N)
    fit = fit_robust_gate(domains, sets(1), config=SHORT.model_copy(update={"batch_sequences": batch}))
    assert math.isfinite(fit.worst)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in fit.gate.tensors.values())


def test_a_state_of_another_fit_is_refused(tmp_path):
    state = fit_robust_gate(sets(0), sets(1), config=SHORT, until=5).state
    assert state.step == 5
    with pytest.raises(CheckpointError, match=r"another config \(steps: 20 before, 30 now"):
        fit_robust_gate(sets(0), sets(1), config=SHORT.model_copy(update={"steps": 30}), state=state)
    with pytest.raises(CheckpointError, match="mixes 2"):
        fit_robust_gate(sets(0, experts=3), sets(1, experts=3), config=SHORT, state=state)
    path = tmp_path / "state.safetensors"
    state.save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="torn"):
        FitState.load(path)


DEAD = ScoredSequences.of([[-1.0, -1.0], [-math.inf, -math.inf]], features=Features(2), name="dead")
HALF_DEAD = ScoredSequences.of([[-math.inf, -1.0]], features=Features(1), name="half")


@pytest.mark.parametrize(
    ("domains", "samples", "options", "error", "match"),
    [
        ([], sets(1), {}, DataError, "no domain came"),
        ({"a": np.zeros((3, 2))}, sets(1), {}, ConfigError, r"domain a is ndarray.*ScoredSequences\.of"),
        (sets(0), sets(1)[:1], {}, ConfigError, "samples of 1 experts came for 2"),
        (sets(0), None, {}, ConfigError, "Z must be measured"),
        (sets(0), sets(1, experts=3), {}, ConfigError, "scored by 3 experts"),
        (sets(0)[:1] * 3, sets(1), {}, ConfigError, "each domain's own expert"),
        (sets(0), sets(1), {"offsets": "own"}, ConfigError, "allowed: 'expert'"),
        (sets(0), sets(1), {"offsets": "entropy"}, ConfigError, "enumerated domains"),
        (np.eye(2), None, {}, ConfigError, "array Q"),
        (np.eye(2), np.eye(2), {"mixtures": Box(0.2)}, ConfigError, "give the extreme mixtures"),
        ([ScoredSequences.of([[0.0, 0.0]])], sets(1), {"config": FitConfig(unit="token")}, ConfigError, "tokens_N"),
        (sets(0), sets(1), {"config": FitConfig(batch_samples=1)}, ConfigError, "two halves"),
        (sets(0), sets(1), {"gate": ConstantGate.of([0.2, 0.3, 0.5])}, ConfigError, "over 3 experts"),
        ([DEAD], sets(1), {"own_experts": [0]}, DataError, "dead: 1 of 2 sequences"),
        ([HALF_DEAD], sets(1), {"own_experts": [0]}, DataError, "own expert 0"),
        (*random_problem(0), {"config": FitConfig(steps=50, lr=1e308)}, NumericsError, "became"),
    ],
)
def test_what_is_refused(domains, samples, options, error, match):
    with pytest.raises(error, match=match):
        fit_robust_gate(domains, samples, **options)


def test_a_model_that_gives_a_domain_no_probability_is_refused():
    with pytest.raises(NumericsError, match="half: the model's cross-entropy is inf"):
        evaluate(ConstantGate.of([1.0, 0.0]), make_problem([HALF_DEAD], sets(1), offsets="none"))
    with pytest.raises(ConfigError, match="'sequence' or 'token'"):
        make_problem(sets(0), sets(1), unit="byte")


def test_ridge_counts_where_data_are_few_and_not_where_all_is_known():
    few, fresh = (
        (sets(seed, 12, 3, 32, 6.0) for seed in (0, 1)),
        make_problem(*(sets(s, 2000, 3, 32, 6.0) for s in (2, 3))),
    )
    few, values = tuple(few), []
    for ridge in (1.0, 0.0):
        config = FitConfig(steps=300, report_every_steps=300, best_response_steps=0, ridge=ridge)
        values.append(evaluate(fit_robust_gate(*few, gate="linear", config=config).gate, fresh))
    assert values[0].worst < values[1].worst
    assert abs(values[0].z - 1.0) < abs(values[1].z - 1.0)
    P, Q = random_problem(0)
    assert len({fit_robust_gate(P, Q, config=FitConfig(ridge=ridge, steps=50)).worst for ridge in (9.0, 0.0)}) == 1


@pytest.mark.parametrize(("eps", "exact"), [(0.1, 0.320626), (1.0, 0.396852)])
def test_a_fit_stops_once_the_gap_of_what_it_returns_is_within_the_tolerance(eps, exact, tmp_path):
    P, Q = reference(eps)
    config, states = FitConfig(report_every_steps=200, gap_tolerance=4e-3), []
    fit = fit_robust_gate(P, Q, config=config, on_progress=lambda line, state: states.append(state))
    assert fit.state.step == fit.history[-1].step < config.steps
    assert fit.gap == fit.history[-1].duality_gap <= config.gap_tolerance
    assert [line for line in fit.history[:-1] if line.duality_gap is not None and line.duality_gap <= 4e-3] == []
    # of the averages that are returned, by the closed form, and against the convex programme's value
    problem = make_problem(P, Q)
    assert fit.gap == pytest.approx(evaluate(fit.gate, problem).worst - dual_value(problem, fit.nu), abs=1e-12)
    assert -2e-6 <= fit.worst - exact <= fit.gap + 2e-6
    assert abs(fit.z - 1.0) <= config.gap_tolerance
    # killed at the first report, or after the last one, it ends the same
    for number in (0, -1):
        states[number].save(tmp_path / "state")
        same(fit, fit_robust_gate(P, Q, config=config, state=FitState.load(tmp_path / "state")))


def test_a_fit_whose_gap_is_not_measured_stops_where_its_worst_case_stands_still(tmp_path):
    """As the direct gate's: causal, in mini-batches, without best responses."""
    r, domains = np.random.default_rng(0), []
    for good in range(2):
        logp = -2.0 - (np.arange(2) != good) + 0.3 * r.normal(size=(60, 6, 2))
        features = sequence_features(logp.sum(axis=1), [6] * 60, logp_NTE=logp)
        domains.append(ScoredSequences.of(logp.sum(axis=1), features=features, tokens_N=[6] * 60))
    config = FitConfig(steps=400, report_every_steps=10, batch_sequences=20, best_response_steps=0, unit="token")
    states = []
    fit = fit_robust_gate(domains, gate="bayes", config=config, on_progress=lambda line, now: states.append(now))
    worst = [line.worst for line in fit.history]
    assert primal_dual.PLATEAU < len(worst) < 20
    assert min(worst[-3:]) > min(worst[:-3]) - config.gap_tolerance
    assert all(not state.finished for state in states[:-1])
    assert math.isnan(fit.gap)
    states[1].save(tmp_path / "state")
    same(fit, fit_robust_gate(domains, gate="bayes", config=config, state=FitState.load(tmp_path / "state")))


def test_the_adversary_s_share_of_the_gap_stops_no_fit():
    """Of two equal domains every mixture is the worst one, whatever the gate; what the gate could gain is the gap."""
    P, Q = reference(1.0)
    config = FitConfig(steps=60, report_every_steps=20, lr=1e-5, final_lr=1e-5)
    fit = fit_robust_gate(P[[0, 0]], Q, config=config)
    assert fit.state.step == 60
    for line in fit.history:
        assert line.gap == pytest.approx(0.0, abs=1e-12)
        assert line.duality_gap > 0.1


def test_a_fit_that_is_asked_to_stop_keeps_its_last_step(tmp_path, monkeypatch):
    whole = fit_robust_gate(sets(0), sets(1), config=SHORT)
    step, path = primal_dual._step, tmp_path / "state.safetensors"

    def asked(state, **rest):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(state, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(primal_dual, "_step", asked)
        stopped(lambda: fit_robust_gate(sets(0), sets(1), config=SHORT, on_stop=lambda state: state.save(path)))
    assert FitState.load(path).step == 3
    same(whole, fit_robust_gate(sets(0), sets(1), config=SHORT, state=FitState.load(path)))
