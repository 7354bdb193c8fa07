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
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.requests import ClientDisconnect
from torch import Tensor

from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import NumericsError, did_you_mean
from weftlm.gating.gate import Features
from weftlm.pipeline.any_model import OpenModel
from weftlm.reporting.page import page_file
from weftlm.reporting.traces import trace_data
from weftlm.routing.routed_model import RoutedModel
from weftlm.routing.trace import Trace
from weftlm.serving.limits import ApiError
from weftlm.serving.replies import in_short_calls
from weftlm.serving.request import QueueFullError
from weftlm.serving.schemas import Body

MAX_CHARACTERS = 8192
MAX_LOGITS = 1 << 29
"""Maximum tokens times vocabulary, and times experts of a gated model, of one text; 2 GiB as float32."""
ALTERNATIVES = 5
ROWS = 256
"""Positions whose probabilities are taken at a time."""
WAITING = 16
"""Maximum queued questions about one model."""
PAGE = Path(__file__).parent / "page"
SHARED = ("theme.css", "theme.js", "trace.css", "trace.js")
"""Files of the page that reports have too."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

Name = Annotated[str, Field(max_length=1_000)]


class InspectRequest(Body):
    """A text to inspect.

    Attributes:
        model: Name of the model.
        text: Text, of at most as many characters and tokens as `/api/models` says.
        without: Expert to leave out: a routed model routes over the others, a gated one's weights are made to sum to 1
            over the others.
    """

    model: Name
    text: Annotated[str, Field(max_length=MAX_CHARACTERS)]
    without: Name | None = None


def inspector_router(models: Mapping[str, OpenModel]) -> APIRouter:
    """The page at `/`, its files under `/page/`, its questions under `/api/`.

    Errors are raised as `ApiError`; `limits.add_handlers` makes responses of them. The page and its files hold nothing
    secret and must be answered without a key, so that the page can ask for one.

    Args:
        models: Models by the name they are served under. Nothing may run on them while the router is made.
    """
    inspectors = {name: Inspector(name, opened) for name, opened in models.items()}
    router = APIRouter(tags=["inspector"])

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return _file("index.html")

    @router.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        return _file(name)

    @router.get("/api/models")
    async def list_models() -> dict[str, list[dict[str, Any]]]:
        """Every served model: name, kind (plain, routed or gated), router or gate, experts, and the longest text."""
        return {"models": [inspector.facts for inspector in inspectors.values()]}

    @router.post("/api/inspect")
    async def inspect(request: Request, asked: InspectRequest) -> Response:
        """Inspect a text.

        `tokens`: id, text (the texts join to the whole one), log-probability in nats and most likely tokens of each;
        `next`: the most likely tokens after the text; `trace`: the experts' weights, null for a plain model, as
        `weftlm.reporting.traces.trace_data` has them: of a routed model when a token is read, of a gated one when it is
        predicted.
        """
        if asked.model not in inspectors:
            message = f"there is no model {asked.model!r}{did_you_mean(asked.model, inspectors)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        inspector = inspectors[asked.model]
        if inspector.waiting >= WAITING:
            raise QueueFullError(f"{inspector.waiting} questions wait already")
        inspector.waiting += 1
        try:
            async with inspector.lock:
                if await request.is_disconnected():
                    raise ClientDisconnect
                found = await asyncio.to_thread(inspector.inspect, asked.text, without=asked.without)
        finally:
            inspector.waiting -= 1
        return Response(await asyncio.to_thread(in_short_calls, found), media_type="application/json")

    return router


@functools.cache
def _files() -> dict[str, bytes]:
    """The page's files by name."""
    files = {file.name: file.read_bytes() for file in PAGE.iterdir() if file.suffix in TYPES}
    return {**files, **{name: page_file(name).encode() for name in SHARED}}


def _file(name: str) -> Response:
    if name not in _files():
        raise ApiError(404, f"the page has no file {name[:100]!r}", code="not_found")
    return Response(_files()[name], headers=HEADERS, media_type=TYPES[Path(name).suffix])


class Inspector:
    """Inspects texts with one model, one at a time.

    Attributes:
        facts: Facts about the model for `/api/models`.
        lock: To be held during an inspection.
        waiting: Number of questions, the one worked on included.

    Args:
        name: Name the model is served under.
        opened: The model. Nothing may run on it while the inspector is made; afterwards anything may.
    """

    def __init__(self, name: str, opened: OpenModel) -> None:
        self.name = name
        self.opened = opened
        self.lock = asyncio.Lock()
        self.waiting = 0
        kept: list[Any] = [opened.tokenizer]
        if opened.kind == "routed":
            kept += opened.model.experts
        if opened.kind == "gated":
            kept += [member.lora for member in opened.model.pool.members if member.lora is not None]
        self._model: Any = structural_copy(opened.model, kept)
        self._top_m: int | None = None
        tokenizer, config = opened.tokenizer, getattr(self._model, "config", None)
        held = len(opened.experts) if opened.kind == "gated" else 1  # distributions at a time
        room = MAX_LOGITS // (held * (getattr(config, "vocab_size", None) or tokenizer.vocab_size))
        self.max_tokens = room if opened.max_length is None else min(room, opened.max_length)
        self.max_characters = min(MAX_CHARACTERS, self.max_tokens * max(map(len, tokenizer.hf.get_vocab())))
        by = None
        if opened.kind == "routed":
            by = self._model.router.config.router
        elif opened.kind == "gated":
            self._top_m = self._model.config.top_m if self._model.sparse else None
            by = self._model.gate.config.gate + ("" if self._top_m is None else f", top {self._top_m}")
        self.facts = {
            "name": name, "kind": opened.kind, "by": by, "experts": opened.experts,
            "max_tokens": self.max_tokens, "max_characters": self.max_characters,
        }  # fmt: skip

    def inspect(self, text: str, *, without: str | None = None) -> dict[str, Any]:
        """Run the model over a text; see the route `/api/inspect`.

        Raises:
            ApiError: The text is empty or too long, or there is no such expert.
            ExpertError, ConfigError: The model cannot do without the expert.
            NumericsError: A token has no finite log-probability.
        """
        self._check_expert(without)
        ids, pieces = self._read(text)
        looks = {"routed": self._look_routed, "gated": self._look_gated, "plain": self._look_plain}
        with torch.inference_mode():
            logits_TV, trace = looks[self.opened.kind](ids, without)
            logprobs, tops = self._predicted(ids, logits_TV)
        tokens = [
            {"id": token, "text": piece, "logprob": logprob, "top": top}
            for token, piece, logprob, top in zip(ids, pieces, [None, *logprobs], [[], *tops[:-1]], strict=True)
        ]
        data = None if trace is None else trace_data(trace, (), trace.weights_STE.numpy())
        kind = self.opened.kind
        return {"model": self.name, "kind": kind, "without": without, "tokens": tokens, "next": tops[-1], "trace": data}

    def _check_expert(self, name: str | None) -> None:
        experts = self.opened.experts
        if name is not None and name not in experts:
            known = did_you_mean(name, experts) if experts else "; it is a model without experts"
            raise ApiError(404, f"{self.name} has no expert {name!r}{known}", param="without", code="not_found")
        if name is not None and len(experts) == 1:
            raise ApiError(400, f"{name} is the only expert of {self.name}; none would be left", param="without")

    def _read(self, text: str) -> tuple[list[int], list[str]]:
        """Token ids of a text and its parts."""
        if len(text) > self.max_characters:
            message = f"the text has {len(text)} characters; at most {self.max_characters} are inspected, shorten it"
            raise ApiError(400, message, param="text", code="invalid_value")
        ids, ends = tokens_of(self.opened.tokenizer, text)
        if not ids:
            raise ApiError(400, "the text is empty; type one, or generate one", param="text", code="invalid_value")
        if len(ids) > self.max_tokens:
            message = f"the text has {len(ids)} tokens; the model {self.name} can read {self.max_tokens}, shorten it"
            raise ApiError(400, message, param="text", code="context_length_exceeded")
        return ids, [text[start:end] for start, end in itertools.pairwise([0, *ends])]

    # -- one pass: logits after every token, and the trace --------------------------------------------------------

    def _look_plain(self, ids: list[int], without: str | None) -> tuple[Tensor, Trace | None]:
        return _logits(self._model, ids), None

    def _look_routed(self, ids: list[int], without: str | None) -> tuple[Tensor, Trace | None]:
        model: RoutedModel = self._model if without is None else self._without(without)
        try:
            logits_TV, static_E = _logits(model, ids), model.router.static_weights_E
            if static_E is None:
                return logits_TV, model.trace(torch.tensor([ids], device=model.device))[0]
            names, targets = (tuple(each.name for each in some) for some in (model.experts, model.targets))
            return logits_TV, Trace(
                tuple(ids), names, targets, static_E.float().cpu().expand(len(targets), len(ids), -1)
            )
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

    def _look_gated(self, ids: list[int], without: str | None) -> tuple[Tensor, Trace | None]:
        pool = self._model.pool
        ids_1T = torch.tensor([ids], device=self._model.device)
        logq_TEV = pool.log_probs(ids_1T, torch.ones_like(ids_1T, dtype=torch.bool))[0]
        logw_TE = self._gate_weights(logq_TEV, ids_1T[0], without)
        logits_TV = torch.logsumexp(logq_TEV.add_(logw_TE[..., None]), dim=1)
        others = [place for place, name in enumerate(pool.names) if name != without]
        used_TE = logw_TE[:-1, others].exp().float().cpu()
        weights_TE = torch.cat([torch.zeros(1, len(others)), used_TE])  # the first token is context
        return logits_TV, Trace(tuple(ids), tuple(pool.names[place] for place in others), ("gate",), weights_TE[None])

    def _gate_weights(self, logq_TEV: Tensor, ids_T: Tensor, without: str | None) -> Tensor:
        """log gamma after every token, TE; -inf for experts that are left out."""
        model, experts = self._model, logq_TEV.shape[1]
        logp_TE = logq_TEV[:-1].gather(-1, ids_T[1:, None, None].expand(-1, experts, 1))[..., 0]
        real_1T = torch.arange(len(ids_T), device=ids_T.device)[None] < len(ids_T) - 1  # nothing follows the last token
        features = Features(logp_BTE=torch.cat([logp_TE, logp_TE.new_zeros(1, experts)])[None], mask_BT=real_1T)
        logw_TE = model.gate.log_weights(features)[0].double()
        left_E = torch.tensor([name != without for name in model.pool.names], device=logw_TE.device)
        logw_TE = logw_TE.masked_fill(~left_E, -torch.inf)
        # Where the expert left out had all the gate's weight, the others share it evenly.
        lost_T1 = (logw_TE == -torch.inf).all(dim=-1, keepdim=True)
        logw_TE = torch.where(lost_T1 & left_E, 0.0, logw_TE)
        if self._top_m is not None and self._top_m < int(left_E.sum()):
            chosen_TM = logw_TE.topk(self._top_m, dim=-1).indices
            logw_TE = torch.full_like(logw_TE, -torch.inf).scatter(-1, chosen_TM, logw_TE.gather(-1, chosen_TM))
        return torch.log_softmax(logw_TE, dim=-1).float()

    def _predicted(self, ids: list[int], logits_TV: Tensor) -> tuple[list[float], list[list[dict[str, Any]]]]:
        """Log-probability of each token but the first, and the most likely tokens after each."""
        logprobs: list[float] = []
        tops: list[list[dict[str, Any]]] = []
        decode = self.opened.tokenizer.decode
        for first in range(0, len(ids), ROWS):
            logq_RV = torch.log_softmax(logits_TV[first : first + ROWS].float(), dim=-1)
            best = logq_RV.topk(min(ALTERNATIVES, logq_RV.shape[-1]), dim=-1)
            for logq_K, id_K in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                pairs = zip(id_K, logq_K, strict=True)
                tops.append([{"id": token, "text": decode([token]), "logprob": logq} for token, logq in pairs])
            labels_R = torch.tensor(ids[first + 1 : first + 1 + ROWS], device=logq_RV.device)
            logprobs += logq_RV[: len(labels_R)].gather(-1, labels_R[:, None])[:, 0].tolist()
        if not np.isfinite(logprobs).all():
            raise NumericsError(f"{self.name} gives a token of the text no finite log-probability; its weights are off")
        return logprobs, tops


def structural_copy(model: Any, kept: Sequence[Any]) -> Any:
    """A copy of a model's structure: modules, hooks and caches of its own, every weight and what is kept shared.

    Two threads may run the model and its copy at once, also if a pass leaves notes on the modules.
    """
    return copy.deepcopy(model, {id(thing): thing for thing in (*kept, *model.parameters(), *model.buffers())})


def tokens_of(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text, and where in the text each ends.

    Ends increase, and the last one is the text's own: what a tokenizer drops belongs to the token after it. A character
    of several tokens belongs to the first.
    """
    ids: list[int] = tokenizer.encode_batch([text])[0].astype(np.int64).tolist()
    if not ids:
        return [], []
    ends: list[int] = []
    if tokenizer.hf.is_fast:
        read = tokenizer.hf(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ends = [int(end) for _, end in read["offset_mapping"]] if read["input_ids"] == ids else []
    if not ends:  # no offsets: by what the tokens so far are decoded to
        ends = [len(tokenizer.decode(ids[: count + 1])) for count in range(len(ids))]
    ends = [min(end, len(text)) for end in itertools.accumulate(ends, max)]
    ends[-1] = len(text)
    return ids, ends


def _logits(model: Any, ids: list[int]) -> Tensor:
    """Logits after every token, TV."""
    logits_TV: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return logits_TV
