"""What is known of a robust gate over a few domains: certificate, fit, and rows of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weftlm.gating.certificate import Certificate, DomainRow, Figure

ROBUST = {"code": 0.002, "prose": 0.004}
TABLE: dict[str, Mapping[str, float]] = {
    "uniform": {"code": 0.5, "prose": 0.3},
    "bayes": {"code": 0.011, "prose": 0.012},
    "robust": ROBUST,
    "student": {"code": 0.0061, "prose": -0.001},
    "student-top-1": {"code": 0.03, "prose": 0.02},
}
ROLES = {"uniform": "baseline", "bayes": "baseline", "robust": "gate"}


def row(values: Mapping[str, float], error: float = 0.0002, **more: Any) -> dict[str, Any]:
    worst = max(values, key=lambda name: values[name])
    domains = {name: {"value": value, "error": error, "cross_entropy": 2.0 + value} for name, value in values.items()}
    mean = sum(values.values()) / len(values)
    return {"worst": values[worst], "worst_domain": worst, "mean": mean, "domains": domains, **more}


def rows(table: Mapping[str, Mapping[str, float]] = TABLE, error: float = 0.0002) -> dict[str, dict[str, Any]]:
    return {name: row(values, error, role=ROLES.get(name, "student")) for name, values in table.items()}


def certificate(values: Mapping[str, float] = ROBUST) -> Certificate:
    worst = max(values, key=lambda name: values[name])
    return Certificate(
        unit="token",
        offsets="expert",
        causal=False,
        capacity=None,
        worst=Figure(values[worst], "estimate", "on these sequences", values[worst] - 0.001, values[worst] + 0.001),
        worst_domain=worst,
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
    history = [{"step": 500 * k, "worst": 0.3 / k, "lam": share, "gap": 0.1 / k} for k in range(1, reports + 1)]
    domains = {name: {"sequences": 3000, "value": 0.0033, "lam": share[0]} for name in names}
    return {"unit": "token", "worst": 0.0033, "gap": None, "domains": domains, "history": history}
