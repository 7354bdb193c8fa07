"""What an inspection is made with: a copy that shares its weights, ends of tokens, a record of routing, noise."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from weftlm.corpora.tokens import Tokenizer
from weftlm.gating.modular_lm import ModularLM
from weftlm.reporting.traces import packed, quantise
from weftlm.routing.routed_model import RoutedModel
from weftlm.routing.router import Routing, Site
from weftlm.routing.trace import MEAN, layer_of, make_trace
from weftlm.serving.inspection_facts import Layer, ModuleUsage, Part, View

MAX_CHARACTERS = 8192
"""Of a text that is looked at."""


def shadow(model: Any, tokenizer: Tokenizer) -> Any:
    """A copy of a model's structure: modules, hooks and caches of its own, every weight shared.

    Two threads may run the model and its shadow at once, also where a pass leaves notes on the modules.
    """
    kept: list[Any] = [tokenizer, *model.parameters(), *model.buffers()]
    if isinstance(model, RoutedModel):
        kept += model.experts
    if isinstance(model, ModularLM):
        kept += [member.lora for member in model.pool.members if member.lora is not None]
    return copy.deepcopy(model, {id(thing): thing for thing in kept})


def tokens_of(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text, and where in the text each ends.

    Ends increase, and the last one is the text's own: what a tokenizer drops belongs to the token after it. A character
    of several tokens belongs to the first.
    """
    ids: list[int] = tokenizer.encode_batch([text])[0].astype(np.int64).tolist()
    if not ids:
        return [], []
    ends: list[int]
    if tokenizer.hf.is_fast:
        told = tokenizer.hf(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ends = [int(end) for _, end in told["offset_mapping"]] if told["input_ids"] == ids else []
    else:
        ends = []
    if not ends:  # no offsets: by what the tokens so far are decoded to
        ends = [len(tokenizer.decode(ids[: count + 1])) for count in range(len(ids))]
    ends = [min(end, len(text)) for end in itertools.accumulate(ends, max)]
    ends[-1] = len(text)
    return ids, ends


class Witness:
    """Sums up, module by module, who worked on each token."""

    def __init__(self, ids: list[int], experts: Sequence[str], module: str | None) -> None:
        self.ids, self.experts, self.module = ids, tuple(experts), module
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.only: Tensor | None = None
        self.usage: list[tuple[str, Tensor, float]] = []
        self._real_T = torch.ones(len(ids), dtype=torch.bool)

    def __call__(self, site: Site, routing: Routing) -> None:
        trace = make_trace(self.ids, self.experts, {site.name: (site, routing)}, 0, self._real_T)
        weights_TE = trace.weights_STE[0]
        if len(trace.experts) == len(self.experts):  # no weight on the mean of all
            weights_TE = torch.nn.functional.pad(weights_TE, (0, 1))
        layer = layer_of(site.name)
        self.sums[layer] = weights_TE + self.sums[layer] if layer in self.sums else weights_TE
        self.counts[layer] = self.counts.get(layer, 0) + 1
        self.usage.append((site.name, weights_TE.mean(dim=0), float(trace.entropy_S[0])))
        if site.name == self.module:
            self.only = weights_TE

    def told(self) -> tuple[tuple[str, ...], tuple[View, ...], tuple[ModuleUsage, ...]]:
        """Experts, views and modules; the mean of all is an expert only where it worked."""
        mean = any(float(usage_E[-1]) > 0 for _, usage_E, _ in self.usage)
        experts = (*self.experts, MEAN) if mean else self.experts

        def view(name: str, weights_TE: Tensor) -> View:
            return View(name, packed(quantise(weights_TE[:, : len(experts)].numpy())))

        modules = tuple(
            ModuleUsage(site, layer_of(site), tuple(round(u, 5) for u in usage_E[: len(experts)].tolist()), entropy)
            for site, usage_E, entropy in self.usage
        )
        nobody_TE = torch.zeros(len(self.ids), len(self.experts) + 1)
        if self.module is not None:  # one that none of these experts adapts is the base's alone
            return experts, (view(f"module:{self.module}", nobody_TE if self.only is None else self.only),), modules
        every = sum(self.sums.values(), nobody_TE) / max(1, sum(self.counts.values()))
        layers = (view(f"layer:{layer}", sum_TE / self.counts[layer]) for layer, sum_TE in self.sums.items())
        return experts, (view("all", every), *layers), modules


class GumbelNoise(LogitsProcessor):
    """Adds noise whose argmax is a draw."""

    def __init__(self, temperature: float, seed: int) -> None:
        self.temperature = temperature
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.temperature == 0:
            return scores
        noise = torch.empty(scores.shape, dtype=torch.float64).exponential_(generator=self.generator).log_().neg_()
        return scores.double() / self.temperature + noise.to(scores.device)


def layers_of(sites: Sequence[Site]) -> tuple[Layer, ...]:
    """Layers with their modules; `layer 3` where all names differ in their last number only."""
    groups: dict[str, list[Part]] = {}
    for site in sites:
        layer = layer_of(site.name)
        groups.setdefault(layer, []).append(Part(site.name, site.name.removeprefix(f"{layer}.")))
    heads = {layer.rpartition(".")[0] for layer in groups}
    numbered = len(heads) == 1 and all(layer.rpartition(".")[2].isdigit() for layer in groups)
    return tuple(
        Layer(layer, f"layer {layer.rpartition('.')[2]}" if numbered else layer, tuple(modules))
        for layer, modules in groups.items()
    )
