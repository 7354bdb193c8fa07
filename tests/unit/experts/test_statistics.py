"""What an expert says of its data: means against a plain loop, hashes against plain integers."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_expert import LENGTH, VOCAB, Fingerprint, cyclic_source, llama, random_expert

from weftlm.corpora.source import ArraySource
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.experts.adapted import adapted
from weftlm.experts.expert import Statistics
from weftlm.experts.files import check_statistics
from weftlm.experts.statistics import bigram_bucket, collect_statistics, embed_tokens

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def unigram(token: int) -> int:
    return mix(token + 0x9E3779B97F4A7C15)


def bigram(previous: int, following: int) -> int:
    return mix(mix(previous + 2 * 0x9E3779B97F4A7C15) + following)


def collect(model: Any, **changes: Any) -> Statistics:
    given: dict[str, Any] = {
        "expert": random_expert(model), "source": cyclic_source(400), "examples": 9, "sequence_length": LENGTH,
        "seed": 0, "batch_sequences": 4, **changes,
    }  # fmt: skip
    return collect_statistics(model, **given)


def test_means_are_those_of_a_plain_loop_with_the_expert_on() -> None:
    model, source = llama().double(), cyclic_source(LENGTH * 6 + 3)
    expert = random_expert(model)
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = Fingerprint(model)
    found = collect(model, expert=expert, source=source, examples=100)
    before.check(model)
    check_statistics(expert, found)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in expert.modules}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen[name].append(inputs[0][0].mean(dim=0))
        )
        for name in expert.modules
    ]
    model.eval()
    with torch.no_grad(), adapted(model, expert):
        for window in range(6):
            model(torch.from_numpy(source.read(window * LENGTH, LENGTH))[None])
    for handle in handles:
        handle.remove()
    for name, rows in seen.items():
        assert len(rows) == 6
        torch.testing.assert_close(found.means[name], torch.stack(rows).mean(dim=0).float(), rtol=1e-6, atol=1e-7)


def test_counts_are_those_of_the_sampled_tokens() -> None:
    source = cyclic_source(LENGTH * 5)
    found = collect(llama(), source=source, examples=50)
    windows = source.read(0, LENGTH * 5).reshape(5, LENGTH)
    assert found.token_counts_V.tolist() == np.bincount(windows.ravel(), minlength=VOCAB).tolist()
    pairs = Counter(
        (bigram(a, b) & (MASK >> 1)) % 65536 for row in windows.tolist() for a, b in pairwise(row)
    )  # fmt: skip
    assert {k: n for k, n in enumerate(found.bigram_counts_K.tolist()) if n} == dict(pairs)
    assert found.facts == {
        "examples": 5, "tokens": 5 * LENGTH, "sequence_length": LENGTH, "data": source.fingerprint, "seed": 0,
        "unreached": [],
    }  # fmt: skip
    assert torch.equal(found.embeddings_NF, embed_tokens(torch.from_numpy(windows)))


def test_the_draw_follows_the_seed_and_the_batch_does_not_matter() -> None:
    model, source = llama(), cyclic_source(1600)
    one, same, other = (collect(model, source=source, seed=s, batch_sequences=b) for s, b in ((1, 4), (1, 2), (2, 4)))
    assert torch.equal(one.embeddings_NF, same.embeddings_NF)
    assert torch.equal(one.token_counts_V, same.token_counts_V)
    for name, mean in one.means.items():
        torch.testing.assert_close(mean, same.means[name])
    assert not torch.equal(one.embeddings_NF, other.embeddings_NF)
    assert one.facts["examples"] == 9


def test_wrong_data_and_numbers_are_errors() -> None:
    model = llama()
    with pytest.raises(DataError, match="one window of 16"):
        collect(model, source=cyclic_source(LENGTH - 1))
    with pytest.raises(DataError, match="token id 64 and the model embeds 64"):
        collect(model, source=ArraySource([64] * 40))
    with pytest.raises(ConfigError, match=r"examples is 0, .* must be at least 1"):
        collect(model, examples=0)
    before = Fingerprint(model)
    model.get_submodule("model.layers.0.self_attn.q_proj").weight.data.fill_(math.inf)
    with pytest.raises(NumericsError, match="is not finite"):
        collect(model)
    assert before.modes == {name: module.training for name, module in model.named_modules()}


# -- embeddings ---------------------------------------------------------------------------------------------------


def test_hashing_is_the_plain_integer_formula() -> None:
    ids = [3, 50_000, 7, 3, 50_000, 0]
    width = 64
    x = [0.0] * width
    for h in [unigram(i) for i in ids] + [bigram(a, b) for a, b in pairwise(ids)]:
        x[(h & (MASK >> 1)) % width] += -1.0 if h >> 63 else 1.0
    e = [math.copysign(math.log1p(abs(v)), v) for v in x]
    norm = math.sqrt(sum(v * v for v in e))
    found = embed_tokens(torch.tensor([ids]), width=width)
    torch.testing.assert_close(found, torch.tensor([[v / norm for v in e]]), rtol=1e-6, atol=1e-7)
    pairs = torch.tensor(ids)
    expected = [(bigram(a, b) & (MASK >> 1)) % 1000 for a, b in pairwise(ids)]
    assert bigram_bucket(pairs[:-1], pairs[1:], 1000).tolist() == expected


def test_padding_is_not_seen_and_rows_do_not_see_each_other() -> None:
    tokens = torch.randint(VOCAB, (5, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[2, 8:] = 0
    mask[3, :4] = 0
    found = embed_tokens(tokens, mask_BT=mask)
    assert torch.equal(found[2], embed_tokens(tokens[2:3, :8])[0])
    assert torch.equal(found[3], embed_tokens(tokens[3:4, 4:])[0])
    order = torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(embed_tokens(tokens[order], mask_BT=mask[order]), found[order])
    assert torch.equal(embed_tokens(tokens, mask_BT=torch.zeros_like(mask)), torch.zeros(5, 1024))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
