"""Prepared data: the folder preparation leaves, opened and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weftlm.config import differences, settings
from weftlm.corpora.store import TokenStore, open_stores
from weftlm.corpora.tokens import TextLoss, Tokenizer
from weftlm.domains.domain import Domain, TokenPrefix
from weftlm.errors import DataError
from weftlm.files import check_listed, check_sealed, checksum, read_object
from weftlm.pipeline.data_config import TARGET_DOMAIN, DataConfig
from weftlm.pipeline.identity import MANIFEST, REMEDY, STEPS_VERSION

TARGET_SET = "target"
"""Name of the target's own set among those of the domains."""
FATES = ("read", "kept", "duplicates", "in_target", "faulty")
"""What the documents of a set are counted by."""
_OTHER_SETS = {"target": TARGET_SET, "target_heldout": "target, held-out", "heldout": "held-out text"}
LOST_ACCEPTED = 0.001
"""Share of bytes or tokens lost by the tokenizer up to which bits per byte holds."""


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
        fingerprint: hash of all of the above.
        manifest: prepared.json: resolved configuration, inputs, reading reports, duplicates, warnings.
    """

    folder: Path
    domains: list[Domain]
    target_train: TokenStore | None
    target_heldout: TokenStore | None
    tokenizer: Tokenizer
    target_histogram_D: Tensor | None
    basis_ND: Tensor | None
    fingerprint: str
    manifest: Mapping[str, Any] = field(repr=False)

    @classmethod
    def load(cls, folder: str | Path, expect: DataConfig | None = None) -> PreparedData:
        """Open a prepared folder, checking every file against its index.

        Args:
            folder: Folder that `prepare` wrote.
            expect: Configuration it must have been prepared with; None accepts any.
        Raises:
            DataError: the folder is missing, incomplete, changed, or of another configuration.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        prepared_as = manifest["identity"]["data"]
        if expect is not None and (changed := differences(prepared_as, settings(expect), "data")):
            raise DataError(f"{folder} was prepared with another configuration ({changed}); {REMEDY}")
        check_listed(folder, manifest["files"], REMEDY)
        result = assemble(folder, manifest)
        if fingerprint(result) != manifest["fingerprint"]:
            raise DataError(f"{folder} is not what {MANIFEST} describes: a part was replaced; {REMEDY}")
        return result

    def summary(self) -> dict[str, Any]:
        """Sizes per set, what became of the documents read, and what was skipped, dropped or warned of, as JSON.

        `documents` counts those read, kept, dropped as duplicates, dropped because the target has them, and faulty: by
        domain, also of domains of which nothing is left (of clusters: in all), and of the other sets.
        """
        sets: dict[str, dict[str, int | float]] = {
            domain.name: {
                "documents": domain.documents,
                "bytes": domain.bytes,
                "train_tokens": len(domain.train),
                "heldout_tokens": 0 if domain.heldout is None else len(domain.heldout),
            }
            for domain in self.domains
        }
        if self.target_train is not None:
            sets[TARGET_SET] = {
                "documents": self.target_train.documents,
                "bytes": self.target_train.bytes,
                "train_tokens": len(self.target_train),
                "heldout_tokens": 0 if self.target_heldout is None else len(self.target_heldout),
            }
        for name, loss in self.manifest["text_loss"].items():
            found = TextLoss(**loss)
            if name in sets:
                sets[name] |= {"given_back": found.given_back_share, "unknown": found.unknown_share}
        documents = dict(sorted(self.manifest["counts"]["corpora"].items()))
        for key, name in _OTHER_SETS.items():
            if of_set := self.manifest["counts"][key].values():
                documents[name] = {fate: sum(tally.get(fate, 0) for tally in of_set) for fate in FATES}
        return {
            "fingerprint": self.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            "sets": sets,
            "documents": {name: {fate: tally.get(fate, 0) for fate in FATES} for name, tally in documents.items()},
            "reading": self.manifest["reading"],
            "duplicates": self.manifest["duplicates"],
            "warnings": self.manifest["warnings"],
        }

    def domain_facts(self) -> list[dict[str, Any]]:
        """For each domain: sizes, typical documents (origin, excerpt, distance), nearest neighbours by cosine."""
        sizes = self.summary()["sets"]
        return [{**sizes[facts["name"]], **facts} for facts in self.manifest["facts"]]


def assemble(folder: Path, manifest: Mapping[str, Any]) -> PreparedData:
    """Open the parts a manifest names.

    A manifest without a fingerprint, one in the making, is given the fingerprint of its parts.

    Raises:
        DataError: a part is missing, changed or made with another tokenizer.
    """
    check_sealed(folder / "tokenizer", REMEDY, closed=True)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if tokenizer.fingerprint != manifest["tokenizer"]:
        raise DataError(f"tokenizer in {folder} has changed since it was written; {REMEDY}")
    train = open_stores(folder / "train", tokenizer=tokenizer.fingerprint)
    heldout, target = (
        open_stores(folder / name, tokenizer=tokenizer.fingerprint) if (folder / name).is_dir() else {}
        for name in ("heldout", "target")
    )
    for name, loss in manifest["text_loss"].items():
        held_of_it = target.get("heldout") if name == TARGET_SET else heldout.get(name)
        if held_of_it is not None and TextLoss(**loss).lost > LOST_ACCEPTED:
            held_of_it.forget_bytes()
    histogram, basis = manifest["target_histogram_D"], manifest["basis_ND"]
    domains = [
        _domain(name, manifest["max_train_tokens"], train, heldout, target.get("train")) for name in manifest["domains"]
    ]
    result = PreparedData(
        folder=folder,
        domains=domains,
        target_train=target.get("train"),
        target_heldout=target.get("heldout"),
        tokenizer=tokenizer,
        target_histogram_D=None if histogram is None else torch.tensor(histogram, dtype=torch.float64),
        basis_ND=None if basis is None else torch.tensor(basis, dtype=torch.float64),
        fingerprint=manifest.get("fingerprint", ""),
        manifest=manifest,
    )
    return result if result.fingerprint else dataclasses.replace(result, fingerprint=fingerprint(result))


def _domain(
    name: str,
    cap: int | None,
    train: Mapping[str, TokenStore],
    heldout: Mapping[str, TokenStore],
    target_train: TokenStore | None,
) -> Domain:
    store = target_train if name == TARGET_DOMAIN else train.get(name)
    if store is None:
        raise DataError(f"domain {name!r} has no token store; {REMEDY}")
    source = TokenPrefix(store, cap) if cap is not None and cap < len(store) else store
    return Domain(name, source, heldout.get(name), store.documents, store.bytes)


def fingerprint(data: PreparedData) -> str:
    """Hash of tokenizer, domains in order, their tokens, the target's, its histogram and the basis."""
    parts: list[Any] = [data.tokenizer.fingerprint]
    for domain in data.domains:
        held = None if domain.heldout is None else domain.heldout.fingerprint
        parts.append([domain.name, domain.train.fingerprint, held])
    parts += [None if store is None else store.fingerprint for store in (data.target_train, data.target_heldout)]
    parts += [None if value is None else value.tolist() for value in (data.target_histogram_D, data.basis_ND)]
    return checksum(parts)


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
