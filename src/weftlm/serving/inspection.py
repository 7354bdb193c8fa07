"""What a model makes of a text, token by token: surprisal, alternatives, and the experts' weights.

An `Inspector` looks at a model while an engine serves it. It works on a copy of the model's structure that shares every
weight, so that nothing of the served model is changed or waited for, whatever threads do with it.

    loss of token t:  -log p(x_t | x_<t)  nats              the first token is context and has none
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import NumericsError, did_you_mean
from weftlm.gating.gate import Features
from weftlm.pipeline.any_model import Kind, OpenModel
from weftlm.reporting.traces import packed, quantise
from weftlm.routing.routed_model import RoutedModel
from weftlm.routing.router import Routing, TargetModule
from weftlm.routing.trace import MEAN, layer_of, make_trace
from weftlm.serving.api_errors import ApiError

MAX_CHARACTERS = 8192
MAX_LOGITS = 1 << 29
"""Maximum tokens times vocabulary of one text; 2 GiB as float32."""
ALTERNATIVES = 5
ROWS = 256
"""Positions whose probabilities are taken at a time."""


@dataclass(frozen=True)
class Guess:
    """A likely token and its log-probability, nats."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenFacts:
    """A token of the text.

    Attributes:
        id: Token id.
        text: Its part of the text; the parts join to the text. Empty where a token completes a character.
        logprob: Nats, given the tokens before; None for the first.
        top: The most likely tokens at its place, most likely first; empty for the first.
    """

    id: int
    text: str
    logprob: float | None
    top: tuple[Guess, ...]


@dataclass(frozen=True)
class View:
    """Weights of the experts on every token.

    Attributes:
        name: `all` (mean over the modules), `layer:NAME` (mean over a layer's), `module:NAME`, or `gate`.
        weights: Thousandths, as `weftlm.reporting.traces.packed` writes them: per token the number of active experts,
            then expert and weight of each, in base 64 with the digits 0-9 A-Z a-z - _; one digit for a count or an
            expert (two from 64 experts on), two for a weight.
    """

    name: str
    weights: str


@dataclass(frozen=True)
class ModuleUsage:
    """Use of the experts in a module.

    Attributes:
        name: Name of the module in the base model.
        layer: Name of its layer.
        usage: Mean weight of each expert over the text.
        entropy: Entropy of the usage, nats; ln(experts) when all are used alike.
    """

    name: str
    layer: str
    usage: tuple[float, ...]
    entropy: float


@dataclass(frozen=True)
class Totals:
    """Loss of a text: scored tokens, their bytes in UTF-8, and the sum of their losses in nats."""

    tokens: int
    bytes: int
    nats: float


@dataclass(frozen=True)
class Inspection:
    """What a model makes of a text.

    Attributes:
        model: Name of the model.
        kind: plain, routed or gated.
        without: The expert left out, None for none.
        experts: Experts in the order of the weights; last `(mean of all)` where a router uses it.
        tokens: Tokens of the text.
        next: The most likely tokens after the text.
        totals: Loss of the text.
        views: Weights per token. Of a routed model: when a token is read. Of a gated one: when it is predicted.
        modules: Modules of a routed model, in the order of execution.
    """

    model: str
    kind: Kind
    without: str | None
    experts: tuple[str, ...]
    tokens: tuple[TokenFacts, ...]
    next: tuple[Guess, ...]
    totals: Totals
    views: tuple[View, ...]
    modules: tuple[ModuleUsage, ...]


@dataclass(frozen=True)
class Part:
    """A module or layer: its name in the base model and a short label."""

    name: str
    label: str


@dataclass(frozen=True)
class Layer(Part):
    """A layer with its routed modules."""

    modules: tuple[Part, ...]


@dataclass(frozen=True)
class ModelFacts:
    """What can be asked about a model.

    Attributes:
        name: Name it is served under.
        kind: plain, routed or gated.
        by: Router or gate; None for a plain model.
        experts: Names of the experts.
        layers: Layers with routed modules, in the order of execution.
        max_tokens: Maximum number of tokens of a text.
        max_characters: Maximum number of characters of a text.
    """

    name: str
    kind: Kind
    by: str | None
    experts: tuple[str, ...]
    layers: tuple[Layer, ...]
    max_tokens: int
    max_characters: int


class Inspector:
    """Looks at one model. One question is worked on at a time; others wait.

    Args:
        name: Name the model is served under.
        opened: The model. Nothing may run on it while the inspector is made; afterwards anything may.
    """

    def __init__(self, name: str, opened: OpenModel) -> None:
        self.name = name
        self.kind = opened.kind
        self.experts = opened.experts
        self.tokenizer = opened.tokenizer
        self._model = shadow(opened)
        config = getattr(self._model, "config", None)
        room = MAX_LOGITS // (getattr(config, "vocab_size", None) or opened.tokenizer.vocab_size)
        self.max_tokens = room if opened.max_length is None else min(room, opened.max_length)
        longest = max(map(len, opened.tokenizer.hf.get_vocab()))
        self.max_characters = min(MAX_CHARACTERS, self.max_tokens * longest)
        self._lock = threading.Lock()
        self._scores: tuple[list[int], Tensor] | None = None

    def facts(self) -> ModelFacts:
        """What can be asked about the model."""
        by = None
        if self.kind == "routed":
            by = self._model.router.config.router
        elif self.kind == "gated":
            by = self._model.gate.config.gate
            by += f", top {self._model.config.top_m}" if self._model.sparse else ""
        layers = layers_of(self._model.targets if self.kind == "routed" else ())
        return ModelFacts(self.name, self.kind, by, self.experts, layers, self.max_tokens, self.max_characters)

    def inspect(self, text: str, *, without: str | None = None, module: str | None = None) -> Inspection:
        """Run the model over a text.

        Args:
            text: At most `max_characters`, and as many tokens as the model has positions.
            without: Expert to leave out: a routed model routes over the others, a gated one's weights are made to sum
                to 1 over the others.
            module: Module whose weights are wanted in place of those of all modules and layers.
        Raises:
            ApiError: The text is empty or too long, or there is no such expert or module.
            ExpertError, ConfigError: The model cannot do without the expert.
            NumericsError: A token has no finite log-probability.
        """
        self._check(without, module)
        ids, pieces = self._read(text)
        looks = {"routed": self._look_routed, "gated": self._look_gated, "plain": self._look_plain}
        with self._lock, torch.inference_mode():
            logits_TV, experts, views, modules = looks[self.kind](ids, without, module)
            losses, tops = self._predicted(ids, logits_TV)
        tokens = tuple(
            TokenFacts(token, piece, None if loss is None else -loss, top)
            for token, piece, loss, top in zip(ids, pieces, losses, [(), *tops[:-1]], strict=True)
        )
        scored = [(piece, loss) for piece, loss in zip(pieces, losses, strict=True) if loss is not None]
        size = sum(len(piece.encode()) for piece, _ in scored)
        totals = Totals(len(scored), size, math.fsum(loss for _, loss in scored))
        return Inspection(self.name, self.kind, without, experts, tokens, tops[-1], totals, views, modules)

    # -- asking -------------------------------------------------------------------------------------------------

    def _check(self, expert: str | None, module: str | None) -> None:
        if expert is not None and expert not in self.experts:
            known = did_you_mean(expert, self.experts) if self.experts else "; it is a model without experts"
            raise ApiError(404, f"{self.name} has no expert {expert!r}{known}", param="without", code="not_found")
        if expert is not None and len(self.experts) == 1:
            raise ApiError(400, f"{expert} is the only expert of {self.name}; none would be left", param="without")
        targets = [target.name for target in self._model.targets] if self.kind == "routed" else []
        if module is not None and module not in targets:
            known = did_you_mean(module, targets) if targets else "; only routed models route modules"
            raise ApiError(404, f"{self.name} routes no module {module!r}{known}", param="module", code="not_found")

    def _read(self, text: str) -> tuple[list[int], list[str]]:
        """Token ids of a text and its parts."""
        if len(text) > self.max_characters:
            message = f"the text has {len(text)} characters; at most {self.max_characters} are inspected, shorten it"
            raise ApiError(400, message, param="text", code="invalid_value")
        ids, ends = tokens_of(self.tokenizer, text)
        if not ids:
            raise ApiError(400, "the text is empty; type one, or generate one", param="text", code="invalid_value")
        if len(ids) > self.max_tokens:
            message = f"the text has {len(ids)} tokens; the model {self.name} can read {self.max_tokens}, shorten it"
            raise ApiError(400, message, param="text", code="context_length_exceeded")
        return ids, [text[start:end] for start, end in itertools.pairwise([0, *ends])]

    # -- one pass: logits after every token, experts, views, modules ---------------------------------------------

    def _look_plain(self, ids: list[int], without: str | None, module: str | None) -> _Looked:
        return _logits(self._model, ids), (), (), ()

    def _look_routed(self, ids: list[int], without: str | None, module: str | None) -> _Looked:
        model: RoutedModel = self._model if without is None else self._without(without)
        try:
            names = [expert.name for expert in model.experts]
            usage = _RoutingRecord(ids, names, module)
            static_E = model.router.static_weights_E
            with model.recording(usage) if static_E is None else nullcontext():
                logits_TV = _logits(model, ids)
            if static_E is not None:
                places_1TE = torch.arange(len(names)).expand(1, len(ids), -1)
                for target in model.targets:
                    usage(target, Routing(places_1TE, static_E.float().cpu().expand(1, len(ids), -1)))
        finally:
            if model is not self._model:
                model.unload()  # its hooks refer to it: without them its weights are freed at once
        return logits_TV, *usage.summary()

    def _without(self, expert: str) -> RoutedModel:
        """The routed model over the other experts; it shares the base's weights and has a structure of its own."""
        routed: RoutedModel = self._model
        # They were compared with the base when the model was opened; taking its fingerprint again would take long.
        others = [
            replace(other, lora=replace(other.lora, base=replace(other.lora.base, fingerprint=None)))
            for other in routed.experts
            if other.name != expert
        ]
        base = _copy(routed, [self.tokenizer, *routed.experts]).unload()
        variant = RoutedModel(base, others, routed.router.config, base=routed.base_reference).eval()
        variant.router.set_decode(self.tokenizer.decode)
        return variant

    def _look_gated(self, ids: list[int], without: str | None, module: str | None) -> _Looked:
        pool = self._model.pool
        logw_TE = self._gate_weights(self._gated_scores(ids), without)
        ids_1T = torch.tensor([ids], device=self._model.device)
        logits_TV: Tensor | None = None
        for place, name in enumerate(pool.names):
            logw_T1 = logw_TE[:, place, None]
            if not bool((logw_T1 > -torch.inf).any()):
                continue
            logq_TV = pool.expert(name).log_probs(ids_1T)[0].add_(logw_T1)
            logits_TV = logq_TV if logits_TV is None else torch.logaddexp(logits_TV, logq_TV, out=logits_TV)
        assert logits_TV is not None
        others = [place for place, name in enumerate(pool.names) if name != without]
        used_TE = logw_TE[:-1, others].exp().cpu().numpy()
        shown_TE = quantise(np.concatenate([np.zeros((1, len(others))), used_TE]))
        return logits_TV, tuple(pool.names[place] for place in others), (View("gate", packed(shown_TE)),), ()

    def _gated_scores(self, ids: list[int]) -> Tensor:
        """log q_e of every token but the first, TE of T - 1 tokens; those of the last text are kept."""
        if self._scores is None or self._scores[0] != ids:
            pool = self._model.pool
            tokens_1T = torch.tensor([ids], device=self._model.device)
            scores = pool.token_log_probs(tokens_1T)[0] if len(ids) > 1 else torch.zeros(0, len(pool))
            self._scores = ids, scores.to(self._model.device)
        return self._scores[1]

    def _gate_weights(self, logp_TE: Tensor, without: str | None) -> Tensor:
        """log gamma after every token, T + 1 rows for T scored ones; -inf for experts that are left out."""
        model = self._model
        end_1E = logp_TE.new_zeros(1, logp_TE.shape[1])
        real_1T = torch.ones(1, len(logp_TE) + 1, dtype=torch.bool, device=logp_TE.device)
        real_1T[0, -1] = False
        features = Features(logp_BTE=torch.cat([logp_TE, end_1E])[None], mask_BT=real_1T)
        logw_TE = model.gate.log_weights(features)[0].double()
        left_E = torch.tensor([name != without for name in model.pool.names], device=logw_TE.device)
        logw_TE = logw_TE.masked_fill(~left_E, -torch.inf)
        # Where the expert left out had all the gate's weight, the others share it evenly.
        lost_T1 = (logw_TE == -torch.inf).all(dim=-1, keepdim=True)
        logw_TE = torch.where(lost_T1 & left_E, 0.0, logw_TE)
        if model.sparse and model.config.top_m < int(left_E.sum()):
            chosen_TM = logw_TE.topk(model.config.top_m, dim=-1).indices
            logw_TE = torch.full_like(logw_TE, -torch.inf).scatter(-1, chosen_TM, logw_TE.gather(-1, chosen_TM))
        return torch.log_softmax(logw_TE, dim=-1).float()

    def _predicted(self, ids: list[int], logits_TV: Tensor) -> tuple[list[float | None], list[tuple[Guess, ...]]]:
        """Loss of each token, and the most likely tokens after each."""
        losses: list[float | None] = [None]
        tops: list[tuple[Guess, ...]] = []
        for first in range(0, len(ids), ROWS):
            logq_RV = torch.log_softmax(logits_TV[first : first + ROWS].float(), dim=-1)
            best = logq_RV.topk(min(ALTERNATIVES, logq_RV.shape[-1]), dim=-1)
            for logq_K, id_K in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                guesses = zip(id_K, logq_K, strict=True)
                tops.append(tuple(Guess(token, self.tokenizer.decode([token]), logq) for token, logq in guesses))
            labels_R = torch.tensor(ids[first + 1 : first + 1 + ROWS], device=logq_RV.device)
            label_R = logq_RV[: len(labels_R)].gather(-1, labels_R[:, None])[:, 0]
            losses.extend((-label_R).tolist())
        if any(loss is not None and not math.isfinite(loss) for loss in losses):
            raise NumericsError(f"{self.name} gives a token of the text no finite log-probability; its weights are off")
        return losses, tops


_Looked = tuple[Tensor, tuple[str, ...], tuple[View, ...], tuple[ModuleUsage, ...]]
"""Logits after every token, experts, views, modules."""


class _RoutingRecord:
    """Sums up, module by module, the experts' weights on each token."""

    def __init__(self, ids: list[int], experts: Sequence[str], module: str | None) -> None:
        self.ids, self.experts, self.module = ids, tuple(experts), module
        self.weights: dict[str, Tensor] = {}
        self.entropy: dict[str, float] = {}
        self._real_T = torch.ones(len(ids), dtype=torch.bool)

    def __call__(self, target: TargetModule, routing: Routing) -> None:
        trace = make_trace(self.ids, self.experts, {target.name: (target, routing)}, 0, self._real_T)
        weights_TE = trace.weights_STE[0]
        if len(trace.experts) == len(self.experts):  # no weight on the mean of all
            weights_TE = torch.nn.functional.pad(weights_TE, (0, 1))
        self.weights[target.name] = weights_TE
        self.entropy[target.name] = float(trace.entropy_S[0])

    def summary(self) -> tuple[tuple[str, ...], tuple[View, ...], tuple[ModuleUsage, ...]]:
        """Experts, views and modules; the mean of all is an expert only where it was used."""
        mean = any(bool((weights_TE[:, -1] > 0).any()) for weights_TE in self.weights.values())
        experts = (*self.experts, MEAN) if mean else self.experts
        none_TE = torch.zeros(len(self.ids), len(self.experts) + 1)

        def view(name: str, each: Sequence[Tensor]) -> View:
            mean_TE = sum(each, none_TE) / max(1, len(each))
            return View(name, packed(quantise(mean_TE[:, : len(experts)].numpy())))

        modules = tuple(
            ModuleUsage(
                name, layer_of(name), tuple(round(used, 5) for used in weights_TE.mean(dim=0)[: len(experts)].tolist()),
                self.entropy[name],
            )
            for name, weights_TE in self.weights.items()
        )  # fmt: skip
        if self.module is not None:  # one that none of these experts adapts is the base's alone
            own = [self.weights[self.module]] if self.module in self.weights else []
            return experts, (view(f"module:{self.module}", own),), modules
        layers: dict[str, list[Tensor]] = {}
        for name, weights_TE in self.weights.items():
            layers.setdefault(layer_of(name), []).append(weights_TE)
        views = (view(f"layer:{layer}", each) for layer, each in layers.items())
        return experts, (view("all", list(self.weights.values())), *views), modules


def shadow(opened: OpenModel) -> Any:
    """A copy of a model's structure: modules, hooks and caches of its own, every weight shared.

    Two threads may run the model and its shadow at once, also where a pass leaves notes on the modules.
    """
    kept: list[Any] = [opened.tokenizer]
    if opened.kind == "routed":
        kept += opened.model.experts
    if opened.kind == "gated":
        kept += [member.lora for member in opened.model.pool.members if member.lora is not None]
    return _copy(opened.model, kept)


def _copy(model: Any, kept: Sequence[Any]) -> Any:
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


def layers_of(targets: Sequence[TargetModule]) -> tuple[Layer, ...]:
    """Layers with their modules; `layer 3` where all names differ in their last number only."""
    groups: dict[str, list[Part]] = {}
    for target in targets:
        layer = layer_of(target.name)
        groups.setdefault(layer, []).append(Part(target.name, target.name.removeprefix(f"{layer}.")))
    heads = {layer.rpartition(".")[0] for layer in groups}
    numbered = len(heads) == 1 and all(layer.rpartition(".")[2].isdigit() for layer in groups)
    return tuple(
        Layer(layer, f"layer {layer.rpartition('.')[2]}" if numbered else layer, tuple(modules))
        for layer, modules in groups.items()
    )


def _logits(model: Any, ids: list[int]) -> Tensor:
    """Logits after every token, TV."""
    logits_TV: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return logits_TV
