import math

import pytest
import torch

from weftlm.errors import ConfigError, NumericsError
from weftlm.mixture.initial import nearest_mixture
from weftlm.mixture.policy import Alignment, MixtureSetting, Report, build_policy

NAN = math.nan
SETTING = MixtureSetting(("a", "b", "c"), torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def probe(dots, norms=None, direction_norm=1.0, batch_norm=1.0, counts=None):
    counts = [0 if math.isnan(a) else 4 for a in dots] if counts is None else counts
    alignment = Alignment(
        dots_G=tensor(dots),
        counts_G=torch.tensor(counts),
        direction_norm=direction_norm,
        norms_G=None if norms is None else tensor(norms),
        batch_norm=batch_norm,
    )
    return Report(step=100, tokens_D=torch.ones(3, dtype=torch.float64), alignment=alignment)


def dga(**keys):
    return build_policy({"policy": "dga", **keys})


def test_scale_does_not_change_with_the_size_of_gradients():
    policy = dga(normalize="scale")
    small = policy.update(policy.init(SETTING), probe([1e-6, 2e-6, NAN], [1e-3, 3e-3, NAN], direction_norm=1e-3))
    large = policy.update(policy.init(SETTING), probe([1e6, 2e6, NAN], [1e3, 3e3, NAN], direction_norm=1e3))
    assert small.alignment_G[:2].tolist() == pytest.approx([0.5, 1.0], rel=1e-12)
    torch.testing.assert_close(policy.weights(small), policy.weights(large), rtol=1e-12, atol=0)


def test_scale_falls_back_on_the_norm_of_the_training_gradient():
    policy = dga(normalize="scale")
    state = policy.update(policy.init(SETTING), probe([1.0, 0.0, -1.0], direction_norm=2.0, batch_norm=0.25))
    assert state.alignment_G.tolist() == [2.0, 0.0, -2.0]
    with pytest.raises(ConfigError, match="batch_norm"):
        policy.update(state, probe([1.0, 0.0, -1.0], batch_norm=None))


def test_cosine_divides_by_each_norm():
    policy = dga(normalize="cosine")
    state = policy.update(policy.init(SETTING), probe([1.0, 2.0, 0.0], [1.0, 4.0, 0.0], direction_norm=2.0))
    assert state.alignment_G.tolist() == [0.5, 0.25, 0.0]
    with pytest.raises(ConfigError, match="needs the gradient norm of every group"):
        policy.update(state, probe([1.0, 2.0, 0.0]))


def test_an_absent_group_keeps_its_last_alignment():
    policy = dga(normalize="raw")
    state = policy.update(policy.init(SETTING), probe([1.0, 2.0, 3.0]))
    state = policy.update(state, probe([0.5, NAN, 0.0]))
    assert state.alignment_G.tolist() == [0.5, 2.0, 0.0]


def test_alignment_decay_averages_from_the_first_value_on():
    policy = dga(normalize="raw", alignment_decay=0.75)
    state = policy.init(SETTING)
    for dots in ([1.0, NAN, 4.0], [5.0, 8.0, NAN]):
        state = policy.update(state, probe(dots))
    assert state.alignment_G.tolist() == [2.0, 8.0, 4.0]


def test_a_group_never_seen_keeps_its_weight():
    policy = dga(floor=0.0)
    state = policy.update(policy.init(SETTING), probe([0.9, NAN, -0.9]))
    assert float(policy.weights(state)[1]) == pytest.approx(1 / 3, rel=1e-15)


@pytest.mark.parametrize(
    "report",
    [
        probe([NAN, NAN, NAN]),
        probe([0.0, 0.0, 0.0], direction_norm=0.0),
        probe([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        probe([1.0, 0.0, 0.0], batch_norm=0.0),
    ],
    ids=["all absent", "no direction", "no gradients", "no training gradient"],
)
@pytest.mark.parametrize("feedback", [True, False])
def test_a_probe_that_tells_nothing_changes_nothing_and_is_counted(report, feedback):
    policy = dga(ema_feedback=feedback)
    state = policy.update(policy.init(SETTING), probe([1.0, 0.0, -1.0]))
    after = policy.update(state, report)
    assert torch.equal(policy.weights(after), policy.weights(state))
    assert torch.equal(after.alignment_G, state.alignment_G)
    assert policy.diagnostics(after)["skipped"] == 1.0
    assert policy.diagnostics(after)["updates"] == 1.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, NAN])
def test_a_broken_dot_product_is_an_error_that_names_the_domain(bad):
    policy = dga()
    with pytest.raises(NumericsError, match=r"step 100: dot products .* not finite for b: "):
        policy.update(policy.init(SETTING), probe([1.0, bad, 1.0], counts=[4, 4, 4]))


@pytest.mark.parametrize("norms", [[1.0, math.inf, 1.0], [1.0, NAN, 1.0]])
def test_a_broken_norm_is_an_error_that_names_the_domain(norms):
    policy = dga()
    with pytest.raises(NumericsError, match=r"gradient norms .* not finite for b: "):
        policy.update(policy.init(SETTING), probe([1.0, 1.0, 1.0], norms))


def test_a_broken_direction_or_training_gradient_is_an_error():
    policy = dga()
    with pytest.raises(NumericsError, match="norm of the alignment direction v is nan"):
        policy.update(policy.init(SETTING), probe([1.0, 1.0, 1.0], direction_norm=NAN))
    with pytest.raises(NumericsError, match="norm of the training gradient is inf"):
        policy.update(policy.init(SETTING), probe([1.0, 1.0, 1.0], batch_norm=math.inf))


def test_a_raw_step_too_large_for_floats_is_an_error():
    policy = dga(normalize="raw")
    with pytest.raises(NumericsError, match="lower eta or use normalize: scale"):
        policy.update(policy.init(SETTING), probe([1e308, 0.0, 0.0]))


def test_the_floor_lets_a_lost_domain_come_back():
    away, back = probe([-1.0, 1.0, 1.0]), probe([1.0, -1.0, -1.0])
    ends = {}
    for floor in (0.0, 0.05):
        policy = dga(normalize="raw", ema=1.0, floor=floor)
        state = policy.init(SETTING)
        for report in [away] * 50 + [back] * 5:
            state = policy.update(state, report)
        ends[floor] = float(policy.weights(state)[0])
    assert ends[0.0] < 1e-100
    assert ends[0.05] > 0.9


def test_starts():
    setting = MixtureSetting(SETTING.domains, SETTING.tokens_D, target_histogram_D=tensor([1.0, 0.0, 0.0]))
    for initial, expected in {
        "uniform": [1 / 3, 1 / 3, 1 / 3],
        "proportional": [0.25, 0.25, 0.5],
        "importance": [1.0, 0.0, 0.0],
    }.items():
        policy = dga(initial=initial, floor=0.0)
        assert policy.weights(policy.init(setting)).tolist() == pytest.approx(expected, rel=1e-14)
        assert ("target_histogram" in policy.needs) == (initial == "importance")


def test_basis_reweighting_mixes_the_distributions():
    policy = dga(reweight="basis", normalize="raw", eta=1.0, ema=1.0, floor=0.0)
    basis_ND = tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    state = policy.init(MixtureSetting(SETTING.domains, SETTING.tokens_D, basis_ND=basis_ND))
    assert policy.needs == {"target_alignment", "basis"}
    assert policy.weights(state).tolist() == [0.25, 0.25, 0.5]
    state = policy.update(state, probe([math.log(3.0), 0.0]))
    assert policy.weights(state).tolist() == pytest.approx([0.375, 0.375, 0.25], rel=1e-14)
    with pytest.raises(ConfigError, match="2 groups"):
        policy.update(state, probe([1.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    "basis", [[[0.5, 0.5]], [[0.5, 0.5, 0.5]], [[1.5, -0.5, 0.0]], [0.5, 0.25, 0.25]], ids=["D", "sum", "sign", "rank"]
)
def test_a_basis_that_is_none_is_an_error(basis):
    policy = dga(reweight="basis")
    with pytest.raises(ConfigError, match="basis distributions"):
        policy.init(MixtureSetting(SETTING.domains, SETTING.tokens_D, basis_ND=tensor(basis)))


def test_basis_reweighting_starts_nearest_to_the_initial_weights():
    basis_ND = tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.5, 0.5]])
    policy = dga(reweight="basis", initial="importance", floor=0.0)
    setting = MixtureSetting(
        SETTING.domains, SETTING.tokens_D, basis_ND=basis_ND, target_histogram_D=tensor([0.1, 0.4, 0.5])
    )
    assert policy.needs == {"target_alignment", "basis", "target_histogram"}
    assert policy.weights(policy.init(setting)).tolist() == pytest.approx([0.1, 0.4, 0.5], abs=1e-6)


def test_nearest_mixture_is_the_best_of_a_grid():
    basis_ND = tensor([[0.7, 0.2, 0.1, 0.0], [0.0, 0.3, 0.7, 0.0]])
    target_D = tensor([0.3, 0.4, 0.1, 0.2])
    found_N = nearest_mixture(target_D, basis_ND)

    def score(first: float) -> float:
        mixed_D = first * basis_ND[0] + (1.0 - first) * basis_ND[1]
        return float((target_D[:3] * mixed_D[:3].log()).sum())

    best = max((step / 1000 for step in range(1, 1000)), key=score)
    assert float(found_N[0]) == pytest.approx(best, abs=1e-3)


def test_nearest_mixture_of_something_out_of_reach_is_uniform():
    assert nearest_mixture(tensor([0.0, 0.0, 1.0]), tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])).tolist() == [0.5, 0.5]


def test_an_anchor_keeps_constant_alignments_from_running_to_a_corner():
    policy = dga(normalize="raw", eta=1.0, ema=1.0, floor=0.0, anchor=0.5)
    state = policy.init(SETTING)
    for _ in range(200):
        state = policy.update(state, probe([0.2, 0.0, -0.1]))
    expected = torch.softmax(tensor([0.4, 0.0, -0.2]), dim=0)
    assert policy.weights(state).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_diagnostics():
    policy = dga(normalize="raw", eta=2.0)
    state = policy.update(policy.init(SETTING), probe([0.5, -1.5, 0.0]))
    found = policy.diagnostics(state)
    assert found["max_exponent"] == 3.0
    assert found["alignment"] == [0.5, -1.5, 0.0]
    weights = policy.weights(state).tolist()
    assert found["group_weights"] == weights
    assert found["entropy_nats"] == pytest.approx(-sum(w * math.log(w) for w in weights), rel=1e-14)
