"""Causal gates without training: padding, dead prefixes, refusals."""

import math

import pytest
import torch

from weftlm.gating.bayes import BayesGate, FixedShareGate
from weftlm.gating.gate import Features
from weftlm.gating.problem import log_model

INF = math.inf
each_gate = pytest.mark.parametrize("gate", [BayesGate.of([0.3, 0.7]), FixedShareGate.of([0.3, 0.7], 0.1)])


def scores(*rows):
    """One text, T x E, as features."""
    return Features(logp_BTE=torch.tensor([rows], dtype=torch.float64))


def test_bayes_never_recovers_an_expert_it_saw_fail_and_fixed_share_does():
    text = scores([-INF, -1.0], [-1.0, -9.0], [-1.0, -9.0], [0.0, 0.0])
    assert BayesGate.of([0.5, 0.5]).log_weights(text).exp()[0, 1:, 0].tolist() == [0.0, 0.0, 0.0]
    shared = FixedShareGate.of([0.5, 0.5], 0.01).log_weights(text).exp()[0]
    assert shared[1, 0] == pytest.approx(0.005)
    assert shared[3, 0] > 0.9


@each_gate
def test_after_an_impossible_prefix_the_first_weights_return_and_the_text_keeps_probability_0(gate):
    text = scores([-1.0, -2.0], [-INF, -INF], [-1.0, -2.0], [-1.0, -2.0])
    assert gate.log_weights(text).exp()[0, 2:].tolist() == [pytest.approx([0.3, 0.7])] * 2
    assert float(log_model(gate, text.logp_BTE.sum(dim=1), text)) == -INF


@each_gate
def test_padding_changes_nothing(gate):
    short = scores([-1.0, -3.0], [-4.0, -2.0])
    padded = Features(
        logp_BTE=torch.tensor([[[-1.0, -3.0], [9.0, -9.0], [-4.0, -2.0], [-INF, -INF]]], dtype=torch.float64),
        mask_BT=torch.tensor([[True, False, True, False]]),
    )
    torch.testing.assert_close(gate.log_weights(padded)[:, [0, 2]], gate.log_weights(short))
    totals = [log_model(gate, each.logp_BTE.sum(dim=1), each) for each in (short, padded)]
    torch.testing.assert_close(totals[1], totals[0])


def test_gradients_of_the_prior_survive_impossible_experts():
    gate = BayesGate.of([0.3, 0.7])
    logits_E = gate.tensors["logits_E"].clone().requires_grad_(True)
    text = scores([-INF, -1.0], [-1.0, -2.0])
    log_model(gate.replaced({"logits_E": logits_E}), text.logp_BTE.sum(dim=1), text).sum().backward()
    assert logits_E.grad.tolist() == pytest.approx([-0.3, 0.3])


def test_long_texts_do_not_underflow():
    logp_BTE = torch.full((1, 2000, 3), -11.0)
    logp_BTE[..., 1] = -10.9
    weights = BayesGate.of([1 / 3] * 3).log_weights(Features(logp_BTE=logp_BTE))
    assert weights.dtype == torch.float64
    assert weights[0, -1].tolist() == pytest.approx([-0.1 * 1999, 0.0, -0.1 * 1999], rel=1e-3, abs=1e-9)
