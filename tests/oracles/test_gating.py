"""Robust gates against the convex programme, published numbers, brute force and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from support.gating import chain_scores, kl, markov, normalised, random_problem, reference

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
from weftlm.gating.bayes import BayesGate, FixedShareGate
from weftlm.gating.constant import ConstantGate
from weftlm.gating.exact import entropies
from weftlm.gating.gate import init_gate
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
    assert fit.value == pytest.approx(TABLE[eps][1], abs=1e-3)
    assert fit.value >= exact.value - 1e-7
    assert abs(fit.z - 1.0) < 1e-5
    assert fit.lam == pytest.approx(exact.lam, abs=1e-3)
    assert fit.mu == pytest.approx(exact.z_multiplier, abs=1e-3)
    assert fit.gap_kind == "exact"
    assert fit.value - fit.gap - 1e-7 <= exact.value <= fit.value + 1e-7


@pytest.mark.slow
@pytest.mark.parametrize(("eps", "value"), [(0.5, 0.323578), (1.0, 0.396858)])
def test_the_default_steps_reach_the_reference_figures(eps, value):
    P, Q = reference(eps)
    fit = fit_robust_gate(P, Q, config=FitConfig(gap_tolerance=None))
    assert fit.value == pytest.approx(value, abs=1.5e-6)
    assert abs(fit.z - 1.0) < 1e-6
    if eps == 0.5:
        assert fit.lam == pytest.approx([0.306, 0.387, 0.307], abs=1e-3)


@pytest.mark.parametrize(("eps", "steps", "batch"), [(0.1, 1000, 128), (0.5, 1000, 512), (1.0, 1000, 256)])
def test_mini_batches_and_sampled_z_come_within_a_hundredth(eps, steps, batch):
    P, Q = reference(eps)
    exact = exact_robust_gate(P, Q)
    r = np.random.default_rng(1)

    def drawn(k, count):
        points = r.choice(40, count, p=Q[k])
        features = Features(points_B=torch.from_numpy(points))
        return ScoredSequences.of(np.log(Q.T[points]), features=features, name=f"expert {k}")

    domains, _ = enumerated(P, Q)
    fit = fit_robust_gate(
        domains,
        [drawn(k, 40_000) for k in range(3)],
        gate="tabular",
        offsets=entropies(P),
        config=FitConfig(steps=steps, batch_sequences=batch, batch_samples=max(batch, 256), best_response_steps=0),
        held_out_samples=[drawn(k, 40_000) for k in range(3)],
    )
    truth = evaluate(fit.gate, make_problem(P, Q))
    assert truth.worst == pytest.approx(exact.value, abs=1e-2)
    assert fit.value == pytest.approx(exact.value, abs=1e-2)
    assert fit.lam == pytest.approx(exact.lam, abs=1e-2)
    assert fit.z_source == "held-out samples"
    half = fit.z_ci[1] - fit.z
    assert abs(fit.z - truth.z) < 2 * half < 0.02
    assert math.isnan(fit.gap)


def test_the_dual_by_water_filling_meets_the_programme_at_its_multipliers():
    for seed in range(5):
        P, Q = random_problem(seed, experts=4)
        exact = exact_robust_gate(P, Q)
        problem = make_problem(P, Q)
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
    assert fit.value == pytest.approx(alone.value, abs=1e-3)
    assert kl(mixture @ P, exact.pi) == pytest.approx(exact.value, abs=1e-9)


def test_vertices_at_the_domains_and_the_whole_box_are_no_restriction():
    P, Q = reference(1.0)
    free = exact_robust_gate(P, Q)
    for mixtures in (np.eye(3), Box(), Box(0.0, 1.0)):
        restricted = exact_robust_gate(P, Q, mixtures=mixtures)
        assert restricted.value == pytest.approx(free.value, abs=1e-7)
        assert restricted.lam == pytest.approx(free.lam, abs=1e-4)
    config = FitConfig(steps=300)
    unrestricted = fit_robust_gate(P, Q, config=config)
    for mixtures in (np.eye(3), Box()):
        fit = fit_robust_gate(P, Q, mixtures=mixtures, config=config)
        assert fit.value == pytest.approx(unrestricted.value, abs=1e-12)


def test_a_box_binds_as_the_programme_over_its_corners_does():
    P, Q = reference(1.0)
    offsets = entropies(P)
    # All mixtures with weights from (0.1, 0.4, 0.1) to 0.6 are mixtures of these.
    corners = [[0.1, 0.6, 0.3], [0.1, 0.4, 0.5], [0.5, 0.4, 0.1], [0.3, 0.6, 0.1]]
    exact = exact_robust_gate(P, Q, mixtures=corners, offsets=offsets)
    config = FitConfig(steps=2500, eta=0.2, gap_tolerance=None)
    fit = fit_robust_gate(P, Q, mixtures=Box([0.1, 0.4, 0.1], 0.6), offsets=offsets, config=config)
    assert exact.lam[1] == pytest.approx(0.4, abs=1e-3)
    assert fit.value == pytest.approx(exact.value, abs=1e-3)
    assert fit.lam == pytest.approx(exact.lam, abs=5e-3)
    assert exact.value < exact_robust_gate(P, Q).value
    mixed = fit_robust_gate(P, Q, mixtures=corners, config=config)
    assert mixed.value == pytest.approx(exact_robust_gate(P, Q, mixtures=corners).value, abs=1e-3)


def test_the_constant_gate_is_fitted_to_the_best_constant():
    P, Q = reference(0.5)
    exact = best_constant_gate(P, Q)
    fit = fit_robust_gate(P, Q, gate="constant", config=FitConfig(steps=2000, gap_tolerance=None))
    assert fit.value == pytest.approx(exact.value, abs=1e-4)
    weights = fit.gate.log_weights(Features(1)).exp()[0].numpy()
    assert weights == pytest.approx(exact.gate[:, 0], abs=1e-2)
    assert fit.z == pytest.approx(1.0, abs=1e-12)
    assert fit.gap_kind == "estimate"
    assert -1e-9 <= fit.gap < 1e-2


def test_the_estimated_best_response_of_a_constant_gate_is_the_best_constant_against_the_mixture():
    P, Q = random_problem(4)
    mixture = np.array([0.1, 0.7, 0.2])
    problem = make_problem(P, Q, offsets=entropies(P))
    start = ConstantGate.of([0.8, 0.1, 0.1])
    found, kind = best_response(start, problem, mixture, FitConfig(final_lr=0.02, best_response_steps=300))
    assert kind == "estimate"
    least = best_constant_gate(P, Q, offsets=entropies(P), mixtures=[mixture]).value
    assert least - 1e-6 <= found < least + 1e-3
    unmoved, _ = best_response(start, problem, mixture, FitConfig(best_response_steps=0))
    assert unmoved == pytest.approx(float(mixture @ mixture_regrets(P, Q, [0.8, 0.1, 0.1])))
    assert found < unmoved - 0.1


def test_points_only_some_experts_know():
    P = normalised([[3, 2, 1, 0, 0], [0, 1, 1, 2, 0]])
    Q = normalised([[3, 1, 1, 0, 0], [0, 1, 1, 3, 0]])
    exact = exact_robust_gate(P, Q)
    fit = fit_robust_gate(P, Q, config=FitConfig(steps=1500))
    assert fit.value == pytest.approx(exact.value, abs=1e-3)
    assert np.isfinite(exact.gate).all()
    assert channel_capacity(P).value <= exact.value + 1e-7


# ------------------------------------------------------------------------------------------ a monolith on the aggregate

LINE = np.linspace(-7.0, 7.0, 71)


def gaussian(mean, deviation):
    return normalised(np.exp(-0.5 * ((LINE - mean) / deviation) ** 2) + 1e-12)


def retrained(x, means, deviations):
    """As many Gaussians as there are experts, fitted to all domains' data at once by EM from where the experts are.

    Returns their weights and, a row each, their distributions.
    """
    weights = np.full(len(means), 1 / len(means))
    for _ in range(200):
        share = weights * np.exp(-0.5 * ((x[:, None] - means) / deviations) ** 2) / deviations
        share /= share.sum(axis=1, keepdims=True)
        counts = share.sum(axis=0)
        weights, means = counts / len(x), (share * x[:, None]).sum(axis=0) / counts
        deviations = np.sqrt((share * (x[:, None] - means) ** 2).sum(axis=0) / counts)
    return weights, np.stack([gaussian(*each) for each in zip(means, deviations, strict=True)])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_robust_gate_beats_the_retrained_monolith_of_equal_capacity_on_overlapping_gaussians(seed):
    """By 0.25 nats and more where the monolith is as its data weighs it, nearly all of which are the weights: with the
    weights that are best for its own worst domain it is about 0.01 behind."""
    r = np.random.default_rng(seed)
    P = np.stack([gaussian(mean, 1.0) for mean in (-3.0, -2.4, 0.0, 3.0)])
    texts = [r.choice(LINE, 200, p=p) for p in P]
    means, deviations = np.array([x.mean() for x in texts]), np.array([x.std() for x in texts])
    Q = np.stack([gaussian(*each) for each in zip(means, deviations, strict=True)])
    aggregate = P.mean(axis=0)
    weights, parts = retrained(np.concatenate(texts), means, deviations)
    monoliths = {
        "as many Gaussians": weights @ parts,
        "one Gaussian": gaussian(np.concatenate(texts).mean(), np.concatenate(texts).std()),
    }
    divergence = np.mean([kl(p, aggregate) for p in P])  # Jensen-Shannon, uniform
    fit = fit_robust_gate(P, Q, config=FitConfig(steps=400))
    exact = exact_robust_gate(P, Q).value
    assert channel_capacity(P).value - 1e-6 <= exact <= fit.value < exact + 1e-2
    assert divergence <= exact
    for monolith in monoliths.values():
        regrets = np.array([kl(p, monolith) for p in P])
        # Whatever it learned, on the mean over domains it pays the divergence; the gate is at once better on the worst.
        assert regrets.mean() == pytest.approx(divergence + kl(aggregate, monolith), abs=1e-9)
        assert fit.value < regrets.max() - 0.25
    best_weights = best_constant_gate(P, parts).value
    assert 0.0 < best_weights - exact < 0.02
    assert fit.value < best_weights + 2e-3
    # Against the aggregate it was trained for, the gate of that mixture gains the divergence over its experts.
    routed = (P / P.sum(axis=0) * Q).sum(axis=0)
    assert kl(aggregate, routed) <= np.mean([kl(p, q) for p, q in zip(P, Q, strict=True)]) - divergence + 1e-9


# ---------------------------------------------------------------------------------------------------------- text models


def texts(length, letters=3):
    return list(itertools.product(range(letters), repeat=length))


def scored(seed, length):
    """All texts of a length under three Markov chains: (texts, B x T x E)."""
    start, step = markov(seed)
    every = texts(length)
    return every, torch.from_numpy(np.stack([chain_scores(start, step, text) for text in every]))


def test_the_bayes_router_is_the_exact_conditional_of_the_mixture():
    prior = np.array([0.5, 0.2, 0.3])
    every, logp_BTE = scored(0, 4)
    gate = BayesGate.of(prior)
    logw_BTE = gate.log_weights(Features(logp_BTE=logp_BTE))
    mixed_BT = torch.logsumexp(logw_BTE + logp_BTE, dim=-1).exp().numpy()
    start, step = markov(0)

    def mixture(prefix):
        if not prefix:
            return 1.0
        return float(prior @ np.exp(chain_scores(start, step, prefix).sum(axis=0)))

    for b, text in enumerate(every):
        for t in range(4):
            assert mixed_BT[b, t] == pytest.approx(mixture(text[: t + 1]) / mixture(text[:t]), rel=1e-12)
    whole = log_model(gate, logp_BTE.sum(dim=1), Features(logp_BTE=logp_BTE))
    assert float(whole.exp().sum()) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3])
def test_fixed_share_is_a_sum_over_all_sequences_of_experts(share):
    prior = np.array([0.5, 0.2, 0.3])
    every, logp_BTE = scored(1, 4)
    gate = FixedShareGate.of(prior, share)
    whole = log_model(gate, logp_BTE.sum(dim=1), Features(logp_BTE=logp_BTE)).exp().numpy()
    switch = (1 - share) * np.eye(3) + share / 3
    for b in range(0, len(every), 7):
        p = logp_BTE[b].exp().numpy()
        total = 0.0
        for path in itertools.product(range(3), repeat=4):
            term = prior[path[0]] * p[0, path[0]]
            for t in range(1, 4):
                term *= switch[path[t - 1], path[t]] * p[t, path[t]]
            total += term
        assert whole[b] == pytest.approx(total, rel=1e-12)
    assert whole.sum() == pytest.approx(1.0, rel=1e-12)


def test_a_causal_gate_is_fitted_without_samples_to_the_best_constant():
    every, logp_BTE = scored(2, 3)
    q_XE = logp_BTE.sum(dim=1).exp().numpy()
    P = normalised(q_XE.T * np.exp(0.3 * np.random.default_rng(0).normal(size=q_XE.T.shape)))
    exact = best_constant_gate(P, q_XE.T)
    domains = [
        ScoredSequences.of(np.log(q_XE), features=Features(logp_BTE=logp_BTE), weights_N=row, tokens_N=[3] * len(every))
        for row in P
    ]
    fit = fit_robust_gate(domains, gate="bayes", offsets=entropies(P), config=FitConfig(steps=1500))
    assert fit.z == 1.0
    assert fit.z_ci == (1.0, 1.0)
    assert fit.value == pytest.approx(exact.value, abs=1e-3)


# ---------------------------------------------------------------------------------------------- gates on features


def gaussian_sets(seed, count, means, tokens=4):
    """Domains that are products of Gaussians with known experts; x is scored by density."""
    r = np.random.default_rng(seed)

    def score(x):
        return np.stack([-0.5 * ((x - m) ** 2).sum(axis=1) for m in means], axis=1) - 0.5 * tokens * np.log(2 * np.pi)

    sets = []
    for mean in means:
        x = r.normal(mean, 1.0, size=(count, tokens))
        sets.append(ScoredSequences.of(score(x), tokens_N=[tokens] * count))
    return sets


def test_the_linear_gate_beats_the_uniform_mixture_of_overlapping_gaussians():
    means = (-1.0, 0.2, 1.0)
    domains, samples = gaussian_sets(0, 1500, means), gaussian_sets(1, 1500, means)
    config = FitConfig(steps=800, lr=0.02, batch_sequences=128)
    fit = fit_robust_gate(domains, samples, gate="linear", config=config)
    new, draws = gaussian_sets(2, 3000, means), gaussian_sets(3, 3000, means)
    uniform = evaluate(
        fit_robust_gate(new, draws, gate="constant", config=FitConfig(steps=1)).gate, make_problem(new, draws)
    )
    certificate = certify(fit, new, draws)
    capacity = certificate.capacity
    assert capacity is not None
    assert capacity.label == "estimate"
    assert certificate.worst.value < uniform.worst - 0.03
    # The experts are the domains, so the capacity bounds the regret, up to the noise of both.
    assert certificate.worst.high > capacity.low
    assert certificate.z.low - 0.02 < 1.0 < certificate.z.high + 0.02
    assert fit.gap < 0.1


def test_intervals_of_a_certificate_cover_the_truth_as_often_as_they_say():
    """A gate that is no constant, over sequences of unequal length in clusters: 95 % intervals of all it is told of."""
    P, Q = random_problem(1, domains=2, experts=2)
    lengths = np.random.default_rng(0).integers(1, 9, P.shape[1])
    gate = init_gate("tabular", 2, Features(points_B=torch.arange(P.shape[1])))
    noise = torch.randn(P.shape[1], 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gate = gate.replaced({"logits_XE": noise})

    def drawn(r, p, copies):
        points = np.repeat(r.choice(len(p), 150, p=p), copies)
        return ScoredSequences.of(
            np.log(Q.T[points]),
            features=Features(points_B=torch.from_numpy(points)),
            tokens_N=lengths[points],
            clusters_N=np.repeat(np.arange(150), copies),
        )

    def support(p):
        points = Features(points_B=torch.arange(len(p)))
        return ScoredSequences.of(np.log(Q.T), features=points, tokens_N=lengths, weights_N=p)

    truth = certify(gate, [support(p) for p in P], [support(q) for q in Q], unit="token")
    low, high = sorted(range(2), key=lambda d: truth.domains[d].value)
    assert truth.domains[high].value > truth.domains[low].value + 0.02  # the worst domain is plain
    hits = dict.fromkeys(("z", "worst", "first", "second"), 0)
    for seed in range(200):
        r = np.random.default_rng(seed)
        found = certify(gate, [drawn(r, p, 2) for p in P], [drawn(r, q, 2) for q in Q], unit="token")
        pairs = {"z": (found.z, truth.z), "worst": (found.worst, truth.worst)}
        pairs |= {name: (found.domains[d], truth.domains[d]) for d, name in enumerate(("first", "second"))}
        for name, (one, true) in pairs.items():
            hits[name] += one.low <= true.value <= one.high
    assert all(180 <= count <= 199 for count in hits.values()), hits
