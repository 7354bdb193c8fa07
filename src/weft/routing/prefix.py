"""Prefix routing: tiny n-gram models of every expert's data say, word by word, whose text this is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, FiniteFloat, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from weft.errors import ConfigError, ExpertError
from weft.experts.expert import Expert
from weft.experts.statistics import bigram_bucket
from weft.routing.router import Call, Memory, Need, Router, RouterConfig, Routing, Site, routers

CHUNK = 64
"""Tokens of a prefix summed up at once."""
_SUMS, _LAST = "prefix.sums", "prefix.last"


class PrefixConfig(RouterConfig):
    """Configuration of `prefix`."""

    router: Literal["prefix"] = "prefix"
    k: PositiveInt = Field(2, description="experts per token")
    half_life_tokens: PositiveFloat = Field(
        32.0, description="evidence counts half as much so many tokens later; long: a topic, short: follows changes"
    )
    temperature: PositiveFloat = Field(8.0, description="the evidence, in nats, is divided by it")
    background_bias: FiniteFloat = Field(
        -8.0,
        description="added to the log-posterior of the pool as a whole, whose n-grams fit any text too well",
    )
    background_rank: PositiveInt = Field(64, description="rank to which the mean of all experts is cut")
    bigram_strength: NonNegativeFloat = Field(
        32.0, description="kappa: a pair's count is trusted over its second token's when much larger"
    )


@routers.register("prefix")
class PrefixRouter(Router):
    """The posterior over experts, and over the pool as a whole, given the text read so far.

    Every expert's statistics hold how often tokens and (hashed) pairs of tokens occur in its data; that is a bigram
    model p_z, backed off to single tokens. The pool as a whole is their average. With the decayed evidence of a prefix

        S_z(t) = g S_z(t - 1) + log p_z(x_t | x_{t-1}),        g = 2^(-1 / half_life)
        pi     = softmax over the N experts and the pool of S(t) / temperature

    the k experts of highest posterior work with weights pi_z, in every module alike, and the mean of all experts works
    with the rest of the mass. So a text like an expert's own gets that expert, a text like nobody's gets what merging
    would give, and a change of topic is followed at the pace of the half-life. Causal: a token's choice depends on it
    and those before it. In generation the sums travel with the KV cache.

        p_z(w | v) = (count_z(v w) + kappa p_z(w)) / (count_z(v) + kappa)
        p_z(w)     = (count_z(w) + 1/2) / (sum_w' count_z(w') + V/2)

    An addition of weft's to the routers of the literature.
    """

    Config: ClassVar[type[RouterConfig]] = PrefixConfig
    needs: ClassVar[frozenset[Need]] = frozenset({"statistics"})
    supports_encoder_decoder: ClassVar[bool] = False
    config: PrefixConfig

    def __init__(self, config: PrefixConfig, experts: Sequence[Expert], sites: Sequence[Site]) -> None:
        super().__init__(config, experts, sites)
        statistics = [expert.statistics for expert in experts if expert.statistics is not None]
        for kind in ("token_counts_V", "bigram_counts_K"):
            sizes = {expert.name: len(getattr(each, kind)) for expert, each in zip(experts, statistics, strict=True)}
            if len(set(sizes.values())) > 1:
                raise ExpertError(
                    f"the experts' statistics count over different ranges ({kind}: {sizes}); collect them over one "
                    "tokenizer"
                )
        tokens_VE = torch.stack([each.token_counts_V for each in statistics], dim=1).double()
        pairs_KE = torch.stack([each.bigram_counts_K for each in statistics], dim=1).double()
        unigram_VE = (tokens_VE + 0.5) / (tokens_VE + 0.5).sum(dim=0)
        self.register_buffer("unigram_VE", unigram_VE.float(), persistent=False)
        self.register_buffer("count_VE", tokens_VE.float(), persistent=False)
        self.register_buffer("pairs_KE", pairs_KE.float(), persistent=False)
        decay = 2.0 ** (-1.0 / config.half_life_tokens)
        steps_C = torch.arange(CHUNK, dtype=torch.float64)
        lower_CC = torch.tril(decay ** (steps_C[:, None] - steps_C[None, :]).clamp_min(0))
        self.register_buffer("lower_CC", lower_CC.float(), persistent=False)
        self.register_buffer("carry_C", (decay ** (steps_C + 1)).float(), persistent=False)

    @property
    def background_rank(self) -> int:
        return self.config.background_rank

    def begin(self, call: Call) -> None:
        ids_BT = call.input_ids_BT
        if ids_BT is None or (call.continues and _SUMS not in call.memory.tensors):
            raise ConfigError(
                f"router {self.config.router!r} reads token ids from the start of the text; pass input_ids, and the "
                "past_key_values the routed model itself returned"
            )
        memory = Memory(follows_tokens=True)
        sums_BTG = self._evidence(ids_BT, call.mask_BT, call.memory)
        memory.tensors[_SUMS] = sums_BTG[:, -1]
        memory.tensors[_LAST] = torch.where(call.mask_BT[:, -1], ids_BT[:, -1], -1)
        call.memory = memory
        call.decisions["posterior"] = self._posterior(sums_BTG)
        call.decisions["routing"] = self._choose(call.decisions["posterior"])

    def route(self, site: Site, u_BTI: Tensor, call: Call) -> Routing:
        routing: Routing = call.decisions["routing"]
        return routing

    def _evidence(self, ids_BT: Tensor, mask_BT: Tensor, memory: Memory) -> Tensor:
        """S_BTG: decayed sums of log-likelihood under each expert, and last under the pool; padding adds nothing."""
        likelihood_BTE = self.likelihoods(ids_BT, mask_BT, memory.tensors.get(_LAST))
        gains_BTG = torch.cat([likelihood_BTE, likelihood_BTE.mean(dim=-1, keepdim=True)], dim=-1).log()
        # Only differences count; taking the best one off each token keeps the sums small.
        gains_BTG = (gains_BTG - gains_BTG.amax(dim=-1, keepdim=True)) * mask_BT[..., None]
        sums_BG = memory.tensors.get(_SUMS)
        if sums_BG is None:
            sums_BG = gains_BTG.new_zeros(gains_BTG.shape[0], gains_BTG.shape[2])
        real_BT = mask_BT if not bool(mask_BT.all()) else None
        pieces = []
        for start in range(0, gains_BTG.shape[1], CHUNK):
            piece_BCG = gains_BTG[:, start : start + CHUNK]
            length = piece_BCG.shape[1]
            if real_BT is None:
                lower_CC, carry_C = self._decays(length)
                summed_BCG = lower_CC @ piece_BCG + carry_C[:, None] * sums_BG[:, None]
            else:
                summed_BCG = self._with_padding(piece_BCG, real_BT[:, start : start + CHUNK], sums_BG)
            pieces.append(summed_BCG)
            sums_BG = summed_BCG[:, -1]
        return torch.cat(pieces, dim=1)

    def _decays(self, length: int) -> tuple[Tensor, Tensor]:
        return self.get_buffer("lower_CC")[:length, :length], self.get_buffer("carry_C")[:length]

    def _with_padding(self, piece_BCG: Tensor, real_BC: Tensor, sums_BG: Tensor) -> Tensor:
        """The same where padding stands between: evidence ages by real tokens alone."""
        age_BC = real_BC.cumsum(dim=1).float()
        apart_BCC = age_BC[:, :, None] - age_BC[:, None, :]
        rate = math.log(2.0) / self.config.half_life_tokens
        causal_CC = torch.ones_like(apart_BCC[0]).tril()
        lower_BCC = torch.exp(-rate * apart_BCC.clamp_min(0)) * causal_CC
        return lower_BCC @ piece_BCG + torch.exp(-rate * age_BC)[..., None] * sums_BG[:, None]

    def likelihoods(self, ids_BT: Tensor, mask_BT: Tensor, last_B: Tensor | None = None) -> Tensor:
        """p_z(x_t | x_{t-1}) of every token under every expert's bigram model, BTE, float32.

        Args:
            ids_BT: token ids; ids the experts never counted get the floor of the smoothing.
            mask_BT: True for real tokens. After padding, or at the start, a token stands alone.
            last_B: the token before the first, -1 for none.
        """
        unigram_VE, count_VE = self.get_buffer("unigram_VE"), self.get_buffer("count_VE")
        pairs_KE = self.get_buffer("pairs_KE")
        ids_BT = ids_BT.to(unigram_VE.device)
        known_BT = ids_BT.clamp(0, len(unigram_VE) - 1)
        before_BT = torch.cat([_before(ids_BT, last_B), ids_BT[:, :-1]], dim=1)
        paired_BT = torch.cat([_before(ids_BT, last_B) >= 0, mask_BT[:, :-1].to(ids_BT.device)], dim=1)
        alone_BTE = unigram_VE[known_BT]
        previous_BT = before_BT.clamp(0, len(unigram_VE) - 1)
        pairs_BTE = pairs_KE[bigram_bucket(previous_BT, known_BT, len(pairs_KE))]
        kappa = self.config.bigram_strength
        backed_BTE = (pairs_BTE + kappa * alone_BTE) / (count_VE[previous_BT] + kappa).clamp_min(1e-12)
        floor = float(unigram_VE.min())
        return torch.where(paired_BT[..., None], backed_BTE.clamp_min(floor * 1e-3), alone_BTE)

    def _posterior(self, sums_BTG: Tensor) -> Tensor:
        evidence_BTG = sums_BTG / self.config.temperature
        bias_G = torch.zeros(evidence_BTG.shape[-1], device=evidence_BTG.device)
        bias_G[-1] = self.config.background_bias
        return torch.softmax(evidence_BTG + bias_G, dim=-1)

    def _choose(self, posterior_BTG: Tensor) -> Routing:
        best_BTK, choice_BTK = posterior_BTG[..., :-1].topk(min(self.config.k, len(self.names)), dim=-1)
        return Routing(choice_BTK, best_BTK, (1.0 - best_BTK.sum(dim=-1)).clamp_min(0.0))


def _before(ids_BT: Tensor, last_B: Tensor | None) -> Tensor:
    """The token before the first, B1; -1 where there is none."""
    if last_B is None:
        return torch.full_like(ids_BT[:, :1], -1)
    return last_B[:, None].to(ids_BT.device)
