"""Laws of the gating room over random problems: order of values, equivariance, normalisation, causality, resumption."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gating import kl, normalised, random_problem

from weftlm.errors import NumericsError
from weftlm.gating import (
    Box,
    Features,
    FitConfig,
    FitState,
    best_constant_gate,
    channel_capacity,
    exact_robust_gate,
    fit_robust_gate,
    gates,
    load_gate,
    mixture_regrets,
    save_gate,
)
from weftlm.gating.bayes import BayesGate, FixedShareGate
from weftlm.gating.gate import CausalGate, init_gate
from weftlm.gating.mixtures import kl_projection, player
from weftlm.gating.problem import evaluate, log_model, make_problem

pytest.importorskip("cvxpy")

QUICK = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SLACK = 2e-6
seeds = st.integers(0, 10_000)
problems = st.builds(
    random_problem,
    seeds,
    domains=st.integers(1, 4),
    experts=st.integers(1, 4),
    points=st.integers(2, 12),
    noise=st.sampled_from([0.0, 0.5, 2.0]),
)


@QUICK
@given(problems)
def test_capacity_exact_constant_uniform_are_in_order(problem):
    P, Q = problem
    capacity = channel_capacity(P).value
    exact = exact_robust_gate(P, Q).value
    constant = best_constant_gate(P, Q).value
    uniform = mixture_regrets(P, Q, np.full(len(Q), 1 / len(Q))).max()
    assert 0.0 <= capacity <= exact + SLACK
    assert exact <= constant + SLACK
    assert constant <= uniform + SLACK


@QUICK
@given(problems, seeds)
def test_an_expert_more_never_raises_the_value(problem, seed):
    P, Q = problem
    more = np.vstack([Q, random_problem(seed, 1, 1, Q.shape[1])[1]])
    assert exact_robust_gate(P, more).value <= exact_robust_gate(P, Q).value + SLACK
    assert best_constant_gate(P, more).value <= best_constant_gate(P, Q).value + SLACK


@QUICK
@given(problems, st.randoms(use_true_random=False))
def test_permuting_experts_and_domains_permutes_the_answers(problem, random):
    P, Q = problem
    domains, experts = random.sample(range(len(P)), len(P)), random.sample(range(len(Q)), len(Q))
    one, other = exact_robust_gate(P, Q), exact_robust_gate(P[domains], Q[experts])
    assert other.value == pytest.approx(one.value, abs=SLACK)
    assert other.pi == pytest.approx(one.pi, abs=1e-4)
    assert other.gate == pytest.approx(one.gate[experts], abs=1e-2)
    constant, again = best_constant_gate(P, Q), best_constant_gate(P[domains], Q[experts])
    assert again.value == pytest.approx(constant.value, abs=SLACK)
    assert again.pi == pytest.approx(constant.pi, abs=1e-3)
    config = FitConfig(steps=30)
    one, other = fit_robust_gate(P, Q, config=config), fit_robust_gate(P[domains], Q[experts], config=config)
    every = Features(points_B=torch.arange(P.shape[1]))
    assert other.worst == pytest.approx(one.worst, abs=1e-6)
    assert other.lam == pytest.approx(one.lam[domains], abs=1e-6)
    expected = one.gate.log_weights(every)[:, experts]
    torch.testing.assert_close(other.gate.log_weights(every), expected, atol=1e-4, rtol=1e-4)


@QUICK
@given(seeds, st.integers(1, 4))
def test_one_expert_is_that_expert(seed, domains):
    P, Q = random_problem(seed, domains, 1)
    alone = mixture_regrets(P, Q, [1.0]).max()
    assert exact_robust_gate(P, Q).value == pytest.approx(alone, abs=SLACK)
    assert best_constant_gate(P, Q).value == pytest.approx(alone, abs=SLACK)
    assert fit_robust_gate(P, Q, config=FitConfig(steps=3)).worst == pytest.approx(alone, abs=1e-9)


@QUICK
@given(problems, seeds)
def test_a_fixed_mixture_gains_the_jensen_shannon_divergence_and_one_model_pays_it(problem, seed):
    P, Q = problem
    Q = Q[np.arange(len(P)) % len(Q)]
    lam = np.random.default_rng(seed).dirichlet(np.ones(len(P)))
    mixture = lam @ P
    divergence = sum(part * kl(p, mixture) for part, p in zip(lam, P, strict=True))
    gate = init_gate("tabular", len(Q), Features(points_B=torch.arange(P.shape[1])))
    gate = gate.replaced({"logits_XE": torch.from_numpy(np.log(lam * P.T))})
    every = Features(points_B=torch.arange(P.shape[1]))
    pi = log_model(gate, torch.from_numpy(np.log(Q.T)), every).exp().numpy()
    own = sum(part * kl(p, q) for part, p, q in zip(lam, P, Q, strict=True))
    assert kl(mixture, pi) <= own - divergence + 1e-9
    alone = normalised(np.random.default_rng(seed).random(P.shape[1]))
    pays = sum(part * kl(p, alone) for part, p in zip(lam, P, strict=True))
    assert pays == pytest.approx(kl(mixture, alone) + divergence, abs=1e-9)
    assert divergence <= channel_capacity(P).value + SLACK


@QUICK
@given(problems)
def test_the_gated_model_sums_to_one(problem):
    P, Q = problem
    exact = exact_robust_gate(P, Q)
    assert exact.gate.sum(axis=0) == pytest.approx(np.ones(P.shape[1]), abs=1e-9)
    assert (exact.gate >= 0).all()
    assert (exact.gate * Q).sum() == pytest.approx(1.0, abs=1e-6)
    assert (exact.gate * Q).sum(axis=0) == pytest.approx(exact.pi, abs=1e-9)
    assert exact.lam.sum() == pytest.approx(1.0)


@QUICK
@given(problems, seeds)
def test_any_gate_lies_above_the_capacity_and_z_is_the_models_total(problem, seed):
    P, Q = problem
    everything = make_problem(P, Q)
    gate = init_gate("tabular", len(Q), Features(points_B=torch.arange(P.shape[1])))
    noise = torch.randn(P.shape[1], len(Q), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gate = gate.replaced({"logits_XE": 2.0 * noise})
    found = evaluate(gate, everything)
    every = Features(points_B=torch.arange(P.shape[1]))
    pi = log_model(gate, torch.from_numpy(np.log(Q.T)), every).exp().numpy()
    assert found.z == pytest.approx(pi.sum(), rel=1e-9)
    assert found.worst >= channel_capacity(P).value - 1e-9
    assert found.worst == pytest.approx(max((p * np.log(p / (pi / pi.sum()))).sum() for p in P), abs=1e-9)


@QUICK
@given(seeds, st.sampled_from(["tabular", "constant"]), st.sampled_from([None, 16]))
def test_split_then_resumed_equals_uninterrupted(tmp_path_factory, seed, gate, batch):
    P, Q = random_problem(seed)
    config = FitConfig(steps=24, report_every_steps=5, batch_sequences=batch, seed=seed, best_response_steps=4)
    whole = fit_robust_gate(P, Q, gate=gate, config=config)
    path = tmp_path_factory.mktemp("fit") / "state.safetensors"
    for until in (7, 16):
        state = FitState.load(path) if until > 7 else None
        fit_robust_gate(P, Q, gate=gate, config=config, state=state, until=until).state.save(path)
    resumed = fit_robust_gate(P, Q, gate=gate, config=config, state=FitState.load(path))
    assert resumed.history == whole.history
    assert (resumed.worst, resumed.mu, resumed.z) == (whole.worst, whole.mu, whole.z)
    for name, tensor in whole.gate.tensors.items():
        assert torch.equal(resumed.gate.tensors[name], tensor)


# ---------------------------------------------------------------------------------------------- every registered gate


def some_features(seed, batch=5, time=6, experts=3):
    generator = torch.Generator().manual_seed(seed)
    logp_BTE = -3.0 * torch.rand(batch, time, experts, generator=generator, dtype=torch.float64)
    return Features(
        sequence_BF=torch.randn(batch, 4, generator=generator, dtype=torch.float64),
        names=("a", "b", "c", "d"),
        points_B=torch.randint(0, 7, (batch,), generator=generator),
        logp_BTE=logp_BTE,
    )


def shaken(gate, seed):
    """The gate with random learned tensors."""
    generator = torch.Generator().manual_seed(seed)
    noise = {
        name: torch.randn(gate.tensors[name].shape, generator=generator, dtype=torch.float64) for name in gate.learned
    }
    return gate.replaced(noise)


every_gate = pytest.mark.parametrize("name", list(gates))


@every_gate
@QUICK
@given(seeds)
def test_weights_are_normalised_and_survive_a_file(tmp_path_factory, name, seed):
    features = some_features(seed)
    gate = shaken(init_gate(name, 3, features), seed)
    logw = gate.log_weights(features)
    assert logw.shape == ((5, 6, 3) if gate.causal else (5, 3))
    torch.testing.assert_close(torch.logsumexp(logw, dim=-1), torch.zeros(logw.shape[:-1], dtype=logw.dtype))
    path = tmp_path_factory.mktemp("gate") / "gate.safetensors"
    save_gate(gate, path)
    again = load_gate(path)
    assert again.config == gate.config
    assert again.tensors.keys() == gate.tensors.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in gate.tensors.items())
    # Where in memory a tensor lies decides its kernels on some processors, and with them the last bits.
    torch.testing.assert_close(again.log_weights(features), logw, rtol=1e-12, atol=1e-12)


@every_gate
def test_a_new_gate_is_uniform(name):
    features = some_features(0)
    logw = init_gate(name, 3, features).log_weights(features)
    first = logw[:, 0] if gates[name].causal else logw
    torch.testing.assert_close(first.exp(), torch.full_like(first, 1 / 3))


@pytest.mark.parametrize("name", [name for name in gates if gates[name].causal])
@QUICK
@given(seeds, st.integers(0, 5))
def test_a_causal_gate_ignores_the_future_and_can_be_driven_token_by_token(name, seed, t):
    mask_BT = torch.rand(5, 6, generator=torch.Generator().manual_seed(seed)) < 0.8
    features = replace(some_features(seed), mask_BT=mask_BT)
    gate = shaken(init_gate(name, 3, features), seed)
    logw_BTE = gate.log_weights(features)
    changed_BTE = features.logp_BTE.clone()
    changed_BTE[:, t:] = torch.randn(5, 6 - t, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(gate.log_weights(replace(features, logp_BTE=changed_BTE))[:, : t + 1], logw_BTE[:, : t + 1])
    assert isinstance(gate, CausalGate)
    state = gate.begin(5)
    for s in range(6):
        torch.testing.assert_close(gate.current(state), logw_BTE[:, s], rtol=1e-10, atol=1e-12)
        state = gate.advance(state, features.logp_BTE[:, s], mask_BT[:, s])
    elsewhere = next(gate.to("meta").states(changed_BTE.to("meta"), None))
    assert {each.device.type for each in elsewhere.values()} == {"meta"}


@QUICK
@given(seeds)
def test_fixed_share_without_share_is_bayes(seed):
    features = some_features(seed)
    prior = normalised(np.random.default_rng(seed).random(3) + 0.1)
    dead_BTE = features.logp_BTE.clone()
    dead_BTE[0, 2, 1] = -np.inf
    dead_BTE[1, 3] = -np.inf
    for logp_BTE in (features.logp_BTE, dead_BTE):
        scores = Features(logp_BTE=logp_BTE)
        shared = FixedShareGate.of(prior, 0.0).log_weights(scores)
        torch.testing.assert_close(shared, BayesGate.of(prior).log_weights(scores), rtol=1e-10, atol=1e-12)
        assert not torch.isnan(shared).any()


# ------------------------------------------------------------------------------------------------- mixtures in bounds


@st.composite
def bounds(draw):
    size = draw(st.integers(1, 6))
    r = np.random.default_rng(draw(seeds))
    inside = r.dirichlet(np.ones(size))
    lower = inside * r.random(size) * (r.random(size) < 0.6)
    upper = np.where(r.random(size) < 0.6, inside + (1 - inside) * r.random(size), 1.0)
    return r.normal(size=size) * draw(st.sampled_from([0.1, 3.0, 40.0])), lower, upper


@MANY
@given(bounds())
def test_the_projection_satisfies_its_optimality_conditions(case):
    log_y, lower, upper = case
    log_z = kl_projection(log_y, lower, upper)
    z = np.exp(log_z)
    assert z.sum() == pytest.approx(1.0, abs=1e-9)
    assert (z >= lower - 1e-12).all()
    assert (z <= upper + 1e-12).all()
    # log(z / y) is one number c where no bound binds, at least c at lower bounds and at most c at upper ones.
    at_lower, at_upper = z <= lower * (1 + 1e-9), z >= upper * (1 - 1e-9)
    with np.errstate(invalid="ignore"):
        ratio = log_z - log_y
    free = ~at_lower & ~at_upper
    low = ratio[~at_lower & (z > 0)]
    high = ratio[~at_upper & (z > 0)]
    if free.any():
        assert np.ptp(ratio[free]) < 1e-7
    if len(low) and len(high):
        assert low.max() <= high.min() + 1e-7


@MANY
@given(bounds())
def test_the_best_mixture_in_bounds_is_feasible_and_best(case):
    payoffs, lower, upper = case
    adversary = player(Box(lower, upper), len(lower))
    value, nu = adversary.best(payoffs)
    assert nu.sum() == pytest.approx(1.0)
    assert (nu >= lower - 1e-12).all()
    assert (nu <= upper + 1e-12).all()
    assert value == pytest.approx(float(nu @ payoffs))
    moved = np.exp(adversary.step(adversary.start(), 5.0 * payoffs))
    assert moved.sum() == pytest.approx(1.0)
    assert moved @ payoffs <= value + 1e-9


@QUICK
@given(problems)
def test_probabilities_and_their_logs_are_the_same_input(problem):
    P, Q = problem
    assert channel_capacity(P).value == pytest.approx(channel_capacity(np.log(P)).value, abs=1e-12)
    assert exact_robust_gate(P, Q).value == pytest.approx(exact_robust_gate(np.log(P), np.log(Q)).value, abs=1e-9)
    with pytest.raises(NumericsError, match="sums to"):
        channel_capacity(0.9 * P)
