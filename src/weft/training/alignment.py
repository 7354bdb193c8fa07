"""How each domain's gradient points along a direction: the choice of an estimator, and all of them under one name.

    a_i = < grad L_i(theta), v >          v: the target's gradient (DGA, arXiv:2410.02498) or the domains' mean (DoGE)

| estimator         | passes beside the training step             | error against separate backward passes         |
|-------------------|---------------------------------------------|------------------------------------------------|
| separate          | forward and backward of the probe sequences | exact; also gives norms                        |
| cumulative        | none; micro-batches of one group each       | 1e-6 in float32                                |
| shadow            | a forward pass's worth at most              | 1e-6 in float32, 1e-3 under bfloat16 autocast  |
| finite_difference | two forward passes of the probe sequences   | 1e-4 to 1e-2 in float32, more under autocast   |

Each has a file in `estimators/` and can be used alone in any PyTorch loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from weft.config import Section
from weft.errors import ConfigError
from weft.mixture.policy import Alignment
from weft.models.hf import SequenceLosses
from weft.training.estimators.cumulative import CumulativeDots, average_gradients
from weft.training.estimators.direction import (
    Direction,
    chunks,
    gradient_direction,
    is_sharded,
    precondition,
    trainable_parameters,
    unwrap,
)
from weft.training.estimators.finite_difference import finite_difference
from weft.training.estimators.groups import group_alignment, with_batch_norm
from weft.training.estimators.separate import separate_alignment
from weft.training.estimators.shadow import ShadowProbe, shadow_dots

__all__ = [
    "Alignment",
    "AlignmentConfig",
    "Choice",
    "CumulativeDots",
    "Direction",
    "ShadowProbe",
    "average_gradients",
    "choose_estimator",
    "finite_difference",
    "gradient_direction",
    "group_alignment",
    "precondition",
    "probe_alignment",
    "separate_alignment",
    "shadow_dots",
    "with_batch_norm",
]

Estimator = Literal["separate", "cumulative", "shadow", "finite_difference"]
Probe = Literal["batch", "extra"]


class AlignmentConfig(Section):
    """How gradient alignments are measured for policies that need them."""

    estimator: Literal["auto", "separate", "cumulative", "shadow", "finite_difference"] = Field(
        "auto",
        description="how derivatives along the direction are taken; auto: by what the run allows, with the reason logged",
    )
    probe: Literal["auto", "batch", "extra"] = Field(
        "auto",
        description="batch: measure on the training batch; extra: on sequences drawn for the purpose; auto: batch where it works",
    )
    sequences_per_group: PositiveInt = Field(8, description="extra probes: sequences per domain or basis distribution")
    target_sequences: PositiveInt = Field(32, description="sequences behind each direction")
    min_sequences_per_domain: PositiveInt = Field(1, description="batch probes: sequences guaranteed to every domain")
    relative_epsilon: PositiveFloat = Field(
        3e-4, description="finite_difference: length of the step relative to that of the parameters"
    )


@dataclass(frozen=True)
class Choice:
    """An estimator, where it measures, and why.

    Attributes:
        estimator: which one.
        probe: `batch`, on the sequences of the training step, or `extra`, on sequences of its own.
        reason: for the log.
    """

    estimator: Estimator
    probe: Probe
    reason: str


def choose_estimator(
    config: AlignmentConfig,
    *,
    model: nn.Module,
    accumulation_steps: int,
    groups: int,
    batch_size: int,
    needs_norms: bool = False,
    basis: bool = False,
) -> Choice:
    """Settle `auto` by what the run allows, and refuse what it does not.

    In this order: norms wanted -> separate; sharded parameters -> finite_difference; a micro-batch for every group ->
    cumulative; a sequence for every group in the batch -> shadow on the batch; else shadow on extra sequences.

    Args:
        config: the recipe's `alignment` section.
        model: the model as it will be trained (wrapped, sharded, with adapters).
        accumulation_steps: micro-batches per optimizer step of one process.
        groups: domains, or basis distributions.
        batch_size: sequences per optimizer step over all processes.
        needs_norms: the policy wants ||g_i|| (normalize: cosine).
        basis: groups are distributions over domains, to which no training sequence belongs.
    Raises:
        ConfigError: the configuration asks for what cannot work here.
    """
    parameters = trainable_parameters(model)
    narrow = any(parameter.dtype.itemsize < 4 for parameter in parameters.values())
    sharded = is_sharded(parameters.values())
    batch_obstacle = _batch_obstacle(config, model, groups, batch_size, basis)
    obstacles: dict[Estimator, str | None] = {
        "separate": "parameters are sharded over processes" if sharded else None,
        "cumulative": _first(
            (needs_norms, "it gives no norms of groups, which normalize: cosine needs"),
            (sharded, "parameters are sharded over processes"),
            (narrow, "gradients accumulate in less than float32"),
            (accumulation_steps < groups, f"{accumulation_steps} micro-batches cannot hold {groups} groups one by one"),
            (config.probe == "extra", "it measures on the training batch and probe is extra"),
            (batch_obstacle is not None, batch_obstacle or ""),
        ),
        "shadow": _first(
            (needs_norms, "it gives no norms of groups, which normalize: cosine needs"),
            (sharded, "parameters are sharded over processes"),
            (config.probe == "batch" and batch_obstacle is not None, batch_obstacle or ""),
        ),
        "finite_difference": _first(
            (needs_norms, "it gives no norms of groups, which normalize: cosine needs"),
            (narrow, "parameters in less than float32 cannot hold its small steps"),
            (config.probe == "batch", "it measures on extra sequences and probe is batch"),
        ),
    }
    if config.probe == "batch":
        obstacles["separate"] = obstacles["separate"] or "it measures on extra sequences and probe is batch"
    if config.estimator != "auto":
        obstacle = obstacles[config.estimator]
        if obstacle is not None:
            usable = [name for name, why in obstacles.items() if why is None]
            raise ConfigError(
                f"alignment.estimator {config.estimator} cannot be used: {obstacle}; usable here: "
                f"{', '.join(usable) or 'none with this probe, sharding and policy'}"
            )
        on_batch = config.estimator == "cumulative" or (
            config.estimator == "shadow" and config.probe != "extra" and batch_obstacle is None
        )
        return Choice(config.estimator, "batch" if on_batch else "extra", "asked for")
    order: tuple[Estimator, ...] = ("cumulative", "shadow", "separate", "finite_difference")
    for name in order:
        if obstacles[name] is None:
            return _explain(name, config, groups, batch_size, accumulation_steps, needs_norms, sharded, batch_obstacle)
    raise ConfigError("no alignment estimator fits: " + "; ".join(f"{name}: {why}" for name, why in obstacles.items()))


def _explain(
    name: Estimator,
    config: AlignmentConfig,
    groups: int,
    batch_size: int,
    accumulation_steps: int,
    needs_norms: bool,
    sharded: bool,
    batch_obstacle: str | None,
) -> Choice:
    if name == "cumulative":
        return Choice(name, "batch", f"{accumulation_steps} micro-batches per step hold {groups} groups one by one")
    if name == "separate":
        return Choice(name, "extra", "the policy needs the norm of every group's gradient")
    if name == "finite_difference":
        why = "parameters are sharded over processes" if sharded else "only forward passes work here"
        return Choice(name, "extra", why)
    if config.probe == "extra":
        return Choice(name, "extra", "extra probes were asked for")
    if batch_obstacle is not None:
        return Choice(name, "extra", batch_obstacle)
    return Choice(name, "batch", f"a batch of {batch_size} sequences holds all {groups} groups")


def _batch_obstacle(config: AlignmentConfig, model: nn.Module, groups: int, batch_size: int, basis: bool) -> str | None:
    """Why alignments cannot be measured on the training batch itself."""
    wanted = groups * config.min_sequences_per_domain
    return _first(
        (basis, "a training sequence belongs to a domain, not to a basis distribution"),
        (has_dropout(model), "the model trains with dropout, which probes leave out"),
        (
            wanted > batch_size,
            f"{groups} groups of {config.min_sequences_per_domain} do not fit a batch of {batch_size}",
        ),
    )


def has_dropout(model: nn.Module) -> bool:
    """Whether the model drops anything in training mode, by its Dropout modules and Hugging Face attention settings."""
    for module in unwrap(model).modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        rate = getattr(module, "attention_dropout", None)
        if isinstance(rate, float) and rate > 0:
            return True
    return False


def _first(*cases: tuple[bool, str]) -> str | None:
    return next((why for holds, why in cases if holds), None)


def probe_alignment(
    estimator: str,
    model: nn.Module,
    losses: SequenceLosses,
    tokens_BT1: Tensor,
    groups_B: Tensor,
    groups: int,
    direction: Mapping[str, Tensor],
    config: AlignmentConfig,
    *,
    micro_batch: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Alignment:
    """Alignments of all groups on sequences drawn for the purpose.

    Args:
        estimator: separate, shadow or finite_difference.
        model: see `gradient_direction`.
        losses: see `SequenceLosses`.
        tokens_BT1: this rank's probe sequences.
        groups_B: their groups.
        groups: G.
        direction: v, the same on every rank.
        config: for `relative_epsilon`.
        micro_batch: sequences per pass; None takes all at once.
        process_group: ranks to reduce over; None is the default group where one is initialised.
    Returns:
        an Alignment, with norms from `separate` only.
    Raises:
        ConfigError: `cumulative`, which has no probe of its own, or what the estimator refuses.
    """
    if estimator == "separate":
        ordered = (
            (g, piece) for g in groups_B.unique().tolist() for piece in chunks(tokens_BT1[groups_B == g], micro_batch)
        )
        return separate_alignment(model, losses, ordered, direction, groups, process_group=process_group)
    if estimator == "shadow":
        dots_B = shadow_dots(model, losses, tokens_BT1, direction, micro_batch=micro_batch)
    elif estimator == "finite_difference":
        dots_B = finite_difference(
            model, losses, tokens_BT1, direction, relative_epsilon=config.relative_epsilon, micro_batch=micro_batch
        )
    else:
        raise ConfigError(
            f"estimator {estimator!r} cannot measure extra sequences; allowed: separate, shadow, finite_difference"
        )
    return group_alignment(dots_B, groups_B, groups, direction, process_group=process_group)
