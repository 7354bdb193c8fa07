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

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from weftlm.errors import ConfigError, reason
from weftlm.mixture.policy import Alignment, MixturePolicy
from weftlm.models.hf import SequenceLosses
from weftlm.training.config import AlignmentConfig
from weftlm.training.estimators.cumulative import CumulativeDots, average_gradients
from weftlm.training.estimators.direction import (
    Direction,
    add,
    chunks,
    dot,
    evaluation_mode,
    gradient_direction,
    is_sharded,
    precondition,
    trainable_parameters,
    unwrap,
    without_data_parallel,
    zeros,
)
from weftlm.training.estimators.finite_difference import finite_difference
from weftlm.training.estimators.groups import group_alignment, with_batch_norm
from weftlm.training.estimators.separate import separate_alignment
from weftlm.training.estimators.shadow import ShadowProbe, shadow_dots

__all__ = [
    "Alignment",
    "AlignmentConfig",
    "Choice",
    "CumulativeDots",
    "Direction",
    "ShadowProbe",
    "average_gradients",
    "choose_estimator",
    "choose_for_policy",
    "finite_difference",
    "gradient_direction",
    "group_alignment",
    "has_dropout",
    "precondition",
    "probe_alignment",
    "separate_alignment",
    "shadow_dots",
    "with_batch_norm",
]

_DROPS = re.compile(r"drop|pdrop$")
"""Names of settings that hold a rate of dropout applied by a function instead of a module."""

Estimator = Literal["separate", "cumulative", "shadow", "finite_difference"]
Probe = Literal["batch", "extra"]


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
    losses: SequenceLosses | None = None,
    processes: int | None = None,
    sharded: bool | None = None,
) -> Choice:
    """Settle `auto` by what the run allows, cheapest first, and refuse what it does not allow.

        cumulative on the batch         a micro-batch for every group
        shadow on the batch             a sequence for every group
        separate on extra sequences     exact, with norms, sharded parameters included (after shadow where processes
                                        are several, because it reduces every group's gradient over them)
        shadow on extra sequences       whole parameters
        finite_difference               anything; where only forward passes can be afforded

    Args:
        config: the recipe's `alignment` section.
        model: the model as it will be trained (wrapped, sharded, with adapters).
        accumulation_steps: micro-batches per optimizer step of one process.
        groups: domains, or basis distributions.
        batch_size: sequences per optimizer step over all processes.
        needs_norms: the policy wants ||g_i|| (normalize: cosine).
        basis: groups are distributions over domains, to which no training sequence belongs.
        losses: with it, an estimator is tried on two short sequences before it is chosen, and passed over where it
            fails or is wrong (`_refusal`); without it, that shows when the first probe runs.
        processes: number of training processes; absent: those of the default process group.
        sharded: whether parameters are split over the processes; absent: whether the model's are.
    Raises:
        ConfigError: the configuration asks for what cannot work here.
    """
    parameters = trainable_parameters(model)
    if sharded is None:
        sharded = is_sharded(parameters.values())
    if processes is None:
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if grouped else 1
    split = sharded and "parameters are sharded over processes"
    narrow = any(parameter.dtype.itemsize < 4 for parameter in parameters.values())
    norms = needs_norms and "it gives no norm per group, which normalize: cosine needs"
    wanted = groups * config.min_sequences_per_domain
    batch = (
        (basis and "a training sequence belongs to a domain, not to a basis distribution")
        or (has_dropout(model) and "the model trains with dropout, which probes leave out")
        or (wanted > batch_size and f"{wanted} sequences for {groups} groups do not fit a batch of {batch_size}")
    )
    shadow = norms or split
    obstacles: dict[tuple[Estimator, Probe], str | bool] = {
        ("cumulative", "batch"): norms
        or split
        or (narrow and "gradients accumulate in less than float32")
        or batch
        or (accumulation_steps < groups and f"{accumulation_steps} micro-batches are fewer than {groups} groups"),
        ("shadow", "batch"): shadow or batch,
        ("separate", "extra"): False,
        ("shadow", "extra"): shadow,
        ("finite_difference", "extra"): norms or (narrow and "parameters in less than float32 cannot hold its steps"),
    }
    order = list(obstacles)
    if processes > 1:
        order[2], order[3] = order[3], order[2]
    asked = [
        (estimator, probe)
        for estimator, probe in order
        if config.estimator in ("auto", estimator) and config.probe in ("auto", probe)
    ]
    if losses is not None and not sharded:
        tried: dict[str, str | bool] = {}
        for candidate in (*asked, *order):
            if not obstacles[candidate] and candidate[0] != "cumulative":
                if candidate[0] not in tried:
                    tried[candidate[0]] = _refusal(candidate[0], model, losses, parameters)
                obstacles[candidate] = tried[candidate[0]]
            if candidate in asked and not obstacles[candidate]:
                break
    for place, candidate in enumerate(asked):
        if not obstacles[candidate]:
            passed_over = [f"not {' on '.join(other)}: {obstacles[other]}" for other in asked[:place]]
            return Choice(*candidate, "; ".join([_MERITS[candidate], *passed_over]))
    usable = [" on ".join(candidate) for candidate in order if not obstacles[candidate]]
    reasons = [f"{' on '.join(candidate)}: {obstacles[candidate]}" for candidate in asked]
    raise ConfigError(
        f"alignment.estimator {config.estimator} with probe {config.probe} cannot be used "
        f"({'; '.join(reasons) or 'there is no such pair'}); usable here: {', '.join(usable) or 'none'}"
    )


def choose_for_policy(
    policy: MixturePolicy[Any], config: AlignmentConfig, *, model: nn.Module, groups: int, **facts: Any
) -> Choice | None:
    """The estimator for what a policy needs; None for policies that need no alignment.

    Training asks this, and a plan of the training.

    Args:
        policy: its `needs` and configuration decide whether norms count and what a group is.
        config: the recipe's `alignment` section.
        model: the model as it will be trained; on the meta device for a plan.
        groups: domains, or basis distributions.
        facts: the other arguments of `choose_estimator`.
    Raises:
        ConfigError: no estimator can measure what the policy needs on this model.
    """
    if not policy.needs & {"target_alignment", "generalist_alignment"}:
        return None
    norms = getattr(policy.config, "normalize", None) == "cosine"
    basis = "basis" in policy.needs
    return choose_estimator(config, model=model, groups=groups, needs_norms=norms, basis=basis, **facts)


_MERITS: dict[tuple[Estimator, Probe], str] = {
    ("cumulative", "batch"): "micro-batches of one group each make it nearly free",
    ("shadow", "batch"): "the training step itself gives every sequence's derivative",
    ("separate", "extra"): "exact, with norms",
    ("shadow", "extra"): "exact, all groups in one pass",
    ("finite_difference", "extra"): "needs forward passes only",
}


def _refusal(
    estimator: str, model: nn.Module, losses: SequenceLosses, parameters: Mapping[str, nn.Parameter]
) -> str | bool:
    """Why an estimator cannot be used on this model, found by trying it; False where it can.

    The derivatives of two sequences of five tokens along the sum of their gradients are held against backward passes:

        |found_b - <grad L_b, v>| <= tolerance max_b |<grad L_b, v>|

    with a tolerance of 0.05 for shadow (0.2 with parameters in less than float32) and 0.2 for finite differences.
    Parameters, `.grad` and the state of random generators are left as they are. Cost: four to eight such passes.
    """
    device = next(iter(parameters.values())).device
    tokens_BT1 = torch.tensor([[0, 1, 0, 0, 1], [1, 1, 0, 1, 0]], device=device)
    coarse = estimator == "finite_difference" or any(each.dtype.itemsize < 4 for each in parameters.values())
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            v, gradients, module = zeros(parameters), [], without_data_parallel(model)
            with evaluation_mode(module):
                for row_1T1 in tokens_BT1.split(1):
                    loss = losses(module, row_1T1).sum()
                    parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                    gradients.append(parts)
                    add(v, parts)
            exact_B = torch.stack([dot(parts, list(v.values())) for parts in gradients]).float().cpu()
            if estimator == "shadow":
                found_B = shadow_dots(model, losses, tokens_BT1, v)
            elif estimator == "finite_difference":
                found_B = finite_difference(model, losses, tokens_BT1, v)
            else:
                found_B = exact_B
    except ConfigError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001, the model's own code runs here
        return f"it fails on this model ({reason(error)})"
    apart = (found_B.detach().float().cpu() - exact_B).abs().max()
    if not bool(exact_B.isfinite().all()) or not bool(apart <= (0.2 if coarse else 0.05) * exact_B.abs().max()):
        return f"it is wrong on this model: {found_B.tolist()} where backward passes give {exact_B.tolist()}"
    return False


def has_dropout(model: nn.Module) -> bool:
    """Whether the model drops anything in training mode, by its Dropout modules and Hugging Face attention settings."""
    for module in unwrap(model).modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        settings = getattr(module, "config", None)
        rates = {**vars(module), **(vars(settings) if settings is not None else {})}
        if any(isinstance(rate, float) and rate > 0 and _DROPS.search(name) for name, rate in rates.items()):
            return True
    return False


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
        coarse = torch.is_autocast_enabled(tokens_BT1.device.type)
        epsilon = config.relative_epsilon or (1e-3 if coarse else 3e-4)
        dots_B = finite_difference(
            model, losses, tokens_BT1, direction, relative_epsilon=epsilon, micro_batch=micro_batch
        )
    else:
        raise ConfigError(
            f"estimator {estimator!r} cannot measure extra sequences; allowed: separate, shadow, finite_difference"
        )
    return group_alignment(dots_B, groups_B, groups, direction, process_group=process_group)
