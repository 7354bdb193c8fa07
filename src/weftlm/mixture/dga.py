"""Dynamic Gradient Alignment: weight goes to the domains whose gradient points where the target's does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.errors import ConfigError
from weftlm.mixture.config import DgaConfig, PolicyConfig, policies
from weftlm.mixture.mirror import (
    MirrorPolicy,
    MirrorState,
    exponentiated_gradient,
    initial_weights,
    nearest_mixture,
)
from weftlm.mixture.policy import CONSTANT, MixtureSetting, Report, missing_signal, with_floor
from weftlm.mixture.signals import read_alignment
from weftlm.mixture.uniform import uniform_weights


@dataclass(frozen=True)
class DgaState(MirrorState):
    """What DGA knows; a group's value is its scaled alignment, and `smooth_G` is what is sampled.

    Attributes:
        basis_ND: the basis distributions under reweight: basis, else shape (0, D).
        initial_G: weights before the first update, what `anchor` pulls to.
    """

    basis_ND: Tensor = dataclasses.field(metadata=CONSTANT)
    initial_G: Tensor = dataclasses.field(metadata=CONSTANT)


@policies.register(
    "dga",
    does="moves weight to domains whose gradient points where the target's does",
    costs="0.6 to 0.8 % of training at T_r = 100, 6 to 8 % at 10, 23 to 42 % at 1",
    paper="arXiv:2410.02498",
)
class DgaPolicy(MirrorPolicy[DgaConfig, DgaState]):
    """Online mixture by gradient alignment with a target.

    One gradient step on the mixture changes the target's loss by about -rho sum_i alpha_i <g_i, g_spe>. Every T_r steps
    the mixture takes the step that makes this change largest under a Kullback-Leibler pull to where it is:

        a_i    = <g_i, g_spe>, scaled as `normalize` says
        m_i   prop. to  alpha_i^(1 - tau) alpha0_i^tau exp(eta a_i)  tau = anchor, alpha0 = initial weights
        m      = (1 - c) m + c / G                                   c = floor
        alpha <- (1 - beta) alpha + beta m                           beta = ema

    With tau > 0 the pull is to both the present and the initial weights, and a constant alignment settles at
    alpha0_i exp(eta a_i / tau), normalised, instead of at a corner.

    With `ema_feedback: false` the second line starts from the last m instead of alpha. With `reweight: basis` the same
    runs on w over N basis distributions p_n, and alpha = sum_n w_n p_n; alignments then arrive per basis distribution,
    and w starts where alpha is nearest to the initial weights over domains (`nearest_mixture`). The
    weights decide what is sampled; they never weigh the loss again.

    A group absent from a probe (NaN) keeps its last alignment; one never yet seen keeps its weight. A probe that tells
    nothing changes nothing and is counted in the diagnostic `skipped`.

    Paper: Fan, Grangier, Ablin, arXiv 2410.02498; distribution reweighting is its section on many domains. `scale`,
    `ema_feedback`, `floor` and `anchor` are choices of this implementation.
    """

    Config: ClassVar[type[PolicyConfig]] = DgaConfig

    def init(self, setting: MixtureSetting) -> DgaState:
        config = self.config
        if config.reweight == "basis":
            basis_ND = _checked_basis(setting)
            groups = tuple(f"basis {n}" for n in range(len(basis_ND)))
            start_G = self._basis_start(setting, basis_ND)
        else:
            basis_ND = torch.zeros(0, len(setting.domains), dtype=torch.float64)
            groups = setting.domains
            start_G = initial_weights(config.initial, setting, config.policy)
        start_G = with_floor(start_G, config.floor)
        return DgaState.at(start_G, groups, basis_ND=basis_ND, initial_G=start_G)

    def _basis_start(self, setting: MixtureSetting, basis_ND: Tensor) -> Tensor:
        if self.config.initial == "uniform":
            return uniform_weights(len(basis_ND))
        return nearest_mixture(initial_weights(self.config.initial, setting, self.config.policy), basis_ND)

    def measured(self, state: DgaState, report: Report) -> Tensor | None:
        return read_alignment(report, self.config, "target_alignment", state.groups)

    def mirror_step(self, state: DgaState, exponents_G: Tensor) -> Tensor:
        start_G = state.smooth_G if self.config.ema_feedback else state.mirror_G
        pull_G = self.config.anchor * torch.where(start_G > 0, state.initial_G / start_G, 1.0).log()
        return exponentiated_gradient(start_G, exponents_G + pull_G)

    def smoothed(self, state: DgaState, mirror_G: Tensor) -> Tensor:
        return (1.0 - self.config.ema) * state.smooth_G + self.config.ema * mirror_G

    def weights(self, state: DgaState) -> Tensor:
        return state.smooth_G @ state.basis_ND if self.config.reweight == "basis" else state.smooth_G

    def diagnostics(self, state: DgaState) -> Mapping[str, float | list[float]]:
        """`alignment` and `group_weights` are per group; `entropy_nats` is that of the domains' weights."""
        return {
            **super().diagnostics(state),
            "alignment": state.values_G.tolist(),
            "group_weights": state.smooth_G.tolist(),
        }


def _checked_basis(setting: MixtureSetting) -> Tensor:
    if setting.basis_ND is None:
        raise missing_signal("dga", "basis")
    basis_ND = setting.basis_ND.to(torch.float64)
    domains = len(setting.domains)
    if basis_ND.ndim != 2 or basis_ND.shape[0] == 0 or basis_ND.shape[1] != domains:
        raise ConfigError(
            f"basis distributions have shape {tuple(basis_ND.shape)}; expected (N, {domains}) with N >= 1"
        )
    sums_N = basis_ND.sum(dim=1)
    if not bool((basis_ND >= 0).all()) or not bool(((sums_N - 1.0).abs() <= 1e-6).all()):
        raise ConfigError(
            f"basis distributions must hold no negative share and sum to 1; they sum to {sums_N.tolist()}"
        )
    return basis_ND / sums_N[:, None]
