"""Laws every registered mixture policy obeys; a new policy inherits them by registering itself.

A case is the policy's example configuration, or that with one of its switches (a bool or a choice of names) set to
another of its values. Settings and reports hold what the policy `needs` and nothing else.
"""

import copy
import json
import typing
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weftlm.config import validate
from weftlm.errors import ConfigError, WeftError
from weftlm.mixture.config import policies
from weftlm.mixture.policy import Alignment, MixtureSetting, Report, state_from_json, state_to_json

BASIS = 3
VECTORS = ("tokens_D", "losses_D", "reference_losses_D", "excess_losses_D")
QUICK = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def names(count):
    return tuple(f"domain-{i}" for i in range(count))


def choices(annotation):
    """The values of a switch: both of a bool, all of a Literal; nothing for another type."""
    if annotation is bool:
        return (False, True)
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def variants():
    """(policy name, changed keys) of every case whose configuration is valid."""
    for name in policies:
        config = policies[name].Config
        example = config.example(names(2)).model_dump()
        yield pytest.param(name, {}, id=name)
        for key, field in config.model_fields.items():
            for value in choices(field.annotation):
                if value != example[key]:
                    try:
                        config.model_validate({**example, key: value})
                    except ValueError:
                        continue
                    yield pytest.param(name, {key: value}, id=f"{name}-{key}={value}")


cases = pytest.mark.parametrize(("name", "changes"), list(variants()))
each_policy = pytest.mark.parametrize("name", list(policies))


def build(name, changes, domains):
    """The policy of a case, for these domains."""
    config = policies[name].Config
    return policies[name](validate(config, {**config.example(domains).model_dump(), **changes}, "mixture"))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def runs(draw, min_reports=1, max_domains=5, min_domains=1):
    """(setting, reports) with every signal; some groups are absent from some reports."""
    count = draw(st.integers(min_domains, max_domains))
    positive = st.floats(0.01, 1.0)

    def vector(elements, size):
        return tensor(draw(st.lists(elements, min_size=size, max_size=size)))

    histogram_D = vector(st.one_of(st.just(0.0), positive), count)
    histogram_D = histogram_D / histogram_D.sum() if histogram_D.sum() > 0 else torch.full_like(histogram_D, 1 / count)
    basis_ND = vector(positive, BASIS * count).reshape(BASIS, count)
    tokens_D = vector(st.integers(1, 10**9).map(float), count)
    setting = MixtureSetting(names(count), tokens_D, histogram_D, basis_ND / basis_ND.sum(dim=1, keepdim=True))
    scale = draw(st.sampled_from([1e-6, 1.0, 100.0]))
    reports = []
    for i in range(draw(st.integers(min_reports, 6))):
        drawn_D = vector(st.booleans(), count).bool()
        losses_D, reference_D = (torch.where(drawn_D, vector(st.floats(0.0, 20.0), count), torch.nan) for _ in range(2))
        excess_D = (losses_D - reference_D).clamp_min(0.0)
        report = Report(100 * (i + 1), drawn_D.to(torch.float64) * 512, losses_D, reference_D, excess_D)
        alignments = {}
        for groups in {count, BASIS}:
            present_G = vector(st.booleans(), groups).bool()
            norms_G = scale * vector(st.floats(0.0, 2.0), groups)
            cosines_G = vector(st.floats(-1.0, 1.0), groups)
            alignments[groups] = Alignment(
                dots_G=torch.where(present_G, cosines_G * norms_G * scale, torch.nan),
                counts_G=present_G.to(torch.int64) * 4,
                direction_norm=draw(st.sampled_from([scale, 2 * scale, 0.0])),
                norms_G=torch.where(present_G, norms_G, torch.nan),
                batch_norm=scale,
            )
        reports.append((report, alignments))
    return setting, reports


def extreme(size):
    """A run of three equal reports with measurements of a size."""
    tokens_D, histogram_D = tensor([1.0, 1e12, 5.0, 7.0]), tensor([1.0, 0.0, 0.0, 0.0])
    setting = MixtureSetting(names(4), tokens_D, histogram_D, torch.eye(4, dtype=torch.float64)[:BASIS])
    losses_D = tensor([abs(size), 0.0, 1.0, 2.0])
    alignments = {
        groups: Alignment(
            dots_G=tensor([size, -size, 0.0, 1.0][:groups]),
            counts_G=torch.ones(groups, dtype=torch.int64),
            direction_norm=1e-8,
            norms_G=tensor([1.0, 1e-8, 1.0, 1.0][:groups]),
            batch_norm=1.0,
        )
        for groups in (4, BASIS)
    }
    return setting, [(Report(100, tensor([1.0] * 4), losses_D, torch.zeros_like(losses_D), losses_D), alignments)] * 3


def needed_setting(policy, setting):
    """The setting with what the policy did not ask for taken away."""
    return replace(
        setting,
        target_histogram_D=setting.target_histogram_D if "target_histogram" in policy.needs else None,
        basis_ND=setting.basis_ND if "basis" in policy.needs else None,
    )


def needed_report(policy, report, alignments):
    """The report without what the policy did not ask for; alignment per basis distribution where it uses them."""
    wants_alignment = bool(policy.needs & {"target_alignment", "generalist_alignment"})
    wants_reference = "reference_losses" in policy.needs
    return replace(
        report,
        losses_D=report.losses_D if "losses" in policy.needs else None,
        reference_losses_D=report.reference_losses_D if wants_reference else None,
        excess_losses_D=report.excess_losses_D if wants_reference else None,
        alignment=alignments[BASIS if "basis" in policy.needs else len(report.tokens_D)] if wants_alignment else None,
    )


def play(name, changes, run):
    """(policy, initial state, reports as the policy gets them)."""
    setting, reports = run
    policy = build(name, changes, setting.domains)
    return policy, policy.init(needed_setting(policy, setting)), [needed_report(policy, *pair) for pair in reports]


def follow(policy, state, reports):
    for report in reports:
        state = policy.update(state, report)
    return state


def mapped(report, change, *, groups):
    """A report with its vectors over domains changed; with `groups` those of its alignment too."""

    def vectors(value, keys):
        found = {key: getattr(value, key) for key in keys}
        return {key: None if vector is None else change(vector) for key, vector in found.items()}

    alignment = report.alignment
    if alignment is not None and groups:
        alignment = replace(alignment, **vectors(alignment, ("dots_G", "norms_G", "counts_G")))
    return replace(report, alignment=alignment, **vectors(report, VECTORS))


def text(state):
    """A state as JSON text: equal texts are equal bits, NaN included."""
    return json.dumps(state_to_json(state))


def assert_distribution(weights_D, count):
    assert weights_D.dtype == torch.float64
    assert weights_D.shape == (count,)
    assert bool(torch.isfinite(weights_D).all())
    assert bool((weights_D >= 0).all())
    assert abs(float(weights_D.sum()) - 1.0) <= 1e-9


@cases
@QUICK
@given(run=runs())
def test_weights_stay_on_the_simplex_and_diagnostics_are_numbers(name, changes, run):
    policy, state, reports = play(name, changes, run)
    for report in (None, *reports):
        state = state if report is None else policy.update(state, report)
        assert_distribution(policy.weights(state), len(run[0].domains))
        for value in policy.diagnostics(state).values():
            assert all(isinstance(number, float) for number in (value if isinstance(value, list) else [value]))


@cases
@QUICK
@given(run=runs(min_domains=2), data=st.data())
def test_relabelling_domains_permutes_weights(name, changes, run, data):
    policy, state, reports = play(name, changes, run)
    setting = needed_setting(policy, run[0])
    order = torch.tensor(data.draw(st.permutations(range(len(setting.domains)))))
    histogram_D, basis_ND = setting.target_histogram_D, setting.basis_ND
    other = policy.init(
        MixtureSetting(
            domains=tuple(setting.domains[i] for i in order.tolist()),
            tokens_D=setting.tokens_D[order],
            target_histogram_D=None if histogram_D is None else histogram_D[order],
            basis_ND=None if basis_ND is None else basis_ND[:, order],
        )
    )
    torch.testing.assert_close(policy.weights(other), policy.weights(state)[order], rtol=1e-9, atol=1e-12)
    for report in reports:
        state = policy.update(state, report)
        moved = mapped(report, lambda vector: vector[order], groups="basis" not in policy.needs)
        other = policy.update(other, moved)
        torch.testing.assert_close(policy.weights(other), policy.weights(state)[order], rtol=1e-9, atol=1e-12)


@cases
@QUICK
@given(run=runs())
def test_updates_are_pure(name, changes, run):
    policy, state, reports = play(name, changes, run)
    for report in reports:
        before, report_before = text(state), repr(copy.deepcopy(report))
        following = policy.update(state, report)
        policy.weights(state)
        policy.diagnostics(following)
        assert text(state) == before
        assert repr(report) == report_before
        assert text(policy.update(state, report)) == text(following)
        state = following


@cases
@QUICK
@given(run=runs(min_reports=2), data=st.data())
def test_resuming_from_json_equals_going_on(name, changes, run, data):
    policy, state, reports = play(name, changes, run)
    cut = data.draw(st.integers(0, len(reports)))
    uninterrupted = follow(policy, state, reports)
    saved = text(follow(policy, state, reports[:cut]))

    again, template, _ = play(name, changes, run)
    restored = state_from_json(template, json.loads(saved))
    assert text(restored) == saved
    for field in fields(restored):
        assert type(getattr(restored, field.name)) is type(getattr(template, field.name))
    resumed = follow(again, restored, reports[cut:])
    assert text(resumed) == text(uninterrupted)
    assert torch.equal(again.weights(resumed), policy.weights(uninterrupted))


@cases
@QUICK
@given(run=runs())
def test_a_report_in_which_nothing_was_drawn_changes_no_weight(name, changes, run):
    policy, state, reports = play(name, changes, run)
    state = follow(policy, state, reports)

    def absent(vector):
        return torch.full_like(vector, torch.nan) if vector.is_floating_point() else torch.zeros_like(vector)

    empty = mapped(reports[-1], absent, groups=True)
    empty = replace(empty, tokens_D=torch.zeros_like(reports[-1].tokens_D))
    assert torch.equal(policy.weights(policy.update(state, empty)), policy.weights(state))


@cases
@pytest.mark.parametrize("size", [1e8, -1e8, 1e300])
def test_extreme_measurements_give_weights_or_a_clear_error(name, changes, size):
    policy, state, reports = play(name, changes, extreme(size))
    for report in reports:
        try:
            state = policy.update(state, report)
        except WeftError as error:
            assert str(error)  # noqa: PT017
            return
        assert_distribution(policy.weights(state), 4)


@cases
def test_a_missing_signal_is_an_error_that_names_it(name, changes):
    setting, _ = extreme(1.0)
    policy, state, _ = play(name, changes, (setting, []))
    for signal, key in (("target_histogram", "target_histogram_D"), ("basis", "basis_ND")):
        if signal in policy.needs:
            with pytest.raises(ConfigError, match=signal):
                policy.init(replace(setting, **{key: None}))
    measured = policy.needs - {"target_histogram", "basis"}
    if measured:
        with pytest.raises(ConfigError, match="|".join(sorted(measured))):
            policy.update(state, Report(step=100, tokens_D=torch.ones(4, dtype=torch.float64)))


@each_policy
def test_configuration_and_docstring_are_in_order(name):
    entry, config = policies.entry(name), policies[name].Config
    assert config.model_fields["policy"].default == config.example(names(2)).policy == name
    assert [key for key, field in config.model_fields.items() if not field.description] == []
    assert " = " in entry.cls.__doc__, "the rule"
    assert entry.paper is None or f"arXiv {entry.paper.removeprefix('arXiv:')}" in entry.cls.__doc__
    value = {**config.example(names(2)).model_dump(), "update_every_step": 5}
    with pytest.raises(ConfigError, match="unknown key; did you mean 'update_every_steps'"):
        validate(config, value, "mixture")
