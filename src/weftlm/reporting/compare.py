"""What runs are compared with, their differences on the target and over the domains, and their colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weftlm.errors import DataError
from weftlm.evaluation.result import mean_result, paired_difference
from weftlm.evaluation.suite import TARGET
from weftlm.progress import count_text
from weftlm.reporting.figures import NAMED, OTHER, Line, domain_lines, paint, run_lines
from weftlm.reporting.runs import GENERIC, Record, Run, mapping, number
from weftlm.reporting.score import Score
from weftlm.reporting.score_table import ScoreRow, ScoreTable


def gap(run: Run, base: Run, name: str) -> Score:
    """A run's score minus the base's, paired window by window where both kept their window losses.

    Runs that differ only in their seed have a difference without an error: what another seed would change is not known.
    """
    apart = run.score(name).minus(base.score(name))
    if _apart_from_seed(run) == _apart_from_seed(base):
        return Score(apart.value)
    ours, theirs = run.windows, base.windows
    if ours.keys() != theirs.keys():
        return apart
    try:
        names = [each for each in ours if each != TARGET] if name == GENERIC else [name]
        paired = mean_result({each: paired_difference(ours[each], theirs[each]) for each in names})
        return Score(apart.value, paired.bits_per_byte_se)
    except (KeyError, DataError):
        return apart


def baseline_of(runs: Sequence[Run]) -> Run:
    """What the others are compared with: the first run of the uniform mixture, else the first."""
    return next((run for run in runs if run.policy == "uniform"), runs[0])


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
    settings = [_apart_from_seed(run) for run in runs]
    if twins := [run.label for run, each in zip(runs, settings, strict=True) if settings.count(each) > 1]:
        found.append(
            f"{', '.join(twins)}: the same settings with other seeds. Errors are over documents and do not hold what "
            "another seed changes; the better of two seeds is not the better setting."
        )
    return found


def _apart_from_seed(run: Run) -> Record:
    return {key: value for key, value in run.recipe.items() if key not in ("run", "seed")} or {"run": run.label}


@dataclass(frozen=True)
class View:
    """The runs with what every part of the page shares.

    Attributes:
        runs: The runs in the order given.
        run_lines: Colour and dash by run.
        domains: Every domain any run mentions.
        named: The domains with a colour of their own.
        domain_lines: Colour by named domain, and of the rest.
    """

    runs: Sequence[Run]
    run_lines: dict[str, Line]
    domains: Sequence[str]
    named: Sequence[str]
    domain_lines: dict[str, Line]

    @staticmethod
    def of(runs: Sequence[Run]) -> View:
        """Choose colours and named domains for some runs."""
        baseline = baseline_of(runs).label if len(runs) > 1 else None
        domains = list(dict.fromkeys(name for run in runs for name in run.domains))
        weights = {name: max(run.latest("weights").get(name, 0.0) for run in runs) for name in domains}
        heavy = sorted(domains, key=lambda name: -weights[name])[:NAMED]
        named = [name for name in domains if name in heavy]
        rest = [OTHER] if len(named) < len(domains) else []
        lines = run_lines([run.label for run in runs], baseline)
        return View(runs, lines, domains, named, domain_lines([*named, *rest]))


def run_table(view: View) -> ScoreTable:
    """Runs on the target and over the domains, with differences to the baseline."""
    base = baseline_of(view.runs) if len(view.runs) > 1 else None
    lengths = {number(mapping(run.recipe.get("training")).get("sequence_length")) for run in view.runs}
    known = " and ".join(f"{one:.0f}" for one in sorted(filter(math.isfinite, lengths)))
    windows = f", in windows of {known} tokens" if known else ""
    known_target = any(math.isfinite(run.score(TARGET).value) for run in view.runs)
    columns = (TARGET, GENERIC) if known_target else (GENERIC,)
    sets = list(dict.fromkeys(name for run in view.runs for name in run.scored_domains))
    rows = {
        run.label: ScoreRow(
            {name: run.score(name) for name in (*columns, *sets)},
            "baseline" if run is base else "",
            {} if base is None or run is base else {name: gap(run, base, name) for name in (*columns, *sets)},
            str(run.path) if run.finished and (run.path / "model").is_dir() else "",
            _notes(run),
            paint(view.run_lines[run.label].colour),
        )
        for run in view.runs
    }
    caption = f"Held-out bits per byte by run{windows}, ± one standard error"
    found = f"bits per byte{' on the target' if known_target else ', mean over domains'}"
    return ScoreTable(rows, columns, sets, caption, found, "run", None if base is None else base.label)


def _notes(run: Run) -> list[str]:
    """Policy, and how far a run has come."""
    notes = [run.policy] if run.policy and run.policy != run.label else []
    if not run.finished:
        notes.append(f"not finished, step {run.steps:.0f}" if math.isfinite(run.steps) else "not finished")
    return notes
