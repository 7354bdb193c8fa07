"""The numbers behind the pictures of a trace: colours by expert, packed weights, smoothed courses, typical tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weftlm.errors import ConfigError, NumericsError
from weftlm.routing.trace import MEAN, Trace, layer_of
from weftlm.text import printable

COLOURS = (
    "#23c6f7", "#e17174", "#eed059", "#c378c7", "#29a58b", "#f59d4f",
    "#809bf9", "#8d9819", "#34e6de", "#fcc1b6", "#aebb89", "#cea5ca",
)  # fmt: skip
"""Twelve hues spread in OKLab for normal, deuteranope and protanope eyes at once, all light enough for dark text."""
OTHER, TIE, BASE = "xo", "xt", "xb"
"""Classes of the gathered experts, of a token whose best experts tie, and of a token the base worked on alone."""
SCALE = 1000
"""Weights are packed as integers of 1 / SCALE."""
ENTRIES = 1_600_000
"""Weights a page holds per trace, about 3 bytes each; beyond, modules are added up to layers."""
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
STRIP_POINTS = 600
_MEAN_CLASS = "xm"
_GREYS = {_MEAN_CLASS: "#98a2ae", OTHER: "#c3c9d1", TIE: "#dfe3e8", BASE: "#ffffff"}

LabelledTrace = tuple[str, Trace, Sequence[str]]
"""A name, a trace, and the text of each of its tokens."""


@dataclass(frozen=True)
class Palette:
    """A class (and so a colour) by expert, the same for all traces of a pool.

    Up to twelve experts have a colour each, in the pools' order; of more, the eleven with the largest share have, and
    the rest is grey together. The mean of all experts has a grey of its own.
    """

    classes: dict[str, str]

    @staticmethod
    def of(facts: Sequence[TraceFacts]) -> Palette:
        """The palette of some traces."""
        shares: dict[str, float] = {}
        for one in facts:
            for name, share in zip(one.experts, one.share_E.tolist(), strict=True):
                shares[name] = shares.get(name, 0.0) + share
        names = [name for name in shares if name != MEAN]
        named = names
        if len(names) > len(COLOURS):
            most = sorted(names, key=lambda name: -shares[name])[: len(COLOURS) - 1]
            named = [name for name in names if name in most]
        classes = dict.fromkeys(names, OTHER) | {name: f"x{place}" for place, name in enumerate(named)}
        return Palette(classes | ({MEAN: _MEAN_CLASS} if MEAN in shares else {}))

    @staticmethod
    def each(facts: Sequence[TraceFacts]) -> list[Palette]:
        """A palette for each of some traces on one page.

        An expert has one colour everywhere; only where several pools hold more experts than there are colours, each
        pool has its own palette.
        """
        pools = [frozenset(one.experts) - {MEAN} for one in facts]
        if len(frozenset().union(*pools)) <= len(COLOURS):
            return [Palette.of(facts)] * len(facts)
        by_pool = {
            pool: Palette.of([one for one, its in zip(facts, pools, strict=True) if its == pool]) for pool in pools
        }
        return [by_pool[pool] for pool in pools]

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Experts by class, in the order of a stack: the named ones, the mean, the rest."""
        found: dict[str, list[str]] = {}
        for name, group in self.classes.items():
            found.setdefault(group, []).append(name)
        return {group: tuple(found[group]) for group in sorted(found, key=_rank)}


def colour_rules() -> str:
    """CSS, one rule per class: its colour as `--c: R G B`."""
    colours = {f"x{place}": colour for place, colour in enumerate(COLOURS)} | _GREYS
    return "\n".join(f".{group} {{ --c: {_rgb(colour)}; }}" for group, colour in colours.items())


def _rank(group: str) -> int:
    return int(group[1:]) if group[1:].isdigit() else {_MEAN_CLASS: 1000, OTHER: 1001}[group]


def _rgb(colour: str) -> str:
    return " ".join(str(int(colour[place : place + 2], 16)) for place in (1, 3, 5))


@dataclass(frozen=True)
class TraceFacts:
    """A trace as arrays, checked.

    Attributes:
        label: its name.
        experts: names.
        tokens: the text of each token.
        sites: the modules, in order of execution.
        weights_STE: weight of each expert at each module and token; rows sum to 1, or to 0 (base alone).
        entropy_S: entropy of each module's usage, nats.
        layers: rows of the modules of each layer.
    """

    label: str
    experts: tuple[str, ...]
    tokens: tuple[str, ...]
    sites: tuple[str, ...]
    weights_STE: NDArray[np.float32]
    entropy_S: NDArray[np.float64]
    layers: dict[str, list[int]]

    @staticmethod
    def of(labelled: LabelledTrace) -> TraceFacts:
        """Take a trace in.

        Raises:
            ConfigError: there are no tokens, no modules or no experts, or not one text per token.
            NumericsError: a weight is not a number between 0 and 1.
        """
        label, trace, tokens = labelled
        shape = (len(trace.sites), len(trace.tokens), len(trace.experts))
        if 0 in shape:
            raise ConfigError(
                f"the trace {label!r} has {shape[0]} modules, {shape[1]} tokens and {shape[2]} experts; a page needs "
                "at least one of each; trace a text of at least one token"
            )
        if len(tokens) != len(trace.tokens):
            raise ConfigError(
                f"the trace {label!r} has {len(trace.tokens)} tokens but {len(tokens)} token texts came; give one text "
                "per token, for example tokenizer.decode([token])"
            )
        if tuple(trace.weights_STE.shape) != shape:
            raise ConfigError(
                f"the trace {label!r} has weights of shape {tuple(trace.weights_STE.shape)}; its modules, tokens and "
                f"experts make {shape}"
            )
        weights_STE = trace.weights_STE.detach().float().cpu().numpy()
        if not (np.isfinite(weights_STE).all() and weights_STE.min() >= 0 and weights_STE.max() <= 1 + 1e-3):
            raise NumericsError(
                f"the trace {label!r} holds weights outside [0, 1]: {weights_STE.min()} to {weights_STE.max()}; "
                "routing weights are shares of one"
            )
        entropy_S = trace.entropy_S.double().numpy()
        return TraceFacts(
            label, trace.experts, tuple(map(str, tokens)), trace.sites, weights_STE, entropy_S, trace.layers()
        )

    @property
    def token_TE(self) -> NDArray[np.float64]:
        """Mean weight over the modules."""
        means: NDArray[np.float64] = self.weights_STE.mean(axis=0, dtype=np.float64)
        return means

    @property
    def usage_SE(self) -> NDArray[np.float64]:
        """Mean weight over the tokens."""
        means: NDArray[np.float64] = self.weights_STE.mean(axis=1, dtype=np.float64)
        return means

    @property
    def share_E(self) -> NDArray[np.float64]:
        """Mean weight over modules and tokens."""
        means: NDArray[np.float64] = self.usage_SE.mean(axis=0)
        return means

    @property
    def max_entropy(self) -> float:
        """ln E, nats."""
        return math.log(len(self.experts))

    @property
    def layer_names(self) -> dict[str, str]:
        """What layers are called: `layer 3` where all names differ in their last number only, else in full."""
        heads = {layer.rpartition(".")[0] for layer in self.layers}
        numbered = all(layer.rpartition(".")[2].isdigit() for layer in self.layers)
        if len(heads) > 1 or not numbered:
            return {layer: layer for layer in self.layers}
        return {layer: f"layer {layer.rpartition('.')[2]}" for layer in self.layers}

    def site_name(self, row: int) -> str:
        """A module's name within its layer."""
        site = self.sites[row]
        return site.removeprefix(layer_of(site)).removeprefix(".") or site


def quantise(weights: NDArray[Any]) -> NDArray[np.int64]:
    """Weights as integers of 1 / SCALE."""
    return np.clip(np.rint(np.asarray(weights, dtype=np.float64) * SCALE), 0, SCALE).astype(np.int64)


def leaders(weights_TE: NDArray[np.int64]) -> NDArray[np.int64]:
    """The expert with each token's largest packed weight; -1 where two experts have it, -2 where none worked."""
    best_T = weights_TE.max(axis=1)
    lead_T = np.where((weights_TE == best_T[:, None]).sum(axis=1) > 1, -1, weights_TE.argmax(axis=1))
    return np.where(best_T == 0, -2, lead_T).astype(np.int64)


def leader_class(leader: int, classes: Sequence[str]) -> str:
    """The class of what `leaders` gives."""
    return {-1: TIE, -2: BASE}.get(leader) or classes[leader]


def opacity(weight: float) -> float:
    """How strong a weight is drawn: w^0.6, so that small weights can still be seen; the same in every view."""
    return round(float(weight**0.6), 2)


def strip_window(tokens: int) -> int:
    """Tokens a course is averaged over: odd, a 24th of the text, between 3 and 31; 1 for very short texts."""
    return 1 if tokens < 8 else min(31, max(3, tokens // 24 | 1))


def smoothed(values_TG: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred mean over `window` tokens, fewer at the ends."""
    count, half = len(values_TG), window // 2
    sums = np.concatenate([np.zeros((1, values_TG.shape[1])), np.cumsum(values_TG, axis=0)])
    place_T = np.arange(count)
    low_T, high_T = np.maximum(place_T - half, 0), np.minimum(place_T + half + 1, count)
    means: NDArray[np.float64] = (sums[high_T] - sums[low_T]) / (high_T - low_T)[:, None]
    return means


@dataclass(frozen=True)
class TypicalToken:
    """A token text on which an expert works more than elsewhere.

    Attributes:
        text: of the token.
        count: occurrences.
        weight: the expert's mean weight there.
    """

    text: str
    count: int
    weight: float


def typical_tokens(facts: TraceFacts, limit: int = 8) -> dict[str, list[TypicalToken]]:
    """By expert, the token texts with the largest excess.

        excess(expert, text) = sum over occurrences t of ( w_t - share )

    A text that is frequent and one on which the expert is alone both count; a text with no excess is left out.
    """
    texts = list(dict.fromkeys(facts.tokens))
    places = {text: place for place, text in enumerate(texts)}
    place_T = np.array([places[text] for text in facts.tokens])
    counts_N = np.bincount(place_T, minlength=len(texts))
    token_TE, share_E = facts.token_TE, facts.share_E
    found = {}
    for e, name in enumerate(facts.experts):
        sums_N = np.bincount(place_T, weights=token_TE[:, e], minlength=len(texts))
        excess_N = sums_N - counts_N * share_E[e]
        order = np.argsort(-excess_N, kind="stable")[:limit]
        found[name] = [
            TypicalToken(texts[n], int(counts_N[n]), float(sums_N[n] / counts_N[n]))
            for n in order.tolist()
            if excess_N[n] > 1e-6
        ]
    return found


def packed(weights_TE: NDArray[np.int64]) -> str:
    """Packed weights of each token as text: how many experts worked, then expert and weight of each.

    Numbers are written in base 64 with the digits 0-9 A-Z a-z - _: one digit for a count or an expert (two where there
    are more than 63 experts), two for a weight. `1D8C` is one expert, number 13, with 8 * 64 + 12 = 524 / SCALE.
    """
    wide = packed_digits(weights_TE.shape[1]) == 2
    pairs = [first + second for first in DIGITS for second in DIGITS]
    small: Sequence[str] = pairs if wide else DIGITS
    tokens_N, experts_N = np.nonzero(weights_TE)
    counts_T = np.bincount(tokens_N, minlength=len(weights_TE)).tolist()
    entries = [
        small[expert] + pairs[weight]
        for expert, weight in zip(experts_N.tolist(), weights_TE[tokens_N, experts_N].tolist(), strict=True)
    ]
    parts, start = [], 0
    for count in counts_T:
        parts.append(small[count])
        parts.extend(entries[start : start + count])
        start += count
    return "".join(parts)


def packed_digits(experts: int) -> int:
    """Digits a count or an expert takes."""
    return 1 if experts < 64 else 2


def trace_data(facts: TraceFacts, palette: Palette) -> dict[str, Any]:
    """What the page's script reads: every weight that is not 0, per module (per layer, or as means alone, if too many).

    Equal rows are held once: a router that decides for the whole sequence costs one row.
    """
    layers = list(facts.layers)
    rows: list[tuple[str, str, NDArray[np.int64]]] = []
    quantised_STE = quantise(facts.weights_STE)
    kind = "modules"
    if np.count_nonzero(quantised_STE) <= ENTRIES:
        for row, site in enumerate(facts.sites):
            rows.append((facts.site_name(row), layer_of(site), quantised_STE[row]))
    else:
        kind = "layers"
        means = [(layer, quantise(facts.weights_STE[sites].mean(axis=0))) for layer, sites in facts.layers.items()]
        if sum(int(np.count_nonzero(weights_TE)) for _, weights_TE in means) <= ENTRIES:
            rows = [(facts.layer_names[layer], layer, weights_TE) for layer, weights_TE in means]
        else:
            kind = "none"
    texts: dict[str, int] = {}
    parts = [
        {"name": printable(name), "layer": layers.index(layer), "row": texts.setdefault(packed(weights_TE), len(texts))}
        for name, layer, weights_TE in rows
    ]
    return {
        "experts": list(map(printable, facts.experts)),
        "classes": [palette.classes[name] for name in facts.experts],
        "groups": list(palette.groups),
        "tokens": list(facts.tokens),
        "layers": list(map(printable, facts.layer_names.values())),
        "digits": packed_digits(len(facts.experts)),
        "scale": SCALE,
        "window": strip_window(len(facts.tokens)),
        "stride": strip_stride(len(facts.tokens)),
        "kind": kind,
        "parts": parts,
        "rows": list(texts),
        "mean": packed(quantise(facts.token_TE)),
    }


def strip_stride(tokens: int) -> int:
    """Every how many tokens a course is drawn."""
    return -(-tokens // STRIP_POINTS)


def group_weights(facts: TraceFacts, palette: Palette) -> dict[str, NDArray[np.float64]]:
    """Mean weight over the modules by class, of each token."""
    token_TE = facts.token_TE
    found: Mapping[str, list[int]] = {
        group: [e for e, name in enumerate(facts.experts) if palette.classes[name] == group] for group in palette.groups
    }
    return {group: token_TE[:, columns].sum(axis=1) for group, columns in found.items() if columns}
