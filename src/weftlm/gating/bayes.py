"""Causal gates that need no training: Bayes and fixed share. What a learned causal gate must beat.

Both work in log space and are normalised by construction: at every prefix the weights over experts sum to 1, so the
model they make is a distribution over sequences whatever the experts are.

A prefix that every expert gives probability 0 says nothing: from there on the gates answer with their first weights,
and the model's probability of the sequence is 0 in any case.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from weftlm.config import validate
from weftlm.gating.arrays import simplex_vector
from weftlm.gating.config import BayesConfig, FixedShareConfig, GateConfig, gates
from weftlm.gating.gate import CausalGate, Features, State


@gates.register(
    "fixed_share",
    does="Bayes' weights with a way back, so that a change of domain is followed; with share 1, equal weights",
    costs="as `bayes`",
    paper="Machine Learning 32 (1998), 151-178",
)
class FixedShareGate(CausalGate):
    """Bayes that expects the domain to change (Herbster and Warmuth 1998, "Tracking the best expert").

        v_k(t)     prop. to  w_k(t) q_k(x_t | x_<t)         Bayes' update
        w_k(t + 1) = (1 - alpha) v_k(t) + alpha / E         a little of the uniform back in

    Never far behind the best sequence of experts with few changes. w(1) is softmax of `logits_E`, uniform at first, and
    can be fitted.
    """

    Config: ClassVar[type[GateConfig]] = FixedShareConfig
    learned: ClassVar[tuple[str, ...]] = ("logits_E",)

    @classmethod
    def init(cls, config: Any, experts: int, features: Features, seed: int) -> Self:
        return cls(config, experts, {"logits_E": torch.zeros(experts, dtype=torch.float64)})

    @classmethod
    def of(cls, prior_E: Any, share: float | None = None) -> Self:
        """The gate with these first weights and this share; None: the default.

        Raises:
            ConfigError: they are not a probability vector, or the share is not from 0 to 1.
        """
        config = validate(cls.Config, {} if share is None else {"share": share}, "gate")
        return cls(config, len(prior_E), {"logits_E": _log_prior(prior_E)})

    @property
    def share(self) -> float:
        """alpha."""
        return float(getattr(self.config, "share", 0.0))

    def with_prior(self, prior_E: Tensor) -> Self:
        return self.replaced({"logits_E": _log_prior(prior_E)})

    def begin(self, batch: int) -> State:
        return {"weights_BE": self._first().expand(batch, -1)}

    def current(self, state: State) -> Tensor:
        weights_BE = state["weights_BE"]
        dead_B1 = torch.isneginf(weights_BE).all(dim=-1, keepdim=True)
        return torch.where(dead_B1, self._first().expand_as(weights_BE), weights_BE)

    def advance(self, state: State, logp_BE: Tensor, mask_B: Tensor | None = None) -> State:
        before_BE = state["weights_BE"]
        joint_BE = before_BE + logp_BE.to(before_BE.dtype)
        dead_B1 = torch.isneginf(joint_BE).all(dim=-1, keepdim=True)
        after_BE = torch.log_softmax(torch.where(dead_B1, torch.zeros_like(joint_BE), joint_BE), dim=-1)
        if self.share > 0.0:
            kept = math.log1p(-self.share) if self.share < 1.0 else -math.inf
            spread_BE = torch.full_like(after_BE, math.log(self.share / self.experts))
            after_BE = torch.logaddexp(after_BE + kept, spread_BE)
        after_BE = torch.where(dead_B1, torch.full_like(after_BE, -math.inf), after_BE)
        if mask_B is not None:
            after_BE = torch.where(mask_B[:, None], after_BE, before_BE)
        return {"weights_BE": after_BE}

    def _first(self) -> Tensor:
        """log of the first weights, E."""
        return torch.log_softmax(self.tensors["logits_E"], dim=0)


@gates.register(
    "bayes",
    does="weighs experts by how likely they found the text so far",
    costs="every expert on every token, or the m best",
)
class BayesGate(FixedShareGate):
    """The exact causal router of a constant gate.

        gamma_k(x_<t)  prop. to  lambda_k q_k(x_<t) = lambda_k prod_{s<t} q_k(x_s | x_<s)

    Then prod_t sum_k gamma_k(x_<t) q_k(x_t | x_<t) = sum_k lambda_k q_k(x) (chain rule), at most log(1 / lambda_k) nats
    per sequence worse than expert k. The prior lambda is softmax of `logits_E`, uniform at first, and can be fitted.
    """

    Config: ClassVar[type[GateConfig]] = BayesConfig


def _log_prior(prior_E: Any) -> Tensor:
    return torch.from_numpy(simplex_vector(prior_E, "prior_E", len(prior_E))).log()
