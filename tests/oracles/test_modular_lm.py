"""Gated models against brute force in float64: every prefix from its definition, no cache, no batch, one loop."""

import pytest
import torch
from support import experts as tiny
from support.gated import mixed_pool, tokens, whole_pool

from weftlm.experts.low_rank import Rows
from weftlm.gating.bayes import BayesGate, FixedShareGate
from weftlm.gating.experts import ExpertPool
from weftlm.gating.modular_lm import ModularLM


def prefix_log_probs(pool, text):
    """log q_e(. | text) in float64, every expert run alone on the prefix alone: T x E x V."""
    rows = []
    for end in range(1, len(text) + 1):
        ids, places = torch.tensor([text[:end]]), map(pool.where, range(len(pool)))
        logits = [backbone.run(Rows(one=place), ids)[0, -1].double() for backbone, place in places]
        rows.append(torch.stack(logits).log_softmax(-1))
    return torch.stack(rows)


def bayes(prior, logq, text, upto):
    """log gamma after text[:upto + 1]; the first token is context."""
    joint = torch.tensor(prior, dtype=torch.float64).log()
    for t in range(1, upto + 1):
        joint = joint + logq[t - 1, :, text[t]]
    return joint.log_softmax(0)


def share(weights, scores, alpha):
    after = (weights.log() + scores).softmax(0)
    return (1 - alpha) * after + alpha / len(weights)


@pytest.mark.parametrize("pool", [mixed_pool(torch.float64), whole_pool(3).to(torch.float64)], ids=["mixed", "whole"])
def test_dense_models_follow_the_definition(pool):
    experts = len(pool)
    prior = [0.5] + [0.5 / (experts - 1)] * (experts - 1)
    text = tokens(1, 9, seed=3)[0].tolist()
    logq = prefix_log_probs(pool, text)
    whole = ModularLM(pool, BayesGate.of(prior))(torch.tensor([text])).logits[0].double()
    shared = ModularLM(pool, FixedShareGate.of(prior, 0.1))(torch.tensor([text])).logits[0].double()
    weights = torch.tensor(prior, dtype=torch.float64)
    for t in range(len(text)):
        expected = (bayes(prior, logq, text, t)[:, None] + logq[t]).logsumexp(0)
        torch.testing.assert_close(whole[t], expected, atol=2e-6, rtol=1e-6)
        if t:
            weights = share(weights, logq[t - 1, :, text[t]], 0.1)
        expected = (weights.log()[:, None] + logq[t]).logsumexp(0)
        torch.testing.assert_close(shared[t], expected, atol=2e-6, rtol=1e-6)
    # The exact conditional of the mixture: prod_t pi(x_t | x_<t) = sum_e lambda_e q_e(x).
    chain = sum(whole[t - 1, text[t]] for t in range(1, len(text)))
    sums = torch.stack([logq[t - 1, :, text[t]] for t in range(1, len(text))]).sum(0)
    assert float(chain) == pytest.approx(float((torch.tensor(prior).double().log() + sums).logsumexp(0)), abs=1e-5)


def sparse_by_hand(pool, text, prompt, m, every, alpha, pad=0):
    """What serving m experts a token must give, from the rules alone: log pi after each token from the prompt's end on.

    The log-probabilities of all experts at all prefixes are at hand; of a token since the last catch-up the gate is
    given those of the active experts, and the mixture's own for the others. A batch keeps one time: `pad` slots stand
    before the text in it.
    """
    logq = prefix_log_probs(pool, text)
    exact = told = torch.full((len(pool),), 1 / len(pool), dtype=torch.float64)
    for t in range(1, prompt):
        exact = told = share(exact, logq[t - 1, :, text[t]], alpha)
    anchor, active = prompt, exact.topk(m).indices

    def mixed(weights, t):
        kept = weights[active]
        return ((kept / kept.sum()).log()[:, None] + logq[t, active]).logsumexp(0)

    answers = [mixed(exact, prompt - 1)]
    for end in range(prompt + 1, len(text) + 1):
        token = text[end - 1]
        scores = answers[-1][token].expand(len(pool)).clone()
        scores[active] = logq[end - 2, active, token]
        told = share(told, scores, alpha)
        if every is not None and end - anchor >= min(every, anchor + pad):
            for t in range(anchor, end):
                exact = share(exact, logq[t - 1, :, text[t]], alpha)
            told, anchor, active = exact, end, exact.topk(m).indices
        answers.append(mixed(told, end - 1))
    return torch.stack(answers)


@pytest.mark.parametrize("every", [1, 3, 7, None])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_sparse_serving_follows_its_rules(m, every):
    pool, alpha, prompt = mixed_pool(torch.float64), 0.2, 4
    model = ModularLM(pool, FixedShareGate.of([0.25] * 4, alpha), top_m=m, refresh_every=every)
    texts = tokens(3, 22, seed=5)
    # Padded on the left by 0, 1 and 2 tokens.
    ids = torch.stack([torch.cat([torch.zeros(pad, dtype=torch.int64), texts[pad, : 22 - pad]]) for pad in range(3)])
    mask = torch.stack([(torch.arange(22) >= pad).long() for pad in range(3)])
    start = prompt + 2
    out = model(ids[:, :start], attention_mask=mask[:, :start], use_cache=True, logits_to_keep=1)
    cache, rows = out.past_key_values, [out.logits]
    for t in range(start, 22):
        out = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
        rows.append(out.logits)
    found = torch.cat(rows, dim=1).double()
    for pad in range(3):
        text, refreshed = texts[pad, : 22 - pad].tolist(), 1 if m == 4 else every
        expected = sparse_by_hand(pool, text, start - pad, m, refreshed, alpha, pad)
        torch.testing.assert_close(found[pad], expected, atol=5e-6, rtol=1e-6)
    assert float(found.exp().sum(-1).sub(1).abs().max()) < 1e-6


@pytest.mark.parametrize("top_m", [None, 1, 2])
def test_the_future_changes_nothing(top_m):
    model = ModularLM(mixed_pool(), FixedShareGate.of([0.25] * 4, 0.05), top_m=top_m)
    ids = tokens(2, 10)
    other = ids.clone()
    other[:, 6:] = tokens(2, 4, seed=99)
    torch.testing.assert_close(model(ids).logits[:, :6], model(other).logits[:, :6], atol=1e-6, rtol=0)
    assert (model(ids).logits[:, 6:] - model(other).logits[:, 6:]).abs().max() > 0.1


@pytest.mark.parametrize("top_m", [None, 1])
def test_equal_experts_make_the_gate_irrelevant(top_m):
    pool = ExpertPool.of({name: tiny.llama(3) for name in "abc"})
    ids = tokens(2, 8)
    alone = pool.log_probs(ids)[:, :, 0]
    for gate in (BayesGate.of([0.9, 0.05, 0.05]), FixedShareGate.of([1 / 3] * 3, 0.3)):
        model = ModularLM(pool, gate, top_m=top_m, refresh_every=None)
        torch.testing.assert_close(model(ids).logits, alone, atol=2e-6, rtol=1e-5)
        rows, cache = [], None
        for t in range(8):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            rows, cache = [*rows, out.logits], out.past_key_values
        torch.testing.assert_close(torch.cat(rows, dim=1), alone, atol=2e-5, rtol=1e-5)


def test_one_expert_equals_that_expert():
    pool = ExpertPool.of({"a": tiny.llama(3)})
    model, ids = ModularLM(pool, BayesGate.of([1.0])), tokens(2, 8)
    torch.testing.assert_close(model(ids).logits, pool.log_probs(ids)[:, :, 0], atol=1e-6, rtol=0)
    expected = pool.members[0].model.generate(ids, max_new_tokens=8, attention_mask=torch.ones_like(ids))
    assert torch.equal(model.generate(ids, max_new_tokens=8), expected)


def test_every_prefix_sums_to_one_and_so_does_the_set_of_texts():
    model = ModularLM(whole_pool(2).to(torch.float64), FixedShareGate.of([0.5, 0.5], 0.1), top_m=1)
    ids = torch.cartesian_prod(torch.tensor([7]), torch.arange(64), torch.arange(64))
    logp = model(ids[:, :-1]).logits.double().gather(2, ids[:, 1:, None]).sum((1, 2))
    assert float(logp.exp().sum()) == pytest.approx(1.0, abs=1e-5)
