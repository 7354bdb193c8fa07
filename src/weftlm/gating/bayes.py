"""Causal gates that need no training: Bayes, fixed share, uniform. What a learned causal gate must beat.

All three work in log space and are normalised by construction: at every prefix the weights over experts sum to 1, so
the model they make is a distribution over sequences whatever the experts are.

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


@gates.register(
    "bayes",
    does="weighs experts by how likely they found the text so far",
    costs="every expert on every token, or the m best",
)
class BayesGate(CausalGate):
    """The exact causal router of a constant gate.

        gamma_k(x_<t)  prop. to  lambda_k q_k(x_<t) = lambda_k prod_{s<t} q_k(x_s | x_<s)

    Then prod_t sum_k gamma_k(x_<t) q_k(x_t | x_<t) = sum_k lambda_k q_k(x) (chain rule), at most log(1 / lambda_k) nats
    per sequence worse than expert k. The prior lambda is softmax of `logits_E`, uniform at first, and can be fitted.
    """

    Config: ClassVar[type[GateConfig]] = BayesConfig
    learned: ClassVar[tuple[str, ...]] = ("logits_E",)

    @classmethod
    def init(cls, config: Any, experts: int, features: Features, seed: int) -> Self:
        return cls(config, experts, {"logits_E": torch.zeros(experts, dtype=torch.float64)})

    @classmethod
    def of(cls, prior_E: Any) -> BayesGate:
        """The gate with this prior.

        Raises:
            ConfigError: it is not a probability vector.
        """
        return BayesGate(BayesConfig(), len(prior_E), {"logits_E": _log_prior(prior_E)})

    def with_prior(self, prior_E: Tensor) -> Self:
        return self.replaced({"logits_E": _log_prior(prior_E)})

    def begin(self, batch: int) -> State:
        return {"weights_BE": self._first().expand(batch, -1)}

    def current(self, state: State) -> Tensor:
        joint_BE, first_E = state["weights_BE"], self._first()
        dead_B1 = torch.isneginf(joint_BE).all(dim=-1, keepdim=True)
        alive_BE = torch.log_softmax(torch.where(dead_B1, torch.zeros_like(joint_BE), joint_BE), dim=-1)
        return torch.where(dead_B1, first_E.expand_as(alive_BE), alive_BE)

    def advance(self, state: State, logp_BE: Tensor, mask_B: Tensor | None = None) -> State:
        joint_BE = state["weights_BE"]  # not normalised from one token to the next
        logp_BE = logp_BE.to(joint_BE.dtype)
        if mask_B is not None:
            logp_BE = torch.where(mask_B[:, None], logp_BE, torch.zeros_like(logp_BE))
        return {"weights_BE": joint_BE + logp_BE}

    def log_weights(self, features: Features) -> Tensor:
        logp_BTE, mask_BT = self.tokens(features)
        return self.current(self.all_states(logp_BTE, mask_BT)) if logp_BTE.shape[1] else logp_BTE

    def all_states(self, logp_BTE: Tensor, mask_BT: Tensor | None) -> State:
        first_B1E = self._first().expand(len(logp_BTE), 1, -1)
        logp_BTE = logp_BTE.to(first_B1E.dtype)
        if mask_BT is not None:
            logp_BTE = torch.where(mask_BT[..., None], logp_BTE, torch.zeros_like(logp_BTE))
        return {"weights_BE": torch.cat([first_B1E, logp_BTE[:, :-1]], dim=1).cumsum(dim=1)}

    def _first(self) -> Tensor:
        """log of the first weights, E."""
        return torch.log_softmax(self.tensors["logits_E"], dim=0)


@gates.register(
    "fixed_share",
    does="Bayes' weights with a way back, so that a change of domain is followed",
    costs="as `bayes`",
    paper="Machine Learning 32 (1998), 151-178",
)
class FixedShareGate(BayesGate):
    """Bayes that expects the domain to change (Herbster and Warmuth 1998, "Tracking the best expert").

        v_k(t)     prop. to  w_k(t) q_k(x_t | x_<t)         Bayes' update
        w_k(t + 1) = (1 - alpha) v_k(t) + alpha / E         a little of the uniform back in

    Never far behind the best sequence of experts with few changes. w(1) is softmax of `logits_E`, uniform at first.
    """

    Config: ClassVar[type[GateConfig]] = FixedShareConfig
    config: FixedShareConfig

    @classmethod
    def of(cls, prior_E: Any, share: float = 0.01) -> FixedShareGate:
        """The gate with these first weights and this share.

        Raises:
            ConfigError: they are not a probability vector, or the share is not in [0, 1).
        """
        if not 0.0 <= share < 1.0:
            raise ConfigError(f"share is {share}; it must be at least 0 and below 1")
        return FixedShareGate(FixedShareConfig(share=share), len(prior_E), {"logits_E": _log_prior(prior_E)})

    def advance(self, state: State, logp_BE: Tensor, mask_B: Tensor | None = None) -> State:
        before_BE, joint_BE = state["weights_BE"], super().advance(state, logp_BE, mask_B)["weights_BE"]
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

    def all_states(self, logp_BTE: Tensor, mask_BT: Tensor | None) -> State:
        return CausalGate.all_states(self, logp_BTE, mask_BT)


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

    def begin(self, batch: int) -> State:
        return {"weights_BE": torch.full((batch, self.experts), -math.log(self.experts), dtype=torch.float64)}

    def current(self, state: State) -> Tensor:
        return state["weights_BE"]

    def advance(self, state: State, logp_BE: Tensor, mask_B: Tensor | None = None) -> State:
        return state


def _log_prior(prior_E: Any) -> Tensor:
    return torch.from_numpy(simplex_vector(prior_E, "prior_E", len(prior_E))).log()
