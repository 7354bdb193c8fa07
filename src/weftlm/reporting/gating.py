"""The part of a report on a robust gate: its worst domain beside the baselines', its certificate, and its fit.

Takes what `weftlm gate` writes: a certificate, the fit's facts, and rows of models on held-out sequences. Every figure
of a certificate has its label: bound, estimate or exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from weftlm.errors import ConfigError
from weftlm.gating.certificate import Certificate
from weftlm.reporting.charts import drawn
from weftlm.reporting.figures import Curve, Panel, draw, run_lines
from weftlm.reporting.page import Block, Cell, Table, Text, exact
from weftlm.reporting.runs import mapping, number
from weftlm.reporting.score import Score, interval_cell, pieces, score_text
from weftlm.reporting.score_table import ScoreRow, ScoreTable, answer, headline, score_tables

DIGITS = 4
"""Decimals of values in nats."""
WORST, MEAN, KL = "worst case", "mean over domains", "KL from the teacher"
_MEASURES = {
    "expert": "cross-entropy minus that of the domain's own expert",
    "none": "cross-entropy",
    "entropy": "KL divergence of the domain from the model",
    "values": "cross-entropy minus the domain's given offset",
}
_FIGURES = {
    "worst": ("Worst case", "largest value over the allowed mixtures"),
    "capacity": ("Capacity", "no single model's worst KL is below it"),
    "lower": ("Lower end", "the least a gate can have at that mixture"),
    "gap": ("Gap", "worst case minus lower end: what is left to gain"),
    "z": ("Z", "mass of the gated model, by which it is divided; no unit"),
}


@dataclass(frozen=True)
class GatingFacts:
    """What a report shows of a robust gate.

    Attributes:
        certificate: The gate's certificate on held-out sequences.
        fit: Contents of gate/fit.json.
        rows: Models on held-out sequences by name, as student.json and direct.json hold them under `rows`. A row's
            `role` is baseline (it needs no training), gate or student.
        unit: "sequence" or "token", of all nats.
        offsets: What values are relative to: "expert", "none", "entropy" or "values"; "" where it is not known.
        length: Tokens of the scored windows; None where it is not known.
    """

    certificate: Certificate | None = None
    fit: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unit: str = ""
    offsets: str = ""
    length: int | None = None

    @classmethod
    def of(
        cls,
        certificate: Certificate | Mapping[str, Any] | None = None,
        fit: Mapping[str, Any] | None = None,
        students: Sequence[Mapping[str, Any]] = (),
    ) -> Self:
        """Facts from the JSON files of a run, all of one gate.

        Args:
            certificate: Contents of gate/certificate.json.
            fit: Contents of gate/fit.json.
            students: Contents of students/student.json and direct.json; of a row in both, the first counts.
        Raises:
            ConfigError: there is nothing to show.
            DataError: the certificate cannot be read.
        """
        if certificate is not None and not isinstance(certificate, Certificate):
            certificate = Certificate.from_json(certificate)
        rows: dict[str, Mapping[str, Any]] = {}
        for one in students:
            rows |= {name: mapping(row) for name, row in mapping(one.get("rows")).items() if name not in rows}
        if certificate is None and not fit and not rows:
            raise ConfigError("nothing is known of this gate; run weftlm gate fit, certify or distil first")
        parts = [vars(certificate) if certificate is not None else {}, fit or {}, *students]
        unit, offsets, length = (
            next((part[name] for part in parts if part.get(name)), None) for name in ("unit", "offsets", "length")
        )
        offsets = offsets if isinstance(offsets, str) or not offsets else "values"
        return cls(certificate, fit or {}, rows, unit or "", offsets or "", length)

    @property
    def nats(self) -> str:
        """The unit of all values in words."""
        return f"nats per {self.unit}" if self.unit else "nats"

    @property
    def measure(self) -> str:
        """What a value is, its unit, and the windows: `cross-entropy, nats per token, in windows of 128 tokens`."""
        windows = f", in windows of {self.length} tokens" if self.length else ""
        return f"{_MEASURES.get(self.offsets, 'value')}, {self.nats}{windows}"

    @property
    def exact(self) -> bool:
        """Whether the problem was enumerated, so that values have no error."""
        return self.certificate is not None and self.certificate.worst.label == "exact"


def gating_blocks(facts: GatingFacts) -> list[Block]:
    """What is known of a gate as blocks of a page."""
    blocks: list[Block] = [Text(gating_headline(facts), "lead"), *_answer(facts)]
    parts = {
        "Worst domain by model": score_tables(gate_table(facts)) if facts.rows else [],
        "Certificate": [] if facts.certificate is None else certificate_table(facts.certificate),
        "The gate by domain": domains_table(facts),
        "The fit, step by step": fit_charts(facts),
    }
    for heading, inside in parts.items():
        blocks += [Text(heading, "h3"), *inside] if inside else []
    return blocks


def gating_headline(facts: GatingFacts) -> str:
    """The worst case of the best gate or student, and its difference to the best baseline."""
    table = gate_table(facts)
    if table.best(WORST) is not None:
        return headline(table)
    if facts.certificate is not None:
        worst = facts.certificate.worst
        size = "infinite" if worst.value is None else f"{score_text(Score(worst.value), DIGITS)} {facts.nats}"
        where = "the enumerated problem" if facts.exact else "held-out sequences"
        return f"Worst case {size} on {where}, on {facts.certificate.worst_domain}."
    if facts.fit:
        fitted = score_text(Score(number(facts.fit.get("worst"))), DIGITS)
        return f"Worst case {fitted} {facts.nats} on the sequences of the fit; not certified on held-out ones yet."
    return "No model of the table has a worst case."


def _answer(facts: GatingFacts) -> list[Block]:
    blocks = answer(gate_table(facts))
    whole = any(row.get("role") == "gate" for row in facts.rows.values())
    if whole and not (facts.certificate and facts.certificate.causal):
        blocks.append(Text("The robust gate reads whole sequences and cannot generate text; its causal student can."))
    return blocks


def gate_table(facts: GatingFacts) -> ScoreTable:
    """Models by worst case, mean over domains and value on each domain, with differences to the best baseline."""
    domains = list(dict.fromkeys(name for row in facts.rows.values() for name in mapping(row.get("domains"))))
    rows = {name: _row(facts, row, domains) for name, row in facts.rows.items()}
    baselines = {name: row.scores[WORST].value for name, row in rows.items() if row.role == "baseline"}
    known = [name for name, worst in baselines.items() if math.isfinite(worst)]
    columns = (WORST, MEAN, KL) if any(KL in row.scores for row in rows.values()) else (WORST, MEAN)
    where = "the enumerated problem" if facts.exact else "held-out sequences, ± one standard error"
    caption = f"{facts.measure[:1].upper()}{facts.measure[1:]}, on {where}"
    if KL in columns:
        caption += (
            ". KL: distance of a causal model from the gate it was made from, nats per sequence, on held-out samples"
        )
    if any("experts_per_token" in row for row in facts.rows.values()):
        caption += (
            ". A student with some experts per token is measured as it generates, its other experts with a stale KV "
            "cache that is refreshed from time to time"
        )
    return ScoreTable(
        rows, columns, domains, caption, f"{facts.nats}, {WORST}", "model",
        base=min(known, key=baselines.__getitem__, default=None), digits=DIGITS, competing=("gate", "student"),
    )  # fmt: skip


def _row(facts: GatingFacts, row: Mapping[str, Any], domains: Sequence[str]) -> ScoreRow:
    """One model; the error of its worst case is that of its worst domain, where the worst case is one domain's."""
    held = {name: mapping(mapping(row.get("domains")).get(name)) for name in domains}
    error = {name: 0.0 if facts.exact else number(one.get("error")) for name, one in held.items()}
    scores = {name: Score(number(one.get("value")), error[name]) for name, one in held.items()}
    place, worst = str(row.get("worst_domain") or ""), number(row.get("worst"))
    alone = math.isclose(worst, scores.get(place, Score()).value, rel_tol=1e-9, abs_tol=1e-12)
    count = number(row.get("experts_per_token"))
    notes = [f"{count:.0f} expert{'s' if count != 1 else ''} per token"] if math.isfinite(count) else []
    notes += [f"worst: {place if alone else 'a mixture of domains'}"] if place else []
    means = {WORST: Score(worst, error[place] if alone else math.nan), MEAN: Score(number(row.get("mean")))}
    if math.isfinite(kl := number(row.get("kl"))):
        means[KL] = Score(kl, number(row.get("kl_error")))
    return ScoreRow({**means, **scores}, row.get("role", ""), path=row.get("model") or "", notes=notes)


def certificate_table(known: Certificate) -> list[Block]:
    """The certificate's figures, each with what it is and how it was found."""
    rows = []
    for key, (name, meaning) in _FIGURES.items():
        one = getattr(known, key)
        if one is None:
            rows.append([Cell(name, [meaning]), *[Cell()] * 4])
            continue
        value = Cell("infinite" if one.value is None else pieces(Score(number(one.value)), DIGITS))
        label, how = Cell(one.label, style=f"label {one.label}"), Cell(one.how[:1].upper() + one.how[1:])
        rows.append([Cell(name, [meaning]), value, interval_cell(one.low, one.high, DIGITS), label, how])
    caption = (
        f"Nats per {known.unit}; values are {_MEASURES.get(known.offsets, 'values')}. "
        "A bound always holds, on the side it names. An estimate comes from samples, or from an optimiser that may "
        "have stopped short. Exact is the truth about the enumerated problem, or about what is named beside it."
    )
    heads = ["Figure", "Value", "95 % interval", "Label", "How it was found"]
    return [Table(caption, heads, rows, "certificate", (0, 3, 4))]


def domains_table(facts: GatingFacts) -> list[Block]:
    """Value and weight of each domain, and what they are made of: of the certificate, else of the fit."""
    held_out = facts.certificate is not None
    given = [vars(row) for row in facts.certificate.domains] if facts.certificate is not None else [
        {"name": name, **mapping(row)} for name, row in mapping(facts.fit.get("domains")).items()
    ]  # fmt: skip
    rows = []
    for row in given:
        sequences, tokens, weight = (number(row.get(name)) for name in ("sequences", "tokens", "lam"))
        shown = [Cell(exact(sequences, f"{sequences:,.0f}".replace(",", " "))), Cell(exact(tokens, f"{tokens:.1f}"))]
        shown += [Cell(pieces(Score(number(row.get(name))), DIGITS)) for name in ("cross_entropy", "offset", "value")]
        interval = interval_cell(row.get("low"), row.get("high"), DIGITS)
        rows.append([Cell(row["name"]), *shown, interval, Cell(exact(weight, f"{weight:.1%}"))])
    heads = ["Domain", "Sequences", "Tokens per sequence", "Cross-entropy", "Offset", "Value", "95 % interval", "λ"]
    where = "The certified gate, divided by Z, on held-out sequences" if held_out else "On the sequences of the fit"
    caption = (
        f"{where}{'' if held_out else ', not held out'}: {facts.measure}. λ: part of the worst mixture of the fit."
    )
    return [Table(caption, heads, rows, "dense gate")] if rows else []


def fit_charts(facts: GatingFacts) -> list[Block]:
    """Worst case and adversary's gap over the steps of the fit; nothing where no history was kept."""
    history = [mapping(line) for line in facts.fit.get("history") or ()]
    history = [line for line in history if math.isfinite(number(line.get("step")))]
    if not history:
        return []
    steps_N = np.array([number(line["step"]) for line in history])
    panels = [
        Panel(f"{title}, {facts.nats}", (Curve("fit", steps_N, np.array([number(line.get(key)) for line in history])),))
        for title, key in (("Worst case", "worst"), ("Adversary's gap", "gap"))
    ]
    chart = draw(panels, run_lines(["fit"]), x_label="steps of the fit", zoomed=True)
    caption = (
        "On the sequences of the fit; the vertical scale is that of the last three quarters. The adversary's gap is "
        "the worst case minus the value at the present mixture: near 0 the mixture is the worst there is for this "
        "gate. What the gate itself could still gain is not in it."
    )
    if facts.fit.get("stopped_early"):
        caption += " The fit stopped before its last step: the duality gap was within its tolerance."
    return [drawn("gating-worst", chart, caption)]
