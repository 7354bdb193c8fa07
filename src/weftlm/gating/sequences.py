"""Sequences as gates are fitted on them: log-likelihoods under every expert, features, and how much each counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.gating.arrays import TOLERANCE, log_distributions, to_log_likelihoods, to_tensor
from weftlm.gating.features import sequence_features
from weftlm.gating.gate import Features


@dataclass(frozen=True, eq=False)
class ScoredSequences:
    """Sequences of one domain, or samples drawn from one expert. Make one with `ScoredSequences.of`.

    Attributes:
        logq_NE: log-likelihood of each sequence under each expert, nats, summed over its scored tokens; -inf is legal.
        features: what gates see of them.
        tokens_N: scored tokens of each; None where there is no such thing.
        weights_N: probability of each in an enumerated support, float64, sums to 1; None: 1 / N each.
        clusters_N: which of them belong together (windows of one document), int64: they are not independent, and
            confidence intervals take that into account. None: all are independent.
        tokens_NT1: token ids of each, the context token first; None where there are none.
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
            logq_NE: see the class; numpy or torch, float32 or float64, any number of sequences above 0.
            features: absent: `sequence_features` where `tokens_N` is given, none otherwise.
            tokens_N, weights_N, clusters_N, name: see the class.
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
        weights = None if self.weights_N is None else self.weights_N[index_B] / self.weights_N[index_B].sum()
        return dataclasses.replace(
            self,
            logq_NE=self.logq_NE[index_B],
            features=self.features.rows(index_B),
            tokens_N=None if self.tokens_N is None else self.tokens_N[index_B],
            weights_N=weights,
            clusters_N=None if self.clusters_N is None else self.clusters_N[index_B],
            tokens_NT1=None if self.tokens_NT1 is None else self.tokens_NT1[index_B],
        )

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
        clusters = torch.arange(len(self)) if self.clusters_N is None else self.clusters_N
        names, place_N = torch.unique(clusters, return_inverse=True)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(names)))
        held = min(max(round(fraction * len(names)), 1), len(names) - 1)
        if held < 1:
            raise DataError(f"{self.name or 'the sequences'}: {len(names)} independent sequence cannot be split in two")
        chosen = torch.zeros(len(names), dtype=torch.bool)
        chosen[order[:held]] = True
        out_N = chosen[place_N]
        return (~out_N).nonzero()[:, 0], out_N.nonzero()[:, 0]

    def split(self, fraction: float, seed: int) -> tuple[ScoredSequences, ScoredSequences]:
        """Two disjoint parts, for held-out figures; see `split_rows`."""
        kept, held = self.split_rows(fraction, seed)
        return self.rows(kept), self.rows(held)


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
        P: the domains, D x X, probabilities or their logs.
        Q: the experts, E x X, likewise.
    Returns:
        (domains, samples); points of probability 0 are left out of each.
    Raises:
        ConfigError: P and Q are over different supports.
        NumericsError: a row does not sum to 1.
    """
    logp_DX, logq_EX = log_distributions(P, "P", "DX"), log_distributions(Q, "Q", "EX")
    if logp_DX.shape[1] != logq_EX.shape[1]:
        raise ConfigError(
            f"P has {logp_DX.shape[1]} points and Q {logq_EX.shape[1]}; domains and experts need one support"
        )

    def weighted(logs_X: Tensor, name: str) -> ScoredSequences:
        points = (~torch.isneginf(logs_X)).nonzero()[:, 0]
        features = Features(points_B=points)
        return ScoredSequences.of(logq_EX.T[points], features=features, weights_N=logs_X[points].exp(), name=name)

    domains = tuple(weighted(row, f"domain {d}") for d, row in enumerate(logp_DX))
    return domains, tuple(weighted(row, f"expert {k}") for k, row in enumerate(logq_EX))
