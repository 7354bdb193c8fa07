"""Several models as tables: held-out bits per byte with differences to the base, and accuracy on tasks."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from weftlm.evaluation.suite import TARGET
from weftlm.reporting.differences import decimals_for, difference_cells, difference_text, lowest, verdict
from weftlm.reporting.page import Block, Box, Cell, Command, Number, Table, Text, exact

Role = Literal["base", "baseline", "expert", "router", "gate", "student", "bound"]
"""What a row is: `base` is what differences are taken to; `bound` looks at what it is scored on, so it never wins."""
ANSWER_ROWS = 6
"""Rows of the first screen's table."""
COLUMN_SETS = 7
"""Sets with a column of their own; of more, the sets become the rows of a second table."""
Gap = tuple[float, float]


@dataclass(frozen=True)
class ScoreRow:
    """A model.

    Attributes:
        sets: bits per byte by set; None where it is not known (a tokenizer that loses text).
        role: what it is.
        accuracy: share of right answers by task, where any was asked.
        gaps: difference to the base and its standard error, paired by window, by set; of None over all sets.
        path: what `weftlm serve` takes to serve it.
    """

    sets: Mapping[str, float | None]
    role: Role
    accuracy: Mapping[str, float] = field(default_factory=dict)
    gaps: Mapping[str | None, Gap] = field(default_factory=dict)
    path: str = ""

    def value(self, name: str) -> float:
        """Bits per byte on a set; NaN where it is missing or not known."""
        found = self.sets.get(name)
        return math.nan if found is None else found


@dataclass(frozen=True)
class ScoreTable:
    """Rows by label.

    Attributes:
        rows: the models.
        what: a row is, in one word.
        chance: accuracy of guessing, by task.
        window: tokens of the windows that were scored.
    """

    rows: Mapping[str, ScoreRow]
    what: str = "router"
    chance: Mapping[str, float] = field(default_factory=dict)
    window: int | None = None

    @property
    def base(self) -> str | None:
        """Label of the row that differences are taken to."""
        return next((label for label, row in self.rows.items() if row.role == "base"), None)

    @property
    def sets(self) -> list[str]:
        """Every set any row was scored on, in order."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row.sets))

    def score(self, label: str, name: str | None) -> float:
        """A row's value on a set; of None the mean over all sets, each counting once. NaN where one is missing."""
        values = [self.rows[label].value(each) for each in (self.sets if name is None else [name])]
        return math.fsum(values) / len(values) if values else math.nan

    def gap(self, label: str, name: str | None) -> Gap:
        """A row minus the base on a set, or in the mean, with its standard error; NaN where it is not known."""
        known = self.rows[label].gaps.get(name)
        if known is not None:
            return known
        if self.base in (None, label):
            return math.nan, math.nan
        return self.score(label, name) - self.score(str(self.base), name), math.nan

    def best(self, name: str | None = None) -> str | None:
        """The row with the lowest value on a set, or in the mean; None where nothing was measured."""
        known = {label: self.score(label, name) for label, row in self.rows.items() if row.role != "bound"}
        known = {label: value for label, value in known.items() if math.isfinite(value)}
        return min(known, key=known.__getitem__) if known else None


def score_tables(facts: ScoreTable) -> list[Block]:
    """Bits per byte by row, mean and sets, with differences to the base; then accuracy by task, where any was asked.

    The best row of a column is bold.
    """
    labels = [label for label, row in facts.rows.items() if row.sets]

    def cells(name: str | None) -> list[Cell]:
        values = [facts.score(label, name) for label in labels]
        least = lowest(v for label, v in zip(labels, values, strict=True) if facts.rows[label].role != "bound")
        return [_score_cell(facts, label, name, least) for label in labels]

    window = "" if facts.window is None else f", in windows of {facts.window} tokens"
    caption = f"Held-out bits per byte by {facts.what}{window}; lower is better."
    if facts.base is not None and len(labels) > 1:
        caption += f" Under each value its difference to {facts.base}."
    caption += " The lowest value of a column is bold"
    bound = any(row.role == "bound" for row in facts.rows.values())
    caption += ", the bound aside: it is chosen by the very text it is scored on." if bound else "."
    text: list[Block] = _tables(facts, labels, facts.sets, "sets", cells, caption)
    tasks = list(dict.fromkeys(task for row in facts.rows.values() for task in row.accuracy))
    return text + (_accuracy_tables(facts, tasks) if tasks else [])


def _score_cell(facts: ScoreTable, label: str, name: str | None, least: float | None) -> Cell:
    value, (gap, error) = facts.score(label, name), facts.gap(label, name)
    if not math.isfinite(value):
        return Cell()
    sub = Number(gap, difference_text(gap, error, decimals_for([error]))) if math.isfinite(gap) else None
    best = "lowest" if value == least and facts.rows[label].role != "bound" else ""
    return Cell(Number(value, f"{value:.3f}"), sub=sub, best=best)


def _accuracy_tables(facts: ScoreTable, tasks: list[str]) -> list[Block]:
    """The share of right answers by row: the mean over the tasks and, of few tasks, each; all of many folded away."""
    shares = {label: row.accuracy for label, row in facts.rows.items() if row.accuracy}
    shares |= {"chance": facts.chance} if facts.chance else {}
    compared = [label for label in shares if label in facts.rows and facts.rows[label].role != "bound"]

    def cells(task: str | None) -> list[Cell]:
        def share(label: str) -> float:
            values = [shares[label].get(each, math.nan) for each in (tasks if task is None else [task])]
            return math.fsum(values) / len(values)

        least = lowest(-share(label) for label in compared)
        return [
            Cell(exact(share(label), f"{share(label):.1%}"),
                 best="highest" if label in compared and -share(label) == least else "")
            for label in shares
        ]  # fmt: skip

    caption = f"Share of right answers by {facts.what}; higher is better. The highest of a column is bold."
    return _tables(facts, list(shares), tasks, "tasks", cells, caption)


def _tables(
    facts: ScoreTable,
    labels: Sequence[str],
    names: Sequence[str],
    plural: str,
    cells: Callable[[str | None], list[Cell]],
    caption: str,
) -> list[Block]:
    """One row per label; the mean over several names, and each of few; of many names a second, folded table."""
    wide = len(names) > COLUMN_SETS
    columns: list[str | None] = [*([None] if len(names) > 1 else []), *([] if wide else names)]
    held = [cells(name) for name in columns]
    rows = [[_label(facts, label), *(column[place] for column in held)] for place, label in enumerate(labels)]
    heads = [("Mean over", plural) if name is None else name for name in columns]
    tables: list[Block] = [Table(caption, [facts.what.capitalize(), *heads], rows, "routers")]
    if wide:
        by_name = [[Cell(name), *cells(name)] for name in names]
        fold = f"All {len(names)} {plural}"
        heads = [plural.capitalize().removesuffix("s"), *labels]
        tables.append(Table("The same values, one by one.", heads, by_name, "dense routers", fold=fold))
    return tables


def _label(facts: ScoreTable, label: str) -> Cell:
    role = facts.rows[label].role if label in facts.rows else None
    return Cell(label, sub=None if role in (None, label) else role)


def headline(facts: ScoreTable) -> str:
    """The row with the lowest mean over the sets, and its difference to the base."""
    best = facts.best()
    if best is None:
        return "Nothing was measured on held-out text."
    text = f"{best}: {facts.score(best, None):.3f} bits per byte of held-out text, mean over the sets"
    gap, error = facts.gap(best, None)
    if math.isfinite(gap):
        text += f", {difference_text(gap, error, decimals_for([error]))} against {facts.base}: {verdict(gap, error)}"
    return text + "."


def answer(facts: ScoreTable) -> list[Block]:
    """What to serve, with its command, and what helped: every row's difference to the base, the best first."""
    best, on_target = facts.best(), facts.best(TARGET)
    if best is None:
        return []
    blocks = serve(facts.rows[best].path, "Serve the best model over all sets", best)
    if on_target not in (None, best):
        blocks += serve(facts.rows[str(on_target)].path, "For text like the target alone", str(on_target))
    gaps = {label: facts.gap(label, None) for label, row in facts.rows.items() if row.role not in ("base", "bound")}
    known = sorted((gap, error, label) for label, (gap, error) in gaps.items() if math.isfinite(gap))
    if known:
        rows = [[_label(facts, label), *difference_cells(gap, error)] for gap, error, label in known]
        caption = (
            f"What helped: bits per byte against {facts.base}, mean over the sets, ± one standard error of the paired "
            "difference; negative is better."
        )
        heads = [facts.what.capitalize(), "Difference", "95 % interval"]
        blocks.append(Table(caption, heads, rows[:ANSWER_ROWS], "dense"))
        if len(rows) > ANSWER_ROWS:
            blocks.append(Text(f"{len(rows) - ANSWER_ROWS} more under Every model.", "error"))
    return [Box(blocks)] if blocks else []


def serve(path: str, why: str, name: str = "") -> list[Block]:
    """The command that serves a model; nothing where it has no path."""
    return [Command(why, name, f"weftlm serve {shlex.quote(path)}")] if path else []
