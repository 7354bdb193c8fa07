"""Robust gates against the convex programme, published numbers, brute force and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from support.distillation import Language
from support.gating import kl, normalised, random_problem, reference

from weftlm.gating import (
    Box,
    Features,
    FitConfig,
    ScoredSequences,
    best_constant_gate,
    certify,
    channel_capacity,
    enumerated,
    exact_robust_gate,
    fit_robust_gate,
    mixture_regrets,
)
from weftlm.gating.arrays import entropies
from weftlm.gating.bayes import BayesGate, FixedShareGate
from weftlm.gating.gate import init_gate
from weftlm.gating.linear import ConstantGate
from weftlm.gating.primal_dual import best_response
from weftlm.gating.problem import dual_value, evaluate, log_model, make_problem

pytest.importorskip("cvxpy")

# eps: capacity, exact robust gate, best constant gate, Blahut-Arimoto mixture of Q, uniform mixture
TABLE = {
    0.1: (0.320626, 0.320626, 0.324761, 0.338393, 0.375534),
    0.5: (0.320626, 0.323577, 0.412775, 0.469283, 0.479436),
    1.0: (0.320626, 0.396852, 0.625759, 0.741137, 0.739460),
}
each_eps = pytest.mark.parametrize("eps", list(TABLE))


@each_eps
def test_the_reference_table(eps):
    P, Q = reference(eps)
    capacity = channel_capacity(np.log(P))
    found = (
        capacity.value,
        exact_robust_gate(P, Q).value,
        best_constant_gate(P, Q).value,
        mixture_regrets(P, Q, channel_capacity(Q).lam_D).max(),
        mixture_regrets(P, Q, [1 / 3] * 3).max(),
    )
    assert found == pytest.approx(TABLE[eps], abs=2e-6)
    assert capacity.gap <= 1e-9


@each_eps
def test_full_batch_primal_dual_reaches_the_programme(eps):
    P, Q = reference(eps)
    exact = exact_robust_gate(P, Q)
    fit = fit_robust_gate(P, Q, config=FitConfig(steps=2000, gap_tolerance=None))
    assert fit.worst == pytest.approx(TABLE[eps][1], abs=1e-3)
    assert fit.worst >= exact.value - 1e-7
    assert abs(fit.z - 1.0) < 1e-5
    assert fit.lam == pytest.approx(exact.lam, abs=1e-3)
    assert fit.mu == pytest.approx(exact.z_multiplier, abs=1e-3)
    assert fit.gap_kind == "exact"
    assert fit.worst - fit.gap - 1e-7 <= exact.value <= fit.worst + 1e-7


@pytest.mark.slow
def test_the_default_steps_reach_the_reference_figures():
    fit = fit_robust_gate(*reference(0.5), config=FitConfig(gap_tolerance=None))
    assert fit.worst == pytest.approx(0.323578, abs=1.5e-6)
    assert abs(fit.z - 1.0) < 1e-6
    assert fit.lam == pytest.approx([0.306, 0.387, 0.307], abs=1e-3)


@pytest.mark.parametrize(("eps", "batch"), [(0.1, 128), (0.5, 512), (1.0, 256)])
def test_mini_batches_and_sampled_z_come_within_a_hundredth(eps, batch):
    P, Q = reference(eps)
    exact, r = exact_robust_gate(P, Q), np.random.default_rng(1)

    def draws():
        points = [torch.from_numpy(r.choice(40, 40_000, p=q)) for q in Q]
        return [ScoredSequences.of(np.log(Q.T[each]), features=Features(points_B=each)) for each in points]

    domains, _ = enumerated(P, Q)
    config = FitConfig(steps=1000, batch_sequences=batch, batch_samples=max(batch, 256), best_response_steps=0)
    fit = fit_robust_gate(domains, draws(), gate="tabular", offsets=entropies(P), config=config)
    truth = evaluate(fit.gate, make_problem(P, Q))
    assert [truth.worst, fit.worst] == pytest.approx([exact.value] * 2, abs=1e-2)
    assert fit.lam == pytest.approx(exact.lam, abs=1e-2)
    fresh = certify(fit.gate, domains, draws(), offsets=entropies(P)).z
    assert abs(fresh.value - truth.z) < fresh.high - fresh.low < 0.02
    assert math.isnan(fit.gap)


def test_the_dual_by_water_filling_meets_the_programme_at_its_multipliers():
    for seed in range(5):
        P, Q = random_problem(seed, experts=4)
        exact, problem = exact_robust_gate(P, Q), make_problem(P, Q)
        assert dual_value(problem, exact.lam) == pytest.approx(exact.value, abs=1e-6)
        for lam in np.random.default_rng(seed).dirichlet(np.ones(3), size=20):
            assert dual_value(problem, lam) <= exact.value + 1e-7


def test_a_single_mixture_has_its_own_optimum():
    P, Q = random_problem(3)
    mixture = np.array([0.2, 0.5, 0.3])
    alone = exact_robust_gate((mixture @ P)[None], Q)
    exact = exact_robust_gate(P, Q, mixtures=[mixture])
    fit = fit_robust_gate(P, Q, mixtures=[mixture], config=FitConfig(steps=1500))
    assert exact.value == pytest.approx(alone.value, abs=1e-7)
    assert exact.lam == pytest.approx(mixture)
    assert fit.worst == pytest.approx(alone.value, abs=1e-3)
    assert kl(mixture @ P, exact.pi) == pytest.approx(exact.value, abs=1e-9)


def test_vertices_at_the_domains_and_the_whole_box_are_no_restriction():
    P, Q = reference(1.0)
    free, config = exact_robust_gate(P, Q), FitConfig(steps=300)
    unrestricted = fit_robust_gate(P, Q, config=config)
    for mixtures in (np.eye(3), Box(), Box(0.0, 1.0)):
        restricted = exact_robust_gate(P, Q, mixtures=mixtures)
        assert restricted.value == pytest.approx(free.value, abs=1e-7)
        assert restricted.lam == pytest.approx(free.lam, abs=1e-4)
        fit = fit_robust_gate(P, Q, mixtures=mixtures, config=config)
        assert fit.worst == pytest.approx(unrestricted.worst, abs=1e-12)


def test_a_box_binds_as_the_programme_over_its_corners_does():
    P, Q = reference(1.0)
    offsets = entropies(P)
    # All mixtures with weights from (0.1, 0.4, 0.1) to 0.6 are mixtures of these.
    corners = [[0.1, 0.6, 0.3], [0.1, 0.4, 0.5], [0.5, 0.4, 0.1], [0.3, 0.6, 0.1]]
    exact = exact_robust_gate(P, Q, mixtures=corners, offsets=offsets)
    config = FitConfig(steps=2500, eta=0.2, gap_tolerance=None)
    fit = fit_robust_gate(P, Q, mixtures=Box([0.1, 0.4, 0.1], 0.6), offsets=offsets, config=config)
    assert exact.lam[1] == pytest.approx(0.4, abs=1e-3)
    assert fit.worst == pytest.approx(exact.value, abs=1e-3)
    assert fit.lam == pytest.approx(exact.lam, abs=5e-3)
    assert exact.value < exact_robust_gate(P, Q).value
    mixed = fit_robust_gate(P, Q, mixtures=corners, config=config)
    assert mixed.worst == pytest.approx(exact_robust_gate(P, Q, mixtures=corners).value, abs=1e-3)


def test_the_constant_gate_is_fitted_to_the_best_constant():
    P, Q = reference(0.5)
    exact = best_constant_gate(P, Q)
    fit = fit_robust_gate(P, Q, gate="constant", config=FitConfig(steps=2000, gap_tolerance=None))
    assert fit.worst == pytest.approx(exact.value, abs=1e-4)
    assert fit.gate.log_weights(Features(1)).exp()[0].numpy() == pytest.approx(exact.gate[:, 0], abs=1e-2)
    assert fit.z == pytest.approx(1.0, abs=1e-12)
    assert fit.gap_kind == "estimate"
    assert -1e-9 <= fit.gap < 1e-2


def test_the_estimated_best_response_of_a_constant_gate_is_the_best_constant_against_the_mixture():
    P, Q = random_problem(4)
    mixture, start = np.array([0.1, 0.7, 0.2]), ConstantGate.of([0.8, 0.1, 0.1])
    problem = make_problem(P, Q, offsets=entropies(P))
    found, kind = best_response(start, problem, mixture, FitConfig(final_lr=0.02, best_response_steps=300))
    assert kind == "estimate"
    least = best_constant_gate(P, Q, offsets=entropies(P), mixtures=[mixture]).value
    assert least - 1e-6 <= found < least + 1e-3
    unmoved, _ = best_response(start, problem, mixture, FitConfig(best_response_steps=0))
    assert unmoved == pytest.approx(float(mixture @ mixture_regrets(P, Q, [0.8, 0.1, 0.1])))
    assert found < unmoved - 0.1


LINE = np.linspace(-7.0, 7.0, 71)


def gaussian(mean, deviation):
    return normalised(np.exp(-0.5 * ((LINE - mean) / deviation) ** 2) + 1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_robust_gate_beats_monoliths_of_the_aggregate_on_overlapping_gaussians(seed):
    """Whatever a monolith is, on the mean over domains it pays the divergence; the gate is at once better on the worst.

    Nearly all of it are the weights: the best ones leave the same Gaussians about 0.01 behind.
    """
    r = np.random.default_rng(seed)
    P = np.stack([gaussian(mean, 1.0) for mean in (-3.0, -2.4, 0.0, 3.0)])
    texts = np.stack([r.choice(LINE, 200, p=p) for p in P])
    Q = np.stack([gaussian(*each) for each in zip(texts.mean(axis=1), texts.std(axis=1), strict=True)])
    aggregate = P.mean(axis=0)
    divergence = np.mean([kl(p, aggregate) for p in P])  # Jensen-Shannon, uniform
    fit, exact = fit_robust_gate(P, Q, config=FitConfig(steps=400)), exact_robust_gate(P, Q).value
    assert channel_capacity(P).value - 1e-6 <= exact <= fit.worst < exact + 1e-2
    assert divergence <= exact
    for monolith in (Q.mean(axis=0), gaussian(texts.mean(), texts.std())):
        regrets = np.array([kl(p, monolith) for p in P])
        assert regrets.mean() == pytest.approx(divergence + kl(aggregate, monolith), abs=1e-9)
        assert fit.worst < regrets.max() - 0.25
    assert 0.0 < best_constant_gate(P, Q).value - exact < 0.02
    # Against the aggregate the gate of that mixture gains the divergence over its experts.
    routed = (P / P.sum(axis=0) * Q).sum(axis=0)
    assert kl(aggregate, routed) <= np.mean([kl(p, q) for p, q in zip(P, Q, strict=True)]) - divergence + 1e-9


# ---------------------------------------------------------------------------------------------------------- text models


def test_the_bayes_router_is_the_exact_conditional_of_the_mixture():
    prior, language = np.array([0.5, 0.2, 0.3]), Language(0, length=4)
    gate, logp_XTE = BayesGate.of(prior), language.logp_XTE
    mixed_XT = torch.logsumexp(gate.log_weights(language.features) + logp_XTE, dim=-1).exp().numpy()
    mixture_XT = logp_XTE.cumsum(dim=1).exp().numpy() @ prior  # of every prefix; nothing has probability 1
    before_XT = np.concatenate([np.ones((len(mixture_XT), 1)), mixture_XT[:, :-1]], axis=1)
    assert mixed_XT == pytest.approx(mixture_XT / before_XT, rel=1e-12)
    whole = log_model(gate, language.logq_XE, language.features)
    assert float(whole.exp().sum()) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_fixed_share_is_a_sum_over_all_sequences_of_experts(share):
    prior, language = np.array([0.5, 0.2, 0.3]), Language(1, length=4)
    whole = log_model(FixedShareGate.of(prior, share), language.logq_XE, language.features).exp().numpy()
    switch = (1 - share) * np.eye(3) + share / 3
    for x in range(0, len(whole), 7):
        p, total = language.logp_XTE[x].exp().numpy(), 0.0
        for path in itertools.product(range(3), repeat=4):
            steps = [switch[a, b] * p[t + 1, b] for t, (a, b) in enumerate(itertools.pairwise(path))]
            total += prior[path[0]] * p[0, path[0]] * np.prod(steps)
        assert whole[x] == pytest.approx(total, rel=1e-12)
    assert whole.sum() == pytest.approx(1.0, rel=1e-12)


def test_a_causal_gate_is_fitted_without_samples_to_the_best_constant():
    language = Language(2, length=3)
    noise = np.random.default_rng(0).normal(size=language.q_XE.T.shape)
    P = normalised(language.q_XE.T * np.exp(0.3 * noise))
    domains = [language.support(p) for p in P]
    fit = fit_robust_gate(domains, gate="bayes", offsets=entropies(P), config=FitConfig(steps=1000))
    assert fit.z == 1.0
    assert fit.worst == pytest.approx(best_constant_gate(P, language.q_XE.T).value, abs=1e-3)


# ---------------------------------------------------------------------------------------------- gates on features


def gaussian_sets(seed, count, means=(-1.0, 0.2, 1.0), tokens=4):
    """Domains that are products of Gaussians with known experts; x is scored by density."""
    r, sets = np.random.default_rng(seed), []
    for mean in means:
        x = r.normal(mean, 1.0, size=(count, tokens))
        scores = np.stack([-0.5 * ((x - m) ** 2).sum(axis=1) for m in means], axis=1) - 0.5 * tokens * np.log(2 * np.pi)
        sets.append(ScoredSequences.of(scores, tokens_N=[tokens] * count))
    return sets


def test_the_linear_gate_beats_the_uniform_mixture_of_overlapping_gaussians():
    config = FitConfig(steps=800, lr=0.02, batch_sequences=128)
    fit = fit_robust_gate(gaussian_sets(0, 1500), gaussian_sets(1, 1500), gate="linear", config=config)
    new, draws = gaussian_sets(2, 3000), gaussian_sets(3, 3000)
    uniform = evaluate(ConstantGate.of([1 / 3] * 3), make_problem(new, draws))
    certificate = certify(fit, new, draws)
    assert certificate.capacity is not None
    assert certificate.capacity.label == "estimate"
    assert certificate.worst.value < uniform.worst - 0.03
    # The experts are the domains, so the capacity bounds the regret, up to the noise of both.
    assert certificate.worst.high > certificate.capacity.low
    assert certificate.z.low - 0.02 < 1.0 < certificate.z.high + 0.02
    assert fit.gap < 0.1


def test_intervals_of_a_certificate_cover_the_truth_as_often_as_they_say():
    """A gate that is no constant, over sequences of unequal length in clusters: 95 % intervals of all it is told of."""
    P, Q = random_problem(1, domains=2, experts=2)
    lengths, every = np.random.default_rng(0).integers(1, 9, P.shape[1]), np.arange(P.shape[1])
    gate = init_gate("tabular", 2, Features(points_B=torch.from_numpy(every)))
    noise = torch.randn(P.shape[1], 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gate = gate.replaced({"logits_XE": noise})

    def of(points, **facts):
        features = Features(points_B=torch.from_numpy(points))
        return ScoredSequences.of(np.log(Q.T[points]), features=features, tokens_N=lengths[points], **facts)

    def drawn(r, p):
        return of(np.repeat(r.choice(len(p), 150, p=p), 2), clusters_N=np.repeat(np.arange(150), 2))

    truth = certify(gate, *([of(every, weights_N=row) for row in rows] for rows in (P, Q)), unit="token")
    low, high = sorted(range(2), key=lambda d: truth.domains[d].value)
    assert truth.domains[high].value > truth.domains[low].value + 0.02  # the worst domain is plain
    hits = dict.fromkeys(("z", "worst", "first", "second"), 0)
    for seed in range(200):
        r = np.random.default_rng(seed)
        found = certify(gate, [drawn(r, p) for p in P], [drawn(r, q) for q in Q], unit="token")
        for name, one, true in zip(
            hits, (found.z, found.worst, *found.domains), (truth.z, truth.worst, *truth.domains), strict=True
        ):
            hits[name] += one.low <= true.value <= one.high
    assert all(180 <= count <= 199 for count in hits.values()), hits
