"""Sequences as gates are fitted on them: log-likelihoods under every expert, features, and how much each counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.gating.arrays import TOLERANCE, log_support, refuse_impossible, to_log_likelihoods, to_tensor
from weftlm.gating.gate import FLOOR, Features


def sequence_features(logq_NE: Any, tokens_N: Any, *, logp_NTE: Any = None, mask_NT: Any = None) -> Features:
    """What sequence-level gates see.

        m_k = log q_k(x) / T            mean log-likelihood per token, nats
        f   = [ m_1 .. m_E, m_1 - max_j m_j .. m_E - max_j m_j ]

    The number of tokens T enters by that division alone: a text said twice over has the features of the text said once,
    so no gate on them can tell domains apart by length or padding. Features that grow with T would also explode where
    lengths differ. Sums over tokens remain what likelihoods are.

    Args:
        logq_NE: Log-likelihood of each sequence under each expert, nats, summed over its T scored tokens.
        tokens_N: T, scored tokens of each sequence, 1 or more.
        logp_NTE: Scores of single tokens, carried along for causal gates.
        mask_NT: True for real tokens of `logp_NTE`.
    Returns:
        Features with names mean.0 .. , below_best.0 .. ; scores more than 50 nats per token below the best expert's are
        clipped there.
    Raises:
        ConfigError: shapes do not fit, or a sequence has no token.
        DataError: a sequence is impossible under every expert.
        NumericsError: NaN or +inf.
    """
    logq = to_log_likelihoods(logq_NE, "logq_NE", "NE")
    tokens = to_tensor(tokens_N, "tokens_N", "N")
    if len(tokens) != len(logq) or bool((tokens < 1).any()) or bool(torch.isinf(tokens).any()):
        raise ConfigError(
            f"tokens_N has {len(tokens)} entries from {float(tokens.min()) if len(tokens) else 0:g} up for {len(logq)} "
            "sequences; it needs one per sequence, 1 or more"
        )
    refuse_impossible(logq, "features")
    mean = logq / tokens[:, None].to(logq.dtype)
    best = mean.amax(dim=1, keepdim=True)
    below = (mean - best).clamp_min(-FLOOR)
    names = tuple(f"{kind}.{k}" for kind in ("mean", "below_best") for k in range(logq.shape[1]))
    logp = None if logp_NTE is None else to_log_likelihoods(logp_NTE, "logp_NTE", "NTE")
    mask = None if mask_NT is None else torch.as_tensor(mask_NT).to(torch.bool)
    return Features(len(logq), torch.cat([best + below, below], dim=1), names, logp_BTE=logp, mask_BT=mask)


@dataclass(frozen=True, eq=False)
class ScoredSequences:
    """Sequences of one domain, or samples drawn from one expert. Make one with `ScoredSequences.of`.

    Attributes:
        logq_NE: Log-likelihood of each sequence under each expert, nats, summed over its scored tokens; -inf is legal.
        features: Features that gates see.
        tokens_N: Scored tokens of each; None where there is no such thing.
        weights_N: Probability of each in an enumerated support, float64, sums to 1; None: 1 / N each.
        clusters_N: Group of each (windows of one document), int64: sequences of a group are not independent, and
            confidence intervals take that into account. None: all are independent.
        tokens_NT1: Token ids of each, the context token first; None where there are none.
        name: Name of the domain or the expert, for messages and tables.
    """

    logq_NE: Tensor
    features: Features
    tokens_N: Tensor | None = None
    weights_N: Tensor | None = None
    clusters_N: Tensor | None = None
    name: str = ""
    tokens_NT1: Tensor | None = None

    @classmethod
    def of(
        cls,
        logq_NE: Any,
        *,
        features: Features | None = None,
        tokens_N: Any = None,
        weights_N: Any = None,
        clusters_N: Any = None,
        name: str = "",
    ) -> ScoredSequences:
        """Check and convert arrays.

        Args:
            logq_NE: As in the class; numpy or torch, float32 or float64, any number of sequences above 0.
            features: Features; None: `sequence_features` where `tokens_N` is given, none otherwise.
            tokens_N, weights_N, clusters_N, name: As in the class.
        Raises:
            ConfigError: shapes do not fit.
            DataError: there is no sequence.
            NumericsError: NaN or +inf, or weights that are no distribution.
        """
        title = name or "the sequences"
        logq = to_log_likelihoods(logq_NE, f"logq_NE of {title}", "NE")
        count = len(logq)
        if count == 0 or logq.shape[1] == 0:
            raise DataError(f"{title}: {count} sequences scored by {logq.shape[1]} experts; needs one of each at least")
        tokens = None if tokens_N is None else to_tensor(tokens_N, f"tokens_N of {title}", "N").to(torch.float64)
        weights = None if weights_N is None else to_tensor(weights_N, f"weights_N of {title}", "N").to(torch.float64)
        clusters = None if clusters_N is None else torch.as_tensor(np.asarray(clusters_N)).to(torch.int64)
        for what, column in (("tokens_N", tokens), ("weights_N", weights), ("clusters_N", clusters)):
            if column is not None and column.shape != (count,):
                raise ConfigError(f"{what} of {title} has shape {tuple(column.shape)}; it needs ({count},)")
        if tokens is not None and bool((tokens < 1).any()):
            raise ConfigError(f"tokens_N of {title} holds {float(tokens.min()):g}; a sequence has 1 token at least")
        if weights is not None:
            total = float(weights.sum())
            if bool((weights < 0).any()) or abs(total - 1.0) > TOLERANCE:
                raise NumericsError(f"weights_N of {title} sum to {total:.6g}; they must be >= 0 and sum to 1")
            weights = weights / total
        if features is None:
            features = Features(count) if tokens is None else sequence_features(logq, tokens)
        if len(features) != count:
            raise ConfigError(f"{title}: {count} scores and features of {len(features)} sequences")
        return cls(logq, features, tokens, weights, clusters, name)

    def __len__(self) -> int:
        return len(self.logq_NE)

    @property
    def experts(self) -> int:
        """E."""
        return int(self.logq_NE.shape[1])

    def probability(self) -> Tensor:
        """Weight of each sequence, float64, sums to 1."""
        if self.weights_N is not None:
            return self.weights_N
        return torch.full((len(self),), 1.0 / len(self), dtype=torch.float64)

    def rows(self, index_B: Tensor) -> ScoredSequences:
        """Some of the sequences; weights are made to sum to 1 again."""
        held = {name: getattr(self, name) for name in ("logq_NE", "tokens_N", "weights_N", "clusters_N", "tokens_NT1")}
        found = {name: tensor[index_B] for name, tensor in held.items() if tensor is not None}
        if self.weights_N is not None:
            found["weights_N"] = found["weights_N"] / found["weights_N"].sum()
        return dataclasses.replace(self, features=self.features.rows(index_B), **found)

    def without_tokens(self) -> ScoredSequences:
        """The same sequences without the scores of single tokens."""
        return dataclasses.replace(self, features=dataclasses.replace(self.features, logp_BTE=None, mask_BT=None))

    def split_rows(self, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
        """Places of two disjoint parts, ascending; the second has about `fraction` of the sequences (whole clusters).

        Raises:
            ConfigError: the fraction is not between 0 and 1, or the sequences are an enumerated support.
            DataError: a part would be empty.
        """
        if not 0.0 < fraction < 1.0 or self.weights_N is not None:
            raise ConfigError(
                f"cannot hold out {fraction} of {self.name or 'the sequences'}: need 0 < fraction < 1 of a sample"
            )
        place_N, count = self.groups()
        order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
        held = min(max(round(fraction * count), 1), count - 1)
        if held < 1:
            raise DataError(f"{self.name or 'the sequences'}: {count} independent sequence cannot be split in two")
        out_N = torch.isin(place_N, order[:held])
        return (~out_N).nonzero()[:, 0], out_N.nonzero()[:, 0]

    def groups(self) -> tuple[Tensor, int]:
        """Number of each sequence's cluster, from 0, and how many clusters there are."""
        if self.clusters_N is None:
            return torch.arange(len(self)), len(self)
        names, place_N = torch.unique(self.clusters_N, return_inverse=True)
        return place_N, len(names)

    def split(self, fraction: float, seed: int) -> tuple[ScoredSequences, ScoredSequences]:
        """Two disjoint parts, for held-out figures; see `split_rows`."""
        kept, held = self.split_rows(fraction, seed)
        return self.rows(kept), self.rows(held)


def squared_error(terms_N: Tensor, one: ScoredSequences) -> float:
    """Variance of a weighted mean from its centred terms, summed within clusters first; inf from one cluster alone."""
    place_N, count = one.groups()
    terms_C = torch.zeros(count, dtype=terms_N.dtype).index_add(0, place_N, terms_N)
    return float((terms_C**2).sum()) * count / (count - 1) if count > 1 else math.inf


@dataclass(frozen=True, eq=False)
class Joined:
    """Sets of sequences one after the other, or sequences drawn from each of them.

    Attributes:
        logq_NE: Log-likelihoods under every expert, nats, float64.
        features: Features of the sequences.
        set_N: Number of each sequence's set, ascending.
        weights_N: Probability of each in its set, float64.
    """

    logq_NE: Tensor
    features: Features
    set_N: Tensor
    weights_N: Tensor

    @classmethod
    def of(cls, sets: Sequence[ScoredSequences]) -> Joined:
        """All sequences of some sets.

        Raises:
            ConfigError: they carry different features, or tokens of different lengths.
        """
        return cls(
            torch.cat([one.logq_NE.to(torch.float64) for one in sets]),
            Features.joined([one.features for one in sets]),
            torch.repeat_interleave(torch.arange(len(sets)), torch.tensor([len(one) for one in sets])),
            torch.cat([one.probability() for one in sets]),
        )

    def drawn(self, size: int, rng: np.random.Generator) -> Joined:
        """`size` sequences of each set, drawn with replacement by their weights, each of weight 1 / size."""
        found, first = [], 0
        for weights_N in self.weights_N.split(torch.bincount(self.set_N).tolist()):
            found.append(first + draw_rows(weights_N, size, rng))
            first += len(weights_N)
        rows_B = torch.cat(found)
        even_B = torch.full((len(rows_B),), 1.0 / size, dtype=torch.float64)
        return Joined(self.logq_NE[rows_B], self.features.rows(rows_B), self.set_N[rows_B], even_B)


def draw_rows(weights_N: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """Places drawn with replacement in proportion to weights."""
    totals_N = weights_N.cumsum(0)
    places_B = torch.searchsorted(totals_N, torch.from_numpy(rng.random(size)) * totals_N[-1], right=True)
    return places_B.clamp_max(len(weights_N) - 1)


def enumerated(P: Any, Q: Any) -> tuple[tuple[ScoredSequences, ...], tuple[ScoredSequences, ...]]:
    """The domains and the experts' samples of a problem whose support can be listed: every point, with its probability.

    Args:
        P: The domains, D x X, probabilities or their logs.
        Q: The experts, E x X, likewise.
    Returns:
        (domains, samples); points of probability 0 are left out of each.
    Raises:
        ConfigError: P and Q are over different supports.
        NumericsError: a row does not sum to 1.
    """
    logp_DX, logq_EX = log_support(P, Q)

    def weighted(logs_X: Tensor, name: str) -> ScoredSequences:
        points = (~torch.isneginf(logs_X)).nonzero()[:, 0]
        features = Features(points_B=points)
        return ScoredSequences.of(logq_EX.T[points], features=features, weights_N=logs_X[points].exp(), name=name)

    domains = tuple(weighted(row, f"domain {d}") for d, row in enumerate(logp_DX))
    return domains, tuple(weighted(row, f"expert {k}") for k, row in enumerate(logq_EX))
