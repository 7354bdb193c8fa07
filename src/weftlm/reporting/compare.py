"""What runs are compared with each other, their differences on the target and over the domains, and their colours."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from weftlm.errors import DataError
from weftlm.evaluation.result import mean_result, paired_difference
from weftlm.evaluation.suite import TARGET
from weftlm.progress import count_text
from weftlm.reporting.figures import NAMED, OTHER, Line, domain_lines, paint, run_lines
from weftlm.reporting.runs import GENERIC, Run, mapping, number
from weftlm.reporting.score import Score
from weftlm.reporting.score_table import ScoreRow, ScoreTable


@dataclass(frozen=True)
class Contender:
    """What is compared: one run, or the runs that differ in nothing but their seed.

    Attributes:
        label: The run's label, or the repeated runs' policy.
        runs: One or several.
        repeated: Whether the report compares repeated runs at all; then errors are over runs.
    """

    label: str
    runs: Sequence[Run]
    repeated: bool

    def score(self, name: str) -> Score:
        """The score of the target, a domain or `GENERIC`; of repeated runs their mean with its error over runs."""
        if not self.repeated:
            return self.runs[0].score(name)
        known = [run.score(name).value for run in self.runs if math.isfinite(run.score(name).value)]
        error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
        return Score(statistics.fmean(known), error) if known else Score()

    def latest(self, key: str, name: str) -> float:
        """A domain's final `weights` or `epochs`, the mean over the runs where it is known."""
        known = [one for run in self.runs if math.isfinite(one := run.latest(key).get(name, math.nan))]
        return statistics.fmean(known) if known else math.nan

    def gap(self, base: Contender, name: str) -> Score:
        """This minus the base, paired window by window where both kept their window losses."""
        apart = self.score(name).minus(base.score(name))
        ours, theirs = self.runs[0].windows, base.runs[0].windows
        if self.repeated or ours.keys() != theirs.keys():
            return apart
        try:
            names = [each for each in ours if each != TARGET] if name == GENERIC else [name]
            paired = mean_result({each: paired_difference(ours[each], theirs[each]) for each in names})
            return Score(apart.value, paired.bits_per_byte_se)
        except (KeyError, DataError):
            return apart


def contenders_of(runs: Sequence[Run]) -> list[Contender]:
    """Gather runs whose recipes differ only in `seed`, `run` and `prepared`; each run by itself where none repeats."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.recipe.items() if key not in ("seed", "run", "prepared")}
        key = json.dumps(settings, sort_keys=True, default=str) if settings else run.label
        groups.setdefault(key, []).append(run)
    repeated = len(groups) < len(runs)
    policies = [group[0].policy for group in groups.values()]

    def label(first: Run) -> str:
        return first.policy if repeated and first.policy and policies.count(first.policy) == 1 else first.label

    return [Contender(label(group[0]), group, repeated) for group in groups.values()]


def baseline_of(contenders: Sequence[Contender]) -> Contender:
    """What the others are compared with: the first of the uniform mixture, else the first."""
    return next((one for one in contenders if one.runs[0].policy == "uniform"), contenders[0])


def caveats(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before comparing these runs."""
    found = []
    if running := [run.label for run in runs if not run.finished]:
        found.append(f"Not finished: {', '.join(running)}; latest numbers shown.")
    tokens = [run.train_tokens for run in runs if math.isfinite(run.train_tokens)]
    if tokens and max(tokens) > 1.01 * min(tokens):
        found.append(
            f"The runs differ in training tokens ({count_text(min(tokens))} to {count_text(max(tokens))}): "
            "this is not a comparison at equal cost."
        )
    prints = {run.windows[TARGET].fingerprint for run in runs if TARGET in run.windows}
    if len(prints) > 1:
        found.append("The runs were evaluated on different target text: their numbers are not comparable.")
    return found


@dataclass(frozen=True)
class View:
    """The runs with what every part of the page shares.

    Attributes:
        runs: The runs in the order given.
        contenders: What is compared: the runs, or the groups of runs that differ only in their seed.
        run_lines: Colour and dash by contender.
        domains: Every domain any run mentions.
        named: The domains with a colour of their own.
        domain_lines: Colour by named domain, and of the rest.
    """

    runs: Sequence[Run]
    contenders: Sequence[Contender]
    run_lines: dict[str, Line]
    domains: Sequence[str]
    named: Sequence[str]
    domain_lines: dict[str, Line]

    @staticmethod
    def of(runs: Sequence[Run]) -> View:
        """Choose what is compared, colours and named domains for some runs."""
        contenders = contenders_of(runs)
        baseline = baseline_of(contenders).label if len(contenders) > 1 else None
        domains = list(dict.fromkeys(name for run in runs for name in run.domains))
        weights = {name: max(run.latest("weights").get(name, 0.0) for run in runs) for name in domains}
        heavy = sorted(domains, key=lambda name: -weights[name])[:NAMED]
        named = [name for name in domains if name in heavy]
        rest = [OTHER] if len(named) < len(domains) else []
        lines = run_lines([one.label for one in contenders], baseline)
        return View(runs, contenders, lines, domains, named, domain_lines([*named, *rest]))

    @property
    def by_contender(self) -> list[tuple[str, Run]]:
        """Every run with the label of its contender."""
        return [(one.label, run) for one in self.contenders for run in one.runs]


def run_table(view: View, *, singly: bool = False) -> ScoreTable:
    """Runs on the target and over the domains, with differences to the baseline; of repeated runs their means.

    `singly` shows every run by itself instead, without differences.
    """
    contenders = (
        [Contender(run.label, [run], repeated=False) for _, run in view.by_contender] if singly else view.contenders
    )
    base = None if singly or len(contenders) < 2 else baseline_of(contenders)
    lengths = {number(mapping(run.recipe.get("training")).get("sequence_length")) for run in view.runs}
    known = " and ".join(f"{one:.0f}" for one in sorted(filter(math.isfinite, lengths)))
    windows = f", in windows of {known} tokens" if known else ""
    known_target = any(math.isfinite(run.score(TARGET).value) for run in view.runs)
    columns = (TARGET, GENERIC) if known_target else (GENERIC,)
    sets = list(dict.fromkeys(name for run in view.runs for name in run.scored_domains))
    rows = {}
    for one in contenders:
        gaps = {} if base is None or one is base else {name: one.gap(base, name) for name in (*columns, *sets)}
        served = [run for run in one.runs if run.finished and (run.path / "model").is_dir()]
        best = sorted(served, key=lambda run: run.score(TARGET).value)[:1]
        rows[one.label] = ScoreRow(
            {name: one.score(name) for name in (*columns, *sets)},
            "baseline" if one is base else "",
            gaps,
            str(best[0].path) if best else "",
            _notes(one),
            paint(view.run_lines[one.label].colour) if one.label in view.run_lines else "",
        )
    kind = "mixture, means over runs that differ only in their seed" if contenders[0].repeated else "run"
    caption = f"Held-out bits per byte by {kind}{windows}, ± one standard error"
    label = None if base is None else base.label
    found = f"bits per byte{' on the target' if known_target else ', mean over domains'}"
    return ScoreTable(rows, columns, sets, caption, found, "run", label)


def _notes(one: Contender) -> list[str]:
    """Policy, runs that a mean is over, and how far a run has come."""
    policy, steps = one.runs[0].policy, one.runs[0].steps
    notes = [policy] if policy and policy != one.label else []
    notes += [f"{len(one.runs)} run{'s' if len(one.runs) > 1 else ''}"] if one.repeated else []
    if not one.runs[0].finished:
        notes.append(f"not finished, step {steps:.0f}" if math.isfinite(steps) else "not finished")
    return notes
