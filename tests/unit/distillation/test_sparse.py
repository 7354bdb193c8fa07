"""Sparse students: the objective's value and gradient, training, the table, serving with scores left unknown."""

import pytest
import torch
from support.distillation import Language
from support.gated import tokens, whole_pool
from support.gating import kl

from weftlm.distillation.config import DistilConfig
from weftlm.distillation.sparse import log_served, log_sparse
from weftlm.distillation.structural import distil_structural, log_student
from weftlm.errors import ConfigError
from weftlm.gating import Features
from weftlm.gating.config import PrefixGateConfig
from weftlm.gating.linear import ConstantGate
from weftlm.gating.modular_lm import ModularLM
from weftlm.gating.prefix_gate import PrefixGate

PRIOR = [0.45, 0.2, 0.35]


@pytest.fixture(scope="module")
def language():
    return Language(0, length=4)


@pytest.mark.parametrize("top", [1, 2, None])
def test_the_objective_is_worth_the_restricted_log_probability_and_moves_every_weight(language, top):
    gate = PrefixGate.of(PRIOR, PrefixGateConfig(top=top))
    bias = gate.tensors["bias_E"].requires_grad_(True)
    value = log_sparse(gate.replaced({"bias_E": bias}), language.features)
    torch.testing.assert_close(value.detach(), log_student(gate, language.features))
    (gradient,) = torch.autograd.grad((torch.from_numpy(language.model(ConstantGate.of(PRIOR))) * value).sum(), bias)
    assert bool((gradient.abs() > 1e-6).all()) or top is None


def test_masked_tokens_do_not_count(language):
    gate = PrefixGate.of(PRIOR, PrefixGateConfig(top=2))
    mask = torch.ones(language.logp_XTE.shape[:2], dtype=torch.bool)
    mask[:, 2:] = False
    masked = Features(logp_BTE=language.logp_XTE, mask_BT=mask)
    short = Features(logp_BTE=language.logp_XTE[:, :2])
    torch.testing.assert_close(log_sparse(gate, masked), log_sparse(gate, short))
    torch.testing.assert_close(log_served(gate, masked), log_served(gate, short))


@pytest.mark.parametrize("top", [1, 2])
def test_training_with_the_restriction_lowers_its_cost(language, top):
    gate, start = ConstantGate.of(PRIOR), PrefixGate.of(PRIOR)
    config = DistilConfig(steps=150, batch_sequences=None, evaluate_every_steps=25)
    found = distil_structural(gate, language.enumerated(), student=start.with_top(top), config=config)
    assert found.kl < 0.9 * found.history[0].kl
    assert found.gate.config.top == top
    student = language.causal_model(found.gate)
    assert student.sum() == pytest.approx(1.0, rel=1e-10)
    assert kl(language.model(gate), student) == pytest.approx(found.kl, rel=1e-6)


def test_serving_without_the_scores_of_sleeping_experts(language):
    full = PrefixGate.of(PRIOR)
    torch.testing.assert_close(log_served(full, language.features), log_student(full, language.features))
    for top in (1, 2):
        gate = full.with_top(top)
        exact = log_student(gate, language.features)
        torch.testing.assert_close(log_served(gate, language.features, known_tokens=4), exact)
        torch.testing.assert_close(log_served(gate, language.features, refresh_every=1), exact)
        served = log_served(gate, language.features, known_tokens=1)
        assert float(served.exp().sum()) == pytest.approx(1.0, rel=1e-10)
        assert not torch.allclose(served, exact)
    with pytest.raises(ConfigError, match="refresh_every is 0"):
        log_served(full, language.features, refresh_every=0)


@pytest.mark.parametrize(("top", "every"), [(1, 5), (2, 16), (2, None)])
def test_what_is_said_of_serving_is_what_is_served(top: int, every: int | None) -> None:
    pool = whole_pool(4)
    gate = PrefixGate.of([0.25] * 4, PrefixGateConfig(base="fixed_share", share=0.2)).with_top(top)
    ids = tokens(3, 33, seed=top)
    model = ModularLM(pool, gate, top_m=top, refresh_every=every)
    cache, total = None, torch.zeros(3, dtype=torch.float64)
    for t in range(32):
        out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        total += out.logits[:, -1].double().gather(1, ids[:, t + 1 : t + 2])[:, 0]
    features = Features(logp_BTE=pool.token_log_probs(ids))
    torch.testing.assert_close(log_served(gate, features, refresh_every=every), total, rtol=1e-5, atol=1e-4)
