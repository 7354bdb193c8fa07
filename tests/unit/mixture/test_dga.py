import math

import pytest
import torch

from weftlm.errors import ConfigError, NumericsError
from weftlm.mixture.mirror import nearest_mixture
from weftlm.mixture.policy import Alignment, MixtureSetting, Report, build_policy

NAN = math.nan
SETTING = MixtureSetting(("a", "b", "c"), torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def probe(dots, norms=None, direction_norm=1.0, batch_norm=1.0, counts=None):
    counts = [0 if math.isnan(a) else 4 for a in dots] if counts is None else counts
    norms_G = None if norms is None else tensor(norms)
    alignment = Alignment(tensor(dots), torch.tensor(counts), direction_norm, norms_G, batch_norm)
    return Report(step=100, tokens_D=torch.ones(3, dtype=torch.float64), alignment=alignment)


def dga(**keys):
    return build_policy({"policy": "dga", **keys})


def after(policy, *reports, setting=SETTING):
    """The state after some reports."""
    state = policy.init(setting)
    for report in reports:
        state = policy.update(state, report)
    return state


@pytest.mark.parametrize(
    ("normalize", "given", "expected", "lacking"),
    [
        ("scale", {"direction_norm": 2.0, "batch_norm": 0.25}, [2.0, 0.0, -2.0], "batch_norm"),
        ("cosine", {"norms": [1.0, 4.0, 0.5], "direction_norm": 2.0}, [0.5, 0.0, -1.0], "needs the gradient norm of"),
    ],
)
def test_alignments_are_divided_by_norms(normalize, given, expected, lacking):
    policy = dga(normalize=normalize)
    state = after(policy, probe([1.0, 0.0, -1.0], **given))
    assert state.values_G.tolist() == expected
    with pytest.raises(ConfigError, match=lacking):
        policy.update(state, probe([1.0, 0.0, -1.0], batch_norm=None))


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
    state = after(policy, probe([1.0, 0.0, -1.0]))
    following = policy.update(state, report)
    assert torch.equal(policy.weights(following), policy.weights(state))
    assert torch.equal(following.values_G, state.values_G)
    assert [policy.diagnostics(following)[key] for key in ("skipped", "updates")] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (probe([1.0, math.inf, 1.0], counts=[4, 4, 4]), r"step 100: dot products .* not finite for b: "),
        (probe([1.0, NAN, 1.0], counts=[4, 4, 4]), r"step 100: dot products .* not finite for b: "),
        (probe([1.0, 1.0, 1.0], [1.0, NAN, 1.0]), r"gradient norms .* not finite for b: "),
        (probe([1.0, 1.0, 1.0], direction_norm=NAN), "norm of the alignment direction v is nan"),
        (probe([1.0, 1.0, 1.0], batch_norm=math.inf), "norm of the training gradient is inf"),
    ],
)
def test_a_broken_measurement_is_an_error_that_names_the_domain(report, message):
    with pytest.raises(NumericsError, match=message):
        after(dga(), report)


def test_a_raw_step_too_large_for_floats_is_an_error():
    with pytest.raises(NumericsError, match="lower eta or use normalize: scale"):
        after(dga(normalize="raw"), probe([1e308, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("initial", "expected"),
    [("uniform", [1 / 3, 1 / 3, 1 / 3]), ("proportional", [0.25, 0.25, 0.5]), ("importance", [1.0, 0.0, 0.0])],
)
def test_starts(initial, expected):
    policy = dga(initial=initial, floor=0.0)
    setting = MixtureSetting(SETTING.domains, SETTING.tokens_D, target_histogram_D=tensor([1.0, 0.0, 0.0]))
    assert policy.weights(policy.init(setting)).tolist() == pytest.approx(expected, rel=1e-14)
    assert ("target_histogram" in policy.needs) == (initial == "importance")


def test_basis_reweighting_measures_every_distribution():
    policy = dga(reweight="basis")
    basis_ND = tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    state = policy.init(MixtureSetting(SETTING.domains, SETTING.tokens_D, basis_ND=basis_ND))
    assert policy.needs == {"target_alignment", "basis"}
    assert policy.weights(state).tolist() == [0.25, 0.25, 0.5]
    with pytest.raises(ConfigError, match="2 groups"):
        policy.update(state, probe([1.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    "basis", [[[0.5, 0.5]], [[0.5, 0.5, 0.5]], [[1.5, -0.5, 0.0]], [0.5, 0.25, 0.25]], ids=["D", "sum", "sign", "rank"]
)
def test_a_basis_that_is_none_is_an_error(basis):
    with pytest.raises(ConfigError, match="basis distributions"):
        dga(reweight="basis").init(MixtureSetting(SETTING.domains, SETTING.tokens_D, basis_ND=tensor(basis)))


def test_basis_reweighting_starts_nearest_to_the_initial_weights():
    policy = dga(reweight="basis", initial="importance", floor=0.0)
    setting = MixtureSetting(
        SETTING.domains,
        SETTING.tokens_D,
        basis_ND=tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.5, 0.5]]),
        target_histogram_D=tensor([0.1, 0.4, 0.5]),
    )
    assert policy.weights(policy.init(setting)).tolist() == pytest.approx([0.1, 0.4, 0.5], abs=1e-6)
    basis_ND, target_D = tensor([[0.7, 0.2, 0.1, 0.0], [0.0, 0.3, 0.7, 0.0]]), tensor([0.3, 0.4, 0.1, 0.2])

    def score(first: float) -> float:
        mixed_D = first * basis_ND[0] + (1.0 - first) * basis_ND[1]
        return float((target_D[:3] * mixed_D[:3].log()).sum())

    best = max((step / 1000 for step in range(1, 1000)), key=score)
    assert float(nearest_mixture(target_D, basis_ND)[0]) == pytest.approx(best, abs=1e-3)
    out_of_reach = nearest_mixture(tensor([0.0, 0.0, 1.0]), tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    assert out_of_reach.tolist() == [0.5, 0.5]


def test_an_anchor_keeps_constant_alignments_from_running_to_a_corner():
    policy = dga(normalize="raw", eta=1.0, ema=1.0, floor=0.0, anchor=0.5)
    state = after(policy, *[probe([0.2, 0.0, -0.1])] * 200)
    expected = torch.softmax(tensor([0.4, 0.0, -0.2]), dim=0)
    assert policy.weights(state).tolist() == pytest.approx(expected.tolist(), abs=1e-12)
