"""The contract of a mixture policy: a pure pair (`init`, `update`) over a frozen state.

A policy never touches the model or the data. The loop measures what the policy `needs`, hands it over as a `Report`,
and samples by `weights`. State is a frozen dataclass of tensors and numbers, so that checkpointing and resuming come
free (`state_to_json`, `state_from_json`).

A new policy is one file in this folder: a config section, a frozen state, and a class (a `MixturePolicy`) registered by
name. Where it moves by mirror steps, `mirror.py` has all but what it measures: `doge.py` is a good one to read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor

from weftlm.errors import CheckpointError, ConfigError
from weftlm.mixture.config import PolicyConfig, Signal, policies, policy_config


@dataclass(frozen=True)
class MixtureSetting:
    """What is known of the domains before training.

    Attributes:
        domains: the D domain names, in order.
        tokens_D: training tokens per domain, float64.
        target_histogram_D: fraction of the target's documents nearest to each domain, float64, sums to 1.
        basis_ND: N basis distributions over the domains, float64 rows summing to 1.
    """

    domains: tuple[str, ...]
    tokens_D: Tensor
    target_histogram_D: Tensor | None = None
    basis_ND: Tensor | None = None


@dataclass(frozen=True)
class Alignment:
    """How each group's gradient points along a direction v (the target's gradient, or the mean of all groups').

    A group is a domain, or a basis distribution over domains when a policy reweights distributions.

        dots_G[i] = < grad L_i(theta), v >          norms_G[i] = || grad L_i(theta) ||

    Attributes:
        dots_G: float64; NaN for a group that had no sequence in this probe.
        counts_G: sequences behind each estimate, int64.
        direction_norm: ||v||.
        norms_G: float64, NaN where absent; None when the estimator cannot measure norms.
        batch_norm: norm of the training gradient of the same step, the stand-in for the mean of `norms_G`.
    """

    dots_G: Tensor
    counts_G: Tensor
    direction_norm: float
    norms_G: Tensor | None = None
    batch_norm: float | None = None


@dataclass(frozen=True)
class Report:
    """What the loop measured since the policy's last update.

    Attributes:
        step: optimizer steps taken so far.
        tokens_D: tokens trained on per domain since the last report, float64.
        losses_D: mean training loss per domain since the last report, nats per token; NaN where nothing was drawn.
        reference_losses_D: the reference model's loss on those same sequences, nats per token; NaN likewise.
        excess_losses_D: mean over those tokens of max(loss - reference loss, 0), nats per token; NaN likewise.
        alignment: gradient alignment along the direction the policy asked for.
    """

    step: int
    tokens_D: Tensor
    losses_D: Tensor | None = None
    reference_losses_D: Tensor | None = None
    excess_losses_D: Tensor | None = None
    alignment: Alignment | None = None


C = TypeVar("C", bound=PolicyConfig)
S = TypeVar("S")


class MixturePolicy(Generic[C, S]):
    """A mixture policy: `C` is the section it is configured by, `S` its frozen state.

    Attributes:
        Config: class of that section.
        config: the section, as given.
    """

    Config: ClassVar[type[PolicyConfig]]

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals the loop must measure or prepare; what the configuration says."""
        return self.config.needs

    def init(self, setting: MixtureSetting) -> S:
        """The state before the first step.

        Raises:
            ConfigError: the setting lacks what the policy needs, or the configuration does not fit the domains.
        """
        raise NotImplementedError

    def weights(self, state: S) -> Tensor:
        """alpha_D, float64, non-negative, sums to 1 within 1e-9: the probability of drawing each domain."""
        raise NotImplementedError

    def update(self, state: S, report: Report) -> S:
        """The state after a report; the old state stays valid.

        Raises:
            ConfigError: the report lacks a signal the policy needs.
            NumericsError: a measured number is not finite although its group was drawn.
        """
        raise NotImplementedError

    def diagnostics(self, state: S) -> Mapping[str, float | list[float]]:
        """Numbers worth logging beside the weights (for example max|eta a|)."""
        return {}


@dataclass(frozen=True)
class ConstantState:
    """alpha_D, float64, sums to 1."""

    weights_D: Tensor


class ConstantPolicy(MixturePolicy[C, ConstantState]):
    """Base of the policies that never move: their weights are decided in `init`."""

    def weights(self, state: ConstantState) -> Tensor:
        return state.weights_D

    def update(self, state: ConstantState, report: Report) -> ConstantState:
        return state

    def diagnostics(self, state: ConstantState) -> Mapping[str, float | list[float]]:
        return {"entropy_nats": entropy(state.weights_D)}


def build_policy(value: Mapping[str, Any] | PolicyConfig, where: str = "mixture") -> MixturePolicy[Any, Any]:
    """The policy a recipe asks for.

    Raises:
        ConfigError: as `policy_config`.
    """
    config = policy_config(value, where)
    return policies[config.policy](config)


def missing_signal(policy: str, signal: Signal) -> ConfigError:
    """The error for a setting or a report without something the policy declared in `needs`."""
    return ConfigError(
        f"mixture policy {policy!r} needs the signal {signal!r}, and none came; the training loop must measure or "
        "prepare every name in `policy.needs`"
    )


def entropy(weights_G: Tensor) -> float:
    """-sum_i w_i log w_i in nats: log G when uniform, 0 when one group has it all."""
    return float(torch.special.entr(weights_G).sum())


def with_floor(weights_G: Tensor, floor: float) -> Tensor:
    """Mix a little of the uniform distribution in: (1 - c) w + c / G, so that no entry stays at 0."""
    return (1.0 - floor) * weights_G + floor / len(weights_G)


CONSTANT: Mapping[str, Any] = {"constant": True}
"""Metadata of a state field that `init` derives from the setting and no update changes: not written to JSON, taken from
the template when read back, as in `basis_ND: Tensor = dataclasses.field(metadata=CONSTANT)`."""


def state_to_json(state: Any) -> dict[str, Any]:
    """A policy state as JSON: float64 tensors become lists of exact decimal reprs, numbers and tuples of them stay.

    `CONSTANT` fields are left out. NaN is kept, as Python's json module writes it.

    Raises:
        ConfigError: a field holds something else, which could not be read back.
    """
    values = {field.name: getattr(state, field.name) for field in _variable_fields(state)}
    for name, value in values.items():
        if not isinstance(value, Tensor) and not _is_plain(value):
            raise ConfigError(
                f"{type(state).__module__}.{type(state).__qualname__} cannot be saved: its field {name!r} is a "
                f"{type(value).__name__}; a policy keeps tensors, numbers, texts and tuples of the last two"
            )
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


def _is_plain(value: Any) -> bool:
    """Whether JSON gives a value back, once its lists are tuples again."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def state_from_json(template: S, value: Mapping[str, Any]) -> S:
    """Rebuild a state from `state_to_json`, exact to the last bit.

    Args:
        template: the state `init` gives under the same configuration and setting: types, shapes, `CONSTANT` fields.
        value: what `state_to_json` gave, also after a round trip through JSON text.

    Raises:
        CheckpointError: the fields or a tensor's size are not those of the template.
    """
    names = [field.name for field in _variable_fields(template)]
    if set(names) != set(value):
        raise CheckpointError(
            f"saved state of {type(template).__name__} holds {sorted(value)}, expected {sorted(names)}; "
            "was it written by another policy or version?"
        )
    fields = {name: _from_json(getattr(template, name), value[name], name) for name in names}
    return cast(S, dataclasses.replace(cast(Any, template), **fields))


def _variable_fields(state: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(state) if not field.metadata.get("constant")]


def _from_json(template: Any, value: Any, name: str) -> Any:
    if isinstance(template, Tensor):
        tensor = torch.tensor(value, dtype=template.dtype)
        if tensor.shape != template.shape:
            raise CheckpointError(
                f"saved state field {name!r} has shape {tuple(tensor.shape)}, expected {tuple(template.shape)}; "
                "did the number of domains change?"
            )
        return tensor
    return _with_tuples(value)


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value
