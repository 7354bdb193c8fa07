"""Gated models as Hugging Face models: generation of every kind, saving, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import experts as tiny
from support.gated import mixed_pool, tokens, whole_pool
from support.in_memory import without_keys
from support.tiny_expert import random_expert
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from weftlm.errors import ConfigError
from weftlm.experts.expert import BaseReference, Expert
from weftlm.experts.library import ExpertLibrary
from weftlm.gating import experts as room
from weftlm.gating import modular_reader
from weftlm.gating.bayes import BayesGate, FixedShareGate
from weftlm.gating.config import ExpertSource
from weftlm.gating.experts import ExpertPool
from weftlm.gating.gate import Features, init_gate
from weftlm.gating.modular_lm import ModularLM
from weftlm.gating.modular_reader import catch_up_due
from weftlm.models.fingerprint import base_fingerprint

NEAR = {"atol": 2e-5, "rtol": 1e-5}


def share(experts, alpha=0.05):
    return FixedShareGate.of([1 / experts] * experts, alpha)


def prefix(experts, **options):
    """A gate some way from where fitting starts."""
    gate = init_gate({"gate": "prefix", **options}, experts, Features(logp_BTE=-3 * torch.rand(4, 9, experts)))
    random = torch.Generator().manual_seed(0)
    noise = {name: 0.3 * torch.randn(gate.tensors[name].shape, generator=random) for name in gate.learned}
    return gate.replaced({name: gate.tensors[name] + each for name, each in noise.items()})


def padded(batch=3, length=6):
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.int64)
    ids[0, :2], mask[0, :2] = 0, 0
    return ids, mask


@pytest.mark.parametrize(
    ("gate", "options", "how"),
    [
        (BayesGate.of([0.25] * 4), {}, {}),
        (prefix(4), {}, {"do_sample": True, "top_k": 5, "temperature": 0.7, "num_return_sequences": 2}),
        (share(4), {}, {"num_beams": 3, "num_return_sequences": 3, "do_sample": True}),
        (share(4), {"top_m": 2, "refresh_every": 1}, {"do_sample": True, "num_beams": 2}),
        (prefix(4, top=2), {"refresh_every": 1}, {}),  # as many experts as the gate was trained for
    ],
)
def test_generation_with_caches_equals_generation_without(gate, options, how):
    model, (ids, mask), found = ModularLM(mixed_pool(), gate, **options), padded(), []
    for cached in (True, False):
        torch.manual_seed(1)
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, use_cache=cached, **how))
    assert torch.equal(*found)
    assert found[0].shape == (3 * how.get("num_return_sequences", 1), 12)
    assert model.config.top_m == options.get("top_m", gate.top)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, (ids, pad) = ModularLM(mixed_pool(), share(4)), (tokens(1, 6), torch.zeros(1, 3, dtype=torch.int64))
    parts = [(pad, pad), (ids, pad.new_ones(1, 6))] if side == "left" else [(ids, pad.new_ones(1, 6)), (pad, pad)]
    padded_ids, mask = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    own = slice(3, None) if side == "left" else slice(0, 6)
    logits = model(padded_ids, attention_mask=mask).logits[:, own]
    torch.testing.assert_close(logits, model(ids).logits, **NEAR)


def test_experts_without_keys_and_values_read_the_text_again():
    model, ids = ModularLM(ExpertPool.of({"a": without_keys(), "b": tiny.llama()}), share(2)), tokens(2, 5)
    logits = model(ids).logits
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 5))
    cached, again = (model.generate(ids, max_new_tokens=4, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, again)


@pytest.mark.parametrize("top_m", [1, 3])
def test_sparse_generation_does_not_depend_on_the_batch(top_m):
    model = ModularLM(mixed_pool(), share(4), top_m=top_m, refresh_every=5)
    ids, mask = padded(3)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=16)
    for row in range(3):
        own = ids[row : row + 1, 2 * (row == 0) :]
        single = model.generate(own, max_new_tokens=16)
        assert torch.equal(single[0, own.shape[1] :], together[row, 6:])


CHANGES = {
    "beams": (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0]),
    "numbers": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "repeats": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize(("steps", "change"), [(0, "beams"), (2, "beams"), *((4, change) for change in CHANGES)])
def test_a_cache_takes_its_sequences_in_another_order_and_number(steps, change):
    """Also between two refreshes, when other experts are active on every sequence."""
    apply, order = CHANGES[change]
    model = ModularLM(mixed_pool(), share(4, 0.3), top_m=2, refresh_every=9)
    ids, mask = padded()
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    other = model(ids[order], attention_mask=mask[order], use_cache=True).past_key_values
    for t in range(9):
        if t == steps:
            apply(cache)
        step, mask = tokens(3, 1, seed=t), torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], dim=1)
        own = slice(None) if t < steps else order
        first = model(step[own], attention_mask=mask[own], past_key_values=cache).logits
        second = model(step[order], attention_mask=mask[order], past_key_values=other).logits
        if t >= steps:
            torch.testing.assert_close(first, second, **NEAR)
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(ids[order], attention_mask=mask[order, : ids.shape[1]], past_key_values=cache).logits
    torch.testing.assert_close(again, model(ids[order], attention_mask=mask[order, : ids.shape[1]]).logits, **NEAR)


def test_only_the_preferred_experts_run(monkeypatch):
    pool, ran, real = mixed_pool(), [], room.Backbone.run

    def counting(self, rows, ids, **more):
        ran.append(ids.numel())
        return real(self, rows, ids, **more)

    monkeypatch.setattr(room.Backbone, "run", counting)
    # 11 tokens are read; with every expert, after 4, 8 of them on, by three more for four tokens each time
    for options, count in (({"top_m": 1, "refresh_every": None}, 11), ({"top_m": 1, "refresh_every": 4}, 41), ({}, 44)):
        ran.clear()
        ModularLM(pool, BayesGate.of([0.25] * 4), **options).generate(tokens(1, 6), max_new_tokens=12)
        assert 11 <= sum(ran) - 4 * 6 <= count


def test_a_text_ends_where_any_expert_ends_it():
    first, second = tiny.llama(1), tiny.llama(2)
    first.generation_config = GenerationConfig(eos_token_id=3, pad_token_id=0)
    second.generation_config = GenerationConfig(eos_token_id=[7, 3])
    model = ModularLM(ExpertPool.of({"a": first, "b": second}), share(2))
    assert model.generation_config.eos_token_id == [3, 7]
    ids = tokens(2, 4)
    free = model.generate(ids, max_new_tokens=10, eos_token_id=None)
    stop = int(free[0, 6])
    ended = model.generate(ids, max_new_tokens=10, eos_token_id=stop, pad_token_id=0)
    end = (free[0, 4:] == stop).nonzero()[0, 0] + 5
    assert torch.equal(ended[0, :end], free[0, :end])
    assert not ended[0, end:].any()


def test_prompts_larger_than_memory_are_read_in_pieces(monkeypatch):
    model, ids = ModularLM(mixed_pool(), share(4)), tokens(2, 9)
    whole = model(ids, use_cache=True, logits_to_keep=3).logits
    monkeypatch.setattr(room, "LOGITS", 1)
    monkeypatch.setattr(modular_reader, "PIECE", 2)
    assert whole.shape == (2, 3, 64)
    torch.testing.assert_close(model(ids, use_cache=True, logits_to_keep=3).logits, whole, **NEAR)
    torch.testing.assert_close(model(ids).logits[:, -3:], whole, **NEAR)


def test_catch_ups_come_early_in_a_text_and_then_in_turn():
    anchor, found = 1, []
    for length in range(2, 140):
        if catch_up_due(32, anchor, length):
            found.append(length)
            anchor = length
    assert found == [2, 4, 8, 16, 32, 64, 96, 128]
    assert [catch_up_due(32, 500, 531), catch_up_due(32, 500, 532)] == [False, True]
    assert not catch_up_due(None, 1, 10_000)


# -- on disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True])
def test_saved_models_come_back(tmp_path, copy):
    if copy:
        pool = mixed_pool()
    else:
        for seed in range(2):
            tiny.llama(seed).save_pretrained(tmp_path / f"m{seed}")
        pool = ExpertPool.load([ExpertSource(name=f"m{s}", model=str(tmp_path / f"m{s}")) for s in range(2)])
    gate = FixedShareGate.of([0.7] + [0.3 / (len(pool) - 1)] * (len(pool) - 1), 0.02)
    model = ModularLM(pool, gate, top_m=1, refresh_every=4)
    model.generation_config = GenerationConfig(eos_token_id=3, pad_token_id=0)
    model.save_pretrained(tmp_path / "saved", copy_experts=copy)
    ids = tokens(2, 7)
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    for back in (ModularLM.from_pretrained(moved), AutoModelForCausalLM.from_pretrained(moved)):
        assert isinstance(back, ModularLM)
        assert (back.pool.names, len(back.pool.backbones)) == (pool.names, 2)
        assert (back.config.top_m, back.config.refresh_every, back.generation_config.eos_token_id) == (1, 4, 3)
        torch.testing.assert_close(back(ids).logits, model(ids).logits, **NEAR)
    with pytest.raises(ConfigError, match="not empty"):
        model.save_pretrained(moved, copy_experts=copy)
    assert not list(tmp_path.glob(".*"))


def test_a_library_whose_base_is_named_from_here_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny.llama()
    base.save_pretrained("base")
    reference = BaseReference("base", None, base_fingerprint(base))
    library = ExpertLibrary.open(Path("library"), reference)
    library.add(Expert(replace(random_expert(base), name="a", base=reference)))
    model = ModularLM(ExpertPool.load([ExpertSource(name="a", library="library", expert="a")]), BayesGate.of([1.0]))
    model.save_pretrained("saved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ids = tokens(1, 5)
    assert torch.equal(ModularLM.from_pretrained(tmp_path / "saved")(ids).logits, model(ids).logits)


def test_experts_of_two_float_types_lose_nothing(tmp_path):
    pool = ExpertPool.of({"rough": tiny.llama(0).to(torch.bfloat16), "fine": tiny.llama(1)})
    ModularLM(pool, share(2)).save_pretrained(tmp_path / "saved", copy_experts=True)
    back = ModularLM.from_pretrained(tmp_path / "saved").pool
    for now, then in zip(back.parameters(), pool.parameters(), strict=True):
        assert torch.equal(now, then.float())


def test_folders_that_hold_no_gated_model_are_refused(tmp_path):
    model = ModularLM(whole_pool(2), share(2))
    with pytest.raises(ConfigError, match=r"w0, w1 were made in memory.*copy_experts=True"):
        model.save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match="holds no gated model"):
        ModularLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "a", copy_experts=True)
    manifest = tmp_path / "a" / "modular.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": "x"}))
    with pytest.raises(ConfigError, match="not of the format"):
        ModularLM.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("gate", "options", "match"),
    [
        (init_gate("linear", 2, Features(sequence_BF=torch.randn(4, 3))), {}, "distil it first"),
        (share(3), {}, "over 3 experts came with a pool of 2"),
        (share(2), {"top_m": 3}, "top_m is 3"),
        (share(2), {"refresh_every": 0}, "refresh_every is 0"),
    ],
)
def test_what_cannot_be_served_is_refused(gate, options, match):
    with pytest.raises(ConfigError, match=match):
        ModularLM(whole_pool(2), gate, **options)


def test_calls_that_do_not_fit_are_refused():
    model, ids = ModularLM(whole_pool(2), share(2)), tokens(1, 4)
    cache = model(ids, use_cache=True).past_key_values
    for call, match in (
        (lambda: model(ids, past_key_values=DynamicCache()), "DynamicCache"),
        (lambda: model(tokens(2, 1), past_key_values=cache), "of 1 sequences"),
        (lambda: model(ids[:, :1], attention_mask=torch.ones(1, 2), past_key_values=cache), "cover 4 cached and 1 new"),
        (lambda: cache.crop(-1), "cannot take tokens back"),
        (lambda: model.generate(tokens(1, 60), max_new_tokens=10), "64 positions"),
        (lambda: model(tokens(1, 65)), "64 positions"),
        (lambda: model(ids[0]), "B x T"),
    ):
        with pytest.raises(ConfigError, match=match):
            call()
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=tiny.llama(), max_new_tokens=2)
