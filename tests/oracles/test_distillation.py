"""Distilled students against brute force: all texts of small Markov chains, best routers, switching domains."""

import functools

import numpy as np
import pytest
import torch
from support.distillation import Language
from support.gating import kl, normalised

from weftlm.distillation.config import DistilConfig
from weftlm.distillation.structural import distil_structural, student_kl
from weftlm.gating import FitConfig, channel_capacity, fit_robust_gate
from weftlm.gating.arrays import entropies
from weftlm.gating.bayes import BayesGate
from weftlm.gating.linear import ConstantGate
from weftlm.gating.problem import evaluate, make_problem

FULL = DistilConfig(steps=200, batch_sequences=None, lr=0.04)


@functools.lru_cache
def robust(seed, gate, length=4):
    """A language, the robust gate of a kind over domains near the experts, and the gated model's distribution."""
    language = Language(seed, length=length)
    noise = np.random.default_rng(seed).normal(size=language.q_XE.T.shape)
    P = normalised(language.q_XE.T * np.exp(0.7 * noise))
    config = FitConfig(steps=300, best_response_steps=0)
    domains = [language.support(p) for p in P]
    fit = fit_robust_gate(domains, language.enumerated(), gate=gate, offsets=entropies(P), config=config)
    return language, fit.gate, normalised(language.model(fit.gate))


@pytest.mark.parametrize("gate", ["constant", "linear", "tabular"])
def test_the_divergence_is_that_of_brute_force(gate):
    language, teacher, pi = robust(0, gate)
    student = BayesGate.of([0.2, 0.5, 0.3])
    found, error = student_kl(teacher, student, language.enumerated())
    assert found == pytest.approx(kl(pi, language.causal_model(student)), rel=1e-9)
    assert error == 0.0
    sampled, error = student_kl(teacher, student, language.draws(4000, 1))
    assert abs(sampled - found) < 4 * error


@pytest.mark.parametrize("length", [4, 6])
def test_a_constant_gates_student_is_the_best_router_there_is(length):
    language = Language(1, length=length)
    teacher = ConstantGate.of([0.5, 0.2, 0.3])
    best = language.best_router(teacher)
    assert language.routed(best) == pytest.approx(language.model(teacher), rel=1e-10)
    found = distil_structural(teacher, language.enumerated(), config=FULL.model_copy(update={"steps": 20}))
    assert found.gate.log_weights(language.features).exp().numpy() == pytest.approx(best, abs=1e-3)
    assert found.kl < 1e-6


@functools.lru_cache
def full_student(seed, gate):
    language, teacher, _ = robust(seed, gate)
    return distil_structural(teacher, language.enumerated(), config=FULL)


@pytest.mark.parametrize(("seed", "gate", "slack"), [(0, "linear", 3e-3), (1, "linear", 3e-3), (0, "tabular", 1.0)])
def test_a_student_comes_near_the_best_weights_at_every_prefix(seed, gate, slack):
    language, teacher, pi = robust(seed, gate)
    optimum = kl(pi, language.routed(language.optimal_router(pi, updates=600)))
    follows = kl(pi, language.routed(language.best_router(teacher)))
    found = full_student(seed, gate)
    student = language.causal_model(found.gate)
    assert student.sum() == pytest.approx(1.0, rel=1e-10)
    assert found.kl == pytest.approx(kl(pi, student), rel=1e-9)
    # The router that follows who wrote the prefix is not the best one, and the student passes it.
    assert optimum - 1e-6 <= found.kl < optimum + slack
    assert found.kl < follows
    assert found.kl < found.history[0].kl


def test_mini_batches_of_samples_come_near_the_enumerated_student():
    language, teacher, pi = robust(0, "linear")
    config = DistilConfig(steps=200, lr=0.03, batch_sequences=128)
    found = distil_structural(teacher, language.draws(6000, 0), config=config)
    truth = kl(pi, language.causal_model(found.gate))
    assert truth < kl(pi, language.routed(language.best_router(teacher)))
    fresh, error = student_kl(teacher, found.gate, language.draws(6000, 9))
    assert abs(fresh - truth) < 4 * error
    assert abs(found.held_out_kl - truth) < 4 * found.held_out_error


def test_permuting_the_experts_permutes_the_student():
    order = [2, 0, 1]
    language = Language(0, length=4)
    start, step = language.chains
    other = Language(0, length=4, chains=(start[order], step[order]))
    table = torch.randn(len(language.texts), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config = DistilConfig(steps=20, batch_sequences=None, precision="float64", evaluate_every_steps=10)
    students = []
    for one, columns in ((language, [0, 1, 2]), (other, order)):
        domains = [one.support(p) for p in one.q_XE.T]
        fitted = fit_robust_gate(domains, one.enumerated(), gate="tabular", config=FitConfig(steps=1)).gate
        teacher = fitted.replaced({"logits_XE": table[:, columns]})
        students.append(distil_structural(teacher, one.enumerated(), config=config))
    assert students[1].kl == pytest.approx(students[0].kl, abs=1e-6)
    weights = [student.gate.log_weights(one.features) for student, one in zip(students, (language, other), strict=True)]
    torch.testing.assert_close(weights[1], weights[0][..., order], atol=1e-4, rtol=1e-4)


def test_one_expert_per_token_comes_near_the_best_choice_at_every_prefix():
    language, teacher, pi = robust(0, "linear")
    best = kl(pi, language.routed(language.best_single(pi)))
    full = full_student(0, "linear")
    longer = FULL.model_copy(update={"steps": 500, "lr": 0.03})
    one, two = (
        distil_structural(teacher, language.enumerated(), student=full.gate.with_top(top), config=config)
        for top, config in ((1, longer), (2, FULL))
    )
    assert best - 1e-6 <= one.kl < best + 0.04
    assert one.kl < one.history[0].kl - 0.05
    assert full.kl < two.kl < two.history[0].kl
    assert two.kl < one.kl


@pytest.mark.slow
def test_where_domains_switch_midway_the_direct_gate_beats_the_distilled_one_and_that_its_teacher():
    language = Language(0, experts=2, length=6)
    q_XTE = language.logp_XTE.exp().numpy()
    switched = [np.concatenate([q_XTE[:, :3, a], q_XTE[:, 3:, 1 - a]], axis=1).prod(axis=1) for a in (0, 1)]
    P = np.stack([*language.q_XE.T, *switched])
    domains = [language.support(p, name) for p, name in zip(P, ("a", "b", "ab", "ba"), strict=True)]
    offsets = entropies(P)
    problem = make_problem(domains, offsets=offsets)

    def worst(gate, steps=1, samples=None, **changes):
        config = FitConfig(steps=steps, best_response_steps=0, **changes)
        fit = fit_robust_gate(domains, samples, gate=gate, offsets=offsets, config=config)
        return fit, fit.worst if samples else evaluate(fit.gate, problem).worst

    teacher, teachers = worst("tabular", 150, language.enumerated(), lr=0.1)
    student = distil_structural(teacher.gate, language.enumerated(), config=FULL.model_copy(update={"steps": 60}))
    direct, found = worst({"gate": "prefix", "base": "fixed_share", "share": 0.1}, 150, lr=0.03, eta=0.15)
    untrained = min(worst(gate)[1] for gate in ("bayes", "fixed_share", {"gate": "fixed_share", "share": 1.0}))
    assert direct.z == 1.0
    assert found < evaluate(student.gate, problem).worst - 0.3
    assert found < teachers - 0.3
    assert found < untrained - 0.1
    assert channel_capacity(P).value <= found < channel_capacity(P).value + 0.1
