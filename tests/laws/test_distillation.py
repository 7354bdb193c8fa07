"""Laws of students over random gates: normalised over the support, blind to the future, divergence never below 0."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.distillation import Language

from weftlm.distillation.sparse import log_served
from weftlm.distillation.structural import student_kl
from weftlm.gating import Features, gates
from weftlm.gating.gate import init_gate

QUICK = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
LANGUAGES = [Language(seed, experts=experts, length=4) for seed, experts in ((0, 2), (1, 3), (2, 4))]
SECTIONS = [name for name in gates if gates[name].causal] + [
    {"gate": "prefix", "base": base, "top": top} for base in ("bayes", "fixed_share") for top in (1, 2)
]

languages = st.sampled_from(LANGUAGES)
seeds = st.integers(0, 10_000)
each_section = pytest.mark.parametrize("section", SECTIONS, ids=str)


def shaken(section, language, seed):
    gate = init_gate(section, language.experts, language.features, seed)
    generator = torch.Generator().manual_seed(seed)
    return gate.replaced(
        {
            name: gate.tensors[name]
            + torch.randn(gate.tensors[name].shape, generator=generator, dtype=gate.tensors[name].dtype)
            for name in gate.learned
        }
    )


@each_section
@QUICK
@given(languages, seeds)
def test_a_student_is_normalised_over_the_support_also_when_served_sparsely(section, language, seed):
    student = shaken(section, language, seed)
    assert language.causal_model(student).sum() == pytest.approx(1.0, rel=1e-9)
    for known in (0, 2):
        served = log_served(student, language.features, known_tokens=known)
        assert float(served.exp().sum()) == pytest.approx(1.0, rel=1e-9)


@each_section
@QUICK
@given(languages, seeds, st.integers(0, 3))
def test_a_student_ignores_the_future(section, language, seed, t):
    student = shaken(section, language, seed)
    before = student.log_weights(language.features)
    changed = language.logp_XTE.clone()
    changed[:, t:] = changed[:, t:].flip(0)
    after = student.log_weights(Features(logp_BTE=changed))
    assert torch.equal(after[:, : t + 1], before[:, : t + 1])


@each_section
@QUICK
@given(languages, seeds, st.sampled_from(["tabular", "linear", "constant"]))
def test_the_divergence_from_any_gate_is_never_negative(section, language, seed, teacher):
    gate = shaken(teacher, language, seed)
    kl, error = student_kl(gate, shaken(section, language, seed + 1), language.enumerated())
    assert kl >= -1e-9
    assert error == 0.0


@each_section
@QUICK
@given(languages, seeds)
def test_padding_at_the_end_changes_no_probability(section, language, seed):
    student = shaken(section, language, seed)
    padded = torch.cat([language.logp_XTE, torch.full_like(language.logp_XTE[:, :2], -7.0)], dim=1)
    mask = torch.ones(padded.shape[:2], dtype=torch.bool)
    mask[:, 4:] = False
    features = dataclasses.replace(
        language.features, logp_BTE=padded, mask_BT=mask, sequence_BF=None, names=(), points_B=None
    )
    torch.testing.assert_close(log_served(student, features), log_served(student, language.features))
