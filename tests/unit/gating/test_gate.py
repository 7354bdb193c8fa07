"""The contract of gates: features, registry, files."""

import pytest
import torch

from weftlm.errors import CheckpointError, ConfigError, NumericsError
from weftlm.gating.config import MlpConfig, gate_config, gates
from weftlm.gating.constant import ConstantGate
from weftlm.gating.gate import Features, init_gate, load_gate, save_gate
from weftlm.gating.linear import LinearGate


def features(rows, names=()):
    return Features(sequence_BF=torch.tensor(rows, dtype=torch.float64), names=names)


def test_features_count_themselves():
    assert len(Features(3)) == 3
    assert len(features([[1.0], [2.0]])) == 2
    assert len(features([[1.0], [2.0]]).rows(torch.tensor([1]))) == 1


def test_features_refuse_what_does_not_fit_together():
    with pytest.raises(ConfigError, match="how many sequences"):
        Features(3, points_B=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="how many sequences"):
        Features()
    with pytest.raises(ConfigError, match="2 names"):
        features([[1.0]], ("a", "b"))
    with pytest.raises(NumericsError, match="clips"):
        features([[float("-inf")]])
    with pytest.raises(NumericsError, match="token scores"):
        Features(logp_BTE=torch.full((1, 2, 2), torch.nan))
    with pytest.raises(ConfigError, match="mask"):
        Features(logp_BTE=torch.zeros(1, 2, 2), mask_BT=torch.ones(1, 3, dtype=torch.bool))


def test_joining_needs_the_same_kind_of_features():
    joined = Features.joined([features([[1.0]]), features([[2.0], [3.0]])])
    assert joined.sequence_BF.tolist() == [[1.0], [2.0], [3.0]]
    with pytest.raises(ConfigError, match="different features"):
        Features.joined([features([[1.0]]), Features(2)])
    with pytest.raises(ConfigError, match="width"):
        Features.joined([features([[1.0]]), features([[1.0, 2.0]])])


def test_a_gate_says_what_it_lacks():
    with pytest.raises(ConfigError, match="sequence_features"):
        init_gate("linear", 2, Features(3))
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        init_gate("liner", 2, Features(3))
    with pytest.raises(ConfigError, match="unknown key"):
        gate_config({"gate": "mlp", "hiden": 3})
    with pytest.raises(ConfigError, match="must be one of"):
        gate_config({})


def test_constant_weights_must_be_a_distribution():
    gate = ConstantGate.of([0.25, 0.75])
    assert gate.log_weights(Features(2)).exp().tolist() == [pytest.approx([0.25, 0.75])] * 2
    assert ConstantGate.of([1.0, 0.0]).log_weights(Features(1)).exp().tolist() == [[1.0, 0.0]]
    for wrong in ([0.5, 0.6], [1.5, -0.5]):
        with pytest.raises(ConfigError, match="sum to 1"):
            ConstantGate.of(wrong)


def test_the_linear_gate_standardises_and_remembers_names():
    seen = features([[1.0, 5.0], [3.0, 5.0]], ("a", "b"))
    gate = init_gate("linear", 2, seen)
    assert isinstance(gate, LinearGate)
    assert gate.config.features == ("a", "b")
    assert gate.tensors["mean_F"].tolist() == [2.0, 5.0]
    assert gate.tensors["scale_F"].tolist() == [1.0, 1.0]
    steep = gate.replaced({"weight_EF": torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)})
    expected = torch.log_softmax(torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), dim=1)
    torch.testing.assert_close(steep.log_weights(seen), expected)
    with pytest.raises(ConfigError, match="was made for 2 features"):
        gate.log_weights(features([[1.0, 5.0]], ("b", "a")))
    with pytest.raises(ConfigError, match="was made for 2 features"):
        gate.log_weights(features([[1.0]]))


def test_the_mlp_depends_on_its_seed_only_where_it_is_random():
    seen = features([[1.0, 5.0], [3.0, 4.0]])
    one, other = (init_gate(MlpConfig(hidden=4), 3, seen, seed) for seed in (0, 1))
    assert not torch.equal(one.tensors["in_HF"], other.tensors["in_HF"])
    assert torch.equal(one.log_weights(seen), other.log_weights(seen))
    assert torch.equal(init_gate(MlpConfig(hidden=4), 3, seen, 1).tensors["in_HF"], other.tensors["in_HF"])


def test_the_tabular_gate_knows_its_points():
    gate = init_gate("tabular", 2, Features(points_B=torch.tensor([0, 4])))
    assert gate.tensors["logits_XE"].shape == (5, 2)
    with pytest.raises(ConfigError, match="over 5 points"):
        gate.log_weights(Features(points_B=torch.tensor([5])))


def test_a_gate_in_another_float_type_answers_in_it():
    gate = init_gate("linear", 2, features([[1.0], [3.0]])).to("cpu")
    assert gate.log_weights(features([[1.0]])).dtype == torch.float32


def test_wrong_tensors_are_refused():
    with pytest.raises(ConfigError, match="holds tensors of shapes"):
        gates["constant"](gate_config("constant"), 3, {"logits_E": torch.zeros(2)})
    with pytest.raises(ConfigError, match="one at least"):
        gates["constant"](gate_config("constant"), 0, {"logits_E": torch.zeros(0)})


def test_files_are_whole_or_refused(tmp_path):
    path = tmp_path / "new" / "gate.safetensors"
    save_gate(ConstantGate.of([0.25, 0.75]), path)
    assert [file.name for file in path.parent.iterdir()] == ["gate.safetensors"]
    assert load_gate(path).log_weights(Features(1)).exp()[0].tolist() == pytest.approx([0.25, 0.75])
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match="torn"):
        load_gate(path)
    path.write_bytes(data.replace(b'experts\\": 2', b'experts\\": 3'))
    with pytest.raises(CheckpointError, match="was altered since it was written"):
        load_gate(path)
    with pytest.raises(CheckpointError, match="missing"):
        load_gate(tmp_path / "absent.safetensors")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="space and permission"):
        save_gate(ConstantGate.of([1.0]), blocked / "gate.safetensors")
