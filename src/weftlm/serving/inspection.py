"""What a model makes of a text, token by token: surprise, alternatives, who worked, and what each expert is worth.

An `Inspector` looks at a model while an engine serves it. It works on a copy of the model's structure that shares every
weight, so that nothing of the served model is changed or waited for, whatever threads do with it.

    loss of token t:  -log p(x_t | x_<t)  nats              the first token is context and has none
"""

from __future__ import annotations

import itertools
import math
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import NumericsError, did_you_mean
from weftlm.experts.expert import Expert
from weftlm.gating.gate import Features
from weftlm.gating.modular_lm import ModularLM
from weftlm.pipeline.any_model import OpenModel
from weftlm.reporting.traces import packed, quantise
from weftlm.routing.retrieval import RetrievalRouter
from weftlm.routing.routed_model import RoutedModel
from weftlm.routing.router import Routing, Site
from weftlm.serving.inspection_facts import (
    Comparison,
    ExpertCost,
    FieldError,
    Guess,
    Inspection,
    ModelFacts,
    ModuleUsage,
    Segment,
    TokenFacts,
    Totals,
    View,
)
from weftlm.serving.inspection_parts import MAX_CHARACTERS, GumbelNoise, Witness, layers_of, shadow, tokens_of

MAX_LOGITS = 1 << 29
"""Tokens times vocabulary of one text at most; 2 GiB as float32."""
ALTERNATIVES = 5
VARIANTS, LOSSES = 2, 64
"""Models without one expert, and losses of texts, that are kept for the next question."""
ROWS = 256
"""Positions whose probabilities are taken at a time."""


@dataclass(frozen=True)
class _Reading:
    """A text as a model reads it."""

    ids: list[int]
    ends: list[int]
    pieces: list[str]


@dataclass(frozen=True)
class _Looked:
    """One pass: predictions after every token, and who worked."""

    experts: tuple[str, ...]
    loss_T: list[float | None]
    top_T: list[tuple[Guess, ...]]
    views: tuple[View, ...] = ()
    modules: tuple[ModuleUsage, ...] = ()


# -------------------------------------------------------------------------------------------------------- the inspector


class Inspector:
    """Looks at one model. One question is worked on at a time; others wait.

    Args:
        name: the model's name, as it is served.
        opened: the model. Nothing may run on it while the inspector is made; afterwards anything may.
        max_characters: of a text; fewer where no text of so many fits the model's context.

    Attributes:
        max_characters: of a text; at most as many as the tokens of a whole context may have.
    """

    def __init__(self, name: str, opened: OpenModel, *, max_characters: int = MAX_CHARACTERS) -> None:
        self.name = name
        self.kind = opened.kind
        self.experts = opened.experts
        self.tokenizer = opened.tokenizer
        self._model = shadow(opened.model, opened.tokenizer)
        self._positions = opened.max_length
        self._vocabulary = _vocabulary(self._model, opened.tokenizer)
        self.max_characters = min(max_characters, self.max_tokens * max(map(len, opened.tokenizer.hf.get_vocab())))
        self._lock = threading.Lock()
        self._variants: OrderedDict[str, Any] = OrderedDict()
        self._losses: OrderedDict[tuple[tuple[int, ...], str | None], list[float | None]] = OrderedDict()
        self._scores: tuple[tuple[int, ...], Tensor] | None = None
        self._texts: dict[int, str] = {}

    @property
    def max_tokens(self) -> int:
        """Tokens of a text at most."""
        room = MAX_LOGITS // self._vocabulary
        return room if self._positions is None else min(room, self._positions)

    def facts(self) -> ModelFacts:
        """What can be asked of the model."""
        by = None
        sites: tuple[Site, ...] = ()
        if isinstance(self._model, RoutedModel):
            by, sites = self._model.router.config.router, self._model.sites
        elif isinstance(self._model, ModularLM):
            by = self._model.gate.config.gate
            by += f", top {self._model.config.top_m}" if self._model.sparse else ""
        return ModelFacts(
            self.name, self.kind, by, self.experts, layers_of(sites), self.max_tokens, self.max_characters
        )

    def inspect(self, text: str, *, without: str | None = None, module: str | None = None) -> Inspection:
        """Run the model over a text.

        Args:
            text: at most `max_characters`, and tokens as the model has positions.
            without: an expert to leave out: a routed model routes over the others, a gated one's weights are made to
                sum to 1 over the others.
            module: the module whose weights are wanted in place of those of all modules and layers.
        Raises:
            FieldError: the text is empty or too long, or there is no such expert or module.
            ExpertError, ConfigError: the model cannot do without the expert.
        """
        self._check(without, module)
        reading = self._read(text)
        with self._lock:
            looked = self._look(reading.ids, without, module)
            if self.kind != "gated":  # whose losses alone are summed in another order
                self._keep_losses(reading.ids, without, looked.loss_T)
        tokens = tuple(
            TokenFacts(token, piece, None if loss is None else -loss, top)
            for token, piece, loss, top in zip(
                reading.ids, reading.pieces, looked.loss_T, [(), *looked.top_T[:-1]], strict=True
            )
        )
        totals = _totals(reading.pieces, looked.loss_T)
        return Inspection(
            self.name, self.kind, without, looked.experts, tokens, looked.top_T[-1], totals, looked.views,
            looked.modules,
        )  # fmt: skip

    def cost_without(self, text: str, expert: str) -> ExpertCost:
        """What leaving an expert out costs on a text.

        Raises:
            FieldError, ExpertError, ConfigError: as `inspect`.
        """
        self._check(expert, None)
        ids = self._read(text).ids
        with self._lock:
            whole, rest = self._loss(ids, None), self._loss(ids, expert)
        changes = [
            (after - before, place)
            for place, (before, after) in enumerate(zip(whole, rest, strict=True))
            if before is not None and after is not None
        ]
        worst, place = max(changes, key=lambda change: change[0], default=(0.0, None))
        nats = math.fsum(loss for loss in rest if loss is not None)
        return ExpertCost(expert, nats, math.fsum(change for change, _ in changes), place, worst)

    def totals(self, text: str) -> Totals:
        """The loss of a text.

        Raises:
            FieldError: as `inspect`.
        """
        reading = self._read(text)
        with self._lock:
            return _totals(reading.pieces, self._loss(reading.ids, None))

    def continuation(self, text: str, max_tokens: int, temperature: float, seed: int) -> str:
        """Go on with a text, for models that no engine serves.

        A token is the argmax of logits / temperature + Gumbel noise, which is a draw from the softmax.

        Args:
            text: what came before; empty: the start of a document.
            max_tokens: at most; it ends earlier at the end of a document or of the positions.
            temperature: 0 takes the most likely token.
            seed: of the noise.
        Raises:
            FieldError: the text is too long.
        """
        ids = self.prompt_ids(text)
        with self._lock, torch.inference_mode():
            prompt_1T = torch.tensor([ids], device=self._model.device)
            noise = LogitsProcessorList([GumbelNoise(temperature, seed)])
            made_1T = self._model.generate(
                prompt_1T,
                attention_mask=torch.ones_like(prompt_1T),
                max_new_tokens=min(self.room(ids), max_tokens),
                do_sample=False,
                num_beams=1,
                eos_token_id=self.tokenizer.eos_id,
                pad_token_id=self.tokenizer.eos_id,
                logits_processor=noise,
            )
        made = made_1T[0].tolist()
        if len(made) > len(ids) and made[-1] == self.tokenizer.eos_id:
            made.pop()
        return self.tokenizer.decode(made).removeprefix(self.tokenizer.decode(ids))

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a text to go on with; an empty one begins after the end of a document.

        Raises:
            FieldError: as `inspect`, but that a text may be empty; or it leaves no room for a token.
        """
        ids = self._read(text).ids if text else [self.tokenizer.eos_id]
        if self.room(ids) < 1:
            raise FieldError(
                f"the text has {len(ids)} tokens and fills the {self.max_tokens} that the model {self.name} can read; "
                "shorten it",
                "text",
                "context_length_exceeded",
            )
        return ids

    def room(self, ids: Sequence[int]) -> int:
        """Tokens that may still come after a prompt."""
        return self.max_tokens - len(ids)

    # -- asking -------------------------------------------------------------------------------------------------

    def _check(self, expert: str | None, module: str | None) -> None:
        if expert is not None and expert not in self.experts:
            known = did_you_mean(expert, self.experts) if self.experts else "; it is a model without experts"
            raise FieldError(f"{self.name} has no expert {expert!r}{known}", "without", "not_found", missing=True)
        if expert is not None and len(self.experts) == 1:
            raise FieldError(f"{expert} is the only expert of {self.name}; nobody would be left", "without")
        sites = [site.name for site in self._model.sites] if isinstance(self._model, RoutedModel) else []
        if module is not None and module not in sites:
            known = did_you_mean(module, sites) if sites else "; modules are routed in routed models alone"
            raise FieldError(f"{self.name} routes no module {module!r}{known}", "module", "not_found", missing=True)

    def _read(self, text: str) -> _Reading:
        if len(text) > self.max_characters:
            raise FieldError(
                f"the text has {len(text)} characters; {self.max_characters} are looked at at most, shorten it", "text"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise FieldError(f"the text is no valid Unicode ({error.reason} at {error.start})", "text") from error
        ids, ends = tokens_of(self.tokenizer, text)
        if not ids:
            raise FieldError("the text is empty; type one, or generate one", "text")
        if len(ids) > self.max_tokens:
            raise FieldError(
                f"the text has {len(ids)} tokens; the model {self.name} can read {self.max_tokens}, shorten it",
                "text",
                "context_length_exceeded",
            )
        pieces = [text[start:end] for start, end in itertools.pairwise([0, *ends])]
        return _Reading(ids, ends, pieces)

    def _loss(self, ids: list[int], without: str | None) -> list[float | None]:
        """Losses alone; kept for a while."""
        key = tuple(ids), without
        if key in self._losses:
            return self._losses[key]
        if isinstance(self._model, ModularLM):
            with torch.inference_mode():
                logp_TE = self._gated_scores(ids)
                logw_TE = self._gate_weights(logp_TE, without)[: len(logp_TE)]
                losses = (-torch.logsumexp(logw_TE + logp_TE, dim=-1)).tolist()
            found: list[float | None] = [None, *losses]
        else:
            model = self._model if without is None else self._without(without, keep=False)
            try:
                found = self._predicted(ids, _logits(model, ids))[0]
            finally:
                if model is not self._model and without not in self._variants:
                    model.unload()  # its hooks refer to it: without them its weights are freed at once
        self._keep_losses(ids, without, found)
        return found

    def _keep_losses(self, ids: list[int], without: str | None, losses: list[float | None]) -> None:
        self._losses[tuple(ids), without] = losses
        while len(self._losses) > LOSSES:
            self._losses.popitem(last=False)

    def _look(self, ids: list[int], without: str | None, module: str | None) -> _Looked:
        if isinstance(self._model, ModularLM):
            return self._look_gated(ids, without)
        if isinstance(self._model, RoutedModel):
            return self._look_routed(ids, without, module)
        return _Looked((), *self._predicted(ids, _logits(self._model, ids)))

    # -- routed models ------------------------------------------------------------------------------------------

    def _look_routed(self, ids: list[int], without: str | None, module: str | None) -> _Looked:
        model: RoutedModel = self._model if without is None else self._without(without)
        names = [expert.name for expert in model.experts]
        witness = Witness(ids, names, module)
        static_E = model.router.static_weights_E
        if static_E is None:
            with model.recording(witness):
                logits_TV = _logits(model, ids)
        else:
            logits_TV = _logits(model, ids)
            places_1TE = torch.arange(len(names)).expand(1, len(ids), -1)
            for site in model.sites:
                witness(site, Routing(places_1TE, static_E.float().cpu().expand(1, len(ids), -1)))
        experts, views, modules = witness.told()
        return _Looked(experts, *self._predicted(ids, logits_TV), views, modules)

    def _without(self, expert: str, *, keep: bool = True) -> RoutedModel:
        """The routed model over the other experts; it shares the base's weights and has a structure of its own."""
        if expert in self._variants:
            self._variants.move_to_end(expert)
            return self._variants[expert]  # type: ignore[no-any-return]
        routed: RoutedModel = self._model
        # They were compared with the base when the model was opened; taking its fingerprint again would take long.
        others = [_known(other) for other in routed.experts if other.name != expert]
        base = shadow(routed, self.tokenizer).unload()
        variant = RoutedModel(base, others, routed.router.config, base=routed.base_reference).eval()
        if isinstance(variant.router, RetrievalRouter):
            variant.router.set_decode(self.tokenizer.decode)
        if keep:
            self._variants[expert] = variant
            if len(self._variants) > VARIANTS:
                self._variants.popitem(last=False)[1].unload()
        return variant

    # -- gated models -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _look_gated(self, ids: list[int], without: str | None) -> _Looked:
        pool = self._model.pool
        logp_TE = self._gated_scores(ids)
        logw_TE = self._gate_weights(logp_TE, without)
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
        names = tuple(pool.names[place] for place in others)
        return _Looked(names, *self._predicted(ids, logits_TV), (View("gate", packed(shown_TE)),))

    def _gated_scores(self, ids: list[int]) -> Tensor:
        """log q_e of every token but the first, TE of T - 1 tokens; the last text's are kept."""
        if self._scores is None or self._scores[0] != tuple(ids):
            tokens_1T = torch.tensor([ids], device=self._model.device)
            pool = self._model.pool
            scores = pool.token_log_probs(tokens_1T)[0] if len(ids) > 1 else torch.zeros(0, len(pool))
            self._scores = tuple(ids), scores.to(self._model.device)
        return self._scores[1]

    def _gate_weights(self, logp_TE: Tensor, without: str | None) -> Tensor:
        """log gamma after every token, T + 1 rows for T scored ones; -inf for experts that are left out."""
        model: ModularLM = self._model
        end_1E = logp_TE.new_zeros(1, logp_TE.shape[1])
        real_1T = torch.ones(1, len(logp_TE) + 1, dtype=torch.bool, device=logp_TE.device)
        real_1T[0, -1] = False
        features = Features(logp_BTE=torch.cat([logp_TE, end_1E])[None], mask_BT=real_1T)
        logw_TE = model.gate.log_weights(features)[0].double()
        left_E = torch.tensor([name != without for name in model.pool.names], device=logw_TE.device)
        logw_TE = logw_TE.masked_fill(~left_E, -torch.inf)
        # Where all the gate's weight lay on the one left out, the others are alike to it.
        lost_T1 = (logw_TE == -torch.inf).all(dim=-1, keepdim=True)
        logw_TE = torch.where(lost_T1 & left_E, 0.0, logw_TE)
        if model.sparse and model.config.top_m < int(left_E.sum()):
            chosen_TM = logw_TE.topk(model.config.top_m, dim=-1).indices
            logw_TE = torch.full_like(logw_TE, -torch.inf).scatter(-1, chosen_TM, logw_TE.gather(-1, chosen_TM))
        return torch.log_softmax(logw_TE, dim=-1).float()

    # -- reading a prediction -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def _predicted(self, ids: list[int], logits_TV: Tensor) -> tuple[list[float | None], list[tuple[Guess, ...]]]:
        """Loss of each token, and the most likely tokens after each."""
        losses: list[float | None] = [None]
        tops: list[tuple[Guess, ...]] = []
        for first in range(0, len(ids), ROWS):
            logq_RV = torch.log_softmax(logits_TV[first : first + ROWS].float(), dim=-1)
            best = logq_RV.topk(min(ALTERNATIVES, logq_RV.shape[-1]), dim=-1)
            for logq_K, id_K in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                guesses = zip(id_K, logq_K, strict=True)
                tops.append(tuple(Guess(token, self._text(token), logq) for token, logq in guesses))
            labels_R = torch.tensor(ids[first + 1 : first + 1 + ROWS], device=logq_RV.device)
            label_R = logq_RV[: len(labels_R)].gather(-1, labels_R[:, None])[:, 0]
            losses.extend((-label_R).tolist())
        if any(loss is not None and not math.isfinite(loss) for loss in losses):
            raise NumericsError(f"{self.name} gives a token of the text no finite log-probability; its weights are off")
        return losses, tops

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token])
        return self._texts[token]


def compare(a: Inspector, b: Inspector, text: str) -> Comparison:
    """Two models on one text, on the pieces where the tokens of both end.

    Raises:
        FieldError: as `Inspector.inspect`, of either.
    """
    told_a, told_b = a.inspect(text), b.inspect(text)
    ends_a, ends_b = _ends(told_a), _ends(told_b)
    segments: list[Segment] = []
    start, from_a, from_b = 0, 0, 0
    for end in sorted((set(ends_a) & set(ends_b)) - {0}):
        to_a, to_b = bisect_right(ends_a, end), bisect_right(ends_b, end)
        nats_a, nats_b = _nats(told_a.tokens[from_a:to_a]), _nats(told_b.tokens[from_b:to_b])
        if nats_a is None or nats_b is None:
            nats_a = nats_b = None
        segments.append(Segment(text[start:end], (from_a, to_a), (from_b, to_b), nats_a, nats_b))
        start, from_a, from_b = end, to_a, to_b
    scored = [piece for piece in segments if piece.nats_a is not None]
    size = sum(len(piece.text.encode()) for piece in scored)
    totals_a = Totals(sum(to - at for at, to in (p.a for p in scored)), size, math.fsum(p.nats_a or 0 for p in scored))
    totals_b = Totals(sum(to - at for at, to in (p.b for p in scored)), size, math.fsum(p.nats_b or 0 for p in scored))
    return Comparison(told_a, told_b, tuple(segments), totals_a, totals_b)


# ------------------------------------------------------------------------------------------------------------- helpers


@torch.inference_mode()
def _logits(model: Any, ids: list[int]) -> Tensor:
    """Logits after every token, TV."""
    logits_TV: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return logits_TV


def _known(expert: Expert) -> Expert:
    """An expert whose base need not be compared again."""
    lora = expert.lora
    return replace(expert, lora=replace(lora, base=replace(lora.base, fingerprint=None)))


def _vocabulary(model: Any, tokenizer: Tokenizer) -> int:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else tokenizer.vocab_size


def _totals(pieces: Sequence[str], losses: Sequence[float | None]) -> Totals:
    scored = [(piece, loss) for piece, loss in zip(pieces, losses, strict=True) if loss is not None]
    size = sum(len(piece.encode()) for piece, _ in scored)
    return Totals(len(scored), size, math.fsum(loss for _, loss in scored))


def _ends(told: Inspection) -> list[int]:
    """Where in the text each token ends."""
    return list(itertools.accumulate(len(token.text) for token in told.tokens))


def _nats(tokens: Sequence[TokenFacts]) -> float | None:
    """Loss of some tokens together; None where one is not scored."""
    if any(token.logprob is None for token in tokens):
        return None
    return -math.fsum(token.logprob for token in tokens if token.logprob is not None)
