"""The contract of gates: features, registry, files."""

import dataclasses
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from weftlm.errors import CheckpointError, ConfigError
from weftlm.gating import ScoredSequences, enumerated
from weftlm.gating.config import FitConfig, PrefixGateConfig
from weftlm.gating.gate import FLOOR, Features, init_gate, load_gate, save_gate
from weftlm.gating.linear import ConstantGate
from weftlm.gating.prefix_gate import PrefixGate
from weftlm.gating.primal_dual import FitState
from weftlm.gating.sequences import sequence_features


def features(rows, names=()):
    return Features(sequence_BF=torch.tensor(rows, dtype=torch.float64), names=names)


def test_features_of_sequences_hold_no_length():
    found = sequence_features([[-4.0, -8.0], [-9.0, -3.0]], [4, 3])
    assert found.names == ("mean.0", "mean.1", "below_best.0", "below_best.1")
    assert found.sequence_BF.tolist() == [[-1.0, -2.0, 0.0, -1.0], [-3.0, -1.0, -2.0, 0.0]]
    logq = np.random.default_rng(0).normal(-50, 10, size=(6, 3))
    once, twice = sequence_features(logq, [20] * 6), sequence_features(2 * logq, [40] * 6)
    torch.testing.assert_close(once.sequence_BF, twice.sequence_BF)
    assert sequence_features([[-4.0, -np.inf]], [4]).sequence_BF.tolist() == [[-1.0, -1.0 - FLOOR, 0.0, -FLOOR]]


def test_a_split_is_disjoint_and_keeps_clusters_whole():
    logq = np.arange(40.0)[:, None]
    one = ScoredSequences.of(logq, clusters_N=np.repeat(np.arange(10), 4))
    kept, held = one.split(0.3, seed=0)
    assert (len(kept), len(held)) == (28, 12)
    assert sorted([*kept.logq_NE[:, 0].tolist(), *held.logq_NE[:, 0].tolist()]) == logq[:, 0].tolist()
    assert not set(kept.clusters_N.tolist()) & set(held.clusters_N.tolist())
    assert torch.equal(one.split(0.3, seed=0)[1].logq_NE, held.logq_NE)


def test_enumerated_supports_leave_out_what_cannot_happen():
    domains, samples = enumerated([[0.5, 0.5, 0.0]], [[0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
    assert domains[0].features.points_B.tolist() == [0, 1]
    assert domains[0].weights_N.tolist() == [0.5, 0.5]
    assert samples[1].features.points_B.tolist() == [2]
    assert domains[0].logq_NE.exp()[:, 0].tolist() == pytest.approx([0.2, 0.3])


def test_the_linear_gate_standardises_and_remembers_names():
    seen = features([[1.0, 5.0], [3.0, 5.0]], ("a", "b"))
    gate = init_gate("linear", 2, seen)
    assert gate.config.features == ("a", "b")
    assert (gate.tensors["mean_F"].tolist(), gate.tensors["scale_F"].tolist()) == ([2.0, 5.0], [1.0, 1.0])
    steep = gate.replaced({"weight_EF": torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)})
    expected = torch.log_softmax(torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), dim=1)
    torch.testing.assert_close(steep.log_weights(seen), expected)
    assert steep.to("cpu").log_weights(seen).dtype == torch.float32
    for other in (features([[1.0, 5.0]], ("b", "a")), features([[1.0]])):
        with pytest.raises(ConfigError, match="was made for 2 features"):
            gate.log_weights(other)


def test_files_are_whole_or_refused(tmp_path):
    path = tmp_path / "new" / "gate.safetensors"
    save_gate(ConstantGate.of([0.25, 0.75]), path)
    assert [file.name for file in path.parent.iterdir()] == ["gate.safetensors"]
    assert load_gate(path).log_weights(Features(1))[0].tolist() == pytest.approx([math.log(0.25), math.log(0.75)])
    data = path.read_bytes()
    altered = data.replace(b'experts\\": 2', b'experts\\": 3')
    for damaged, match in ((data[:-4], "torn"), (altered, "do not fit the configuration"), (None, "missing")):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=match):
            load_gate(path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="space and permission"):
        save_gate(ConstantGate.of([1.0]), blocked / "gate.safetensors")


@pytest.mark.parametrize("load", [load_gate, FitState.load])
def test_tensors_that_do_not_fit_the_configuration_are_refused(tmp_path, load):
    gate, path = PrefixGate.of([0.5, 0.5]), tmp_path / "gate.safetensors"
    fewer = {name: tensor for name, tensor in gate.tensors.items() if name != "middle_HH"}
    other = PrefixGate.of([0.5, 0.5], PrefixGateConfig(hidden=3)).tensors
    for tensors, match in ((fewer, "middle_HH: none for"), (other, r"in_H: \(3,\) for"), (gate.tensors, None)):
        one = dataclasses.replace(gate, tensors=tensors)
        state = FitState(FitConfig(), 1, one, {}, (), {"mu": torch.ones(())}, 0, {})
        save_gate(one, path) if load is load_gate else state.save(path)
        with pytest.raises(CheckpointError, match=match) if match else nullcontext():
            load(path)
