"""The inspector: a page, and what a model makes of a text, token by token: surprisal, alternatives, experts' weights.

Inspections run on a copy of the model's structure that shares every weight, in a thread beside the engine's: nothing of
the served model is changed or waited for. One inspection of a model runs at a time. The page is whole in this package
and loads nothing from elsewhere; it asks again for each model it compares and each expert it leaves out, and generates
through `/v1/completions`.

    loss of token t:  -log p(x_t | x_<t)  nats              the first token is context and has none
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.requests import ClientDisconnect
from torch import Tensor

from weftlm.errors import NumericsError, did_you_mean
from weftlm.gating.gate import Features
from weftlm.pipeline.any_model import OpenModel
from weftlm.reporting.traces import trace_data
from weftlm.routing.routed_model import RoutedModel
from weftlm.routing.trace import Trace
from weftlm.serving.detokenise import AnswerText
from weftlm.serving.limits import ApiError
from weftlm.serving.replies import in_short_calls
from weftlm.serving.schemas import Body

MAX_CHARACTERS = 8192
MAX_LOGITS = 1 << 29
"""Maximum tokens times vocabulary, and times experts of a gated model, of one text; 2 GiB as float32."""
ALTERNATIVES = 5
ROWS = 256
"""Positions whose probabilities are taken at a time."""
PAGE = Path(__file__).parent / "page"

Name = Annotated[str, Field(max_length=1_000)]


class InspectRequest(Body):
    """A text to inspect, of at most as many characters and tokens as `/api/models` says."""

    model: Name
    text: Annotated[str, Field(max_length=MAX_CHARACTERS)]
    without: Name | None = Field(
        None,
        description="Expert to leave out: a routed model routes over the others, a gated one's weights are made to sum "
        "to 1 over the others.",
    )


def inspector_router(models: Mapping[str, OpenModel]) -> APIRouter:
    """The questions of the page; nothing may run on the models while the router is made."""
    inspectors = {name: Inspector(name, opened) for name, opened in models.items()}
    router = APIRouter(tags=["inspector"])

    @router.get("/api/models")
    async def list_models() -> dict[str, list[dict[str, Any]]]:
        """Every served model: name, kind (plain, routed or gated), router or gate, experts, and the longest text."""
        return {"models": [inspector.facts for inspector in inspectors.values()]}

    @router.post("/api/inspect")
    async def inspect(request: Request, asked: InspectRequest) -> Response:
        """Inspect a text.

        `tokens`: id, text (the texts join to the text that was read), log-probability in nats and most likely tokens of
        each; `next`: the most likely tokens after the text; `trace`: the experts' weights, null for a plain model, as
        `weftlm.reporting.traces.trace_data` has them: of a routed model when a token is read, of a gated one when it is
        predicted.
        """
        if asked.model not in inspectors:
            message = f"there is no model {asked.model!r}{did_you_mean(asked.model, inspectors)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        inspector = inspectors[asked.model]
        async with inspector.lock:
            if await request.is_disconnected():
                raise ClientDisconnect
            found = await asyncio.to_thread(inspector.inspect, asked.text, without=asked.without)
        return Response(await asyncio.to_thread(in_short_calls, found), media_type="application/json")

    return router


class Inspector:
    """Inspects texts with one model, one at a time; nothing may run on the model while the inspector is made.

    Attributes:
        facts: Facts about the model for `/api/models`.
        lock: To be held during an inspection.
    """

    def __init__(self, name: str, opened: OpenModel) -> None:
        self.name = name
        self.opened = opened
        self.lock = asyncio.Lock()
        model, kept, by, held = opened.model, [opened.tokenizer], None, 1  # held: distributions at a time
        if opened.kind == "routed":
            kept, by = [*kept, *model.experts], model.router.config.router
        elif opened.kind == "gated":
            kept += [member.lora for member in model.pool.members if member.lora is not None]
            by, held = model.gate.config.gate + (f", top {model.config.top_m}" if model.sparse else ""), len(model.pool)
        self._model = structural_copy(model, kept)
        room = MAX_LOGITS // (held * (getattr(model.config, "vocab_size", None) or opened.tokenizer.vocab_size))
        self.max_tokens = room if opened.max_length is None else min(room, opened.max_length)
        self.facts = {
            "name": name, "kind": opened.kind, "by": by, "experts": opened.experts,
            "max_tokens": self.max_tokens, "max_characters": MAX_CHARACTERS,
        }  # fmt: skip

    def inspect(self, text: str, *, without: str | None = None) -> dict[str, Any]:
        """Run the model over a text; see the route `/api/inspect`.

        Raises:
            ApiError: The text is empty or too long, or there is no such expert.
            ExpertError, ConfigError: The model cannot do without the expert.
            NumericsError: A token has no finite log-probability.
        """
        tokenizer, experts = self.opened.tokenizer, self.opened.experts
        if without is not None and without not in experts:
            known = did_you_mean(without, experts) if experts else "; it is a model without experts"
            raise ApiError(404, f"{self.name} has no expert {without!r}{known}", param="without", code="not_found")
        if without is not None and len(experts) == 1:
            raise ApiError(400, f"{without} is the only expert of {self.name}; none would be left", param="without")
        ids: list[int] = tokenizer.encode_batch([text])[0].tolist()
        if not ids:
            raise ApiError(400, "the text is empty; type one, or generate one", param="text", code="invalid_value")
        if len(ids) > self.max_tokens:
            message = f"the text has {len(ids)} tokens; the model {self.name} can read {self.max_tokens}, shorten it"
            raise ApiError(400, message, param="text", code="context_length_exceeded")
        ids_1T = torch.tensor([ids], device=self._model.device)
        looks = {"routed": self._routed, "gated": self._gated, "plain": self._plain}
        with torch.inference_mode():
            logits_TV, trace = looks[self.opened.kind](ids_1T, without)
            logprobs, tops = self._predicted(ids_1T[0], logits_TV)
        decoder = AnswerText(tokenizer.decode, ())
        texts = [decoder.push(token) for token in ids]
        texts[-1] += decoder.finish()
        tokens = [
            {"id": token, "text": piece, "logprob": logprob, "top": top}
            for token, piece, logprob, top in zip(ids, texts, [None, *logprobs], [[], *tops[:-1]], strict=True)
        ]
        return {
            "model": self.name, "kind": self.opened.kind, "without": without, "tokens": tokens, "next": tops[-1],
            "trace": None if trace is None else trace_data(trace, (), trace.weights_STE.numpy()),
        }  # fmt: skip

    # -- one pass: logits after every token, TV, and the trace ------------------------------------------------------

    def _plain(self, ids_1T: Tensor, without: str | None) -> tuple[Tensor, Trace | None]:
        return self._model(input_ids=ids_1T, use_cache=False).logits[0], None

    def _routed(self, ids_1T: Tensor, without: str | None) -> tuple[Tensor, Trace | None]:
        model: RoutedModel = self._model if without is None else self._without(without)
        try:
            logits_TV, static_E = model(input_ids=ids_1T, use_cache=False).logits[0], model.router.static_weights_E
            if static_E is None:
                return logits_TV, model.trace(ids_1T)[0]
            names, targets = (tuple(each.name for each in some) for some in (model.experts, model.targets))
            weights_STE = static_E.float().cpu().expand(len(targets), ids_1T.shape[1], -1)
            return logits_TV, Trace(tuple(ids_1T[0].tolist()), names, targets, weights_STE)
        finally:
            if model is not self._model:
                model.unload()  # its hooks refer to it: without them its weights are freed at once

    def _without(self, expert: str) -> RoutedModel:
        """The routed model over the other experts; it shares the base's weights and has a structure of its own."""
        routed: RoutedModel = self._model
        # They were compared with the base when the model was opened; taking its fingerprint again would take long.
        others = [
            replace(other, lora=replace(other.lora, base=replace(other.lora.base, fingerprint=None)))
            for other in routed.experts
            if other.name != expert
        ]
        base = structural_copy(routed, [self.opened.tokenizer, *routed.experts]).unload()
        return RoutedModel(base, others, routed.router.config, base=routed.base_reference).eval()

    def _gated(self, ids_1T: Tensor, without: str | None) -> tuple[Tensor, Trace | None]:
        model, ids_T = self._model, ids_1T[0]
        logq_TEV = model.pool.log_probs(ids_1T)[0]
        logp_TE = logq_TEV[:-1].gather(-1, ids_T[1:, None, None].expand(-1, len(model.pool), 1))[..., 0]
        real_1T = torch.arange(len(ids_T), device=ids_T.device)[None] < len(ids_T) - 1  # nothing follows the last token
        features = Features(logp_BTE=F.pad(logp_TE, (0, 0, 0, 1))[None], mask_BT=real_1T)
        left_E = torch.tensor([name != without for name in model.pool.names], device=ids_T.device)
        logw_TE = model.gate.log_weights(features)[0].double().masked_fill(~left_E, -torch.inf)
        # Where the expert left out had all the gate's weight, the others share it evenly.
        lost_T1 = (logw_TE == -torch.inf).all(dim=-1, keepdim=True)
        logw_TE = torch.where(lost_T1 & left_E, 0.0, logw_TE)
        if model.sparse:
            best = logw_TE.topk(model.config.top_m, dim=-1)
            logw_TE = torch.full_like(logw_TE, -torch.inf).scatter(-1, best.indices, best.values)
        logw_TE = torch.log_softmax(logw_TE, dim=-1).float()
        logits_TV = torch.logsumexp(logq_TEV.add_(logw_TE[..., None]), dim=1)
        weights_TE = F.pad(logw_TE[:-1, left_E].exp().cpu(), (0, 0, 1, 0))  # the first token is context
        names = tuple(name for name in model.pool.names if name != without)
        return logits_TV, Trace(tuple(ids_T.tolist()), names, ("gate",), weights_TE[None])

    def _predicted(self, ids_T: Tensor, logits_TV: Tensor) -> tuple[list[float], list[list[dict[str, Any]]]]:
        """Log-probability of each token but the first, and the most likely tokens after each."""
        logprobs: list[float] = []
        tops: list[list[dict[str, Any]]] = []
        decode = self.opened.tokenizer.decode
        for labels_R, logits_RV in zip(ids_T.roll(-1).split(ROWS), logits_TV.split(ROWS), strict=True):
            logq_RV = torch.log_softmax(logits_RV.float(), dim=-1)
            logprobs += logq_RV.gather(-1, labels_R[:, None])[:, 0].tolist()
            best = logq_RV.topk(min(ALTERNATIVES, logq_RV.shape[-1]), dim=-1)
            tops += [
                [{"id": token, "text": decode([token]), "logprob": logq} for token, logq in zip(*pairs, strict=True)]
                for pairs in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        if not torch.tensor(logprobs[:-1]).isfinite().all():
            raise NumericsError(f"{self.name} gives a token of the text no finite log-probability; its weights are off")
        return logprobs[:-1], tops


def structural_copy(model: Any, kept: Sequence[Any]) -> Any:
    """A copy of a model's structure: modules, hooks and caches of its own, every weight and what is kept shared.

    Two threads may run the model and its copy at once, also if a pass leaves notes on the modules.
    """
    return copy.deepcopy(model, {id(thing): thing for thing in (*kept, *model.parameters(), *model.buffers())})
