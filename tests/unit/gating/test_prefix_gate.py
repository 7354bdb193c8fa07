"""The learned causal gate: where it starts, padding, impossible experts, fewer experts per token, missing scores."""

import math

import pytest
import torch

from weftlm.gating.bayes import BayesGate, FixedShareGate
from weftlm.gating.config import PrefixGateConfig
from weftlm.gating.gate import Features, load_gate, save_gate
from weftlm.gating.prefix_gate import PrefixGate

PRIOR = [0.5, 0.2, 0.3]
INF = math.inf


def scores(batch=4, time=7, experts=3):
    generator = torch.Generator().manual_seed(0)
    return -4.0 * torch.rand(batch, time, experts, generator=generator, dtype=torch.float64)


def trained(config=None):
    """A gate moved away from where it starts."""
    gate = PrefixGate.of(PRIOR, config)
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: torch.randn(gate.tensors[name].shape, generator=generator, dtype=torch.float64) for name in gate.learned
    }
    return gate.replaced({name: gate.tensors[name] + 0.5 * each for name, each in noise.items()})


def test_it_starts_as_bayes_or_as_fixed_share():
    features = Features(logp_BTE=scores(time=60))
    share = PrefixGateConfig(base="fixed_share", share=0.03)
    for config, plain in ((None, BayesGate.of(PRIOR)), (share, FixedShareGate.of(PRIOR, 0.03))):
        start = PrefixGate.of(PRIOR, config).standardised(features)
        found, expected = start.log_weights(features).exp(), plain.log_weights(features).exp()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
    assert torch.equal(start.with_prior(torch.tensor([0.2, 0.3, 0.5])).log_weights(features)[0, 0].exp().argsort(),
                       torch.tensor([0, 1, 2]))  # fmt: skip


def test_a_prior_of_zero_and_impossible_tokens_keep_an_expert_out():
    logp_BTE = scores()
    logp_BTE[0, 2, 1] = -INF
    features = Features(logp_BTE=logp_BTE)
    for prior in (PRIOR, [0.0, 0.4, 0.6]):
        weights = PrefixGate.of(prior).log_weights(features).exp()
        torch.testing.assert_close(weights, BayesGate.of(prior).log_weights(features).exp())
        assert weights[0, 3:, 1].tolist() == [0.0] * 4
    assert bool(torch.isfinite(trained().log_weights(features)).all())


def test_a_prefix_no_expert_can_write_leaves_finite_weights_and_gradients():
    logp_BTE = scores()
    logp_BTE[1, 3] = -INF
    gate = trained()
    theta = {name: gate.tensors[name].requires_grad_(True) for name in gate.learned}
    logw_BTE = gate.replaced(theta).log_weights(Features(logp_BTE=logp_BTE))
    torch.testing.assert_close(torch.logsumexp(logw_BTE, dim=-1), torch.zeros(4, 7, dtype=torch.float64))
    for gradient in torch.autograd.grad(logw_BTE.clamp_min(-50.0).sum(), list(theta.values())):
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("top", [1, 2])
def test_top_keeps_the_largest_weights_renormalised(tmp_path, top):
    features, gate = Features(logp_BTE=scores()), trained()
    full, sparse = gate.log_weights(features).exp(), gate.with_top(top)
    found = sparse.log_weights(features).exp()
    kept = torch.where(found > 0, full, torch.zeros_like(full))
    assert bool(((found > 0).sum(dim=-1) == top).all())
    torch.testing.assert_close(kept.sum(dim=-1), full.topk(top, dim=-1).values.sum(dim=-1))
    torch.testing.assert_close(found, kept / kept.sum(dim=-1, keepdim=True))
    save_gate(sparse, tmp_path / "gate.safetensors")
    assert load_gate(tmp_path / "gate.safetensors").config == sparse.config
    torch.testing.assert_close(sparse.with_top(None).log_weights(features).exp(), full)
