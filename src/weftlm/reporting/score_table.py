"""Several models as tables: held-out bits per byte with differences to the base, and accuracy on tasks."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from weftlm.evaluation.suite import TARGET
from weftlm.reporting.compare import decimals_for, difference_text
from weftlm.reporting.html import DASH, Cell, column_head, data, details, escape, table

BASE, ORACLE = "base", "oracle"
"""Rows with a meaning of their own: what differences are taken to, and a bound that no method can claim."""
ANSWER_ROWS = 6
"""Rows of the first screen's table."""
NORMAL_95 = 1.96
COLUMN_SETS = 7
"""Sets with a column of their own; of more, the sets become the rows of a second table."""


@dataclass(frozen=True)
class ScoreTable:
    """Bits per byte by row and set, and the share of right answers by row and task.

    Attributes:
        rows: by label; the base and `oracle` are rows like the others. None: not known (a tokenizer that loses text).
        what: a row is, in one word.
        base: label of the row that differences are taken to, where there is one.
        accuracy: by label and task, of those rows that were asked.
        chance: accuracy of guessing, by task.
        gaps: difference to the base and its standard error, paired by window, by label and set; of None over all sets.
        paths: what `weftlm serve` takes to serve a row.
        window: tokens of the windows that were scored.
    """

    rows: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    what: str = "router"
    base: str = BASE
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)
    gaps: Mapping[str, Mapping[str | None, tuple[float, float]]] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)
    window: int | None = None

    @property
    def sets(self) -> list[str]:
        """Every set any row was scored on, in order."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))

    def mean(self, label: str) -> float:
        """A row's mean over all sets, each counting once; NaN where one is missing, for it would not compare."""
        values = [self.value(label, name) for name in self.sets]
        return math.fsum(values) / len(values) if values else math.nan

    def value(self, label: str, name: str) -> float:
        """A row's value on one set; NaN where it is missing or not known."""
        found = self.rows[label].get(name)
        return math.nan if found is None else found

    def gap(self, label: str, name: str | None) -> tuple[float, float]:
        """A row minus the base on a set, or in the mean, with its standard error; NaN where it is not known."""
        known = self.gaps.get(label, {}).get(name)
        if known is not None:
            return known
        if self.base not in self.rows or label == self.base:
            return math.nan, math.nan
        return _score(self, label, name) - _score(self, self.base, name), math.nan

    def best(self, name: str | None = None) -> str | None:
        """The row with the lowest value on a set, or in the mean; None where nothing was measured."""
        known = {label: _score(self, label, name) for label in self.rows if not _bound(label)}
        known = {label: value for label, value in known.items() if math.isfinite(value)}
        return min(known, key=known.__getitem__) if known else None


def score_table(facts: ScoreTable) -> str:
    """Bits per byte by row, mean and sets, with differences to the base; then accuracy by task, where any was asked.

    The best row of a column is bold.
    """
    sets = facts.sets
    wide = len(sets) > COLUMN_SETS
    columns = [] if wide else sets
    rows = []
    for label in facts.rows:
        cells = [Cell(_value(facts, label, None))] if len(sets) > 1 else []
        cells += [Cell(_value(facts, label, name)) for name in columns]
        rows.append([Cell(escape(label), "text", header=True), *cells])
    heads = [
        escape(facts.what.capitalize()),
        *(["Mean over<br>sets"] if len(sets) > 1 else []),
        *(escape(name) for name in columns),
    ]
    text = table(_caption(facts), column_head(heads), rows, kind="routers")
    if wide:
        rows = [
            [Cell(escape(name), "text", header=True), *(Cell(_value(facts, label, name)) for label in facts.rows)]
            for name in sets
        ]
        head = column_head(["Set", *(escape(label) for label in facts.rows)])
        caption = "Held-out bits per byte by set, as above."
        text += details(f"All {len(sets)} sets", table(caption, head, rows, kind="dense routers"))
    return text + ("\n" + _accuracy_table(facts) if facts.accuracy else "")


def _accuracy_table(facts: ScoreTable) -> str:
    """The share of right answers by row: the mean over the tasks and, of few tasks, each; all of many folded away."""
    tasks = list(dict.fromkeys(name for row in facts.accuracy.values() for name in row))
    wide = len(tasks) > COLUMN_SETS
    columns: list[str | None] = [*([None] if len(tasks) > 1 else []), *([] if wide else tasks)]
    shares = {**facts.accuracy, **({"chance": facts.chance} if facts.chance else {})}

    def cell(label: str, task: str | None) -> Cell:
        value = _share(shares[label], task, tasks)
        if not math.isfinite(value):
            return Cell(DASH)
        text = data(value, f"{value:.1%}")
        known = [_share(row, task, tasks) for name, row in facts.accuracy.items() if not _bound(name)]
        if label in facts.accuracy and not _bound(label) and len(known) > 1 and value == max(known):
            text = f'<strong class="best">{text}</strong><span class="unseen"> (highest)</span>'
        return Cell(text)

    rows = [[Cell(escape(label), "text", header=True), *(cell(label, task) for task in columns)] for label in shares]
    heads = ["Mean over<br>tasks" if task is None else escape(task) for task in columns]
    caption = f"Share of right answers by {escape(facts.what)}; higher is better. The highest of a column is bold."
    text = table(caption, column_head([escape(facts.what.capitalize()), *heads]), rows, kind="routers")
    if wide:
        rows = [[Cell(escape(task), "text", header=True), *(cell(label, task) for label in shares)] for task in tasks]
        head = column_head(["Task", *(escape(label) for label in shares)])
        inside = table("Share of right answers by task, as above.", head, rows, kind="dense routers")
        text += details(f"All {len(tasks)} tasks", inside)
    return text


def _share(row: Mapping[str, float], task: str | None, tasks: list[str]) -> float:
    """A row's accuracy on a task, or its mean over all of them; NaN where one is missing."""
    values = [row.get(name, math.nan) for name in (tasks if task is None else [task])]
    return math.fsum(values) / len(values)


def best_of(facts: ScoreTable | None) -> str:
    """In a sentence: which row has the lowest mean over the sets, and by how much."""
    best = None if facts is None else facts.best()
    if facts is None or best is None:
        return "Nothing was measured on held-out text."
    sentence = f"{best} predicts held-out text best: {facts.mean(best):.3f} bits per byte, mean over the sets"
    gap, error = facts.gap(best, None)
    if math.isfinite(gap):
        size = difference_text(abs(gap), error, decimals_for([error]), sign=False)
        sentence += f", {size} {'below' if gap <= 0 else 'above'} {facts.base}"
    return sentence + "."


def answer(facts: ScoreTable) -> str:
    """What to serve, with its command, and what helped: every row's difference to the base, the best first."""
    best = facts.best()
    if best is None:
        return ""
    text = _serve(facts, best, "Serve the best model over all sets")
    on_target = facts.best(TARGET)
    if on_target not in (None, best):
        assert on_target is not None
        text += _serve(facts, on_target, "For text like the target alone")
    gaps = {label: facts.gap(label, None) for label in facts.rows if label != facts.base and not _bound(label)}
    known = sorted((gap, label) for label, (gap, _) in gaps.items() if math.isfinite(gap))
    if known:
        rows = [[Cell(escape(label), "text", header=True), *_gap_cells(gap, gaps[label][1])] for gap, label in known]
        caption = (
            f"What helped: bits per byte against {escape(facts.base)}, mean over the sets, ± one standard error of the "
            "paired difference; negative is better."
        )
        heads = [escape(facts.what.capitalize()), "Difference", "95 % interval"]
        shown, more = rows[:ANSWER_ROWS], len(rows) - ANSWER_ROWS
        text += table(caption, column_head(heads), shown, kind="dense")
        text += f'<p class="error">{more} more under Every model.</p>' if more > 0 else ""
    return f'<div class="answer">\n{text}\n</div>'


def serve_command(path: str) -> str:
    """The command that serves a model, as HTML."""
    return f"<pre>{escape(f'weftlm serve {shlex.quote(path)}')}</pre>"


def _serve(facts: ScoreTable, label: str, why: str) -> str:
    if label not in facts.paths:
        return ""
    return f"<p>{why}, <strong>{escape(label)}</strong>:</p>\n{serve_command(facts.paths[label])}\n"


def _gap_cells(gap: float, error: float) -> list[Cell]:
    """Difference with its verdict, and interval, of one row."""
    decimals = decimals_for([error])
    size = data(gap, difference_text(gap, error, decimals))
    if not math.isfinite(error):
        return [Cell(f'{size}<span class="sub">no error known</span>'), Cell(DASH)]
    low, high = gap - NORMAL_95 * error, gap + NORMAL_95 * error
    ends = f"{difference_text(low, math.nan, decimals)} to {difference_text(high, math.nan, decimals)}"
    verdict = "better" if high < 0 else "worse" if low > 0 else "not significant"
    return [Cell(f'{size}<span class="sub">{verdict}</span>'), Cell(ends)]


def _caption(facts: ScoreTable) -> str:
    window = "" if facts.window is None else f", in windows of {facts.window} tokens"
    caption = f"Held-out bits per byte by {escape(facts.what)}{window}; lower is better."
    if facts.base in facts.rows and len(facts.rows) > 1:
        named = "the base" if facts.base == BASE else f"{escape(facts.base)}, which the experts are over"
        caption += f" Under each value its difference to {named}."
    caption += " The lowest value of a column is bold"
    if _is_bound(facts):
        caption += ", the oracle aside: it picks each set's best expert by the very text it is scored on"
    return caption + "."


def _is_bound(facts: ScoreTable) -> bool:
    return any(_bound(label) for label in facts.rows)


def _bound(label: str) -> bool:
    return label.split(" ", maxsplit=1)[0].lower() == ORACLE


def _score(facts: ScoreTable, label: str, name: str | None) -> float:
    return facts.mean(label) if name is None else facts.value(label, name)


def _value(facts: ScoreTable, label: str, name: str | None) -> str:
    """One cell: value, bold where it is the lowest of the methods, and the difference to the base."""
    value = _score(facts, label, name)
    if not math.isfinite(value):
        return DASH
    methods = [_score(facts, other, name) for other in facts.rows if not _bound(other)]
    known = [other for other in methods if math.isfinite(other)]
    text = data(value, f"{value:.3f}")
    if len(known) > 1 and not _bound(label) and value == min(known):
        text = f'<strong class="best">{text}</strong><span class="unseen"> (lowest)</span>'
    gap, error = facts.gap(label, name)
    if math.isfinite(gap):
        text += f'<span class="sub">{data(gap, difference_text(gap, error, decimals_for([error])))}</span>'
    return text
