"""The routers that follow a text, against plain loops over its tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch
from support.experts import VOCAB, llama, make_pool
from transformers import DynamicCache

from weft.experts.statistics import bigram_bucket
from weft.routing.routed_model import RoutedModel
from weft.routing.router import Routing, Site

HALF_LIFE, TEMPERATURE, KAPPA, BIAS = 7.0, 2.0, 3.0, -0.4
SECTION = {
    "router": "prefix", "k": 2, "half_life_tokens": HALF_LIFE, "temperature": TEMPERATURE, "bigram_strength": KAPPA,
    "background_bias": BIAS, "background_rank": 64,
}  # fmt: skip


def posteriors(experts, tokens):
    """pi at every token over the experts and, last, the pool; the equations of the docstring, one token at a time."""
    count = len(experts)
    unigrams = [(e.statistics.token_counts_V.double() + 0.5) for e in experts]
    unigrams = [each / each.sum() for each in unigrams]
    decay = 2.0 ** (-1.0 / HALF_LIFE)
    sums = [0.0] * (count + 1)
    found = []
    for place, token in enumerate(tokens):
        likelihoods = []
        for expert, unigram in zip(experts, unigrams, strict=True):
            alone = float(unigram[token])
            if place == 0:
                likelihoods.append(alone)
                continue
            before = tokens[place - 1]
            bucket = int(bigram_bucket(torch.tensor(before), torch.tensor(token)))
            pairs = float(expert.statistics.bigram_counts_K[bucket])
            seen = float(expert.statistics.token_counts_V[before])
            likelihoods.append((pairs + KAPPA * alone) / (seen + KAPPA))
        likelihoods.append(sum(likelihoods) / count)
        sums = [decay * old + math.log(new) for old, new in zip(sums, likelihoods, strict=True)]
        scaled = torch.tensor(sums, dtype=torch.float64) / TEMPERATURE
        scaled[-1] += BIAS
        found.append(torch.softmax(scaled, dim=0))
    return torch.stack(found)


def routings(model, ids, **kwargs):
    found: dict[str, Routing] = {}

    def record(site: Site, routing: Routing) -> None:
        found[site.name] = routing

    with model.recording(record), torch.inference_mode():
        model(input_ids=ids, **kwargs)
    return found


@pytest.fixture
def experts():
    return make_pool(llama(), 4, seed=3)


def test_the_posterior_is_that_of_a_loop_over_tokens(experts):
    tokens = torch.randint(0, VOCAB, (1, 50), generator=torch.Generator().manual_seed(5))
    model = RoutedModel(llama(), experts, SECTION)
    expected_TG = posteriors(experts, tokens[0].tolist())
    best_TK, places_TK = expected_TG[:, :-1].topk(2, dim=-1)
    found = routings(model, tokens)
    assert len(found) == len(model.sites)
    for routing in found.values():
        assert torch.equal(routing.experts_BTK[0], places_TK)
        torch.testing.assert_close(routing.weights_BTK[0].double(), best_TK, atol=1e-5, rtol=1e-4)
        assert routing.background_BT is not None
        torch.testing.assert_close(routing.background_BT[0].double(), 1 - best_TK.sum(dim=-1), atol=1e-5, rtol=1e-4)


def test_long_prefixes_are_summed_in_pieces_to_the_same(experts):
    tokens = torch.randint(0, VOCAB, (1, 64), generator=torch.Generator().manual_seed(6))
    model = RoutedModel(llama(), experts, {**SECTION, "k": 4})
    whole = next(iter(routings(model, tokens).values()))
    with torch.inference_mode():
        first = model(input_ids=tokens[:, :23], use_cache=True)
    rest = next(iter(routings(model, tokens[:, 23:], past_key_values=first.past_key_values).values()))
    torch.testing.assert_close(rest.background_BT, whole.background_BT[:, 23:], atol=1e-6, rtol=1e-5)


def test_padding_between_passes_ages_nothing(experts):
    tokens = torch.randint(0, VOCAB, (1, 20), generator=torch.Generator().manual_seed(7))
    model = RoutedModel(llama(), experts, SECTION)
    alone = next(iter(routings(model, tokens).values()))
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.int64), tokens], dim=1)
    mask = torch.cat([torch.zeros(1, 9, dtype=torch.int64), torch.ones_like(tokens)], dim=1)
    beside = next(iter(routings(model, padded, attention_mask=mask).values()))
    torch.testing.assert_close(beside.weights_BTK[:, 9:], alone.weights_BTK, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padding", [3, 5, 6])
def test_pieces_that_end_in_padding_equal_one_pass(experts, padding):
    tokens = torch.randint(1, VOCAB, (1, 9), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(tokens)
    mask[:, padding] = 0
    model = RoutedModel(llama(), experts, SECTION)
    whole = next(iter(routings(model, tokens, attention_mask=mask).values()))
    cache, found = DynamicCache(), []
    for start, stop in ((0, 2), (2, 4), (4, 6), (6, 9)):
        given = {"attention_mask": mask[:, :stop], "past_key_values": cache}
        found.append(next(iter(routings(model, tokens[:, start:stop], **given).values())).background_BT)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, dim=1)[real], whole.background_BT[real], atol=1e-6, rtol=1e-5)


def test_a_pool_that_wins_everywhere_is_the_merged_model(experts):
    tokens = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(8))
    model = RoutedModel(llama(), experts, {**SECTION, "background_bias": 1e6})
    with torch.inference_mode():
        prefix = model(input_ids=tokens).logits
        model.use_router("merged")
        torch.testing.assert_close(prefix, model(input_ids=tokens).logits, atol=2e-4, rtol=2e-4)


def test_a_gate_weight_of_zero_is_the_prefix_alone_and_a_large_one_is_not(experts):
    tokens = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(9))
    model = RoutedModel(llama(), experts, SECTION)
    with torch.inference_mode():
        prefix = model(input_ids=tokens).logits
        model.use_router({**SECTION, "router": "blend", "gate_weight": 0.0})
        torch.testing.assert_close(model(input_ids=tokens).logits, prefix, atol=1e-5, rtol=1e-5)
        model.use_router({**SECTION, "router": "blend", "gate_weight": 3.0})
        assert not torch.allclose(model(input_ids=tokens).logits, prefix, atol=1e-3)


def test_the_blend_adds_centred_gate_scores_to_the_log_posterior(experts):
    tokens = torch.randint(0, VOCAB, (1, 15), generator=torch.Generator().manual_seed(10))
    weight = 0.8
    model = RoutedModel(llama(), experts, {**SECTION, "router": "blend", "k": 4, "gate_weight": weight})
    site = model.sites[0]
    heard = []
    hook = model.model.get_submodule(site.name).register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    routing = routings(model, tokens)[site.name]
    hook.remove()
    u_TI = heard[0][0].double()

    def standard(x):
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)

    gates_EI = torch.stack([experts[place].gate.vectors[site.name].double() for place in site.experts])
    c_TS = standard(u_TI) @ standard(gates_EI).T / math.sqrt(site.width)
    log_TG = posteriors(experts, tokens[0].tolist()).log()
    log_TG[:, list(site.experts)] += weight * (c_TS - c_TS.mean(-1, keepdim=True))
    expected_TG = torch.softmax(log_TG, dim=-1)
    found_TE = torch.zeros(15, len(experts), dtype=torch.float64)
    found_TE.scatter_(1, routing.experts_BTK[0], routing.weights_BTK[0].double())
    torch.testing.assert_close(found_TE, expected_TG[:, :-1], atol=1e-5, rtol=1e-3)
