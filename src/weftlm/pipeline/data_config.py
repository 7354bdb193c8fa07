"""The `data` section of a recipe: what is read, how it becomes domains, what is held out; and what prepared data is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from weftlm.config import Section, Seed, settings
from weftlm.corpora.config import CorpusConfig, TokenizerConfig
from weftlm.corpora.reading import corpus_fingerprint
from weftlm.domains.config import ClusterConfig, EmbedderConfig
from weftlm.domains.split import SplitConfig
from weftlm.errors import DataError

TARGET_SET = "target"
"""Name of the target's own set among those of the domains."""
TARGET_DOMAIN = "target_examples"
"""Name of the domain made of the target's own training documents, where a recipe asks for it."""
OTHER_DOMAIN = "other"
"""Name of the domain that takes the documents of domains too small for their own."""
SETS = ("target_heldout", "target", "heldout", "corpora")
"""Sets of documents; a text that several of them hold stays in the first."""
MANIFEST = "prepared.json"
STEPS_VERSION = 5
"""Raised whenever the same configuration and inputs would be prepared differently."""
REMEDY = "prepare again with rebuild (weftlm prepare --rebuild)"


class BasisConfig(Section):
    """N distributions over the domains, for policies that reweight distributions instead of domains.

    Attributes:
        of: `target_shards`: histograms of `count` shards of the target's training documents. `sets`: one histogram per
            entry of `sets`. `groups`: `count` groups of similar domains, weighed by size within a group.
        count: N, for target_shards and groups.
        sets: auxiliary sets of documents; they are only embedded, never trained on.
        smoothing: share of the uniform distribution mixed into each.
    """

    of: Literal["target_shards", "sets", "groups"]
    count: int | None = Field(default=None, ge=1)
    sets: tuple[CorpusConfig, ...] = ()
    smoothing: float = Field(default=0.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _count_or_sets(self) -> BasisConfig:
        if (self.of == "sets") != bool(self.sets) or (self.of == "sets") == (self.count is not None):
            raise ValueError("of: sets needs a list of sets and no count; the others need a count and no sets")
        return self


class DomainsConfig(Section):
    """What a domain is.

    Attributes:
        by: `label`: the label the corpus gave. `file`: the file's name. `clusters`: discovered by embedding.
        clusters: how many and how, with by: clusters.
        embedder: vectors for clustering, for the target's histogram and for `weftlm domains`.
        include_target: make the target's training documents a domain too (`target_examples`).
        max_train_tokens: at most so many training tokens per domain of the corpora, a random choice of its documents;
            the last one is cut, an example left out.
        min_tokens: training tokens below which a domain is too small.
        small: what becomes of domains that are too small: `stop` with an error that names them all, `drop` them, or put
            their documents into one domain called `other`.
        histogram_smoothing: share of the uniform distribution mixed into the target's histogram.
        basis: distributions to reweight, for policies that ask for them.
    """

    by: Literal["label", "file", "clusters"] = "label"
    clusters: ClusterConfig | None = None
    embedder: EmbedderConfig = EmbedderConfig()
    include_target: bool = False
    max_train_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=1, ge=1)
    small: Literal["stop", "drop", "other"] = "stop"
    histogram_smoothing: float = Field(default=0.0, ge=0.0, le=1.0)
    basis: BasisConfig | None = None

    @model_validator(mode="after")
    def _clusters_go_with_by(self) -> DomainsConfig:
        if (self.by == "clusters") != (self.clusters is not None):
            raise ValueError("clusters goes with by: clusters, and is needed there")
        if self.by == "clusters" and self.small != "stop":
            raise ValueError("small goes with by: label or file; of clusters, clusters.min_bytes dissolves small ones")
        return self


class DataConfig(Section):
    """What a run reads and how it is prepared.

    A text that several sets hold stays in the first of: target_heldout, target, heldout, corpora.

    Attributes:
        corpora: the generic text, from which domains are made.
        target: documents of the task the model is for; none where no policy and no evaluation asks.
        heldout: held-out text of the domains; without it `split` takes some of the corpora.
        target_heldout: held-out text of the target; without it `target_split` takes some of the target.
        split: what is held out of each domain.
        target_split: what is held out of the target.
        target_train_documents: use only so many of the target's remaining documents, chosen at random; fewer are
            always contained in more.
        tokenizer: train one on the training text, or take one.
        domains: what a domain is.
        seed: random seed of every choice in preparation.
    """

    corpora: tuple[CorpusConfig, ...] = Field(min_length=1)
    target: tuple[CorpusConfig, ...] = ()
    heldout: tuple[CorpusConfig, ...] = ()
    target_heldout: tuple[CorpusConfig, ...] = ()
    split: SplitConfig = SplitConfig()
    target_split: SplitConfig = SplitConfig(fraction=0.2)
    target_train_documents: int | None = Field(default=None, ge=1)
    tokenizer: TokenizerConfig = TokenizerConfig()
    domains: DomainsConfig = DomainsConfig()
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if not self.target:
            wanting = {
                "target_heldout": bool(self.target_heldout),
                "target_train_documents": self.target_train_documents is not None,
                "domains.include_target": self.domains.include_target,
                "domains.basis of target_shards": (
                    self.domains.basis is not None and self.domains.basis.of == "target_shards"
                ),
            }
            for name, wanted in wanting.items():
                if wanted:
                    raise ValueError(f"{name} needs a target; set data.target")
        if self.domains.by == "file" and any(corpus.path is None for corpus in (*self.corpora, *self.heldout)):
            raise ValueError("domains.by: file needs corpora that are files (path); use by: label or by: clusters")
        return self

    def inputs(self) -> dict[str, CorpusConfig]:
        """Every input, by the key under which its state is part of the identity of prepared data."""
        sets = {name: getattr(self, name) for name in SETS}
        if self.domains.basis is not None:
            sets["domains.basis.sets"] = self.domains.basis.sets
        return {
            f"{name}.{number} ({corpus.name})": corpus
            for name, corpora in sets.items()
            for number, corpus in enumerate(corpora)
        }

    def labelled(self, name: str) -> list[CorpusConfig]:
        """The inputs of a set, with the labels of which domains are made."""
        by_file = self.domains.by == "file" and name in ("corpora", "heldout")
        changed = {"label": None, "label_field": None, "label_from": "file"} if by_file else {}
        return [corpus.model_copy(update=changed) for corpus in getattr(self, name)]


def data_identity(config: DataConfig) -> dict[str, Any]:
    """All that decides prepared data: the configuration, the state of the inputs, and the version of the steps.

    Raises:
        DataError: An input is missing.
    """
    inputs = {key: corpus_fingerprint(corpus) for key, corpus in config.inputs().items()}
    return {"data": settings(config), "inputs": inputs, "steps": STEPS_VERSION}


def refuse_reserved(names: Iterable[str]) -> None:
    """Refuse names of domains that mean something else.

    Raises:
        DataError: The first of them.
    """
    if reserved := sorted({TARGET_SET, TARGET_DOMAIN}.intersection(names)):
        raise DataError(
            f"a domain may not be called {reserved[0]!r}, which names the target's own set; rename the label"
        )
