"""How each domain's gradient points along a direction: the choice of an estimator, and all of them under one name.

    a_i = < grad L_i(theta), v >          v: the target's gradient (DGA, arXiv:2410.02498) or the domains' mean (DoGE)

| estimator         | passes beside the training step             | error against separate backward passes         |
|-------------------|---------------------------------------------|------------------------------------------------|
| separate          | forward and backward of the probe sequences | exact; also gives norms                        |
| cumulative        | none; micro-batches of one group each       | 1e-6 in float32                                |
| shadow            | a forward pass's worth at most              | 1e-6 in float32, 1e-3 under bfloat16 autocast  |
| finite_difference | two forward passes of the probe sequences   | 1e-4 to 1e-2 in float32, more under autocast   |

Each has a file in `estimators/`, registered by name, and can be used alone in any PyTorch loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from weftlm.errors import ConfigError, reason
from weftlm.evaluation.perplexity import evaluation_mode
from weftlm.mixture.policy import Alignment, MixturePolicy
from weftlm.models.hf import SequenceLosses
from weftlm.training.config import AlignmentConfig, estimators
from weftlm.training.estimators.contract import Cost, Estimator, Facts, Probe, batch_obstacle
from weftlm.training.estimators.cumulative import CumulativeDots, average_gradients
from weftlm.training.estimators.direction import (
    Direction,
    add,
    dot,
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
    "Cost",
    "CumulativeDots",
    "Direction",
    "Facts",
    "ShadowProbe",
    "average_gradients",
    "choose_estimator",
    "choose_for_policy",
    "estimators",
    "facts_of",
    "finite_difference",
    "gradient_direction",
    "group_alignment",
    "has_dropout",
    "precondition",
    "probe_alignment",
    "separate_alignment",
    "shadow_dots",
    "trainable_parameters",
    "trial_on",
    "with_batch_norm",
]

_DROPS = re.compile(r"drop|pdrop$")
"""Names of settings that hold a rate of dropout applied by a function instead of a module."""


@dataclass(frozen=True)
class Choice:
    """An estimator, where it measures, and why.

    Attributes:
        estimator: registered name.
        probe: `batch`, on the sequences of the training step, or `extra`, on sequences of its own.
        reason: for the log.
    """

    estimator: str
    probe: Probe
    reason: str


def facts_of(
    model: nn.Module,
    *,
    groups: int,
    batch_size: int,
    accumulation_steps: int = 1,
    needs_norms: bool = False,
    basis: bool = False,
    processes: int | None = None,
    sharded: bool | None = None,
) -> Facts:
    """The facts of a run by its model.

    Args:
        model: the model as it will be trained (wrapped, sharded, with adapters); on the meta device for a plan.
        groups, batch_size, accumulation_steps, needs_norms, basis: as in `Facts`.
        processes: number of training processes; absent: those of the default process group.
        sharded: whether parameters are split over the processes; absent: whether the model's are.
    Raises:
        ConfigError: the model has no trainable parameter.
    """
    parameters = trainable_parameters(model).values()
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Facts(
        groups=groups,
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        processes=processes or (torch.distributed.get_world_size() if together else 1),
        needs_norms=needs_norms,
        basis=basis,
        sharded=is_sharded(parameters) if sharded is None else sharded,
        narrow=any(parameter.dtype.itemsize < 4 for parameter in parameters),
        dropout=has_dropout(model),
    )


def choose_estimator(
    config: AlignmentConfig, facts: Facts, trial: Callable[[Estimator], str | None] | None = None
) -> Choice:
    """Settle `auto` by what the run allows, and refuse what it does not allow.

    Exact estimators come first, then those that send fewer gradients between processes, then the cheaper ones:

        cumulative on the batch         a micro-batch for every group
        shadow on the batch             a sequence for every group
        separate on extra sequences     exact, with norms, sharded parameters included (after shadow where processes
                                        are several, because it reduces every group's gradient over them)
        shadow on extra sequences       whole parameters
        finite_difference               anything; where only forward passes can be afforded

    Args:
        config: the recipe's `alignment` section.
        facts: of the run (`facts_of`, or a plan's).
        trial: reason an estimator fails on the model (`trial_on`), asked before it is chosen; without it, that shows
            when the first probe runs.
    Raises:
        ConfigError: the configuration asks for what cannot work here.
    """
    methods = {name: estimators[name]() for name in estimators}
    order = sorted(
        ((name, probe) for name, method in methods.items() for probe in method.merits),
        key=lambda way: _rank(methods[way[0]], facts, way),
    )
    on_batch = batch_obstacle(facts, config.min_sequences_per_domain)
    tried: dict[str, str | None] = {}

    @cache
    def obstacle(name: str, probe: Probe) -> str | None:
        found = methods[name].obstacle(facts) or (on_batch if probe == "batch" else None)
        if found is None and trial is not None and "extra" in methods[name].merits:
            if name not in tried:
                tried[name] = trial(methods[name])
            found = tried[name]
        return found

    asked = [way for way in order if config.estimator in ("auto", way[0]) and config.probe in ("auto", way[1])]
    passed_over: list[str] = []
    for name, probe in asked:
        reason = obstacle(name, probe)
        if reason is None:
            return Choice(name, probe, "; ".join([methods[name].merits[probe], *passed_over]))
        passed_over.append(f"not {name} on {probe}: {reason}")
    usable = [" on ".join(way) for way in order if obstacle(*way) is None]
    reasons = [f"{name} on {probe}: {obstacle(name, probe)}" for name, probe in asked]
    raise ConfigError(
        f"alignment.estimator {config.estimator} with probe {config.probe} cannot be used "
        f"({'; '.join(reasons) or 'there is no such pair'}); usable here: {', '.join(usable) or 'none'}"
    )


def choose_for_policy(
    policy: MixturePolicy[Any],
    config: AlignmentConfig,
    *,
    model: nn.Module,
    groups: int,
    losses: SequenceLosses | None = None,
    **layout: Any,
) -> Choice | None:
    """The estimator for what a policy needs; None for policies that need no alignment.

    Training asks this, and a plan of the training.

    Args:
        policy: its `needs` and configuration decide whether norms count and what a group is.
        config: the recipe's `alignment` section.
        model: see `facts_of`.
        groups: domains, or basis distributions.
        losses: with it, estimators are tried on the model (`trial_on`), unless its parameters are sharded.
        layout: the other arguments of `facts_of`.
    Raises:
        ConfigError: no estimator can measure what the policy needs on this model.
    """
    if not policy.needs & {"target_alignment", "generalist_alignment"}:
        return None
    norms = getattr(policy.config, "normalize", None) == "cosine"
    facts = facts_of(model, groups=groups, needs_norms=norms, basis="basis" in policy.needs, **layout)
    return choose_estimator(config, facts, None if losses is None or facts.sharded else trial_on(model, losses))


def _rank(method: Estimator, facts: Facts, way: tuple[str, Probe]) -> tuple[bool, int, float, str]:
    cost = method.cost(facts, way[1])
    return not method.exact, cost.reductions, cost.forwards, way[0]


def trial_on(model: nn.Module, losses: SequenceLosses) -> Callable[[Estimator], str | None]:
    """Try estimators on a model: the returned function gives the reason one cannot be used, or None.

    The derivatives of two sequences of five tokens along the sum of their gradients are held against backward passes:

        |found_b - <grad L_b, v>| <= tolerance max_b |<grad L_b, v>|

    with a tolerance of 0.05, and 0.2 for estimators that are not exact or parameters in less than float32. Parameters,
    `.grad` and the state of random generators are left as they are. Cost: four to eight such passes.
    """

    def reason_against(estimator: Estimator) -> str | None:
        parameters = trainable_parameters(model)
        device = next(iter(parameters.values())).device
        tokens_BT1 = torch.tensor([[0, 1, 0, 0, 1], [1, 1, 0, 1, 0]], device=device)
        coarse = not estimator.exact or any(each.dtype.itemsize < 4 for each in parameters.values())
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
                found_B = exact_B
                if not estimator.oracle:
                    groups_B, config = torch.arange(len(tokens_BT1)), AlignmentConfig()
                    found = estimator.measure(model, losses, tokens_BT1, groups_B, len(groups_B), v, config)
                    found_B = found.dots_G.float().cpu()
        except ConfigError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001, the model's own code runs here
            return f"it fails on this model ({reason(error)})"
        apart = (found_B - exact_B).abs().max()
        if not bool(exact_B.isfinite().all()) or not bool(apart <= (0.2 if coarse else 0.05) * exact_B.abs().max()):
            return f"it is wrong on this model: {found_B.tolist()} where backward passes give {exact_B.tolist()}"
        return None

    return reason_against


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
        estimator: registered name of one that measures extra sequences: separate, shadow or finite_difference.
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
    if estimator == "auto" or "extra" not in estimators[estimator].merits:
        able = ", ".join(name for name in estimators if "extra" in estimators[name].merits)
        raise ConfigError(f"estimator {estimator!r} cannot measure extra sequences; allowed: {able}")
    return estimators[estimator]().measure(
        model, losses, tokens_BT1, groups_B, groups, direction, config,
        micro_batch=micro_batch, process_group=process_group,
    )  # fmt: skip
