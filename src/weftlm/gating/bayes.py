"""Causal gates that need no training: Bayes, fixed share, uniform. What a learned causal gate must beat.

All three answer BTE in log space and are normalised by construction: at every prefix the weights over experts sum to 1,
so the model they make is a distribution over sequences whatever the experts are.

A prefix that every expert gives probability 0 says nothing: from there on the gates answer with their first weights,
and the model's probability of the sequence is 0 in any case.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from weftlm.errors import ConfigError
from weftlm.gating.arrays import simplex_vector
from weftlm.gating.config import BayesConfig, CausalUniformConfig, FixedShareConfig, GateConfig, gates
from weftlm.gating.gate import CausalGate, Features, State


class FirstWeightsGate(CausalGate):
    """What Bayes and fixed share have in common: first weights, softmax of `logits_E`, uniform at first, learned."""

    learned: ClassVar[tuple[str, ...]] = ("logits_E",)

    @classmethod
    def init(cls, config: Any, experts: int, features: Features, seed: int) -> Self:
        return cls(config, experts, {"logits_E": torch.zeros(experts, dtype=torch.float64)})

    @classmethod
    def _from(cls, config: GateConfig, prior_E: Any) -> Self:
        prior = torch.from_numpy(simplex_vector(prior_E, "prior_E", len(prior_E)))
        return cls(config, len(prior), {"logits_E": prior.log()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"logits_E": (self.experts,)}

    def first(self) -> Tensor:
        """log of the first weights, E."""
        return torch.log_softmax(self.tensors["logits_E"], dim=0)

    def begin(self, batch: int) -> State:
        return {"weights_BE": self.first().expand(batch, -1)}

    def current(self, state: State) -> Tensor:
        return _posterior(state["weights_BE"], self.first())


@gates.register(
    "bayes",
    does="weighs experts by how likely they found the text so far",
    costs="every expert on every token, or the m best",
)
class BayesGate(FirstWeightsGate):
    """The exact causal router of a constant gate.

        gamma_k(x_<t)  prop. to  lambda_k q_k(x_<t) = lambda_k prod_{s<t} q_k(x_s | x_<s)

    Then prod_t sum_k gamma_k(x_<t) q_k(x_t | x_<t) = sum_k lambda_k q_k(x) (chain rule), at most log(1 / lambda_k) nats
    per sequence worse than expert k. The prior lambda is softmax of `logits_E`, uniform at first, and can be fitted.
    """

    Config: ClassVar[type[GateConfig]] = BayesConfig

    @classmethod
    def of(cls, prior_E: Any) -> Self:
        """The gate with this prior.

        Raises:
            ConfigError: it is not a probability vector.
        """
        return cls._from(BayesConfig(), prior_E)

    def log_weights(self, features: Features) -> Tensor:
        logp_BTE, mask_BT = self.tokens(features)
        prior_E = self.first()
        before_BTE = _exclusive_sums(_evidence(logp_BTE, mask_BT, prior_E))
        return _posterior(prior_E + before_BTE, prior_E)

    def advance(self, state: State, logp_BE: Tensor, mask_B: Tensor | None = None) -> State:
        joint_BE = state["weights_BE"]  # not normalised from one token to the next
        return {"weights_BE": joint_BE + _evidence(logp_BE, mask_B, joint_BE)}


@gates.register(
    "fixed_share",
    does="Bayes' weights with a way back, so that a change of domain is followed",
    costs="as `bayes`",
    paper="Machine Learning 32 (1998), 151-178",
)
class FixedShareGate(FirstWeightsGate):
    """Bayes that expects the domain to change (Herbster and Warmuth 1998, "Tracking the best expert").

        v_k(t)     prop. to  w_k(t) q_k(x_t | x_<t)         Bayes' update
        w_k(t + 1) = (1 - alpha) v_k(t) + alpha / E         a little of the uniform back in

    Never far behind the best sequence of experts with few changes. w(1) is softmax of `logits_E`, uniform at first.
    """

    Config: ClassVar[type[GateConfig]] = FixedShareConfig
    config: FixedShareConfig

    @classmethod
    def of(cls, prior_E: Any, share: float) -> Self:
        """The gate with these first weights and this share.

        Raises:
            ConfigError: they are not a probability vector, or the share is not in [0, 1).
        """
        if not 0.0 <= share < 1.0:
            raise ConfigError(f"share is {share}; it must be at least 0 and below 1")
        return cls._from(FixedShareConfig(share=share), prior_E)

    def log_weights(self, features: Features) -> Tensor:
        logp_BTE, mask_BT = self.tokens(features)
        state = self.begin(len(logp_BTE))
        rows = []
        for t in range(logp_BTE.shape[1]):
            rows.append(self.current(state))
            state = self.advance(state, logp_BTE[:, t], None if mask_BT is None else mask_BT[:, t])
        shape = (len(logp_BTE), 0, self.experts)
        return torch.stack(rows, dim=1) if rows else self.first().new_zeros(shape)

    def advance(self, state: State, logp_BE: Tensor, mask_B: Tensor | None = None) -> State:
        before_BE = state["weights_BE"]
        joint_BE = before_BE + _evidence(logp_BE, mask_B, before_BE)
        dead_B1 = torch.isneginf(joint_BE).all(dim=-1, keepdim=True)
        after_BE = torch.log_softmax(torch.where(dead_B1, torch.zeros_like(joint_BE), joint_BE), dim=-1)
        share = self.config.share
        if share > 0.0:
            spread = torch.full_like(after_BE, math.log(share / self.experts))
            after_BE = torch.logaddexp(after_BE + math.log1p(-share), spread)
        after_BE = torch.where(dead_B1, torch.full_like(after_BE, -math.inf), after_BE)
        if mask_B is not None:
            after_BE = torch.where(mask_B[:, None], after_BE, before_BE)
        return {"weights_BE": after_BE}


@gates.register(
    "causal_uniform",
    does="gives every expert the same weight at every token",
    costs="every expert on every token",
)
class CausalUniformGate(CausalGate):
    """Equal weights at every token: an average of next-token distributions, gamma_k = 1 / E."""

    Config: ClassVar[type[GateConfig]] = CausalUniformConfig

    @classmethod
    def init(cls, config: CausalUniformConfig, experts: int, features: Features, seed: int) -> Self:
        return cls(config, experts, {})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def log_weights(self, features: Features) -> Tensor:
        logp_BTE, _ = self.tokens(features)
        return torch.full_like(logp_BTE, -math.log(self.experts))

    def begin(self, batch: int) -> State:
        return {"weights_BE": torch.full((batch, self.experts), -math.log(self.experts), dtype=torch.float64)}

    def current(self, state: State) -> Tensor:
        return state["weights_BE"]

    def advance(self, state: State, logp_BE: Tensor, mask_B: Tensor | None = None) -> State:
        return state


def _evidence(logp_XE: Tensor, mask_X: Tensor | None, like: Tensor) -> Tensor:
    """Scores in the gate's float type; padding is worth 0 to every expert."""
    logp_XE = logp_XE.to(like.dtype)
    return logp_XE if mask_X is None else torch.where(mask_X[..., None], logp_XE, torch.zeros_like(logp_XE))


def _exclusive_sums(logp_BTE: Tensor) -> Tensor:
    """Sums over s < t: 0 at the first token."""
    sums_BTE = logp_BTE.cumsum(dim=1)
    return torch.cat([torch.zeros_like(sums_BTE[:, :1]), sums_BTE[:, :-1]], dim=1)


def _posterior(joint_XE: Tensor, first_E: Tensor) -> Tensor:
    """Normalised over experts; the first weights where every expert is at -inf."""
    dead_X1 = torch.isneginf(joint_XE).all(dim=-1, keepdim=True)
    alive_XE = torch.log_softmax(torch.where(dead_X1, torch.zeros_like(joint_XE), joint_XE), dim=-1)
    return torch.where(dead_X1, first_E.expand_as(alive_XE), alive_XE)
