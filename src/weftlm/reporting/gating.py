"""The part of a report on a robust gate: its worst domain beside the rivals', its certificate, and how it was fitted.

Takes what `weftlm gate` writes: a certificate, the fit's facts, and rows of models on held-out sequences. What is a
bound, what an estimate and what exact is said wherever a number of a certificate stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from matplotlib.figure import Figure as Chart

from weftlm.errors import ConfigError
from weftlm.gating.certificate import Certificate, DomainRow, Figure
from weftlm.gating.primal_dual import Z_NORMAL
from weftlm.reporting.figures import (
    OTHER,
    Curve,
    Panel,
    compared_curves,
    domain_lines,
    inline_svg,
    run_lines,
    small_multiples,
    to_svg,
)
from weftlm.reporting.html import DASH, Cell, column_head, data, details, escape, figure, section, table
from weftlm.reporting.layout import contents, notes, page_file, page_text
from weftlm.reporting.runs import mapping, number
from weftlm.reporting.score_table import serve_command
from weftlm.reporting.view import NAMED_DOMAINS, OPEN_ROWS

ALL_RUN = ", all experts run"
"""What is added to a sparse student's name for its row with every expert up to date at every token."""
RIVALS = ("uniform", "bayes", "fixed share")
"""Rows that need no training, which a robust gate has to beat."""
ROBUST, STUDENT, DIRECT = "robust", "student", "direct"
"""Rows with a meaning of their own: the fitted gate, its causal student, a causal gate of the same objective."""
COLUMN_DOMAINS = 7
"""Domains with a column of their own; of more, the domains become the rows of a second table."""
_NAMES = {ROBUST: "the robust gate", STUDENT: "the causal student", DIRECT: "the directly trained causal gate"}
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
    "gap": ("Gap", "worst case minus lower end"),
    "z": ("Z", "mass of the gated model, by which it is divided; no unit"),
}


@dataclass(frozen=True)
class GatingFacts:
    """What a report shows of a robust gate; at least one of certificate, fit and rows.

    Attributes:
        certificate: of the gate on held-out sequences.
        fit: what gate/fit.json holds.
        rows: models on held-out sequences, by name, as student.json and direct.json hold them under `rows`.
        unit: "sequence" or "token", of all nats; empty where certificate or fit say it.
        offsets: what values are relative to: "expert", "none", "entropy" or "values"; empty where the certificate says
            it, or where it is not known.
        rivals: the rows the gate is compared with; all others are the gate's or made of it.
        length: tokens of the scored windows; None where certificate or fit say it, or where it is not known.
    Raises:
        ConfigError: there is nothing to show, or the parts have different units or offsets.
    """

    certificate: Certificate | None = None
    fit: Mapping[str, Any] | None = None
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unit: str = ""
    offsets: str = ""
    rivals: Sequence[str] = RIVALS
    length: int | None = None

    def __post_init__(self) -> None:
        if self.certificate is None and not self.fit and not self.rows:
            raise ConfigError(
                "gating facts came without a certificate, a fit and rows; give one of them, or gating=None"
            )
        _agreed("unit", self._units)
        _agreed("offsets", self._offsets)

    @classmethod
    def of(
        cls,
        certificate: Certificate | Mapping[str, Any] | None = None,
        fit: Mapping[str, Any] | None = None,
        students: Sequence[Mapping[str, Any]] = (),
        *,
        rivals: Sequence[str] = RIVALS,
    ) -> Self:
        """Facts from JSON files as they lie in a run.

        Args:
            certificate: gate/certificate.json.
            fit: gate/fit.json.
            students: students/student.json and direct.json; of a row in both, the first counts.
            rivals: see the class.
        Raises:
            ConfigError: as the class, or fit and students are of different scores.
            DataError: the certificate is none.
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
        return cls(certificate, fit, rows, _agreed("unit", units), _agreed("offsets", offsets), rivals, length)

    @property
    def nats(self) -> str:
        """The unit of all values in words."""
        unit = _agreed("unit", self._units)
        return f"nats per {unit}" if unit else "nats"

    @property
    def unit_and_windows(self) -> str:
        """`nats per token, in windows of 128 tokens`, for a caption."""
        fitted = self.fit.get("length") if self.fit else None
        known = (self.certificate.length if self.certificate else None) or fitted or self.length
        return escape(self.nats) + _windows(known)

    @property
    def relative_to(self) -> str:
        """What values are relative to; empty where it is not known."""
        return _agreed("offsets", self._offsets)

    @property
    def measure(self) -> str:
        """What a value is, in words."""
        return _MEASURES.get(self.relative_to, "value")

    @property
    def domains(self) -> list[str]:
        """Every domain of the rows, in order."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in mapping(row.get("domains"))))

    @property
    def _units(self) -> list[str]:
        fitted = str(self.fit.get("unit") or "") if self.fit else ""
        return [self.certificate.unit if self.certificate else "", fitted, self.unit]

    @property
    def _offsets(self) -> list[str]:
        return [self.certificate.offsets if self.certificate else "", self.offsets]

    def value(self, model: str, domain: str) -> float:
        """A model's value on a domain; NaN where there is none."""
        return number(mapping(mapping(self.rows[model].get("domains")).get(domain)).get("value"))

    def error(self, model: str, domain: str) -> float:
        """Its standard error."""
        return number(mapping(mapping(self.rows[model].get("domains")).get(domain)).get("error"))

    def worst(self, model: str) -> float:
        """A model's worst case."""
        return number(self.rows[model].get("worst"))

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


# ---------------------------------------------------------------------------------------------------------------- page


def gating_style() -> str:
    """What a page's style sheet needs for the section, on a new line."""
    return "\n" + page_file("gate.css")


def gating_section(facts: GatingFacts) -> str:
    """The section's inside: findings, models, certificate, fit. The page needs `gating_style` in its style sheet."""
    lead = f'<p class="lead">{escape(" ".join(gating_findings(facts)))}</p>'
    return "\n".join([lead, *(f"<h3>{heading}</h3>\n{inside}" for _, _, heading, inside in _parts(facts))])


def gate_page(facts: GatingFacts, title: str) -> str:
    """The same as a page of its own, which runs nothing and loads nothing.

    Args:
        facts: of the gate.
        title: of the page, plain text.
    Returns:
        HTML, for `weftlm.reporting.html.write_page`.
    """
    headline, *rest = gating_findings(facts)
    parts = _parts(facts)
    count = len(facts.certificate.domains) if facts.certificate else len(facts.domains or _fitted(facts))
    kicker = ["Robust gate", *([f"{count} domains"] if count > 1 else []), f"values in {facts.nats}"]
    return page_text(
        title=title,
        kicker=" · ".join(escape(one) for one in kicker),
        headline=headline,
        opening="\n".join(
            text
            for text in (_serve(facts), notes(rest), contents([(key, short) for key, short, _, _ in parts]))
            if text
        ),
        body="\n".join(section(key, heading, inside) for key, _, heading, inside in parts),
        style=gating_style(),
    )


def _serve(facts: GatingFacts) -> str:
    """The command that serves the causal student; nothing where none was made."""
    path = mapping(facts.rows.get(STUDENT)).get("model")
    if not isinstance(path, str):
        return ""
    return (
        f'<div class="answer">\n<p>Serve the causal student, which can write text:</p>\n{serve_command(path)}\n</div>'
    )


def _parts(facts: GatingFacts) -> list[tuple[str, str, str, str]]:
    """Anchor, short name, heading and inside of each part that has something to show."""
    known = facts.certificate
    found = [
        ("gating-models", "Models", "Worst domain by model", models_table(facts) if facts.rows else ""),
        ("gating-certificate", "Certificate", "Certificate", "" if known is None else certificate_table(known)),
        ("gating-domains", "By domain", "The gate by domain", domains_table(facts)),
        ("gating-fit", "Fit", "The fit, step by step", fit_charts(facts)),
    ]
    return [part for part in found if part[3]]


# ------------------------------------------------------------------------------------------------------------ findings


def gating_findings(facts: GatingFacts) -> list[str]:
    """What the facts say, in plain sentences, the headline first; also where a rival is better."""
    return [*_compared(facts), *_certified(facts)] or ["No model of the table has a worst case."]


def _compared(facts: GatingFacts) -> list[str]:
    """The gate, and its student, against the best rival."""
    known = [name for name in facts.rows if math.isfinite(facts.worst(name))]
    rivals = [name for name in known if name in facts.rivals]
    own = [name for name in known if name not in facts.rivals]
    if not own:
        return []
    head = next((name for name in (ROBUST, STUDENT, DIRECT) if name in own), own[0])
    said = f"{_where(facts)} {_name(head)} {_worst_words(facts, head)}"
    if not rivals:
        return [f"{said}. No rival was measured."]
    best = min(rivals, key=facts.worst)
    rank = f"the best of {len(rivals)} rivals, {best}," if len(rivals) > 1 else f"the one rival, {best},"
    sentences = [
        f"{said}; {rank} {_worst_words(facts, best, again=True)}: {_name(head)} is {_verdict(facts, head, best)}."
    ]
    sentences += _chance(facts, head, best)
    if head == ROBUST and (facts.certificate is None or not facts.certificate.causal):
        sentences.append("The robust gate reads whole sequences, so it cannot write text; its causal student can.")
    if head == ROBUST and STUDENT in own:
        text = f"{_name(STUDENT)} {_worst_words(facts, STUDENT)}: {_verdict(facts, STUDENT, best, named=True)}."
        sentences += [_capital(text), *_chance(facts, STUDENT, best)]
    if len(own) > 2:
        better = sum(facts.worst(name) < facts.worst(best) for name in own)
        sentences.append(
            f"Of the {len(own)} gates and students here, {better or 'none'} {'have' if better > 1 else 'has'} a lower "
            "worst case than every rival."
        )
    return sentences


def _where(facts: GatingFacts) -> str:
    return "On the enumerated problem" if _is_exact(facts) else "On held-out sequences"


def _is_exact(facts: GatingFacts) -> bool:
    return facts.certificate is not None and facts.certificate.worst.label == "exact"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _name(model: str) -> str:
    return _NAMES.get(model, model)


def _worst_words(facts: GatingFacts, model: str, *, again: bool = False) -> str:
    """`is worst on code, 0.0123 nats per token above that domain's own expert`; `again`: without what was just said."""
    alone = facts.is_one_domain(model)
    place = f"is worst on {facts.worst_domain(model)}" if alone else "is at worst, over the allowed mixtures"
    value, unit = facts.worst(model), "" if again else f" {facts.nats}"
    if facts.relative_to in ("expert", "values"):
        side = "above" if value >= 0 else "below"
        whose = "that domain's" if alone else "the mixture's"
        what = {"expert": "own expert" if alone else "own experts", "values": "offset"}[facts.relative_to]
        return f"{place}, {abs(value):.4f}{unit} {side}" + ("" if again else f" {whose} {what}")
    what = {"none": "a cross-entropy of ", "entropy": "a KL divergence of "}.get(facts.relative_to, "a value of ")
    return f"{place}, with {'' if again else what}{_four(value)}{unit}"


def _verdict(facts: GatingFacts, model: str, rival: str, *, named: bool = False) -> str:
    difference = facts.worst(model) - facts.worst(rival)
    if abs(difference) < 0.5e-4:
        return f"equal{f' to {rival}' if named else ''} in the first four decimals"
    return f"{'better' if difference < 0 else 'worse'}{f' than {rival}' if named else ''} by {abs(difference):.4f}"


def _chance(facts: GatingFacts, model: str, rival: str) -> list[str]:
    """Whether the errors of two worst domains leave room for chance."""
    if not (facts.is_one_domain(model) and facts.is_one_domain(rival)):
        return []
    half = Z_NORMAL * math.hypot(*(facts.error(name, facts.worst_domain(name)) for name in (model, rival)))
    if not math.isfinite(half) or half < abs(facts.worst(model) - facts.worst(rival)):
        return []
    size = f"± {half:.4f} at 95 % on the difference"
    return [f"The errors of those two values, taken as independent, leave that open: {size}."]


def _certified(facts: GatingFacts) -> list[str]:
    """What certificate and fit say of the gate by themselves."""
    known = facts.certificate
    if known is None:
        if facts.rows or not facts.fit:
            return []
        worst, name = number(facts.fit.get("worst")), str(facts.fit.get("worst_domain") or "")
        size = f"{_four(worst)} {facts.nats}" if math.isfinite(worst) else "not known"
        largest = f"; its largest value is on {name}." if name else "."
        return [
            f"On the sequences it was fitted on, the gate's worst case is {size}{largest}",
            "Nothing is certified on held-out sequences yet.",
        ]
    sentences = []
    if not facts.rows:
        worst = number(known.worst.value)
        ends = [number(known.worst.low), number(known.worst.high)]
        size = f"{_four(worst)} {facts.nats}" if math.isfinite(worst) else "not finite"
        if all(math.isfinite(end) for end in ends):
            size += f" (95 % interval {_four(ends[0])} to {_four(ends[1])})"
        sentences.append(
            f"{_where(facts)} the gate's worst case is {size}, {facts.measure}; its largest value is on "
            f"{known.worst_domain}."
        )
    return sentences + ([] if known.gap is None else _left_to_gain(known.gap, facts.nats))


def _left_to_gain(gap: Figure, nats: str) -> list[str]:
    value = number(gap.value)
    if not math.isfinite(value):
        return []
    size = f"{_four(value)} {nats}"
    if gap.label != "estimate":
        return [f"No gate over whole sequences with Z = 1 has a worst case lower than this gate's by more than {size}."]
    if value <= 0:
        return [
            "Nothing left to gain was found: a gate of the same kind, trained against the fit's mixture alone, stayed "
            "above this gate's worst case. There may be more."
        ]
    return [
        f"What is left to gain is estimated at {size}: a gate of the same kind, trained against the fit's mixture "
        "alone, got that far below this gate's worst case. There may be more."
    ]


# -------------------------------------------------------------------------------------------------------------- tables


def models_table(facts: GatingFacts) -> str:
    """Worst case, worst domain, mean and values by model; the lowest of a column is bold."""
    domains = facts.domains
    wide = len(domains) > COLUMN_DOMAINS
    columns = [] if wide else domains
    distances = any(math.isfinite(number(row.get("kl"))) for row in facts.rows.values())
    best_worst = _lowest([facts.worst(name) for name in facts.rows])
    best_mean = _lowest([number(row.get("mean")) for row in facts.rows.values()])
    best = {domain: _lowest([facts.value(name, domain) for name in facts.rows]) for domain in domains}
    rows = []
    for name, row in facts.rows.items():
        worst_domain = facts.worst_domain(name)
        error = facts.error(name, worst_domain) if facts.is_one_domain(name) else math.nan
        mean = number(row.get("mean"))
        cells = [
            Cell(_model(facts, name), "text", header=True),
            Cell(escape(worst_domain) if worst_domain else DASH, "text"),
            Cell(_shown(facts.worst(name), error, best_worst)),
            Cell(_shown(mean, math.nan, best_mean)),
        ]
        if distances:
            cells.append(Cell(_shown(number(row.get("kl")), number(row.get("kl_error")), None)))
        cells += [Cell(_domain_value(facts, name, domain, best[domain])) for domain in columns]
        rows.append(cells)
    heads = ["Model", "Worst<br>domain", "Worst<br>case", "Mean over<br>domains"]
    heads += ["KL from<br>teacher"] if distances else []
    heads += [escape(domain) for domain in columns]
    head = _head(heads, text=(0, 1))
    text = table(_models_caption(facts, distances), head, rows, kind="models")
    if wide:
        rows = [
            [
                Cell(escape(domain), "text", header=True),
                *(Cell(_domain_value(facts, name, domain, best[domain])) for name in facts.rows),
            ]
            for domain in domains
        ]
        head = column_head(["Domain", *(escape(name) for name in facts.rows)])
        caption = f"{_capital(facts.measure)} by domain, {facts.unit_and_windows}, as above; "
        caption += "the lowest value of a row is bold."
        text += details(
            f"All {len(domains)} domains",
            table(caption, head, rows, kind="dense models"),
            is_open=len(domains) <= OPEN_ROWS,
        )
    return text


def _windows(length: int | None) -> str:
    return f", in windows of {length} tokens" if length else ""


def _models_caption(facts: GatingFacts, distances: bool) -> str:
    exact = _is_exact(facts)
    where = "the enumerated problem" if exact else "held-out sequences"
    text = f"{_capital(facts.measure)} on {where}, {facts.unit_and_windows}; lower is better."
    text += " The lowest value of a column is bold."
    if not exact:
        text += " Under each value ± one standard error."
    if not all(facts.is_one_domain(name) for name in facts.rows if math.isfinite(facts.worst(name))):
        text += " The worst case is over the allowed mixtures, so the worst domain alone may be worse than that."
    if distances:
        text += (
            " KL: how far a causal model is from the gate it was made from (rivals: from the same gate), nats per "
            "sequence, on held-out samples of the experts."
        )
    if any(name.endswith(ALL_RUN) for name in facts.rows):
        text += (
            " A student with some experts per token is measured as it generates, its sleeping experts catching up from "
            "time to time; all experts run: every one is up to date at every token, as when a text is read."
        )
    return text


def _model(facts: GatingFacts, name: str) -> str:
    count = number(facts.rows[name].get("experts_per_token"))
    facts_of = ["rival"] if name in facts.rivals else []
    if math.isfinite(count):
        facts_of.append(f"{count:.0f} expert{'s' if count != 1 else ''} per token")
    return escape(name) + (f'<span class="sub">{", ".join(facts_of)}</span>' if facts_of else "")


def _head(names: Sequence[str], text: Sequence[int]) -> str:
    """One row of column headers; those at `text` stand over words."""
    cells = [
        f'<th scope="col" class="{"text" if place in text else "number"}">{name}</th>'
        for place, name in enumerate(names)
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _lowest(values: Sequence[float]) -> float | None:
    """The least of several values; None where there is nothing to compare."""
    known = [value for value in values if math.isfinite(value)]
    return min(known) if len(known) > 1 else None


def _domain_value(facts: GatingFacts, model: str, domain: str, best: float | None) -> str:
    return _shown(facts.value(model, domain), facts.error(model, domain), best)


def _shown(value: float, error: float, best: float | None) -> str:
    """One cell: a value, bold where it is the lowest, and its error under it."""
    if not math.isfinite(value):
        return DASH
    text = data(value, _four(value))
    if value == best:
        text = f'<strong class="best">{text}</strong><span class="unseen"> (lowest)</span>'
    if math.isfinite(error) and error > 0:
        text += f'<span class="sub">± {data(error, f"{error:.4f}")}</span>'
    return text


def _four(value: float) -> str:
    """Four decimals with a true minus sign, and no minus before a zero."""
    text = f"{value:.4f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def certificate_table(known: Certificate) -> str:
    """The certificate's figures, each with what it is and how it was found."""
    rows = []
    for key, (name, meaning) in _FIGURES.items():
        one: Figure | None = getattr(known, key)
        label = f'{name}<span class="sub">{meaning}</span>'
        if one is None:
            if key == "at_lam":
                continue
            rows.append([Cell(label, "text", header=True), *([Cell(DASH)] * 2), *([Cell(DASH, "text")] * 2)])
            continue
        rows.append(
            [
                Cell(label, "text", header=True),
                Cell("infinite" if one.value is None else data(number(one.value), _four(number(one.value)))),
                Cell(_interval(one.low, one.high)),
                Cell(f'<span class="label {escape(one.label)}">{escape(one.label)}</span>', "text"),
                Cell(escape(_capital(one.how)), "text"),
            ]
        )
    heads = ["Figure", "Value", "95 % interval", "What it is", "How it was found"]
    head = _head(heads, text=(0, 3, 4))
    caption = (
        f"Nats per {escape(known.unit)}{_windows(known.length)}; values are {_MEASURES.get(known.offsets, 'values')}. "
        "A bound always holds, on the side it names. An estimate comes from samples, or from an optimiser that may "
        "have stopped short. Exact is the truth about the enumerated problem, or about what is named beside it."
    )
    return table(caption, head, rows, kind="certificate")


def _interval(low: float | None, high: float | None) -> str:
    ends = [number(low), number(high)]
    if not any(math.isfinite(end) for end in ends):
        return DASH
    shown = [
        data(end, _four(end)) if math.isfinite(end) else infinite for end, infinite in zip(ends, "−+", strict=True)
    ]
    return " to ".join(f"{text}∞" if text in "−+" else text for text in shown)


def domains_table(facts: GatingFacts) -> str:
    """Cross-entropy, offset, value and weight of each domain: of the certificate, else of the fit."""
    known = facts.certificate
    if known is None:
        return _fitted_table(facts)
    lengths = any(math.isfinite(number(row.tokens)) for row in known.domains)
    weights = any(math.isfinite(number(row.lam)) for row in known.domains)
    most = max((row.value for row in known.domains if math.isfinite(row.value)), default=math.nan)
    rows = [_domain_cells(row, most, lengths, weights) for row in known.domains]
    heads = [
        "Domain",
        "Sequences",
        *(["Tokens per<br>sequence"] if lengths else []),
        "Cross-entropy",
        "Offset",
        "Value",
    ]
    heads += ["95 % interval", *(["λ"] if weights else [])]
    caption = (
        f"The certified gate, divided by Z; {facts.unit_and_windows}. Value is cross-entropy minus offset; "
        "the largest is bold."
    )
    caption += " λ: the domain's part of the worst mixture that the fit found." if weights else ""
    return table(caption, column_head(heads), rows, kind="dense gate")


def _domain_cells(row: DomainRow, most: float, lengths: bool, weights: bool) -> list[Cell]:
    value = data(row.value, _four(row.value))
    if row.value == most:
        value = f'<strong class="best">{value}</strong><span class="unseen"> (largest)</span>'
    cells = [Cell(escape(row.name), "text", header=True), Cell(_count(row.sequences))]
    cells += [Cell(data(number(row.tokens), f"{number(row.tokens):.1f}"))] if lengths else []
    cells += [Cell(data(one, _four(one))) for one in (row.cross_entropy, row.offset)]
    cells += [Cell(value), Cell(_interval(row.low, row.high))]
    return cells + ([Cell(_weight(number(row.lam)))] if weights else [])


def _count(value: Any) -> str:
    count = number(value)
    return data(count, f"{count:,.0f}".replace(",", " ")) if math.isfinite(count) else DASH


def _weight(value: float) -> str:
    return data(value, f"{value:.1%}")


def _fitted(facts: GatingFacts) -> Mapping[str, Any]:
    return mapping(facts.fit.get("domains")) if facts.fit else {}


def _fitted_table(facts: GatingFacts) -> str:
    rows = [
        [
            Cell(escape(name), "text", header=True),
            Cell(_count(mapping(row).get("sequences"))),
            Cell(_shown(number(mapping(row).get("value")), math.nan, None)),
            Cell(_weight(number(mapping(row).get("lam")))),
        ]
        for name, row in _fitted(facts).items()
    ]
    if not rows:
        return ""
    caption = (
        f"{_capital(facts.measure)} on the sequences of the fit, {facts.unit_and_windows}: not held out. "
        "λ: the domain's part of the worst mixture that the fit found."
    )
    return table(caption, column_head(["Domain", "Sequences", "Value", "λ"]), rows, kind="dense gate")


# -------------------------------------------------------------------------------------------------------------- charts


def fit_charts(facts: GatingFacts) -> str:
    """Worst case, opponent's gap and mixture over the steps of the fit; nothing where no history was kept."""
    history = [mapping(line) for line in (facts.fit or {}).get("history") or ()]
    history = [line for line in history if math.isfinite(number(line.get("step")))]
    if not history:
        return ""
    steps_N = np.array([number(line["step"]) for line in history])
    worst_N, gap_N = (np.array([number(line.get(key)) for line in history]) for key in ("worst", "gap"))
    panels = [
        Panel(f"Worst case, {facts.nats}", (Curve("worst case", steps_N, worst_N),), _four),
        Panel(f"Opponent's gap, {facts.nats}", (Curve("gap", steps_N, gap_N),), _four),
    ]
    chart = compared_curves(panels, run_lines(["worst case", "gap"]), x_label="steps of the fit", late=0.1, height=2.7)
    told = f"Over {len(history)} reports up to step {steps_N[-1]:.0f}: worst case from {_told(worst_N[0])} to "
    told += f"{_told(worst_N[-1])}, opponent's gap from {_told(gap_N[0])} to {_told(gap_N[-1])} {facts.nats}."
    if (facts.fit or {}).get("stopped_early"):
        told += " The fit stopped there, before its last step: the duality gap was within its tolerance."
    caption = (
        "On the sequences of the fit. The opponent's gap is the worst case minus the value at the present mixture: "
        "near 0 the mixture is the worst there is for this gate. What the gate itself could still gain is not in it."
    )
    text = _figure("worst", chart, caption, told)
    mixture = _mixture_chart(facts, history)
    return f"{text}\n{mixture}" if mixture else text


def _mixture_chart(facts: GatingFacts, history: Sequence[Mapping[str, Any]]) -> str:
    names = list(_fitted(facts)) or [row.name for row in (facts.certificate.domains if facts.certificate else ())]
    lam_ND = np.full((len(history), len(names)), math.nan)
    for place, line in enumerate(history):
        row = [number(value) for value in line.get("lam") or ()][: len(names)]
        lam_ND[place, : len(row)] = row
    if not np.isfinite(lam_ND).any():
        return ""
    steps_N = np.array([number(line["step"]) for line in history])
    means_D = np.nan_to_num(lam_ND).mean(axis=0)
    places = list(range(len(names)))
    if len(names) > NAMED_DOMAINS:
        places = sorted(sorted(places, key=lambda place: -means_D[place])[:NAMED_DOMAINS])
    curves = [Curve(names[place], steps_N, lam_ND[:, place]) for place in places]
    caption = "The mixture the opponent plays, one line per domain; a gate is fitted against the mixture of its step."
    rest = [place for place in range(len(names)) if place not in places]
    if rest:
        curves.append(Curve(OTHER, steps_N, lam_ND[:, rest].sum(axis=1)))
        caption += f" The {len(places)} domains of largest mean weight are named; the other {len(rest)} are added up."
    lines = domain_lines([curve.label for curve in curves])
    chart = small_multiples(
        [Panel("Mixture λ by domain", tuple(curves))],
        lines,
        y_label="weight",
        x_label="steps of the fit",
        columns=1,
        legend=list(lines),
        row_height=2.7,
    )
    last = sorted(zip(names, lam_ND[-1].tolist(), strict=True), key=lambda one: -np.nan_to_num(one[1]))[:3]
    told = ", ".join(f"{name} {weight:.1%}" for name, weight in last if math.isfinite(weight))
    return _figure("lambda", chart, caption, f"Mixture weights over the steps of the fit. Largest at the end: {told}.")


def _told(value: float) -> str:
    return _four(value) if math.isfinite(value) else "not recorded"


def _figure(key: str, chart: Chart, caption: str, description: str) -> str:
    return figure(inline_svg(to_svg(chart), f"fig-gating-{key}", description), escape(caption))
