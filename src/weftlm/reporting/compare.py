"""What a set of runs shows: who is ahead on the target, by how much, at what cost elsewhere."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from weftlm.errors import DataError
from weftlm.evaluation.result import mean_result, paired_window_difference
from weftlm.evaluation.suite import TARGET
from weftlm.progress import count_text
from weftlm.reporting.runs import Evaluation, Run, Score

CLEAR = 2.0
"""Standard errors from which a difference is called clear."""


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

    @property
    def clear(self) -> bool:
        """Whether the difference exceeds `CLEAR` standard errors."""
        return abs(self.value) > CLEAR * self.error


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
    if len(by_recipe) == len(runs):
        return [Contender(run.label, (run,), target_score(run), generic_score(run), False) for run in runs]
    groups = list(by_recipe.values())
    policies = [group[0].policy for group in groups]
    labels = [
        policy if policy and policies.count(policy) == 1 else group[0].label
        for policy, group in zip(policies, groups, strict=True)
    ]
    return [
        Contender(
            label,
            tuple(group),
            _mean_over_runs([target_score(run) for run in group]),
            _mean_over_runs([generic_score(run) for run in group]),
            True,
        )
        for label, group in zip(labels, groups, strict=True)
    ]


def _known_mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan


def _mean_over_runs(scores: Sequence[Score]) -> Score:
    bits = [score.bits_per_byte for score in scores if math.isfinite(score.bits_per_byte)]
    if not bits:
        return Score()
    error = statistics.stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    return Score(bits_per_byte=statistics.fmean(bits), bits_per_byte_se=error)


Compared = TypeVar("Compared", Run, Contender)


def baseline_of(compared: Sequence[Compared]) -> Compared:
    """What the others are compared with: the first of the uniform mixture, else the first."""
    return next((one for one in compared if _policy(one) == "uniform"), compared[0])


def _policy(one: Run | Contender) -> str:
    return one.policy if isinstance(one, Run) else one.runs[0].policy


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
    names = _domain_names(one.runs[0].final)
    if names != _domain_names(baseline.runs[0].final):
        names = []
    return _gap(one, baseline, one.generic, baseline.generic, names)


def _domain_names(evaluation: Evaluation | None) -> list[str]:
    return sorted(evaluation.domains) if evaluation is not None else []


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


@dataclass(frozen=True)
class Finding:
    """The page's first sentences.

    Attributes:
        headline: the result in one sentence.
        details: sentences that qualify it.
    """

    headline: str
    details: tuple[str, ...]


def finding(runs: Sequence[Run]) -> Finding:
    """Say what the runs show about the target, as it is: ahead, behind, or not told apart.

    Repeated runs speak through their mean, never through the luckiest of them.
    """
    scored = [run for run in runs if math.isfinite(target_score(run).bits_per_byte)]
    if not scored:
        return Finding("No run has a result on the target yet.", tuple(_caveats(runs, [])))
    contenders = contenders_of(scored)
    if len(contenders) == 1:
        return Finding(_alone(contenders[0]), tuple(_caveats(runs, scored)))
    baseline = baseline_of(contenders)
    best = min((one for one in contenders if one is not baseline), key=_bits)
    gap = target_gap(best, baseline)
    assert gap is not None, "both have a target score"
    percent = abs(gap.value) / _bits(baseline)
    size = difference_text(abs(gap.value), gap.error, decimals_for([gap.error]), sign=False)
    if gap.value < 0 and gap.clear:
        headline = (
            f"{best.label} predicts the target best: {_bits(best):.3f} bits per byte, "
            f"{size} ({percent:.1%}) below {baseline.label}."
        )
    elif gap.clear:
        headline = (
            f"No mixture is ahead of {baseline.label} on the target: it reaches {_bits(baseline):.3f} bits per byte, "
            f"and the nearest, {best.label}, is {size} ({percent:.1%}) behind."
        )
    else:
        lead = "ahead" if gap.value < 0 else "behind"
        why = "within the uncertainty of " + ("the repeated runs" if best.repeated else "the held-out text")
        why = "by how much is not certain" if math.isnan(gap.error) else why
        headline = (
            f"{best.label} and {baseline.label} are not told apart on the target: {_bits(best):.3f} against "
            f"{_bits(baseline):.3f} bits per byte, {size} {lead}, {why}."
        )
    details = []
    generic = generic_gap(best, baseline)
    if generic is not None:
        decimals = decimals_for([generic.error])
        size = difference_text(abs(generic.value), generic.error, decimals, sign=False)
        if not generic.clear:
            details.append(
                f"On the generic domains the two do not differ clearly "
                f"({difference_text(generic.value, generic.error, decimals)} bits per byte)."
            )
        elif generic.value > 0:
            details.append(f"On the generic domains {best.label} is {size} bits per byte worse than {baseline.label}.")
        else:
            details.append(f"On the generic domains {best.label} is also {size} bits per byte better.")
    details.append(_meaning_of_error(gap, contenders))
    return Finding(headline, tuple(details + _caveats(runs, scored)))


def _alone(one: Contender) -> str:
    """The headline where there is nothing to compare with."""
    headline = f"{one.label} predicts the target at {_with_error(one.target)} bits per byte"
    if one.repeated:
        return f"{headline}, the mean over {len(one.runs)} runs."
    run = one.runs[0]
    if math.isfinite(run.train_tokens):
        headline += f" after {count_text(run.train_tokens)} training tokens"
    start = next((e.target for e in run.evaluations if math.isfinite(e.target.bits_per_byte)), Score())
    if math.isfinite(start.bits_per_byte) and start.bits_per_byte != _bits(one):
        headline += f", from {start.bits_per_byte:.3f} at the start"
    return headline + "."


def _meaning_of_error(gap: Gap, contenders: Sequence[Contender]) -> str:
    if contenders[0].repeated:
        counts = ", ".join(f"{one.label} {len(one.runs)}" for one in contenders)
        return (
            f"Values are means over runs that differ only in their seed ({counts}); ± is one standard error over runs."
        )
    how = ", of the paired difference" if gap.paired else "; the runs were not compared window by window"
    return (
        f"± is one standard error over windows of held-out text{how}. "
        "Each run is one seed: the spread over seeds is not in it."
    )


def _caveats(runs: Sequence[Run], scored: Sequence[Run]) -> list[str]:
    """What a reader must know before comparing these numbers."""
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
    sizes = {target_score(run).tokens for run in scored if math.isfinite(target_score(run).tokens)}
    prints = {run.windows[TARGET].fingerprint for run in scored if TARGET in run.windows}
    if len(sizes) > 1 or len(prints) > 1:
        result.append("The runs were evaluated on different target text: their numbers are not comparable.")
    return result


def _bits(one: Contender) -> float:
    return one.target.bits_per_byte


def _with_error(score: Score) -> str:
    error = "" if math.isnan(score.bits_per_byte_se) else f" ± {score.bits_per_byte_se:.3f}"
    return f"{score.bits_per_byte:.3f}{error}"


def decimals_for(errors: Iterable[float]) -> int:
    """Decimals that show the smallest of some errors as more than zero: 3, or 4 where one is below 0.0005."""
    return 4 if any(0.0 < error < 0.0005 for error in errors) else 3


def difference_text(value: float, error: float, decimals: int = 3, *, sign: bool = True) -> str:
    """`−0.043 ± 0.003`, with a true minus sign; without a known error the value alone."""
    text = f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"
    return text.replace("-", "−") + ("" if math.isnan(error) else f" ± {error:.{decimals}f}")
