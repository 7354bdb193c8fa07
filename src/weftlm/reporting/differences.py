"""A difference of two measurements with its error: text, 95 % interval, and whether it is significant."""

from __future__ import annotations

import math
from collections.abc import Iterable

from weftlm.reporting.page import DASH, Cell, Number

NORMAL_95 = 1.96
"""Half-width of a 95 % interval in standard errors."""


def decimals_for(errors: Iterable[float]) -> int:
    """Decimals that show the smallest of some errors as more than zero: 3, or 4 where one is below 0.0005."""
    return 4 if any(0.0 < error < 0.0005 for error in errors) else 3


def difference_text(value: float, error: float = math.nan, decimals: int = 3) -> str:
    """`−0.043 ± 0.003`, with a true minus sign; without a known error the value alone."""
    text = f"{value:+.{decimals}f}".replace("-", "−")
    return text + ("" if math.isnan(error) else f" ± {error:.{decimals}f}")


def interval(value: float, error: float) -> tuple[float, float]:
    """The 95 % interval of a value whose error is normal."""
    return value - NORMAL_95 * error, value + NORMAL_95 * error


def verdict(value: float, error: float) -> str:
    """What a difference of losses shows: better (below zero), worse, or not significant at 95 %."""
    if not math.isfinite(error):
        return "no error known"
    low, high = interval(value, error)
    return "better" if high < 0 else "worse" if low > 0 else "not significant"


def difference_cells(value: float, error: float, decimals: int | None = None) -> list[Cell]:
    """Difference with its verdict, and its 95 % interval."""
    if not math.isfinite(value):
        return [Cell(), Cell()]
    decimals = decimals_for([error]) if decimals is None else decimals
    low, high = (difference_text(end, decimals=decimals) for end in interval(value, error))
    shown = Cell(Number(value, difference_text(value, error, decimals)), sub=verdict(value, error))
    return [shown, Cell(f"{low} to {high}" if math.isfinite(error) else DASH)]


def lowest(values: Iterable[float]) -> float | None:
    """The least of several values; None where there is nothing to compare."""
    known = [value for value in values if math.isfinite(value)]
    return min(known) if len(known) > 1 else None
