"""Each policy against its published formula written out in plain Python floats, over random report sequences."""

import math
import random

import pytest
import torch

from weftlm.mixture.policy import Alignment, MixtureSetting, Report, build_policy

DOMAINS = ("code", "prose", "law", "maths", "rest")
D = len(DOMAINS)
NAN = float("nan")
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def setting(**more):
    return MixtureSetting(domains=DOMAINS, tokens_D=tensor([1e6, 2e4, 3e5, 7e5, 1e3]), **more)


def step_of(weights, exponents):
    """w_i exp(x_i) / sum_j w_j exp(x_j) among entries with x known; the others keep their weight."""
    known = [i for i, x in enumerate(exponents) if not math.isnan(x)]
    mass = sum(weights[i] for i in known)
    top = max((exponents[i] for i in known), default=0.0)
    terms = {i: weights[i] * math.exp(exponents[i] - top) for i in known}
    total = sum(terms.values())
    return [mass * terms[i] / total if i in terms else weights[i] for i in range(len(weights))]


def floored(weights, c):
    return [(1 - c) * w + c / len(weights) for w in weights]


def close(actual, expected):
    torch.testing.assert_close(actual, tensor(expected), rtol=1e-12, atol=1e-14)


def probes(seed, groups, count=8, absent=0.3):
    """(dots, norms, direction norm, batch norm) of random probes; NaN for an absent group."""
    rng = random.Random(seed)
    for _ in range(count):
        norms = [rng.uniform(0.5, 4.0) for _ in range(groups)]
        v = rng.uniform(0.5, 3.0)
        dots = [n * v * rng.uniform(-0.6, 0.9) for n in norms]
        for i in range(1, groups):
            if rng.random() < absent:
                dots[i] = norms[i] = NAN
        yield dots, norms, v, rng.uniform(0.5, 2.0)


def aligned(step, dots, norms, v, batch_norm):
    counts = torch.tensor([0 if math.isnan(a) else 8 for a in dots])
    alignment = Alignment(tensor(dots), counts, v, None if norms is None else tensor(norms), batch_norm)
    return Report(step=step, tokens_D=torch.ones(D, dtype=torch.float64), alignment=alignment)


def normalised(mode, dots, norms, v, batch_norm, with_norms):
    if mode == "raw":
        return list(dots)
    if mode == "cosine":
        return [a / (v * n) for a, n in zip(dots, norms, strict=True)]
    present = [n for n in norms if not math.isnan(n)]
    size = sum(present) / len(present) if with_norms else batch_norm
    return [a / (v * size) for a in dots]


def kept(old, new):
    """The last known value of each."""
    return [o if math.isnan(n) else n for o, n in zip(old, new, strict=True)]


@SEEDS
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize(("mode", "with_norms"), [("raw", False), ("scale", True), ("scale", False), ("cosine", True)])
def test_dga(seed, feedback, mode, with_norms):
    eta, beta, c = 1.7, 0.3, 0.02
    settings = {"eta": eta, "ema": beta, "floor": c, "normalize": mode, "ema_feedback": feedback}
    policy = build_policy({"policy": "dga", **settings})
    state = policy.init(setting())
    alpha = mirror = [1 / D] * D
    seen = [NAN] * D
    for i, (dots, norms, v, batch_norm) in enumerate(probes(seed, D)):
        state = policy.update(state, aligned(i, dots, norms if with_norms else None, v, batch_norm))
        seen = kept(seen, normalised(mode, dots, norms, v, batch_norm, with_norms))
        mirror = floored(step_of(alpha if feedback else mirror, [eta * a for a in seen]), c)
        alpha = [(1 - beta) * a + beta * m for a, m in zip(alpha, mirror, strict=True)]
        close(policy.weights(state), alpha)
        known = [abs(eta * a) for a in seen if not math.isnan(a)]
        assert policy.diagnostics(state)["max_exponent"] == pytest.approx(max(known), rel=1e-12)


@SEEDS
def test_dga_over_basis_distributions(seed):
    rng = random.Random(seed + 100)
    n = 3
    basis = [[rng.uniform(0.1, 1.0) for _ in range(D)] for _ in range(n)]
    basis = [[p / sum(row) for p in row] for row in basis]
    policy = build_policy({"policy": "dga", "reweight": "basis", "eta": 2.0, "ema": 0.5, "floor": 0.03})
    state = policy.init(setting(basis_ND=tensor(basis)))
    w = [1 / n] * n
    seen = [NAN] * n
    for i, (dots, norms, v, batch_norm) in enumerate(probes(seed, n)):
        state = policy.update(state, aligned(i, dots, norms, v, batch_norm))
        seen = kept(seen, normalised("scale", dots, norms, v, batch_norm, True))
        mirror = floored(step_of(w, [2.0 * a for a in seen]), 0.03)
        w = [0.5 * a + 0.5 * m for a, m in zip(w, mirror, strict=True)]
        close(policy.weights(state), [sum(w[k] * basis[k][d] for k in range(n)) for d in range(D)])


@SEEDS
@pytest.mark.parametrize("target", [True, False])
@pytest.mark.parametrize("sample", ["current", "average"])
def test_doge(seed, target, sample):
    policy = build_policy({"policy": "doge", "eta": 0.8, "target": target, "sample": sample, "normalize": "raw"})
    state = policy.init(setting())
    alpha = [1 / D] * D
    seen, history = [NAN] * D, []
    for i, (dots, norms, v, batch_norm) in enumerate(probes(seed, D)):
        state = policy.update(state, aligned(i, dots, norms, v, batch_norm))
        seen = kept(seen, dots)
        alpha = step_of(alpha, [0.8 * a for a in seen])
        history.append(alpha)
        mean = [sum(past[d] for past in history) / len(history) for d in range(D)]
        close(policy.weights(state), alpha if sample == "current" else mean)


def losses(seed, count=10, absent=0.3):
    """(losses, tokens) of random reports; NaN and 0 tokens for a domain not drawn."""
    rng = random.Random(seed)
    for _ in range(count):
        values = [rng.uniform(0.0, 6.0) for _ in range(D)]
        for i in range(1, D):
            if rng.random() < absent:
                values[i] = NAN
        yield values, [0.0 if math.isnan(x) else 256.0 for x in values]


@SEEDS
@pytest.mark.parametrize("sample", ["current", "average"])
def test_doremi(seed, sample):
    policy = build_policy({"policy": "doremi", "sample": sample})
    state = policy.init(setting())
    alpha = [1 / D] * D
    seen, history = [NAN] * D, []
    for i, (excess, tokens) in enumerate(losses(seed)):
        state = policy.update(state, Report(i, tensor(tokens), *[tensor(excess)] * 3))
        seen = kept(seen, excess)
        alpha = floored(step_of(alpha, [1.0 * x for x in seen]), 1e-3)
        history.append(alpha)
        mean = [sum(past[d] for past in history) / len(history) for d in range(D)]
        close(policy.weights(state), alpha if sample == "current" else mean)


@SEEDS
def test_group_dro(seed):
    eta, adjustment = 0.2, 300.0
    policy = build_policy({"policy": "group_dro", "eta": eta, "adjustment": adjustment})
    state = policy.init(setting())
    sizes = setting().tokens_D.tolist()
    q, seen = [1 / D] * D, [NAN] * D
    for i, (values, tokens) in enumerate(losses(seed)):
        state = policy.update(state, Report(i, tensor(tokens), losses_D=tensor(values)))
        seen = kept(seen, values)
        q = step_of(q, [eta * (x + adjustment / math.sqrt(n)) for x, n in zip(seen, sizes, strict=True)])
        close(policy.weights(state), q)


@SEEDS
def test_odm(seed):
    decay = 0.8
    policy = build_policy({"policy": "odm", "decay": decay})
    state = policy.init(setting())
    pi, rewards, previous = [1 / D] * D, [0.0] * D, 1 / D
    for t, (values, tokens) in enumerate(losses(seed, count=40), start=1):
        state = policy.update(state, Report(100 * t, tensor(tokens), losses_D=tensor(values)))
        for d in range(D):
            if tokens[d]:
                rewards[d] = decay * rewards[d] + (1 - decay) * values[d] / pi[d]
        epsilon = min(1 / D, math.sqrt(math.log(D) / (D * t)))
        terms = [math.exp(previous * r) for r in rewards]
        pi = [(1 - D * epsilon) * x / sum(terms) + epsilon for x in terms]
        previous = epsilon
        close(policy.weights(state), pi)
    assert max(pi) > 1.01 / D


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_proportional(temperature):
    policy = build_policy({"policy": "proportional", "temperature": temperature})
    powers = [n**temperature for n in setting().tokens_D.tolist()]
    close(policy.weights(policy.init(setting())), [p / sum(powers) for p in powers])


@pytest.mark.parametrize("smoothing", [0.0, 0.25, 1.0])
def test_importance(smoothing):
    histogram = [0.5, 0.0, 0.125, 0.375, 0.0]
    policy = build_policy({"policy": "importance", "smoothing": smoothing})
    state = policy.init(setting(target_histogram_D=tensor(histogram)))
    close(policy.weights(state), [(1 - smoothing) * h + smoothing / D for h in histogram])
