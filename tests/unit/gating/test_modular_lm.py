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
from weftlm.gating import modular_reader
from weftlm.gating.bayes import BayesGate, FixedShareGate
from weftlm.gating.config import ExpertSource
from weftlm.gating.experts import ExpertPool
from weftlm.gating.gate import Features, init_gate
from weftlm.gating.modular_lm import ModularLM
from weftlm.gating.modular_reader import catch_up_due
from weftlm.models.fingerprint import base_fingerprint
from weftlm.models.language_model import LanguageModel

NEAR = {"atol": 2e-5, "rtol": 1e-5}


def prefix(experts, **options):
    return init_gate({"gate": "prefix", **options}, experts, Features(logp_BTE=-3 * torch.rand(4, 9, experts)))


def moved(gate):
    """A gate some way from where fitting starts."""
    random = torch.Generator().manual_seed(0)
    noise = {name: 0.3 * torch.randn(gate.tensors[name].shape, generator=random) for name in gate.learned}
    return gate.replaced({name: gate.tensors[name] + each for name, each in noise.items()})


GATES = {
    "bayes": lambda experts: BayesGate.of([1 / experts] * experts),
    "share": lambda experts: FixedShareGate.of([1 / experts] * experts, 0.05),
    "prefix": lambda experts: moved(prefix(experts)),
    "uniform": lambda experts: FixedShareGate.of([1 / experts] * experts, 1.0),
}


def padded(batch=3, length=6):
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.int64)
    ids[0, :2], mask[0, :2] = 0, 0
    return ids, mask


def with_and_without_cache(model, **how):
    ids, mask = padded()
    found = []
    for cached in (True, False):
        torch.manual_seed(1)
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, use_cache=cached, **how))
    return found


@pytest.mark.parametrize(
    ("gate", "how"),
    [
        ("bayes", {}),
        ("share", {"do_sample": True}),
        ("prefix", {"do_sample": True, "top_k": 5, "temperature": 0.7, "num_return_sequences": 2}),
        ("uniform", {"num_beams": 3}),
        ("share", {"num_beams": 3, "num_return_sequences": 3, "do_sample": True}),
        ("prefix", {"num_beams": 2}),
    ],
)
def test_generation_with_caches_equals_generation_without(gate, how):
    cached, plain = with_and_without_cache(ModularLM(mixed_pool(), GATES[gate](4)), **how)
    assert torch.equal(cached, plain)
    assert cached.shape == (3 * how.get("num_return_sequences", 1), 12)


@pytest.mark.parametrize("how", [{}, {"do_sample": True, "num_beams": 2}])
def test_refreshing_at_every_token_generates_what_one_pass_would(how):
    model = ModularLM(mixed_pool(), GATES["share"](4), top_m=2, refresh_every=1)
    assert torch.equal(*with_and_without_cache(model, **how))


@pytest.mark.parametrize("top_m", [1, 3])
def test_sparse_generation_does_not_depend_on_the_batch(top_m):
    model = ModularLM(mixed_pool(), GATES["share"](4), top_m=top_m, refresh_every=5)
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
    """Also between two refreshes, when every expert has read another part of every sequence."""
    apply, order = CHANGES[change]
    model = ModularLM(mixed_pool(), FixedShareGate.of([0.25] * 4, 0.3), top_m=2, refresh_every=9)
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
    for options, least, most in (
        ({"top_m": 1, "refresh_every": None}, 11, 11), ({"top_m": 1, "refresh_every": 4}, 11, 41), ({}, 44, 44)
    ):  # fmt: skip
        ran.clear()
        ModularLM(pool, GATES["bayes"](4), **options).generate(tokens(1, 6), max_new_tokens=12)
        assert least <= sum(ran) - 4 * 6 <= most


def test_a_text_ends_where_any_expert_ends_it():
    first, second = tiny.llama(1), tiny.llama(2)
    first.generation_config = GenerationConfig(eos_token_id=3, pad_token_id=0)
    second.generation_config = GenerationConfig(eos_token_id=[7, 3])
    model = ModularLM(ExpertPool.of({"a": first, "b": second}), FixedShareGate.of([0.5, 0.5], 0.05))
    assert model.generation_config.eos_token_id == [3, 7]
    ids = tokens(2, 4)
    free = model.generate(ids, max_new_tokens=10, eos_token_id=None)
    stop = int(free[0, 6])
    ended = model.generate(ids, max_new_tokens=10, eos_token_id=stop, pad_token_id=0)
    first = (free[0, 4:] == stop).nonzero()[0, 0] + 4
    assert torch.equal(ended[0, : first + 1], free[0, : first + 1])
    assert not ended[0, first + 1 :].any()


def test_prompts_larger_than_memory_are_read_in_pieces(monkeypatch):
    model, ids = ModularLM(mixed_pool(), GATES["share"](4)), tokens(2, 9)
    whole = model(ids, use_cache=True, logits_to_keep=3).logits
    monkeypatch.setattr(room, "LOGITS", 1)
    monkeypatch.setattr(modular_reader, "PIECE", 2)
    assert whole.shape == (2, 3, 64)
    torch.testing.assert_close(model(ids, use_cache=True, logits_to_keep=3).logits, whole, **NEAR)
    torch.testing.assert_close(model(ids).logits[:, -3:], whole, **NEAR)


def test_it_is_a_language_model_for_evaluation():
    model = ModularLM(whole_pool(), GATES["share"](3), top_m=2)
    assert isinstance(model, LanguageModel)
    source = ArraySource(tokens(1, 50)[0].numpy(), text_bytes=50)
    result = evaluate_source(model, source, sequence_length=8, batch_size=2)
    pieces = [torch.from_numpy(source.read(start, 9 if start < 48 else 2))[None] for start in range(0, 49, 8)]
    logs = [model.log_probs(each[:, :-1]).gather(2, each[:, 1:, None]).sum() for each in pieces]
    assert model.log_probs(pieces[0]).dtype == torch.float32
    assert result.nats_per_token == pytest.approx(-float(sum(logs)) / 49, rel=1e-5)


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
        torch.testing.assert_close(back(ids).logits, model(ids).logits, **NEAR)
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
    assert [catch_up_due(32, 500, 531), catch_up_due(32, 500, 532)] == [False, True]
    assert not catch_up_due(None, 1, 10_000)


def test_a_library_whose_base_is_named_from_here_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny.llama()
    base.save_pretrained("base")
    reference = BaseReference("base", None, base_fingerprint(base))
    library = ExpertLibrary.open(Path("library"), reference)
    library.add(Expert(replace(random_expert(base), name="a", base=reference)))
    model = ModularLM(ExpertPool.load([ExpertSource(name="a", library="library", expert="a")]), GATES["bayes"](1))
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
    manifest.write_text(json.dumps({**described, "format": "x"}))
    with pytest.raises(ConfigError, match="not of the format"):
        ModularLM.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("gate", "options", "match"),
    [
        (lambda: init_gate("linear", 2, Features(sequence_BF=torch.randn(4, 3))), {}, "distil it first"),
        (lambda: GATES["bayes"](3), {}, "over 3 experts came with a pool of 2"),
        (lambda: GATES["bayes"](2), {"top_m": 3}, "top_m is 3"),
        (lambda: GATES["bayes"](2), {"refresh_every": 0}, "refresh_every is 0"),
    ],
)
def test_what_cannot_be_served_is_refused(gate, options, match):
    with pytest.raises(ConfigError, match=match):
        ModularLM(whole_pool(2), gate(), **options)


def test_calls_that_do_not_fit_are_refused():
    model, ids = ModularLM(whole_pool(2), GATES["bayes"](2)), tokens(1, 4)
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


def test_a_gate_trained_for_few_experts_is_served_with_as_many():
    gate = prefix(4, top=2)
    model = ModularLM(mixed_pool(), gate)
    assert model.config.top_m == 2
    assert ModularLM(mixed_pool(), gate, top_m=1).config.top_m == 1
    assert model.generate(tokens(2, 6), max_new_tokens=5, num_beams=2).shape == (2, 11)
