"""The alignment engine's edges: choices and their reasons, groups, refusals, and what must be left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from weftlm.errors import ConfigError, NumericsError
from weftlm.models.hf import sequence_losses
from weftlm.training.alignment import (
    Facts,
    Probe,
    ShadowProbe,
    choose_estimator,
    estimators,
    gradient_direction,
    group_alignment,
    has_dropout,
    precondition,
    trial_on,
)
from weftlm.training.config import AlignmentConfig

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
BOTH = pytest.mark.parametrize("estimator", ["separate", "shadow"])


class Bigram(nn.Module):
    """The smallest language model: an embedding and, optionally, modules before the head."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(10, 4)
        self.middle = nn.Sequential(*middle)
        self.head = nn.Linear(4, 10)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.middle(self.tokens(input_ids)))


def losses(model: nn.Module, tokens_BT1: Tensor) -> Tensor:
    logits, labels = model(tokens_BT1[:, :-1]), tokens_BT1[:, 1:]
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def each(name: str, model: nn.Module, losses: Any, tokens_BT1: Tensor, v: Any, micro_batch: int | None = None) -> Any:
    """What an estimator measures where every sequence is a group of its own."""
    groups_B = torch.arange(len(tokens_BT1))
    return estimators[name]().measure(Probe(model, losses, tokens_BT1, groups_B, len(groups_B), v, micro_batch))


def tokens(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 10, (rows, 6), generator=torch.Generator().manual_seed(seed))


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What no probe may change, as values that compare."""
    return {
        "weights": {name: p.tolist() for name, p in model.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "random": torch.get_rng_state().tolist(),
    }


# -- the choice -------------------------------------------------------------------------------------------------------


def choice(config: AlignmentConfig | None = None, model: nn.Module | None = None, **facts: Any) -> tuple[str, str, str]:
    model = model or Bigram()
    given: dict[str, Any] = {"groups": 4, "batch_size": 16, **facts}
    losses = given.pop("losses", None)
    trial = None if losses is None else trial_on(model, losses)
    chosen = choose_estimator(config or AlignmentConfig(), Facts(dropout=has_dropout(model), **given), trial)
    return chosen.estimator, chosen.probe, chosen.reason


@pytest.mark.parametrize(
    ("config", "facts", "expected", "reason"),
    [
        ({}, {}, ("shadow", "batch"), "the training step itself"),
        ({}, {"groups": 17}, ("separate", "extra"), "17 sequences for 17 groups do not fit a batch of 16"),
        ({}, {"needs_norms": True}, ("separate", "extra"), "normalize: cosine"),
        ({}, {"basis": True}, ("separate", "extra"), "basis distribution"),
        ({}, {"model": Bigram(nn.Dropout(0.1))}, ("separate", "extra"), "dropout"),
        ({"probe": "extra"}, {}, ("separate", "extra"), "exact"),
        ({"estimator": "shadow", "probe": "extra"}, {}, ("shadow", "extra"), "one pass"),
        ({"estimator": "shadow"}, {"basis": True}, ("shadow", "extra"), "basis distribution"),
        ({"min_sequences_per_domain": 5}, {}, ("separate", "extra"), "20 sequences for 4 groups"),
        ({"estimator": "shadow"}, {"needs_norms": True}, None, "normalize: cosine"),
        ({"estimator": "shadow", "probe": "batch"}, {"groups": 20}, None, "do not fit a batch of 16"),
        ({"estimator": "separate", "probe": "batch"}, {}, None, "no such pair"),
    ],
)
def test_choice(config: dict[str, Any], facts: dict[str, Any], expected: tuple[str, str] | None, reason: str) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match=reason) as raised:
            choice(AlignmentConfig(**config), **facts)
        assert "usable here: " in str(raised.value)
        assert "separate on extra" in str(raised.value)
        return
    *found, why = choice(AlignmentConfig(**config), **facts)
    assert tuple(found) == expected
    assert reason in why


def test_dropout_is_found_in_settings_too() -> None:
    models = [llama(), llama(attention_dropout=0.1), Bigram(nn.Dropout(0.1)), Bigram(nn.Dropout(0.0))]
    assert [has_dropout(model) for model in models] == [False, True, True, False]


# -- models an estimator can or cannot measure ------------------------------------------------------------------------


class First(nn.Module):
    """The first of what a recurrent layer returns."""

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return x[0]


class WithLayer(nn.Module):
    """Owns a layer, and uses it in a way of its own."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.use = nn.Linear(4, 4), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.layer, x)


class WithScale(nn.Module):
    """Owns a bare parameter."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.use = nn.Parameter(torch.ones(4)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.scale, x)


class Undifferentiable(torch.autograd.Function):
    """A function without a forward-mode rule."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, x: Tensor) -> Tensor:
        return x * scale * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad.sum((0, 1)), grad


def probed_step(model: nn.Module, v: dict[str, Tensor]) -> Tensor:
    with ShadowProbe(model, v) as probe:
        probe.begin(3)
        losses(model, tokens(3)).mean().backward()
        return probe.dots(torch.full((3,), 1 / 3))


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        (lambda: [nn.Linear(4, 4)], None),
        (lambda: [nn.RNN(4, 4, batch_first=True), First()], None),
        (lambda: [WithLayer(lambda layer, x: layer(x).add_(1.0))], ""),  # changed in place by what follows
        (lambda: [WithScale(lambda scale, x: x * scale + torch.rand(4))], "random numbers"),
        (lambda: [WithLayer(lambda layer, x: x @ layer.weight)], "not called"),
        (  # all tokens of the batch in one row, as a mixture of experts sees them
            lambda: [WithLayer(lambda layer, x: layer(x.flatten(0, 1)).view(x.shape))],
            r"middle.0.layer \(Linear\): .* of shape \(15, 4\), does not run over the 3 sequences",
        ),
        (lambda: [WithScale(Undifferentiable.apply)], "forward-mode"),
    ],
)
def test_an_estimator_is_chosen_only_where_it_is_right(middle: Callable[[], list[nn.Module]], why: str | None) -> None:
    """`why` is what the shadow estimator says where it cannot measure; PyTorch says it where that is empty."""
    model = Bigram(*middle())
    before, found, refusals = snapshot(model), set(), []
    for estimator in ("shadow", "separate"):
        try:
            found.add(choice(AlignmentConfig(estimator=estimator), model=model, losses=losses)[0])
        except ConfigError as error:
            refusals.append(str(error))
    assert all("cannot be used" in each and "\n" not in each for each in refusals)
    assert found == ({"separate"} if why is not None else {"shadow", "separate"})
    assert choice(model=model, losses=losses)[0] == ("shadow" if why is None else "separate")
    assert snapshot(model) == before
    if why:
        v = gradient_direction(model, losses, tokens(2))
        with pytest.raises(ConfigError, match=why) as raised:
            each("shadow", model, losses, tokens(3), v)
        assert "alignment.estimator: separate" in str(raised.value)
        with pytest.raises(ConfigError, match=why):
            probed_step(model, v)


def test_choice_tries_the_shadow_on_models_of_transformers() -> None:
    torch.manual_seed(0)
    experts = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))
    assert choice(model=llama(), losses=sequence_losses)[:2] == ("shadow", "batch")
    estimator, probe, why = choice(model=experts, losses=sequence_losses)
    assert (estimator, probe) == ("separate", "extra")
    assert "does not run over the 2 sequences" in why


# -- values at the edges ----------------------------------------------------------------------------------------------


def test_a_small_direction_is_not_lost_beside_a_constant_part() -> None:
    model = Bigram(WithScale(lambda scale, x: x * (1 + scale)))  # as Gemma's norms have it
    v = gradient_direction(model, losses, tokens(2))
    plain, small = (
        each("shadow", model, losses, tokens(2), {name: size * part for name, part in v.items()}).dots_G / size
        for size in (1.0, 2.0**-30)
    )
    assert torch.allclose(small, plain, rtol=1e-5)


def test_groups_are_means_with_nan_for_the_absent_and_refuse_what_does_not_fit() -> None:
    direction = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    found = group_alignment(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2, 0, 2]), 4, direction)
    assert found.dots_G[[0, 2]].tolist() == [2.0, 3.5]
    assert math.isnan(found.dots_G[1])
    assert (found.counts_G.tolist(), found.dots_G.dtype) == ([1, 0, 2, 0], torch.float64)
    assert (found.direction_norm, found.norms_G) == (5.0, None)
    with pytest.raises(ConfigError, match=r"both must be \(B,\)"):
        group_alignment(torch.ones(3), torch.zeros(2, dtype=torch.int64), 2, direction)
    with pytest.raises(ConfigError, match="allowed are 0 to 1"):
        group_alignment(torch.ones(2), torch.tensor([0, 2]), 2, direction)
    with pytest.raises(NumericsError, match=r"groups \[1\]"):
        group_alignment(torch.tensor([1.0, torch.inf]), torch.tensor([0, 1]), 2, direction)


# -- what must be left as it was, and what is refused -----------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("fails", [False, True])
def test_probes_leave_the_training_state_alone_also_when_the_loss_fails(estimator: str, fails: bool) -> None:
    model = Bigram(nn.Dropout(0.5), nn.LayerNorm(4), nn.Linear(4, 4))
    model.middle[2].eval()  # a mode of its own, as some fine-tuning sets
    losses(model, tokens(3)).mean().backward()
    before, calls = snapshot(model), []
    v = gradient_direction(model, losses, tokens(2, seed=1))

    def failing(model: nn.Module, tokens_BT1: Tensor) -> Tensor:
        calls.append(None)
        if fails and len(calls) == 2:
            raise RuntimeError("out of memory")
        return losses(model, tokens_BT1)

    probe = Probe(model, failing, tokens(4), torch.tensor([0, 0, 1, 1]), 2, v, micro_batch=2)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            estimators[estimator]().measure(probe)
    else:
        estimators[estimator]().measure(probe)
    assert snapshot(model) == before


def test_evaluation_inside_a_probe_is_not_probed() -> None:
    model = Bigram()
    v = gradient_direction(model, losses, tokens(2, seed=1))
    with ShadowProbe(model, v) as probe:
        probe.begin(3)
        with torch.no_grad():
            losses(model, tokens(7))
        losses(model, tokens(3)).mean().backward()
        dots = probe.dots(torch.full((3,), 1 / 3))
        losses(model, tokens(7)).mean().backward()  # no begin: a plain step
    assert torch.allclose(dots.double(), each("shadow", model, losses, tokens(3), v).dots_G, rtol=1e-5)


def test_shadow_asks_for_its_calls_in_order_and_for_embeddings_that_keep_sequences_apart() -> None:
    model = Bigram()
    v = gradient_direction(model, losses, tokens(2))
    with ShadowProbe(model, v) as probe:
        for begun in (False, True):
            if begun:
                probe.begin(3)
            with pytest.raises(ConfigError, match="begin, the model, backward"):
                probe.dots(torch.ones(3))
        losses(model, tokens(3)).mean().backward()
        with pytest.raises(ConfigError, match="1 zeros came for 3 sequences"):
            probe.dots(torch.tensor([0.5, 0.0, 0.5]))
        with pytest.raises(ConfigError, match=r"shape \(2,\)"):
            probe.dots(torch.ones(2))
    model.tokens = nn.Embedding(10, 4, scale_grad_by_freq=True)
    with pytest.raises(ConfigError, match="scale_grad_by_freq"):
        ShadowProbe(model, v)


@BOTH
def test_directions_of_other_models_are_refused_and_no_sequences_give_no_dots(estimator: str) -> None:
    model = Bigram()
    v = gradient_direction(model, losses, tokens(2))
    short = {name: part for name, part in v.items() if name != "head.bias"}
    for odd in (short, {**v, "head.bias": torch.zeros(3)}):
        with pytest.raises(ConfigError, match=r"at head\.bias"):
            each(estimator, model, losses, tokens(2), odd)
    nothing = Probe(model, losses, tokens(0), torch.zeros(0, dtype=torch.int64), 2, v)
    found = estimators[estimator]().measure(nothing)
    assert found.counts_G.tolist() == [0, 0]
    assert found.dots_G.isnan().all()


def test_directions_need_sequences_parameters_and_finite_losses_and_moments() -> None:
    model = Bigram()
    v, infinite = gradient_direction(model, losses, tokens(2)), lambda m, t: losses(m, t) * torch.inf
    with pytest.raises(ConfigError, match="at least one optimizer step"):
        precondition(v, torch.optim.AdamW(model.parameters()), dict(model.named_parameters()))
    with pytest.raises(ConfigError, match="use AdamW or Adam"):
        precondition(v, torch.optim.SGD(model.parameters(), lr=0.1), dict(model.named_parameters()))
    with pytest.raises(NumericsError, match=r"groups \[0, 1\]"):
        each("separate", model, infinite, tokens(2), v)
    with pytest.raises(NumericsError, match="not finite"):
        gradient_direction(model, infinite, tokens(2))
    with pytest.raises(ConfigError, match="0 sequences"):
        gradient_direction(model, losses, tokens(0))
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter"):
        gradient_direction(model, losses, tokens(2))
