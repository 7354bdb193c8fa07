"""Scored sequences: checks, splits, enumerated supports."""

import numpy as np
import pytest
import torch

from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.gating import Features, ScoredSequences, enumerated, sequences
from weftlm.gating.gate import init_gate


def test_arrays_keep_float32_and_are_checked():
    one = ScoredSequences.of(np.zeros((3, 2), np.float32), tokens_N=[1, 2, 3])
    assert one.logq_NE.dtype == torch.float32
    assert one.features.sequence_BF.shape == (3, 4)
    assert one.probability().tolist() == [1 / 3] * 3
    with pytest.raises(DataError, match="law: 0 sequences"):
        ScoredSequences.of(np.zeros((0, 2)), name="law")
    with pytest.raises(NumericsError, match=r"first at \(0, 1\)"):
        ScoredSequences.of([[0.0, np.nan]])
    with pytest.raises(ConfigError, match="N x E"):
        ScoredSequences.of([0.0])
    with pytest.raises(ConfigError, match="tokens_N"):
        ScoredSequences.of([[0.0]], tokens_N=[0])
    with pytest.raises(ConfigError, match="features of 2"):
        ScoredSequences.of([[0.0]], features=Features(2))
    with pytest.raises(NumericsError, match=r"sum to 0\.9"):
        ScoredSequences.of([[0.0], [0.0]], weights_N=[0.5, 0.4])


def test_read_only_arrays_are_taken():
    array = np.zeros((2, 2))
    array.flags.writeable = False
    assert len(ScoredSequences.of(array)) == 2


def test_what_is_prepared_is_bounded_over_all_sets(monkeypatch):
    one = ScoredSequences.of(np.zeros((4, 2)), features=Features(logp_BTE=torch.zeros(4, 3, 2)))
    gate = init_gate("prefix", 2, one.features)
    size = gate.prepared_bytes(one.features)
    ready = gate.prepare(one.features).prepared.values()
    assert size == sum(tensor.numel() * tensor.element_size() for tensor in ready)
    monkeypatch.setattr(sequences, "PREPARED_BYTES", 2 * size)
    assert all(each.features.prepared for each in sequences.prepared(gate, (one, one)))
    assert not any(each.features.prepared for each in sequences.prepared(gate, (one, one, one)))


def test_a_split_is_disjoint_and_keeps_clusters_whole():
    logq = np.arange(40.0)[:, None]
    one = ScoredSequences.of(logq, clusters_N=np.repeat(np.arange(10), 4))
    kept, held = one.split(0.3, seed=0)
    assert (len(kept), len(held)) == (28, 12)
    assert sorted([*kept.logq_NE[:, 0].tolist(), *held.logq_NE[:, 0].tolist()]) == logq[:, 0].tolist()
    assert not set(kept.clusters_N.tolist()) & set(held.clusters_N.tolist())
    again = one.split(0.3, seed=0)[1]
    assert torch.equal(again.logq_NE, held.logq_NE)
    with pytest.raises(DataError, match="cannot be split"):
        ScoredSequences.of([[0.0]]).split(0.5, 0)
    with pytest.raises(ConfigError, match="hold out"):
        one.split(1.0, 0)


def test_enumerated_supports_leave_out_what_cannot_happen():
    P, Q = [[0.5, 0.5, 0.0]], [[0.2, 0.3, 0.5], [0.0, 0.0, 1.0]]
    domains, samples = enumerated(P, Q)
    assert domains[0].features.points_B.tolist() == [0, 1]
    assert domains[0].weights_N.tolist() == [0.5, 0.5]
    assert samples[1].features.points_B.tolist() == [2]
    assert domains[0].logq_NE.exp()[:, 0].tolist() == pytest.approx([0.2, 0.3])
    with pytest.raises(ConfigError, match="one support"):
        enumerated(P, [[1.0]])
    with pytest.raises(NumericsError, match=r"row 0 of P sums to 0.9"):
        enumerated([[0.5, 0.4]], [[0.5, 0.5]])
    with pytest.raises(NumericsError, match="both signs"):
        enumerated([[1.5, -0.5]], [[0.5, 0.5]])
