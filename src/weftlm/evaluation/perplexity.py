"""Score a model on held-out text or examples: cross-entropy, perplexity and bits per byte, with standard errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from weftlm.corpora.examples import Examples
from weftlm.corpora.source import Source
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.evaluation.result import SetResult, WindowScores
from weftlm.models.hf import token_losses
from weftlm.models.prompted import Prompted, PromptedExamples, batches_by_length, is_encoder_decoder, target_nats
from weftlm.threads import follow_load


def windows_of(
    tokens: int, sequence_length: int, max_tokens: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut a source into windows that score each token once.

    Window i starts at i T and scores the T tokens after its first; the next window starts at the last token scored, so
    the scored parts tile positions 1 .. tokens - 1, and the last window is as short as it must be. A token is predicted
    from what its own window holds before it: from 1 to T tokens of context.

    With `max_tokens` the `max(1, max_tokens // T)` windows in the middle of equal stretches of the source are taken:
    the same ones at every evaluation and on every machine.

    Args:
        tokens: Length of the source, at least 2.
        sequence_length: T, tokens scored per window.
        max_tokens: Upper limit of tokens scored, from T up; None for all.
    Returns:
        starts_N and tokens_N: position of each window's first input token, increasing, and the tokens it scores, which
        are all of the window but that one; int64.
    """
    count = -(-(tokens - 1) // sequence_length)
    take = count if max_tokens is None else min(count, max(1, max_tokens // sequence_length))
    chosen_N = (2 * np.arange(take, dtype=np.int64) + 1) * count // (2 * take)
    starts_N = chosen_N * sequence_length
    return starts_N, np.minimum(sequence_length, tokens - 1 - starts_N)


def evaluate_source(
    model: nn.Module,
    source: Source,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    device: torch.device | str = "cpu",
    distributed: bool = False,
) -> SetResult:
    """Score a model on a source.

        nats_per_token = sum_t -log p(x_t | x_<t) / tokens          bits_per_byte = sum_t -log2 p(x_t | x_<t) / bytes

    over the windows of `windows_of`. Log-probabilities are taken in float32, sums in float64. `bytes` is the source's
    own count when every token is scored (its first token has no prediction: its bytes are counted, its loss is not) and
    the source's bytes per token times the scored tokens when `max_tokens` left some out.

    The model is put in evaluation mode, run without gradient, and every module's mode is put back afterwards.

    Args:
        model: Causal language model whose output has `.logits`, as those of Hugging Face (bare, or wrapped by
            accelerate), routed and gated ones have; logits may be log-probabilities.
        source: Held-out tokens.
        sequence_length: T, tokens scored per window.
        batch_size: Windows per forward pass.
        max_tokens: Upper limit of tokens scored (at least one window is); None for all.
        device: Device of the model.
        distributed: Whether every rank of the default process group calls this and scores its share; all get the same
            result. Without a process group it changes nothing.
    Raises:
        ConfigError: `sequence_length`, `batch_size` or `max_tokens` is below 1.
        DataError: the source has fewer than two tokens.
        NumericsError: the model's loss is not a number.
    """
    check_sizes(1, sequence_length=sequence_length, batch_size=batch_size, max_tokens=max_tokens)
    if len(source) < 2:
        raise DataError(f"a held-out set of {len(source)} tokens cannot be scored; it needs at least 2")
    starts_N, tokens_N = windows_of(len(source), sequence_length, max_tokens)

    def nats_of(chosen_B: NDArray[np.int64]) -> Tensor:
        read_BT1 = source.read_many(starts_N[chosen_B], int(tokens_N[chosen_B[0]]) + 1)
        return token_losses(model, torch.from_numpy(read_BT1).to(device)).cpu().double().sum(dim=1)

    batches = []
    for length in np.unique(tokens_N)[::-1]:
        same_N = np.flatnonzero(tokens_N == length)
        batches += [same_N[first : first + batch_size] for first in range(0, len(same_N), batch_size)]
    nats_N = scored_in_batches(model, batches, nats_of, "windows", device=device, distributed=distributed)
    scored = int(tokens_N.sum())
    size = int(getattr(source, "bytes", 0))
    scored_bytes = size if scored == len(source) - 1 else size / len(source) * scored
    scores = WindowScores(source.fingerprint, starts_N, tokens_N, nats_N, scored_bytes / scored)
    return SetResult.of(scores, round(scored_bytes))


def evaluate_examples(
    model: nn.Module,
    examples: Examples,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    device: torch.device | str = "cpu",
    distributed: bool = False,
) -> SetResult:
    """Score a model on the targets of examples; arguments and errors as those of `evaluate_source`.

        nats_per_token = sum over targets of -log p(target | prompt) / target tokens
        bits_per_byte  = the same sum in bits / UTF-8 bytes of the targets

    The end-of-document token of a target is one of its tokens. Each example counts as one window of `WindowScores`,
    started at its number. Examples are cut to `sequence_length` as in training (`fitted`); of a target that is cut, as
    many bytes count as its share of tokens. About `max_tokens` target tokens are scored, of evenly spaced examples.
    `model` may be an encoder-decoder too.
    """
    check_sizes(2, sequence_length=sequence_length)
    check_sizes(1, batch_size=batch_size, max_tokens=max_tokens)
    if len(examples) == 0:
        raise DataError("a held-out set holds no example; there is nothing to score")
    prompted = PromptedExamples(examples, sequence_length, is_encoder_decoder(model))
    chosen_N = prompted.evenly(max_tokens)
    rows = prompted.rows(chosen_N)
    nats_N = prompted_nats(model, rows, batch_size, "examples", device=device, distributed=distributed)
    tokens_N, size = prompted.targets_N[chosen_N], float(prompted.bytes_N[chosen_N].sum())
    return SetResult.of(
        WindowScores(examples.fingerprint, chosen_N, tokens_N, nats_N, size / int(tokens_N.sum())), round(size)
    )


def prompted_nats(
    model: nn.Module,
    rows: Sequence[Prompted],
    batch_size: int,
    what: str,
    *,
    device: torch.device | str,
    distributed: bool = False,
) -> NDArray[np.float64]:
    """The loss of each row's target after its prompt, nats.

    Batches are padded on the right with an attention mask, and sorted by length. A model whose attribute
    `accepts_routing_mask` is True also gets `routing_mask`, routing_mask_BT of the shape of the prompt's ids: True on
    the tokens of the prompt, False on target and padding, so that a router of whole sequences decides by the prompt
    alone.
    """
    encoder = is_encoder_decoder(model)
    batches = [np.array(each) for each in batches_by_length(rows, batch_size, encoder=encoder)]

    def nats_of(batch_B: NDArray[np.int64]) -> Tensor:
        return target_nats(model, [rows[index] for index in batch_B], torch.device(device), encoder=encoder)

    return scored_in_batches(model, batches, nats_of, what, device=device, distributed=distributed)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; put each submodule's own mode back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_sizes(least: int, **sizes: int | None) -> None:
    """Refuse sizes below `least`; None is no limit.

    Raises:
        ConfigError: a size is too small.
    """
    for name, value in sizes.items():
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}")


def scored_in_batches(
    model: nn.Module,
    batches: Sequence[NDArray[np.int64]],
    nats_of: Callable[[NDArray[np.int64]], Tensor],
    what: str,
    *,
    device: torch.device | str,
    distributed: bool,
) -> NDArray[np.float64]:
    """The loss of everything that some batches of indices 0 .. N - 1 name, in evaluation mode and without gradient.

    Args:
        model: Model whose modules get their modes back.
        batches: Indices, each once.
        nats_of: Function that gives the losses of a batch, nats.
        what: What is scored, for messages.
        device: Device of the model.
        distributed: As in `evaluate_source`.
    Returns:
        nats_N: float64.
    Raises:
        NumericsError: a loss is not a number.
    """
    together = distributed and dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    nats_N = np.zeros(sum(map(len, batches)), dtype=np.float64)
    with evaluation_mode(model), torch.inference_mode():
        # A sharded model's forward pass is a collective: a rank that runs out repeats a batch that does not count.
        for place in range(rank, -(-len(batches) // world_size) * world_size, world_size):
            follow_load()
            batch_B = batches[min(place, len(batches) - 1)]
            nats_B = nats_of(batch_B).double().cpu().numpy()
            if place < len(batches):
                nats_N[batch_B] = nats_B
    if together:  # each loss is non-zero on one rank alone, so the sum is exact
        total_N = torch.from_numpy(nats_N).to(device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(total_N)
        nats_N = total_N.cpu().numpy()
    if np.isnan(nats_N).any():
        raise NumericsError(
            f"the loss is not a number on {int(np.isnan(nats_N).sum())} of {len(nats_N)} held-out {what}; "
            "the model's weights or its log-probabilities hold NaN"
        )
    return nats_N
