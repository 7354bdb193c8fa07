"""What every part of a report shares: the baseline, the colours, and which domains have a name of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weftlm.reporting.compare import Contender, baseline_of, contenders_of
from weftlm.reporting.figures import (
    OTHER,
    Line,
    domain_lines,
    run_lines,
)
from weftlm.reporting.runs import Run, Score

NAMED_DOMAINS = 9
"""Domains with a colour of their own; the rest of a larger set is shown together."""
OPEN_ROWS = 15
"""Rows up to which a table by domain is shown open."""


@dataclass(frozen=True)
class View:
    """The runs with what every part of the page shares.

    Attributes:
        runs: in the order given.
        contenders: what is compared: the runs, or the groups of runs that differ only in their seed.
        run_lines: colour and dash by run and by contender; repeated runs share theirs.
        domains: every domain any run mentions.
        named: the domains with a colour of their own.
        domain_lines: colour by named domain, and of the rest.
    """

    runs: tuple[Run, ...]
    contenders: tuple[Contender, ...]
    run_lines: dict[str, Line]
    domains: tuple[str, ...]
    named: tuple[str, ...]
    domain_lines: dict[str, Line]

    @property
    def scored_domains(self) -> list[str]:
        """The domains with held-out scores in any run."""
        return [name for name in self.domains if any(domain_score(run, name) is not None for run in self.runs)]

    @staticmethod
    def of(runs: Sequence[Run]) -> View:
        """Choose what is compared, colours and named domains for some runs."""
        contenders = contenders_of(runs)
        lines = run_lines(
            [one.label for one in contenders], baseline_of(contenders).label if len(contenders) > 1 else None
        )
        domains = list(dict.fromkeys(name for run in runs for name in run.domains))
        named = domains
        if len(domains) > NAMED_DOMAINS:
            importance = {name: max(_mean_weight(run, name) for run in runs) for name in domains}
            named = sorted(domains, key=lambda name: -importance[name])[:NAMED_DOMAINS]
        shown = [*named, OTHER] if len(named) < len(domains) else list(named)
        return View(
            tuple(runs),
            tuple(contenders),
            {run.label: lines[one.label] for one in contenders for run in one.runs} | lines,
            tuple(domains),
            tuple(named),
            domain_lines(shown),
        )


def _mean_weight(run: Run, domain: str) -> float:
    values_N = run.domain_series("weights", domain)[1]
    known_N = values_N[np.isfinite(values_N)]
    if len(known_N):
        return float(known_N.mean())
    weight = run.weights.get(domain, 0.0)
    return weight if math.isfinite(weight) else 0.0


def domain_score(run: Run, name: str) -> Score | None:
    """A domain's latest score, or None."""
    return run.final.domains.get(name) if run.final is not None else None
