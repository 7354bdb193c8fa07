"""The score cache: every expert's log-probability of every token of every sequence, computed once.

The sequences are real text of each domain, and samples drawn from each expert (temperature 1, the whole softmax). Once
they are scored, fitting a gate takes minutes on a CPU whatever the experts' size: scoring is what scales out. Work is
cut into shards that do not depend on where they are computed, so that one process, several (torchrun: every rank
computes its own shards) and several machines (an executor) write the same bytes, given equal hardware.

    index.json                                  an artifact: identity, settings, the shards of each set, their digests
    domain-000-000000-256.safetensors           256 sequences of the first domain, from its first one on
    sample-000-000000-256.safetensors           the same of the samples drawn from the first expert

Each shard is written whole. An interrupted run finds those it has finished and computes the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from weftlm import interrupt
from weftlm.artifact import Artifact, locked, refuse_other
from weftlm.config import settings
from weftlm.corpora.source import Source
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.evaluation.perplexity import windows_of
from weftlm.experts.low_rank import Rows
from weftlm.fan_out import fan_out, keep, new_key
from weftlm.files import check_listed, checksum, read_object, room
from weftlm.gating.config import ExpertSource, ScoreConfig
from weftlm.gating.experts import ExpertPool
from weftlm.gating.gate import read_tensors, write_tensors
from weftlm.gating.modular_cache import SlotStore, SlotWindow
from weftlm.gating.sequences import ScoredSequences, sequence_features
from weftlm.progress import ProgressBar
from weftlm.threads import follow_load

FORMAT = "weftlm score cache 4"
INDEX = "index.json"

_BLOCK = 1 << 20
_REMEDY = "score again (weftlm score --overwrite; overwrite=True), or choose another folder"

Role = Literal["domain", "sample"]
Answer = TypeVar("Answer")
Shard = dict[str, Tensor]
"""`logp_NTE`, scores of every token under every expert, nats; `tokens_NT1`, the context first; `clusters_N`."""


@dataclass(frozen=True, eq=False)
class ScoreCache:
    """A finished cache, or a part of its sequences. Open one with `ScoreCache.open`, make one with `score`.

    Attributes:
        folder: Folder it was read from.
        experts: Names, in the order of the scores' last axis.
        domains: Real text by domain.
        samples: Samples by the expert they were drawn from, in the experts' order; empty where none were drawn.
        config: Settings it was made with.
        fingerprint: Digest of experts, tokens and settings.
        expert_fingerprints: Fingerprint of each expert, as `ExpertPool.fingerprints` has them.
    """

    folder: Path
    experts: tuple[str, ...]
    domains: dict[str, ScoredSequences]
    samples: dict[str, ScoredSequences]
    config: ScoreConfig
    fingerprint: str
    expert_fingerprints: dict[str, str]

    @classmethod
    def open(cls, folder: str | Path, *, tokens: bool = True) -> ScoreCache:
        """Read a finished cache into memory, every file compared with its digest.

        Args:
            folder: Folder of the cache.
            tokens: Keep the scores of single tokens, which causal gates need, and not their sums alone.
        Raises:
            DataError: there is none, it is not finished, or a file is missing or altered.
        """
        folder = Path(folder)
        index = read_object(folder / INDEX, _REMEDY)
        if index is None:
            done = len(list(folder.glob("*.safetensors")))
            if done:
                raise DataError(f"the score cache in {folder} is not finished ({done} shards so far); score again")
            raise DataError(f"{folder} holds no score cache; make one with score (weftlm score)")
        identity = index.get("identity", {})
        if identity.get("format") != FORMAT:
            raise DataError(f"{folder / INDEX} is of another format than {FORMAT!r}; {_REMEDY}")
        check_listed(folder, index.get("files", {}), _REMEDY)
        sets: dict[Role, dict[str, ScoredSequences]] = {"domain": {}, "sample": {}}
        for entry in index["sets"]:
            paths = [folder / name for name in entry["shards"]]
            sets[entry["role"]][entry["name"]] = _read_set(entry["name"], paths, tokens)
        experts = identity["experts"]
        config = ScoreConfig(**index["config"])
        return cls(folder, tuple(experts), sets["domain"], sets["sample"], config, checksum(identity), dict(experts))

    def changed(self, change: Callable[[ScoredSequences], ScoredSequences]) -> ScoreCache:
        """The same cache with every set of sequences changed."""
        domains, samples = ({name: change(one) for name, one in of.items()} for of in (self.domains, self.samples))
        return dataclasses.replace(self, domains=domains, samples=samples)

    def split(self, fraction: float = 0.25, *, seed: int = 0) -> tuple[ScoreCache, ScoreCache]:
        """A part to fit gates on and a disjoint one to certify them with; the same for the same fraction and seed.

        Args:
            fraction: Part of each set that is held out; windows of one document stay together, unless a domain is one
                document: then its windows are divided, and taken for independent.
            seed: Random seed of the choice.
        Raises:
            ConfigError: the fraction is not between 0 and 1.
            DataError: a set cannot be split.
        """

        def part(number: int, one: ScoredSequences) -> ScoredSequences:
            single = one.clusters_N is not None and bool((one.clusters_N == one.clusters_N[0]).all())
            one = dataclasses.replace(one, clusters_N=None) if single else one
            return one.rows(one.split_rows(fraction, seed)[number])

        return self.changed(partial(part, 0)), self.changed(partial(part, 1))


def _read_set(name: str, shards: Sequence[Path], tokens: bool) -> ScoredSequences:
    """The sequences of a domain, or the samples of an expert, from their shards."""
    parts = []
    for path in shards:
        part, _ = read_tensors(path, "scores")
        part["logq_NE"] = part["logp_NTE"].sum(dim=1, dtype=torch.float64)
        if not tokens:
            del part["logp_NTE"]
        parts.append(part)
    joined = {key: torch.cat([part.pop(key) for part in parts]) for key in tuple(parts[0])}
    tokens_NT1, logq_NE = joined["tokens_NT1"], joined["logq_NE"]
    lengths_N = torch.full((len(tokens_NT1),), tokens_NT1.shape[1] - 1)
    features = sequence_features(logq_NE, lengths_N, logp_NTE=joined.get("logp_NTE"))
    clusters_N = joined["clusters_N"]
    one = ScoredSequences.of(logq_NE, features=features, tokens_N=lengths_N, clusters_N=clusters_N, name=name)
    return dataclasses.replace(one, tokens_NT1=tokens_NT1)


def score(
    experts: ExpertPool | Sequence[ExpertSource],
    domains: Mapping[str, Source],
    folder: str | Path,
    config: ScoreConfig | None = None,
    *,
    eos_id: int | None = None,
    executor: Executor | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    tokens: bool = True,
    show: bool = True,
) -> ScoreCache:
    """Score text and samples under every expert; what an interrupted run has done is not done again.

    Under a process group every rank calls this with the same arguments and computes its share of the shards. With an
    executor each shard is a task (`fan_out`), and is written here, once.

    Args:
        experts: Experts, on the device they shall run on; with an executor, where its workers load them from.
        domains: Text by domain, in the experts' tokens.
        folder: Folder of the cache, on a disk that all ranks see; workers of an executor need not.
        config: Settings of what is scored; None: the defaults.
        eos_id: Token that ends a document: windows of one document are not independent of each other.
        executor: Executor whose workers score, on their GPU where they have one; None: this process.
        dtype: Dtype in which an executor's workers hold the experts' parameters.
        overwrite: Discard what the folder holds of a cache.
        tokens: As in `ScoreCache.open`; ranks above 0 read no scores of single tokens in any case.
        show: Progress on stderr (rank 0).
    Returns:
        The finished cache, at once where it is there already.
    Raises:
        ConfigError: settings that do not fit the experts, or a worker does not see the experts' folders.
        DataError: a domain without data, sequences impossible under every expert, or another process at work in the
            folder.
        NumericsError: an expert's scores are not numbers.
        CheckpointError: the folder holds a cache of other inputs, or a shard cannot be written.
    """
    config, folder, rank, world = config or ScoreConfig(), Path(folder), 0, 1
    if isinstance(experts, ExpertPool):
        facts = _facts(experts, config)
        if _grouped():
            rank, world = dist.get_rank(), dist.get_world_size()
    elif executor is None:
        raise ConfigError("sources of experts are scored by an executor's workers; give executor, or an ExpertPool")
    else:
        far, found = (new_key(), experts, dtype), []
        places = [Path(place) for source in experts for place in (source.library, source.model) if place is not None]
        spread = partial(fan_out, executor, shared=[place for place in places if place.is_dir()])
        asked = {"the experts' fingerprints": (*far, _facts, config)}
        spread(asked, _on_pool, lambda _, facts: found.append(facts), show=False)
        facts = found[0]
    sets, bf16 = _sets(facts, domains, config, eos_id), facts[-1]
    shards = {each: each.shards(config.shard_sequences) for each in sets}
    every = [shard for parts in shards.values() for shard in parts]
    artifact = Artifact(folder / INDEX, _identity(sets, facts, config, eos_id), _REMEDY)

    def write(shard: Unscored, scored: Shard) -> None:
        write_tensors(folder / shard.file, "scores", scored, {})

    with _alone(artifact, rank, overwrite) as finished:
        left = [shard for shard in every[rank::world] if not (finished or (folder / shard.file).exists())]
        shown, size = show and bool(left) and rank == 0, sum(map(len, every[rank::world]))
        already = size - sum(map(len, left))
        if isinstance(experts, ExpertPool):
            bar = ProgressBar("score", size, unit="sequences", done=already, enabled=shown)
            with bar as counter, interrupt.safe_points():
                for shard in left:
                    write(shard, score_shard(experts, shard, config.batch_size, bf16, counter.advance))
                    interrupt.point()
        else:
            named = {f"shard of {each.title(0)} and on": each for each in left}
            spread(
                {title: (*far, score_shard, each, config.batch_size, bf16) for title, each in named.items()}, _on_pool,
                lambda title, scored: write(named[title], scored), description="score", unit="sequences",
                sizes={title: len(each) for title, each in named.items()}, already=already, show=shown,
            )  # fmt: skip
        _barrier()
        if rank == 0 and not finished:
            entries = [
                {"role": each.role, "name": each.name, "shards": [shard.file for shard in parts]}
                for each, parts in shards.items()
            ]
            names = [shard.file for shard in every]
            artifact.finish({"config": config.model_dump(mode="json"), "sets": entries}, names)
            _remove_others(folder, names)
        _barrier()
    return ScoreCache.open(folder, tokens=tokens and rank == 0)


def _on_pool(
    key: str, sources: Sequence[ExpertSource], dtype: str, work: Callable[..., Answer], *arguments: Any
) -> Answer:
    """Work on the experts by a worker, which loads them once for all its tasks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return work(keep(key, lambda: ExpertPool.load(sources, dtype=dtype, device=device)), *arguments)


# -- the folder ---------------------------------------------------------------------------------------------------


@contextmanager
def _alone(artifact: Artifact, rank: int, overwrite: bool) -> Iterator[bool]:
    """Keep other runs out of a cache's folder; gives whether the cache is finished, and begins it if it is not.

    Raises:
        DataError: another process is at work there.
        CheckpointError: it holds a cache of other inputs.
    """
    folder = artifact.record.parent
    folder.mkdir(parents=True, exist_ok=True)

    def refusal(holder: str) -> DataError:
        return DataError(f"{holder} is scoring into {folder}; wait for it to end, or choose another folder")

    with nullcontext() if rank else locked(folder / ".lock", refusal), room(folder):
        if rank == 0 and overwrite:
            for record in (artifact.record, artifact.begun):
                record.unlink(missing_ok=True)
        _barrier()
        refuse_other(artifact, "scores", _REMEDY)
        finished = artifact.record.exists()
        if rank == 0 and not finished:
            if not artifact.resume():
                _remove_others(folder, ())
                artifact.begin()
            interrupt.done_with("--overwrite")
        _barrier()
        yield finished


def _remove_others(folder: Path, names: Sequence[str]) -> None:
    """Remove all shards but these."""
    for path in [*folder.glob("domain-*"), *folder.glob("sample-*")]:
        if path.name not in names:
            path.unlink()


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _barrier() -> None:
    """Wait for the other ranks, if there are any."""
    if _grouped():
        dist.barrier()


def _identity(sets: Sequence[Unscored], facts: PoolFacts, config: ScoreConfig, eos_id: int | None) -> dict[str, Any]:
    """What decides the scores."""
    chosen = settings(config, only=("length", "sequences", "samples", "seed"))
    chosen |= {"precision": "bf16" if facts[-1] else "fp32", "eos_id": eos_id}
    tokens = {
        f"{each.role} {each.name}": hashlib.blake2b(each.tokens_NT1.tobytes(), digest_size=16).hexdigest()
        for each in sets
    }
    order = [list(facts[0]), list(tokens)]
    return {"format": FORMAT, "settings": chosen, "experts": facts[0], "tokens": tokens, "order": order}


# -- one shard ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unscored:
    """The sequences of a set before scoring, or a shard of them, which depends on nothing but itself and the experts.

    Attributes:
        role: "domain": `tokens_NT1` are scored. "sample": first drawn, from the tokens in their first column.
        name: Name of the domain or the expert.
        place: Number of the domain, or place of the expert drawn from.
        tokens_NT1: Tokens, int32.
        clusters_N: Number of the group each belongs to (windows of one document), int64.
        seed: Random seed of the samples.
        first: Number of the first sequence within the set.
    """

    role: Role
    name: str
    place: int
    tokens_NT1: NDArray[np.int32]
    clusters_N: NDArray[np.int64]
    seed: int
    first: int = 0

    def __len__(self) -> int:
        return len(self.clusters_N)

    @property
    def file(self) -> str:
        """Name of the shard's file."""
        return f"{self.role}-{self.place:03d}-{self.first:06d}-{len(self)}.safetensors"

    def title(self, row: int) -> str:
        """A sequence, for messages."""
        what = f"domain {self.name!r}" if self.role == "domain" else f"the samples of expert {self.name!r}"
        return f"sequence {self.first + row} of {what}"

    def shards(self, size: int) -> list[Unscored]:
        """The set in parts of at most `size` sequences."""
        found = []
        for first in range(0, len(self), size):
            tokens_NT1, clusters_N = self.tokens_NT1[first : first + size], self.clusters_N[first : first + size]
            found.append(dataclasses.replace(self, first=first, tokens_NT1=tokens_NT1, clusters_N=clusters_N))
        return found


def score_shard(
    pool: ExpertPool,
    text: Unscored,
    batch_size: int,
    bf16: bool = False,
    done: Callable[[float], None] | None = None,
) -> Shard:
    """Draw a shard's samples, if it is of samples, and score its sequences.

    Args:
        pool: Experts.
        text: The shard.
        batch_size: Sequences per forward pass.
        bf16: Run the experts under bfloat16 autocast; log-probabilities are taken in float32 in any case.
        done: Called with the number of sequences of each batch.
    Raises:
        NumericsError: a score is not a number, naming expert and sequence.
        DataError: a sequence is impossible under every expert.
    """
    tokens_NT1, clusters_N = torch.from_numpy(text.tokens_NT1.copy()), torch.from_numpy(text.clusters_N.copy())
    logp_NTE = torch.zeros(len(text), tokens_NT1.shape[1] - 1, len(pool))
    with torch.autocast(pool.device.type, torch.bfloat16, enabled=bf16):
        for first in range(0, len(text), batch_size):
            follow_load()
            rows = slice(first, min(first + batch_size, len(text)))
            if text.role == "sample":
                tokens_NT1[rows] = _draw(pool, text, rows)
            logp_NTE[rows] = pool.token_log_probs(tokens_NT1[rows].to(pool.device, torch.int64)).cpu()
            _check_scores(pool, text, first, logp_NTE[rows])
            if done is not None:
                done(rows.stop - rows.start)
    return {"logp_NTE": logp_NTE, "tokens_NT1": tokens_NT1, "clusters_N": clusters_N}


def _check_scores(pool: ExpertPool, text: Unscored, first: int, logp_BTE: Tensor) -> None:
    wrong = (~(logp_BTE <= 1e-3)).nonzero()
    if len(wrong):
        row, token, expert = wrong[0].tolist()
        raise NumericsError(
            f"expert {pool.names[expert]!r} gives token {token + 1} of {text.title(first + row)} a log-probability of "
            f"{logp_BTE[row, token, expert]}; its weights hold NaN or infinity, or its precision does not suffice: "
            "mend or leave out the expert (or precision: fp32); what is scored so far is kept"
        )
    dead_B = logp_BTE.isneginf().any(dim=1).all(dim=1)
    if bool(dead_B.any()):
        raise DataError(
            f"{text.title(first + int(dead_B.nonzero()[0]))} has probability 0 under every expert "
            f"({', '.join(pool.names)}), and no gate can give it any; leave that text out or add an expert that can "
            "say it"
        )


@torch.no_grad()
def _draw(pool: ExpertPool, text: Unscored, rows: slice) -> Tensor:
    """Samples of an expert with their context token in front, tokens_BT1.

    Token t of sample i is where the cumulated softmax passes u_it, uniform in [0, 1) and a function of seed, expert and
    i alone: a sample does not depend on which others it is drawn with.
    """
    backbone, place = pool.where(text.place)
    device = pool.device
    tokens_BT1 = torch.from_numpy(text.tokens_NT1[rows].astype(np.int64)).to(device)
    batch, steps = len(tokens_BT1), tokens_BT1.shape[1] - 1
    generators = [
        np.random.default_rng([text.seed, text.place, text.first + row]) for row in range(rows.start, rows.stop)
    ]
    u_BT = torch.from_numpy(np.stack([each.random(steps) for each in generators]))
    store = SlotStore(batch)
    for t in range(steps):
        if backbone.keeps_keys:
            window, position_ids = SlotWindow(store, slice(None), t), torch.full((batch, 1), t, device=device)
            ids_BK = tokens_BT1[:, t : t + 1]
            logits_BKV = backbone.run(Rows(one=place), ids_BK, cache=window, position_ids=position_ids)
        else:
            logits_BKV = backbone.run(Rows(one=place), tokens_BT1[:, : t + 1])
        wide = torch.float32 if device.type == "mps" else torch.float64
        probs_BV = torch.softmax(logits_BKV[:, -1].to(wide), dim=-1)
        if bool(probs_BV.isnan().any()):
            row = int(probs_BV.isnan().any(dim=-1).nonzero()[0])
            raise NumericsError(
                f"expert {text.name!r} cannot be sampled: its probabilities of token {t + 1} of "
                f"{text.title(rows.start + row)} are not numbers; mend or leave out the expert"
            )
        tokens_BT1[:, t + 1] = _inverse(probs_BV, u_BT[:, t].to(device))
    return tokens_BT1


def _inverse(probs_BV: Tensor, u_B: Tensor) -> Tensor:
    """The first token at which the cumulated probability exceeds u; never one of probability 0."""
    cumulated_BV = probs_BV.cumsum(dim=-1)
    target_B1 = (u_B.to(probs_BV.dtype) * cumulated_BV[:, -1])[:, None]
    chosen_B = torch.searchsorted(cumulated_BV, target_B1, right=True)[:, 0]
    last_B = probs_BV.shape[1] - 1 - (probs_BV > 0).flip(-1).to(torch.int64).argmax(dim=-1)
    return torch.minimum(chosen_B, last_B)


# -- what there is to do ------------------------------------------------------------------------------------------


PoolFacts = tuple[dict[str, str], int, int | None, bool]
"""Fingerprint of each expert, size of the vocabulary, positions all take, and whether they run under bfloat16."""


def _facts(pool: ExpertPool, config: ScoreConfig) -> PoolFacts:
    """What must be known of a pool, which may be on another machine, before scoring."""
    fast = pool.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return pool.fingerprints(), pool.vocab_size, pool.longest, config.bf16(fast=fast)


def _sets(facts: PoolFacts, domains: Mapping[str, Source], config: ScoreConfig, eos_id: int | None) -> list[Unscored]:
    """Cut the text into windows and draw the samples' context tokens.

    Raises:
        ConfigError: no context token, sequences longer than the experts take, or nothing to score.
        DataError: a domain with too little text, or of other tokens.
    """
    fingerprints, vocab_size, longest, _ = facts
    if longest is not None and config.length > longest:
        raise ConfigError(f"length is {config.length}; the experts take {longest} positions at most")
    if not domains and not config.samples:
        raise ConfigError("nothing to score: give a domain, or samples above 0")
    texts = [
        Unscored("domain", name, place, *_windows(name, source, config, eos_id), config.seed)
        for place, (name, source) in enumerate(domains.items())
    ]
    for text in texts:
        highest = int(text.tokens_NT1.max())
        if highest >= vocab_size:
            raise DataError(
                f"domain {text.name!r} holds token {highest}; the experts' vocabulary is {vocab_size}: prepare "
                "the text with their tokenizer"
            )
    samples = []
    for place, name in enumerate(fingerprints if config.samples else ()):
        tokens_NT1, alone_N = _contexts(place, texts, config, eos_id), np.arange(config.samples, dtype=np.int64)
        samples.append(Unscored("sample", name, place, tokens_NT1, alone_N, config.seed))
    return texts + samples


def _windows(
    name: str, source: Source, config: ScoreConfig, eos_id: int | None
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Evenly spread windows of T + 1 tokens, each token of the text scored at most once; and their documents."""
    length = config.length
    if len(source) < length + 1:
        raise DataError(
            f"domain {name!r} has {len(source)} tokens; a window needs {length + 1}: give it more text, or a smaller "
            "length"
        )
    whole = length * ((len(source) - 1) // length) + 1
    starts_N, _ = windows_of(whole, length, config.sequences * length)
    parts = [source.read_many(starts_N[i : i + 1024], length + 1) for i in range(0, len(starts_N), 1024)]
    clusters_N = np.arange(len(starts_N), dtype=np.int64)
    if eos_id is not None:
        blocks = ((at, source.read(at, min(_BLOCK, len(source) - at))) for at in range(0, len(source), _BLOCK))
        ends_N = np.concatenate([np.flatnonzero(block == eos_id) + at for at, block in blocks])
        clusters_N = np.searchsorted(ends_N, starts_N).astype(np.int64)
    return np.concatenate(parts).astype(np.int32), clusters_N


def _contexts(place: int, texts: Sequence[Unscored], config: ScoreConfig, eos_id: int | None) -> NDArray[np.int32]:
    """What samples start from: the first tokens of windows, all domains alike, or the end of text without any."""
    tokens_NT1 = np.zeros((config.samples, config.length + 1), dtype=np.int32)
    if not texts:
        if eos_id is None:
            raise ConfigError("samples need a token to start from: give a domain, or eos_id")
        tokens_NT1[:, 0] = eos_id
        return tokens_NT1
    rng = np.random.default_rng([config.seed, place, len(texts)])
    from_N = rng.integers(len(texts), size=config.samples)
    u_N = rng.random(config.samples)
    for number, text in enumerate(texts):
        of = from_N == number
        tokens_NT1[of, 0] = text.tokens_NT1[(u_N[of] * len(text)).astype(np.int64), 0]
    return tokens_NT1
