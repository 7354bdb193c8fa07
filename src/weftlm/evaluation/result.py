"""What an evaluation found: one `SetResult` per held-out set, and the differences between two evaluations.

All standard errors here treat windows of text as independent draws. Neighbouring windows of one document resemble each
other, so for sets made of a few long documents they are too small; they say nothing about the spread over seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from weftlm.errors import DataError, reason
from weftlm.files import parse_json, whole


@dataclass(frozen=True)
class WindowScores:
    """The total loss of each window of a set, kept to compare two models window by window.

    Attributes:
        fingerprint: Fingerprint of the source the windows were cut from.
        starts_N: Position of each window's first input token, int64, increasing.
        tokens_N: Tokens scored in each window, int64.
        nats_N: Summed loss of each window, nats, float64.
        bytes_per_token: UTF-8 bytes behind one scored token; 0 where they are not known.
    """

    fingerprint: str
    starts_N: NDArray[np.int64]
    tokens_N: NDArray[np.int64]
    nats_N: NDArray[np.float64]
    bytes_per_token: float

    def mean(self, nats_N: NDArray[np.float64]) -> MeanResult:
        """Mean of some totals of these windows, with the error of `ratio_and_error`."""
        nats, error = ratio_and_error(nats_N, self.tokens_N)
        scale = 1.0 / (math.log(2.0) * self.bytes_per_token) if self.bytes_per_token else math.nan
        return MeanResult(
            nats_per_token=nats,
            nats_per_token_se=error,
            bits_per_byte=nats * scale,
            bits_per_byte_se=error * scale,
        )


@dataclass(frozen=True, kw_only=True)
class MeanResult:
    """A loss, or a difference of two losses (negative: the first is better), with its standard error.

    As a mean of several sets' results, each set counts once whatever its size.

        se = sqrt(sum_d se_d^2) / D          (sets are independent of one another)

    Attributes:
        nats_per_token: Mean loss.
        nats_per_token_se: Its standard error.
        bits_per_byte: The same over the UTF-8 bytes of the text; comparable between tokenizers.
        bits_per_byte_se: Its standard error, the byte count taken as known.
    """

    nats_per_token: float
    nats_per_token_se: float
    bits_per_byte: float
    bits_per_byte_se: float

    def to_json(self) -> dict[str, float | int | None]:
        """The numbers under their own names; what is not finite becomes None. Window losses are left out."""
        return {name: finite_or_none(value) for name, value in vars(self).items() if name != "windows"}


@dataclass(frozen=True, kw_only=True)
class SetResult(MeanResult):
    """How well a model predicts one held-out set: mean loss over the scored tokens, error over windows.

    Errors are those of `ratio_and_error`; NaN with a single window. Bits per byte are NaN where the bytes are not
    known, or the tokenizer loses text.

    Attributes:
        perplexity: exp(nats_per_token).
        tokens: Scored tokens.
        bytes: UTF-8 bytes of the scored text; when only part of a set was scored, the set's bytes per token times
            `tokens`, rounded.
        windows: Loss of each window.
    """

    perplexity: float
    tokens: int
    bytes: int
    windows: WindowScores = field(repr=False, compare=False)

    @staticmethod
    def of(windows: WindowScores, total_bytes: int) -> SetResult:
        """Sum window losses up over `total_bytes` UTF-8 bytes."""
        mean, tokens = windows.mean(windows.nats_N), int(windows.tokens_N.sum())
        perplexity = math.exp(mean.nats_per_token) if mean.nats_per_token < 700.0 else math.inf
        return SetResult(**vars(mean), perplexity=perplexity, tokens=tokens, bytes=total_bytes, windows=windows)


def finite_or_none(value: float) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def ratio_and_error(totals_N: NDArray[np.float64], sizes_N: NDArray[np.int64]) -> tuple[float, float]:
    """A ratio of sums over windows and its standard error.

        r = sum_i x_i / sum_i n_i
        se^2 = N / (N - 1) * sum_i (x_i - r n_i)^2 / (sum_i n_i)^2

    The linearised (Taylor) variance of a ratio estimator (Cochran, Sampling Techniques, 3rd ed., sec. 6.5), without the
    finite population correction, so that it speaks of the text the set was drawn from and not of the set itself. It
    treats windows as independent. With equal sizes it is the usual standard error of a mean.

    Args:
        totals_N: x, the sum over each window, float64.
        sizes_N: n, tokens in each window, positive.
    Returns:
        r and se; se is NaN for fewer than two windows and where r is not finite.
    """
    count, size = len(totals_N), float(sizes_N.sum())
    ratio = float(totals_N.sum()) / size
    if count < 2 or not math.isfinite(ratio):
        return ratio, math.nan
    residuals_N = totals_N - ratio * sizes_N
    return ratio, math.sqrt(count / (count - 1) * float(residuals_N @ residuals_N)) / size


def mean_result(results: Mapping[str, MeanResult]) -> MeanResult:
    """The mean over sets.

    Over the differences of the generic domains this is the forgetting (or its opposite) that a gain on the target cost.

    Raises:
        DataError: there is no set.
    """
    if not results:
        raise DataError("a mean over sets needs at least one set; none was evaluated")
    values, count = list(results.values()), len(results)
    return MeanResult(
        nats_per_token=math.fsum(value.nats_per_token for value in values) / count,
        nats_per_token_se=math.hypot(*(value.nats_per_token_se for value in values)) / count,
        bits_per_byte=math.fsum(value.bits_per_byte for value in values) / count,
        bits_per_byte_se=math.hypot(*(value.bits_per_byte_se for value in values)) / count,
    )


def paired_difference(first: WindowScores, second: WindowScores) -> MeanResult:
    """How much worse one model is than another on the same windows.

        d_i = x_i - y_i,    difference = sum_i d_i / sum_i n_i

    with the standard error of `ratio_and_error` over the d_i. What makes a window hard is common to both models and
    cancels, so this error is far below that of either result.

    Raises:
        DataError: the two scored different windows.
    """
    if first.fingerprint != second.fingerprint:
        raise DataError(
            f"the two results are of different sets (fingerprints {first.fingerprint} and {second.fingerprint}); "
            "evaluate both models on the same prepared data"
        )
    if not (np.array_equal(first.starts_N, second.starts_N) and np.array_equal(first.tokens_N, second.tokens_N)):
        raise DataError(
            f"the two results scored different windows ({len(first.starts_N)} and {len(second.starts_N)}); "
            "evaluate both with the same sequence_length and max_tokens"
        )
    with np.errstate(invalid="ignore"):  # two infinite losses have no difference: NaN
        return first.mean(first.nats_N - second.nats_N)


def save_windows(path: str | Path, results: Mapping[str, SetResult]) -> None:
    """Write the window losses of several sets to one safetensors file, whole or not at all."""
    windows = {name: result.windows for name, result in results.items()}
    about = {name: [one.fingerprint, one.bytes_per_token] for name, one in windows.items()}
    arrays = {f"{name}.{kind}": getattr(one, kind) for name, one in windows.items() for kind in _ARRAYS}
    with whole(Path(path)) as partial:
        save_file(arrays, partial, metadata={"sets": json.dumps(about)})


_ARRAYS = ("starts_N", "tokens_N", "nats_N")


def load_windows(path: str | Path) -> dict[str, WindowScores]:
    """Read what `save_windows` wrote.

    Raises:
        DataError: the file is missing, torn or not of this kind.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return {
                name: WindowScores(
                    fingerprint=str(fingerprint),
                    bytes_per_token=float(size),
                    **{kind: file.get_tensor(f"{name}.{kind}") for kind in _ARRAYS},
                )
                for name, (fingerprint, size) in parse_json(file.metadata()["sets"]).items()
            }
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"window losses {path} cannot be read: {reason(error)}; evaluate the run again") from error
