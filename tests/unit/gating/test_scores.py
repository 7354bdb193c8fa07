"""The score cache: right numbers, the same bytes however it was made, and nothing stale, torn or impossible inside."""

import sys

import numpy as np
import pytest
import torch
from support.faults import small_disk
from support.gated import mixed_pool, whole_pool

from weftlm.artifact import Artifact
from weftlm.corpora.source import ArraySource
from weftlm.errors import CheckpointError, ConfigError, DataError, NumericsError
from weftlm.gating import scores
from weftlm.gating.bayes import BayesGate
from weftlm.gating.certificate import certify
from weftlm.gating.config import ExpertSource, FitConfig, ScoreConfig
from weftlm.gating.primal_dual import fit_robust_gate
from weftlm.gating.scores import ScoreCache, score
from weftlm.integrations.ray_executor import ray_executor

EOS = 5
CONFIG = ScoreConfig(length=8, sequences=11, samples=7, batch_size=4, shard_sequences=5)


def domains(count=300):
    rng = np.random.default_rng(0)
    return {name: ArraySource(rng.integers(low, low + 30, count)) for name, low in (("low", 0), ("high", 30))}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def make(folder, pool=None, texts=None, overwrite=False, **changes):
    config = CONFIG.model_copy(update=changes)
    texts = domains() if texts is None else texts
    return score(pool or whole_pool(), texts, folder, config, eos_id=EOS, show=False, overwrite=overwrite)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished cache, not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder)
    return folder


def unfinished(folder, monkeypatch):
    """A cache all of whose shards are there, but not its index."""
    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "finish", lambda artifact, *rest: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(folder)


def test_scores_are_the_experts_own(tmp_path):
    pool = mixed_pool()
    cache = make(tmp_path, pool)
    assert (cache.experts, list(cache.domains), list(cache.samples)) == (pool.names, ["low", "high"], list(pool.names))
    for text in (*cache.domains.values(), *cache.samples.values()):
        logp_NTE = text.features.logp_BTE
        torch.testing.assert_close(logp_NTE, pool.token_log_probs(text.tokens_NT1.long()), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(text.logq_NE, logp_NTE.double().sum(1))
    sums = ScoreCache.open(tmp_path, tokens=False)
    for text, summed in zip(cache.domains.values(), sums.domains.values(), strict=True):
        assert summed.features.logp_BTE is None
        assert torch.equal(summed.logq_NE, text.logq_NE)
        assert torch.equal(summed.features.sequence_BF, text.features.sequence_BF)
    low = cache.domains["low"]
    assert low.tokens_NT1.shape == (11, 9)
    assert low.tokens_N.tolist() == [8] * 11
    source = domains()["low"]
    starts = [next(s for s in range(0, 292, 8) if (source.read(s, 9) == row).all()) for row in low.tokens_NT1.numpy()]
    assert starts == sorted(set(starts))  # windows tile the text: no token is scored twice
    ends = np.flatnonzero(source.read(0, 300) == EOS)
    assert low.clusters_N.tolist() == [int((ends < start).sum()) for start in starts]
    firsts = {int(token) for text in cache.domains.values() for token in text.tokens_NT1[:, 0]}
    assert all(set(text.tokens_NT1[:, 0].tolist()) <= firsts for text in cache.samples.values())


def test_samples_follow_their_expert(tmp_path):
    pool, count = whole_pool(2), 6000
    sizes = {"length": 1, "sequences": 1, "samples": count, "batch_size": count, "shard_sequences": count}
    cache = make(tmp_path, pool, {"d": ArraySource([3, 4])}, **sizes)
    probs = pool.log_probs(torch.tensor([[3]]))[0, 0].exp().numpy()
    for expert, name in enumerate(pool.names):
        p, logq = probs[expert], cache.samples[name].logq_NE.numpy()
        drawn = np.bincount(cache.samples[name].tokens_NT1[:, 1].numpy(), minlength=64) / count
        assert (np.abs(drawn - p) < 5 * np.sqrt(p * (1 - p) / count) + 1e-4).all()
        # The mean log-probability of draws is minus the entropy, at this temperature alone.
        mean = p @ np.log(p)
        spread = np.sqrt(p @ (np.log(p) - mean) ** 2 / count)
        assert abs(logq[:, expert].mean() - mean) < 4 * spread < 0.1
        # E under q_k of q_j(x) / q_k(x) is 1: what the estimate of Z rests on.
        assert np.exp(logq[:, 1 - expert] - logq[:, expert]).mean() == pytest.approx(1.0, abs=0.3)


def test_a_sample_does_not_depend_on_its_batch_and_precision_is_in_the_fingerprint(whole, tmp_path):
    one, other = ScoreCache.open(whole), make(tmp_path / "b", batch_size=3, shard_sequences=2)
    rough = make(tmp_path / "c", precision="bf16")
    for name in one.samples:
        assert (one.samples[name].tokens_NT1 == other.samples[name].tokens_NT1).all()
    low, same, rough_low = (each.domains["low"].features.logp_BTE for each in (one, other, rough))
    torch.testing.assert_close(low, same, atol=2e-5, rtol=1e-5)
    assert one.fingerprint == other.fingerprint != rough.fingerprint
    assert 0 < (low - rough_low).abs().max() < 0.2


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(whole, tmp_path, monkeypatch):
    real, calls = scores.score_shard, []

    def recording(pool, shard, *rest):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(shard.file)
        return real(pool, shard, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(scores, "score_shard", recording)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
    with pytest.raises(DataError, match=r"not finished \(4 shards"):
        ScoreCache.open(tmp_path)
    done, calls[:] = set(calls), [None] * 5
    monkeypatch.setattr(scores, "score_shard", recording)
    cache = make(tmp_path)
    assert not done & set(calls)
    assert contents(whole) == contents(tmp_path)
    monkeypatch.setattr(scores, "score_shard", None)
    assert make(tmp_path).fingerprint == cache.fingerprint


def test_stopping_before_the_index_and_a_full_disk_lose_nothing(whole, tmp_path, monkeypatch):
    unfinished(tmp_path / "a", monkeypatch)
    with small_disk(2000), pytest.raises(CheckpointError, match=r"the disk is full.*run the same command again"):
        make(tmp_path / "b")
    make(tmp_path / "b")
    monkeypatch.setattr(scores, "score_shard", None)
    make(tmp_path / "a")
    assert contents(whole) == contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("finished", [True, False])
def test_other_inputs_are_refused_by_name(tmp_path, monkeypatch, finished):
    make(tmp_path) if finished else unfinished(tmp_path, monkeypatch)
    changed = whole_pool()
    with torch.no_grad():
        next(iter(changed.members[1].model.parameters())).mul_(2)
    for arguments, match in (
        ({"pool": changed}, r"scores of something else \(experts\.w1.*overwrite=True"),
        ({"length": 6}, r"settings\.length: 8 before, 6 now"),
        ({"texts": domains(200)}, r"tokens\.domain low"),
        ({"texts": dict(reversed(domains().items()))}, "something else"),
    ):
        with pytest.raises(CheckpointError, match=match):
            make(tmp_path, **arguments)
    assert make(tmp_path, changed, overwrite=True).experts == changed.names


def test_nan_scores_name_expert_and_sequence(tmp_path):
    pool = whole_pool()
    for expert, texts, match in (
        (1, None, r"expert 'w1' gives token 1 of sequence 0 of domain 'low'"),
        (0, {}, r"expert 'w0' cannot be sampled.*sequence 0 of the samples"),
    ):
        with torch.no_grad():
            pool.members[expert].model.lm_head.weight[3] = float("nan")
        with pytest.raises(NumericsError, match=match):
            make(tmp_path / str(expert), pool, texts)


def never(pool, token, experts):
    """Make a token impossible under some experts."""
    for expert in experts:
        model = pool.members[expert].model
        model.lm_head.register_forward_hook(lambda m, a, y: y.index_fill(-1, torch.tensor([token]), -torch.inf))


def test_a_sequence_no_expert_can_write_is_named(tmp_path):
    pool = whole_pool()
    never(pool, 40, [0, 1])
    cache = make(tmp_path / "some", pool)  # impossible under some experts is legal
    high = cache.domains["high"]
    assert high.logq_NE[:, :2].isneginf().any()
    assert high.logq_NE[:, 2].isfinite().all()
    assert not any(40 in sample.tokens_NT1[:, 1:] for name, sample in cache.samples.items() if name != "w2")
    never(pool, 40, [2])
    row = next(i for i, tokens in enumerate(high.tokens_NT1) if 40 in tokens[1:])
    with pytest.raises(DataError, match=f"sequence {row} of domain 'high' has probability 0 under every expert"):
        make(tmp_path / "none", pool)


@pytest.mark.parametrize(
    ("texts", "changes", "error", "match"),
    [
        ({"d": [1] * 7}, {}, DataError, "has 7 tokens; a window needs 9"),
        ({"d": [64] * 20}, {}, DataError, "holds token 64"),
        ({"d": [1] * 99}, {"length": 65}, ConfigError, "64 positions"),
        ({}, {"samples": 0}, ConfigError, "nothing to score"),
        ({}, {}, ConfigError, "token to start from"),
    ],
)
def test_bad_input_is_refused(tmp_path, texts, changes, error, match):
    sources = {name: ArraySource(ids) for name, ids in texts.items()}
    with pytest.raises(error, match=match):
        score(whole_pool(), sources, tmp_path, CONFIG.model_copy(update=changes), show=False)
    with pytest.raises(DataError, match="no score cache"):
        ScoreCache.open(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_run_waits_its_turn(tmp_path, monkeypatch, overwrite):
    real = scores.score_shard

    def nested(pool, shard, *rest):
        with pytest.raises(DataError, match=r"another process .*is scoring"):
            make(tmp_path, overwrite=overwrite)
        return real(pool, shard, *rest)

    monkeypatch.setattr(scores, "score_shard", nested)
    make(tmp_path, samples=0)  # and loses nothing by it


def test_a_cache_feeds_fitting_and_certifying(tmp_path):
    cache = make(tmp_path, sequences=30, samples=40)
    (fitted_on, held_out), (_, again) = (cache.split(0.25, seed=3) for _ in range(2))
    assert torch.equal(held_out.domains["low"].logq_NE, again.domains["low"].logq_NE)
    assert len(set(cache.domains["high"].clusters_N.tolist())) == 1  # one document: its windows are divided
    for name, text in cache.domains.items():
        parts = torch.cat([fitted_on.domains[name].logq_NE, held_out.domains[name].logq_NE])
        assert sorted(parts[:, 0].tolist()) == sorted(text.logq_NE[:, 0].tolist())
    low, held = fitted_on.domains["low"], held_out.domains["low"]
    assert not set(low.clusters_N.tolist()) & set(held.clusters_N.tolist())
    assert [len(sample) for sample in fitted_on.samples.values()] == [30, 30, 30]
    config = FitConfig(steps=20, best_response_steps=5)
    fit = fit_robust_gate(fitted_on.domains, fitted_on.samples, gate="linear", offsets="none", config=config)
    assert certify(fit, held_out.domains, held_out.samples, offsets="none").worst_domain in cache.domains
    assert certify(BayesGate.of([1 / 3] * 3), held_out.domains, offsets="none").causal


def test_machines_need_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[ray\]'"), ray_executor() as executor:
        score([ExpertSource(name="m", model="x")], domains(), tmp_path, CONFIG, executor=executor, show=False)
