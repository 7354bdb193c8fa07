"""The score cache: right numbers, the same bytes however it was made, and nothing stale, torn or impossible inside."""

import sys

import numpy as np
import pytest
import torch
from support.faults import small_disk
from support.gated import mixed_pool, whole_pool

from weftlm.corpora.source import ArraySource
from weftlm.errors import CheckpointError, ConfigError, DataError, NumericsError
from weftlm.gating import scores
from weftlm.gating.bayes import BayesGate
from weftlm.gating.certificate import certify
from weftlm.gating.config import ExpertSource, FitConfig, ScoreConfig
from weftlm.gating.primal_dual import fit_robust_gate
from weftlm.gating.scores import ScoreCache, score, score_with
from weftlm.integrations.ray_executor import ray_executor

EOS = 5
CONFIG = ScoreConfig(length=8, sequences=11, samples=7, batch_size=4, shard_sequences=5)


def domains(count=300):
    rng = np.random.default_rng(0)
    return {name: ArraySource(rng.integers(low, low + 30, count)) for name, low in (("low", 0), ("high", 30))}


def contents(folder):
    return {path.name: path.read_bytes() for path in [*sorted(folder.glob("*.np*")), folder / "index.json"]}


def make(folder, pool=None, config=CONFIG, **more):
    return score(pool or whole_pool(), domains(), folder, config, eos_id=EOS, show=False, **more)


def test_scores_are_the_experts_own(tmp_path):
    pool = mixed_pool()
    cache = make(tmp_path, pool)
    assert cache.experts == pool.names
    assert list(cache.domains) == ["low", "high"]
    assert list(cache.samples) == list(pool.names)
    for text in (*cache.domains.values(), *cache.samples.values()):
        tokens = torch.from_numpy(text.tokens_NT1.astype(np.int64))
        torch.testing.assert_close(torch.from_numpy(text.logp_NTE), pool.token_log_probs(tokens), atol=2e-5, rtol=1e-5)
        assert isinstance(text.logp_NTE, np.memmap)
        np.testing.assert_allclose(text.logq_NE, text.logp_NTE.astype(np.float64).sum(1))
    low = cache.domains["low"]
    assert low.tokens_NT1.shape == (11, 9)
    source = domains()["low"]
    starts = [next(s for s in range(0, 292, 8) if (source.read(s, 9) == row).all()) for row in low.tokens_NT1]
    assert starts == sorted(set(starts))  # windows tile the text: no token is scored twice
    ends = np.flatnonzero(source.read(0, 300) == EOS)
    assert low.clusters_N.tolist() == [int((ends < start).sum()) for start in starts]
    firsts = set(low.tokens_NT1[:, 0]) | set(cache.domains["high"].tokens_NT1[:, 0])
    assert all(set(text.tokens_NT1[:, 0]) <= firsts for text in cache.samples.values())
    assert not (tmp_path / "shards").exists()


def test_samples_follow_their_expert(tmp_path):
    pool = whole_pool(2)
    config = ScoreConfig(length=1, sequences=1, samples=6000, batch_size=3000, shard_sequences=6000)
    cache = score(pool, {"d": ArraySource([3, 4])}, tmp_path, config, show=False)
    probs = pool.log_probs(torch.tensor([[3]]))[0, 0].exp().numpy()
    for expert, name in enumerate(pool.names):
        drawn = np.bincount(cache.samples[name].tokens_NT1[:, 1], minlength=64) / 6000
        error = np.sqrt(probs[expert] * (1 - probs[expert]) / 6000)
        assert (np.abs(drawn - probs[expert]) < 5 * error + 1e-4).all()
        # The mean log-probability of draws is minus the entropy, at this temperature alone.
        logp = np.log(probs[expert])
        mean = probs[expert] @ logp
        spread = np.sqrt(probs[expert] @ (logp - mean) ** 2 / 6000)
        assert abs(cache.samples[name].logq_NE[:, expert].mean() - mean) < 4 * spread < 0.1
        # E under q_k of q_j(x) / q_k(x) is 1: what the estimate of Z rests on.
        logq = cache.samples[name].logq_NE
        assert np.exp(logq[:, 1 - expert] - logq[:, expert]).mean() == pytest.approx(1.0, abs=0.3)


def test_a_sample_does_not_depend_on_its_batch(tmp_path):
    one = make(tmp_path / "a")
    other = make(tmp_path / "b", config=CONFIG.model_copy(update={"batch_size": 3, "shard_sequences": 2}))
    for name in one.samples:
        assert (one.samples[name].tokens_NT1 == other.samples[name].tokens_NT1).all()
    np.testing.assert_allclose(one.domains["low"].logp_NTE, other.domains["low"].logp_NTE, atol=2e-5)
    assert one.fingerprint == other.fingerprint


def test_documents_end_where_the_text_does(tmp_path):
    text = [9, 8, 7, EOS, 6, EOS, *([10] * 20), EOS, 11, 12]
    config = CONFIG.model_copy(update={"kind": "documents", "samples": 40})
    cache = score(whole_pool(), {"d": ArraySource(text)}, tmp_path, config, eos_id=EOS, show=False)
    found = cache.domains["d"]
    assert found.lengths_N.tolist() == [4, 2, 8]  # the unfinished one at the end is left out
    assert found.tokens_NT1[0].tolist() == [EOS, 9, 8, 7, EOS, 0, 0, 0, 0]
    assert found.tokens_NT1[2].tolist() == [EOS] + [10] * 8
    assert (found.logp_NTE[0, 4:] == 0).all()
    for sample in cache.samples.values():
        assert (sample.tokens_NT1[:, 0] == EOS).all()
        ended = np.array([EOS in row[1:] for row in sample.tokens_NT1])
        assert 0 < ended.sum() < 40
        for row, length, end in zip(sample.tokens_NT1, sample.lengths_N, ended, strict=True):
            assert length == (list(row[1:]).index(EOS) + 1 if end else 8)
            assert not row[length + 1 :].any()
        assert (sample.mask_NT == (np.arange(8) < sample.lengths_N[:, None])).all()
        assert (sample.logp_NTE[~sample.mask_NT] == 0).all()


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch, caplog):
    make(tmp_path / "whole")
    real, calls = scores.score_shard, []

    def stopping(pool, task, *rest):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(task.number)
        return real(pool, task, *rest)

    monkeypatch.setattr(scores, "score_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut")
    with pytest.raises(DataError, match=r"not finished \(4 shards"):
        ScoreCache.open(tmp_path / "cut")
    torn = tmp_path / "cut" / "shards" / "000001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-3])
    altered = tmp_path / "cut" / "shards" / "000002.safetensors"
    altered.write_bytes(altered.read_bytes()[:-1] + b"\x01")
    calls.clear()
    monkeypatch.setattr(
        scores, "score_shard", lambda pool, task, *rest: calls.append(task.number) or real(pool, task, *rest)
    )
    cache = make(tmp_path / "cut", config=CONFIG.model_copy(update={"shard_sequences": 99}))  # the plan's size holds
    assert calls[:2] == [1, 2]
    assert not {0, 3} & set(calls)
    assert "scored again" in caplog.text
    first, second = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    assert {k: v for k, v in first.items() if k != "index.json"} == {
        k: v for k, v in second.items() if k != "index.json"
    }
    calls.clear()
    assert make(tmp_path / "cut").fingerprint == cache.fingerprint
    assert not calls


def test_stopping_while_the_shards_are_joined_loses_nothing(tmp_path, monkeypatch):
    make(tmp_path / "whole")
    monkeypatch.setattr(scores, "describe", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "cut")
    monkeypatch.undo()
    monkeypatch.setattr(scores, "score_shard", lambda *rest: 1 / 0)
    make(tmp_path / "cut")
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_a_disk_that_is_full_while_the_shards_are_joined_is_said_and_loses_nothing(tmp_path, monkeypatch):
    config = CONFIG.model_copy(update={"sequences": 37})
    make(tmp_path / "whole", config=config)
    with small_disk(2000), pytest.raises(CheckpointError, match=r"the disk is full.*run the same command again"):
        make(tmp_path / "full", config=config)
    with pytest.raises(DataError, match=r"not finished \((\d\d) shards"):  # all of them: it was the joining
        ScoreCache.open(tmp_path / "full")
    monkeypatch.setattr(scores, "score_shard", None)
    make(tmp_path / "full", config=config)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


@pytest.mark.parametrize("finished", [True, False])
def test_other_inputs_make_it_stale(tmp_path, monkeypatch, finished):
    if finished:
        make(tmp_path)
    else:
        monkeypatch.setattr(scores, "describe", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(tmp_path)
        monkeypatch.undo()
    changed = whole_pool()
    with torch.no_grad():
        next(iter(changed.members[1].model.parameters())).mul_(2)
    with pytest.raises(DataError, match=r"stale.*experts\.w1.*overwrite=True"):
        make(tmp_path, changed)
    with pytest.raises(DataError, match=r"settings\.length: 8 before, 6 now"):
        make(tmp_path, config=CONFIG.model_copy(update={"length": 6}))
    with pytest.raises(DataError, match=r"sets\.domain low"):
        score(whole_pool(), domains(200), tmp_path, CONFIG, eos_id=EOS, show=False)
    turned = dict(reversed(domains().items()))
    with pytest.raises(DataError, match="stale"):
        score(whole_pool(), turned, tmp_path, CONFIG, eos_id=EOS, show=False)
    assert make(tmp_path, changed, overwrite=True).experts == changed.names


def test_nan_scores_name_expert_and_sequence(tmp_path):
    pool = whole_pool()
    make(tmp_path / "good", pool)
    with torch.no_grad():
        pool.members[1].model.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericsError, match=r"expert 'w1' gives token 1 of sequence 0 of domain 'low'"):
        make(tmp_path / "bad", pool)
    with torch.no_grad():
        pool.members[0].model.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericsError, match=r"expert 'w0' cannot be sampled.*sequence 0 of the samples"):
        score(pool, {}, tmp_path / "drawn", CONFIG, eos_id=EOS, show=False)


def never(pool, token, experts):
    """Make a token impossible under some experts."""
    for expert in experts:
        model = pool.members[expert].model
        model.lm_head.register_forward_hook(lambda m, a, y: y.index_fill(-1, torch.tensor([token]), -torch.inf))


def test_a_sequence_nobody_can_say_is_named(tmp_path):
    pool = whole_pool()
    never(pool, 40, [0, 1])
    cache = make(tmp_path / "some", pool)  # impossible under some experts is legal
    high = cache.domains["high"]
    assert np.isneginf(high.logq_NE[:, :2]).any()
    assert np.isfinite(high.logq_NE[:, 2]).all()
    assert not any(40 in sample.tokens_NT1[:, 1:] for name, sample in cache.samples.items() if name != "w2")
    cache.sequences(tokens=True)
    never(pool, 40, [2])
    row = next(i for i, tokens in enumerate(high.tokens_NT1) if 40 in tokens[1:])
    with pytest.raises(DataError, match=f"sequence {row} of domain 'high' has probability 0 under every expert"):
        make(tmp_path / "none", pool)


def test_bad_input_is_refused(tmp_path):
    pool = whole_pool()
    with pytest.raises(DataError, match="has 7 tokens; a window needs 9"):
        score(pool, {"d": ArraySource([1] * 7)}, tmp_path, CONFIG, show=False)
    with pytest.raises(DataError, match="holds token 64"):
        score(pool, {"d": ArraySource([64] * 20)}, tmp_path, CONFIG, show=False)
    config = CONFIG.model_copy(update={"kind": "documents"})
    with pytest.raises(DataError, match="no whole document"):
        score(pool, {"d": ArraySource([1] * 20)}, tmp_path, config, eos_id=EOS, show=False)
    with pytest.raises(ConfigError, match="needs eos_id"):
        score(pool, domains(), tmp_path, CONFIG.model_copy(update={"kind": "documents"}), show=False)
    with pytest.raises(ConfigError, match="64 positions"):
        make(tmp_path, config=CONFIG.model_copy(update={"length": 65}))
    with pytest.raises(ConfigError, match="nothing to score"):
        score(pool, {}, tmp_path, CONFIG.model_copy(update={"samples": 0}), show=False)
    with pytest.raises(ConfigError, match="token to start from"):
        score(pool, {}, tmp_path, CONFIG, show=False)
    with pytest.raises(DataError, match="no score cache"):
        ScoreCache.open(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_run_waits_its_turn(tmp_path, monkeypatch, overwrite):
    real = scores.score_shard

    def nested(pool, task, *rest):
        with pytest.raises(DataError, match=r"another process .*is scoring"):
            make(tmp_path, overwrite=overwrite)
        return real(pool, task, *rest)

    monkeypatch.setattr(scores, "score_shard", nested)
    make(tmp_path)  # and loses nothing by it


def test_what_another_run_has_just_finished_is_not_scored_again(tmp_path, monkeypatch):
    held = scores._Work.held

    def late(work):
        monkeypatch.setattr(scores._Work, "held", held)
        make(tmp_path)
        return held(work)

    monkeypatch.setattr(scores._Work, "held", late)
    with pytest.raises(DataError, match="has just finished"):
        make(tmp_path)
    assert make(tmp_path).experts == whole_pool().names


def test_altered_files_are_noticed(tmp_path):
    make(tmp_path)
    path = tmp_path / "domain-000.logp.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=r"logp.npy was altered"):
        ScoreCache.open(tmp_path)
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"logp.npy has"):
        ScoreCache.open(tmp_path)
    index = tmp_path / "index.json"
    index.write_text(index.read_text().replace('"w1"', '"w9"'))
    with pytest.raises(DataError, match="altered"):
        ScoreCache.open(tmp_path)


def test_a_cache_feeds_fitting_and_certifying(tmp_path):
    cache = make(tmp_path, config=CONFIG.model_copy(update={"sequences": 30, "samples": 40}))
    split = cache.split(0.25, seed=3)
    again = cache.split(0.25, seed=3)
    assert torch.equal(split.held_domains["low"].logq_NE, again.held_domains["low"].logq_NE)
    assert len(set(cache.domains["high"].clusters_N)) == 1  # one document: its windows are dealt out
    for name, text in cache.domains.items():
        parts = torch.cat([split.domains[name].logq_NE, split.held_domains[name].logq_NE])
        assert sorted(parts[:, 0].tolist()) == sorted(text.logq_NE[:, 0].tolist())
    low, held = split.domains["low"], split.held_domains["low"]
    assert not set(low.clusters_N.tolist()) & set(held.clusters_N.tolist())
    assert [len(sample) for sample in split.samples] == [30, 30, 30]
    config = FitConfig(steps=20)
    fit = fit_robust_gate(split.domains, split.samples, gate="linear", offsets="none", config=config)
    certificate = certify(fit, split.held_domains, split.held_samples, offsets="none")
    assert certificate.worst_domain in cache.domains
    causal = cache.split(0.25, tokens=True)
    assert certify(BayesGate.of([1 / 3] * 3), causal.held_domains, offsets="none").causal


def test_bf16_scores_are_near_and_named_in_the_fingerprint(tmp_path):
    exact = make(tmp_path / "a")
    rough = make(tmp_path / "b", config=CONFIG.model_copy(update={"precision": "bf16"}))
    assert rough.fingerprint != exact.fingerprint
    difference = np.abs(exact.domains["low"].logp_NTE - rough.domains["low"].logp_NTE)
    assert 0 < difference.max() < 0.2


def test_machines_need_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[ray\]'"), ray_executor() as executor:
        score_with(executor, [ExpertSource(name="m", model="x")], domains(), tmp_path, CONFIG, eos_id=EOS, show=False)
