"""Losses, windows, caps and bytes against closed forms and plain loops."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.experts import llama as tiny_llama
from torch import Tensor, nn

from weftlm.corpora.source import ArraySource
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.evaluation.perplexity import evaluate_source, evaluation_mode, windows_of


class Constant(nn.Module):
    """One logit everywhere, but certainty of token 0 where it is minus infinity."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        logits_BTV = torch.full((*input_ids.shape, 64), self.value)
        if self.value == -math.inf:
            logits_BTV[..., 0] = 0.0
        return SimpleNamespace(logits=logits_BTV)


@given(tokens=st.integers(2, 5000), length=st.integers(1, 700), limit=st.integers(1, 6000))
def test_windows_score_every_token_but_the_first_once_and_a_cap_takes_some_evenly(
    tokens: int, length: int, limit: int
) -> None:
    starts_N, tokens_N = windows_of(tokens, length)
    scored = np.concatenate([np.arange(s + 1, s + n + 1) for s, n in zip(starts_N, tokens_N, strict=True)])
    assert np.array_equal(scored, np.arange(1, tokens))
    assert (tokens_N[:-1] == length).all()
    some, scored_N = windows_of(tokens, length, limit)
    assert set(some.tolist()) <= set(starts_N.tolist())
    assert scored_N.sum() <= max(limit, length)
    assert len(some) == min(len(starts_N), max(1, limit // length))
    gaps = np.diff(some // length)
    assert (gaps > 0).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("length", "batch_size"), [(1, 64), (7, 3), (101, 1), (202, 3), (500, 64)])
def test_a_bigram_model_costs_what_its_table_says_whatever_the_windows(
    bigram: Any, source: Any, length: int, batch_size: int
) -> None:
    nats = bigram.nats(source)
    result = evaluate_source(bigram, source, sequence_length=length, batch_size=batch_size)
    assert result.tokens == 202
    assert result.nats_per_token == pytest.approx(nats.mean(), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / 640, rel=1e-6)
    assert math.isnan(result.nats_per_token_se) == (length >= 202), "one window has no error"


def test_the_standard_error_is_that_of_a_ratio_over_windows_and_a_cap_scales_the_bytes(
    bigram: Any, source: Any
) -> None:
    nats = bigram.nats(source)
    result = evaluate_source(bigram, source, sequence_length=16, batch_size=8)
    assert bigram.batches == [(8, 16), (4, 16), (1, 10)], "only the tail has its own batch"
    parts = [nats[start : start + 16] for start in range(0, 202, 16)]
    residuals = np.array([part.sum() - nats.mean() * len(part) for part in parts])
    expected = math.sqrt(len(parts) / (len(parts) - 1) * (residuals**2).sum()) / 202
    assert result.nats_per_token_se == pytest.approx(expected, rel=1e-5)
    assert result.bits_per_byte_se == pytest.approx(expected * 202 / 640 / math.log(2), rel=1e-5)
    capped = evaluate_source(bigram, source, sequence_length=16, batch_size=2, max_tokens=70)
    assert capped.windows.starts_N.tolist() == [16, 64, 128, 176]  # the middles of four stretches of 13 windows
    chosen = np.concatenate([nats[start : start + 16] for start in capped.windows.starts_N])
    assert capped.nats_per_token == pytest.approx(chosen.mean(), rel=1e-6)
    assert capped.bits_per_byte == pytest.approx(chosen.mean() / math.log(2) * 203 / 640, rel=1e-6)


def test_a_hugging_face_model_costs_what_a_loop_says_without_dropout(source: Any) -> None:
    llama = tiny_llama(vocab_size=11, attention_dropout=0.5).train()
    llama.model.layers[0].eval()  # a frozen layer
    before = {name: module.training for name, module in llama.named_modules()}
    result = evaluate_source(llama, source, sequence_length=32, batch_size=4)
    assert {name: module.training for name, module in llama.named_modules()} == before
    assert all(parameter.grad is None for parameter in llama.parameters())
    llama.eval()
    total, tokens = 0.0, torch.tensor(source.read(0, 203))
    for start in range(0, 202, 32):
        window = tokens[None, start : start + 33]
        with torch.no_grad():
            logp = torch.log_softmax(llama(input_ids=window[:, :-1]).logits.double(), -1)[0]
        total -= float(logp[torch.arange(window.shape[1] - 1), window[0, 1:]].sum())
    assert result.nats_per_token == pytest.approx(total / 202, rel=1e-6)


def test_the_mode_is_restored_after_an_error() -> None:
    model = nn.Linear(2, 2).train()
    with pytest.raises(RuntimeError, match="False"), evaluation_mode(model):
        raise RuntimeError(str(model.training))
    assert model.training


def test_bfloat16_logits_are_scored_in_float32(source: Any) -> None:
    logits_V = torch.linspace(-3, 3, 11).bfloat16()

    class Half(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=logits_V.expand(*input_ids.shape, 11))

    expected = -torch.log_softmax(logits_V.double(), 0)[source.read(1, 202)].mean()
    result = evaluate_source(Half(), source, sequence_length=32, batch_size=4)
    assert result.nats_per_token == pytest.approx(float(expected), rel=1e-6)


def test_what_cannot_be_scored_is_said(bigram: Any, source: Any) -> None:
    how = {"sequence_length": 8, "batch_size": 2}
    for name in ("sequence_length", "batch_size", "max_tokens"):
        with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
            evaluate_source(bigram, source, **{**how, name: 0})
    with pytest.raises(DataError, match="1 tokens cannot be scored; it needs at least 2"):
        evaluate_source(bigram, ArraySource([3]), **how)
    with pytest.raises(NumericsError, match="not a number on 26 of 26 held-out windows"):
        evaluate_source(Constant(math.nan), source, **how)
    unknown = evaluate_source(bigram, ArraySource([3, 4]), **how)
    assert math.isfinite(unknown.nats_per_token)
    assert math.isnan(unknown.bits_per_byte), "no bytes are known"
    infinite = evaluate_source(Constant(-math.inf), ArraySource(np.arange(9), text_bytes=9), **how)
    assert infinite.nats_per_token == infinite.perplexity == math.inf
    assert infinite.to_json()["bits_per_byte"] is None
