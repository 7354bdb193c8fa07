"""Real text for the mixture benchmarks: natural domains from JSON Lines files, cut to a budget of tokens each.

The files are `DATA/domains/NAME.jsonl.zst` with `{"text": ..., "sub": ...}` per line; `sub` is a finer label. Every
choice is made by a seed, so that development and report runs can use different targets, documents and seeds.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray

from weftlm.corpora.config import TrainConfig
from weftlm.corpora.source import ArraySource
from weftlm.corpora.tokens import Tokenizer, train_tokenizer
from weftlm.domains.cluster import nearest
from weftlm.domains.config import EmbedderConfig
from weftlm.domains.embed import make_embedder
from weftlm.domains.histogram import domain_means
from weftlm.domains.histogram import histogram as domain_histogram

ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class TextDomain:
    """A natural domain: its name, the file it comes from and the label within it (None takes the whole file)."""

    name: str
    file: str
    sub: str | None = None


@dataclass(frozen=True)
class TokenisedDomain:
    """Training and held-out tokens of a domain, and the texts they came from."""

    name: str
    train: ArraySource
    heldout: ArraySource
    train_texts: tuple[str, ...]


@functools.cache
def _records(path: Path) -> list[tuple[str, str]]:
    """(sub, text) of every line of a file."""
    with path.open("rb") as raw:
        stream = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8")
        return [(record.get("sub", ""), record["text"]) for record in map(json.loads, stream)]


def read_texts(data: Path, domain: TextDomain) -> Iterator[str]:
    """The documents of a domain in the file's order."""
    for sub, text in _records(data / "domains" / f"{domain.file}.jsonl.zst"):
        if domain.sub is None or sub == domain.sub:
            yield text


def shuffled(texts: Sequence[str], seed: int) -> list[str]:
    """The documents in an order that depends on the seed and their contents alone."""
    return sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), key=str(seed).encode()).digest())


@functools.cache
def make_tokenizer(
    data: Path, domains: tuple[TextDomain, ...], vocab_size: int, bytes_per_domain: int = 200_000
) -> Tokenizer:
    """A byte-level BPE trained on an equal sample of every domain."""

    def sample() -> Iterator[str]:
        for domain in domains:
            taken = 0
            for text in read_texts(data, domain):
                yield text
                taken += len(text)
                if taken >= bytes_per_domain:
                    break

    return train_tokenizer(sample(), TrainConfig(vocab_size=vocab_size))


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> ArraySource:
    """Documents packed one after the other, each closed by the end-of-document token."""
    end = np.array([tokenizer.eos_id], dtype=np.int64)
    parts: list[NDArray[np.int64]] = []
    for ids in tokenizer.encode_batch(list(texts)):
        parts += [np.asarray(ids, dtype=np.int64), end]
    return ArraySource(np.concatenate(parts) if parts else end, text_bytes=sum(len(text.encode()) for text in texts))


def tokenised_domain(
    data: Path, domain: TextDomain, tokenizer: Tokenizer, *, train_tokens: int, heldout_documents: int, seed: int
) -> TokenisedDomain:
    """Cut a domain: the same held-out documents for every seed, and training documents up to a token budget.

    Raises:
        ValueError: the domain has fewer tokens than the budget.
    """
    ordered = shuffled(list(read_texts(data, domain)), seed=0)
    heldout, rest = ordered[:heldout_documents], shuffled(ordered[heldout_documents:], seed)
    chosen: list[str] = []
    tokens = 0
    for start in range(0, len(rest), ENCODED_AT_ONCE):
        some = rest[start : start + ENCODED_AT_ONCE]
        for ids, text in zip(tokenizer.encode_batch(some), some, strict=True):
            if tokens < train_tokens:
                chosen.append(text)
                tokens += len(ids) + 1
        if tokens >= train_tokens:
            break
    if tokens < train_tokens:
        raise ValueError(f"{domain.name} has {tokens} tokens; {train_tokens} were asked for")
    packed = encode(tokenizer, chosen)
    train = ArraySource(packed.read(0, train_tokens), text_bytes=packed.bytes * train_tokens // len(packed))
    return TokenisedDomain(domain.name, train, encode(tokenizer, heldout), tuple(chosen))


def tokenised_domains(
    data: Path,
    domains: Sequence[TextDomain],
    tokenizer: Tokenizer,
    *,
    train_tokens: Sequence[int],
    heldout_documents: int,
    seed: int,
) -> tuple[TokenisedDomain, ...]:
    """Cut several domains, each to a budget of its own; see `tokenised_domain`."""
    return tuple(
        tokenised_domain(data, domain, tokenizer, train_tokens=budget, heldout_documents=heldout_documents, seed=seed)
        for domain, budget in zip(domains, train_tokens, strict=True)
    )


def histogram(domain_texts: Sequence[Sequence[str]], target_texts: Sequence[str], *, seed: int) -> tuple[float, ...]:
    """Share of the target's documents nearest to each domain's mean embedding: the importance-sampling mixture."""
    everything = [text for texts in domain_texts for text in texts]
    embedder = make_embedder(EmbedderConfig(), everything, seed)
    labels = np.repeat(np.arange(len(domain_texts)), [len(texts) for texts in domain_texts])
    embeddings_NE = embedder.embed(everything)
    means_DE = domain_means(embeddings_NE, labels, len(domain_texts))
    nearest_N = nearest(embedder.embed(list(target_texts)), means_DE)
    return tuple(domain_histogram(nearest_N, len(domain_texts)).tolist())
