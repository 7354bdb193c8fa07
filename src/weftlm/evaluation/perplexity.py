"""Score a model on held-out tokens: cross-entropy, perplexity and bits per byte, each with its standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from weftlm.corpora.source import Source
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.evaluation.result import SetResult, WindowScores, set_result
from weftlm.models.hf import SequenceLosses, token_losses
from weftlm.models.language_model import LanguageModel
from weftlm.threads import follow_load


class HeldOut(Source, Protocol):
    """A source that also knows how much text its tokens stand for.

    Attributes:
        bytes: UTF-8 bytes of the text; 0 where they are not known, and bits per byte are then NaN.
    """

    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True)
class Windows:
    """Windows of text to score: window i reads tokens `starts_N[i] .. starts_N[i] + tokens_N[i]`, both ends included.

    Attributes:
        starts_N: position of the first input token, int64, increasing.
        tokens_N: tokens scored: all of the window but its first, int64.
        complete: whether every token of the source but the first is scored.
    """

    starts_N: NDArray[np.int64]
    tokens_N: NDArray[np.int64]
    complete: bool


def windows_of(tokens: int, sequence_length: int, max_tokens: int | None = None) -> Windows:
    """Cut a source into windows that score each token once.

    Window i starts at i T and scores the T tokens after its first; the next window starts at the last token scored, so
    the scored parts tile positions 1 .. tokens - 1, and the last window is as short as it must be. A token is predicted
    from what its own window holds before it: from 1 to T tokens of context.

    With `max_tokens` the `max(1, max_tokens // T)` windows in the middle of equal stretches of the source are taken:
    the same ones at every evaluation and on every machine.

    Args:
        tokens: length of the source, at least 2.
        sequence_length: T, tokens scored per window.
        max_tokens: upper limit of tokens scored, from T up; None for all.
    """
    count = -(-(tokens - 1) // sequence_length)
    chosen_N = np.arange(count, dtype=np.int64)
    if max_tokens is not None:
        take = min(count, max(1, max_tokens // sequence_length))
        if take < count:
            chosen_N = (2 * np.arange(take, dtype=np.int64) + 1) * count // (2 * take)
    starts_N = chosen_N * sequence_length
    return Windows(starts_N, np.minimum(sequence_length, tokens - 1 - starts_N), len(chosen_N) == count)


def evaluate_source(
    model: nn.Module | LanguageModel,
    source: HeldOut,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    device: torch.device | str = "cpu",
    losses: SequenceLosses | None = None,
    per_window: bool = False,
    distributed: bool = False,
) -> SetResult:
    """Score a model on a source.

        nats_per_token = sum_t -log p(x_t | x_<t) / tokens          bits_per_byte = sum_t -log2 p(x_t | x_<t) / bytes

    over the windows of `windows_of`. Log-probabilities are taken in float32, sums in float64. `bytes` is the source's
    own count when every token is scored (its first token has no prediction: its bytes are counted, its loss is not) and
    the source's bytes per token times the scored tokens when `max_tokens` left some out.

    The model is put in evaluation mode, run without gradient, and every module's mode is put back afterwards.

    Args:
        model: a `LanguageModel`, or a Hugging Face causal language model (bare, or wrapped by accelerate).
        source: held-out tokens.
        sequence_length: T, tokens scored per window.
        batch_size: windows per forward pass.
        max_tokens: upper limit of tokens scored (at least one window is); None for all.
        device: where the model lives.
        losses: how the model is scored, when neither form of `model` fits.
        per_window: keep each window's loss, for `paired_difference`.
        distributed: every rank of the default process group calls this and scores its share; all get the same result.
            Without a process group it changes nothing.
    Raises:
        ConfigError: `sequence_length`, `batch_size` or `max_tokens` is below 1.
        DataError: the source has fewer than two tokens.
        NumericsError: the model's loss is not a number.
    """
    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if len(source) < 2:
        raise DataError(f"a held-out set of {len(source)} tokens cannot be scored; it needs at least 2")
    windows = windows_of(len(source), sequence_length, max_tokens)
    together = distributed and dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    nats_N = np.zeros(len(windows.starts_N), dtype=np.float64)
    with evaluation_mode(model), torch.inference_mode():
        for chosen_B, counts in _share(windows, batch_size, rank, world_size):
            follow_load()
            tokens_BT1 = source.read_many(windows.starts_N[chosen_B], int(windows.tokens_N[chosen_B[0]]) + 1)
            nats_B = _window_nats(model, torch.from_numpy(tokens_BT1).to(device), losses)
            if counts:
                nats_N[chosen_B] = nats_B
    if together:
        nats_N = sum_over_ranks(nats_N, torch.device(device))
    if np.isnan(nats_N).any():
        raise NumericsError(
            f"the loss is not a number on {int(np.isnan(nats_N).sum())} of {len(nats_N)} held-out windows; "
            "the model's weights or its log-probabilities hold NaN"
        )
    scored = int(windows.tokens_N.sum())
    size = int(getattr(source, "bytes", 0))
    scored_bytes = size if windows.complete else size / len(source) * scored
    scores = WindowScores(source.fingerprint, windows.starts_N, windows.tokens_N, nats_N, scored_bytes / scored)
    return set_result(scores, round(scored_bytes), keep_windows=per_window)


@contextmanager
def evaluation_mode(model: object) -> Iterator[None]:
    """Put a module, or the modules an object holds, in evaluation mode; put each submodule's own mode back after."""
    roots = [model] if isinstance(model, nn.Module) else [v for v in vars(model).values() if isinstance(v, nn.Module)]
    modes = [(module, module.training) for root in roots for module in root.modules()]
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _share(windows: Windows, batch_size: int, rank: int, world_size: int) -> Iterator[tuple[NDArray[np.int64], bool]]:
    """The batches one rank scores, as window indices of one length, and whether each counts.

    All ranks get the same number of batches, because a sharded model's forward pass is a collective: a rank that runs
    out repeats a batch that does not count.
    """
    batches = _batches(windows, batch_size, rank, world_size)
    rounds = max(len(_batches(windows, batch_size, other, world_size)) for other in range(world_size))
    yield from ((batch_B, True) for batch_B in batches)
    spare_B = batches[-1] if batches else _batches(windows, batch_size, 0, world_size)[0]
    for _ in range(rounds - len(batches)):
        yield spare_B, False


def _batches(windows: Windows, batch_size: int, rank: int, world_size: int) -> list[NDArray[np.int64]]:
    own_N = np.arange(rank, len(windows.starts_N), world_size, dtype=np.int64)
    result = []
    for length in np.unique(windows.tokens_N[own_N])[::-1]:
        same_N = own_N[windows.tokens_N[own_N] == length]
        result += [same_N[first : first + batch_size] for first in range(0, len(same_N), batch_size)]
    return result


def _window_nats(
    model: nn.Module | LanguageModel, tokens_BT1: Tensor, losses: SequenceLosses | None
) -> NDArray[np.float64]:
    """Summed loss of each window, nats_B, float64."""
    length = tokens_BT1.shape[1] - 1
    if losses is not None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"losses= scores torch modules; the model is a {type(model).__name__}")
        nats_B = losses(model, tokens_BT1).cpu().double() * length
    elif isinstance(model, LanguageModel):
        logp_BTV = model.log_probs(tokens_BT1[:, :-1])
        nats_B = -logp_BTV.gather(-1, tokens_BT1[:, 1:, None]).squeeze(-1).cpu().double().sum(dim=1)
    else:
        nats_B = token_losses(model, tokens_BT1).cpu().double().sum(dim=1)
    if nats_B.shape != tokens_BT1.shape[:1]:
        raise ConfigError(
            f"losses= returned shape {tuple(nats_B.shape)} for {tokens_BT1.shape[0]} sequences; "
            "it must return one mean per sequence"
        )
    result: NDArray[np.float64] = nats_B.numpy()
    return result


def sum_over_ranks(values_N: NDArray[np.float64], device: torch.device) -> NDArray[np.float64]:
    """Add up the ranks' arrays; each window is non-zero on one rank alone, so the sum is exact."""
    on_device = device if dist.get_backend() == "nccl" else torch.device("cpu")
    total_N = torch.from_numpy(values_N).to(on_device)
    dist.all_reduce(total_N)
    result: NDArray[np.float64] = total_N.cpu().numpy()
    return result
