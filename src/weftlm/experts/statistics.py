"""Statistics of an expert's own data: mean module inputs, embeddings, and counts of tokens and token pairs.

Collected on the expert's data alone, without its labels or any other text, for routers that need no gate. Texts are
embedded by hashing their token ids, so that a model can embed its input without a tokenizer at hand.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from weftlm.corpora.examples import examples_of
from weftlm.corpora.source import Source
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.experts.adapted import adapted, module_input, unchanged
from weftlm.experts.examples import prompted_examples
from weftlm.experts.expert import LoRAExpert, Statistics
from weftlm.models.prompted import (
    IGNORED,
    Prompted,
    PromptedInputs,
    batches_by_length,
    is_encoder_decoder,
    model_arguments,
    prompted_inputs,
)
from weftlm.threads import follow_load

log = logging.getLogger(__name__)

BIGRAM_BUCKETS = 65536

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_ALL_BUT_SIGN = 0x7FFFFFFFFFFFFFFF
_UNIGRAM, _BIGRAM = 1, 2  # keys of hash functions that never meet


class _Batch(NamedTuple):
    """One forward pass: its inputs, and by shape (the encoder's or the decoder's) true where there is no padding."""

    inputs: PromptedInputs
    arguments: dict[str, Any]
    masks: dict[tuple[int, ...], Tensor]


def collect_statistics(
    model: nn.Module,
    expert: LoRAExpert,
    source: Source,
    *,
    examples: int = 1000,
    sequence_length: int,
    seed: int,
    batch_sequences: int = 16,
    embedder: str = "tokens-1024",
) -> Statistics:
    """Describe a source as one expert reads it.

        mean_m = 1/N sum_n 1/T sum_t u_m[n, t]

    for every adapted module m, over N windows of T tokens drawn without replacement from the windows the source is cut
    into, in a model with this expert switched on, in evaluation mode. Sums are float64. Windows, embeddings and counts
    are a function of the source and the seed alone. The model is left exactly as it was.

    Of a source of examples, N of them are drawn instead of windows and cut to T; padding enters nothing, and embeddings
    are of the prompts alone, which is what a query has too.

    Args:
        model: Causal language model, or an encoder-decoder for examples; bare, on the device to use.
        expert: Adapter.
        source: Its training tokens.
        examples: N, fewer where the source holds fewer windows.
        sequence_length: T.
        seed: Random seed of the draw.
        batch_sequences: Windows per forward pass.
        embedder: `tokens-F`, `embed_tokens` of width F.
    Returns:
        Statistics. facts: examples, tokens, sequence_length, data (the source's fingerprint), seed, and unreached: the
        modules no token came to (in a mixture-of-experts layer), whose means are zero.
    Raises:
        ConfigError: a size is below 1.
        DataError: the source is shorter than one window, or holds ids the model has no embedding for.
        ExpertError: the expert does not fit the model.
        NumericsError: a module's mean input is not finite.
    """
    if min(examples, sequence_length, batch_sequences) < 1:
        raise ConfigError(
            f"examples is {examples}, sequence_length {sequence_length}, batch_sequences {batch_sequences}; each must "
            f"be at least 1"
        )
    width = int(embedder.removeprefix("tokens-"))
    device = next(model.parameters()).device
    held, encoder = examples_of(source), is_encoder_decoder(model)
    if held is not None:
        prompted = prompted_examples(model, held, sequence_length, expert.name)
        rows = prompted.rows(_draw(len(held), examples, seed))
    else:
        rows = [Prompted(window_T, window_T[:0]) for window_T in _windows(source, examples, sequence_length, seed)]
    batches = [
        _batch(model, [rows[index] for index in batch_B], device, encoder)
        for batch_B in batches_by_length(rows, batch_sequences, encoder=encoder)
    ]
    # The text of an example is its prompt and target; for an encoder-decoder they are two texts.
    texts = [torch.from_numpy(part) for row in rows for part in (row if encoder else [np.concatenate(row)])]
    vocabulary, all_N = int(model.get_input_embeddings().weight.shape[0]), torch.cat(texts)  # type: ignore[operator]
    if int(all_N.max()) >= vocabulary:
        raise DataError(
            f"the source holds token id {int(all_N.max())} and the model embeds {vocabulary}; tokenise the text "
            f"with the model's own tokenizer"
        )
    means = _mean_inputs(model, expert, batches)
    if unreached := [name for name, mean_I in means.items() if mean_I is None]:
        log.warning("expert %s: %d modules saw no token, %s first", expert.name, len(unreached), unreached[0])
    pairs = [bigram_bucket(text_T[:-1], text_T[1:], BIGRAM_BUCKETS) for text_T in texts]
    embedded = [embed_tokens(inputs.tokens_BT, width=width, mask_BT=inputs.prompt_mask_BT) for inputs, *_ in batches]
    return Statistics(
        means={
            name: torch.zeros(expert.modules[name].widths[0]) if mean_I is None else mean_I
            for name, mean_I in means.items()
        },
        embeddings_NF=torch.cat(embedded),
        embedder=embedder,
        token_counts_V=torch.bincount(all_N, minlength=vocabulary),
        bigram_counts_K=torch.bincount(torch.cat(pairs), minlength=BIGRAM_BUCKETS),
        facts={
            "examples": len(rows),
            "tokens": len(all_N),
            "sequence_length": sequence_length,
            "data": source.fingerprint,
            "seed": seed,
            "unreached": unreached,
        },
    )


@torch.no_grad()
def _mean_inputs(model: nn.Module, expert: LoRAExpert, batches: list[_Batch]) -> dict[str, Tensor | None]:
    """Mean input of each adapted module, float32 on the CPU; None where no token came to it."""
    with unchanged(model), adapted(model, expert), ExitStack() as stack:
        model.eval()
        sums = {name: _InputMean() for name in expert.modules}
        for name, mean in sums.items():
            hook = model.get_submodule(name).register_forward_pre_hook(mean, with_kwargs=True)
            stack.callback(hook.remove)
        for batch in batches:
            follow_load()
            for mean in sums.values():
                mean.batch = batch
            model(**batch.arguments)
    found: dict[str, Tensor | None] = dict.fromkeys(sums)
    for name, mean in sums.items():
        if mean.sum_I is not None:
            found[name] = mean_I = (mean.sum_I.cpu() / mean.count).float()
            if not torch.isfinite(mean_I).all():
                raise NumericsError(
                    f"expert {expert.name!r}: the mean input of {name} is not finite; the model overflows"
                )
    return found


class _InputMean:
    """A forward pre-hook: the mean over examples of the mean over tokens of a module's input.

    Where a module sees tokens without their examples (a mixture-of-experts layer), its mean is over tokens, batch by
    batch.
    """

    def __init__(self) -> None:
        self.batch: _Batch
        self.sum_I: Tensor | None = None
        self.count = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        u_XI, examples = module_input(args, kwargs), len(self.batch.inputs.tokens_BT)
        if u_XI.numel() == 0:
            return
        rows = examples if u_XI.ndim > 2 and u_XI.shape[0] == examples else 1
        mask_BT = self.batch.masks.get(tuple(u_XI.shape[:-1]))
        if mask_BT is None:
            mean_BI = u_XI.reshape(rows, -1, u_XI.shape[-1]).mean(dim=1, dtype=torch.float64)
        else:
            kept_BTI = u_XI.double().masked_fill(~mask_BT[..., None], 0.0)
            mean_BI = kept_BTI.sum(dim=1) / mask_BT.sum(dim=1, keepdim=True)
        total_I = mean_BI.sum(dim=0) * (examples // rows)
        self.sum_I = total_I if self.sum_I is None else self.sum_I + total_I
        self.count += examples


def _draw(held: int, wanted: int, seed: int) -> Any:
    """Numbers of up to `wanted` of the windows or examples, drawn by the seed, increasing."""
    generator = np.random.default_rng(seed)
    return np.sort(generator.choice(held, size=min(wanted, held), replace=False, shuffle=False)).astype(np.int64)


def _windows(source: Source, examples: int, length: int, seed: int) -> NDArray[np.int64]:
    """Up to `examples` of the windows 0 .. T, T .. 2T, ... of a source, drawn by the seed: tokens_NT."""
    held = len(source) // length
    if held < 1:
        raise DataError(f"the source has {len(source)} tokens; statistics need one window of {length}")
    return source.read_many(_draw(held, examples, seed) * length, length)


def _batch(model: nn.Module, rows: Sequence[Prompted], device: torch.device, encoder: bool) -> _Batch:
    inputs = prompted_inputs(rows, encoder=encoder)
    arguments = model_arguments(model, inputs, device)
    masks = [inputs.mask_BT.to(device)]
    if encoder:
        if arguments["labels"].shape == inputs.tokens_BT.shape:  # masks are told apart by their shapes
            arguments["labels"] = F.pad(arguments["labels"], (0, 1), value=IGNORED)
        masks.append(arguments["labels"] != IGNORED)
    return _Batch(inputs, arguments, {tuple(mask.shape): mask for mask in masks})


# -- embedding windows of tokens ----------------------------------------------------------------------------------


def embed_tokens(tokens_BT: Tensor, *, width: int = 1024, mask_BT: Tensor | None = None) -> Tensor:
    """Embed windows of token ids by signed feature hashing of their unigrams and bigrams.

        x_f = sum over features i of the window with bucket(i) = f of sign(i)
        e   = normalise(sign(x) log(1 + |x|))

    A feature is an id, or a pair of neighbouring ids; bucket and sign are bits of a fixed integer hash, so a window has
    the same embedding on every machine and in every batch. The logarithm keeps frequent tokens from drowning the rest.
    Weinberger et al. 2009, "Feature hashing for large scale multitask learning", arXiv:0902.2206.

    Args:
        tokens_BT: int64 ids.
        width: F.
        mask_BT: true (or 1) where there is a token; a pair counts where both of its tokens do. None: everywhere.
    Returns:
        e_BF: unit rows, float32, on the device of the tokens; a row without tokens is zero.
    """
    valid_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    ones_BT = _mix(tokens_BT.long() + _signed(_UNIGRAM * _GOLDEN))
    pairs_BT = _pair(tokens_BT[:, :-1], tokens_BT[:, 1:])
    hashes_BN = torch.cat([ones_BT, pairs_BT], dim=1)
    counted_BN = torch.cat([valid_BT, valid_BT[:, :-1] & valid_BT[:, 1:]], dim=1)
    signs_BN = torch.where(hashes_BN < 0, -1.0, 1.0).double() * counted_BN
    buckets_BN = _magnitude(hashes_BN) % width
    x_BF = torch.zeros(len(tokens_BT), width, dtype=torch.float64, device=tokens_BT.device)
    x_BF.scatter_add_(1, buckets_BN, signs_BN)
    e_BF = x_BF.sign() * x_BF.abs().log1p()
    lengths_B1 = torch.linalg.vector_norm(e_BF, dim=1, keepdim=True)
    unit_BF: Tensor = (e_BF / lengths_B1.clamp_min(1e-12)).float()
    return unit_BF


def bigram_bucket(previous: Tensor, next: Tensor, buckets: int = BIGRAM_BUCKETS) -> Tensor:
    """The bucket, 0 .. buckets - 1, in which a pair of neighbouring token ids is counted.

    Args:
        previous: int64 ids.
        next: the ids after them, of the same shape.
        buckets: K.
    Returns:
        int64, of that shape; the same on every machine.
    """
    return _magnitude(_pair(previous, next)) % buckets


def _pair(previous: Tensor, following: Tensor) -> Tensor:
    """A 64-bit hash of an ordered pair."""
    return _mix(_mix(previous.long() + _signed(_BIGRAM * _GOLDEN)) + following.long())


def _magnitude(hashes: Tensor) -> Tensor:
    """The hash without its sign bit, which `embed_tokens` uses up; not negative."""
    return hashes & _ALL_BUT_SIGN


def _mix(x: Tensor) -> Tensor:
    """The 64-bit finaliser of splitmix64 (Steele, Lea and Flood 2014), on int64 with wrap-around."""
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Right shift that brings in zeros, as on unsigned integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
