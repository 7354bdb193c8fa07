"""Retrieval: the expert whose training inputs contain the one most like this text, for the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.errors import ConfigError, ExpertError
from weftlm.experts.expert import Expert
from weftlm.experts.statistics import embed_tokens
from weftlm.routing.config import RetrievalConfig, RouterConfig, routers
from weftlm.routing.router import Call, Need, Router, Routing, TargetModule


@routers.register(
    "retrieval",
    does="takes the expert with the most similar training text, once per sequence",
    costs="the statistics, an embedding of each sequence; the chosen experts' products",
    paper="arXiv:2302.03202",
)
class RetrievalRouter(Router):
    """One choice per sequence, by nearest training input.

        s_z = max over the N training inputs x of expert z of cos(e(input), e(x))      the k best, softmax(s / tau)

    The same experts in every module and at every token. In generation the prompt decides, and the choice travels with
    the KV cache; for encoder-decoder models the encoder's input decides.

    Paper: Jang et al., arXiv:2302.03202; a baseline of Muqeeth et al. 2024, arXiv:2402.05859. The embedding is that of
    the experts' statistics, `embed_tokens`.
    """

    Config: ClassVar[type[RouterConfig]] = RetrievalConfig
    needs: ClassVar[frozenset[Need]] = frozenset({"statistics"})
    reads_ahead: ClassVar[bool] = True
    config: RetrievalConfig

    def __init__(self, config: RetrievalConfig, experts: Sequence[Expert], targets: Sequence[TargetModule]) -> None:
        super().__init__(config, experts, targets)
        statistics = [expert.statistics for expert in experts if expert.statistics is not None]
        embedders = {expert.name: expert.statistics.embedder for expert in experts if expert.statistics is not None}
        again = "make the statistics again (weftlm experts gate)"
        if foreign := {name: used for name, used in embedders.items() if not used.startswith("tokens-")}:
            raise ExpertError(
                f"the inputs of {', '.join(foreign)} were embedded by {next(iter(foreign.values()))!r}, which this "
                f"version does not have; {again}, or use another router"
            )
        if len(set(embedders.values())) > 1:
            raise ExpertError(
                f"the experts' inputs were embedded differently ({embedders}); {again} with one experts.embedder"
            )
        self.register_buffer("inputs_NF", torch.cat([each.embeddings_NF for each in statistics]), persistent=False)
        owner_N = torch.cat([torch.full((len(each.embeddings_NF),), row) for row, each in enumerate(statistics)])
        self.register_buffer("owner_N", owner_N, persistent=False)

    def begin(self, call: Call) -> None:
        if "retrieval.choice" in call.memory.tensors:
            return
        if call.continues or call.input_ids_BT is None:
            raise ConfigError(
                "router 'retrieval' chooses by the ids of the prompt, and this pass "
                + ("continues one it has not seen" if call.continues else "was given embeddings")
                + "; pass input_ids, and the past_key_values or encoder_outputs the routed model itself returned"
            )
        scores_BE = self.sequence_scores(call.input_ids_BT, self._deciding(call.decisive_BT))
        best_BK, choice_BK = scores_BE.topk(min(self.config.k, len(self.names)), dim=-1)
        call.memory.tensors["retrieval.choice"] = choice_BK
        call.memory.tensors["retrieval.weights"] = torch.softmax(best_BK / self.config.temperature, dim=-1)

    def sequence_scores(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """s_BE: for each sequence the highest cosine with any training input of each expert."""
        inputs_NF = self.get_buffer("inputs_NF")
        e_BF = embed_tokens(tokens_BT, width=inputs_NF.shape[1], mask_BT=mask_BT)
        cosines_BN = e_BF.to(inputs_NF.device) @ inputs_NF.T
        owner_BN = self.get_buffer("owner_N").expand_as(cosines_BN)
        lowest_BE = cosines_BN.new_full((len(tokens_BT), len(self.names)), -torch.inf)
        return lowest_BE.scatter_reduce(1, owner_BN, cosines_BN, "amax")

    def route(self, target: TargetModule, u_BTI: Tensor, call: Call) -> Routing:
        choice_BK, weights_BK = (call.memory.tensors[f"retrieval.{key}"] for key in ("choice", "weights"))
        shape = (len(choice_BK), u_BTI.shape[1], choice_BK.shape[1])
        return Routing(choice_BK[:, None].expand(shape), weights_BK.float()[:, None].expand(shape))

    def _deciding(self, decisive_BT: Tensor) -> Tensor:
        if self.config.read_tokens is None:
            return decisive_BT
        return decisive_BT & (decisive_BT.cumsum(dim=1) <= self.config.read_tokens)
