"""The contract of a mixture policy: a pure pair (`init`, `update`) over a frozen state.

A policy never touches the model or the data. The loop measures what the policy `needs`, hands it over as a `Report`, and
samples by `weights`. State is a frozen dataclass of tensors and numbers, so that checkpointing and resuming come free
(`state_to_json`, `state_from_json`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from weft.config import Section
from weft.errors import NumericsError
from weft.registry import Registry

Signal = Literal["losses", "reference_losses", "target_alignment", "generalist_alignment", "target_histogram", "basis"]
"""What a policy can ask for. The first four are measured by the loop and arrive in a `Report`; `target_histogram` and
`basis` are prepared before training and arrive in the `MixtureSetting`."""


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


class PolicyConfig(Section):
    """Base of every policy's configuration.

    Attributes:
        policy: registered name.
        update_every_steps: T_r, optimizer steps between two updates.
    """

    policy: str
    update_every_steps: int = 100


S = TypeVar("S")


class MixturePolicy(Protocol[S]):
    """A mixture policy; `S` is its frozen state.

    Class attributes:
        Config: the pydantic section it is configured by.
        needs: signals the loop must measure or prepare.
    """

    Config: ClassVar[type[PolicyConfig]]
    needs: ClassVar[frozenset[Signal]]

    def __init__(self, config: Any) -> None: ...

    def init(self, setting: MixtureSetting) -> S:
        """The state before the first step.

        Raises:
            ConfigError: the setting lacks what the policy needs, or the configuration does not fit the domains.
        """
        ...

    def weights(self, state: S) -> Tensor:
        """alpha_D, float64, non-negative, sums to 1 within 1e-9: the probability of drawing each domain."""
        ...

    def update(self, state: S, report: Report) -> S:
        """The state after a report; the old state stays valid."""
        ...

    def diagnostics(self, state: S) -> Mapping[str, float | list[float]]:
        """Numbers worth logging beside the weights (for example max|eta a|)."""
        ...


policies: Registry[MixturePolicy[Any]] = Registry("mixture policy", "weft.mixture")


def exponentiated_gradient(weights_G: Tensor, exponents_G: Tensor) -> Tensor:
    """Mirror step on the simplex, computed in log space.

        w'_i = w_i exp(x_i) / sum_j w_j exp(x_j)

    A NaN exponent leaves that entry's unnormalised weight where it was (exponent 0).

    Args:
        weights_G: float64, non-negative, sums to 1.
        exponents_G: float64.
    Returns:
        float64, sums to 1; entries at exactly 0 stay 0.
    Raises:
        NumericsError: an exponent is infinite.
    """
    exponents_G = torch.nan_to_num(exponents_G.to(torch.float64), nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    if torch.isinf(exponents_G).any():
        raise NumericsError(
            f"mirror step exponents {exponents_G.tolist()} hold an infinity; lower eta or use normalize: scale"
        )
    return torch.softmax(torch.log(weights_G) + exponents_G, dim=0)


def with_floor(weights_G: Tensor, floor: float) -> Tensor:
    """Mix a little of the uniform distribution in: (1 - c) w + c / G, so that no entry stays at 0."""
    return (1.0 - floor) * weights_G + floor / len(weights_G)


def state_to_json(state: Any) -> dict[str, Any]:
    """A policy state as JSON: float64 tensors become lists of exact decimal reprs, numbers stay."""
    return {
        field.name: _to_json(getattr(state, field.name)) for field in dataclasses.fields(state)
    }


def state_from_json(template: S, value: Mapping[str, Any]) -> S:
    """Rebuild a state from `state_to_json`, with `template` (from `init`) giving types; exact to the last bit."""
    names = [field.name for field in dataclasses.fields(template)]  # type: ignore[arg-type]
    return type(template)(**{name: _from_json(getattr(template, name), value[name]) for name in names})


def _to_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_to_json(item) for item in value]
    return value


def _from_json(template: Any, value: Any) -> Any:
    if isinstance(template, Tensor):
        return torch.tensor(value, dtype=template.dtype).reshape(template.shape)
    if isinstance(template, tuple):
        return tuple(value)
    return value
