"""Laws of the draw, over random mixtures, histories and numbers of processes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from weftlm.errors import ConfigError
from weftlm.mixture.sampler import Draw, Exhaustion, MixtureSampler, SamplerExhausted

LAWS = settings(max_examples=60, deadline=None, derandomize=True)

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)
batch_sizes = st.integers(1, 24)
seeds = st.integers(0, 2**63 - 1)


def simplex(parts: list[int]) -> NDArray[np.float64]:
    """Weights from whole numbers, the first of them never 0."""
    numbers = np.array(parts, dtype=np.float64)
    numbers[0] += 1
    return numbers / numbers.sum()


def weights(domains: int) -> st.SearchStrategy[NDArray[np.float64]]:
    return st.lists(st.integers(0, 9), min_size=domains, max_size=domains).map(simplex)


@st.composite
def samplers(draw: st.DrawFn, among: tuple[Exhaustion, ...] = ("repeat", "drop", "stop")) -> MixtureSampler:
    sizes_D = draw(sizes)
    kind = draw(st.sampled_from(among))
    cap = None if kind == "repeat" else draw(st.floats(1, 4))
    alpha_D = draw(weights(len(sizes_D)))
    return MixtureSampler(sizes_D, draw(batch_sizes), draw(seeds), exhaustion=kind, max_epochs=cap, weights_D=alpha_D)


def step(sampler: MixtureSampler, least: int = 0) -> Draw | None:
    """One draw, or None where the caps or the batch size forbid it."""
    try:
        return sampler.draw(least)
    except (SamplerExhausted, ConfigError):
        return None


def as_lists(draw: Draw | None) -> object:
    if draw is None:
        return None
    arrays = (draw.domains_B, draw.sequences_B, draw.epochs_B, draw.loss_weights_B, draw.weights_D)
    return draw.step, *(array.tolist() for array in arrays)


@given(data=st.data(), sampler=samplers())
@LAWS
def test_a_run_resumed_at_any_point_equals_one_never_interrupted(data: st.DataObject, sampler: MixtureSampler) -> None:
    domains = len(sampler.sequences_D)
    interrupted = sampler.copy()
    for _ in range(data.draw(st.integers(1, 25), label="events")):
        event = data.draw(st.sampled_from(["draw", "draw", "stratified", "weights", "resume"]))
        if event == "weights":
            at = sampler.step + data.draw(st.integers(0, 3), label="steps ahead")
            alpha_D = data.draw(weights(domains), label="alpha")
            sampler.set_weights(at, alpha_D)
            interrupted.set_weights(at, alpha_D)
        elif event == "resume":
            state = json.loads(json.dumps(interrupted.state_dict()))
            caps_D = (sampler.max_sequences_D + 0.5) / sampler.sequences_D
            interrupted = MixtureSampler(
                sampler.sequences_D, sampler.batch_size, sampler.seed, exhaustion=sampler.exhaustion,
                max_epochs=None if sampler.exhaustion == "repeat" else caps_D,
            )  # fmt: skip
            interrupted.load_state_dict(state)
        else:
            least = int(event == "stratified")
            assert as_lists(step(interrupted, least)) == as_lists(step(sampler, least))
        assert interrupted.state_dict() == sampler.state_dict()


@given(sampler=samplers(), least=st.integers(0, 1))
@LAWS
def test_shards_of_any_number_of_ranks_make_up_the_batch(sampler: MixtureSampler, least: int) -> None:
    draw = step(sampler, least)
    if draw is None:
        return
    for world in range(1, len(draw) + 1):
        if len(draw) % world:
            with pytest.raises(ConfigError):
                draw.shard(0, world)
            continue
        shards = [draw.shard(rank, world) for rank in range(world)]
        for name in ("domains_B", "sequences_B", "epochs_B", "loss_weights_B"):
            whole = np.concatenate([getattr(shard, name) for shard in shards])
            assert whole.tolist() == getattr(draw, name).tolist()


@given(sampler=samplers(("repeat",)), steps=st.integers(1, 30), stratified=st.booleans())
@LAWS
def test_every_epoch_visits_every_sequence_once(sampler: MixtureSampler, steps: int, stratified: bool) -> None:
    seen: dict[tuple[int, int], list[int]] = {}
    for index in range(steps):
        draw = step(sampler, int(stratified and index % 3 == 0))
        if draw is None:
            draw = sampler.draw()
        for domain, epoch, sequence in zip(draw.domains_B, draw.epochs_B, draw.sequences_B, strict=True):
            seen.setdefault((int(domain), int(epoch)), []).append(int(sequence))
    for (domain, epoch), sequences in seen.items():
        size = int(sampler.sequences_D[domain])
        assert len(set(sequences)) == len(sequences)
        assert set(sequences) <= set(range(size))
        if (domain, epoch + 1) in seen:
            assert len(sequences) == size
    drawn_D = np.zeros(len(sampler.sequences_D), dtype=np.int64)
    for (domain, _), sequences in seen.items():
        drawn_D[domain] += len(sequences)
    assert drawn_D.tolist() == sampler.drawn_D().tolist()
    assert sampler.epochs_D() == pytest.approx(drawn_D / sampler.sequences_D)


@given(data=st.data(), sampler=samplers())
@LAWS
def test_a_change_leaves_the_past_alone_and_takes_full_effect(data: st.DataObject, sampler: MixtureSampler) -> None:
    before, at = data.draw(st.integers(0, 6), label="drawn before"), data.draw(st.integers(0, 6), label="steps ahead")
    domain = data.draw(st.integers(0, len(sampler.sequences_D) - 1), label="all to")
    for _ in range(before):
        if step(sampler) is None:
            return
    changed = sampler.copy()
    at += sampler.step
    changed.set_weights(at, np.eye(len(sampler.sequences_D))[domain])
    for _ in range(10):
        reached = changed.step >= at
        draw = step(changed)
        if not reached:
            assert as_lists(draw) == as_lists(step(sampler))
        elif draw is not None:
            assert set(draw.domains_B.tolist()) == {domain}


@given(sampler=samplers(("drop", "stop")), stratified=st.booleans())
@LAWS
def test_caps_are_never_exceeded_and_drop_uses_them_up(sampler: MixtureSampler, stratified: bool) -> None:
    for index in range(400):
        before = sampler.state_dict()
        draw = step(sampler, int(stratified and index % 2 == 0))
        if draw is None:
            assert sampler.state_dict() == before
            draw = step(sampler)
        assert (sampler.drawn_D() <= sampler.max_sequences_D).all()
        if draw is None:
            break
    else:
        pytest.fail("the caps never ended the draw")
    if sampler.exhaustion == "drop":
        left = (sampler.max_sequences_D - sampler.drawn_D())[sampler.weights_D > 0].sum()
        assert left < sampler.batch_size


@given(data=st.data(), sampler=samplers(("repeat",)))
@LAWS
def test_loss_weights_of_a_stratified_draw_restore_the_mixture(data: st.DataObject, sampler: MixtureSampler) -> None:
    present = np.flatnonzero(sampler.weights_D)
    least = data.draw(st.integers(1, max(1, sampler.batch_size // len(present))), label="least")
    draw = step(sampler, least)
    if draw is None:
        assert least * len(present) > sampler.batch_size
        return
    counts_D = np.bincount(draw.domains_B, minlength=len(sampler.sequences_D))
    assert (counts_D[present] >= least).all()
    assert counts_D.sum() == counts_D[present].sum() == sampler.batch_size
    mass_D = np.bincount(draw.domains_B, draw.loss_weights_B, minlength=len(counts_D)) / sampler.batch_size
    assert mass_D == pytest.approx(sampler.weights_D, abs=1e-12)


@given(parts=st.lists(st.integers(0, 9), min_size=2, max_size=6).map(simplex), seed=seeds)
@LAWS
def test_domains_come_as_often_as_the_weights_say(parts: NDArray[np.float64], seed: int) -> None:
    sampler = MixtureSampler([1000] * len(parts), 500, seed, weights_D=parts)
    counts_D = sum(np.bincount(sampler.draw().domains_B, minlength=len(parts)) for _ in range(20))
    # 60 examples x 6 domains: five standard deviations, and exact zeros.
    assert (np.abs(counts_D - 10_000 * parts) <= 5 * np.sqrt(10_000 * parts * (1 - parts)) + 1e-9).all()


@given(sampler=samplers(), groups=st.integers(1, 4), each=st.integers(1, 12), at=st.integers(0, 1000))
@LAWS
def test_probes_are_even_within_a_domain_and_cost_nothing(
    sampler: MixtureSampler, groups: int, each: int, at: int
) -> None:
    before = sampler.state_dict()
    probe = sampler.probe(at, np.tile(sampler.weights_D, (groups, 1)), each)
    assert sampler.state_dict() == before
    assert probe.groups_N.tolist() == np.repeat(np.arange(groups), each).tolist()
    for domain, size in enumerate(sampler.sequences_D):
        sequences = probe.sequences_N[probe.domains_N == domain]
        counts = np.bincount(sequences, minlength=size)
        assert len(counts) == size
        assert counts.max(initial=0) - counts.min(initial=10**9) <= 1
        assert sampler.weights_D[domain] > 0 or not len(sequences)
