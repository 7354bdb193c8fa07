"""A measured value with its standard error, its 95 % interval, and whether a difference is significant."""

from __future__ import annotations

import math
from typing import NamedTuple

from weftlm.reporting.page import DASH, Cell, Number, Piece

NORMAL_95 = 1.96
"""Half-width of a 95 % interval in standard errors."""


class Score(NamedTuple):
    """A value and its standard error; NaN where one is not known."""

    value: float = math.nan
    error: float = math.nan

    def minus(self, other: Score) -> Score:
        """The difference of two values, their errors taken as independent."""
        return Score(self.value - other.value, math.hypot(self.error, other.error))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of a value whose error is normal."""
        return self.value - NORMAL_95 * self.error, self.value + NORMAL_95 * self.error

    @property
    def verdict(self) -> str:
        """What a difference of losses shows: better (below zero), worse, or not significant at 95 %."""
        if not math.isfinite(self.error):
            return "no error known"
        low, high = self.interval
        return "better" if high < 0 else "worse" if low > 0 else "not significant"


def value_text(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """A number with a true minus sign, and none before a zero."""
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def pieces(score: Score, digits: int = 3, *, signed: bool = False) -> tuple[Piece, ...]:
    """`−0.043 ± 0.003`, with as many digits as show the error; a dash where the value is not known."""
    if not math.isfinite(score.value):
        return (DASH,)
    digits = max(digits, 4) if 0 < score.error < 0.0005 else digits
    shown: tuple[Piece, ...] = (Number(score.value, value_text(score.value, digits, signed=signed)),)
    known = math.isfinite(score.error) and score.error > 0
    return (*shown, " ± ", Number(score.error, f"{score.error:.{digits}f}")) if known else shown


def score_text(score: Score, digits: int = 3, *, signed: bool = False) -> str:
    """The same as text."""
    shown = pieces(score, digits, signed=signed)
    return "".join(one if isinstance(one, str) else one.text for one in shown)


def interval_cell(low: float | None, high: float | None, digits: int = 3, *, signed: bool = False) -> Cell:
    """Two ends of an interval, of which one may be open; a dash where both are."""
    ends = [math.nan if end is None else end for end in (low, high)]
    if not any(map(math.isfinite, ends)):
        return Cell()
    first, last = (
        Number(end, value_text(end, digits, signed=signed)) if math.isfinite(end) else f"{sign}∞"
        for end, sign in zip(ends, "−+", strict=True)
    )
    return Cell((first, " to ", last))
