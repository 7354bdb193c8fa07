"""Gated models as Hugging Face models: generation of every kind, saving, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import experts as tiny
from support.gated import mixed_pool, tokens, whole_pool
from support.tiny_expert import random_expert
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from weftlm.corpora.source import ArraySource
from weftlm.errors import ConfigError
from weftlm.evaluation.perplexity import evaluate_source
from weftlm.experts.expert import BaseReference, Expert
from weftlm.experts.library import ExpertLibrary
from weftlm.gating import experts as room
from weftlm.gating import modular_lm
from weftlm.gating.bayes import BayesGate, FixedShareGate
from weftlm.gating.config import ExpertSource
from weftlm.gating.experts import ExpertPool
from weftlm.gating.gate import Features, init_gate
from weftlm.gating.modular_cache import catch_up_due
from weftlm.gating.modular_lm import ModularLM
from weftlm.models.fingerprint import base_fingerprint
from weftlm.models.language_model import LanguageModel


def moved(gate):
    """A gate some way from where fitting starts."""
    random = torch.Generator().manual_seed(0)
    return gate.replaced(
        {
            name: gate.tensors[name] + 0.3 * torch.randn(gate.tensors[name].shape, generator=random)
            for name in gate.learned
        }
    )


GATES = {
    "bayes": lambda experts: BayesGate.of([1 / experts] * experts),
    "share": lambda experts: FixedShareGate.of([1 / experts] * experts, 0.05),
    "prefix": lambda experts: moved(init_gate("prefix", experts, Features(logp_BTE=-3 * torch.rand(4, 9, experts)))),
    "uniform": lambda experts: init_gate("causal_uniform", experts, Features(logp_BTE=torch.zeros(1, 1, experts))),
}


def padded(batch=3, length=6):
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.int64)
    ids[0, :2], mask[0, :2] = 0, 0
    return ids, mask


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "top_k": 5, "temperature": 0.7, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3, "do_sample": True},
    ],
)
def test_generation_with_caches_equals_generation_without(gate, how):
    model = ModularLM(mixed_pool(), GATES[gate](4))
    ids, mask = padded()
    torch.manual_seed(1)
    cached = model.generate(ids, attention_mask=mask, max_new_tokens=8, **how)
    torch.manual_seed(1)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=False, **how)
    assert torch.equal(cached, plain)
    assert cached.shape == (3 * how.get("num_return_sequences", 1), 14)


@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_refreshing_at_every_token_generates_what_one_pass_would(how):
    ids, mask = padded()
    model = ModularLM(mixed_pool(), GATES["share"](4), top_m=2, refresh_every=1)
    torch.manual_seed(1)
    cached = model.generate(ids, attention_mask=mask, max_new_tokens=8, **how)
    torch.manual_seed(1)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=False, **how))


@pytest.mark.parametrize("top_m", [1, 2, 3])
def test_sparse_generation_does_not_depend_on_the_batch(top_m):
    model = ModularLM(mixed_pool(), GATES["share"](4), top_m=top_m, refresh_every=5)
    ids, mask = padded(4)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=16)
    for row in range(4):
        own = ids[row : row + 1, 2 * (row == 0) :]
        single = model.generate(own, max_new_tokens=16)
        assert torch.equal(single[0, own.shape[1] :], together[row, 6:])


@pytest.mark.parametrize("steps", [0, 2, 4])
def test_beams_reorder_caches_and_the_gate(steps):
    """Also between two refreshes, when every expert has read another part of every sequence."""
    model = ModularLM(mixed_pool(), FixedShareGate.of([0.25] * 4, 0.3), top_m=2, refresh_every=9)
    ids, mask = padded()
    order = torch.tensor([1, 2, 0])
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    other = model(ids[order], attention_mask=mask[order], use_cache=True).past_key_values
    for t in range(steps):
        step = tokens(3, 1, seed=t)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], dim=1)
        model(step, attention_mask=mask, past_key_values=cache)
        model(step[order], attention_mask=mask[order], past_key_values=other)
    if steps:
        assert len(set(map(tuple, cache.done_EB.T.tolist()))) == 3
    cache.reorder_cache(order)
    for t in range(steps, 9):
        if t == 7:
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([False, True, False, True, False, True]))
            assert cache.batch_size == 3
        step = tokens(3, 1, seed=t)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], dim=1)
        first = model(step, attention_mask=mask[order], past_key_values=cache).logits
        second = model(step, attention_mask=mask[order], past_key_values=other).logits
        torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-5)


def test_only_the_preferred_experts_run(monkeypatch):
    pool = mixed_pool()
    ran = []
    real = room.Backbone.run

    def counting(self, rows, ids, **more):
        ran.append(ids.numel())
        return real(self, rows, ids, **more)

    monkeypatch.setattr(room.Backbone, "run", counting)
    for every, most in ((None, 11), (4, 9 + 2 * 4 * 4)):
        model = ModularLM(pool, GATES["bayes"](4), top_m=1, refresh_every=every)
        ran.clear()
        model.generate(tokens(1, 6), max_new_tokens=12)
        assert sum(ran) - 4 * 6 <= most
        assert sum(ran) - 4 * 6 >= 11
    dense = ModularLM(pool, GATES["bayes"](4))
    ran.clear()
    dense.generate(tokens(1, 6), max_new_tokens=12)
    assert sum(ran) == 4 * (6 + 11)


def test_end_of_text_stops_and_pads():
    model = ModularLM(whole_pool(), GATES["bayes"](3))
    ids = tokens(2, 4)
    free = model.generate(ids, max_new_tokens=10)
    stop = int(free[0, 6])
    ended = model.generate(ids, max_new_tokens=10, eos_token_id=stop, pad_token_id=0)
    first = (free[0, 4:] == stop).nonzero()[0, 0] + 4
    assert torch.equal(ended[0, : first + 1], free[0, : first + 1])
    assert not ended[0, first + 1 :].any()


def test_prompts_larger_than_memory_are_read_in_pieces(monkeypatch):
    model = ModularLM(mixed_pool(), GATES["share"](4))
    ids = tokens(2, 9)
    whole = model(ids, use_cache=True, logits_to_keep=3).logits
    monkeypatch.setattr(room, "LOGITS", 1)
    monkeypatch.setattr(modular_lm, "PIECE", 2)
    pieces = model(ids, use_cache=True, logits_to_keep=3).logits
    assert whole.shape == (2, 3, 64)
    torch.testing.assert_close(pieces, whole, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(model(ids).logits[:, -3:], whole, atol=2e-5, rtol=1e-5)


def test_it_is_a_language_model_for_evaluation():
    model = ModularLM(whole_pool(), GATES["share"](3), top_m=2)
    assert isinstance(model, LanguageModel)
    ids = tokens(3, 9)
    logp = model.log_probs(ids)
    assert logp.dtype == torch.float32
    expected = logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(model.token_log_probs(ids), expected, atol=2e-5, rtol=1e-5)
    source = ArraySource(tokens(1, 50)[0].numpy(), text_bytes=50)
    result = evaluate_source(model, source, sequence_length=8, batch_size=2)
    pieces = torch.from_numpy(source.read_many(torch.arange(0, 48, 8).numpy(), 9))
    tail = torch.from_numpy(source.read(48, 2))[None]
    total = model.token_log_probs(pieces).sum() + model.token_log_probs(tail).sum()
    assert result.nats_per_token == pytest.approx(-float(total) / 49, rel=1e-5)


def test_weights_are_told_for_every_next_token():
    model = ModularLM(mixed_pool(), GATES["share"](4), top_m=2)
    ids, mask = padded()
    logw = model.weights(ids, mask)
    assert logw.shape == (3, 6, 4)
    torch.testing.assert_close(logw.logsumexp(-1), torch.zeros(3, 6), atol=1e-6, rtol=0)
    assert (torch.isinf(logw).sum(-1) == 2).all()
    mixed = (model.pool.log_probs(ids, mask) + logw[..., None]).logsumexp(2)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[1:], mixed[1:], atol=2e-5, rtol=1e-5)


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
        assert back.pool.names == pool.names
        assert (back.config.top_m, back.config.refresh_every) == (1, 4)
        assert back.generation_config.eos_token_id == 3
        torch.testing.assert_close(back(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-5)
        assert len(back.pool.backbones) == 2
    with pytest.raises(ConfigError, match="not empty"):
        model.save_pretrained(moved, copy_experts=copy)
    assert not list(tmp_path.glob(".*"))


def test_catch_ups_come_early_in_a_text_and_then_in_turn():
    anchor, found = 1, []
    for length in range(2, 140):
        if catch_up_due(32, anchor, length):
            found.append(length)
            anchor = length
    assert found == [2, 4, 8, 16, 32, 64, 96, 128]
    assert not catch_up_due(32, 500, 531)
    assert catch_up_due(32, 500, 532)
    assert not catch_up_due(None, 1, 10_000)


def test_a_text_ends_where_any_expert_ends_it():
    first, second = tiny.llama(1), tiny.llama(2)
    first.generation_config = GenerationConfig(eos_token_id=3, pad_token_id=0)
    second.generation_config = GenerationConfig(eos_token_id=[7, 3])
    model = ModularLM(ExpertPool.of({"a": first, "b": second}), FixedShareGate.of([0.5, 0.5], 0.05))
    assert model.generation_config.eos_token_id == [3, 7]


def test_a_library_whose_base_is_named_from_here_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny.llama()
    base.save_pretrained("base")
    reference = BaseReference("base", None, base_fingerprint(base))
    library = ExpertLibrary.create(Path("library"), reference)
    library.add(Expert(replace(random_expert(base), name="a", base=reference)))
    model = ModularLM(ExpertPool.from_library("library"), GATES["bayes"](1))
    model.save_pretrained("saved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ids = tokens(1, 5)
    assert torch.equal(ModularLM.from_pretrained(tmp_path / "saved")(ids).logits, model(ids).logits)


def test_experts_of_two_float_types_lose_nothing(tmp_path):
    rough, fine = tiny.llama(0).to(torch.bfloat16), tiny.llama(1)
    ModularLM(ExpertPool.of({"rough": rough, "fine": fine}), GATES["bayes"](2)).save_pretrained(
        tmp_path / "saved", copy_experts=True
    )
    pool = ModularLM.from_pretrained(tmp_path / "saved").pool
    for member, before in zip(pool.members, (rough, fine), strict=True):
        for now, then in zip(member.model.parameters(), before.parameters(), strict=True):
            assert torch.equal(now, then.float())


def test_folders_that_hold_no_gated_model_are_refused(tmp_path):
    model = ModularLM(whole_pool(2), GATES["bayes"](2))
    with pytest.raises(ConfigError, match=r"w0, w1 were made in memory.*copy_experts=True"):
        model.save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match="holds no gated model"):
        ModularLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "a", copy_experts=True)
    manifest = tmp_path / "a" / "modular.json"
    described = json.loads(manifest.read_text())
    described["experts"][0]["model"] = "../../elsewhere"
    manifest.write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="outside the folder"):
        ModularLM.from_pretrained(tmp_path / "a")
    manifest.write_text(json.dumps({**described, "format": "other"}))
    with pytest.raises(ConfigError, match="not of the format"):
        ModularLM.from_pretrained(tmp_path / "a")


def test_what_cannot_be_served_is_refused():
    pool = whole_pool(2)
    features = Features(sequence_BF=torch.randn(4, 3))
    with pytest.raises(ConfigError, match="distil it first"):
        ModularLM(pool, init_gate("linear", 2, features))
    with pytest.raises(ConfigError, match="over 3 experts came with a pool of 2"):
        ModularLM(pool, GATES["bayes"](3))
    with pytest.raises(ConfigError, match="top_m is 3"):
        ModularLM(pool, GATES["bayes"](2), top_m=3)
    with pytest.raises(ConfigError, match="refresh_every is 0"):
        ModularLM(pool, GATES["bayes"](2), refresh_every=0)
    model, ids = ModularLM(pool, GATES["bayes"](2)), tokens(1, 4)
    with pytest.raises(ConfigError, match="DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="of 1 sequences"):
        model(tokens(2, 1), past_key_values=cache)
    with pytest.raises(ConfigError, match="must cover 4 cached and 1 new"):
        model(ids[:, :1], attention_mask=torch.ones(1, 2), past_key_values=cache)
    with pytest.raises(ConfigError, match="cannot take tokens back"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=tiny.llama(), max_new_tokens=2)
    with pytest.raises(ConfigError, match="64 positions"):
        model.generate(tokens(1, 60), max_new_tokens=10)
    for answer in (model, model.log_probs):
        with pytest.raises(ConfigError, match="64 positions"):
            answer(tokens(1, 65))
    assert model.token_log_probs(tokens(1, 65)).shape == (1, 64)


def test_a_gate_trained_for_few_experts_is_served_with_as_many():
    gate = init_gate({"gate": "prefix", "top": 2}, 4, Features(logp_BTE=-3 * torch.rand(4, 9, 4)))
    model = ModularLM(mixed_pool(), gate)
    assert model.config.top_m == 2
    assert ModularLM(mixed_pool(), gate, top_m=1).config.top_m == 1
    ids = tokens(2, 6)
    assert (torch.isinf(model.weights(ids)).sum(-1) == 2).all()
    assert model.generate(ids, max_new_tokens=5, num_beams=2).shape == (2, 11)


def test_experts_stay_frozen_and_in_evaluation_mode():
    model = ModularLM(whole_pool(2), GATES["uniform"](2))
    model.train()
    assert not any(module.training for module in model.pool.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.to(torch.float64).dtype == torch.float64


def test_words_that_some_or_all_experts_rule_out_are_mixed_as_logarithms_say():
    logs_BTEV = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)).log_softmax(dim=-1)
    logs_BTEV[0, 1, :3, 2] = -torch.inf
    logs_BTEV[1, 2, :, 4] = -torch.inf
    logs_BTEV[0, 0] -= 200.0
    expected = torch.logsumexp(logs_BTEV, dim=2)
    torch.testing.assert_close(modular_lm._mixed(logs_BTEV), expected)
    assert torch.isneginf(expected).sum() == 1
