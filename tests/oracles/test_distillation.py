"""Distilled students against brute force: all texts of small Markov chains, best routers, switching domains."""

import functools

import numpy as np
import pytest
import torch
from support.distillation import Language
from support.gating import kl, normalised

from weftlm.distillation.config import DistilConfig
from weftlm.distillation.sparse import distil_sparse
from weftlm.distillation.structural import distil_structural, student_kl
from weftlm.gating import FitConfig, channel_capacity, fit_robust_gate
from weftlm.gating.bayes import BayesGate
from weftlm.gating.constant import ConstantGate
from weftlm.gating.exact import entropies
from weftlm.gating.problem import evaluate, make_problem

FULL = DistilConfig(steps=300, batch_sequences=None, lr=0.03)
SHORT = FULL.model_copy(update={"steps": 200, "lr": 0.04})


@functools.lru_cache
def robust(seed, gate, length=5):
    """A language, its domains near the experts, and the robust gate of a kind."""
    language = Language(seed, length=length)
    noise = np.random.default_rng(seed).normal(size=language.q_XE.T.shape)
    P = normalised(language.q_XE.T * np.exp(0.7 * noise))
    domains = [language.support(p) for p in P]
    config = FitConfig(steps=400, best_response_steps=0)
    fit = fit_robust_gate(domains, language.enumerated(), gate=gate, offsets=entropies(P), config=config)
    return language, domains, fit.gate


@pytest.mark.parametrize("gate", ["constant", "linear", "tabular"])
def test_the_divergence_is_that_of_brute_force(gate):
    language, _, teacher = robust(0, gate)
    pi = language.model(teacher)
    student = BayesGate.of([0.2, 0.5, 0.3])
    found, error = student_kl(teacher, student, language.enumerated())
    assert found == pytest.approx(kl(pi / pi.sum(), language.causal_model(student)), rel=1e-9)
    assert error == 0.0
    sampled, error = student_kl(teacher, student, language.draws(4000, 1))
    assert abs(sampled - found) < 4 * error


@pytest.mark.parametrize("length", [4, 6])
def test_a_constant_gates_student_is_the_best_router_there_is(length):
    language = Language(1, length=length)
    teacher = ConstantGate.of([0.5, 0.2, 0.3])
    best = language.best_router(teacher)
    assert language.routed(best) == pytest.approx(language.model(teacher), rel=1e-10)
    found = distil_structural(teacher, language.enumerated(), config=FULL.model_copy(update={"steps": 40}))
    weights = found.gate.log_weights(language.features).exp().numpy()
    assert weights == pytest.approx(best, abs=1e-3)
    assert found.kl < 1e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_the_student_of_a_linear_gate_comes_near_the_best_weights_at_every_prefix(seed):
    language, _, teacher = robust(seed, "linear")
    pi = language.model(teacher)
    pi = pi / pi.sum()
    follows = kl(pi, language.routed(language.best_router(teacher)))
    optimum = kl(pi, language.routed(language.optimal_router(pi, updates=1000)))
    found = distil_structural(teacher, language.enumerated(), config=SHORT)
    student = language.causal_model(found.gate)
    assert student.sum() == pytest.approx(1.0, rel=1e-10)
    assert found.kl == pytest.approx(kl(pi, student), rel=1e-9)
    # The router that follows who wrote the prefix is not the best one, and the student passes it.
    assert optimum - 1e-6 <= found.kl < optimum + 3e-3
    assert found.kl < follows < found.history[0].kl


def test_the_student_of_a_tabular_gate_passes_the_router_of_conditional_weights():
    language, _, teacher = robust(0, "tabular")
    pi = language.model(teacher)
    pi = pi / pi.sum()
    found = distil_structural(teacher, language.enumerated(), config=SHORT)
    assert kl(pi, language.routed(language.optimal_router(pi, updates=1000))) - 1e-6 <= found.kl
    assert found.kl < kl(pi, language.routed(language.best_router(teacher)))


def test_mini_batches_of_samples_come_near_the_enumerated_student():
    language, _, teacher = robust(0, "linear")
    pi = language.model(teacher)
    pi = pi / pi.sum()
    config = DistilConfig(steps=300, lr=0.03, batch_sequences=128)
    found = distil_structural(teacher, language.draws(8000, 0), config=config)
    truth = kl(pi, language.causal_model(found.gate))
    assert truth < kl(pi, language.routed(language.best_router(teacher)))
    fresh, error = student_kl(teacher, found.gate, language.draws(8000, 9))
    assert abs(fresh - truth) < 4 * error
    assert abs(found.held_out_kl - truth) < 4 * found.held_out_error


def test_permuting_the_experts_permutes_the_student():
    language = Language(0, length=4)
    order = [2, 0, 1]
    start, step = language.chains
    other = Language(0, length=4, chains=(start[order], step[order]))
    table = torch.randn(len(language.texts), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config = DistilConfig(steps=40, batch_sequences=None, precision="float64", evaluate_every_steps=10)
    students = []
    for one, columns in ((language, [0, 1, 2]), (other, order)):
        domains = [one.support(p) for p in one.q_XE.T]
        fitted = fit_robust_gate(domains, one.enumerated(), gate="tabular", config=FitConfig(steps=1)).gate
        teacher = fitted.replaced({"logits_XE": table[:, columns]})
        students.append(distil_structural(teacher, one.enumerated(), config=config))
    assert students[1].kl == pytest.approx(students[0].kl, abs=1e-6)
    torch.testing.assert_close(
        students[1].gate.log_weights(other.features),
        students[0].gate.log_weights(language.features)[..., order],
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.slow
def test_one_expert_per_token_comes_near_the_best_choice_at_every_prefix():
    language, _, teacher = robust(0, "linear")
    pi = language.model(teacher)
    pi = pi / pi.sum()
    best = kl(pi, language.routed(language.best_single(pi)))
    full = distil_structural(teacher, language.enumerated(), config=FULL)
    one = distil_sparse(teacher, full.gate, language.enumerated(), 1, config=FULL)
    two = distil_sparse(teacher, full.gate, language.enumerated(), 2, config=FULL)
    assert best - 1e-6 <= one.kl < best + 0.04
    assert one.kl < one.history[0].kl - 0.1
    assert full.kl < two.kl < 0.7 * two.history[0].kl
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
    config = FitConfig(steps=250, lr=0.02, eta=0.1, best_response_steps=0)
    short = FitConfig(steps=250, lr=0.1, best_response_steps=0)
    teacher = fit_robust_gate(domains, language.enumerated(), gate="tabular", offsets=offsets, config=short)
    student = distil_structural(teacher.gate, language.enumerated(), config=FULL.model_copy(update={"steps": 200}))
    section = {"gate": "prefix", "base": "fixed_share", "share": 0.1}
    direct = fit_robust_gate(domains, gate=section, offsets=offsets, config=config)
    untrained = {
        name: evaluate(
            fit_robust_gate(domains, gate=name, offsets=offsets, config=FitConfig(steps=1)).gate, problem
        ).worst
        for name in ("bayes", "fixed_share", "causal_uniform")
    }
    assert direct.z == 1.0
    assert direct.worst < evaluate(student.gate, problem).worst - 0.3
    assert direct.worst < teacher.worst - 0.3
    assert direct.worst < min(untrained.values()) - 0.1
    assert channel_capacity(P).value <= direct.worst < channel_capacity(P).value + 0.1
