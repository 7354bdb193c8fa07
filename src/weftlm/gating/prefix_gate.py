"""The learned causal gate: what Bayes and fixed share say of the prefix, and a learned correction.

It starts as Bayes (or fixed share), so training begins where the best untrained causal gates end. Distillation fits it
to a sequence-level gate; `fit_robust_gate` fits it to the minimax objective itself.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from weftlm.errors import ConfigError
from weftlm.gating.arrays import simplex_vector
from weftlm.gating.bayes import BayesGate, FixedShareGate
from weftlm.gating.config import BayesConfig, FixedShareConfig, GateConfig, PrefixGateConfig, gates
from weftlm.gating.gate import FLOOR, CausalGate, Features, State
from weftlm.gating.linear import moments

_DEAD = -1e4
"""Nats that stand for a log-posterior of -inf: weight 0 in every float type, and finite."""
_WEIGHTS = "weights_BE"


@gates.register(
    "prefix",
    does="Bayes and fixed share, corrected by a small network that reads the experts' scores so far",
    costs="training; every expert on every token, or the m best: with one of eight per token 1.5 (hidden size "
    "768) to 2.0 (512) times one expert's time, 1.2 to 1.8 where inactive experts never catch up",
)
class PrefixGate(CausalGate):
    """Bayes' and fixed share's log-posteriors plus a correction learned from the prefix.

        gamma_k(x_<t) = softmax_k( a log b_k + c log w_k + beta_k + u . h_k )       of the m largest, where `top` is set
        h'_k = tanh(V f~_k + v + e_k)       h_k = tanh(A h'_k + B mean_j h'_j + d)  f~ = (f - mean) / scale

    b_k(x_<t): Bayes' posterior with prior `prior_E`; w_k(x_<t): that of fixed share from the same first weights. The
    features f of a prefix x_<t and an expert k:

        mean over s < t of log q_k(x_s | x_<s), token s weighted by 2^(-(t - 1 - s) / half-life), for each half-life
        the same minus the best expert's
        log b_k, log w_k, not below -50 nats
        n / (n + horizon), n tokens so far

    u = 0, beta = 0, e = 0 and (a, c) = (1, 0) at first, or (0, 1) with `base` fixed_share: exactly that gate. V, A, B
    and v, d are random by the seed. With (1, 0), beta is a change of the prior. V, A, B, u are common to all experts;
    e and beta are one per expert, so that relabelling the experts relabels the weights.

    Length gives nothing away: the gate sees the tokens so far and not how many will come, padding changes nothing,
    means are per token, posteriors are bounded, and the clock approaches 1.

    All but the learned tensors is a function of the experts' scores alone: gradients flow through the correction, a, c
    and beta only. An expert impossible under Bayes keeps weight 0 until c or a smaller a brings it back.
    """

    Config: ClassVar[type[GateConfig]] = PrefixGateConfig
    learned: ClassVar[tuple[str, ...]] = (
        "mix_2", "bias_E", "in_HF", "in_H", "expert_EH", "middle_HH", "pool_HH", "middle_H", "out_H",
    )  # fmt: skip
    shrunk: ClassVar[tuple[str, ...]] = ("bias_E", "expert_EH", "out_H")
    config: PrefixGateConfig

    @classmethod
    def init(cls, config: PrefixGateConfig, experts: int, features: Features, seed: int) -> Self:
        gate = cls.of(torch.full((experts,), 1.0 / experts, dtype=torch.float64), config, seed)
        return gate.standardised(features)

    @classmethod
    def of(cls, prior_E: Any, config: PrefixGateConfig | None = None, seed: int = 0) -> Self:
        """The gate with this prior and features as they come; `standardised` adapts them to data.

        Raises:
            ConfigError: it is no probability vector.
        """
        config = config or PrefixGateConfig()
        experts, hidden, width = len(prior_E), config.hidden, 2 * len(config.half_lives_tokens) + 3
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

        zeros = {"bias_E": (experts,), "expert_EH": (experts, hidden), "out_H": (hidden,), "mean_F": (width,)}
        tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in zeros.items()}
        tensors |= {
            "mix_2": torch.tensor([1.0, 0.0] if config.base == "bayes" else [0.0, 1.0], dtype=torch.float64),
            "in_HF": random(hidden, width),
            "in_H": random(hidden),
            "middle_HH": random(hidden, hidden),
            "pool_HH": random(hidden, hidden),
            "middle_H": random(hidden),
            "scale_F": torch.ones(width, dtype=torch.float64),
        }
        prior = torch.from_numpy(simplex_vector(prior_E, "prior_E", experts))
        return cls(config, experts, tensors | {"prior_E": prior.log()})

    def with_prior(self, prior_E: Tensor) -> Self:
        prior = torch.from_numpy(simplex_vector(prior_E, "prior_E", self.experts))
        return self.replaced({"prior_E": prior.log()})

    def standardised(self, features: Features) -> Self:
        """The same gate with mean and scale of its features taken from these sequences, padding left out."""
        logp_BTE, mask_BT = self.tokens(features)
        if logp_BTE.shape[0] * logp_BTE.shape[1] == 0 or (mask_BT is not None and not bool(mask_BT.any())):
            return self
        values_BTEF = self._evidence(self.all_states(logp_BTE, mask_BT))[0]
        values_NEF = values_BTEF if mask_BT is None else values_BTEF[mask_BT]
        return self.replaced(moments(values_NEF.reshape(-1, values_BTEF.shape[-1])))

    # -- the best experts alone ---------------------------------------------------------------------------------

    def with_top(self, top: int | None) -> Self:
        """The same gate with so many experts per token; None: all.

        Raises:
            ConfigError: it is not from 1 to the number of experts.
        """
        if top is not None and not 1 <= top <= self.experts:
            raise ConfigError(f"top is {top}; it must be from 1 to {self.experts} experts per token, or None for all")
        return dataclasses.replace(self, config=self.config.model_copy(update={"top": top}))

    def restricted(self, logits_XE: Tensor) -> Tensor:
        """Log-weights from logits: -inf but for the `top` largest, normalised over those."""
        if self.top is None or self.top >= self.experts:
            return torch.log_softmax(logits_XE, dim=-1)
        chosen_XM = logits_XE.detach().topk(self.top, dim=-1).indices
        left_XE = torch.ones_like(logits_XE, dtype=torch.bool).scatter(-1, chosen_XM, False)
        return torch.log_softmax(logits_XE.masked_fill(left_XE, -math.inf), dim=-1)

    # -- all tokens at a time -----------------------------------------------------------------------------------

    def log_weights(self, features: Features) -> Tensor:
        return self.restricted(self.logits(features))

    def logits(self, features: Features) -> Tensor:
        """BTE before the softmax and before `top`."""
        logp_BTE, mask_BT = self.tokens(features)
        if not logp_BTE.shape[1]:
            return logp_BTE.to(self.tensors["prior_E"].dtype)
        with torch.no_grad():  # no learned tensor has a part in the states
            states = self.all_states(logp_BTE, mask_BT)
        return self._logits(*self._evidence(states))

    @torch.no_grad()
    def _evidence(self, state: State) -> tuple[Tensor, Tensor]:
        """Features XEF and the two log-posteriors XE2 of the prefixes behind a state."""
        sums_XLE, count_X = state["sums_BLE"], state["count_B"]
        posteriors_XE2 = torch.stack(
            [gate.current({_WEIGHTS: state[name]}) for name, gate in self._untrained.items()], dim=-1
        )
        decay_L = self._decays(sums_XLE)
        norms_XL = (1.0 - decay_L ** count_X[..., None]) / (1.0 - decay_L)
        means_XLE = sums_XLE / torch.where(norms_XL > 0, norms_XL, torch.ones_like(norms_XL))[..., None]
        below_XLE = means_XLE - means_XLE.amax(dim=-1, keepdim=True)
        clock_X = count_X / (count_X + self.config.horizon_tokens)
        clock_XE1 = clock_X[..., None, None].expand(*posteriors_XE2.shape[:-1], 1)
        columns = [means_XLE.transpose(-1, -2), below_XLE.transpose(-1, -2), posteriors_XE2.clamp_min(-FLOOR)]
        return torch.cat([*columns, clock_XE1], dim=-1), posteriors_XE2

    def _logits(self, values_XEF: Tensor, posteriors_XE2: Tensor) -> Tensor:
        at = self.tensors
        scaled_XEF = (values_XEF - at["mean_F"]) / at["scale_F"]
        first_XEH = torch.tanh(scaled_XEF @ at["in_HF"].T + at["in_H"] + at["expert_EH"])
        pooled_X1H = first_XEH.mean(dim=-2, keepdim=True) @ at["pool_HH"].T
        second_XEH = torch.tanh(first_XEH @ at["middle_HH"].T + pooled_X1H + at["middle_H"])
        return posteriors_XE2.clamp_min(_DEAD) @ at["mix_2"] + at["bias_E"] + second_XEH @ at["out_H"]

    def _decays(self, like: Tensor) -> Tensor:
        half_lives_L = torch.tensor(self.config.half_lives_tokens, dtype=like.dtype, device=like.device)
        return torch.exp2(-1.0 / half_lives_L)

    @functools.cached_property
    def _untrained(self) -> dict[str, FixedShareGate]:
        """The gates b and w, by the name of their weights in a state."""
        prior, share = {"logits_E": self.tensors["prior_E"]}, FixedShareConfig(share=self.config.share)
        return {
            "bayes_BE": BayesGate(BayesConfig(), self.experts, prior),
            "share_BE": FixedShareGate(share, self.experts, prior),
        }

    # -- token by token -----------------------------------------------------------------------------------------

    def begin(self, batch: int) -> State:
        prior_E = self.tensors["prior_E"]
        return {
            **{name: gate.begin(batch)[_WEIGHTS] for name, gate in self._untrained.items()},
            "sums_BLE": prior_E.new_zeros(batch, len(self.config.half_lives_tokens), self.experts),
            "count_B": prior_E.new_zeros(batch),
        }

    def current(self, state: State) -> Tensor:
        return self.restricted(self._logits(*self._evidence(state)))

    def advance(self, state: State, logp_BE: Tensor, mask_B: Tensor | None = None) -> State:
        before_BLE, count_B = state["sums_BLE"], state["count_B"]
        logp_BE = logp_BE.to(before_BLE.dtype)
        after = {
            name: gate.advance({_WEIGHTS: state[name]}, logp_BE, mask_B)[_WEIGHTS]
            for name, gate in self._untrained.items()
        }
        sums_BLE = self._decays(before_BLE)[:, None] * before_BLE + _worth(logp_BE)[:, None]
        if mask_B is None:
            return {**after, "sums_BLE": sums_BLE, "count_B": count_B + 1.0}
        sums_BLE = torch.where(mask_B[:, None, None], sums_BLE, before_BLE)
        return {**after, "sums_BLE": sums_BLE, "count_B": count_B + mask_B.to(count_B.dtype)}


def _worth(logp_XE: Tensor) -> Tensor:
    """Scores no more than 50 nats below the best expert's; 0 where every expert says impossible."""
    best_X1 = logp_XE.amax(dim=-1, keepdim=True)
    best_X1 = torch.where(torch.isneginf(best_X1), torch.zeros_like(best_X1), best_X1)
    clipped_XE = best_X1 + (logp_XE - best_X1).clamp_min(-FLOOR)
    return torch.where(torch.isneginf(logp_XE).all(dim=-1, keepdim=True), torch.zeros_like(clipped_XE), clipped_XE)
