"""The draw: which sequence of which domain fills each slot of each global batch.

Everything a run will ever draw is a pure function of the seed, the domain sizes, the batch size and the weights in
force at each step. A slot is one place in a global batch; slots are numbered through the run, slot = step * B + j.

    domain(slot)   = inverse CDF of alpha at u(seed, slot)                u: Philox counter, Salmon et al. 2011
    cursor         = how often that domain was drawn before this slot
    sequence       = pi_{seed, domain, epoch}(cursor mod n),  epoch = cursor div n

pi is a keyed permutation computed on the spot (a Feistel network over Z_a x Z_b with cycle walking, Black and Rogaway
2002), so memory stays constant however large the corpus: the whole state is one counter per domain, the weights and the
step. The draw is global and cut into equal shards afterwards; it knows no ranks, so a run may go on with another number
of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weftlm.config import differences
from weftlm.errors import CheckpointError, ConfigError, WeftError, reason

Exhaustion: TypeAlias = Literal["repeat", "drop", "stop"]
"""What happens when a domain has been read as often as it may: nothing, it leaves the mixture, or the run ends."""

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Words: TypeAlias = NDArray[np.uint64]

STATE_FORMAT = 1

_UNLIMITED = np.iinfo(np.int64).max
_ROUNDS, _SMALL_ROUNDS, _SMALL = 10, 20, 256  # fewer than 16 leave permutations of 5 or 6 things measurably uneven
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_TRAIN, _STRATIFY, _PROBE = 1, 2, 3  # streams of random numbers that never meet


class SamplerExhausted(WeftError):  # noqa: N818 - the end of the data, as StopIteration is the end of an iterator
    """No further batch can be filled under the repetition caps; the sampler's state is as before the call."""


@dataclass(frozen=True)
class Draw:
    """One batch, by reference: which sequences, of which domains.

    Attributes:
        step: the optimizer step this batch belongs to.
        domains_B: index of each sequence's domain, int64.
        sequences_B: index of the sequence within its domain, int64.
        epochs_B: how often the domain had been read whole before, int64.
        loss_weights_B: factor on each sequence's loss, float64; 1 unless the draw is stratified.
        weights_D: the mixture this batch estimates, float64: alpha less the domains that were already exhausted.
    """

    step: int
    domains_B: Ints
    sequences_B: Ints
    epochs_B: Ints
    loss_weights_B: Floats
    weights_D: Floats

    def __len__(self) -> int:
        return len(self.domains_B)

    def shard(self, rank: int, world: int) -> Draw:
        """The contiguous slice of rank `rank` of `world`; the slices in rank order make up the batch.

        Raises:
            ConfigError: the batch does not divide into `world` equal slices, or there is no such rank.
        """
        check_share(len(self), rank, world)
        size = len(self) // world
        here = slice(rank * size, (rank + 1) * size)
        return replace(
            self,
            domains_B=self.domains_B[here],
            sequences_B=self.sequences_B[here],
            epochs_B=self.epochs_B[here],
            loss_weights_B=self.loss_weights_B[here],
        )


def check_share(batch: int, rank: int, world: int) -> None:
    """Refuse ranks that cannot share a batch equally.

    Raises:
        ConfigError: the batch does not divide into `world` equal slices, or there is no such rank.
    """
    if world < 1 or not 0 <= rank < world:
        raise ConfigError(f"there is no rank {rank} of {world}; ranks are 0 .. world - 1")
    if batch % world:
        raise ConfigError(
            f"a batch of {batch} sequences cannot be cut into {world} equal shards; choose a batch size that is a "
            "multiple of the number of processes"
        )


@dataclass(frozen=True)
class ProbeDraw:
    """Sequences for measuring, grouped: N = groups * sequences per group, groups contiguous and in order.

    Attributes:
        groups_N: Group of each sequence, int64.
        domains_N: index of its domain, int64.
        sequences_N: index of the sequence within its domain, int64.
    """

    groups_N: Ints
    domains_N: Ints
    sequences_N: Ints


class MixtureSampler:
    """Draws global batches from D domains under weights that may change at any step.

    Args:
        sequences_D: training sequences per domain, each at least 1.
        batch_size: B, sequences per global batch, over all ranks.
        seed: the seed of the whole draw, 0 <= seed < 2**63.
        names: domain names, for messages; their indices by default.
        exhaustion: `repeat` reads a domain again and again, reshuffled each time. `drop` takes a domain that reached
            its cap out of the mixture from that slot on and renormalises the rest. `stop` ends at the first batch that
            the caps do not allow to be filled as drawn.
        max_epochs: cap on reading each domain, in epochs (fractions allowed, `inf` for none), for all or per domain;
            1 by default under `drop` and `stop`.
        weights_D: alpha before the first change; uniform by default.

    Raises:
        ConfigError: a domain has no sequence, a number is out of range, or a cap is given under `repeat`.
    """

    def __init__(
        self,
        sequences_D: Sequence[int] | Ints,
        batch_size: int,
        seed: int,
        *,
        names: Sequence[str] | None = None,
        exhaustion: Exhaustion = "repeat",
        max_epochs: float | Sequence[float] | Floats | None = None,
        weights_D: ArrayLike | None = None,
    ) -> None:
        sizes_D = np.array(sequences_D, dtype=np.int64)
        if sizes_D.ndim != 1 or not len(sizes_D):
            raise ConfigError(
                f"sequences_D has shape {sizes_D.shape}; give one number of sequences per domain, at least one"
            )
        self.names = tuple(names) if names is not None else tuple(str(index) for index in range(len(sizes_D)))
        if len(self.names) != len(sizes_D):
            raise ConfigError(f"{len(self.names)} names for {len(sizes_D)} domains; give one name each")
        if (sizes_D < 1).any():
            short = [self.names[index] for index in np.flatnonzero(sizes_D < 1)[:8]]
            raise ConfigError(f"domain {', '.join(map(repr, short))} has no sequence; leave it out")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1 sequence")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed is {seed}; it must lie in 0 .. 2**63 - 1")
        if exhaustion not in ("repeat", "drop", "stop"):
            raise ConfigError(f"exhaustion is {exhaustion!r}; allowed: 'repeat', 'drop', 'stop'")
        self.sequences_D: Ints = sizes_D
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.exhaustion: Exhaustion = exhaustion
        self.max_sequences_D: Ints = self._caps(max_epochs)
        uniform_D = np.full(len(sizes_D), 1.0 / len(sizes_D))
        self._weights_D = uniform_D if weights_D is None else self._checked(weights_D)
        self._scheduled: dict[int, Floats] = {}
        self._step = 0
        self._cursors_D: Ints = np.zeros(len(sizes_D), dtype=np.int64)
        self._key = int(_mix(np.array([seed], dtype=np.uint64) + _GOLDEN)[0])

    def _caps(self, max_epochs: float | Sequence[float] | Floats | None) -> Ints:
        """The most sequences that may be drawn from each domain."""
        if self.exhaustion == "repeat":
            if max_epochs is not None:
                raise ConfigError(
                    f"max_epochs is {max_epochs} but exhaustion is 'repeat', which knows no cap; choose 'drop' "
                    "or 'stop', or leave max_epochs out"
                )
            return np.full(len(self.sequences_D), _UNLIMITED)
        given = np.asarray(1.0 if max_epochs is None else max_epochs, dtype=np.float64)
        if given.shape not in ((), self.sequences_D.shape):
            raise ConfigError(
                f"max_epochs has shape {given.shape} for {len(self.sequences_D)} domains; "
                "give one number or one per domain"
            )
        epochs_D = np.broadcast_to(given, self.sequences_D.shape)
        if not (epochs_D > 0).all():
            raise ConfigError(f"max_epochs is {max_epochs}; every cap must be above 0")
        # The tolerance keeps 0.1 of 30 sequences at 3, whatever 0.1 is in binary.
        most_D = np.floor(epochs_D * self.sequences_D * (1 + 1e-12))
        if (most_D < 1).any():
            worst = int(np.flatnonzero(most_D < 1)[0])
            raise ConfigError(
                f"max_epochs {epochs_D[worst]:g} of domain {self.names[worst]!r} ({self.sequences_D[worst]} sequences) "
                "is less than one sequence; raise the cap or leave the domain out"
            )
        return np.where(most_D >= 2.0**62, _UNLIMITED, np.minimum(most_D, 2.0**62).astype(np.int64))

    # What is in force

    @property
    def step(self) -> int:
        """The next step to be drawn."""
        return self._step

    @property
    def weights_D(self) -> Floats:
        """The weights alpha of the next step as it was set, float64."""
        return self._weights_D.copy()

    @property
    def effective_weights_D(self) -> Floats:
        """The weights of the next step less the exhausted domains, renormalised; all 0 when nothing is left to draw."""
        return self._effective()[0].copy()

    def epochs_D(self) -> Floats:
        """How often each domain has been read so far, float64: sequences drawn / sequences there."""
        return self._cursors_D / self.sequences_D

    def drawn_D(self) -> Ints:
        """Sequences drawn from each domain so far."""
        return self._cursors_D.copy()

    def set_weights(self, step: int, weights_D: ArrayLike) -> None:
        """Let alpha be `weights_D` from exactly `step` on, until the next scheduled change.

        Changes may be scheduled in any order; a second one for the same step replaces the first.

        Raises:
            ConfigError: `step` was drawn already, or the weights are not a distribution over the D domains.
        """
        if step < self._step:
            raise ConfigError(
                f"weights cannot change at step {step}: the batches before step {self._step} are drawn; "
                f"the earliest step that can change is {self._step}"
            )
        checked_D = self._checked(weights_D)
        if step > self._step:
            self._scheduled[step] = checked_D
        else:
            self._weights_D = checked_D

    def _checked(self, weights_D: ArrayLike) -> Floats:
        weights = np.array(weights_D, dtype=np.float64)
        if weights.shape != self.sequences_D.shape:
            raise ConfigError(
                f"weights have shape {weights.shape}; {len(self.sequences_D)} domains need ({len(self.sequences_D)},)"
            )
        if not np.isfinite(weights).all() or (weights < 0).any():
            worst = int(np.flatnonzero(~np.isfinite(weights) | (weights < 0))[0])
            raise ConfigError(
                f"the weight of domain {self.names[worst]!r} is {weights[worst]}; weights must be "
                "finite and not negative"
            )
        total = float(weights.sum())
        if abs(total - 1.0) > 1e-6:
            raise ConfigError(f"weights sum to {total:.9g} over {len(weights)} domains; must be 1 ± 1e-6")
        return weights

    # Drawing

    def draw(self, min_per_domain: int = 0) -> Draw:
        """Draw the batch of the next step and advance.

        A stratified draw (`min_per_domain` = m > 0) gives every domain of positive weight at least m sequences (or what
        its cap leaves) and the rest of the batch as nearly in proportion to alpha as whole numbers n_i allow, and
        corrects the loss for it:

            loss_weight = alpha_i B / n_i      so that  1/B sum_slots loss_weight * loss  estimates  sum_i alpha_i L_i

        Under `drop`, a domain whose cap leaves fewer than its share counts with the mass n_i / B and the others share
        the remainder, as in an ordinary draw; `Draw.weights_D` then shows that mixture.

        Raises:
            SamplerExhausted: the caps do not allow a whole batch; nothing has changed.
            ConfigError: m sequences of every domain do not fit into the batch.
        """
        if min_per_domain < 0:
            raise ConfigError(f"min_per_domain is {min_per_domain}; it must be 0 (not stratified) or more")
        draw = self._stratified(min_per_domain) if min_per_domain else self._ordinary()
        self._cursors_D += np.bincount(draw.domains_B, minlength=len(self._cursors_D))
        self._step += 1
        self._weights_D = self._scheduled.pop(self._step, self._weights_D)
        return draw

    def copy(self) -> MixtureSampler:
        """An independent sampler in the same state."""
        twin = copy.copy(self)
        twin._cursors_D = self._cursors_D.copy()
        twin._scheduled = dict(self._scheduled)
        return twin

    def _effective(self) -> tuple[Floats, Floats]:
        """The weights of the next step less the exhausted domains, and their running sum (not normalised).

        Raises nothing where all are exhausted: the weights are all 0 then.
        """
        weights_D = self._weights_D
        if self.exhaustion != "drop":
            return weights_D, np.cumsum(weights_D)
        weights_D = np.where(self._cursors_D >= self.max_sequences_D, 0.0, weights_D)
        sums_D = np.cumsum(weights_D)
        return (weights_D / sums_D[-1] if sums_D[-1] > 0 else weights_D), sums_D

    def _uniforms(self, stream: int, first: int, count: int, *, step: int = 0, attempt: int = 0) -> Floats:
        """Uniform numbers in [0, 1) numbered first .. first + count of a stream; any of them can be had alone."""
        counter = np.array([first // 4, step, attempt, stream], dtype=np.uint64)
        key = np.array([self.seed, self._key], dtype=np.uint64)
        words = np.random.Philox(key=key, counter=counter).random_raw(first % 4 + count)[first % 4 :]
        uniforms: Floats = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return uniforms

    def _ordinary(self) -> Draw:
        weights_D, sums_D = self._effective()
        self._check_left(sums_D)
        uniforms_B = self._uniforms(_TRAIN, self._step * self.batch_size, self.batch_size)
        domains_B = _inverse_cdf(sums_D, uniforms_B)
        counts_D = np.bincount(domains_B, minlength=len(self._cursors_D))
        if (counts_D > self.max_sequences_D - self._cursors_D).any():
            domains_B = self._within_caps(domains_B)
        return self._filled(domains_B, np.ones(self.batch_size), weights_D.copy())

    def _filled(self, domains_B: Ints, loss_weights_B: Floats, weights_D: Floats) -> Draw:
        """The draw of the next step with the next sequences of these domains."""
        sizes_B = self.sequences_D[domains_B]
        epochs_B, positions_B = np.divmod(self._cursors_D[domains_B] + _ranks(domains_B), sizes_B)
        sequences_B = keyed_permutation(positions_B, sizes_B, self._keys(_TRAIN, domains_B, epochs_B))
        return Draw(self._step, domains_B, sequences_B, epochs_B, loss_weights_B, weights_D)

    def _within_caps(self, domains_B: Ints) -> Ints:
        """Fill the slots of one batch one after the other, giving those that overflow a cap to the remaining domains.

        A slot whose domain is exhausted draws again, from its own further random numbers, among the domains not yet
        found exhausted: given the past, that is the renormalised mixture. Slow, and needed only where a domain ends.
        """
        domains = domains_B.tolist()
        left_D, sums_D = self._effective()
        left_D = left_D.copy()
        free_D = self.max_sequences_D - self._cursors_D
        uniforms_AB: list[Floats] = []
        for slot, domain in enumerate(domains):
            attempt = 0
            while free_D[domain] <= 0:
                if self.exhaustion == "stop":
                    raise SamplerExhausted(
                        f"domain {self.names[domain]!r} reached its cap of {self.max_sequences_D[domain]} sequences "
                        f"({self.max_sequences_D[domain] / self.sequences_D[domain]:g} epochs) in step {self._step}"
                    )
                left_D[domain] = 0.0
                sums_D = np.cumsum(left_D)
                self._check_left(sums_D)
                if attempt == len(uniforms_AB):
                    first = self._step * self.batch_size
                    uniforms_AB.append(self._uniforms(_TRAIN, first, self.batch_size, attempt=attempt + 1))
                domain = int(_inverse_cdf(sums_D, uniforms_AB[attempt][slot : slot + 1])[0])
                attempt += 1
            free_D[domain] -= 1
            domains[slot] = domain
        return np.array(domains, dtype=np.int64)

    def _check_left(self, sums_D: Floats) -> None:
        if not sums_D[-1] > 0:
            raise SamplerExhausted(
                f"every domain of positive weight reached its cap by step {self._step}; raise max_epochs, use "
                "exhaustion: repeat, or give weight to a domain that is not exhausted"
            )

    def _keys(self, stream: int, domains_N: Ints, rounds_N: Ints, step: int = 0) -> Words:
        """A key per permutation: one for each stream, domain and round through it (and step, for probes)."""
        start = np.array([(self._key + stream) % 2**64, step], dtype=np.uint64)
        base = _mix(_mix(start[:1]) + start[1:])
        return _mix(_mix(base + domains_N.astype(np.uint64) * _GOLDEN) + rounds_N.astype(np.uint64) * _GOLDEN)

    # Stratified draws

    def _stratified(self, least: int) -> Draw:
        size = self.batch_size
        weights_D, sums_D = self._effective()
        self._check_left(sums_D)
        present_K = np.flatnonzero(weights_D > 0)
        if least * len(present_K) > size:
            raise ConfigError(
                f"min_per_domain {least} over {len(present_K)} domains of positive weight needs "
                f"{least * len(present_K)} sequences; the batch has {size}; "
                "enlarge the batch, lower min_per_domain or reserve probe batches"
            )
        left_K = (self.max_sequences_D - self._cursors_D)[present_K]
        shares_K = asked_K = size * weights_D[present_K] / math.fsum(weights_D[present_K])
        if self.exhaustion == "drop":
            shares_K = self._within_supply(asked_K, left_K)
        least_K = np.minimum(least, left_K) if self.exhaustion == "drop" else np.full(len(left_K), least)
        counts_K = _whole_counts(shares_K, least_K, size, float(self._uniforms(_STRATIFY, self._step, 1)[0]))
        if (counts_K > left_K).any():
            short = int(np.argmax(counts_K > left_K))
            raise SamplerExhausted(
                f"stratified step {self._step} needs {counts_K[short]} sequences of domain "
                f"{self.names[present_K[short]]!r}, whose cap leaves {left_K[short]}"
            )
        index_B = np.repeat(np.arange(len(present_K)), counts_K)
        # Spread the domains over the batch, so that every rank's shard holds a mixture.
        zeros_B = np.zeros(size, dtype=np.int64)
        keys_B = self._keys(_STRATIFY, zeros_B, zeros_B, self._step)
        index_B = index_B[keyed_permutation(np.arange(size), np.full(size, size), keys_B)]
        mixture_D = weights_D.copy()
        if shares_K is not asked_K:
            mixture_D[present_K] = shares_K / size
        return self._filled(present_K[index_B], (shares_K / counts_K)[index_B], mixture_D)

    def _within_supply(self, shares_K: Floats, left_K: Ints) -> Floats:
        """Cut each share down to what is left of its domain and hand the rest to the others in proportion."""
        cut_K = np.zeros(len(shares_K), dtype=bool)
        result_K = shares_K
        while True:
            over_K = ~cut_K & (result_K > left_K)
            if not over_K.any():
                return result_K
            cut_K |= over_K
            free = math.fsum(shares_K[~cut_K])
            rest = self.batch_size - int(left_K[cut_K].sum())
            if rest > 0 and free <= 0:
                raise SamplerExhausted(
                    f"the domains of positive weight have too little left under their caps for step {self._step}"
                )
            result_K = np.where(cut_K, left_K, shares_K * (rest / free if free > 0 else 0.0))

    # Probes

    def probe(self, step: int, distributions_GD: ArrayLike | None, sequences_per_group: int) -> ProbeDraw:
        """Draw sequences for measuring, apart from training: nothing advances and no cap is charged.

        Group g gets `sequences_per_group` sequences, each from a domain drawn from row g. Within one probe the
        sequences of a domain are drawn uniformly without replacement (until it is used up, then again). They are
        training sequences: measuring on them needs no reserved tokens, and leaks nothing into training as long as the
        probe's gradients stay out of the optimizer. The same arguments always give the same probe.

        Args:
            step: numbers the probe; a fresh one per step.
            distributions_GD: one distribution over the domains per group; None for one group per domain.
            sequences_per_group: at least 1.

        Raises:
            ConfigError: a row is not a distribution over the D domains.
        """
        if sequences_per_group < 1 or step < 0:
            raise ConfigError(
                f"a probe of {sequences_per_group} sequences per group at step {step}; give at least 1, and a step >= 0"
            )
        each = int(sequences_per_group)
        if distributions_GD is None:
            groups = len(self.sequences_D)
            domains_N = np.repeat(np.arange(groups), each)
        else:
            rows_GD = np.atleast_2d(np.asarray(distributions_GD, dtype=np.float64))
            groups = len(rows_GD)
            uniforms_GS = self._uniforms(_PROBE, 0, groups * each, step=step).reshape(groups, each)
            pairs = zip(rows_GD, uniforms_GS, strict=True)
            domains_N = np.concatenate([_inverse_cdf(np.cumsum(self._checked(row_D)), u_S) for row_D, u_S in pairs])
        sizes_N = self.sequences_D[domains_N]
        rounds_N, positions_N = np.divmod(_ranks(domains_N), sizes_N)
        sequences_N = keyed_permutation(positions_N, sizes_N, self._keys(_PROBE, domains_N, rounds_N, step + 1))
        return ProbeDraw(np.repeat(np.arange(groups), each), domains_N, sequences_N)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the draw depends on, as JSON values; exact to the last bit.

        It knows nothing of ranks. The caps are arguments, not state: a run that ended under `stop` may go on under
        higher ones.
        """
        return {
            "format": STATE_FORMAT,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sequences": self.sequences_D.tolist(),
            "step": self._step,
            "cursors": self._cursors_D.tolist(),
            "weights": self._weights_D.tolist(),
            "scheduled": [[step, self._scheduled[step].tolist()] for step in sorted(self._scheduled)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state made by `state_dict`.

        Raises:
            CheckpointError: it is of another draw (seed, batch size or domain sizes differ) or incomplete; the sampler
                stays as it was.
        """
        try:
            fixed = ("format", "seed", "batch_size", "sequences")
            here = self.state_dict()
            if changed := differences({key: state[key] for key in fixed}, {key: here[key] for key in fixed}):
                raise CheckpointError(f"sampler state is of another draw ({changed}); resume with the same recipe")
            step = int(state["step"])
            cursors_D = np.array(state["cursors"], dtype=np.int64)
            weights_D = self._checked(state["weights"])
            scheduled = {int(at): self._checked(weights) for at, weights in state["scheduled"]}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"sampler state cannot be read: {reason(error)}; use an earlier checkpoint"
            ) from error
        consistent = cursors_D.shape == self.sequences_D.shape and (cursors_D >= 0).all()
        if not consistent or int(cursors_D.sum()) != step * self.batch_size or any(at <= step for at in scheduled):
            raise CheckpointError(f"sampler state contradicts itself at step {step}; use an earlier checkpoint")
        self._step, self._cursors_D, self._weights_D, self._scheduled = step, cursors_D, weights_D, scheduled


def keyed_permutation(positions_N: Ints, sizes_N: Ints, keys_N: Words) -> Ints:
    """Where position x of 0 .. n-1 goes under the permutation of n things that `key` names, for each entry by itself.

    A Feistel network over Z_a x Z_b, a = ceil(sqrt n), b = ceil(n / a), ten rounds, twenty below n = 256:

        x = l b + r;    l <- l + F(r) mod a,    r <- r + F(l) mod b,    ...

    is a permutation of a b >= n things; walking its cycle until the value is below n makes it one of n things (on
    average less than 1 + 1/sqrt(n) walks). Nothing is stored.

    Args:
        positions_N: 0 <= x < n.
        sizes_N: n, at least 1, below 2**62.
        keys_N: the permutation's name; unrelated keys give unrelated permutations.
    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    small_N = sizes_N < _SMALL
    if not small_N.any():
        return _permute(positions_N, sizes_N, keys_N, _ROUNDS)
    if small_N.all():
        return _permute(positions_N, sizes_N, keys_N, _SMALL_ROUNDS)
    result_N = np.empty_like(positions_N)
    for part_N, rounds in ((small_N, _SMALL_ROUNDS), (~small_N, _ROUNDS)):
        result_N[part_N] = _permute(positions_N[part_N], sizes_N[part_N], keys_N[part_N], rounds)
    return result_N


def _permute(positions_N: Ints, sizes_N: Ints, keys_N: Words, rounds: int) -> Ints:
    a_N = np.ceil(np.sqrt(sizes_N)).astype(np.uint64)
    n_N = sizes_N.astype(np.uint64)
    b_N = (n_N + a_N - np.uint64(1)) // a_N
    result_N = _feistel(positions_N.astype(np.uint64), a_N, b_N, keys_N, rounds)
    outside = np.flatnonzero(result_N >= n_N)
    while len(outside):
        result_N[outside] = _feistel(result_N[outside], a_N[outside], b_N[outside], keys_N[outside], rounds)
        outside = outside[result_N[outside] >= n_N[outside]]
    return result_N.astype(np.int64)


def _feistel(x_N: Words, a_N: Words, b_N: Words, keys_N: Words, rounds: int) -> Words:
    left_N, right_N = np.divmod(x_N, b_N)
    keys_N = keys_N.copy()
    half = np.uint64(32)
    for index in range(rounds):
        keys_N += _GOLDEN
        if index % 2 == 0:
            left_N += ((_mix(right_N + keys_N) >> half) * a_N) >> half
            np.subtract(left_N, a_N, out=left_N, where=left_N >= a_N)
        else:
            right_N += ((_mix(left_N + keys_N) >> half) * b_N) >> half
            np.subtract(right_N, b_N, out=right_N, where=right_N >= b_N)
    left_N *= b_N
    left_N += right_N
    return left_N


def _mix(words_N: Words) -> Words:
    """SplitMix64's output function, a bijection of 64-bit words (Steele, Lea and Flood 2014)."""
    words_N = words_N ^ (words_N >> np.uint64(30))
    words_N *= _MIX_1
    words_N ^= words_N >> np.uint64(27)
    words_N *= _MIX_2
    words_N ^= words_N >> np.uint64(31)
    return words_N


def _inverse_cdf(sums_D: Floats, uniforms_N: Floats) -> Ints:
    """The domain in whose part of [0, total) u * total falls; never one of weight 0."""
    domains_N = np.searchsorted(sums_D, uniforms_N * sums_D[-1], side="right")
    last = int(np.searchsorted(sums_D, sums_D[-1], side="left"))
    found_N: Ints = np.minimum(domains_N, last).astype(np.int64)
    return found_N


def _ranks(domains_N: Ints) -> Ints:
    """How many earlier entries equal each entry."""
    order_N = np.argsort(domains_N, kind="stable")
    sorted_N = domains_N[order_N]
    index_N = np.arange(len(domains_N))
    opens_N = np.ones(len(domains_N), dtype=bool)
    opens_N[1:] = sorted_N[1:] != sorted_N[:-1]
    ranks_N = np.empty_like(index_N)
    ranks_N[order_N] = index_N - np.maximum.accumulate(np.where(opens_N, index_N, 0))
    return ranks_N


def _whole_counts(shares_K: Floats, least_K: Ints, total: int, uniform: float) -> Ints:
    """Whole numbers that sum to `total`, each at least `least`, otherwise in proportion to the shares.

    Entries whose proportional part would fall below their least are held there; the rest is divided in proportion and
    rounded by systematic sampling, which gives each entry the floor or the ceiling of its part and the part on average.
    """
    held_K = np.zeros(len(shares_K), dtype=bool)
    while True:
        parts_K = np.where(held_K, least_K, 0.0)
        free = math.fsum(shares_K[~held_K])
        rest = total - int(least_K[held_K].sum())
        parts_K[~held_K] = shares_K[~held_K] * (rest / free) if free > 0 else 0.0
        below_K = ~held_K & (parts_K < least_K)
        if not below_K.any():
            break
        held_K |= below_K
    # Only the fractions are rounded: the floors, and with them the leasts, are safe from it.
    counts_K = np.where(held_K, least_K, np.floor(parts_K + 1e-9).astype(np.int64))
    fractions_K = np.where(held_K, 0.0, np.maximum(parts_K - counts_K, 0.0))
    missing = total - int(counts_K.sum())
    if missing > 0:
        edges_K = np.cumsum(fractions_K)
        edges_K = np.floor(edges_K * (missing / edges_K[-1]) + uniform).astype(np.int64)
        edges_K[-1] = missing
        counts_K += np.diff(np.minimum(edges_K, missing), prepend=0)
    return counts_K
