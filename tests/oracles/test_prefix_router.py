"""The routers that follow a text, against plain loops over its tokens in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.experts import VOCAB, llama, make_pool
from transformers import DynamicCache

from weftlm.experts.statistics import bigram_bucket
from weftlm.routing.routed_model import RoutedModel
from weftlm.routing.router import Routing, TargetModule

SHARE, TEMPERATURE, KAPPA = 0.07, 2.0, 3.0
SECTION = {
    "router": "prefix", "k": 2, "share": SHARE, "temperature": TEMPERATURE, "bigram_strength": KAPPA,
    "background_rank": 64,
}  # fmt: skip


def posteriors(experts, tokens):
    """pi after every token; the equations of the docstring, one token at a time."""
    count = len(experts)
    unigrams = [(e.statistics.token_counts_V.double() + 0.5) for e in experts]
    unigrams = [each / each.sum() for each in unigrams]
    posterior = [1.0 / count] * count
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
            likelihoods.append(min(1.0, (pairs + KAPPA * alone) / (seen + KAPPA)))
        moved = [
            ((1 - SHARE) * old + SHARE / count) * new ** (1 / TEMPERATURE)
            for old, new in zip(posterior, likelihoods, strict=True)
        ]
        posterior = [each / sum(moved) for each in moved]
        found.append(posterior)
    return torch.tensor(found, dtype=torch.float64)


def random_tokens(count, seed, rows=1):
    return torch.randint(1, VOCAB, (rows, count), generator=torch.Generator().manual_seed(seed))


def routings(model, ids, **kwargs):
    found: dict[str, Routing] = {}

    def record(target: TargetModule, routing: Routing) -> None:
        found[target.name] = routing

    with model.recording(record), torch.inference_mode():
        model(input_ids=ids, **kwargs)
    return found


def one_of(model, ids, **kwargs):
    return next(iter(routings(model, ids, **kwargs).values()))


@pytest.fixture(scope="module")
def experts():
    return make_pool(llama(), 4, seed=3)


def test_the_posterior_is_that_of_a_loop_over_tokens(experts):
    tokens = random_tokens(50, 5)
    model = RoutedModel(llama(), experts, SECTION)
    expected_TE = posteriors(experts, tokens[0].tolist())
    best_TK, places_TK = expected_TE.topk(2, dim=-1)
    found = routings(model, tokens)
    assert len(found) == len(model.targets)
    for routing in found.values():
        assert torch.equal(routing.experts_BTK[0], places_TK)
        torch.testing.assert_close(routing.weights_BTK[0].double(), best_TK, atol=1e-5, rtol=1e-4)
        assert routing.background_BT is not None
        torch.testing.assert_close(routing.background_BT[0].double(), 1 - best_TK.sum(dim=-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("padding", "pieces"), [([], (23, 64)), ([3], (2, 4, 6, 9)), ([5], (2, 4, 6, 9)), (range(9), (9, 29))]
)
def test_a_text_in_pieces_and_with_padding_is_the_same_as_a_whole_one(experts, padding, pieces):
    tokens, mask = random_tokens(pieces[-1], 6), torch.ones(1, pieces[-1], dtype=torch.int64)
    mask[:, list(padding)] = 0
    real = mask.bool()
    model = RoutedModel(llama(), experts, {**SECTION, "k": 4})
    alone = one_of(model, tokens[real][None]).background_BT
    whole = one_of(model, tokens, attention_mask=mask).background_BT[real]
    cache, found, start = DynamicCache(), [], 0
    for stop in pieces:
        given = {"attention_mask": mask[:, :stop], "past_key_values": cache}
        found.append(one_of(model, tokens[:, start:stop], **given).background_BT)
        start = stop
    torch.testing.assert_close(torch.cat(found, dim=1)[real], whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(whole, alone[0], atol=1e-6, rtol=1e-5)


def test_a_text_that_changes_hands_is_followed_and_one_that_may_not_is_not(experts):
    first = torch.arange(0, 20).repeat(3)
    second = torch.arange(40, 60).repeat(3)
    named = []
    for expert, text in zip(experts[:2], (first, second), strict=True):
        counts = torch.bincount(text, minlength=VOCAB)
        pairs = torch.bincount(bigram_bucket(text[:-1], text[1:]), minlength=65536)
        named.append(
            replace(expert, statistics=replace(expert.statistics, token_counts_V=counts, bigram_counts_K=pairs))
        )
    tokens = torch.cat([first[:20], second[:8]])[None]
    weight_on_second = {}
    for share in (0.0, 0.02):
        model = RoutedModel(llama(), named, {**SECTION, "share": share, "temperature": 5.0})
        routing = one_of(model, tokens)
        weights_TE = torch.zeros(28, 2).scatter(1, routing.experts_BTK[0], routing.weights_BTK[0])
        assert weights_TE[19, 0] > 0.9
        weight_on_second[share] = float(weights_TE[-1, 1])
    assert weight_on_second[0.02] > 0.9
    assert weight_on_second[0.0] < 0.1


def test_the_blend_adds_centred_gate_scores_to_the_log_posterior(experts):
    tokens = random_tokens(15, 10)
    weight = 0.8
    model = RoutedModel(llama(), experts, {**SECTION, "router": "blend", "k": 4, "gate_weight": weight})
    target = model.targets[0]
    heard = []
    hook = model.model.get_submodule(target.name).register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    routing = routings(model, tokens)[target.name]
    hook.remove()
    u_TI = heard[0][0].double()

    def standard(x):
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)

    gates_EI = torch.stack([experts[place].gate.vectors[target.name].double() for place in target.experts])
    c_TS = standard(u_TI) @ standard(gates_EI).T / math.sqrt(target.width)
    log_TE = posteriors(experts, tokens[0].tolist()).log()
    log_TE[:, list(target.experts)] += weight * (c_TS - c_TS.mean(-1, keepdim=True))
    expected_TE = torch.softmax(log_TE, dim=-1)
    found_TE = torch.zeros(15, len(experts), dtype=torch.float64)
    found_TE.scatter_(1, routing.experts_BTK[0], routing.weights_BTK[0].double())
    torch.testing.assert_close(found_TE, expected_TE, atol=1e-5, rtol=1e-3)
