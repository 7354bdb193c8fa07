"""Models, routers, runs or gates side by side: a table of scores, what helped, and how to serve the best."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from weftlm.evaluation.suite import TARGET
from weftlm.reporting.page import Block, Cell, Code, Table, Text, exact
from weftlm.reporting.runs import mapping, number, read_score
from weftlm.reporting.score import Score, interval_cell, pieces, score_text

Role = Literal["", "base", "baseline", "expert", "router", "gate", "student", "bound"]
"""What a row is: `base` is what differences are taken to; `bound` looks at what it is scored on, so it never wins."""
ANSWER_ROWS = 6
"""Rows of the first screen's table."""
COLUMN_SETS = 7
"""Sets with a column of their own; of more, the sets become the rows of a second table."""


@dataclass(frozen=True)
class ScoreRow:
    """A model.

    Attributes:
        scores: Score by column.
        role: What it is.
        gaps: Difference to the base by column, where it was measured window by window.
        path: Argument of `weftlm serve`; empty where it cannot be served.
        notes: What is shown under its name, besides its role.
        swatch: CSS colour of the row in the charts.
    """

    scores: Mapping[str, Score]
    role: Role = ""
    gaps: Mapping[str, Score] = field(default_factory=dict)
    path: str = ""
    notes: Sequence[str] = ()
    swatch: str = ""


@dataclass(frozen=True)
class ScoreTable:
    """Rows by label, in columns of which the first decides.

    Attributes:
        rows: The models.
        columns: Columns that are always shown: means, the target, the worst case.
        sets: Further columns; many of them become the rows of a second, folded table.
        caption: What the values are, and their unit.
        found: What follows the best value in the headline: its unit, and what it was measured on.
        what: A row in one word: model, router, mixture.
        base: Label of the row that differences are taken to.
        digits: Decimals of the values.
        shares: Whether values are shares, shown in percent, of which the highest is best.
        competing: Roles that the headline and `answer` compare; empty for all but bounds.
        tasks: Shares of right answers by the same rows.
    """

    rows: Mapping[str, ScoreRow]
    columns: Sequence[str]
    sets: Sequence[str]
    caption: str
    found: str = ""
    what: str = "model"
    base: str | None = None
    digits: int = 3
    shares: bool = False
    competing: Sequence[Role] = ()
    tasks: ScoreTable | None = None

    def score(self, label: str, column: str) -> Score:
        """A row's score in a column; NaN where it is not known."""
        return self.rows[label].scores.get(column, Score())

    def gap(self, label: str, column: str) -> Score:
        """A row minus the base; NaN where it is not known."""
        if self.base is None or label == self.base:
            return Score()
        return self.rows[label].gaps.get(column) or self.score(label, column).minus(self.score(self.base, column))

    def best(self, column: str, labels: Iterable[str] | None = None) -> str | None:
        """The best row of a column that is no bound; None where nothing was measured."""
        sign = -1 if self.shares else 1
        known = {label: sign * self.score(label, column).value for label in (self.rows if labels is None else labels)}
        known = {one: value for one, value in known.items() if math.isfinite(value) and self.rows[one].role != "bound"}
        return min(known, key=known.__getitem__) if known else None

    @property
    def compared(self) -> list[str]:
        """The rows with a difference to the base in the first column, the best first."""
        gaps = {label: self.gap(label, self.columns[0]).value for label, row in self.rows.items()
                if (row.role in self.competing if self.competing else row.role != "bound")}  # fmt: skip
        return sorted((label for label, gap in gaps.items() if math.isfinite(gap)), key=gaps.__getitem__)


def model_table(models: Mapping[str, Mapping[str, Any]], what: str, window: int | None) -> ScoreTable:
    """Models as evaluation.json holds them: held-out bits per byte by set with the mean, and accuracy by task.

    Args:
        models: By label: `sets` with bits_per_byte and bits_per_byte_se by name, `role`, and where they are known
            `path`, `tasks` with accuracy and chance by name, and `difference` to the base, paired by window.
        what: A row in one word.
        window: Tokens of the windows that were scored.
    """
    names = list(dict.fromkeys(name for each in models.values() for name in each["sets"]))
    mean, rows = "mean over the sets", {}
    for label, each in models.items():
        known = mapping(each.get("difference"))
        gaps = {mean: known["mean"], **known["sets"]} if known else {}
        rows[label] = ScoreRow(
            _with_mean({name: read_score(each["sets"].get(name)) for name in names}, mean),
            each["role"],
            {name: read_score(gap) for name, gap in gaps.items()},
            each.get("path", ""),
        )
    base = next((label for label, row in rows.items() if row.role == "base"), None)
    length = "" if window is None else f", in windows of {window} tokens"
    caption, found = f"Held-out bits per byte by {what}{length}", "bits per byte of held-out text"
    tasks = _task_table(models, what)
    if len(names) == 1:
        return ScoreTable(rows, names, (), caption, found, what, base, tasks=tasks)
    return ScoreTable(rows, (mean,), names, caption, f"{found}, {mean}", what, base, tasks=tasks)


def _task_table(models: Mapping[str, Mapping[str, Any]], what: str) -> ScoreTable | None:
    asked = {label: each for label, each in models.items() if each.get("tasks")}
    names = list(dict.fromkeys(name for each in asked.values() for name in each["tasks"]))
    if not names:
        return None
    mean = "mean over the tasks"

    def row(each: Mapping[str, Any], key: str, role: Role) -> ScoreRow:
        values = {name: Score(number(mapping(each["tasks"].get(name)).get(key))) for name in names}
        return ScoreRow(_with_mean(values, mean), role)

    rows = {label: row(each, "accuracy", each["role"]) for label, each in asked.items()}
    rows["chance"] = row(next(iter(asked.values())), "chance", "bound")
    columns, sets = ((mean,), names) if len(names) > 1 else (names, ())
    return ScoreTable(rows, columns, sets, f"Share of right answers by {what}", what=what, shares=True)


def _with_mean(scores: Mapping[str, Score], name: str) -> dict[str, Score]:
    """Scores and, first, their mean, each counting once; NaN where one is missing."""
    count = len(scores) or math.nan
    value = math.fsum(one.value for one in scores.values()) / count
    return {name: Score(value, math.hypot(*(one.error for one in scores.values())) / count), **scores}


def score_tables(table: ScoreTable) -> list[Block]:
    """Rows by column with their differences to the base, the best of each column bold; then the tasks, if any."""
    wide = len(table.sets) > COLUMN_SETS
    columns = [*table.columns, *(() if wide else table.sets)]
    caption = f"{table.caption}; {'higher' if table.shares else 'lower'} is better. The best value of a column is bold"
    bound = any(row.role == "bound" for row in table.rows.values())
    caption += ", bounds aside: they know the text they are scored on." if bound and not table.shares else "."
    if table.base is not None and len(table.rows) > 1:
        caption += f" Under each value its difference to {table.base}."
    rows = [[_label(table, label), *(_cell(table, label, one) for one in columns)] for label in table.rows]
    blocks: list[Block] = [Table(caption, [table.what.capitalize(), *columns], rows, "models")]
    if wide:
        by_set = [[Cell(name), *(_cell(table, label, name) for label in table.rows)] for name in table.sets]
        fold = f"All {len(table.sets)} one by one"
        blocks.append(Table("The same values by row.", ["Set", *table.rows], by_set, "dense models", fold=fold))
    return blocks + ([] if table.tasks is None else score_tables(table.tasks))


def _cell(table: ScoreTable, label: str, column: str) -> Cell:
    score, gap = table.score(label, column), table.gap(label, column)
    shown = exact(score.value, f"{score.value:.1%}") if table.shares else pieces(score, table.digits)
    best = len(table.rows) > 1 and label == table.best(column)
    sub = (pieces(gap, table.digits, signed=True),) if math.isfinite(gap.value) else ()
    return Cell(shown, sub, ("highest" if table.shares else "lowest") if best else "")


def _label(table: ScoreTable, label: str) -> Cell:
    row = table.rows[label]
    return Cell(label, [one for one in (row.role, *row.notes) if one not in ("", label)], swatch=row.swatch)


def headline(table: ScoreTable) -> str:
    """The best row in the first column, and its difference to the base."""
    compared = table.compared
    best = compared[0] if compared else table.best(table.columns[0])
    if best is None:
        return "Nothing was measured on held-out text."
    text = f"{best}: {score_text(table.score(best, table.columns[0]), table.digits)} {table.found}"
    if not compared:
        return f"{text}."
    gap = table.gap(best, table.columns[0])
    return f"{text}, {score_text(gap, table.digits, signed=True)} against {table.base}: {gap.verdict}."


def answer(table: ScoreTable) -> list[Block]:
    """What to serve, with its command, and what helped: every row's difference to the base, the best first."""
    served = [label for label, row in table.rows.items() if row.path]
    best, on_target = table.best(table.columns[0], served), table.best(TARGET, served)
    blocks: list[Block] = []
    for why, label in (("Serve the best model", best), ("For text like the target alone", on_target)):
        if label is not None and (why.startswith("Serve") or label != best):
            blocks += [Text(f"{why}, {label}:"), Code(f"weftlm serve {shlex.quote(table.rows[label].path)}")]
    rows = []
    for label in table.compared:
        gap = table.gap(label, table.columns[0])
        interval = interval_cell(*gap.interval, table.digits, signed=True)
        rows.append(
            [
                Cell(label, _label(table, label).sub),
                Cell(pieces(gap, table.digits, signed=True), [gap.verdict]),
                interval,
            ]
        )
    if rows:
        caption = f"What helped: {table.found}, against {table.base}; ± one standard error, negative is better."
        heads = [table.what.capitalize(), "Difference", "95 % interval"]
        blocks.append(Table(caption, heads, rows[:ANSWER_ROWS], "dense"))
    if len(rows) > ANSWER_ROWS:
        blocks.append(Text(f"{len(rows) - ANSWER_ROWS} more in the tables below.", "error"))
    return blocks
