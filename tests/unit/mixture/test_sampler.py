"""The draw: permutations, random numbers by counter, repetition caps, stratified batches, probes, state."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from weftlm.errors import CheckpointError, ConfigError
from weftlm.mixture.sampler import Draw, MixtureSampler, SamplerExhausted, keyed_permutation

GOLDEN_DOMAINS = [[2, 2, 0, 2, 1, 1, 1, 2], [2, 1, 2, 1, 1, 2, 1, 2]]
GOLDEN_SEQUENCES = [
    [285070504471, 904558516370, 0, 355329690406, 11, 84, 7, 507095465246],
    [220375703259, 14, 445965794243, 31, 23, 566165972700, 9, 376893770951],
]


def keys(count: int, start: int = 0) -> NDArray[np.uint64]:
    return np.random.default_rng(start).integers(0, 2**64, size=count, dtype=np.uint64)


def permutation(n: int, key: int) -> NDArray[np.int64]:
    return keyed_permutation(np.arange(n), np.full(n, n), np.full(n, key, dtype=np.uint64))


def chi_square(counts: NDArray[np.int64]) -> float:
    """Standardised: about normal with mean 0 and deviation 1 when all cells are equally likely."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2).sum() / expected)
    return (statistic - (counts.size - 1)) / math.sqrt(2 * (counts.size - 1))


# -- the permutation ----------------------------------------------------------------------------------------------


def test_every_size_up_to_300_is_permuted() -> None:
    sizes = np.arange(1, 301)
    positions_N = np.concatenate([np.arange(n) for n in sizes])
    sizes_N = np.repeat(sizes, sizes)
    for key in keys(5):
        result_N = keyed_permutation(positions_N, sizes_N, np.full(len(sizes_N), key))
        for n, part in zip(sizes, np.split(result_N, np.cumsum(sizes)[:-1]), strict=True):
            assert (np.sort(part) == np.arange(n)).all(), n


def test_sizes_near_the_limit_stay_in_range_and_distinct() -> None:
    n = 2**61 + 12345
    positions_N = np.concatenate([np.arange(2000), n - 1 - np.arange(2000)])
    result_N = keyed_permutation(positions_N, np.full(4000, n), np.full(4000, 9, dtype=np.uint64))
    assert (result_N >= 0).all()
    assert (result_N < n).all()
    assert len(np.unique(result_N)) == 4000
    assert abs(result_N.astype(np.float64).mean() / n - 0.5) < 5 * math.sqrt(1 / 12 / 4000)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_every_order_of_a_few_things_is_equally_likely(n: int) -> None:
    trials = 40_000
    orders = keyed_permutation(np.tile(np.arange(n), trials), np.full(n * trials, n), np.repeat(keys(trials, n), n))
    codes = (orders.reshape(trials, n) * n ** np.arange(n)).sum(axis=1)
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == math.factorial(n)
    assert abs(chi_square(counts)) < 4


@pytest.mark.parametrize("n", [7, 16, 50, 256])
def test_every_thing_is_equally_likely_at_every_position(n: int) -> None:
    trials = max(2_000, 200_000 // n)
    orders = keyed_permutation(np.tile(np.arange(n), trials), np.full(n * trials, n), np.repeat(keys(trials, n), n))
    where = np.tile(np.arange(n), trials) * n + orders
    assert abs(chi_square(np.bincount(where, minlength=n * n))) < 4


# -- the draw -----------------------------------------------------------------------------------------------------


def draws(sampler: MixtureSampler, steps: int) -> list[Draw]:
    return [sampler.draw() for _ in range(steps)]


def test_the_draw_never_changes_between_versions_and_knows_slots_not_batches() -> None:
    # A checkpoint continues as it began only if these numbers stay; changing them needs a new state format.
    first, second = draws(MixtureSampler([5, 100, 10**12], 8, 7, weights_D=[0.25, 0.25, 0.5]), 2)
    assert [first.domains_B.tolist(), second.domains_B.tolist()] == GOLDEN_DOMAINS
    assert [first.sequences_B.tolist(), second.sequences_B.tolist()] == GOLDEN_SEQUENCES
    small, large = MixtureSampler([9, 9, 9], 6, 1), MixtureSampler([9, 9, 9], 24, 1)
    slots = np.concatenate([draw.domains_B for draw in draws(small, 8)])
    assert slots.tolist() == np.concatenate([draw.domains_B for draw in draws(large, 2)]).tolist()


def test_seeds_domains_and_epochs_differ() -> None:
    def order(seed: int, domain: int, epoch: int) -> list[int]:
        draw = draws(MixtureSampler([50, 50], 50, seed, weights_D=np.eye(2)[domain]), epoch + 1)[epoch]
        assert (draw.domains_B == domain).all()
        assert (draw.epochs_B == epoch).all()
        assert sorted(draw.sequences_B.tolist()) == list(range(50))
        return draw.sequences_B.tolist()

    orders = [order(seed, domain, epoch) for seed in (0, 1) for domain in (0, 1) for epoch in (0, 1)]
    assert len({tuple(one) for one in orders}) == 8


@pytest.mark.parametrize(
    ("step", "weights", "message"),
    [
        (0, [0.5, 0.5], r"cannot change at step 0: .*earliest step that can change is 1"),
        (1, [0.5, 0.4], r"sum to 0\.9 over 2 domains; must be 1"),
        (1, [1.5, -0.5], "'b' is -0.5"),
        (1, [math.nan, 1.0], "'a' is nan"),
        (1, [1.0], r"shape \(1,\); 2 domains need \(2,\)"),
    ],
)
def test_the_past_cannot_change_and_weights_must_be_a_distribution(
    step: int, weights: list[float], message: str
) -> None:
    sampler = MixtureSampler([10, 10], 8, 0, names=["a", "b"])
    sampler.draw()
    with pytest.raises(ConfigError, match=message):
        sampler.set_weights(step, weights)


def test_callers_arrays_stay_theirs() -> None:
    mine = np.array([0.5, 0.5])
    sampler = MixtureSampler([10, 10], 8, 0, weights_D=mine)
    for theirs in (mine, sampler.weights_D, sampler.effective_weights_D, sampler.draw().weights_D):
        theirs[:] = [1.0, 0.0]
    assert sampler.weights_D.tolist() == sampler.effective_weights_D.tolist() == [0.5, 0.5]


# -- caps ---------------------------------------------------------------------------------------------------------


def mix64(word: int) -> int:
    """SplitMix64's output function in plain integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
    return word ^ (word >> 31)


def slot_by_slot(sizes: list[int], caps: list[int], batch: int, seed: int, weights: list[float]) -> Iterator[list[int]]:
    """The definition of `drop`, one slot after the other: draw, and draw again while the domain drawn is exhausted."""
    key = np.array([seed, mix64((seed + 0x9E3779B97F4A7C15) % 2**64)], dtype=np.uint64)

    def uniform(slot: int, attempt: int) -> float:
        counter = np.array([slot // 4, 0, attempt, 1], dtype=np.uint64)
        return float(int(np.random.Philox(key=key, counter=counter).random_raw(4)[slot % 4]) >> 11) * 2.0**-53

    drawn = [0] * len(sizes)
    for step in range(10**9):
        among = [w if n < cap else 0.0 for w, n, cap in zip(weights, drawn, caps, strict=True)]
        at_start = np.cumsum(among)
        domains = []
        for slot in range(step * batch, (step + 1) * batch):
            attempt = 0
            while True:
                if not sum(among) > 0:
                    return
                sums = np.cumsum(among) if attempt else at_start
                domain = int(np.searchsorted(sums, uniform(slot, attempt) * sums[-1], side="right"))
                if drawn[domain] < caps[domain]:
                    break
                among[domain] = 0.0
                attempt += 1
            drawn[domain] += 1
            domains.append(domain)
        yield domains


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch", [1, 3, 41])
def test_drop_equals_filling_slots_one_by_one(batch: int, seed: int) -> None:
    sizes, caps, weights = [3, 17, 8, 40, 5], [6, 25, 8, 60, 7], [0.3, 0.25, 0.2, 0.15, 0.1]
    epochs = [cap / size for cap, size in zip(caps, sizes, strict=True)]
    sampler = MixtureSampler(sizes, batch, seed, exhaustion="drop", max_epochs=epochs, weights_D=weights)
    for domains in slot_by_slot(sizes, caps, batch, seed, weights):
        assert sampler.draw().domains_B.tolist() == domains
    with pytest.raises(SamplerExhausted, match="every domain of positive weight reached its cap"):
        sampler.draw()
    assert sampler.drawn_D().sum() == sum(caps) // batch * batch


def test_effective_weights_lose_what_is_exhausted() -> None:
    sampler = MixtureSampler([4, 100, 100], 4, 0, exhaustion="drop", weights_D=[1.0, 0.0, 0.0])
    sampler.draw()
    assert sampler.effective_weights_D.tolist() == [0, 0, 0]
    with pytest.raises(SamplerExhausted, match="give weight to a domain that is not exhausted"):
        sampler.draw()
    sampler.set_weights(1, [0.5, 0.4, 0.1])
    assert sampler.weights_D.tolist() == [0.5, 0.4, 0.1]
    draw = sampler.draw()
    assert draw.weights_D == pytest.approx([0, 0.8, 0.2])
    assert (draw.domains_B > 0).all()


def test_stop_ends_at_the_first_batch_that_cannot_be_filled_and_may_go_on_under_a_higher_cap() -> None:
    sampler = MixtureSampler([10, 1000], 4, 2, exhaustion="stop", names=["small", "large"])
    small = np.cumsum([(draw.domains_B == 0).sum() for draw in draws(MixtureSampler([10, 1000], 4, 2), 20)])
    delivered = int((small <= 10).sum())
    draws(sampler, delivered)
    before = sampler.state_dict()
    with pytest.raises(SamplerExhausted, match=r"'small' reached its cap of 10 sequences \(1 epochs\)"):
        sampler.draw()
    assert sampler.state_dict() == before
    assert 0 < delivered < 20
    higher = MixtureSampler([10, 1000], 4, 2, exhaustion="stop", max_epochs=2)
    higher.load_state_dict(before)
    assert higher.draw().step == delivered


def test_fractions_of_an_epoch_round_down_but_not_below_what_was_meant() -> None:
    assert MixtureSampler([30], 1, 0, exhaustion="drop", max_epochs=0.1).max_sequences_D.tolist() == [3]
    assert MixtureSampler([10], 1, 0, exhaustion="drop", max_epochs=2.57).max_sequences_D.tolist() == [25]
    sampler = MixtureSampler([10, 3], 16, 0, exhaustion="drop", max_epochs=[math.inf, 1])
    draws(sampler, 20)
    assert sampler.drawn_D().tolist() == [317, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_epochs": 2.0}, "max_epochs is 2.0 but exhaustion is 'repeat'"),
        ({"exhaustion": "drop", "max_epochs": 0}, "every cap must be above 0"),
        ({"exhaustion": "drop", "max_epochs": math.nan}, "every cap must be above 0"),
        ({"exhaustion": "stop", "max_epochs": 0.01}, "of domain 'a' .* is less than one sequence"),
        ({"exhaustion": "stop", "max_epochs": [1.0]}, r"shape \(1,\) for 2 domains"),
        ({"exhaustion": "wrap"}, "allowed: 'repeat', 'drop', 'stop'"),
        ({"sequences_D": [3, 0]}, "domain 'b' has no sequence"),
        ({"sequences_D": [], "names": None}, "at least one"),
        ({"batch_size": 0}, "at least 1"),
        ({"seed": -1}, r"0 \.\. 2\*\*63"),
        ({"names": ["a"]}, "1 names for 2 domains"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], message: str) -> None:
    given = {"sequences_D": [10, 10], "batch_size": 4, "seed": 0, "names": ["a", "b"], **arguments}
    with pytest.raises(ConfigError, match=message):
        MixtureSampler(**given)  # type: ignore[arg-type]


# -- stratified draws and probes ----------------------------------------------------------------------------------


def test_stratified_draws_keep_proportions_above_the_minimum_and_spread_over_the_ranks() -> None:
    sampler = MixtureSampler([1000] * 5, 64, 0, weights_D=[0.7, 0.2, 0.09, 0.01, 0.0])
    for _ in range(20):
        counts_D = np.bincount(sampler.draw(min_per_domain=4).domains_B, minlength=5)
        assert np.abs(counts_D[:3] - 60 * np.array([70, 20, 9]) / 99).max() <= 1, "up to whole numbers"
    draw = MixtureSampler([1000] * 2, 64, 0).draw(min_per_domain=1)
    assert all(2 <= (draw.shard(rank, 4).domains_B == 0).sum() <= 14 for rank in range(4))


def test_stratified_draws_must_fit_into_the_batch_and_respect_caps() -> None:
    sampler = MixtureSampler([10] * 5, 8, 0)
    with pytest.raises(ConfigError, match="2 over 5 domains of positive weight needs 10 sequences; the batch has 8"):
        sampler.draw(min_per_domain=2)
    assert sampler.step == 0
    sampler = MixtureSampler([2, 1000, 1000], 16, 0, exhaustion="drop", weights_D=[0.5, 0.25, 0.25])
    draw = sampler.draw(min_per_domain=4)
    assert np.bincount(draw.domains_B, minlength=3).tolist() == [2, 7, 7]
    # What the first domain could not supply goes to the others; nothing is blown up to make good for it.
    assert draw.weights_D == pytest.approx([2 / 16, 7 / 16, 7 / 16])
    assert draw.loss_weights_B == pytest.approx(np.ones(16))
    stop = MixtureSampler([3, 1000], 8, 0, exhaustion="stop", names=["small", "large"])
    with pytest.raises(SamplerExhausted, match="needs 4 sequences of domain 'small', whose cap leaves 3"):
        stop.draw(min_per_domain=1)
    with pytest.raises(SamplerExhausted, match="too little left"):
        MixtureSampler([3, 4], 8, 0, exhaustion="drop").draw(min_per_domain=1)


def test_probes_draw_without_replacement_uniformly_from_distributions_and_repeat_themselves() -> None:
    sampler, counts = MixtureSampler([12, 40], 8, 3), np.zeros(12, dtype=np.int64)
    for step in range(3000):
        probe = sampler.probe(step, None, 5)
        assert probe.groups_N.tolist() == probe.domains_N.tolist() == [0] * 5 + [1] * 5
        assert len(set(probe.sequences_N[:5].tolist())) == 5
        counts += np.bincount(probe.sequences_N[:5], minlength=12)
    # Without replacement the spread is smaller than a chi-square's; only the upper side is a finding.
    assert chi_square(counts) < 4
    rows_GD = np.array([[0.5, 0.5, 0.0], [0.0, 0.1, 0.9]])
    sampler = MixtureSampler([100_000] * 3, 8, 3)
    probe, again = sampler.probe(0, rows_GD, 4000), sampler.probe(0, rows_GD, 4000)
    assert probe.sequences_N.tolist() == again.sequences_N.tolist()
    for group, row_D in enumerate(rows_GD):
        counts_D = np.bincount(probe.domains_N[probe.groups_N == group], minlength=3)
        assert np.abs(counts_D - 4000 * row_D).max() <= 4 * math.sqrt(4000 * 0.25)
        assert (counts_D[row_D == 0] == 0).all()
    assert len(set(zip(probe.domains_N.tolist(), probe.sequences_N.tolist(), strict=True))) == 8000
    with pytest.raises(ConfigError, match=r"sum to 0\.5"):
        sampler.probe(0, [[0.5, 0.0, 0.0]], 2)


# -- state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 4, "seed: 4 before, 3 now"),
        ("batch_size", 4, "batch_size: 4 before, 8 now"),
        ("sequences", [10, 21], r"sequences\.1: 21 before, 20 now"),
        ("format", 99, "format: 99 before"),
        ("cursors", [1, 2], "contradicts itself"),
        ("cursors", [17, -1], "contradicts itself"),
        ("cursors", [16], "contradicts itself"),
        ("cursors", "much", "cannot be read"),
        ("weights", [0.5, 0.6], "weights sum to|cannot be read"),
        ("scheduled", [[1, [0.5, 0.5]]], "contradicts itself"),
        ("scheduled", 3, "cannot be read"),
        ("step", None, "cannot be read"),
    ],
)
def test_the_state_of_another_draw_or_a_damaged_one_is_refused(key: str, value: object, message: str) -> None:
    sampler = MixtureSampler([10, 20], 8, 3)
    draws(sampler, 2)
    state = sampler.state_dict()
    with pytest.raises(CheckpointError, match=message):
        sampler.load_state_dict({**state, key: value})
    with pytest.raises(CheckpointError, match="cannot be read"):
        sampler.load_state_dict({name: each for name, each in state.items() if name != key})
    assert sampler.state_dict() == state
