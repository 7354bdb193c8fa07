"""Pools of experts: every expert scores as it does alone, whatever it shares, and misfits are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import experts as tiny
from support import served
from support.gated import mixed_pool, tokens, whole_pool
from support.tiny_expert import Fingerprint, random_expert
from transformers import LlamaConfig, LlamaForCausalLM

from weftlm.errors import ConfigError, ExpertError
from weftlm.experts.adapted import adapted
from weftlm.experts.expert import BaseReference, Expert
from weftlm.experts.library import ExpertLibrary
from weftlm.experts.lora import write_lora
from weftlm.gating import experts as room
from weftlm.gating.config import ExpertSource
from weftlm.gating.experts import ExpertPool, Member
from weftlm.models.fingerprint import base_fingerprint

NEAR = {"atol": 2e-5, "rtol": 1e-5}


def alone(member, ids):
    with torch.no_grad():
        if member.lora is None:
            return member.model(input_ids=ids).logits.log_softmax(-1)
        with adapted(member.model, member.lora):
            return member.model(input_ids=ids).logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("make", "modules"),
    [
        (tiny.llama, ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
        (tiny.qwen2, ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"]),
        (tiny.gpt2, ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]),
    ],
)
def test_every_expert_scores_as_it_does_alone(make, modules):
    base, ids = make(), tokens(3, 9)
    first = random_expert(base, {modules[0]: 2, modules[1]: 3}, seed=1)
    second = replace(random_expert(base, {modules[1]: 5}, seed=2), name="second")
    before = Fingerprint(base)
    members = [Member("a", base, first), Member("b", base, second), Member("base", base)]
    expected = [alone(member, ids) for member in members]
    pool = ExpertPool(members)
    found = pool.log_probs(ids)
    assert found.dtype == torch.float32
    for expert, want in enumerate(expected):
        torch.testing.assert_close(found[:, :, expert], want, **NEAR)
    assert (expected[0] - expected[1]).abs().max() > 0.01
    labels = ids[:, 1:, None, None].expand(-1, -1, 3, -1)
    torch.testing.assert_close(pool.token_log_probs(ids), found[:, :-1].gather(-1, labels)[..., 0], **NEAR)
    torch.testing.assert_close(base(input_ids=ids).logits.log_softmax(-1), expected[2])  # hooks rest between passes
    # The base is held once, frozen, and as it was afterwards.
    assert sum(p.numel() for p in pool.parameters()) == sum(p.numel() for p in base.parameters())
    assert not any(p.requires_grad for p in pool.parameters())
    assert pool.train().backbones[0].model.training is False
    pool.release()
    base.requires_grad_(True)
    before.check(base)


def test_memory_is_bounded_by_passes_of_few_experts(monkeypatch):
    pool, ids = mixed_pool(), tokens(2, 7)
    wide = pool.token_log_probs(ids)
    monkeypatch.setattr(room, "LOGITS", 1)
    torch.testing.assert_close(pool.token_log_probs(ids), wide, **NEAR)


def test_libraries_and_peft_folders_load(tmp_path):
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    reference = BaseReference(str(tmp_path / "base"), None, base_fingerprint(base))
    library = ExpertLibrary.open(tmp_path / "library", reference)
    loras = [replace(random_expert(base, seed=i), name=f"e{i}", base=reference) for i in (1, 2)]
    for lora in loras:
        library.add(Expert(lora))
    write_lora(tmp_path / "peft", loras[0])
    ids = tokens(2, 6)
    expected = ExpertPool([Member("e1", base, loras[0]), Member("e2", base, loras[1])]).log_probs(ids)
    in_library = [ExpertSource(name=f"e{i}", library=str(tmp_path / "library"), expert=f"e{i}") for i in (1, 2)]
    for pool in (
        ExpertPool.load(in_library),
        ExpertPool.load(in_library, base=base),
        ExpertPool.load([ExpertSource(name="e1", model=str(tmp_path / "peft")), in_library[1]]),
    ):
        assert pool.names == ("e1", "e2")
        assert len(pool.backbones) == 1
        torch.testing.assert_close(pool.log_probs(ids), expected, **NEAR)
    with pytest.raises(ExpertError, match="load the base it was trained on"):
        ExpertPool.load(in_library, base=tiny.llama(5))


def test_fingerprints_follow_weights_and_adapters():
    pool = mixed_pool()
    before = pool.fingerprints()
    assert list(before) == list(pool.names)
    assert len(set(before.values())) == 4
    with torch.no_grad():
        next(iter(pool.members[1].model.parameters())).mul_(1.5)
    after = pool.fingerprints()
    assert [name for name in before if before[name] != after[name]] == ["whole"]
    assert mixed_pool().fingerprints() == before


def test_embeddings_padded_to_different_sizes_are_read_over_the_common_vocabulary(tmp_path: Path):
    for name, size in (("a", 320), ("b", 336), ("c", 384)):
        model = served.llama()
        torch.manual_seed(size)
        model.resize_token_embeddings(size, mean_resizing=False)
        model.save_pretrained(tmp_path / name)
        served.tokenizer().save(tmp_path / name)
    sources = [ExpertSource(name=name, model=str(tmp_path / name)) for name in "abc"]
    pool = ExpertPool.load(sources)
    assert pool.vocab_size == 320
    logp_BTEV = pool.log_probs(torch.randint(320, (2, 7)))
    assert logp_BTEV.shape == (2, 7, 3, 320)
    torch.testing.assert_close(logp_BTEV.exp().sum(-1), torch.ones(2, 7, 3))
    torch.testing.assert_close(logp_BTEV[:, :, 1], logp_BTEV[:, :, 0], **NEAR)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "b" / file).unlink()
    with pytest.raises(ConfigError, match=r"of 320 and .* one of 384; .* where every expert comes with it"):
        ExpertPool.load(sources)


def uneven():
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=4))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ExpertPool([]), ExpertError, "one expert at least"),
        (lambda: ExpertPool([Member("a", tiny.llama()), Member("a", tiny.llama())]), ExpertError, "different names"),
        (lambda: ExpertPool([Member("a", tiny.gpt2(), random_expert(tiny.llama()))]), ExpertError, "another base"),
        (lambda: whole_pool(1).log_probs(torch.tensor([[64]])), ConfigError, "vocabulary of 64"),
        (lambda: whole_pool(2).place("w3"), ExpertError, "no expert 'w3'"),
        (lambda: whole_pool(1).log_probs(torch.ones(3, dtype=torch.int64)), ConfigError, "B x T"),
        (lambda: ExpertSource(name="a", model="x", expert="y"), ValueError, "give library"),
        (lambda: ExpertPool.of({"t5": tiny.t5()}), ConfigError, "decoder-only"),
        (lambda: ExpertPool.of({"linear": torch.nn.Linear(2, 2)}), ConfigError, "decoder-only"),
        (lambda: ExpertPool.of({"b": uneven()}), ConfigError, r"'b' has 6 attention heads over 4.*num_key_value_heads"),
        (
            lambda: ExpertPool([Member(name, tiny.llama(), tokenizer=name) for name in "xy"]),
            ConfigError, "different tokenizers",
        ),
    ],
)  # fmt: skip
def test_bad_pools_and_ids_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_one_token_more_than_there_are_positions_is_refused():
    pool = ExpertPool.of({"a": tiny.gpt2()})  # positions are learned: the model itself knows no more
    assert pool.token_log_probs(tokens(1, 65)).shape[1] == 64
    with pytest.raises(ConfigError, match="sequences of 65 tokens; the experts take 64 positions"):
        pool.log_probs(tokens(1, 65))
    with pytest.raises(ConfigError, match="64 positions"):
        pool.token_log_probs(tokens(1, 66))
