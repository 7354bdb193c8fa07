"""How each domain's gradient points along a direction: the choice of an estimator, and all of them under one name.

    a_i = < grad L_i(theta), v >          v: the target's gradient (DGA, arXiv:2410.02498) or the domains' mean (DoGE)

| estimator         | passes beside the training step             | error against separate backward passes         |
|-------------------|---------------------------------------------|------------------------------------------------|
| separate          | forward and backward of the probe sequences | exact; also gives norms                        |
| shadow            | a forward pass's worth at most              | 1e-6 in float32, 1e-3 under bfloat16 autocast  |

Each has a file in `estimators/`, registered by name, and can be used alone in any PyTorch loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from weftlm.errors import ConfigError, reason
from weftlm.mixture.policy import Alignment, MixturePolicy
from weftlm.models.hf import SequenceLosses
from weftlm.training.config import AlignmentConfig, estimators
from weftlm.training.estimators.contract import (
    Cost,
    Estimator,
    Facts,
    Place,
    Probe,
    batch_obstacle,
    group_alignment,
)
from weftlm.training.estimators.direction import (
    Direction,
    gradient_direction,
    is_sharded,
    precondition,
    trainable_parameters,
    unwrap,
)
from weftlm.training.estimators.separate import Separate
from weftlm.training.estimators.shadow import ShadowProbe

__all__ = [
    "Alignment", "AlignmentConfig", "Choice", "Cost", "Direction", "Facts", "Probe", "ShadowProbe", "choose_estimator",
    "choose_for_policy", "estimators", "gradient_direction", "group_alignment", "has_dropout",
    "precondition", "trainable_parameters", "trial_on",
]  # fmt: skip

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
    probe: Place
    reason: str


def choose_estimator(
    config: AlignmentConfig, facts: Facts, trial: Callable[[Estimator], str | None] | None = None
) -> Choice:
    """Settle `auto` by what the run allows, and refuse what it does not allow.

    Those that send fewer gradients between processes come first, then the cheaper ones:

        shadow on the batch             a sequence for every group
        separate on extra sequences     exact, with norms, sharded parameters included (after shadow where processes
                                        are several, because it reduces every group's gradient over them)
        shadow on extra sequences       whole parameters

    Args:
        config: the recipe's `alignment` section.
        facts: the facts of the run.
        trial: reason an estimator fails on the model (`trial_on`), asked before it is chosen; without it, that shows
            when the first probe runs.
    Raises:
        ConfigError: the configuration asks for what cannot work here.
    """
    methods = {name: estimators[name]() for name in estimators}

    def rank(way: tuple[str, Place]) -> tuple[int, float, str]:
        cost = methods[way[0]].cost(facts, way[1])
        return cost.reductions, cost.forwards, way[0]

    order = sorted(((name, place) for name, method in methods.items() for place in method.merits), key=rank)
    on_batch = batch_obstacle(facts, config.min_sequences_per_domain)

    @cache
    def fails(name: str) -> str | None:
        return trial(methods[name]) if trial is not None and "extra" in methods[name].merits else None

    def obstacle(name: str, place: Place) -> str | None:
        return methods[name].obstacle(facts) or (on_batch if place == "batch" else None) or fails(name)

    asked = [way for way in order if config.estimator in ("auto", way[0]) and config.probe in ("auto", way[1])]
    passed_over: list[str] = []
    for name, place in asked:
        found = obstacle(name, place)
        if found is None:
            return Choice(name, place, "; ".join([methods[name].merits[place], *passed_over]))
        passed_over.append(f"not {name} on {place}: {found}")
    usable = [" on ".join(way) for way in order if obstacle(*way) is None]
    raise ConfigError(
        f"alignment.estimator {config.estimator} with probe {config.probe} cannot be used "
        f"({'; '.join(passed_over) or 'there is no such pair'}); usable here: {', '.join(usable) or 'none'}"
    )


def choose_for_policy(
    policy: MixturePolicy[Any, Any],
    config: AlignmentConfig,
    *,
    model: nn.Module,
    groups: int,
    batch_size: int,
    losses: SequenceLosses | None = None,
    processes: int | None = None,
    sharded: bool | None = None,
) -> Choice | None:
    """The estimator for what a policy needs; None for policies that need no alignment.

    Training asks this, and a plan of the training.

    Args:
        policy: its `needs` and configuration decide whether norms count and what a group is.
        config: the recipe's `alignment` section.
        model: the model as it will be trained (wrapped, sharded, with adapters); on the meta device for a plan.
        groups, batch_size: as in `Facts`.
        losses: with it, estimators are tried on the model (`trial_on`), unless its parameters are sharded.
        processes: number of training processes; absent: those of the default process group.
        sharded: whether parameters are split over the processes; absent: whether the model's are.
    Raises:
        ConfigError: no estimator can measure what the policy needs on this model, or it has no trainable parameter.
    """
    if not policy.needs & {"target_alignment", "generalist_alignment"}:
        return None
    parameters = trainable_parameters(model).values()
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    facts = Facts(
        groups,
        batch_size,
        processes=processes or (torch.distributed.get_world_size() if together else 1),
        needs_norms=getattr(policy.config, "normalize", None) == "cosine",
        basis="basis" in policy.needs,
        sharded=is_sharded(parameters) if sharded is None else sharded,
        dropout=has_dropout(model),
    )
    return choose_estimator(config, facts, None if losses is None or facts.sharded else trial_on(model, losses))


def trial_on(model: nn.Module, losses: SequenceLosses) -> Callable[[Estimator], str | None]:
    """Try estimators on a model: the returned function gives the reason one cannot be used, or None.

    The derivatives of two sequences of five tokens along the mean of their gradients are compared with backward passes:

        |found_b - <grad L_b, v>| <= tolerance max_b |<grad L_b, v>|

    with a tolerance of 0.05, and 0.2 for parameters in less than float32. Parameters,
    `.grad` and the state of random generators are left as they are. Cost: four to eight such passes.
    """

    def reason_against(estimator: Estimator) -> str | None:
        parameters = trainable_parameters(model).values()
        device = next(iter(parameters)).device
        tokens_BT1 = torch.tensor([[0, 1, 0, 0, 1], [1, 1, 0, 1, 0]], device=device)
        coarse = any(each.dtype.itemsize < 4 for each in parameters)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                v = gradient_direction(model, losses, tokens_BT1)
                probe = Probe(model, losses, tokens_BT1, torch.arange(2), 2, v)
                exact_B = Separate().measure(probe).dots_G
                found_B = exact_B if isinstance(estimator, Separate) else estimator.measure(probe).dots_G
        except ConfigError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001, the model's own code runs here
            return f"it fails on this model ({reason(error)})"
        if not bool((found_B - exact_B).abs().max() <= (0.2 if coarse else 0.05) * exact_B.abs().max()):
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
