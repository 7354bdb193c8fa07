"""Routed and gated models take what the models they are made of take, and refuse what would leave experts out."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.experts import gpt2, llama, make_pool, prompts, t5
from support.gated import mixed_pool
from support.routing import inputs_for, logits
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextStreamer,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria

from weftlm.errors import ConfigError
from weftlm.gating.bayes import BayesGate
from weftlm.gating.modular_lm import ModularLM
from weftlm.routing import routed_model
from weftlm.routing.routed_model import NotRoutedError, RoutedModel

IDS = prompts(2, 6)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
MODELS: dict[str, Callable[[], Any]] = {
    "base": llama,
    "routed": lambda: RoutedModel(llama(), make_pool(llama(), 2)),
    "routed by the prompt": lambda: RoutedModel(llama(), make_pool(llama(), 2), "retrieval"),
    "gated": lambda: ModularLM(mixed_pool(), BayesGate.of([0.25] * 4)),
}
BUILT: dict[str, Any] = {}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """Every kind of model, built once; the base is there to show that it takes the same."""
    if request.param not in BUILT:
        BUILT[request.param] = MODELS[request.param]()
    return BUILT[request.param]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: llama().config.vocab_size]
    made = Tokenizer(BPE({letter: place for place, letter in enumerate(letters)}, []))
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


# -- generate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": LEFT},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
        {"min_new_tokens": 4, "eos_token_id": 3, "pad_token_id": 0},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]]},
        {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(2.0)])},
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(8)])},
        {"prefix_allowed_tokens_fn": lambda row, ids: [7, 8]},
        {"use_cache": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_generate_takes_what_the_base_takes(model: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    found = model.generate(IDS, **{"max_new_tokens": 4, **options})
    rows = 2 * options.get("num_return_sequences", 1)
    assert found.shape == (rows, 8 if "stopping_criteria" in options else 10)
    assert torch.equal(found[:, :6], IDS.repeat_interleave(rows // 2, dim=0))
    if "prefix_allowed_tokens_fn" in options:
        assert set(found[:, 6:].flatten().tolist()) <= {7, 8}


def test_generate_stops_at_strings_and_streams(model: Any) -> None:
    words = tokenizer()
    free = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    stop = words.decode([int(free[0, 7])])
    found = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, stop_strings=[stop], tokenizer=words)
    assert torch.equal(found[0], free[0, : found.shape[1]])
    assert stop in words.decode(found[0, 6:])
    assert found.shape[1] <= 8
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        model.generate(IDS[:1], max_new_tokens=6, do_sample=False, streamer=TextStreamer(words))
    assert heard.getvalue().rstrip("\n") == words.decode(free[0])


def test_generate_gives_scores_and_logits(model: Any) -> None:
    found = model.generate(
        IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert len(found.scores) == len(found.logits) == 3
    transitions = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    assert transitions.shape == (2, 3)
    assert torch.equal(torch.stack(found.logits, dim=1).argmax(-1), found.sequences[:, 6:])
    assert found.past_key_values.get_seq_length() == 8


# -- forward ------------------------------------------------------------------------------------------------------


def test_forward_gives_tuples_losses_and_caches(model: Any) -> None:
    with torch.no_grad():
        whole = model(IDS, attention_mask=torch.ones_like(IDS), labels=IDS)
        given = model(input_ids=IDS, labels=IDS, use_cache=True, return_dict=False)
        expected = nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        torch.testing.assert_close(whole.loss, expected)
        assert isinstance(given, tuple)
        torch.testing.assert_close(given[0], whole.loss)
        torch.testing.assert_close(given[1], whole.logits, atol=2e-5, rtol=1e-5)
        one = model(IDS[:, :1], past_key_values=given[2], use_cache=True, return_dict=False)
        again = model(torch.cat([IDS, IDS[:, :1]], dim=1), use_cache=False, logits_to_keep=1)
    if model is not BUILT.get("routed by the prompt"):  # which reads another prompt where the whole text is given
        torch.testing.assert_close(one[0], again.logits, atol=2e-5, rtol=1e-4)
    assert again.logits.shape == (2, 1, model.config.vocab_size)


def test_forward_gives_hidden_states_or_says_why_not(model: Any) -> None:
    if isinstance(model, ModularLM):
        for name in ("output_hidden_states", "output_attentions"):
            with pytest.raises(ConfigError, match=f"{name}: each expert has its own"):
                model(IDS, **{name: True})
        with pytest.raises(ConfigError, match="output_hidden_states: each expert"):
            model.generate(IDS, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True)
        with pytest.raises(ConfigError, match="embeddings of their own; pass input_ids"):
            model(inputs_embeds=torch.zeros(2, 6, 32))
    else:
        found = model(IDS, output_hidden_states=True).hidden_states
        assert len(found) == model.config.num_hidden_layers + 1


# -- the decoder alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["phatgoose", "retrieval", "prefix", "merged"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_decoder_alone_gives_what_it_gives_inside(make: Callable[[], Any], router: str) -> None:
    routed = RoutedModel(make(), make_pool(make(), 3), router)
    with torch.no_grad():
        outer = routed(IDS, attention_mask=LEFT, output_hidden_states=True, use_cache=True)
        for part in (routed.get_decoder(), routed.base_model):
            inner = part(IDS, attention_mask=LEFT, use_cache=True)
            assert torch.equal(inner.last_hidden_state, outer.hidden_states[-1])
            assert torch.equal(routed.get_output_embeddings()(inner.last_hidden_state), outer.logits)
        mask_BT = torch.cat([LEFT, torch.ones(2, 1, dtype=torch.int64)], dim=1)
        after = [
            each(IDS[:, :1], attention_mask=mask_BT, past_key_values=cache, output_hidden_states=True).hidden_states
            for each, cache in ((routed, outer.past_key_values), (part, inner.past_key_values))
        ]
        assert torch.equal(after[0][-1], after[1][-1])
        with routed.disabled():
            base = part(IDS, attention_mask=LEFT).last_hidden_state
    assert not torch.allclose(base, inner.last_hidden_state, atol=1e-3)


@pytest.mark.parametrize("router", ["phatgoose", "retrieval"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_encoder_and_decoder_alone_give_what_they_give_inside(router: str, return_dict: bool) -> None:
    routed = RoutedModel(t5(), make_pool(t5(), 3), router)
    given = inputs_for(routed)
    with torch.no_grad():
        outer = routed(**given, output_hidden_states=True)
        encoded = routed.get_encoder()(given["input_ids"], return_dict=return_dict)[0]
        assert torch.equal(encoded, outer.encoder_last_hidden_state)
        inner = routed.get_decoder()(given["decoder_input_ids"], encoder_hidden_states=encoded, return_dict=return_dict)
        assert torch.equal(inner[0], outer.decoder_hidden_states[-1])


def test_a_layer_called_by_itself_is_refused() -> None:
    routed = RoutedModel(llama(), make_pool(llama(), 2))
    linear = routed.model.get_submodule("model.layers.0.self_attn.q_proj")
    with pytest.raises(ConfigError, match=r"q_proj was called outside a forward pass .*get_decoder"):
        linear(torch.zeros(1, 2, 32))
    with routed.disabled():
        assert torch.equal(linear(torch.ones(1, 2, 32)), torch.ones(1, 2, 32) @ linear.weight.T)


# -- what a model is asked ----------------------------------------------------------------------------------------


def test_sizes_count_bases_and_experts() -> None:
    routed, gated = MODELS["routed"](), MODELS["gated"]()
    factors = [expert.lora for expert in routed.experts]
    more = sum(each.A_RI.numel() + each.B_OR.numel() for lora in factors for each in lora.modules.values())
    assert routed.num_parameters() == llama().num_parameters() + more
    assert routed.num_parameters(exclude_embeddings=True) == llama().num_parameters(exclude_embeddings=True) + more
    assert routed.num_parameters(only_trainable=True) == llama().num_parameters(only_trainable=True)
    adapters = [member.lora for member in gated.pool.members if member.lora is not None]
    more = sum(each.A_RI.numel() + each.B_OR.numel() for lora in adapters for each in lora.modules.values())
    assert gated.num_parameters() == 2 * llama().num_parameters() + more + len(gated.gate.tensors["logits_E"])
    assert gated.num_parameters(only_trainable=True) == 0
    for model, bases in ((routed, 1), (gated, 2)):
        assert model.get_memory_footprint() >= bases * llama().get_memory_footprint() + 4 * more
    assert routed.get_memory_footprint(return_buffers=False) > llama().get_memory_footprint(return_buffers=False)


def test_every_method_of_the_base_is_routed_passed_on_or_refused_with_what_to_do() -> None:
    model = llama()
    routed = RoutedModel(model, make_pool(llama(), 2))
    cls = type(model)
    public = [name for name in dir(cls) if not name.startswith("_") and not hasattr(nn.Module, name)]
    names = [name for name in public if callable(getattr(cls, name))]
    assert len(names) > 60
    for name in names:
        if hasattr(RoutedModel, name):
            continue
        if name in routed_model._OF_BASE:
            assert getattr(routed, name) == getattr(model, name)
            continue
        assert not hasattr(routed, name)
        way = rf"save_pretrained\(folder\) and upload.*base = routed.unload\(\).*call .model.{name}"
        with pytest.raises(NotRoutedError, match=f"RoutedModel has no '{name}': .*{way}"):
            getattr(routed, name)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        _ = routed.no_such_thing


# -- saving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["routed", "gated"])
def test_saving_takes_what_the_base_takes(kind: str, tmp_path: Path) -> None:
    model: Any = MODELS[kind]()
    copy = {"copy_base": True} if kind == "routed" else {"copy_experts": True}
    model.save_pretrained(tmp_path / "nothing", is_main_process=False, **copy)
    assert not (tmp_path / "nothing").exists()
    model.save_pretrained(save_directory=tmp_path / "made", max_shard_size="20KB", safe_serialization=True, **copy)
    indices = list((tmp_path / "made").rglob("model.safetensors.index.json"))
    assert len(indices) == (1 if kind == "routed" else 2)
    assert len(set(json.loads(indices[0].read_text())["weight_map"].values())) > 1
    back = type(model).from_pretrained(tmp_path / "made")
    torch.testing.assert_close(logits(back, input_ids=IDS), logits(model, input_ids=IDS))
    with pytest.raises(ConfigError, match="does not upload this model: write it with save_pretrained"):
        model.save_pretrained(tmp_path / "other", push_to_hub=True, **copy)
    with pytest.raises(ConfigError, match="takes no state_dict"):
        model.save_pretrained(tmp_path / "other", state_dict={"a": torch.zeros(1)}, **copy)
    assert not (tmp_path / "other").exists()
    if kind == "gated":
        with pytest.raises(ConfigError, match="upload that folder"):
            model.push_to_hub("me/mine")
