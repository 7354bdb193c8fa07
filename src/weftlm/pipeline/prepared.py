"""Prepared data: the folder preparation leaves, opened and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weftlm.corpora.store import TokenStore, open_stores
from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import ConfigError, DataError
from weftlm.files import check_listed, check_sealed, checksum, read_object
from weftlm.pipeline.data_config import MANIFEST, REMEDY, STEPS_VERSION, TARGET_DOMAIN, TARGET_SET

FATES = ("read", "kept", "duplicates", "in_target", "faulty")
"""What the documents of a set are counted by."""


class Domain(NamedTuple):
    """A named part of the corpus.

    Attributes:
        name: Its name, unique among the domains.
        train: Its training tokens.
        heldout: Its held-out tokens, or None where it has too few documents to hold any out.
    """

    name: str
    train: TokenStore
    heldout: TokenStore | None


@dataclass(frozen=True)
class PreparedData:
    """Everything a run needs of its data.

    Attributes:
        folder: Its folder.
        domains: The D domains, in order.
        target_train: Training tokens of the target; None without a target.
        target_heldout: Held-out tokens of the target; None where there are none.
        tokenizer: Tokenizer of the tokens.
        target_histogram_D: share of the target's training documents nearest to each domain, float64; None without a
            target.
        basis_ND: distributions over the domains, float64; None where the recipe asks for none.
        manifest: prepared.json: resolved configuration, inputs, reading reports, duplicates, warnings.
    """

    folder: Path
    domains: list[Domain]
    target_train: TokenStore | None
    target_heldout: TokenStore | None
    tokenizer: Tokenizer
    target_histogram_D: Tensor | None
    basis_ND: Tensor | None
    manifest: Mapping[str, Any] = field(repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> PreparedData:
        """Open a prepared folder, checking every file against its index.

        Raises:
            DataError: the folder is missing, incomplete or changed.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        check_listed(folder, manifest["files"], REMEDY)
        check_sealed(folder / "tokenizer", REMEDY, closed=True)
        tokenizer = Tokenizer.load(folder / "tokenizer")
        train, heldout = (
            open_stores(folder / name, tokenizer=tokenizer.fingerprint) if (folder / name).is_dir() else {}
            for name in ("train", "heldout")
        )
        domains = [
            Domain(name, train[name], None if name == TARGET_DOMAIN else heldout.get(name))
            for name in manifest["domains"]
        ]
        histogram, basis = (
            None if manifest[key] is None else torch.tensor(manifest[key], dtype=torch.float64)
            for key in ("target_histogram_D", "basis_ND")
        )
        target = train.get(TARGET_DOMAIN), heldout.get(TARGET_DOMAIN)
        return cls(folder, domains, *target, tokenizer, histogram, basis, manifest)

    @property
    def fingerprint(self) -> str:
        """Hash of tokenizer, domains in order, their tokens, the target's, its histogram and the basis."""
        parts: list[Any] = [self.tokenizer.fingerprint]
        for domain in self.domains:
            held = None if domain.heldout is None else domain.heldout.fingerprint
            parts.append([domain.name, domain.train.fingerprint, held])
        parts += [None if store is None else store.fingerprint for store in (self.target_train, self.target_heldout)]
        parts += [None if value is None else value.tolist() for value in (self.target_histogram_D, self.basis_ND)]
        return checksum(parts)

    def heldout(self) -> dict[str, TokenStore]:
        """Held-out tokens by domain.

        Raises:
            ConfigError: Nothing is held out, of the target neither.
        """
        found = {domain.name: domain.heldout for domain in self.domains if domain.heldout is not None}
        if self.target_heldout is None and not found:
            raise ConfigError("nothing is held out to evaluate on; raise data.split.fraction, or give data.heldout")
        return found

    def summary(self) -> dict[str, Any]:
        """Sizes per set, what became of the documents read, and what was skipped, dropped or warned of, as JSON.

        `documents` counts those read, kept, dropped as duplicates, dropped because the target has them, and faulty: by
        domain, also of domains of which nothing is left (of clusters: in all), and of the other sets.
        """
        stores = {name: (train, heldout) for name, train, heldout in self.domains}
        if self.target_train is not None:
            stores[TARGET_SET] = self.target_train, self.target_heldout
        sets = {
            name: {
                "documents": train.documents,
                "bytes": train.bytes,
                "train_tokens": len(train),
                "heldout_tokens": 0 if heldout is None else len(heldout),
                **self.manifest["text_loss"].get(name, {}),
            }
            for name, (train, heldout) in stores.items()
        }
        return {
            "fingerprint": self.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            "sets": sets,
            **{key: self.manifest[key] for key in ("documents", "reading", "duplicates", "warnings")},
        }

    def domain_facts(self) -> list[dict[str, Any]]:
        """For each domain: sizes, typical documents (origin, excerpt, distance), nearest neighbours by cosine."""
        sizes = self.summary()["sets"]
        return [{**sizes[facts["name"]], **facts} for facts in self.manifest["facts"]]


def read_manifest(folder: Path) -> dict[str, Any]:
    """prepared.json, checked against its own checksum.

    Raises:
        DataError: it is missing, torn, changed or of another version.
    """
    found = read_object(folder / MANIFEST, REMEDY)
    if found is None:
        raise DataError(f"{folder} holds no prepared data ({MANIFEST} is missing); run weftlm prepare")
    if found.get("identity", {}).get("steps") != STEPS_VERSION:
        raise DataError(f"{folder / MANIFEST} is of another version of weftlm; {REMEDY}")
    return found
