"""Score a model on held-out examples: what it makes of each target after its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weftlm.corpora.examples import Examples
from weftlm.errors import DataError
from weftlm.evaluation.perplexity import check_sizes, scored_in_batches
from weftlm.evaluation.result import SetResult, WindowScores
from weftlm.models.language_model import LanguageModel
from weftlm.models.prompted import Prompted, PromptedExamples, batches_by_length, is_encoder_decoder, target_nats


def evaluate_examples(
    model: nn.Module | LanguageModel,
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
    model: nn.Module | LanguageModel,
    rows: Sequence[Prompted],
    batch_size: int,
    what: str,
    *,
    device: torch.device | str,
    distributed: bool = False,
) -> NDArray[np.float64]:
    """The loss of each row's target after its prompt, nats.

    Torch modules get batches padded on the right with an attention mask, sorted by length; a `LanguageModel`, which
    takes no mask, gets batches of equal lengths. A model whose attribute `accepts_routing_mask` is True also gets
    `routing_mask`, routing_mask_BT of the shape of the prompt's ids: True on the tokens of the prompt, False on target
    and padding, so that a router of whole sequences decides by the prompt alone.
    """
    encoder, equal = is_encoder_decoder(model), isinstance(model, LanguageModel)
    batches = [np.array(each) for each in batches_by_length(rows, batch_size, encoder=encoder, equal_lengths=equal)]

    def nats_of(batch_B: NDArray[np.int64]) -> Tensor:
        return target_nats(model, [rows[index] for index in batch_B], torch.device(device), encoder=encoder)

    return scored_in_batches(model, batches, nats_of, what, device=device, distributed=distributed)
