"""The robust gate of a report: findings that are honest, tables that keep their numbers, a page that runs nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.blocks import render_blocks

from weftlm.errors import ConfigError, DataError
from weftlm.gating.certificate import Certificate, DomainRow, Figure
from weftlm.reporting.gating import GatingFacts, gate_page, gating_blocks, gating_headline, models_tables
from weftlm.reporting.page import render_page
from weftlm.reporting.report import write_report

ROBUST = {"code": 0.002, "prose": 0.004}
TABLE: dict[str, Mapping[str, float]] = {
    "uniform": {"code": 0.5, "prose": 0.3},
    "bayes": {"code": 0.011, "prose": 0.012},
    "robust": ROBUST,
    "student": {"code": 0.0061, "prose": -0.001},
    "student-top-1": {"code": 0.03, "prose": 0.02},
}


def row(values: Mapping[str, float], error: float = 0.0002, **more: Any) -> dict[str, Any]:
    worst = max(values, key=lambda name: values[name])
    return {
        "worst": values[worst],
        "worst_domain": worst,
        "mean": sum(values.values()) / len(values),
        "domains": {
            name: {"value": value, "error": error, "cross_entropy": 2.0 + value} for name, value in values.items()
        },
        **more,
    }


ROLES = {"uniform": "baseline", "bayes": "baseline", "robust": "gate"}


def rows(table: Mapping[str, Mapping[str, float]] = TABLE, error: float = 0.0002) -> dict[str, dict[str, Any]]:
    return {name: row(values, error, role=ROLES.get(name, "student")) for name, values in table.items()}


def gating_section(facts: GatingFacts) -> str:
    return render_blocks(gating_blocks(facts))


def models_table(facts: GatingFacts) -> str:
    return render_blocks(models_tables(facts))


def answer_rows(facts: GatingFacts) -> dict[str, list[str]]:
    """The first screen's table: difference to the best baseline with its verdict, and interval."""
    text = gating_section(facts)
    return table_rows(text[text.index("Worst case against") : text.index("</table>")])


def certificate(values: Mapping[str, float] = ROBUST) -> Certificate:
    worst = max(values, key=lambda name: values[name])
    return Certificate(
        unit="token",
        offsets="expert",
        causal=False,
        capacity=None,
        worst=Figure(values[worst], "estimate", "on these sequences", values[worst] - 0.001, values[worst] + 0.001),
        worst_domain=worst,
        at_lam=Figure(0.0035, "estimate", "against the mixture"),
        lower=Figure(0.003, "bound", "closed form, none < it"),
        gap=Figure(values[worst] - 0.003, "bound", "at most this"),
        z=Figure(1.0, "exact", "summed over the support"),
        domains=tuple(
            DomainRow(name, 1200, 127.0, 2.0 + value, 2.0, value, value - 0.001, value + 0.001, 1 / len(values))
            for name, value in values.items()
        ),
    )


def fit(names: Sequence[str] = ("code", "prose"), reports: int = 5) -> dict[str, Any]:
    share = [1 / len(names)] * len(names)
    return {
        "unit": "token",
        "worst": 0.0033,
        "worst_domain": names[0],
        "gap": None,
        "domains": {name: {"sequences": 3000, "value": 0.0033, "lam": share[0]} for name in names},
        "history": [
            {"step": 500 * k, "worst": 0.3 / k, "worst_domain": names[0], "lam": share, "gap": 0.1 / k, "z": 1.0}
            for k in range(1, reports + 1)
        ],
    }


def table_rows(text: str) -> dict[str, list[str]]:
    found = re.findall(r'<tr><th scope="row" class="text">(.*?)</th>(.*?)</tr>', text)
    return {name.split("<")[0]: re.findall(r"<td.*?>(.*?)</td>", cells) for name, cells in found}


def values(cell: str) -> list[float]:
    return [float(value) for value in re.findall(r'<data value="(.*?)"', cell)]


# -- facts --------------------------------------------------------------------------------------------------------


def test_nothing_at_all_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="without a certificate, a fit and rows"):
        GatingFacts()
    with pytest.raises(ConfigError, match="without a certificate, a fit and rows"):
        GatingFacts.of(students=[{"rows": {}}])


def test_parts_of_different_units_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="different unit: token, sequence"):
        GatingFacts(certificate(), rows=rows(), unit="sequence")
    with pytest.raises(ConfigError, match="different offsets: expert, none"):
        GatingFacts(certificate(), rows=rows(), offsets="none")


def test_facts_come_from_the_files_of_a_run() -> None:
    student = {"scores": "s", "unit": "token", "offsets": "expert", "rows": rows()}
    direct = {**student, "rows": {**rows(), "bayes": row({"code": 9.0}), "direct": row(ROBUST)}}
    written = json.loads(json.dumps([certificate().to_json(), {"scores": "s", **fit()}, student, direct]))
    facts = GatingFacts.of(written[0], written[1], written[2:])
    assert facts.certificate == certificate()
    assert list(facts.rows) == [*TABLE, "direct"]
    assert facts.worst("bayes") == 0.012
    assert (facts.nats, facts.offsets) == ("nats per token", "expert")
    assert GatingFacts.of(students=[{**student, "offsets": [1.0, 2.0]}]).offsets == "values"
    with pytest.raises(ConfigError, match="different scores: t, s"):
        GatingFacts.of(fit={"scores": "t", **fit()}, students=[student])
    with pytest.raises(DataError, match="no certificate"):
        GatingFacts.of({"worst": 1.0})


# -- the first screen ---------------------------------------------------------------------------------------------


def test_a_gate_that_wins_is_better_by_its_difference_and_error() -> None:
    facts = GatingFacts(certificate(), rows=rows())
    error = math.hypot(0.0002, 0.0002)
    assert gating_headline(facts) == (
        f"robust: worst case 0.0040 nats per token, on prose; −0.0080 ± {error:.4f} against the best baseline, bayes: "
        "better."
    )
    found = answer_rows(facts)
    assert list(found) == ["robust", "student", "student-top-1"]
    assert values(found["student"][0]) == pytest.approx([0.0061 - 0.012])
    assert "better" in found["student"][0]
    assert found["student"][1] == f"−{0.0059 + 1.96 * error:.4f} to −{0.0059 - 1.96 * error:.4f}"
    assert "worse" in found["student-top-1"][0]


def test_a_gate_that_loses_is_worse() -> None:
    table = {**TABLE, "robust": {"code": 0.02, "prose": 0.001}}
    assert gating_headline(GatingFacts(rows=rows(table), unit="token", offsets="expert")).endswith("bayes: worse.")


@pytest.mark.parametrize(("error", "said"), [(0.0004, "not significant"), (0.0001, "better")])
def test_a_difference_within_the_errors_is_not_significant(error: float, said: str) -> None:
    close = {"bayes": {"code": 0.0120}, "student": {"code": 0.0115}}
    assert gating_headline(GatingFacts(rows=rows(close, error=error), unit="token")).endswith(f"bayes: {said}.")


def test_a_worst_mixture_is_not_called_a_worst_domain() -> None:
    given = {name: {**one, "worst": 0.9 * one["worst"]} for name, one in rows().items()}
    facts = GatingFacts(rows=given, unit="sequence", offsets="none")
    assert "worst case 0.0036 nats per sequence, on a mixture of domains" in gating_headline(facts)
    assert gating_headline(facts).endswith("no error known.")
    assert "The worst case is over the allowed mixtures" in models_table(facts)


def test_without_baselines_or_rows_less_is_said() -> None:
    alone = gating_headline(GatingFacts(rows=rows({"student": ROBUST}), unit="token"))
    assert alone.endswith("No baseline was measured.")
    certified = gating_headline(GatingFacts(certificate()))
    assert "Worst case 0.0040 nats per token on held-out sequences (95 % interval 0.0030 to 0.0050)" in certified
    fitted = gating_headline(GatingFacts(fit=fit()))
    assert "on the sequences of the fit; not certified" in fitted


def test_only_a_causal_model_is_offered_to_be_served() -> None:
    given = rows() | {"student": row(TABLE["student"], role="student", model="runs/a b/student")}
    text = gating_section(GatingFacts(certificate(), rows=given))
    assert "weftlm serve &#39;runs/a b/student&#39;</pre>" in text
    assert "reads whole sequences and cannot generate text" in text
    causal = dataclasses.replace(certificate(), causal=True)
    assert "reads whole sequences" not in gating_section(GatingFacts(causal, rows=given))


# -- tables -------------------------------------------------------------------------------------------------------


def test_the_models_table_holds_the_numbers_and_the_lowest_is_bold() -> None:
    found = table_rows(models_table(GatingFacts(rows=rows(), unit="token", offsets="expert")))
    assert list(found) == list(TABLE)
    for name, cells in found.items():
        given = TABLE[name]
        assert cells[0] == max(given, key=lambda domain: given[domain])
        assert values(cells[1]) == pytest.approx([max(given.values()), 0.0002])
        assert values(cells[2]) == pytest.approx([sum(given.values()) / 2])
        assert [values(cell)[0] for cell in cells[3:]] == list(given.values())
    best = [[name for name, cells in found.items() if "best" in cells[column]] for column in range(1, 5)]
    assert best == [["robust"], ["student"], ["robust"], ["student"]]
    assert ">−0.0010</data>" in found["student"][4]


def test_roles_experts_per_token_and_distances_are_shown_where_known() -> None:
    top = row(TABLE["student-top-1"], kl=0.71, kl_error=0.02, experts_per_token=1, role="student")
    text = models_table(GatingFacts(rows=rows() | {"student-top-1": top}))
    assert text.count('<span class="sub">baseline</span>') == 2
    assert "student, 1 expert per token" in text
    assert values(table_rows(text)["student-top-1"][3]) == [0.71, 0.02]
    assert table_rows(text)["bayes"][3] == "–"
    assert "KL" not in models_table(GatingFacts(rows=rows()))


def test_many_domains_become_rows() -> None:
    names = [f"domain {i}" for i in range(9)]
    table = {
        model: {name: i + shift for i, name in enumerate(names)} for model, shift in (("bayes", 0.1), ("student", 0.0))
    }
    text = models_table(GatingFacts(rows=rows(table)))
    found = table_rows(text)
    assert len(found["student"]) == 3
    assert "All 9 domains" in text
    assert [values(cell)[0] for cell in found["domain 3"]] == [3.1, 3.0]
    assert "best" in found["domain 3"][1]


def test_missing_and_infinite_numbers_are_dashes() -> None:
    broken = row({"code": math.nan, "prose": 0.1}) | {"worst": math.inf, "mean": None}
    given = {"bayes": row({"code": 0.2}), "student": broken}
    found = table_rows(models_table(GatingFacts(rows=given)))
    assert found["student"][1:4] == ["–", "–", "–"]
    assert found["bayes"][4] == "–"
    assert "inf" not in found["student"][1]
    assert "nan" not in gating_section(GatingFacts(rows=given)).lower()
    assert "No model" in gating_headline(GatingFacts(rows={"student": {}}))


def test_the_certificate_says_what_each_figure_is() -> None:
    infinite = dataclasses.replace(certificate(), worst=Figure(None, "exact", "no support"))
    text = gating_section(GatingFacts(infinite))
    found = table_rows(text)
    assert found["Worst case"][:2] == ["infinite", "–"]
    assert found["Capacity"] == ["–"] * 4
    assert values(found["Lower end"][0]) == [0.003]
    assert found["Lower end"][2] == '<span class="label bound">bound</span>'
    assert found["Lower end"][3] == "Closed form, none &lt; it"
    assert found["Z"][2] == '<span class="label exact">exact</span>'
    shown = table_rows(gating_section(GatingFacts(certificate())))
    assert values(shown["Worst case"][1]) == pytest.approx([0.003, 0.005])
    assert shown["Worst case"][2] == '<span class="label estimate">estimate</span>'
    half = dataclasses.replace(certificate(), z=Figure(1.0, "estimate", "samples", 0.9, None))
    assert table_rows(gating_section(GatingFacts(half)))["Z"][1].endswith("to +∞")


def test_the_gate_by_domain_is_the_certificates() -> None:
    found = table_rows(gating_section(GatingFacts(certificate())))
    assert [values(cell) for cell in found["prose"]] == [
        [1200.0], [127.0], [2.004], [2.0], [0.004], pytest.approx([0.003, 0.005]), [0.5],
    ]  # fmt: skip
    assert "best" in found["prose"][4]
    assert "best" not in found["code"][4]
    bare = dataclasses.replace(
        certificate(),
        domains=tuple(dataclasses.replace(one, tokens=None, lam=None) for one in certificate().domains),
    )
    text = gating_section(GatingFacts(bare))
    assert [table_rows(text)["code"][column] for column in (1, 6)] == ["–", "–"]


def test_a_fit_alone_shows_its_own_domains() -> None:
    text = gating_section(GatingFacts(fit=fit()))
    assert [values(cell) for cell in table_rows(text)["code"]] == [[3000.0], [0.0033], [0.5]]
    assert "not held out" in text


# -- charts -------------------------------------------------------------------------------------------------------


def test_the_fit_is_drawn_with_a_description() -> None:
    text = gating_section(GatingFacts(certificate(), fit()))
    assert text.count("<svg") == text.count('role="img"') == 2
    assert "worst case from 0.3000 to 0.0600" in text
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert gating_section(GatingFacts(certificate(), fit())) == text


@pytest.mark.parametrize("history", [[], [{"step": 10, "lam": [0.5, 0.5], "worst": None, "gap": math.nan}], None])
def test_a_short_or_broken_history_is_no_mistake(history: list[dict[str, Any]] | None) -> None:
    text = gating_section(GatingFacts(fit={**fit(), "history": history}))
    assert text.count("<svg") == (2 if history else 0)


def test_of_many_domains_the_heaviest_are_named() -> None:
    names = [f"d{i}" for i in range(12)]
    facts = fit(names)
    for line in facts["history"]:
        line["lam"] = [(i + 1) / 78 for i in range(12)]
    text = gating_section(GatingFacts(fit=facts))
    legend = re.findall(r">(d\d+|\(all others\))</text>", text)
    assert sorted(legend, key=len) == ["d3", "d4", "d5", "d6", "d7", "d8", "d9", "d10", "d11", "(all others)"]
    assert "the other 3 are added up" in text


# -- pages --------------------------------------------------------------------------------------------------------


def test_everything_from_outside_is_escaped() -> None:
    bad = "<b>&"
    given = {"bayes": row({bad: 0.1}), bad: row({bad: 0.2})}
    facts = GatingFacts(certificate({bad: 0.1, "c": 0.2}), fit([bad, "c"]), given)
    for text in (gating_section(facts), render_page(gate_page(facts, bad))):
        assert "<b>" not in text
        assert "&lt;b&gt;&amp;" in text


def test_a_page_of_its_own_runs_nothing_and_leads_to_its_parts() -> None:
    page = render_page(gate_page(GatingFacts(certificate(), fit(), rows()), "The gate"))
    assert page.startswith("<!DOCTYPE html>")
    assert page.endswith("</html>\n")
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-" in page
    assert page.count("<script") == 1, "the theme's alone"
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert "9 domains" not in page
    assert "Robust gate · 2 domains · values in nats per token" in page
    for key in re.findall(r'<a href="#([^"]*)">', page):
        assert page.count(f'<section id="{key}"') == 1
    assert re.findall(r'<a href="#gating-(\w+)">', page) == ["models", "certificate", "domains", "fit"]
    assert page.count('<p class="headline">') == 1
    assert "<nav" not in render_page(gate_page(GatingFacts(rows=rows()), "Rows alone"))


def test_a_report_has_the_section_where_facts_are_given(three_runs: list[Path], tmp_path: Path) -> None:
    without = write_report(three_runs[:1], tmp_path / "a.html").read_text(encoding="utf-8")
    facts = GatingFacts(certificate(), fit(), rows())
    given = write_report(three_runs[:1], tmp_path / "b.html", gating=facts).read_text(encoding="utf-8")
    assert 'id="gating"' not in without
    assert given.count('<section id="gating"') == 1
    assert given.index('href="#training"') < given.index('href="#gating"') < given.index('href="#recipe"')
    assert "://" not in given
