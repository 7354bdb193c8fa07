"""One expert on for a while, and a model left as it was."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_expert import DOWN, LENGTH, VOCAB, Fingerprint, V, llama, random_expert

from weftlm.errors import ExpertError
from weftlm.experts.adapted import adapted, unchanged


def test_an_adapted_model_is_the_model_with_the_product_added_to_its_weights() -> None:
    model, merged = llama().double(), llama().double()
    expert = random_expert(model)
    for name, factors in expert.modules.items():
        delta = factors.scale * factors.B_OR.double() @ factors.A_RI.double()
        merged.get_submodule(name).weight.data += delta
    tokens = torch.randint(VOCAB, (3, LENGTH))
    with torch.no_grad(), adapted(model, expert):
        logits = model(tokens).logits
    torch.testing.assert_close(logits, merged(tokens).logits, rtol=1e-12, atol=1e-12)


def compiled_code(*args: object, **kwargs: object) -> None:
    raise AssertionError("compiled code ran")


@pytest.mark.parametrize("error", [False, True])
def test_a_model_runs_uncompiled_meanwhile_and_is_itself_afterwards(error: bool) -> None:
    model, other, tokens = llama(), llama(hidden_size=16), torch.randint(VOCAB, (1, LENGTH))
    model._compiled_call_impl = compiled_code
    before = Fingerprint(model), Fingerprint(other)
    with suppress(KeyboardInterrupt), adapted(model, random_expert(model)):
        assert len(model.get_submodule(DOWN)._forward_hooks) == 1
        model(tokens)
        if error:
            raise KeyboardInterrupt
    with pytest.raises(AssertionError, match="compiled code ran"):
        model(tokens)
    with pytest.raises(ExpertError, match="made for another base"), adapted(other, random_expert(model)):
        pass
    before[0].check(model)
    before[1].check(other)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_unchanged_undoes_wrapping_hooks_attributes_modes_flags_and_buffers() -> None:
    model = llama()
    model.get_submodule(V).weight.requires_grad_(False)
    model.model.layers[0].train()
    before = Fingerprint(model)
    buffers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}

    def meddle() -> None:
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        model.note = "new"
        model.train()
        model.register_forward_hook(lambda *_: None)
        model._compiled_call_impl = compiled_code
        for module in model.modules():
            for name, buffer in list(module._buffers.items()):
                module._buffers[name] = buffer.clone()
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), unchanged(model):
        meddle()
    before.check(model)
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == buffers
    assert model._compiled_call_impl is None
