"""The robust gate of a report: findings that are honest, tables that keep their numbers, a page that runs nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
from support.blocks import render_blocks, table_rows
from support.gates import ROBUST, TABLE, certificate, fit, row, rows

from weftlm.errors import ConfigError, DataError
from weftlm.gating.certificate import Figure
from weftlm.reporting.gating import GatingFacts, gate_table, gating_blocks, gating_headline
from weftlm.reporting.page import render_page
from weftlm.reporting.report import report_page
from weftlm.reporting.score_table import score_tables


def shown(facts: GatingFacts, caption: str = "") -> dict[str, list[tuple[str, list[float]]]]:
    return table_rows(gating_blocks(facts), caption)


def section(facts: GatingFacts) -> str:
    return render_blocks(gating_blocks(facts))


def test_facts_come_from_the_files_of_a_run() -> None:
    student = {"scores": "s", "unit": "token", "offsets": "expert", "length": 64, "rows": rows()}
    direct = {**student, "rows": {**rows(), "bayes": row({"code": 9.0}), "direct": row(ROBUST)}}
    written = json.loads(json.dumps([certificate().to_json(), fit(), student, direct]))
    facts = GatingFacts.of(written[0], written[1], written[2:])
    assert facts.certificate == certificate()
    assert list(facts.rows) == [*TABLE, "direct"]
    assert gate_table(facts).score("bayes", "worst case").value == 0.012, "of a row in both files, the first counts"
    assert "nats per token, in windows of 64 tokens" in section(facts)
    with pytest.raises(DataError, match="no certificate"):
        GatingFacts.of({"worst": 1.0})
    with pytest.raises(ConfigError, match="nothing is known of this gate"):
        GatingFacts.of(students=[{"rows": {}}])


def test_a_gate_that_wins_is_better_by_its_difference_and_error() -> None:
    facts = GatingFacts(certificate(), rows=rows(), unit="token")
    error = math.hypot(0.0002, 0.0002)
    assert gating_headline(facts) == (
        f"robust: 0.0040 ± 0.0002 nats per token, worst case, −0.0080 ± {error:.4f} against bayes: better."
    )
    found = shown(facts, "What helped")
    assert list(found) == ["robust", "student", "student-top-1"]
    assert found["student"][0][1] == pytest.approx([0.0061 - 0.012, error])
    assert ["better" in found["student"][0][0], "worse" in found["student-top-1"][0][0]] == [True, True]
    close = {"bayes": {"code": 0.0120}, "student": {"code": 0.0115}}
    headline = gating_headline(GatingFacts(rows=rows(close, error=0.0004), unit="token"))
    assert headline.endswith("bayes: not significant.")


def test_without_baselines_rows_or_errors_less_is_said() -> None:
    alone = gating_headline(GatingFacts(rows=rows({"student": ROBUST}), unit="token"))
    assert alone == "student: 0.0040 ± 0.0002 nats per token, worst case."
    assert gating_headline(GatingFacts(certificate(), unit="token")) == (
        "Worst case 0.0040 nats per token on held-out sequences, on prose."
    )
    assert "on the sequences of the fit; not certified" in gating_headline(GatingFacts(fit=fit()))
    mixed = {name: {**one, "worst": 0.9 * one["worst"]} for name, one in rows().items()}
    facts = GatingFacts(rows=mixed, unit="sequence", offsets="none")
    assert gating_headline(facts).endswith("no error known.")
    assert "worst: a mixture of domains" in section(facts), "a worst mixture is not called a worst domain"
    assert "worst: prose" in section(GatingFacts(rows=rows()))


def test_only_a_causal_model_is_offered_to_be_served() -> None:
    given = rows() | {"student": row(TABLE["student"], role="student", model="runs/a b/student")}
    text = section(GatingFacts(certificate(), rows=given))
    assert "weftlm serve &#39;runs/a b/student&#39;</pre>" in text
    assert "reads whole sequences and cannot generate text" in text
    causal = dataclasses.replace(certificate(), causal=True)
    assert "reads whole sequences" not in section(GatingFacts(causal, rows=given))


def test_the_models_table_holds_the_numbers_the_roles_and_the_lowest_in_bold() -> None:
    top = row(TABLE["student-top-1"], kl=0.71, kl_error=0.02, experts_per_token=1, role="student")
    blocks = score_tables(gate_table(GatingFacts(rows=rows() | {"student-top-1": top}, unit="token", offsets="expert")))
    found = table_rows(blocks)
    assert list(found) == list(TABLE)
    for name, cells in found.items():
        given = TABLE[name]
        assert cells[0][1][:2] == pytest.approx([max(given.values()), 0.0002])
        assert cells[1][1][0] == pytest.approx(sum(given.values()) / 2)
        assert [cell[1][0] for cell in cells[3:]] == list(given.values())
    best = [[name for name, cells in found.items() if "(lowest)" in cells[column][0]] for column in (0, 1, 3, 4)]
    assert best == [["robust"], ["student"], ["robust"], ["student"]]
    assert (found["student-top-1"][2][1], found["bayes"][2][0]) == ([0.71, 0.02], "–")
    text = render_blocks(blocks)
    assert text.count('<span class="sub">baseline</span>') == 2
    assert '<span class="sub">1 expert per token</span>' in text


def test_missing_and_infinite_numbers_are_dashes() -> None:
    broken = row({"code": math.nan, "prose": 0.1}) | {"worst": math.inf, "mean": None}
    facts = GatingFacts(rows={"bayes": row({"code": 0.2}), "student": broken})
    assert [cell[0] for cell in shown(facts, "Value")["student"][:3]] == ["–"] * 3
    assert "nan" not in section(facts).lower()
    assert "No model" in gating_headline(GatingFacts(rows={"student": {}}))


def test_the_certificate_says_what_each_figure_is() -> None:
    half = Figure(1.0, "estimate", "samples", 0.9, None)
    facts = GatingFacts(dataclasses.replace(certificate(), worst=Figure(None, "exact", "no support"), z=half))
    found = shown(facts, "Nats per token")
    assert [cell[0] for cell in found["Worst case"][:2]] == ["infinite", "–"]
    assert [cell[0] for cell in found["Capacity"]] == ["–"] * 4
    assert found["Lower end"][0][1] == [0.003]
    assert found["Lower end"][2:] == [("bound", []), ("Closed form, none < it", [])]
    assert found["Z"][1][0].endswith("to +∞")
    assert shown(GatingFacts(certificate()), "Nats per token")["Worst case"][1][1] == pytest.approx([0.003, 0.005])


def test_the_gate_by_domain_is_the_certificates_else_the_fits() -> None:
    found = shown(GatingFacts(certificate()), "The certified gate")["prose"]
    assert [cell[1] for cell in found] == [
        [1200.0], [127.0], [2.004], [2.0], [0.004], pytest.approx([0.003, 0.005]), [0.5],
    ]  # fmt: skip
    fitted = shown(GatingFacts(fit=fit()), "On the sequences of the fit, not held out")["code"]
    assert [cell[1] for cell in fitted] == [[3000.0], [], [], [], [0.0033], [], [0.5]]


def test_the_fit_is_drawn_whatever_its_history() -> None:
    broken = [{"step": 10, "lam": [0.5, 0.5], "worst": None, "gap": math.nan}]
    for history, charts in ((fit()["history"], 1), ([], 0), (broken, 1), (None, 0)):
        text = section(GatingFacts(fit={**fit(), "history": history}))
        assert text.count("<svg") == text.count('role="img"') == charts


def test_a_page_about_a_gate_alone_runs_nothing_and_escapes_names() -> None:
    bad = "<b>&"
    facts = GatingFacts(
        certificate({bad: 0.1, "c": 0.2}), fit([bad, "c"]), rows({"bayes": {bad: 0.1}, bad: {bad: 0.2}})
    )
    page = render_page(report_page([], bad, gating=facts))
    assert page.count("<script") == 1, "the theme's alone"
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert ["<b>" in page, "&lt;b&gt;&amp;" in page] == [False, True]
