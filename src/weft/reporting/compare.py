"""What a set of runs shows: who is ahead on the target, by how much, at what cost elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weft.errors import DataError
from weft.evaluation.result import mean_difference, paired_window_difference
from weft.evaluation.suite import TARGET
from weft.progress import count_text
from weft.reporting.runs import Evaluation, Run, Score

CLEAR = 2.0
"""Standard errors from which a difference is called clear."""


@dataclass(frozen=True)
class Gap:
    """A run's bits per byte minus the baseline's; negative is better.

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


def baseline_of(runs: Sequence[Run]) -> Run:
    """The run the others are compared with: the first of the uniform mixture, else the first."""
    return next((run for run in runs if run.policy == "uniform"), runs[0])


def target_score(run: Run) -> Score:
    """The target's latest score; NaN throughout where there is none."""
    return run.final.target if run.final is not None else Score()


def generic_score(run: Run) -> Score:
    """The mean over domains of the latest evaluation; NaN throughout where there is none."""
    return run.final.generic if run.final is not None else Score()


def target_gap(run: Run, baseline: Run) -> Gap | None:
    """A run against the baseline on the target; None where a number is missing."""
    return _gap(run, baseline, target_score(run), target_score(baseline), [TARGET])


def generic_gap(run: Run, baseline: Run) -> Gap | None:
    """A run against the baseline on the mean over domains; None where a number is missing."""
    names = _domain_names(run.final)
    if names != _domain_names(baseline.final):
        names = []
    return _gap(run, baseline, generic_score(run), generic_score(baseline), names)


def _domain_names(evaluation: Evaluation | None) -> list[str]:
    return sorted(evaluation.domains) if evaluation is not None else []


def _gap(run: Run, baseline: Run, score: Score, reference: Score, names: Sequence[str]) -> Gap | None:
    value = score.bits_per_byte - reference.bits_per_byte
    if run is baseline or not math.isfinite(value):
        return None
    try:
        differences = {name: paired_window_difference(run.windows[name], baseline.windows[name]) for name in names}
        return Gap(value, mean_difference(differences).bits_per_byte_se, True)
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
    """Say what the runs show about the target, as it is: ahead, behind, or not told apart."""
    scored = [run for run in runs if math.isfinite(target_score(run).bits_per_byte)]
    if not scored:
        return Finding("No run has a result on the target yet.", tuple(_caveats(runs, [])))
    if len(scored) == 1:
        run = scored[0]
        start = next((e.target for e in run.evaluations if math.isfinite(e.target.bits_per_byte)), Score())
        fall = f", from {start.bits_per_byte:.3f} at the start" if start.bits_per_byte != _bits(run) else ""
        headline = f"{run.label} predicts the target at {_with_error(target_score(run))} bits per byte"
        after = f" after {count_text(run.train_tokens)} training tokens" if math.isfinite(run.train_tokens) else ""
        return Finding(headline + after + (fall if math.isfinite(start.bits_per_byte) else "") + ".",
                       tuple(_caveats(runs, scored)))  # fmt: skip
    baseline = baseline_of(scored)
    others = [run for run in scored if run is not baseline]
    best = min(others, key=_bits)
    gap = target_gap(best, baseline)
    assert gap is not None, "both runs have a target score"
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
        why = "by how much is not certain" if math.isnan(gap.error) else "within the uncertainty of the held-out text"
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
    details.append(
        "± is one standard error over windows of held-out text"
        + (", of the paired difference" if gap.paired else "; the runs were not compared window by window")
        + ". Each run is one seed: the spread over seeds is not in it."
    )
    return Finding(headline, tuple(details + _caveats(runs, scored)))


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


def _bits(run: Run) -> float:
    return target_score(run).bits_per_byte


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
