"""Score a model on held-out examples: what it makes of each target after its prompt."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weftlm.corpora.examples import Examples
from weftlm.errors import DataError
from weftlm.evaluation.perplexity import check_sizes, scored_in_batches
from weftlm.evaluation.result import SetResult, WindowScores, set_result
from weftlm.models.language_model import LanguageModel
from weftlm.models.prompted import batches_by_length, is_encoder_decoder, target_nats
from weftlm.models.prompted_examples import PromptedExamples


def evaluate_examples(
    model: nn.Module | LanguageModel,
    examples: Examples,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    device: torch.device | str = "cpu",
    per_window: bool = False,
    distributed: bool = False,
) -> SetResult:
    """Score a model on the targets of examples.

        nats_per_token = sum over targets of -log p(target | prompt) / target tokens
        bits_per_byte  = the same sum in bits / UTF-8 bytes of the targets

    The end-of-document token of a target is one of its tokens. Each example counts as one window of `WindowScores`,
    started at its number. Examples are cut as in training (`fitted`); of a target that is cut, as many bytes count as
    its share of tokens. A model that accepts a `routing_mask` is told where the prompts are, so that who routes whole
    sequences decides by the prompt alone.

    Args:
        model: a Hugging Face causal or encoder-decoder language model, bare or wrapped, or a `LanguageModel`.
        examples: held out.
        sequence_length: T, to which examples are cut.
        batch_size: examples per forward pass.
        max_tokens: about so many target tokens are scored, of evenly spaced examples; None for all.
        device: where the model lives.
        per_window: keep each example's loss, for `paired_difference`.
        distributed: every rank of the default process group calls this and scores its share; all get the same result.
    Raises:
        ConfigError: a size is too small.
        DataError: there is no example.
        NumericsError: the model's loss is not a number.
    """
    check_sizes(2, sequence_length, batch_size, max_tokens)
    if len(examples) == 0:
        raise DataError("a held-out set holds no example; there is nothing to score")
    encoder = is_encoder_decoder(model)
    prompted = PromptedExamples(examples, sequence_length, encoder)
    chosen_N = prompted.evenly(max_tokens)
    rows = prompted.rows(chosen_N)
    equal = isinstance(model, LanguageModel)
    batches = [np.array(each) for each in batches_by_length(rows, batch_size, encoder=encoder, equal_lengths=equal)]

    def nats_of(batch_B: NDArray[np.int64]) -> Tensor:
        return target_nats(model, [rows[index] for index in batch_B], torch.device(device), encoder=encoder)

    nats_N = scored_in_batches(model, batches, nats_of, "examples", device=device, distributed=distributed)
    tokens_N, size = prompted.targets_N[chosen_N], float(prompted.bytes_N[chosen_N].sum())
    scores = WindowScores(examples.fingerprint, chosen_N, tokens_N, nats_N, size / int(tokens_N.sum()))
    return set_result(scores, round(size), keep_windows=per_window)
