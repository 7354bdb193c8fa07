"""Losses, windows, caps and bytes against closed forms and plain loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.language_model import HFLanguageModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.evaluation.perplexity import evaluate_source, evaluation_mode, windows_of


class Uniform:
    """log p = -ln V everywhere."""

    vocab_size = 64

    def log_probs(self, tokens_BT: Tensor) -> Tensor:
        return torch.full((*tokens_BT.shape, self.vocab_size), -math.log(self.vocab_size))


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_dropout=0.5, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@given(tokens=st.integers(2, 5000), length=st.integers(1, 700))
def test_windows_score_every_token_but_the_first_once(tokens: int, length: int) -> None:
    starts_N, tokens_N = windows_of(tokens, length)
    scored = np.concatenate([np.arange(s + 1, s + n + 1) for s, n in zip(starts_N, tokens_N, strict=True)])
    assert np.array_equal(scored, np.arange(1, tokens))
    assert (tokens_N[:-1] == length).all()
    assert 1 <= tokens_N[-1] <= length


@given(tokens=st.integers(2, 5000), length=st.integers(1, 700), limit=st.integers(1, 6000))
def test_capped_windows_are_some_of_all_windows_evenly_spaced(tokens: int, length: int, limit: int) -> None:
    (everything, _), (some, scored_N) = windows_of(tokens, length), windows_of(tokens, length, limit)
    assert set(some.tolist()) <= set(everything.tolist())
    assert (np.diff(some) > 0).all()
    assert scored_N.sum() <= max(limit, length)
    assert len(some) == min(len(everything), max(1, limit // length))
    gaps = np.diff(some // length)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary(source: Any) -> None:
    result = evaluate_source(Uniform(), source, sequence_length=16, batch_size=4)
    assert result.nats_per_token == pytest.approx(math.log(64), abs=1e-6)
    assert result.nats_per_token_se == pytest.approx(0.0, abs=1e-9)
    assert result.perplexity == pytest.approx(64, rel=1e-6)
    assert (result.tokens, result.bytes) == (202, 640)
    assert result.bits_per_byte == pytest.approx(6 * 202 / 640, rel=1e-6)


@pytest.mark.parametrize(("length", "batch_size"), [(1, 64), (7, 3), (101, 1), (202, 3), (500, 64)])
def test_a_bigram_model_costs_what_a_plain_loop_says_whatever_the_windows(
    bigram: Any, table_VV: Any, source: Any, nats_by_hand: Any, length: int, batch_size: int
) -> None:
    nats = nats_by_hand(table_VV, source.tokens_N)
    result = evaluate_source(bigram, source, sequence_length=length, batch_size=batch_size)
    assert result.tokens == 202
    assert result.nats_per_token == pytest.approx(nats.mean(), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats.mean()), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / 640, rel=1e-6)


def test_the_standard_error_is_that_of_a_ratio_over_windows(
    bigram: Any, table_VV: Any, source: Any, nats_by_hand: Any
) -> None:
    nats = nats_by_hand(table_VV, source.tokens_N)
    result = evaluate_source(bigram, source, sequence_length=16, batch_size=5)
    parts = [nats[start : start + 16] for start in range(0, 202, 16)]
    residuals = np.array([part.sum() - nats.mean() * len(part) for part in parts])
    expected = math.sqrt(len(parts) / (len(parts) - 1) * (residuals**2).sum()) / 202
    assert len(parts[-1]) == 10
    assert result.nats_per_token_se == pytest.approx(expected, rel=1e-5)
    assert result.bits_per_byte_se == pytest.approx(expected * 202 / 640 / math.log(2), rel=1e-5)


def test_one_window_has_no_error(bigram: Any, source: Any) -> None:
    result = evaluate_source(bigram, source, sequence_length=500, batch_size=4)
    assert math.isnan(result.nats_per_token_se)
    assert result.to_json()["nats_per_token_se"] is None


def test_a_cap_scores_the_windows_it_names_and_scales_the_bytes(
    bigram: Any, table_VV: Any, source: Any, nats_by_hand: Any
) -> None:
    nats = nats_by_hand(table_VV, source.tokens_N)
    result = evaluate_source(bigram, source, sequence_length=16, batch_size=2, max_tokens=70)
    starts = result.windows.starts_N
    assert starts.tolist() == [16, 64, 128, 176]  # the middles of four stretches of 13 windows
    chosen = np.concatenate([nats[start : start + 16] for start in starts])
    assert result.tokens == 64
    assert result.nats_per_token == pytest.approx(chosen.mean(), rel=1e-6)
    assert result.bytes == round(640 / 203 * 64)
    assert result.bits_per_byte == pytest.approx(chosen.mean() / math.log(2) * 203 / 640, rel=1e-6)
    assert result.windows.nats_N == pytest.approx([nats[s : s + 16].sum() for s in starts], rel=1e-6)
    again = evaluate_source(bigram, source, sequence_length=16, batch_size=4, max_tokens=70)
    assert again == result


def test_only_the_tail_has_its_own_batch(bigram: Any, source: Any) -> None:
    evaluate_source(bigram, source, sequence_length=16, batch_size=8)
    assert bigram.batches == [(8, 16), (4, 16), (1, 10)]


def llama_by_hand(model: LlamaForCausalLM, tokens_N: Any, length: int) -> tuple[float, int]:
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(tokens_N) - 1, length):
            window = torch.tensor(tokens_N[start : start + length + 1])[None]
            logp = torch.log_softmax(model(input_ids=window[:, :-1]).logits.double(), -1)[0]
            total -= float(logp[torch.arange(window.shape[1] - 1), window[0, 1:]].sum())
            count += window.shape[1] - 1
    return total / count, count


def test_a_hugging_face_model_costs_what_a_loop_over_windows_says(llama: LlamaForCausalLM, source: Any) -> None:
    expected, count = llama_by_hand(llama, source.tokens_N, 32)
    result = evaluate_source(llama, source, sequence_length=32, batch_size=4)
    assert result.tokens == count == 202
    assert result.nats_per_token == pytest.approx(expected, rel=1e-6)


def test_the_two_ways_to_score_a_model_agree(llama: LlamaForCausalLM, source: Any) -> None:
    plain = evaluate_source(llama, source, sequence_length=32, batch_size=4)
    wrapped = evaluate_source(HFLanguageModel(llama), source, sequence_length=32, batch_size=4)
    assert wrapped.nats_per_token == pytest.approx(plain.nats_per_token, rel=1e-6)


@pytest.mark.parametrize("wrap", [lambda model: model, HFLanguageModel])
def test_dropout_is_off_and_every_modules_mode_is_restored(llama: LlamaForCausalLM, source: Any, wrap: Any) -> None:
    llama.train()
    llama.model.layers[0].eval()  # somebody froze one layer
    before = {name: module.training for name, module in llama.named_modules()}
    first = evaluate_source(wrap(llama), source, sequence_length=32, batch_size=4)
    second = evaluate_source(wrap(llama), source, sequence_length=32, batch_size=4)
    assert first == second
    assert {name: module.training for name, module in llama.named_modules()} == before
    assert len(set(before.values())) == 2
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_the_mode_is_restored_after_an_error() -> None:
    model = nn.Linear(2, 2).train()
    modes = []

    def fail() -> None:
        with evaluation_mode(model):
            modes.append(model.training)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert modes == [False]
    assert model.training


def test_bfloat16_logits_are_scored_in_float32(source: Any) -> None:
    class Half(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            logits = torch.linspace(-3, 3, 11).bfloat16().expand(*input_ids.shape, 11)
            return type("Output", (), {"logits": logits})

    log_p = torch.log_softmax(torch.linspace(-3, 3, 11).bfloat16().double(), 0)
    result = evaluate_source(Half(), source, sequence_length=32, batch_size=4)
    assert result.nats_per_token == pytest.approx(-float(log_p[source.tokens_N[1:]].mean()), rel=1e-6)


@pytest.mark.parametrize("wrong", [{"sequence_length": 0}, {"batch_size": 0}, {"max_tokens": 0}])
def test_limits_below_one_are_refused(bigram: Any, source: Any, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is 0; it must be at least 1"):
        evaluate_source(bigram, source, **{"sequence_length": 8, "batch_size": 2, **wrong})


def test_sets_without_tokens_are_refused_and_without_bytes_have_no_bits_per_byte(
    bigram: Any, array_source: Any
) -> None:
    with pytest.raises(DataError, match="1 tokens cannot be scored; it needs at least 2"):
        evaluate_source(bigram, array_source(np.array([3]), 4), sequence_length=8, batch_size=2)
    found = evaluate_source(bigram, array_source(np.array([3, 4]), 0), sequence_length=8, batch_size=2)
    assert math.isfinite(found.nats_per_token)
    assert math.isnan(found.bits_per_byte)


def test_a_loss_that_is_no_number_is_an_error(source: Any) -> None:
    class Broken(Uniform):
        def log_probs(self, tokens_BT: Tensor) -> Tensor:
            return super().log_probs(tokens_BT) * float("nan")

    with pytest.raises(NumericsError, match="not a number on 13 of 13 held-out windows"):
        evaluate_source(Broken(), source, sequence_length=16, batch_size=4)


def test_a_token_of_probability_zero_is_an_honest_infinity(source: Any) -> None:
    class Certain(Uniform):
        def log_probs(self, tokens_BT: Tensor) -> Tensor:
            logp = torch.full((*tokens_BT.shape, 64), -math.inf)
            logp[..., 0] = 0.0
            return logp

    result = evaluate_source(Certain(), source, sequence_length=16, batch_size=4)
    assert result.nats_per_token == math.inf
    assert result.perplexity == math.inf
    assert result.to_json()["bits_per_byte"] is None
