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
    setting = MixtureSetting(
        domains=names(count),
        tokens_D=vector(st.integers(1, 10**9).map(float), count),
        target_histogram_D=histogram_D,
        basis_ND=basis_ND / basis_ND.sum(dim=1, keepdim=True),
    )
    scale = draw(st.sampled_from([1e-6, 1.0, 100.0]))
    reports = []
    for i in range(draw(st.integers(min_reports, 6))):
        drawn_D = vector(st.booleans(), count).bool()
        losses_D = torch.where(drawn_D, vector(st.floats(0.0, 20.0), count), torch.nan)
        reference_D = torch.where(drawn_D, vector(st.floats(0.0, 20.0), count), torch.nan)
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
        report = Report(
            step=100 * (i + 1),
            tokens_D=drawn_D.to(torch.float64) * 512,
            losses_D=losses_D,
            reference_losses_D=reference_D,
            excess_losses_D=(losses_D - reference_D).clamp_min(0.0),
        )
        reports.append((report, alignments))
    return setting, reports


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
def test_weights_stay_on_the_simplex(name, changes, run):
    policy, state, reports = play(name, changes, run)
    assert_distribution(policy.weights(state), len(run[0].domains))
    for report in reports:
        state = policy.update(state, report)
        assert_distribution(policy.weights(state), len(run[0].domains))


@cases
@QUICK
@given(run=runs(min_domains=2), data=st.data())
def test_relabelling_domains_permutes_weights(name, changes, run, data):
    setting, _ = run
    count = len(setting.domains)
    order = torch.tensor(data.draw(st.permutations(range(count))))
    policy, state, reports = play(name, changes, run)

    def permuted(values):
        return None if values is None else values[order]

    def permuted_alignment(alignment):
        if alignment is None or "basis" in policy.needs:
            return alignment
        return replace(
            alignment,
            dots_G=permuted(alignment.dots_G),
            counts_G=permuted(alignment.counts_G),
            norms_G=permuted(alignment.norms_G),
        )

    setting = needed_setting(policy, setting)
    other = policy.init(
        MixtureSetting(
            domains=tuple(setting.domains[i] for i in order.tolist()),
            tokens_D=permuted(setting.tokens_D),
            target_histogram_D=permuted(setting.target_histogram_D),
            basis_ND=None if setting.basis_ND is None else setting.basis_ND[:, order],
        )
    )
    torch.testing.assert_close(policy.weights(other), policy.weights(state)[order], rtol=1e-9, atol=1e-12)
    for report in reports:
        state = policy.update(state, report)
        vectors = ("tokens_D", "losses_D", "reference_losses_D", "excess_losses_D")
        moved = {key: permuted(getattr(report, key)) for key in vectors}
        other = policy.update(other, replace(report, alignment=permuted_alignment(report.alignment), **moved))
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
    setting, _ = run
    policy, state, reports = play(name, changes, run)
    cut = data.draw(st.integers(0, len(reports)))
    uninterrupted = follow(policy, state, reports)
    saved = text(follow(policy, state, reports[:cut]))

    again = build(name, changes, setting.domains)
    template = again.init(needed_setting(again, setting))
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
    last = reports[-1]

    def absent(values):
        return None if values is None else torch.full_like(values, torch.nan)

    alignment = last.alignment
    if alignment is not None:
        alignment = replace(
            alignment,
            dots_G=absent(alignment.dots_G),
            norms_G=absent(alignment.norms_G),
            counts_G=torch.zeros_like(alignment.counts_G),
        )
    empty = replace(
        last,
        tokens_D=torch.zeros_like(last.tokens_D),
        losses_D=absent(last.losses_D),
        reference_losses_D=absent(last.reference_losses_D),
        excess_losses_D=absent(last.excess_losses_D),
        alignment=alignment,
    )
    assert torch.equal(policy.weights(policy.update(state, empty)), policy.weights(state))


@cases
@pytest.mark.parametrize("size", [1e8, -1e8, 1e300])
def test_extreme_measurements_give_weights_or_a_clear_error(name, changes, size):
    domains = names(4)
    policy = build(name, changes, domains)
    groups = BASIS if "basis" in policy.needs else len(domains)
    state = policy.init(
        needed_setting(
            policy,
            MixtureSetting(
                domains=domains,
                tokens_D=tensor([1.0, 1e12, 5.0, 7.0]),
                target_histogram_D=tensor([1.0, 0.0, 0.0, 0.0]),
                basis_ND=torch.eye(4, dtype=torch.float64)[:BASIS],
            ),
        )
    )
    losses_D = tensor([abs(size), 0.0, 1.0, 2.0])
    alignment = Alignment(
        dots_G=tensor([size, -size, 0.0, 1.0][:groups]),
        counts_G=torch.ones(groups, dtype=torch.int64),
        direction_norm=1e-8,
        norms_G=tensor([1.0, 1e-8, 1.0, 1.0][:groups]),
        batch_norm=1.0,
    )
    report = Report(
        step=100,
        tokens_D=tensor([1.0, 1.0, 1.0, 1.0]),
        losses_D=losses_D,
        reference_losses_D=torch.zeros(4, dtype=torch.float64),
        excess_losses_D=losses_D,
    )
    report = needed_report(policy, report, {groups: alignment})
    for _ in range(3):
        try:
            state = policy.update(state, report)
        except WeftError as error:
            assert str(error)  # noqa: PT017
            return
        assert_distribution(policy.weights(state), len(domains))


@cases
def test_a_missing_signal_is_an_error_that_names_it(name, changes):
    domains = names(3)
    policy = build(name, changes, domains)
    setting = MixtureSetting(
        domains=domains,
        tokens_D=torch.ones(3, dtype=torch.float64),
        target_histogram_D=torch.full((3,), 1 / 3, dtype=torch.float64),
        basis_ND=torch.eye(3, dtype=torch.float64),
    )
    for signal in sorted(policy.needs):
        if signal in ("target_histogram", "basis"):
            key = "target_histogram_D" if signal == "target_histogram" else "basis_ND"
            with pytest.raises(ConfigError, match=signal):
                policy.init(replace(setting, **{key: None}))
    measured = policy.needs - {"target_histogram", "basis"}
    if measured:
        bare = Report(step=100, tokens_D=torch.ones(3, dtype=torch.float64))
        with pytest.raises(ConfigError, match="|".join(sorted(measured))):
            policy.update(policy.init(setting), bare)


@pytest.mark.parametrize("name", list(policies))
def test_the_configuration_section_is_in_order(name):
    config = policies[name].Config
    assert config.model_fields["policy"].default == name
    assert config.example(names(2)).policy == name
    undescribed = [key for key, field in config.model_fields.items() if not field.description]
    assert undescribed == []


@pytest.mark.parametrize("name", list(policies))
def test_an_unknown_key_is_an_error_with_a_suggestion(name):
    config = policies[name].Config
    value = {**config.example(names(2)).model_dump(), "update_every_step": 5}
    with pytest.raises(ConfigError, match="unknown key; did you mean 'update_every_steps'"):
        validate(config, value, "mixture")


@pytest.mark.parametrize("name", list(policies))
def test_the_docstring_states_rule_and_paper(name):
    entry = policies.entry(name)
    docstring = entry.cls.__doc__
    assert " = " in docstring
    if entry.paper is not None:
        assert f"arXiv {entry.paper.removeprefix('arXiv:')}" in docstring


@cases
def test_diagnostics_are_numbers(name, changes):
    domains = names(3)
    policy = build(name, changes, domains)
    setting = MixtureSetting(
        domains=domains,
        tokens_D=torch.ones(3, dtype=torch.float64),
        target_histogram_D=torch.full((3,), 1 / 3, dtype=torch.float64),
        basis_ND=torch.eye(3, dtype=torch.float64),
    )
    for value in policy.diagnostics(policy.init(setting)).values():
        for number in value if isinstance(value, list) else [value]:
            assert isinstance(number, float)
