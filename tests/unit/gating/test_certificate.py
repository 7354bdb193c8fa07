"""Certificates: labels, figures, JSON."""

import json
import math

import numpy as np
import pytest
import torch
from support.gating import random_problem

from weftlm.errors import ConfigError, DataError
from weftlm.gating import Certificate, FitConfig, ScoredSequences, certify, channel_capacity, fit_robust_gate
from weftlm.gating.bayes import BayesGate
from weftlm.gating.gate import init_gate
from weftlm.gating.linear import ConstantGate
from weftlm.gating.sequences import sequence_features

CONFIG = FitConfig(steps=150, best_response_steps=20)
HALF = ConstantGate.of([0.5, 0.5])


def gaussians(seed, count=400, tokens=4):
    """Two overlapping Gaussian domains, scored by their own densities; in clusters of four."""
    r = np.random.default_rng(seed)
    found = []
    for mean in (-0.5, 0.5):
        x = r.normal(mean, 1.0, size=(count, tokens))
        logp = np.stack([-0.5 * (x - m) ** 2 - 0.5 * math.log(2 * math.pi) for m in (-0.5, 0.5)], axis=2)
        facts = {"tokens_N": [tokens] * count, "clusters_N": np.arange(count) // 4}
        features = sequence_features(logp.sum(axis=1), [tokens] * count, logp_NTE=logp)
        found.append(ScoredSequences.of(logp.sum(axis=1), features=features, **facts))
    return found


HELD, DRAWS = gaussians(2), gaussians(3)


@pytest.mark.parametrize("mixtures", [None, np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])], ids=["all", "hull"])
def test_an_enumerated_problem_is_certified_exactly(mixtures):
    P, Q = random_problem(0)
    fit = fit_robust_gate(P, Q, config=CONFIG, mixtures=mixtures)
    found = certify(fit, P, Q, mixtures=mixtures)
    labels = [each.label for each in (found.worst, found.z, found.lower, found.capacity)]
    assert labels == ["exact", "exact", "bound", "bound"]
    assert found.worst.value == pytest.approx(fit.worst)
    assert found.capacity.value == pytest.approx(channel_capacity(P if mixtures is None else mixtures @ P).value)
    # Z is not quite 1 after few steps, by which pi / Z may undercut what gates with Z = 1 can reach.
    assert found.capacity.value <= found.worst.value
    assert found.lower.value - abs(found.z.value - 1.0) <= found.worst.value
    assert found.gap.value == pytest.approx(found.worst.value - found.lower.value)
    assert [row.lam for row in found.domains] == pytest.approx(fit.lam.tolist())
    assert (found.worst.low, found.offsets) == (None, "entropy")


def test_samples_are_labelled_as_such():
    found = certify(fit_robust_gate(gaussians(0), gaussians(1), config=CONFIG), HELD, DRAWS)
    assert {found.worst.label, found.z.label, found.lower.label, found.gap.label, found.capacity.label} == {"estimate"}
    assert found.z.low < found.z.value < found.z.high
    assert "800 samples of 2 experts, 95 % cluster-robust" in found.z.how
    assert "compare only as far" in found.capacity.how
    row = found.domains[0]
    assert (row.name, row.sequences, row.tokens) == ("domain 0", 400, pytest.approx(4.0))
    assert row.value == pytest.approx(row.cross_entropy - row.offset)
    assert row.low < row.value < row.high
    worst = max(found.domains, key=lambda each: each.value)
    assert (found.worst.value, found.worst_domain) == (pytest.approx(worst.value), worst.name)


@pytest.mark.parametrize(("slope", "said"), [(-2.0, "less than a distribution"), (2.0, "more than a distribution")])
def test_a_z_whose_interval_excludes_one_is_told_in_words(slope, said, caplog):
    gate = init_gate("linear", 2, HELD[0].features)
    tilted = gate.replaced({"weight_EF": torch.tensor([[0.0] * 4, [0.0, 0.0, -slope, slope]], dtype=torch.float64)})
    found = certify(tilted, HELD, DRAWS)
    assert not found.z.low <= 1.0 <= found.z.high
    assert said in found.z.how
    assert f"Z is {found.z.value:.4g}" in caplog.text
    caplog.clear()
    rounding = certify(ConstantGate.of([1 / 3, 2 / 3]), HELD, DRAWS)  # no spread: what is off is rounding
    assert rounding.z.high - rounding.z.low < 1e-12
    assert not caplog.records


def test_causal_gates_need_no_samples_and_a_gate_alone_has_no_gap():
    found = certify(BayesGate.of([0.5, 0.5]), HELD)
    assert (found.causal, found.z.value, found.z.label) == (True, 1.0, "exact")
    assert (found.lower, found.gap, found.capacity) == (None, None, None)
    assert found.worst.value == pytest.approx(certify(HALF, HELD, DRAWS).worst.value)


def test_the_capacity_between_experts_is_over_the_mixtures_that_are_allowed():
    every = certify(HALF, HELD, DRAWS).capacity
    some = certify(HALF, HELD, DRAWS, mixtures=[[0.55, 0.45], [0.45, 0.55]]).capacity
    few = certify(HALF, HELD, DRAWS, mixtures=[[0.95, 0.05], [0.9, 0.1]])
    assert "all mixtures allowed" in every.how
    assert "over the mixtures that are allowed" in few.capacity.how
    assert few.capacity.value < some.value <= every.value + 1e-9
    assert few.capacity.low <= few.worst.value


def test_json_both_ways():
    P, Q = random_problem(0)
    gate = ConstantGate.of([0.2, 0.3, 0.5])
    for found in (certify(gate, P, Q, nu=[0.2, 0.3, 0.5], config=CONFIG), certify(HALF, gaussians(2, count=4), DRAWS)):
        assert Certificate.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
    with pytest.raises(DataError, match="no certificate"):
        Certificate.from_json({})
    with pytest.raises(ConfigError, match="nu has 2 entries"):
        certify(gate, P, Q, nu=[0.5, 0.5])
