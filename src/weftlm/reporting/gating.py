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
from weftlm.reporting.compare import NAMED_DOMAINS, OPEN_ROWS
from weftlm.reporting.differences import difference_cells, difference_text, lowest, verdict
from weftlm.reporting.figures import OTHER, Curve, Panel, curve_grid, domain_lines, run_lines
from weftlm.reporting.page import DASH, Block, Box, Cell, Figure, Number, Page, Piece, Section, Table, Text, exact
from weftlm.reporting.runs import mapping, number
from weftlm.reporting.score_table import serve

COLUMN_DOMAINS = 7
"""Domains with a column of their own; of more, the domains become the rows of a second table."""
_MEASURES = {
    "expert": "cross-entropy minus that of the domain's own expert",
    "none": "cross-entropy",
    "entropy": "KL divergence of the domain from the model",
    "values": "cross-entropy minus the domain's given offset",
}
_FIGURES = {
    "worst": ("Worst case", "largest value over the allowed mixtures"),
    "capacity": ("Capacity", "no single model's worst KL is below it"),
    "at_lam": ("At the fit's mixture", "the gate's value there"),
    "lower": ("Lower end", "the least a gate can have at that mixture"),
    "gap": ("Gap", "worst case minus lower end: what is left to gain"),
    "z": ("Z", "mass of the gated model, by which it is divided; no unit"),
}


@dataclass(frozen=True)
class GatingFacts:
    """What a report shows of a robust gate; at least one of certificate, fit and rows.

    Attributes:
        certificate: the gate's, on held-out sequences.
        fit: what gate/fit.json holds.
        rows: models on held-out sequences, by name, as student.json and direct.json hold them under `rows`. A row's
            `role` is baseline (it needs no training), gate or student.
        unit: "sequence" or "token", of all nats; taken from certificate and fit where they hold it.
        offsets: what values are relative to: "expert", "none", "entropy" or "values"; "" where it is not known.
        length: tokens of the scored windows; None where it is not known.
    Raises:
        ConfigError: there is nothing to show, or the parts have different units or offsets.
    """

    certificate: Certificate | None = None
    fit: Mapping[str, Any] | None = None
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unit: str = ""
    offsets: str = ""
    length: int | None = None

    def __post_init__(self) -> None:
        if self.certificate is None and not self.fit and not self.rows:
            raise ConfigError(
                "gating facts came without a certificate, a fit and rows; give one of them, or gating=None"
            )
        known, fit = self.certificate, mapping(self.fit)
        merged = {
            "unit": _agreed("unit", [known.unit if known else "", str(fit.get("unit") or ""), self.unit]),
            "offsets": _agreed("offsets", [known.offsets if known else "", self.offsets]),
            "length": (known.length if known else None) or fit.get("length") or self.length,
        }
        for name, value in merged.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        certificate: Certificate | Mapping[str, Any] | None = None,
        fit: Mapping[str, Any] | None = None,
        students: Sequence[Mapping[str, Any]] = (),
    ) -> Self:
        """Facts from the JSON files of a run.

        Args:
            certificate: gate/certificate.json.
            fit: gate/fit.json.
            students: students/student.json and direct.json; of a row in both, the first counts.
        Raises:
            ConfigError: as the class, or fit and students are of different scores.
            DataError: the certificate cannot be read.
        """
        if certificate is not None and not isinstance(certificate, Certificate):
            certificate = Certificate.from_json(certificate)
        _agreed("scores", [str(one["scores"]) for one in (*([fit] if fit else []), *students) if one.get("scores")])
        rows: dict[str, Mapping[str, Any]] = {}
        for one in students:
            for name, row in mapping(one.get("rows")).items():
                rows.setdefault(name, mapping(row))
        given = [one.get("offsets") for one in students]
        offsets = [one if isinstance(one, str) else "values" for one in given if one is not None]
        units = [str(one["unit"]) for one in students if one.get("unit")]
        length = next((one["length"] for one in students if one.get("length")), None)
        return cls(certificate, fit, rows, _agreed("unit", units), _agreed("offsets", offsets), length)

    @property
    def nats(self) -> str:
        """The unit of all values in words."""
        return f"nats per {self.unit}" if self.unit else "nats"

    @property
    def unit_and_windows(self) -> str:
        """`nats per token, in windows of 128 tokens`."""
        return self.nats + _windows(self.length)

    @property
    def exact(self) -> bool:
        """Whether the problem was enumerated, so that values have no error."""
        return self.certificate is not None and self.certificate.worst.label == "exact"

    @property
    def measure(self) -> str:
        """What a value is, in words."""
        return _MEASURES.get(self.offsets, "value")

    @property
    def domains(self) -> list[str]:
        """Every domain of the rows, in order."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in mapping(row.get("domains"))))

    def value(self, model: str, domain: str) -> float:
        """A model's value on a domain; NaN where there is none."""
        return number(mapping(mapping(self.rows[model].get("domains")).get(domain)).get("value"))

    def error(self, model: str, domain: str) -> float:
        """Its standard error."""
        return number(mapping(mapping(self.rows[model].get("domains")).get(domain)).get("error"))

    def worst(self, model: str) -> float:
        """A model's worst case."""
        return number(self.rows[model].get("worst"))

    def named(self, *roles: str) -> list[str]:
        """The models of some roles whose worst case is known."""
        return [name for name, row in self.rows.items() if row.get("role") in roles and math.isfinite(self.worst(name))]

    def worst_error(self, model: str) -> float:
        """Standard error of a model's worst case; NaN where it is not one domain's."""
        return self.error(model, self.worst_domain(model)) if self.is_one_domain(model) else math.nan

    def worst_domain(self, model: str) -> str:
        """The domain of a model's largest value."""
        return str(self.rows[model].get("worst_domain") or "")

    def is_one_domain(self, model: str) -> bool:
        """Whether a model's worst case is its worst domain, not a mixture."""
        return math.isclose(self.worst(model), self.value(model, self.worst_domain(model)), rel_tol=1e-9, abs_tol=1e-12)


def _agreed(what: str, values: Sequence[str]) -> str:
    """The one value that is not empty; empty where all are."""
    found = list(dict.fromkeys(value for value in values if value))
    if len(found) > 1:
        raise ConfigError(
            f"gating facts have different {what}: {', '.join(found)}; take certificate, fit and rows of one gate, or "
            "make the older ones again (weftlm gate certify, weftlm gate distil)"
        )
    return found[0] if found else ""


def gate_page(facts: GatingFacts, title: str) -> Page:
    """A page of its own about a gate."""
    count = len(facts.certificate.domains) if facts.certificate else len(facts.domains or _fitted(facts))
    return Page(
        title=title,
        kicker=" · ".join(["Robust gate", *([f"{count} domains"] if count > 1 else []), f"values in {facts.nats}"]),
        headline=gating_headline(facts),
        opening=_answer(facts),
        sections=_sections(facts),
    )


def gating_blocks(facts: GatingFacts) -> list[Block]:
    """The same as blocks of a larger page."""
    blocks: list[Block] = [Text(gating_headline(facts), "lead"), *_answer(facts)]
    for one in _sections(facts):
        blocks += [Text(one.heading, "h3"), *one.blocks] if one.blocks else []
    return blocks


def _sections(facts: GatingFacts) -> list[Section]:
    known = facts.certificate
    certified: list[Block] = [] if known is None else [certificate_table(known)]
    return [
        Section("gating-models", "Models", "Worst domain by model", models_tables(facts) if facts.rows else []),
        Section("gating-certificate", "Certificate", "Certificate", certified),
        Section("gating-domains", "By domain", "The gate by domain", domains_table(facts)),
        Section("gating-fit", "Fit", "The fit, step by step", fit_charts(facts)),
    ]


def gating_headline(facts: GatingFacts) -> str:
    """The worst case of the gate (else of its student), and its difference to the best baseline."""
    own, baselines = facts.named("gate") + facts.named("student"), facts.named("baseline")
    if own:
        head = own[0]
        place = facts.worst_domain(head) if facts.is_one_domain(head) else "a mixture of domains"
        text = f"{head}: worst case {_four(facts.worst(head))} {facts.nats}, on {place}"
        if not baselines:
            return f"{text}. No baseline was measured."
        best = min(baselines, key=facts.worst)
        value, error = _against(facts, head, best)
        size = difference_text(value, error, 4)
        return f"{text}; {size} against the best baseline, {best}: {verdict(value, error)}."
    if facts.certificate is not None:
        worst = facts.certificate.worst
        size = _four(number(worst.value)) if worst.value is not None else "infinite"
        ends = _interval(worst.low, worst.high)
        shown = "".join(one if isinstance(one, str) else one.text for one in ends)
        where = "the enumerated problem" if facts.exact else f"held-out sequences (95 % interval {shown})"
        return f"Worst case {size} {facts.nats} on {where}, on {facts.certificate.worst_domain}."
    if facts.fit and not facts.rows:
        fitted = _four(number(facts.fit.get("worst")))
        return f"Worst case {fitted} {facts.nats} on the sequences of the fit; not certified on held-out ones yet."
    return "No model of the table has a worst case."


def _against(facts: GatingFacts, model: str, baseline: str) -> tuple[float, float]:
    """A worst case minus a baseline's, and its standard error: the two taken as independent."""
    error = math.hypot(facts.worst_error(model), facts.worst_error(baseline))
    return facts.worst(model) - facts.worst(baseline), 0.0 if facts.exact else error


def _answer(facts: GatingFacts) -> list[Block]:
    """What to serve, and what helped: the worst case of every gate and student against the best baseline."""
    own, baselines = facts.named("gate", "student"), facts.named("baseline")
    served = next((name for name in facts.named("student") if isinstance(facts.rows[name].get("model"), str)), None)
    blocks: list[Block] = []
    if served is not None:
        blocks += serve(facts.rows[served]["model"], "Serve the causal student, which can generate text", served)
    if own and baselines:
        best = min(baselines, key=facts.worst)
        rows = [[Cell(name), *difference_cells(*_against(facts, name, best), decimals=4)] for name in own]
        caption = (
            f"Worst case against the best baseline, {best}, {facts.nats}; ± one standard error, the two values taken "
            "as independent; negative is better."
        )
        blocks.append(Table(caption, ["Model", "Difference", "95 % interval"], rows, "dense"))
    if facts.named("gate") and not (facts.certificate and facts.certificate.causal):
        blocks.append(Text("The robust gate reads whole sequences and cannot generate text; its causal student can."))
    return [Box(blocks)] if blocks else []


# -------------------------------------------------------------------------------------------------------------- tables


def models_tables(facts: GatingFacts) -> list[Block]:
    """Worst case, worst domain, mean and values by model; the lowest of a column is bold."""
    domains, names = facts.domains, list(facts.rows)
    wide = len(domains) > COLUMN_DOMAINS
    distances = any(math.isfinite(number(row.get("kl"))) for row in facts.rows.values())
    best_worst = lowest(map(facts.worst, names))
    best_mean = lowest(number(row.get("mean")) for row in facts.rows.values())
    best = {domain: lowest(facts.value(name, domain) for name in names) for domain in domains}

    def cell(name: str, domain: str) -> Cell:
        return _value(facts.value(name, domain), facts.error(name, domain), best[domain])

    rows = []
    for name, row in facts.rows.items():
        count = number(row.get("experts_per_token"))
        notes = [str(row["role"])] if row.get("role") else []
        notes += [f"{count:.0f} expert{'s' if count != 1 else ''} per token"] if math.isfinite(count) else []
        cells = [
            Cell(name, sub=", ".join(notes) or None),
            Cell(facts.worst_domain(name) or DASH),
            _value(facts.worst(name), facts.worst_error(name), best_worst),
            _value(number(row.get("mean")), math.nan, best_mean),
        ]
        cells += [_value(number(row.get("kl")), number(row.get("kl_error")))] if distances else []
        rows.append(cells + ([] if wide else [cell(name, domain) for domain in domains]))
    heads: list[str | tuple[str, ...]] = ["Model", ("Worst", "domain"), ("Worst", "case"), ("Mean over", "domains")]
    heads += [("KL from", "teacher")] if distances else []
    heads += [] if wide else domains
    tables: list[Block] = [Table(_models_caption(facts, distances), heads, rows, "models", (0, 1))]
    if wide:
        by_domain = [[Cell(domain), *(cell(name, domain) for name in names)] for domain in domains]
        caption = f"{_capital(facts.measure)} by domain, {facts.unit_and_windows}; the lowest value of a row is bold."
        fold = f"All {len(domains)} domains"
        opened = len(domains) <= OPEN_ROWS
        tables.append(Table(caption, ["Domain", *names], by_domain, "dense models", fold=fold, opened=opened))
    return tables


def _models_caption(facts: GatingFacts, distances: bool) -> str:
    where = "the enumerated problem" if facts.exact else "held-out sequences"
    text = f"{_capital(facts.measure)} on {where}, {facts.unit_and_windows}; lower is better."
    text += " The lowest value of a column is bold."
    text += "" if facts.exact else " Under each value ± one standard error."
    if not all(facts.is_one_domain(name) for name in facts.rows if math.isfinite(facts.worst(name))):
        text += " The worst case is over the allowed mixtures, so the worst domain alone may be worse than that."
    if distances:
        text += (
            " KL: distance of a causal model from the gate it was made from (baselines: from the same gate), nats per "
            "sequence, on held-out samples of the experts."
        )
    if any(row.get("all_experts") for row in facts.rows.values()):
        text += (
            " A student with some experts per token is measured as it generates, its other experts with a stale KV "
            "cache that is refreshed from time to time; all experts run: every one is up to date at every token."
        )
    return text


def _windows(length: int | None) -> str:
    return f", in windows of {length} tokens" if length else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _value(value: float, error: float = math.nan, best: float | None = None) -> Cell:
    """One cell: a value, bold where it is the lowest, and its error under it."""
    if not math.isfinite(value):
        return Cell()
    sub = ("± ", Number(error, f"{error:.4f}")) if math.isfinite(error) and error > 0 else None
    return Cell(Number(value, _four(value)), sub=sub, best="lowest" if value == best else "")


def _four(value: float) -> str:
    """Four decimals with a true minus sign, and no minus before a zero."""
    if not math.isfinite(value):
        return "not recorded"
    text = f"{value:.4f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def certificate_table(known: Certificate) -> Table:
    """The certificate's figures, each with what it is and how it was found."""
    rows = []
    for key, (name, meaning) in _FIGURES.items():
        one = getattr(known, key)
        if one is None:
            rows += [] if key == "at_lam" else [[Cell(name, sub=meaning), *[Cell()] * 4]]
            continue
        value = "infinite" if one.value is None else exact(number(one.value), _four(number(one.value)))
        label = Cell(one.label, style=f"label {one.label}")
        rows.append(
            [Cell(name, sub=meaning), Cell(value), Cell(_interval(one.low, one.high)), label, Cell(_capital(one.how))]
        )
    caption = (
        f"Nats per {known.unit}{_windows(known.length)}; values are {_MEASURES.get(known.offsets, 'values')}. "
        "A bound always holds, on the side it names. An estimate comes from samples, or from an optimiser that may "
        "have stopped short. Exact is the truth about the enumerated problem, or about what is named beside it."
    )
    heads = ["Figure", "Value", "95 % interval", "Label", "How it was found"]
    return Table(caption, heads, rows, "certificate", (0, 3, 4))


def _interval(low: float | None, high: float | None) -> Sequence[Piece]:
    ends = [number(low), number(high)]
    if not any(map(math.isfinite, ends)):
        return [DASH]
    first, last = (
        Number(end, _four(end)) if math.isfinite(end) else f"{sign}∞" for end, sign in zip(ends, "−+", strict=True)
    )
    return [first, " to ", last]


def domains_table(facts: GatingFacts) -> list[Block]:
    """Cross-entropy, offset, value and weight of each domain: of the certificate, else of the fit."""
    known = facts.certificate
    if known is None:
        return _fitted_table(facts)
    most = max((row.value for row in known.domains if math.isfinite(row.value)), default=math.nan)
    rows = [
        [
            Cell(row.name),
            _count(row.sequences),
            Cell(exact(number(row.tokens), f"{number(row.tokens):.1f}")),
            _value(row.cross_entropy),
            _value(row.offset),
            Cell(exact(row.value, _four(row.value)), best="largest" if row.value == most else ""),
            Cell(_interval(row.low, row.high)),
            _weight(row.lam),
        ]
        for row in known.domains
    ]
    heads: list[str | tuple[str, ...]] = [
        "Domain",
        "Sequences",
        ("Tokens per", "sequence"),
        "Cross-entropy",
        "Offset",
        "Value",
        "95 % interval",
        "λ",
    ]
    caption = (
        f"The certified gate, divided by Z; {facts.unit_and_windows}. Value is cross-entropy minus offset; "
        "the largest is bold. λ: the domain's part of the worst mixture that the fit found."
    )
    return [Table(caption, heads, rows, "dense gate")]


def _count(value: Any) -> Cell:
    return Cell(exact(number(value), f"{number(value):,.0f}".replace(",", " ")))


def _weight(value: Any) -> Cell:
    return Cell(exact(number(value), f"{number(value):.1%}"))


def _fitted(facts: GatingFacts) -> Mapping[str, Any]:
    return mapping(facts.fit.get("domains")) if facts.fit else {}


def _fitted_table(facts: GatingFacts) -> list[Block]:
    rows = [
        [Cell(name), _count(row.get("sequences")), _value(number(row.get("value"))), _weight(row.get("lam"))]
        for name, row in ((name, mapping(row)) for name, row in _fitted(facts).items())
    ]
    caption = (
        f"{_capital(facts.measure)} on the sequences of the fit, {facts.unit_and_windows}: not held out. "
        "λ: the domain's part of the worst mixture that the fit found."
    )
    return [Table(caption, ["Domain", "Sequences", "Value", "λ"], rows, "dense gate")] if rows else []


# -------------------------------------------------------------------------------------------------------------- charts


def fit_charts(facts: GatingFacts) -> list[Block]:
    """Worst case, opponent's gap and mixture over the steps of the fit; nothing where no history was kept."""
    history = [mapping(line) for line in (facts.fit or {}).get("history") or ()]
    history = [line for line in history if math.isfinite(number(line.get("step")))]
    if not history:
        return []
    steps_N = np.array([number(line["step"]) for line in history])
    worst_N, gap_N = (np.array([number(line.get(key)) for line in history]) for key in ("worst", "gap"))
    panels = [
        Panel(f"Worst case, {facts.nats}", (Curve("worst case", steps_N, worst_N),), _four),
        Panel(f"Adversary's gap, {facts.nats}", (Curve("gap", steps_N, gap_N),), _four),
    ]
    chart = curve_grid(panels, run_lines(["worst case", "gap"]), x_label="steps of the fit", row_height=2.6)
    told = f"Over {len(history)} reports up to step {steps_N[-1]:.0f}: worst case from {_four(worst_N[0])} to "
    told += f"{_four(worst_N[-1])}, adversary's gap from {_four(gap_N[0])} to {_four(gap_N[-1])} {facts.nats}."
    if (facts.fit or {}).get("stopped_early"):
        told += " The fit stopped there, before its last step: the duality gap was within its tolerance."
    caption = (
        "On the sequences of the fit. The adversary's gap is the worst case minus the value at the present mixture: "
        "near 0 the mixture is the worst there is for this gate. What the gate itself could still gain is not in it."
    )
    return [drawn("gating-worst", chart, caption, told), *_mixture_chart(facts, history, steps_N)]


def _mixture_chart(facts: GatingFacts, history: Sequence[Mapping[str, Any]], steps_N: Any) -> list[Figure]:
    names = list(_fitted(facts)) or [row.name for row in (facts.certificate.domains if facts.certificate else ())]
    lam_ND = np.full((len(history), len(names)), math.nan)
    for place, line in enumerate(history):
        row = [number(value) for value in line.get("lam") or ()][: len(names)]
        lam_ND[place, : len(row)] = row
    if not np.isfinite(lam_ND).any():
        return []
    means_D = np.nan_to_num(lam_ND).mean(axis=0)
    named = sorted(np.argsort(-means_D, kind="stable")[:NAMED_DOMAINS].tolist())
    rest = [place for place in range(len(names)) if place not in named]
    shown = [Curve(names[place], steps_N, lam_ND[:, place]) for place in named]
    caption = "The mixture the adversary plays, one line per domain; a gate is fitted against the mixture of its step."
    if rest:
        shown.append(Curve(OTHER, steps_N, lam_ND[:, rest].sum(axis=1)))
        caption += f" The {len(named)} domains of largest mean weight are named; the other {len(rest)} are added up."
    lines = domain_lines([curve.label for curve in shown])
    panel = Panel("Mixture λ by domain", tuple(shown))
    chart = curve_grid([panel], lines, y_label="weight", x_label="steps of the fit", legend=list(lines))
    return [drawn("gating-lambda", chart, caption, "Mixture weights over the steps of the fit, one line per domain.")]
