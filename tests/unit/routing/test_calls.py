"""What a router is told of a pass, from the arguments of the model's forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from weftlm.errors import ConfigError
from weftlm.routing.calls import decoder_call, encoder_call, encoder_decoder_call, remember

IDS = torch.arange(6).view(2, 3)


def test_without_a_mask_every_token_is_real() -> None:
    call = decoder_call({"input_ids": IDS}, None)
    assert call.input_ids_BT is IDS
    assert call.mask_BT.tolist() == call.decisive_BT.tolist() == [[True] * 3] * 2
    assert not call.continues
    assert not call.memory.tensors
    assert decoder_call({"input_ids": IDS, "attention_mask": torch.zeros(2, 1, 3, 3)}, None).mask_BT.all()
    embedded = decoder_call({"inputs_embeds": torch.zeros(2, 3, 8)}, None)
    assert embedded.input_ids_BT is None
    assert embedded.mask_BT.shape == (2, 3)
    with pytest.raises(ConfigError, match="neither input_ids nor inputs_embeds"):
        decoder_call({}, None)


def test_a_routing_mask_tells_only_real_tokens() -> None:
    mask_BT = torch.tensor([[0, 1, 1], [1, 1, 1]])
    call = decoder_call({"input_ids": IDS, "attention_mask": mask_BT}, torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert call.mask_BT.tolist() == [[False, True, True], [True, True, True]]
    assert call.decisive_BT.tolist() == [[False, True, False], [True, False, False]]
    with pytest.raises(ConfigError, match=r"routing_mask has shape \(2, 2\)"):
        decoder_call({"input_ids": IDS}, torch.ones(2, 2))


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (3, 3)])
def test_a_mask_that_does_not_cover_the_tokens_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"for 2 sequences of 3 tokens; it must cover them"):
        decoder_call({"input_ids": IDS, "attention_mask": torch.ones(shape)}, None)


def filled_cache(batch: int, tokens: int) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(batch, 1, tokens, 4), torch.zeros(batch, 1, tokens, 4), 0)
    return cache


def test_a_continued_pass_brings_its_memory_and_the_end_of_the_mask() -> None:
    cache = filled_cache(1, 4)
    began = decoder_call({"input_ids": IDS[:1]}, None)
    began.memory.tensors["choice"] = torch.tensor([7])
    remember(began, BaseModelOutputWithCache(cache))
    mask_BT = torch.tensor([[0, 1, 1, 1, 1, 0, 1]])
    call = decoder_call({"input_ids": IDS[:1], "attention_mask": mask_BT, "past_key_values": cache}, None)
    assert call.continues
    assert call.mask_BT.tolist() == [[True, False, True]]
    assert call.memory.tensors["choice"].tolist() == [7]
    repeated = decoder_call({"input_ids": IDS, "past_key_values": cache}, None)
    assert repeated.memory.tensors["choice"].tolist() == [7, 7]
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("kind", ["bool", "float", "by layer"])
def test_in_a_mask_per_pair_of_tokens_real_ones_see_themselves(kind: str, past: int) -> None:
    real_BT = torch.tensor([[False, True, True], [True, True, True]])
    causal_TK = torch.ones(3, 8, dtype=torch.bool).tril(past)
    seen_BTK = causal_TK.expand(2, 3, 8).clone()
    seen_BTK[:, :, past : past + 3] &= real_BT[:, None]
    mask: Any = seen_BTK[:, None]
    if kind == "float":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    given = {
        "input_ids": IDS,
        "attention_mask": {"full_attention": mask} if kind == "by layer" else mask,
        "past_key_values": filled_cache(2, past) if past else None,
    }
    assert torch.equal(decoder_call(given, None).mask_BT, real_BT)


class BaseModelOutputWithCache:
    """An output with a cache and nothing else."""

    def __init__(self, cache: DynamicCache) -> None:
        self.past_key_values = cache


def test_what_an_encoder_decided_travels_with_its_output() -> None:
    began = encoder_call({"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, None)
    assert began.mask_BT.tolist() == [[True, True, False], [True, True, True]]
    began.memory.tensors["choice"] = torch.tensor([3, 4])
    output = BaseModelOutput(last_hidden_state=torch.zeros(2, 3, 8))
    remember(began, output)
    call = encoder_decoder_call(
        {"encoder_outputs": output, "decoder_input_ids": torch.zeros(2, 5, dtype=torch.int64)}, None
    )
    assert call.continues
    assert call.input_ids_BT is None
    assert call.memory.tensors["choice"].tolist() == [3, 4]
    output.last_hidden_state = torch.zeros(4, 3, 8)
    beams = encoder_decoder_call({"encoder_outputs": output}, None)
    assert beams.memory.tensors["choice"].tolist() == [3, 3, 4, 4]
