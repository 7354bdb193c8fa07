"""Differences between two evaluations, means over sets, and the window file."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weftlm.errors import DataError
from weftlm.evaluation.perplexity import evaluate_source
from weftlm.evaluation.result import (
    MeanResult,
    SetResult,
    WindowScores,
    load_windows,
    mean_result,
    paired_difference,
    ratio_and_error,
    save_windows,
)


def scored(seed: int, count: int = 40, shift: float = 0.0) -> WindowScores:
    hardness_N = np.random.default_rng(1).gamma(4.0, 30.0, count)
    nats_N = hardness_N + np.random.default_rng(seed).normal(shift, 2.0, count)
    tokens_N = np.full(count, 32, dtype=np.int64)
    tokens_N[-1] = 5
    return WindowScores("f", np.arange(count, dtype=np.int64) * 32, tokens_N, nats_N, 3.0)


def test_a_paired_difference_is_the_mean_over_tokens_with_the_error_of_the_differences() -> None:
    first, second = scored(2, shift=1.0), scored(3)
    difference, back = paired_difference(first, second), paired_difference(second, first)
    d, total = first.nats_N - second.nats_N, first.tokens_N.sum()
    ratio = d.sum() / total
    error = math.sqrt(40 / 39 * ((d - ratio * first.tokens_N) ** 2).sum()) / total
    found = (difference.nats_per_token, difference.nats_per_token_se)
    assert found == pytest.approx((ratio, error), rel=1e-12)
    in_bits = (difference.bits_per_byte, difference.bits_per_byte_se)
    assert in_bits == pytest.approx((ratio / 3 / math.log(2), error / 3 / math.log(2)), rel=1e-12)
    assert (back.bits_per_byte, back.bits_per_byte_se) == pytest.approx((-in_bits[0], in_bits[1]))
    unpaired = math.hypot(*(ratio_and_error(each.nats_N, each.tokens_N)[1] for each in (first, second)))
    assert difference.nats_per_token_se < 0.2 * unpaired, "what both models find hard cancels"
    with pytest.raises(DataError, match="different sets"):
        paired_difference(first, replace(first, fingerprint="g"))
    with pytest.raises(DataError, match=r"different windows \(40 and 39\)"):
        paired_difference(first, scored(2, count=39))
    infinite = replace(first, nats_N=np.where(np.arange(40) == 3, math.inf, first.nats_N))
    assert math.isnan(paired_difference(infinite, infinite).nats_per_token)


def test_a_mean_over_sets_counts_each_once() -> None:
    names = ("nats_per_token", "nats_per_token_se", "bits_per_byte", "bits_per_byte_se")
    rows = {"a": (1.0, 0.3, 0.5, 0.15), "b": (2.0, 0.4, 1.0, 0.2)}
    mean = mean_result({key: MeanResult(**dict(zip(names, row, strict=True))) for key, row in rows.items()})
    assert [getattr(mean, name) for name in names] == pytest.approx([1.5, 0.25, 0.75, 0.125])
    with pytest.raises(DataError, match="at least one set"):
        mean_result({})


def test_windows_come_back_from_their_file_and_a_torn_one_is_refused(tmp_path: Path, bigram: Any, source: Any) -> None:
    first = evaluate_source(bigram, source, sequence_length=16, batch_size=4)
    path = tmp_path / "windows.safetensors"
    save_windows(path, {"target": first, "odd/näme.x": first})
    loaded = load_windows(path)
    assert list(loaded) == ["target", "odd/näme.x"]
    for scores in loaded.values():
        assert (scores.fingerprint, scores.bytes_per_token) == (source.fingerprint, first.windows.bytes_per_token)
        assert np.array_equal(scores.nats_N, first.windows.nats_N)
        assert np.array_equal(scores.starts_N, first.windows.starts_N)
    path.write_bytes(path.read_bytes()[:200])
    for broken in (path, tmp_path / "none"):
        with pytest.raises(DataError, match=r"cannot be read: .*; evaluate the run again"):
            load_windows(broken)


def test_numbers_survive_json() -> None:
    scores = WindowScores("f", np.zeros(1, np.int64), np.array([4]), np.array([8.5]), 2.0 / math.log(2))
    value = json.loads(json.dumps(SetResult.of(scores, 300).to_json(), allow_nan=False))
    unknown = {"nats_per_token_se": None, "bits_per_byte_se": None}
    known = {"nats_per_token": 2.125, "perplexity": math.exp(2.125), "bits_per_byte": pytest.approx(1.0625)}
    assert value == {**unknown, **known, "tokens": 4, "bytes": 300}
