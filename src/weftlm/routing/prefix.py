"""Prefix routing: tiny n-gram models of every expert's data say, word by word, whose text this is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.errors import ConfigError, ExpertError
from weftlm.experts.expert import Expert
from weftlm.experts.statistics import bigram_bucket
from weftlm.routing.config import PrefixConfig, RouterConfig, routers
from weftlm.routing.router import Call, Memory, Need, Router, Routing, TargetModule

_SMALLEST = 1e-30
_POSTERIOR, _LAST = "prefix.posterior", "prefix.last"


@routers.register(
    "prefix",
    does="follows the text read so far by each expert's n-grams, per token",
    costs="the statistics; per token a look-up, the chosen experts' products and a mean of all cut to rank 64",
)
class PrefixRouter(Router):
    """The posterior over experts given the text read so far.

    Every expert's statistics hold how often tokens and (hashed) pairs of tokens occur in its data; that is a bigram
    model p_z, backed off to single tokens. A filter over the text that may change hands at any token gives

        pi_z(t)  proportional to  [ (1 - s) pi_z(t - 1) + s / N ] p_z(x_t | x_{t-1})^(1 / temperature)

    from pi uniform, with s = share. The k experts of highest posterior work with weights pi_z, in every module alike,
    and the mean of all experts works with the rest of the mass: text like an expert's own gets that expert, text that
    fits several gets them and what merging would give. Because s keeps every expert possible, a change of topic is
    followed within tokens. Causal: a token's choice depends on it and those before it. In generation the posterior
    travels with the KV cache.

        p_z(w | v) = (count_z(v w) + kappa p_z(w)) / (count_z(v) + kappa)          at most 1
        p_z(w)     = (count_z(w) + 1/2) / (sum_w' count_z(w') + V/2)

    An addition of weftlm's to the routers of the literature. The filter is the fixed-share rule of Herbster and Warmuth
    1998 with tempered likelihoods: n-grams of neighbouring tokens repeat each other, and say less together than alone.
    """

    Config: ClassVar[type[RouterConfig]] = PrefixConfig
    needs: ClassVar[frozenset[Need]] = frozenset({"statistics"})
    supports_encoder_decoder: ClassVar[bool] = False
    config: PrefixConfig

    def __init__(self, config: PrefixConfig, experts: Sequence[Expert], targets: Sequence[TargetModule]) -> None:
        super().__init__(config, experts, targets)
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

    @property
    def background_rank(self) -> int:
        return self.config.background_rank

    def begin(self, call: Call) -> None:
        ids_BT = call.input_ids_BT
        if ids_BT is None or (call.continues and _POSTERIOR not in call.memory.tensors):
            raise ConfigError(
                f"router {self.config.router!r} reads token ids from the start of the text; pass input_ids, and the "
                "past_key_values the routed model itself returned"
            )
        memory = Memory(follows_tokens=True)
        posterior_BTE = self.filtered(ids_BT, call.mask_BT, call.memory)
        memory.tensors[_POSTERIOR] = posterior_BTE[:, -1]
        memory.tensors[_LAST] = torch.where(call.mask_BT[:, -1], ids_BT[:, -1], -1)
        call.memory = memory
        call.decisions["posterior"] = posterior_BTE
        call.decisions["routing"] = self._choose(posterior_BTE)

    def route(self, target: TargetModule, u_BTI: Tensor, call: Call) -> Routing:
        routing: Routing = call.decisions["routing"]
        return routing

    def filtered(self, ids_BT: Tensor, mask_BT: Tensor, memory: Memory) -> Tensor:
        """pi_BTE after every token, float32; padding changes nothing.

        Args:
            ids_BT: token ids.
            mask_BT: True for real tokens.
            memory: Memory of the passes before, for a text that continues.
        """
        likelihood_BTE = self.likelihoods(ids_BT, mask_BT, memory.tensors.get(_LAST)).log() / self.config.temperature
        # Only ratios count; taking the best out of each token keeps products from vanishing.
        said_BTE = (likelihood_BTE - likelihood_BTE.amax(dim=-1, keepdim=True)).exp()
        said_BTE = torch.where(mask_BT[..., None].to(said_BTE.device), said_BTE, 1.0)
        experts = said_BTE.shape[-1]
        posterior_BE = memory.tensors.get(_POSTERIOR)
        if posterior_BE is None:
            posterior_BE = said_BTE.new_full((said_BTE.shape[0], experts), 1.0 / experts)
        keep_BT1 = 1.0 - self.config.share * mask_BT[..., None].to(said_BTE)
        steps = []
        for said_BE, keep_B1 in zip(said_BTE.unbind(1), keep_BT1.unbind(1), strict=True):
            moved_BE = (keep_B1 * posterior_BE + (1.0 - keep_B1) / experts) * said_BE
            moved_BE = moved_BE.clamp_min(_SMALLEST)
            posterior_BE = moved_BE / moved_BE.sum(dim=-1, keepdim=True)
            steps.append(posterior_BE)
        return torch.stack(steps, dim=1)

    def likelihoods(self, ids_BT: Tensor, mask_BT: Tensor, last_B: Tensor | None = None) -> Tensor:
        """p_z(x_t | x_{t-1}) of every token under every expert's bigram model, BTE, float32.

        Args:
            ids_BT: token ids; one outside the range the experts counted says nothing: 1 under every expert.
            mask_BT: True for real tokens. After padding, or at the start, a token has no predecessor.
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
        backed_BTE = (pairs_BTE + kappa * alone_BTE) / (count_VE[previous_BT] + kappa).clamp_min(_SMALLEST)
        lowest = float(unigram_VE.min()) * 1e-3
        likely_BTE = torch.where(paired_BT[..., None], backed_BTE.clamp(lowest, 1.0), alone_BTE)
        counted_BT = (ids_BT >= 0) & (ids_BT < len(unigram_VE))
        return torch.where(counted_BT[..., None], likely_BTE, 1.0)

    def _choose(self, posterior_BTE: Tensor) -> Routing:
        best_BTK, choice_BTK = posterior_BTE.topk(min(self.config.k, len(self.names)), dim=-1)
        return Routing(choice_BTK, best_BTK, (1.0 - best_BTK.sum(dim=-1)).clamp_min(0.0))


def _before(ids_BT: Tensor, last_B: Tensor | None) -> Tensor:
    """The token before the first, B1; -1 where there is none."""
    if last_B is None:
        return torch.full_like(ids_BT[:, :1], -1)
    return last_B[:, None].to(ids_BT.device)
