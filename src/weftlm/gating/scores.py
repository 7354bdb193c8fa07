"""The score cache: every expert's log-probability of every token of every sequence, worked out once.

The sequences are real text of each domain, and samples drawn from each expert (temperature 1, the whole softmax). Once
they are scored, fitting a gate takes minutes on a CPU whatever the experts' size: scoring is what scales out. Work is
cut into shards that do not depend on who does them, so that one process, several (torchrun: every rank works on its own
shards, rank 0 puts them together) and several machines (`score_with`) write the same bytes, given equal hardware.

    index.json                   what is in it, with the size and BLAKE2b of every file, and a checksum over itself
    domain-000.logp.npy          N x T x E, float32, nats; 0 beyond a sequence's end
    domain-000.tokens.npy        N x (T + 1), int32: the context token, then T scored ones; 0 beyond the end
    domain-000.lengths.npy       N, int32: scored tokens
    domain-000.clusters.npy      N, int64: which sequences belong together (windows of one document)
    sample-000.*.npy             the same for the samples of each expert

While the cache is made there are also `plan.json`, which says of what, and `shards/`, each written whole or not at all
and checked by its digest when work goes on after an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from weftlm import interrupt
from weftlm.artifact import locked
from weftlm.config import differences, settings
from weftlm.corpora.source import Source
from weftlm.errors import CheckpointError, ConfigError, DataError, NumericsError
from weftlm.evaluation.perplexity import windows_of
from weftlm.experts.low_rank import Rows
from weftlm.fan_out import Task, fan_out, keep, new_key
from weftlm.files import check_listed, checksum, describe, read_object, remove, room, sync_file, write_object
from weftlm.gating.config import ExpertSource, ScoreConfig
from weftlm.gating.experts import ExpertPool
from weftlm.gating.features import sequence_features
from weftlm.gating.files import read_tensors, write_tensors
from weftlm.gating.sequences import ScoredSequences
from weftlm.gating.slots import SlotStore
from weftlm.progress import progress
from weftlm.threads import follow_load

FORMAT = "weftlm score cache 2"
INDEX, PLAN, SHARDS = "index.json", "plan.json", "shards"
PARTS = ("logp", "tokens", "lengths", "clusters")

_BLOCK = 1 << 20
_REMEDY = "score again (weftlm score --overwrite; overwrite=True), or choose another folder"
_log = logging.getLogger(__name__)

Role = Literal["domain", "sample"]


@dataclass(frozen=True, eq=False)
class ScoredText:
    """The sequences of a domain, or the samples of an expert, and their scores; arrays are mapped from disk.

    Attributes:
        name: of the domain or the expert.
        role: "domain" or "sample".
        logp_NTE: every expert's log-probability of every token, nats, float32; 0 beyond a sequence's end.
        tokens_NT1: int32, the context token and the T tokens scored.
        lengths_N: scored tokens of each, int32.
        clusters_N: which sequences belong together, int64.
    """

    name: str
    role: Role
    logp_NTE: NDArray[np.float32]
    tokens_NT1: NDArray[np.int32]
    lengths_N: NDArray[np.int32]
    clusters_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths_N)

    @property
    def mask_NT(self) -> NDArray[np.bool_]:
        """True for scored tokens."""
        mask: NDArray[np.bool_] = np.arange(self.logp_NTE.shape[1]) < self.lengths_N[:, None]
        return mask

    @property
    def logq_NE(self) -> NDArray[np.float64]:
        """Log-likelihood of each sequence under each expert, nats, summed in float64."""
        sums = np.empty((len(self), self.logp_NTE.shape[2]))
        step = max(1, _BLOCK // max(1, self.logp_NTE[:1].size))
        for first in range(0, len(self), step):
            sums[first : first + step] = self.logp_NTE[first : first + step].sum(axis=1, dtype=np.float64)
        return sums

    def sequences(self, *, tokens: bool = False) -> ScoredSequences:
        """As gates are fitted and certified on.

        Args:
            tokens: carry the scores of single tokens along, which causal gates need.
        Raises:
            DataError: a sequence is impossible under every expert.
        """
        logq_NE = self.logq_NE
        features = sequence_features(
            logq_NE,
            self.lengths_N,
            logp_NTE=self.logp_NTE if tokens else None,
            mask_NT=self.mask_NT if tokens else None,
        )
        return ScoredSequences.of(
            logq_NE, features=features, tokens_N=self.lengths_N, clusters_N=self.clusters_N, name=self.name
        )


@dataclass(frozen=True, eq=False)
class ScoreSplit:
    """Sequences to fit a gate on and disjoint ones to certify it with; samples in the experts' order.

    Attributes:
        domains: to fit on, by name.
        samples: to fit on.
        held_domains: held out.
        held_samples: held out.
        domain_rows: places in the cache of the domains' sequences, (to fit on, held out), by name.
        sample_rows: likewise of the samples, in the experts' order.
    """

    domains: dict[str, ScoredSequences]
    samples: tuple[ScoredSequences, ...]
    held_domains: dict[str, ScoredSequences]
    held_samples: tuple[ScoredSequences, ...]
    domain_rows: dict[str, tuple[Tensor, Tensor]]
    sample_rows: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, eq=False)
class ScoreCache:
    """A finished cache. Open one with `ScoreCache.open`, make one with `score`.

    Attributes:
        folder: where it lies.
        experts: names, in the order of the scores' last axis.
        domains: real text by domain.
        samples: samples by the expert they were drawn from.
        config: what was asked for.
        fingerprint: of experts, tokens and settings.
        expert_fingerprints: of each expert, as `ExpertPool.fingerprints` has them.
    """

    folder: Path
    experts: tuple[str, ...]
    domains: dict[str, ScoredText]
    samples: dict[str, ScoredText]
    config: ScoreConfig
    fingerprint: str
    expert_fingerprints: dict[str, str]

    @classmethod
    def open(cls, folder: str | Path) -> ScoreCache:
        """Open a finished cache; every file is read and compared with its digest, about a second per gigabyte.

        Args:
            folder: where it lies.
        Raises:
            DataError: there is none, it is not finished, or a file is missing or altered.
        """
        folder = Path(folder)
        index = _read_index(folder)
        _check_files(folder, index)
        sets: dict[Role, dict[str, ScoredText]] = {"domain": {}, "sample": {}}
        for entry in index["sets"]:
            stem = entry["stem"]
            parts = [np.load(folder / f"{stem}.{part}.npy", mmap_mode="c", allow_pickle=False) for part in PARTS]
            sets[entry["role"]][entry["name"]] = ScoredText(entry["name"], entry["role"], *parts)
        return cls(
            folder,
            tuple(index["plan"]["experts"]),
            sets["domain"],
            sets["sample"],
            ScoreConfig(**index["config"]),
            index["fingerprint"],
            dict(index["plan"]["experts"]),
        )

    def sequences(self, *, tokens: bool = False) -> tuple[dict[str, ScoredSequences], tuple[ScoredSequences, ...]]:
        """Domains and samples as `fit_robust_gate` and `certify` take them.

        Args:
            tokens: carry the scores of single tokens along, which causal gates need.
        """
        domains = {name: text.sequences(tokens=tokens) for name, text in self.domains.items()}
        return domains, tuple(self.samples[name].sequences(tokens=tokens) for name in self.experts if self.samples)

    def split(self, fraction: float = 0.25, *, seed: int = 0, tokens: bool = False) -> ScoreSplit:
        """Two disjoint parts; the same ones for the same cache, fraction and seed.

        Args:
            fraction: of each set, held out; windows of one document stay together, unless a domain is one document:
                then its windows are dealt out, and taken for independent.
            seed: of the choice.
            tokens: as `sequences`.
        Raises:
            ConfigError: the fraction is not between 0 and 1.
            DataError: a set cannot be split.
        """
        domains, samples = self.sequences(tokens=tokens)
        sets = {name: _divisible(domain) for name, domain in domains.items()}
        rows = {name: one.split_rows(fraction, seed) for name, one in sets.items()}
        drawn = tuple(sample.split_rows(fraction, seed) for sample in samples)
        return ScoreSplit(
            {name: one.rows(rows[name][0]) for name, one in sets.items()},
            tuple(one.rows(kept) for one, (kept, _) in zip(samples, drawn, strict=True)),
            {name: one.rows(rows[name][1]) for name, one in sets.items()},
            tuple(one.rows(held) for one, (_, held) in zip(samples, drawn, strict=True)),
            rows,
            drawn,
        )


def _divisible(domain: ScoredSequences) -> ScoredSequences:
    """A domain of a single document without its cluster; any other as it is."""
    single = domain.clusters_N is not None and bool((domain.clusters_N == domain.clusters_N[0]).all())
    return dataclasses.replace(domain, clusters_N=None) if single else domain


def score(
    pool: ExpertPool,
    domains: Mapping[str, Source],
    folder: str | Path,
    config: ScoreConfig | None = None,
    *,
    eos_id: int | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> ScoreCache:
    """Score text and samples under every expert; what an interrupted run has done is not done again.

    Where a process group is up every rank calls this with the same arguments and works on its share of the shards.

    Args:
        pool: the experts, where they shall run.
        domains: text by domain, in the experts' tokens.
        folder: of the cache; on a disk that all ranks see.
        config: what to score; None: the defaults.
        eos_id: the token that ends a document; needed for kind "documents", tells documents apart for "windows".
        overwrite: throw away what the folder holds of a cache.
        show: progress on stderr (rank 0).
    Returns:
        The finished cache, at once where it is there already.
    Raises:
        ConfigError: settings that do not fit the experts.
        DataError: a domain without data, sequences impossible under every expert, a cache of other inputs in the
            folder, or another process at work on it.
        NumericsError: an expert's scores are not numbers.
        CheckpointError: a shard cannot be written.
    """
    config = ScoreConfig() if config is None else config
    plan = _make_plan(pool.fingerprints(), pool, domains, config, eos_id, _bf16(config, pool.device))
    work = _Work(Path(folder), plan, overwrite)
    if work.finished:
        if work.rank == 0:
            with _alone(work.folder):
                work.tidy()
        return ScoreCache.open(folder)
    with work.held():
        own = [task for task in work.tasks if task.number % work.world == work.rank]
        left = [task for task in own if not work.has(task)]
        with progress(
            "score", sum(task.count for task in own), unit="sequences", enabled=show and work.rank == 0
        ) as counter:
            counter.advance(sum(task.count for task in own) - sum(task.count for task in left))
            with interrupt.safe_points():
                for task in left:
                    work.write(task, score_shard(pool, task, config.batch_size, plan.bf16, counter.advance))
                    interrupt.point()
        work.barrier()
        if work.rank == 0:
            work.finish(config)
        work.barrier()
    return ScoreCache.open(folder)


def score_with(
    executor: Executor,
    experts: Sequence[ExpertSource],
    domains: Mapping[str, Source],
    folder: str | Path,
    config: ScoreConfig | None = None,
    *,
    eos_id: int | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    show: bool = True,
) -> ScoreCache:
    """As `score`, over the workers of an executor: a shard is a task (`fan_out`), and is written here, once.

    Args:
        executor: where to score: on the worker's GPU where it has one.
        experts: where to load the experts from, on every machine.
        domains, folder, config, eos_id, overwrite, show: as `score`; the folder need be seen from here alone.
        dtype: the experts' parameters are held in.
    Raises:
        ConfigError: as `score`; or a machine does not see the experts' folders.
        DataError, NumericsError, CheckpointError: as `score`.
        WeftError: a worker died.
    """
    config = ScoreConfig() if config is None else config
    sources = json.dumps([source.model_dump() for source in experts])
    places = [Path(place) for source in experts for place in (source.library, source.model) if place is not None]
    shared = [place for place in places if place.is_dir()]
    far = (new_key(), sources, dtype)
    found: list[tuple[dict[str, str], PoolFacts, bool]] = []
    facts_task = Task("the experts' fingerprints", far)
    fan_out(executor, [facts_task], _far_facts, lambda _, facts: found.append(facts), shared=shared, show=False)
    fingerprints, facts, fast = found[0]
    bf16 = config.precision == "bf16" or (config.precision == "auto" and fast)
    plan = _make_plan(fingerprints, facts, domains, config, eos_id, bf16)
    work = _Work(Path(folder), plan, overwrite, rank=0, world=1)
    if work.finished:
        return ScoreCache.open(folder)
    with work.held():
        left = [task for task in work.tasks if not work.has(task)]
        units = {
            Task(
                f"shard {task.number}, {task.title(0)} and on", (*far, task, config.batch_size, bf16), task.count
            ): task
            for task in left
        }
        fan_out(
            executor,
            list(units),
            _far_shard,
            lambda unit, shard: work.write(units[unit], shard),
            shared=shared,
            description="score",
            unit="sequences",
            already=sum(task.count for task in work.tasks) - sum(task.count for task in left),
            show=show,
        )
        work.finish(config)
    return ScoreCache.open(folder)


# -- one shard ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ShardTask:
    """A piece of work that depends on nothing but itself and the experts.

    Attributes:
        number: of the shard.
        role: "domain": `tokens_NT1` are scored. "sample": first drawn, from the tokens in their first column.
        name: of the domain or the expert.
        expert: place of the expert drawn from.
        first: number of its first sequence within the set.
        tokens_NT1: int32.
        lengths_N: int32; of samples, the most tokens drawn.
        stop: token that ends a sample, None for none.
        seed: of the samples.
    """

    number: int
    role: Role
    name: str
    expert: int
    first: int
    tokens_NT1: NDArray[np.int32]
    lengths_N: NDArray[np.int32]
    stop: int | None
    seed: int

    @property
    def count(self) -> int:
        """Sequences."""
        return len(self.lengths_N)

    def title(self, row: int) -> str:
        """A sequence, for messages."""
        what = f"domain {self.name!r}" if self.role == "domain" else f"the samples of expert {self.name!r}"
        return f"sequence {self.first + row} of {what}"


@dataclass(frozen=True, eq=False)
class Shard:
    """What comes of a `ShardTask`; see `ScoredText`."""

    logp_NTE: NDArray[np.float32]
    tokens_NT1: NDArray[np.int32]
    lengths_N: NDArray[np.int32]


def score_shard(
    pool: ExpertPool,
    task: ShardTask,
    batch_size: int,
    bf16: bool = False,
    done: Callable[[float], None] | None = None,
) -> Shard:
    """Draw a shard's samples, if it is of samples, and score its sequences.

    Args:
        pool: the experts.
        task: the shard.
        batch_size: sequences per pass.
        bf16: run the experts under bfloat16 autocast; log-probabilities are taken in float32 in any case.
        done: told of the sequences of each batch.
    Raises:
        NumericsError: a score is not a number, naming expert and sequence.
        DataError: a sequence is impossible under every expert.
    """
    device = pool.device
    tokens_NT1, lengths_N = task.tokens_NT1.copy(), task.lengths_N.copy()
    logp_NTE = np.zeros((task.count, tokens_NT1.shape[1] - 1, len(pool)), dtype=np.float32)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for first in range(0, task.count, batch_size):
            follow_load()
            rows = slice(first, min(first + batch_size, task.count))
            if task.role == "sample":
                tokens_NT1[rows], lengths_N[rows] = _draw(pool, task, rows)
            longest = int(lengths_N[rows].max())
            tokens_BT1 = torch.from_numpy(tokens_NT1[rows, : longest + 1].astype(np.int64)).to(device)
            mask_BT1 = torch.arange(longest + 1) <= torch.from_numpy(lengths_N[rows].astype(np.int64))[:, None]
            logp_NTE[rows, :longest] = pool.token_log_probs(tokens_BT1, mask_BT1.to(device)).cpu().numpy()
            _check_scores(pool, task, first, logp_NTE[rows])
            if done is not None:
                done(rows.stop - rows.start)
    return Shard(logp_NTE, tokens_NT1, lengths_N)


def _check_scores(pool: ExpertPool, task: ShardTask, first: int, logp_BTE: NDArray[np.float32]) -> None:
    wrong = np.argwhere(~(logp_BTE <= 1e-3))
    if len(wrong):
        row, token, expert = (int(i) for i in wrong[0])
        raise NumericsError(
            f"expert {pool.names[expert]!r} gives token {token + 1} of {task.title(first + row)} a log-probability of "
            f"{logp_BTE[row, token, expert]}; its weights hold NaN or infinity, or its precision does not suffice: "
            "mend or leave out the expert (or precision: fp32); what is scored so far is kept"
        )
    dead_B = np.asarray(np.all(np.any(np.isneginf(logp_BTE), axis=1), axis=1))
    if dead_B.any():
        raise DataError(
            f"{task.title(first + int(dead_B.argmax()))} has probability 0 under every expert "
            f"({', '.join(pool.names)}), and no gate can give it any; leave that text out or add an expert that can "
            "say it"
        )


@torch.no_grad()
def _draw(pool: ExpertPool, task: ShardTask, rows: slice) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Samples of an expert: tokens_BT1 with their context token in front, and lengths_B.

    Token t of sample i is where the cumulated softmax passes u_it, uniform in [0, 1) and a function of seed, expert and
    i alone: a sample does not depend on which others it is drawn with.
    """
    backbone, place = pool.where(task.expert)
    device = pool.device
    given_BT1 = task.tokens_NT1[rows]
    batch, steps = len(given_BT1), given_BT1.shape[1] - 1
    u_BT = torch.from_numpy(
        np.stack(
            [
                np.random.default_rng([task.seed, task.expert, task.first + row]).random(steps)
                for row in range(rows.start, rows.stop)
            ]
        )
    )
    tokens_BT1 = torch.zeros((batch, steps + 1), dtype=torch.int64, device=device)
    tokens_BT1[:, 0] = torch.from_numpy(given_BT1[:, 0].astype(np.int64)).to(device)
    lengths_B = torch.full((batch,), steps, dtype=torch.int64)
    live_B = torch.ones(batch, dtype=torch.bool, device=device)
    store = SlotStore(batch)
    for t in range(steps):
        if backbone.keeps_keys:
            position_ids = torch.full((batch, 1), t, device=device)
            logits_B1V = backbone.run(
                Rows(one=place),
                tokens_BT1[:, t : t + 1],
                cache=store.window(slice(None), t),
                position_ids=position_ids,
            )
        else:
            logits_B1V = backbone.run(Rows(one=place), tokens_BT1[:, : t + 1])
        probs_BV = torch.softmax(logits_B1V[:, -1].to(_widest(device)), dim=-1)
        if bool(probs_BV.isnan().any()):
            row = int(probs_BV.isnan().any(dim=-1).nonzero()[0])
            raise NumericsError(
                f"expert {task.name!r} cannot be sampled: its probabilities of token {t + 1} of "
                f"{task.title(rows.start + row)} are not numbers; mend or leave out the expert"
            )
        chosen_B = _inverse(probs_BV, u_BT[:, t].to(device))
        tokens_BT1[:, t + 1] = torch.where(live_B, chosen_B, 0)
        if task.stop is not None:
            ended_B = live_B & (chosen_B == task.stop)
            lengths_B[ended_B.cpu()] = t + 1
            live_B = live_B & ~ended_B
            if not bool(live_B.any()):
                break
    return tokens_BT1.cpu().numpy().astype(np.int32), lengths_B.numpy().astype(np.int32)


def _inverse(probs_BV: Tensor, u_B: Tensor) -> Tensor:
    """The first token at which the cumulated probability exceeds u; never one of probability 0."""
    cumulated_BV = probs_BV.cumsum(dim=-1)
    target_B1 = (u_B.to(probs_BV.dtype) * cumulated_BV[:, -1])[:, None]
    chosen_B = torch.searchsorted(cumulated_BV, target_B1, right=True)[:, 0]
    last_B = probs_BV.shape[1] - 1 - (probs_BV > 0).flip(-1).to(torch.int64).argmax(dim=-1)
    return torch.minimum(chosen_B, last_B)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


# -- what there is to do ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Texts:
    """The sequences of a set before scoring; of samples, their context tokens."""

    role: Role
    name: str
    tokens_NT1: NDArray[np.int32]
    lengths_N: NDArray[np.int32]
    clusters_N: NDArray[np.int64]


@dataclass(frozen=True)
class PoolFacts:
    """What planning must know of a pool that may be elsewhere."""

    names: tuple[str, ...]
    vocab_size: int
    longest: int | None


@dataclass(frozen=True, eq=False)
class _Plan:
    """Everything that decides the numbers in a cache.

    Attributes:
        facts: JSON values; their checksum is the cache's fingerprint.
        texts: the sets.
        bf16: whether experts run under autocast.
        stop: token at which samples end.
        seed: of the samples.
        shard_sequences: sequences per shard; decides no number.
    """

    facts: dict[str, Any]
    texts: tuple[_Texts, ...]
    bf16: bool
    stop: int | None
    seed: int
    shard_sequences: int

    @property
    def fingerprint(self) -> str:
        return checksum(self.facts)

    def tasks(self) -> list[ShardTask]:
        """The shards, set by set."""
        found: list[ShardTask] = []
        samples = 0
        for texts in self.texts:
            expert = samples if texts.role == "sample" else -1
            samples += texts.role == "sample"
            for first in range(0, len(texts.lengths_N), self.shard_sequences):
                rows = slice(first, first + self.shard_sequences)
                tokens, lengths = texts.tokens_NT1[rows], texts.lengths_N[rows]
                found.append(
                    ShardTask(len(found), texts.role, texts.name, expert, first, tokens, lengths, self.stop, self.seed)
                )
        return found


def _make_plan(
    fingerprints: Mapping[str, str],
    pool: ExpertPool | PoolFacts,
    domains: Mapping[str, Source],
    config: ScoreConfig,
    eos_id: int | None,
    bf16: bool,
) -> _Plan:
    """Cut the text and draw the samples' context tokens.

    Raises:
        ConfigError: no context token, sequences longer than the experts take, or nothing to score.
        DataError: a domain with too little text, or of other tokens.
    """
    if pool.longest is not None and config.length > pool.longest:
        raise ConfigError(f"length is {config.length}; the experts take {pool.longest} positions at most")
    if config.kind == "documents" and eos_id is None:
        raise ConfigError("kind 'documents' needs eos_id, the token that ends a document in the experts' tokenizer")
    if not domains and not config.samples:
        raise ConfigError("nothing to score: give a domain, or samples above 0")
    cut = _windows if config.kind == "windows" else _documents
    texts = [cut(name, source, config, eos_id) for name, source in domains.items()]
    for text in texts:
        highest = int(text.tokens_NT1.max())
        if highest >= pool.vocab_size:
            raise DataError(
                f"domain {text.name!r} holds token {highest}; the experts' vocabulary is {pool.vocab_size}: prepare "
                "the text with their tokenizer"
            )
    if config.samples:
        texts += [_contexts(name, place, texts, config, eos_id) for place, name in enumerate(pool.names)]
    chosen = settings(config, only=("kind", "length", "sequences", "samples", "seed"))
    chosen |= {"precision": "bf16" if bf16 else "fp32", "eos_id": eos_id}
    facts = {
        "format": FORMAT,
        "experts": dict(fingerprints),
        "settings": chosen,
        "sets": {f"{text.role} {text.name}": _digest(text.tokens_NT1, text.lengths_N) for text in texts},
        "order": [list(fingerprints), [text.name for text in texts]],
    }
    stop = eos_id if config.kind == "documents" else None
    return _Plan(facts, tuple(texts), bf16, stop, config.seed, config.shard_sequences)


def _windows(name: str, source: Source, config: ScoreConfig, eos_id: int | None) -> _Texts:
    """Evenly spread windows of T + 1 tokens, each token of the text scored at most once."""
    length = config.length
    if len(source) < length + 1:
        raise DataError(
            f"domain {name!r} has {len(source)} tokens; a window needs {length + 1}: give it more text, or a smaller "
            "length"
        )
    whole = length * ((len(source) - 1) // length) + 1
    starts_N, _ = windows_of(whole, length, config.sequences * length)
    tokens_NT1 = np.concatenate(
        [source.read_many(starts_N[i : i + 1024], length + 1) for i in range(0, len(starts_N), 1024)]
    ).astype(np.int32)
    clusters_N = np.arange(len(starts_N), dtype=np.int64)
    if eos_id is not None:
        ends_N = np.concatenate([np.flatnonzero(block == eos_id) + at for at, block in _blocks(source)])
        clusters_N = np.searchsorted(ends_N, starts_N).astype(np.int64)
    return _Texts("domain", name, tokens_NT1, np.full(len(starts_N), length, dtype=np.int32), clusters_N)


def _documents(name: str, source: Source, config: ScoreConfig, eos_id: int | None) -> _Texts:
    """Beginnings of evenly spread documents, each after the end-of-text token."""
    assert eos_id is not None
    ends_N = np.concatenate(
        [np.zeros(0, dtype=np.int64), *(np.flatnonzero(block == eos_id) + at for at, block in _blocks(source))]
    )
    starts_N = np.concatenate([[0], ends_N[:-1] + 1])[: len(ends_N)]
    if not len(ends_N):
        raise DataError(
            f"domain {name!r} has no whole document in {len(source)} tokens: none is the end-of-text token {eos_id}; "
            "give it text of documents, or use kind 'windows'"
        )
    take = min(config.sequences, len(ends_N))
    chosen_N = (2 * np.arange(take, dtype=np.int64) + 1) * len(ends_N) // (2 * take)
    lengths_N = np.minimum(ends_N[chosen_N] + 1 - starts_N[chosen_N], config.length)
    tokens_NT1 = np.zeros((take, config.length + 1), dtype=np.int32)
    tokens_NT1[:, 0] = eos_id
    for row, (start, count) in enumerate(zip(starts_N[chosen_N], lengths_N, strict=True)):
        tokens_NT1[row, 1 : count + 1] = source.read(int(start), int(count))
    return _Texts("domain", name, tokens_NT1, lengths_N.astype(np.int32), np.arange(take, dtype=np.int64))


def _contexts(name: str, place: int, texts: Sequence[_Texts], config: ScoreConfig, eos_id: int | None) -> _Texts:
    """What samples start from: the end of text, or the first tokens of windows, all domains alike."""
    tokens_NT1 = np.zeros((config.samples, config.length + 1), dtype=np.int32)
    if config.kind == "documents" or not texts:
        if eos_id is None:
            raise ConfigError("samples need a token to start from: give a domain, or eos_id")
        tokens_NT1[:, 0] = eos_id
    else:
        rng = np.random.default_rng([config.seed, place, len(texts)])
        from_N = rng.integers(len(texts), size=config.samples)
        u_N = rng.random(config.samples)
        for number, text in enumerate(texts):
            of = from_N == number
            tokens_NT1[of, 0] = text.tokens_NT1[(u_N[of] * len(text.tokens_NT1)).astype(np.int64), 0]
    lengths_N = np.full(config.samples, config.length, dtype=np.int32)
    return _Texts("sample", name, tokens_NT1, lengths_N, np.arange(config.samples, dtype=np.int64))


def _blocks(source: Source) -> Iterator[tuple[int, NDArray[np.int64]]]:
    for at in range(0, len(source), _BLOCK):
        yield at, source.read(at, min(_BLOCK, len(source) - at))


def _bf16(config: ScoreConfig, device: torch.device) -> bool:
    return config.bf16(fast=device.type == "cuda" and torch.cuda.is_bf16_supported())


def _digest(*arrays: NDArray[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# -- the folder ---------------------------------------------------------------------------------------------------


class _Work:
    """A cache in the making: which shards there are, and how they become one."""

    def __init__(
        self, folder: Path, plan: _Plan, overwrite: bool, *, rank: int | None = None, world: int | None = None
    ) -> None:
        together = rank is None and dist.is_available() and dist.is_initialized()
        self._together = together
        self.rank = dist.get_rank() if together else rank or 0
        self.world = dist.get_world_size() if together else world or 1
        self.folder = folder
        self.plan = plan
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self.barrier()
            if self.rank == 0:
                with _alone(folder):
                    _clear(folder)
            self.barrier()
        self.finished = (folder / INDEX).exists()
        found = _read_index(folder) if self.finished else read_object(folder / PLAN, _REMEDY)
        if found is not None:
            _refuse_stale(folder, found.get("plan"), plan.facts)
        if not self.finished:
            size = plan.shard_sequences if found is None else int(found.get("shard_sequences", plan.shard_sequences))
            self.plan = dataclasses.replace(plan, shard_sequences=size)
        self.tasks = [] if self.finished else self.plan.tasks()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Write the plan; let no second run into the folder meanwhile."""
        with contextlib.nullcontext() if self.rank else _alone(self.folder):
            if self.rank == 0:
                if (self.folder / INDEX).exists():
                    raise DataError(f"another process has just finished the scores in {self.folder}; run again")
                (self.folder / SHARDS).mkdir(exist_ok=True)
                facts = {"plan": self.plan.facts, "shard_sequences": self.plan.shard_sequences}
                write_object(self.folder / PLAN, facts, sync=True)
                interrupt.done_with("--overwrite")
            self.barrier()
            yield

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self._together:
            dist.barrier()

    def path(self, task: ShardTask) -> Path:
        return self.folder / SHARDS / f"{task.number:06d}.safetensors"

    def has(self, task: ShardTask) -> bool:
        """Whether a shard is there and whole."""
        if not self.path(task).exists():
            return False
        try:
            self.read(task)
        except CheckpointError as error:
            _log.warning("%s; it is scored again", error)
            return False
        return True

    def read(self, task: ShardTask) -> Shard:
        """A shard back from disk.

        Raises:
            CheckpointError: it is missing, torn, altered or of another cache.
        """
        tensors, facts = read_tensors(self.path(task), "scores")
        try:
            shard = Shard(*(tensors[name].numpy() for name in ("logp_NTE", "tokens_NT1", "lengths_N")))
        except KeyError as error:
            raise CheckpointError(f"{self.path(task)} lacks {error}") from error
        if facts.get("fingerprint") != self.plan.fingerprint:
            raise CheckpointError(f"{self.path(task)} is of other scores")
        return shard

    def write(self, task: ShardTask, shard: Shard) -> None:
        """Put a shard on disk, whole or not at all."""
        arrays = {"logp_NTE": shard.logp_NTE, "tokens_NT1": shard.tokens_NT1, "lengths_N": shard.lengths_N}
        facts = {"fingerprint": self.plan.fingerprint}
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        write_tensors(self.path(task), "scores", tensors, facts)

    def finish(self, config: ScoreConfig) -> None:
        """Put the shards together and publish the index, in this order: nothing is lost if it is cut short."""
        numbers: dict[Role, int] = {"domain": 0, "sample": 0}
        sets, files = [], {}
        for text in self.plan.texts:
            stem = f"{text.role}-{numbers[text.role]:03d}"
            numbers[text.role] += 1
            own = [task for task in self.tasks if (task.role, task.name) == (text.role, text.name)]
            self._join(stem, text, own)
            sets.append({"stem": stem, "role": text.role, "name": text.name, "sequences": len(text.lengths_N)})
            for part in PARTS:
                path = self.folder / f"{stem}.{part}.npy"
                files[path.name] = describe(path)
        index = {
            "format": FORMAT,
            "fingerprint": self.plan.fingerprint,
            "plan": self.plan.facts,
            "config": config.model_dump(),
            "sets": sets,
            "files": files,
        }
        write_object(self.folder / INDEX, index, sync=True)
        sync_file(self.folder)
        self.tidy()

    def tidy(self) -> None:
        """Remove what is not needed once the index is there."""
        remove(self.folder / SHARDS)
        (self.folder / PLAN).unlink(missing_ok=True)

    def _join(self, stem: str, text: _Texts, tasks: Sequence[ShardTask]) -> None:
        count, width = text.tokens_NT1.shape
        shapes = {
            "logp": ((count, width - 1, len(self.plan.facts["experts"])), np.float32),
            "tokens": ((count, width), np.int32),
            "lengths": ((count,), np.int32),
            "clusters": ((count,), np.int64),
        }
        files, needed = {}, 0
        for part, (shape, kind) in shapes.items():
            files[part] = self.folder / f"{stem}.{part}.npy"
            needed += int(np.prod(shape)) * np.dtype(kind).itemsize
        with room(self.folder, needed), contextlib.ExitStack() as stack:
            opened = {part: stack.enter_context(path.open("wb")) for part, path in files.items()}
            for part, (shape, kind) in shapes.items():
                header = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(opened[part], header)
            opened["clusters"].write(text.clusters_N.tobytes())
            for task in tasks:
                shard = self.read(task)
                opened["logp"].write(shard.logp_NTE.tobytes())
                opened["tokens"].write(shard.tokens_NT1.tobytes())
                opened["lengths"].write(shard.lengths_N.tobytes())
        for path in files.values():
            sync_file(path)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let no second run into a folder meanwhile.

    Raises:
        DataError: one is at work there.
    """

    def refusal(who: str) -> DataError:
        return DataError(f"{who} is scoring into {folder}; wait for it to end, or choose another folder")

    with locked(folder / ".lock", refusal):
        yield


def _clear(folder: Path) -> None:
    """Remove what a cache is made of, and nothing else."""
    for name in (INDEX, PLAN):
        (folder / name).unlink(missing_ok=True)
    remove(folder / SHARDS)
    for role in ("domain", "sample"):
        for path in folder.glob(f"{role}-[0-9][0-9][0-9].*.npy"):
            path.unlink()


def _read_index(folder: Path) -> dict[str, Any]:
    index = read_object(folder / INDEX, _REMEDY)
    if index is None:
        if (folder / PLAN).exists():
            done = len(list((folder / SHARDS).glob("[0-9]*.safetensors")))
            raise DataError(f"the score cache in {folder} is not finished ({done} shards so far); score it on")
        raise DataError(f"{folder} holds no score cache; make one with score (weftlm score)")
    if index.get("format") != FORMAT:
        raise DataError(f"{folder / INDEX} is of another format than {FORMAT!r}; {_REMEDY}")
    return index


def _check_files(folder: Path, index: Mapping[str, Any]) -> None:
    check_listed(folder, index["files"], _REMEDY)


def _refuse_stale(folder: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    """Refuse a cache of other inputs, saying which.

    Raises:
        DataError: it is one.
    """
    if not differences(found, wanted):
        return
    old = found if isinstance(found, dict) else {}
    parts = {key: differences(old.get(key), wanted[key], key) for key in ("format", "settings", "experts", "sets")}
    sets = parts.pop("sets")  # which follow from the settings too
    told = "; ".join(filter(None, parts.values())) or sets or "the experts or domains come in another order"
    raise DataError(f"the score cache in {folder} is stale, made from other inputs ({told}); {_REMEDY}")


# -- elsewhere ----------------------------------------------------------------------------------------------------


def _far_pool(key: str, sources: str, dtype: str) -> ExpertPool:
    """The experts on a worker, loaded once for all its shards."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return keep(
        key,
        lambda: ExpertPool.load([ExpertSource(**source) for source in json.loads(sources)], dtype=dtype, device=device),
    )


def _far_facts(key: str, sources: str, dtype: str) -> tuple[dict[str, str], PoolFacts, bool]:
    pool = _far_pool(key, sources, dtype)
    fast = _bf16(ScoreConfig(precision="auto"), pool.device)
    return pool.fingerprints(), PoolFacts(pool.names, pool.vocab_size, pool.longest), fast


def _far_shard(key: str, sources: str, dtype: str, task: ShardTask, batch_size: int, bf16: bool) -> Shard:
    return score_shard(_far_pool(key, sources, dtype), task, batch_size, bf16)
