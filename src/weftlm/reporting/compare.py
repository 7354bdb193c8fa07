"""What runs are compared with each other, and their differences on the target and over the domains."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weftlm.errors import DataError
from weftlm.evaluation.result import mean_result, paired_window_difference
from weftlm.evaluation.suite import TARGET
from weftlm.progress import count_text
from weftlm.reporting.differences import decimals_for, difference_text, verdict
from weftlm.reporting.figures import OTHER, Line, domain_lines, run_lines
from weftlm.reporting.runs import Run, Score

NAMED_DOMAINS = 9
"""Domains with a colour of their own; the rest of a larger set is shown together."""
OPEN_ROWS = 15
"""Rows up to which a table by domain is shown open."""


@dataclass(frozen=True)
class Gap:
    """A contender's bits per byte minus the baseline's; negative is better.

    Attributes:
        value: the difference.
        error: its standard error; NaN where unknown.
        paired: whether it was taken window by window (else the two errors are added in quadrature, which is too wide).
    """

    value: float
    error: float
    paired: bool


@dataclass(frozen=True)
class Contender:
    """What is compared: one run, or the runs that differ in nothing but their seed.

    Attributes:
        label: the run's, or the repeated runs' policy.
        runs: one or several.
        target: the run's score, or the mean over runs with its standard error over runs (NaN for fewer than two).
        generic: likewise, of the mean over domains.
        repeated: whether the report compares repeated runs at all.
    """

    label: str
    runs: tuple[Run, ...]
    target: Score
    generic: Score
    repeated: bool

    def domain(self, name: str) -> Score:
        """A domain's score, likewise; NaN throughout where there is none."""
        scores = [run.final.domains.get(name, Score()) if run.final is not None else Score() for run in self.runs]
        return _mean_over_runs(scores) if self.repeated else scores[0]

    def weight(self, name: str) -> float:
        """A domain's final mixture weight, the mean over runs; NaN where unknown."""
        return _known_mean([run.weights.get(name, math.nan) for run in self.runs])

    def epochs(self, name: str) -> float:
        """Passes over a domain's training text, the mean over runs; NaN where unknown."""
        return _known_mean([run.epochs.get(name, math.nan) for run in self.runs])


def contenders_of(runs: Sequence[Run]) -> list[Contender]:
    """Gather runs whose recipes differ only in `seed`, `run` and `prepared`; each run by itself where none repeats."""
    by_recipe: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.recipe.items() if key not in ("seed", "run", "prepared")}
        key = json.dumps(settings, sort_keys=True, default=str) if settings else run.label
        by_recipe.setdefault(key, []).append(run)
    repeated = len(by_recipe) < len(runs)
    groups = list(by_recipe.values())
    policies = [group[0].policy for group in groups]
    found = []
    for group in groups:
        policy, label = group[0].policy, group[0].label
        targets, generics = [target_score(run) for run in group], [generic_score(run) for run in group]
        found.append(
            Contender(
                policy if repeated and policy and policies.count(policy) == 1 else label,
                tuple(group),
                _mean_over_runs(targets) if repeated else targets[0],
                _mean_over_runs(generics) if repeated else generics[0],
                repeated,
            )
        )
    return found


def _known_mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan


def _mean_over_runs(scores: Sequence[Score]) -> Score:
    bits = [score.bits_per_byte for score in scores if math.isfinite(score.bits_per_byte)]
    if not bits:
        return Score()
    error = statistics.stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    return Score(bits_per_byte=statistics.fmean(bits), bits_per_byte_se=error)


def baseline_of(contenders: Sequence[Contender]) -> Contender:
    """What the others are compared with: the first of the uniform mixture, else the first."""
    return next((one for one in contenders if one.runs[0].policy == "uniform"), contenders[0])


def target_score(run: Run) -> Score:
    """The target's latest score; NaN throughout where there is none."""
    return run.final.target if run.final is not None else Score()


def generic_score(run: Run) -> Score:
    """The mean over domains of the latest evaluation; NaN throughout where there is none."""
    return run.final.generic if run.final is not None else Score()


def target_gap(one: Contender, baseline: Contender) -> Gap | None:
    """A contender against the baseline on the target; None where a number is missing."""
    return _gap(one, baseline, one.target, baseline.target, [TARGET])


def generic_gap(one: Contender, baseline: Contender) -> Gap | None:
    """A contender against the baseline on the mean over domains; None where a number is missing."""
    names, others = (
        sorted(each.runs[0].final.domains) if each.runs[0].final is not None else [] for each in (one, baseline)
    )
    return _gap(one, baseline, one.generic, baseline.generic, names if names == others else [])


def _gap(one: Contender, baseline: Contender, score: Score, reference: Score, names: Sequence[str]) -> Gap | None:
    value = score.bits_per_byte - reference.bits_per_byte
    if one is baseline or not math.isfinite(value):
        return None
    if one.repeated:
        return Gap(value, math.hypot(score.bits_per_byte_se, reference.bits_per_byte_se), False)
    windows, others = one.runs[0].windows, baseline.runs[0].windows
    try:
        differences = {name: paired_window_difference(windows[name], others[name]) for name in names}
        return Gap(value, mean_result(differences).bits_per_byte_se, True)
    except (KeyError, DataError):
        return Gap(value, math.hypot(score.bits_per_byte_se, reference.bits_per_byte_se), False)


def headline(runs: Sequence[Run]) -> str:
    """The best compared run on the target, and its difference to the baseline.

    Repeated runs count through their mean, never through the luckiest of them.
    """
    scored = [run for run in runs if math.isfinite(target_score(run).bits_per_byte)]
    if not scored:
        return "No run has a result on the target yet."
    contenders = contenders_of(scored)
    baseline = baseline_of(contenders)
    others = [one for one in contenders if one is not baseline]
    best = min(others or [baseline], key=lambda one: one.target.bits_per_byte)
    error = best.target.bits_per_byte_se
    text = f"{best.label}: {best.target.bits_per_byte:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")
    text += " bits per byte on the target" + (f", mean over {len(best.runs)} runs" if best.repeated else "")
    gap = target_gap(best, baseline)
    if gap is None:
        tokens = math.nan if best.repeated else scored[0].train_tokens
        return text + (f" after {count_text(tokens)} training tokens." if math.isfinite(tokens) else ".")
    size = difference_text(gap.value, gap.error, decimals_for([gap.error]))
    share = f"{gap.value / baseline.target.bits_per_byte:+.1%}".replace("-", "−")
    return f"{text}, {size} ({share}) against {baseline.label}: {verdict(gap.value, gap.error)}."


def caveats(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before comparing these numbers."""
    scored = [run for run in runs if math.isfinite(target_score(run).bits_per_byte)]
    result = []
    running = [run.label for run in runs if not run.finished]
    if running:
        result.append(f"Not finished: {', '.join(running)}; latest numbers shown.")
    tokens = [run.train_tokens for run in scored if math.isfinite(run.train_tokens)]
    if tokens and max(tokens) > 1.01 * min(tokens):
        result.append(
            f"The runs differ in training tokens ({count_text(min(tokens))} to {count_text(max(tokens))}): "
            "this is not a comparison at equal cost."
        )
    contenders = contenders_of(scored) if scored else []
    gaps = [target_gap(one, baseline_of(contenders)) for one in contenders if not one.repeated]
    if any(gap is not None and not gap.paired for gap in gaps):
        result.append("Not every run kept its window losses: differences not paired by window have wide errors.")
    sizes = {target_score(run).tokens for run in scored if math.isfinite(target_score(run).tokens)}
    prints = {run.windows[TARGET].fingerprint for run in scored if TARGET in run.windows}
    if len(sizes) > 1 or len(prints) > 1:
        result.append("The runs were evaluated on different target text: their numbers are not comparable.")
    return result


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
