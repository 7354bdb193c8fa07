"""A library of experts: a folder that many processes may add to and that never shows half an expert.

    library.json                  format, base, and each expert's folder, files (bytes, BLAKE2b), base and date
    NAME/                         one expert
      adapter_model.safetensors   the adapter, in PEFT's format: PeftModel.from_pretrained(base, library / NAME) works
      adapter_config.json
      card.json
      gate.safetensors            optional
      statistics.safetensors      optional

Replacing `library.json` by rename is the one moment at which a change happens. New files are written beside the old,
and what a crash leaves over is removed by the next write. An expert that replaces another lies in `NAME~2`, since files
that the manifest lists are never touched; `ExpertLibrary.path` tells where an expert is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftlm.artifact import locked
from weftlm.corpora.labels import MAX_NAME, expert_name, folder_name, is_name
from weftlm.errors import DataError, ExpertError, did_you_mean, reason
from weftlm.experts.expert import BaseReference, Expert, Gate, LoRAExpert, Statistics, base_name, is_folder
from weftlm.experts.files import (
    CONFIG,
    GATE,
    STATISTICS,
    WEIGHTS,
    describe,
    explained_writing,
    sync_folder,
    to_json,
    write_file,
)
from weftlm.files import parse_json, read_object, remove, write_object
from weftlm.places import locate

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

FORMAT = "weftlm expert library 1"
MANIFEST, CARD = "library.json", "card.json"

_LOCK = ".lock"
_WRITING = ".writing-"
_UNLISTED = ".unlisted"
"""Marks an expert's folder while the manifest does not list it, before an addition and after a removal."""

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FOLDER = re.compile(r"(?P<name>[^~/]+)(~[0-9]+)?")
_AGAIN = "remove it and add it again"


class ExpertLibrary:
    """The experts in a folder; see the top of this file for how they lie there.

    Every call reads the manifest afresh, so an object sees what other processes add. Attributes `folder` and `base` do
    not change.
    """

    def __init__(self, folder: Path, base: BaseReference) -> None:
        """Use `create`, `open` or `open_or_create`."""
        self.folder = folder
        self.base = base

    @classmethod
    def create(cls, folder: Path, base: BaseReference) -> ExpertLibrary:
        """Start an empty library for a base model.

        Raises:
            ExpertError: the folder already holds a library, or cannot be written.
        """
        library = cls(Path(folder), base)
        with library._locked(f"library {folder}", make=True):
            if (library.folder / MANIFEST).exists():
                raise ExpertError(f"{folder} already holds an expert library; open it or choose another folder")
            library._commit({})
        return library

    @classmethod
    def open(cls, folder: Path) -> ExpertLibrary:
        """Open a library.

        Raises:
            ExpertError: there is none, its manifest is broken, or it is of another format.
        """
        manifest = _read_manifest(Path(folder))
        return cls(Path(folder), _parse_base(f"library {folder}", manifest.get("base")))

    @classmethod
    def open_or_create(cls, folder: Path, base: BaseReference) -> ExpertLibrary:
        """Open a library, or start one where there is none.

        Raises:
            ExpertError: there is one for another base, or it is broken.
        """
        library = cls(Path(folder), base)
        with library._locked(f"library {folder}", make=True):
            if not (library.folder / MANIFEST).exists():
                library._commit({})
                return library
        library = cls.open(folder)
        _check_base(f"the base {base.name!r}", base, library.base, Path(folder))
        return library

    @property
    def names(self) -> list[str]:
        """Names of the experts, sorted."""
        return sorted(self._entries())

    def __len__(self) -> int:
        """How many experts there are."""
        return len(self._entries())

    def __contains__(self, name: object) -> bool:
        return name in self._entries()

    def path(self, name: str) -> Path:
        """The folder of an expert, readable by `PeftModel.from_pretrained`.

        Raises:
            ExpertError: there is no such expert, or its entry leads out of the library.
        """
        return self._folder(name, _find(name, self._entries()))

    def named(self, name: str) -> str:
        """The name of an expert that is given by its name or by its domain's label.

        Raises:
            ExpertError: there is no such expert.
        """
        entries = self._entries()
        known = expert_name(name)
        _find(known, entries)
        return known

    def has_gate(self, name: str) -> bool:
        """Whether an expert has a gate."""
        return GATE in _files(name, _find(name, self._entries()))

    def has_statistics(self, name: str) -> bool:
        """Whether an expert has statistics."""
        return STATISTICS in _files(name, _find(name, self._entries()))

    def add(self, *experts: Expert, replace: bool = False) -> None:
        """Add experts, all of them or none; no other expert's files are touched. The very same again changes nothing.

        Raises:
            ExpertError: a name is taken (and not `replace`) or not allowed, an expert is of another base or unsound, or
                the library cannot be written.
        """
        from weftlm.experts.companions import encode_gate, encode_statistics  # noqa: PLC0415 - torch; listing a library needs none
        from weftlm.experts.lora import lora_files  # noqa: PLC0415 - torch; listing a library needs none

        contents: dict[str, dict[str, bytes]] = {}
        for expert in experts:
            check_name(expert.name)
            _check_base(f"expert {expert.name!r}", expert.lora.base, self.base, self.folder)
            files = lora_files(expert.lora)
            files[CARD] = (to_json(expert.name, "its card", expert.card) + "\n").encode()
            if expert.gate is not None:
                files[GATE] = encode_gate(expert.lora, expert.gate)
            if expert.statistics is not None:
                files[STATISTICS] = encode_statistics(expert.lora, expert.statistics)
            contents[expert.name] = files
        with self._locked(f"expert {', '.join(map(repr, contents))}"):
            entries, added = self._entries(), dict[str, Any]()
            for expert in experts:
                name, files = expert.name, contents[expert.name]
                about = {
                    "files": {file: describe(data) for file, data in sorted(files.items())},
                    "base": asdict(expert.lora.base),
                }
                if name in entries and not replace:
                    if about.items() <= entries[name].items():
                        continue
                    raise ExpertError(
                        f"expert {name!r} is already in {self.folder}; choose another name, or remove that one first "
                        f"(weftlm experts remove {self.folder} {name})"
                    )
                twin = next((known for known in entries if known.lower() == name.lower() and known != name), None)
                if twin is not None:
                    raise ExpertError(
                        f"expert {name!r} differs from {twin!r} only in case, which some file systems cannot tell "
                        f"apart; choose another name"
                    )
                now = datetime.now(UTC).isoformat(timespec="seconds")
                added[name] = {"folder": self._free_folder(name), **about, "added": now}
                self._build(added[name]["folder"], partial(_write_all, files=files))
            if added:
                self._publish(added, entries)

    def remove(self, *names: str) -> None:
        """Take experts out and delete their files, all or none; no other expert's files are touched.

        Raises:
            ExpertError: there is no such expert, or the library cannot be written.
        """
        with self._locked(f"expert {', '.join(map(repr, names))}"):
            entries = self._entries()
            for name in names:
                self._mark(_find(name, entries))
            self._commit({name: entry for name, entry in entries.items() if name not in names})

    def load(self, name: str) -> Expert:
        """Load an expert, verified: lengths, digests, finiteness, and that gate and statistics fit the adapter.

        Raises:
            ExpertError: there is no such expert, or its files are missing, altered or unsound.
        """
        return self._load(name, _find(name, self._entries()))

    def load_all(self, names: Sequence[str] | None = None) -> tuple[list[Expert], dict[str, str]]:
        """Load experts, leaving out broken ones.

        Args:
            names: which, in this order; all where None.
        Returns:
            The experts that are whole, and for each other its name and what is wrong with it.
        Raises:
            ExpertError: a name is not in the library.
        """
        entries = self._entries()
        experts, problems = [], {}
        for name, entry in [(name, _find(name, entries)) for name in (sorted(entries) if names is None else names)]:
            try:
                experts.append(self._load(name, entry))
            except ExpertError as error:
                problems[name] = str(error)
        return experts, problems

    def load_fitting(
        self, model: nn.Module, names: Sequence[str] | None = None, *, fingerprint: str | None = None
    ) -> tuple[list[Expert], dict[str, str]]:
        """Load the experts that can be used on a base.

        Args:
            model: the base.
            names: which, by name or label, in this order; all where None, and then those that are broken or of another
                base are left out with a warning.
            fingerprint: of the base, where it can be compared.
        Returns:
            The experts, and for each one left out its name and what is wrong with it.
        Raises:
            ExpertError: an expert that is named cannot be used, or none can.
        """
        from weftlm.experts.lora import check_fits  # noqa: PLC0415 - torch; listing a library needs none

        chosen, problems = self.load_all(None if names is None else [self.named(name) for name in names])
        fitting = []
        for expert in chosen:
            try:
                check_fits(expert.lora, model, fingerprint=fingerprint)
                fitting.append(expert)
            except ExpertError as error:
                problems[expert.name] = str(error)
        if problems and (names is not None or not fitting):
            others = f"; can be used: {', '.join(expert.name for expert in fitting)}" if fitting else ""
            reasons = "; ".join(problems.values())
            raise ExpertError(
                f"{len(problems)} of {len(problems) + len(fitting)} experts cannot be used ({reasons}){others}"
            )
        for name, why in problems.items():
            log.warning("expert %r is left out: %s", name, why)
        return fitting, problems

    def set_gate(self, name: str, gate: Gate) -> None:
        """Give an expert a gate, in place of one it may have.

        Raises:
            ExpertError: there is no such expert, it is broken, or the gate does not fit it.
        """
        from weftlm.experts.companions import encode_gate  # noqa: PLC0415 - torch; listing a library needs none

        self._set(name, GATE, lambda lora: encode_gate(lora, gate))

    def set_statistics(self, name: str, statistics: Statistics) -> None:
        """Give an expert statistics, in place of those it may have.

        Raises:
            ExpertError: there is no such expert, it is broken, or the statistics do not fit it.
        """
        from weftlm.experts.companions import encode_statistics  # noqa: PLC0415 - torch; listing a library needs none

        self._set(name, STATISTICS, lambda lora: encode_statistics(lora, statistics))

    def card(self, name: str) -> dict[str, Any]:
        """An expert's card, without loading its tensors.

        Raises:
            ExpertError: there is no such expert, or its card is missing or altered.
        """
        entry = _find(name, self._entries())
        return _parse_card(name, self._read(name, self._folder(name, entry), CARD, _files(name, entry)))

    def import_peft(
        self,
        source: str | Path,
        *,
        name: str | None = None,
        revision: str | None = None,
        model: nn.Module | None = None,
        assume_base: bool = False,
    ) -> Expert:
        """Add a PEFT LoRA adapter from a local folder or the Hugging Face hub; see `read_peft`.

        Returns:
            The expert as added.
        Raises:
            ExpertError: as `read_peft` and `add`.
        """
        expert = read_peft(
            str(source), self.base, name=name, revision=revision, model=model, assume_base=assume_base
        )  # fmt: skip
        self.add(expert)
        return expert

    def fingerprint(self, names: Sequence[str] | None = None) -> str:
        """Fingerprint of some experts' adapters, gates and statistics, from the manifest; cards do not count.

        Args:
            names: which, in any order; all where None.
        Returns:
            32 hexadecimal digits.
        Raises:
            ExpertError: a name is not in the library, or its entry is broken.
        """
        entries = self._entries()
        contents = {
            name: {file: facts["blake2b"] for file, facts in _files(name, _find(name, entries)).items() if file != CARD}
            for name in (entries if names is None else names)
        }
        return hashlib.blake2b(json.dumps(contents, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = _read_manifest(self.folder)["experts"]
        return entries

    def _load(self, name: str, entry: Any) -> Expert:
        """Load an entry, or the one that has taken its place meanwhile."""
        while True:
            try:
                return self._load_entry(name, entry)
            except ExpertError:
                now = self._entries().get(name)
                if now is None or now == entry:
                    raise
                entry = now

    def _load_entry(self, name: str, entry: Any) -> Expert:
        data = self._contents(name, entry)
        lora = self._parse_lora(name, entry, data)
        if CARD not in data:
            raise ExpertError(f"expert {name!r}: {MANIFEST} lists no {CARD}; {_AGAIN}")

        from weftlm.experts.companions import decode_gate, decode_statistics  # noqa: PLC0415 - torch; listing a library needs none

        return Expert(
            lora,
            decode_gate(lora, data[GATE]) if GATE in data else None,
            decode_statistics(lora, data[STATISTICS]) if STATISTICS in data else None,
            _parse_card(name, data[CARD]),
        )

    def base_of(self, name: str) -> BaseReference:
        """The base that an expert was added for."""
        return _parse_base(f"expert {name!r}", _find(name, self._entries()).get("base"))

    def contents(self, name: str) -> dict[str, bytes]:
        """What an expert's files hold, as long and with the digests the manifest says.

        Raises:
            ExpertError: there is no such expert, or its files are missing or altered.
        """
        return self._contents(name, _find(name, self._entries()))

    def _contents(self, name: str, entry: Any) -> dict[str, bytes]:
        listed, folder = _files(name, entry), self._folder(name, entry)
        return {file: self._read(name, folder, file, listed) for file in listed}

    def _parse_lora(self, name: str, entry: Mapping[str, Any], data: Mapping[str, bytes]) -> LoRAExpert:
        for file in (CONFIG, WEIGHTS):
            if file not in data:
                raise ExpertError(f"expert {name!r}: {MANIFEST} lists no {file}; {_AGAIN}")
        from weftlm.experts.lora import parse_lora  # noqa: PLC0415 - torch; listing a library needs none

        lora = parse_lora(name, data[CONFIG], data[WEIGHTS])
        return replace(lora, base=_parse_base(f"expert {name!r}", entry.get("base")))

    def _folder(self, name: str, entry: Any) -> Path:
        """The folder of an entry, which lies in the library."""
        folder = str(entry.get("folder")) if isinstance(entry, dict) else ""
        match = _FOLDER.fullmatch(folder)
        if match is None or match["name"] != name or (self.folder / folder).resolve() != self.folder.resolve() / folder:
            raise ExpertError(
                f"expert {name!r}: {MANIFEST} puts it in {folder!r}, which is not its folder in the library; {_AGAIN}"
            )
        return self.folder / folder

    def _read(self, name: str, folder: Path, file: str, listed: Mapping[str, Any]) -> bytes:
        """A listed file, as long and with the digest the manifest says."""
        if file not in listed:
            raise ExpertError(f"expert {name!r}: {MANIFEST} lists no {file}; {_AGAIN}")
        try:
            facts = (folder / file).lstat()
            if not stat.S_ISREG(facts.st_mode):
                raise ExpertError(
                    f"expert {name!r}: {file} is a link or no plain file, which is not followed; {_AGAIN}"
                )
            if facts.st_size != listed[file]["bytes"]:
                raise ExpertError(
                    f"expert {name!r}: {file} has {facts.st_size} bytes, {MANIFEST} says {listed[file]['bytes']}; "
                    f"{_AGAIN}"
                )
            data = (folder / file).read_bytes()
        except OSError as error:
            raise ExpertError(f"expert {name!r}: cannot read {folder / file}: {error.strerror}; {_AGAIN}") from error
        if describe(data) != listed[file]:
            raise ExpertError(f"expert {name!r}: {file} is not what was written (its digest differs); {_AGAIN}")
        return data

    def _set(self, name: str, file: str, encode: Callable[[LoRAExpert], bytes]) -> None:
        """Add a file to an expert, or put another in its place."""
        with self._locked(f"expert {name!r}"):
            entries = self._entries()
            entry = _find(name, entries)
            listed, folder = _files(name, entry), self._folder(name, entry)
            adapter = {part: self._read(name, folder, part, listed) for part in (CONFIG, WEIGHTS)}
            data = encode(self._parse_lora(name, entry, adapter))
            entry = {**entry, "files": dict(sorted({**listed, file: describe(data)}.items()))}
            if file not in listed:
                temporary = self._temporary(file)
                write_file(temporary, data)
                temporary.replace(folder / file)
                sync_folder(folder)
                self._commit({**entries, name: entry})
                return

            def build(target: Path) -> None:
                for part in listed:
                    if part != file:
                        _link(folder / part, target / part)
                write_file(target / file, data)

            entry["folder"] = self._free_folder(name)
            self._build(entry["folder"], build)
            self._publish({name: entry}, entries)

    def _build(self, folder: str, fill: Callable[[Path], None]) -> None:
        """Make and fill a folder that no entry points to yet."""
        temporary = self._temporary(folder)
        temporary.mkdir()
        write_file(temporary / _UNLISTED, b"")
        fill(temporary)
        sync_folder(temporary)
        temporary.rename(self.folder / folder)

    def _publish(self, added: Mapping[str, Mapping[str, Any]], entries: Mapping[str, Any]) -> None:
        """Let the manifest point to new folders, in place of those it may point to now."""
        for name in added.keys() & entries.keys():
            self._mark(entries[name])
        self._commit({**entries, **added})

    def _mark(self, entry: Any) -> None:
        """Mark the folder of an entry for removal, which happens once no entry points to it."""
        folder = entry.get("folder") if isinstance(entry, dict) else None
        if isinstance(folder, str) and _FOLDER.fullmatch(folder) and not (self.folder / folder).is_symlink():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (self.folder / folder / _UNLISTED).touch()

    def _commit(self, entries: Mapping[str, Any]) -> None:
        """Replace the manifest: the moment at which a change happens."""
        manifest = {"format": FORMAT, "base": asdict(self.base), "experts": dict(sorted(entries.items()))}
        write_object(self.folder / MANIFEST, manifest, sync=True)
        sync_folder(self.folder)

    def _temporary(self, name: str) -> Path:
        return self.folder / f"{_WRITING}{name}-{secrets.token_hex(4)}"

    def _free_folder(self, name: str) -> str:
        """The expert's name, or that with ~2, ~3, ... where a folder is in use or somebody else's."""
        candidates = chain([name], (f"{name}~{number}" for number in count(2)))
        return next(folder for folder in candidates if not os.path.lexists(self.folder / folder))

    @contextlib.contextmanager
    def _locked(self, what: str, *, make: bool = False) -> Iterator[None]:
        """Be the only writer; remove what is left over before and after, whether the body fails or not."""
        with explained_writing(what, self.folder):
            if make:
                self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / _LOCK, ExpertError, patience_s=math.inf):
                self._clean()
                try:
                    yield
                finally:
                    self._clean()

    def _clean(self) -> None:
        """Remove temporary files and marked folders that no entry points to; for the holder of the lock."""
        entries = self._entries() if (self.folder / MANIFEST).exists() else {}
        listed = {entry.get("folder") for entry in entries.values() if isinstance(entry, dict)}
        for path in self.folder.iterdir():
            if path.name.startswith(_WRITING):
                remove(path)
            elif (path / _UNLISTED).exists() and not path.is_symlink():
                if path.name in listed:
                    (path / _UNLISTED).unlink()
                else:
                    remove(path)


def check_name(name: str) -> None:
    """Check that an expert's name can be a folder's (`folder_name`).

    Raises:
        ExpertError: it is empty, too long, has other characters, or some systems keep it for themselves.
    """
    if not is_name(name):
        raise ExpertError(
            f"expert name {name!r:.200} is not allowed; use up to {MAX_NAME} letters, digits, '.', '_' and '-', the "
            f"first a letter or a digit, or the encoded form {folder_name(name)!r}"
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_object(folder / MANIFEST, "restore it from a copy")
    except DataError as error:
        raise ExpertError(f"library {folder}: {error}") from error
    if manifest is None:
        raise ExpertError(f"{folder} holds no expert library (no {MANIFEST}); create one, or check the path")
    found = manifest.get("format")
    if found != FORMAT:
        raise ExpertError(f"library {folder} has format {found!r}; this version reads {FORMAT!r}")
    if not isinstance(manifest.get("experts"), dict):
        raise ExpertError(f"library {folder}: {MANIFEST} lists no experts; restore it from a copy")
    return manifest


def _parse_base(where: str, value: Any) -> BaseReference:
    fields = value if isinstance(value, dict) else {}
    name, revision, fingerprint = (fields.get(key) for key in ("name", "revision", "fingerprint"))
    if not (isinstance(name, str) and isinstance(revision, str | None) and isinstance(fingerprint, str | None)):
        raise ExpertError(f"{where}: {MANIFEST} does not say which base it is for; restore it from a copy")
    return BaseReference(name, revision, fingerprint)


def _check_base(what: str, base: BaseReference, mine: BaseReference, folder: Path) -> None:
    """Refuse another base: by fingerprints where both have one, by name and revision otherwise."""
    if base.fingerprint is not None and mine.fingerprint is not None:
        if base.fingerprint != mine.fingerprint:
            raise ExpertError(
                f"{what} is of another base than library {folder}: {base.name or 'unnamed'} ({base.fingerprint}), not "
                f"{mine.name} ({mine.fingerprint}); use a library for each base"
            )
    elif not same_base(base, mine):
        raise ExpertError(
            f"{what} names the base {_told(base)}, library {folder} is for {_told(mine)}, and there are no "
            f"fingerprints to compare; use a library for each base"
        )


def same_base(one: BaseReference, other: BaseReference) -> bool:
    """Whether two references name one place; a revision counts where both give one."""
    revisions = {one.revision, other.revision} - {None}
    return base_name(one.name) == base_name(other.name) and len(revisions) < 2


def _told(base: BaseReference) -> str:
    return (base.name or "unnamed") + ("" if base.revision is None else f" (revision {base.revision})")


def read_peft(
    source: str,
    base: BaseReference,
    *,
    name: str | None = None,
    revision: str | None = None,
    model: nn.Module | None = None,
    assume_base: bool = False,
) -> Expert:
    """Read a PEFT LoRA adapter for a library, from a local folder or the Hugging Face hub; nothing pickled is fetched.

    An adapter is taken that names the library's base, or a folder that holds the same model, and whose modules and
    shapes are those of that base.

    Args:
        source: a folder, or a hub id such as `owner/adapter`.
        base: of the library.
        name: of the expert; the last part of `source` where None.
        revision: hub branch, tag or commit.
        model: the base, or its outline on the meta device; None where it is not at hand: modules and shapes are then
            checked when it is loaded.
        assume_base: take an adapter that names another base, or none, as made for this one; the card records it.
    Returns:
        The expert; its card tells the source, the commit, and the base it named where that was overruled.
    Raises:
        ExpertError: nothing is there, it is no plain LoRA, or it is of another base.
    """
    from weftlm.experts.lora import check_fits, read_lora  # noqa: PLC0415 - torch; listing a library needs none

    folder = Path(source).resolve()
    card: dict[str, Any] = {"source": source}
    name = folder_name(folder.name) if name is None else name
    check_name(name)
    if not is_folder(source):
        folder = fetch_adapter(source, revision)
        card["revision"] = folder.name
    lora = read_lora(folder, name)
    if not same_base(lora.base, base):
        if assume_base:
            card["assumed_base"] = {"named": lora.base.name or None, "revision": lora.base.revision}
        else:
            _require_same_model(lora, base)
    lora = replace(lora, base=base)
    if model is not None:
        check_fits(lora, model)
    return Expert(lora, card=card)


def _require_same_model(lora: LoRAExpert, base: BaseReference) -> None:
    """Refuse an adapter over another model than a library's base.

    Raises:
        ExpertError: its base is elsewhere, and no fingerprint says that it is the same model.
    """
    from weftlm.models.open import local_fingerprint  # noqa: PLC0415 - torch; listing a library needs none

    named = lora.base
    cure = (
        "use a library for each base; if it was made for this very model, say so (weftlm experts import --assume-base, "
        "or assume_base: true in experts.imports)"
    )
    if base.fingerprint is not None and is_folder(named.name):
        found = local_fingerprint(named.name)
        if found == base.fingerprint:
            return
        raise ExpertError(
            f"expert {lora.name!r} was made for another base: {named.name} has fingerprint {found}, the library's base "
            f"{base.name} {base.fingerprint}; {cure}"
        )
    raise ExpertError(
        f"expert {lora.name!r} {'names the base ' + _told(named) if named.name else 'does not name its base'}, and the "
        f"library is for {_told(base)}; {cure}"
    )


def _find(name: str, entries: Mapping[str, Any]) -> Any:
    if name not in entries:
        hint = did_you_mean(name, entries) if entries else "; it is empty"
        raise ExpertError(f"no expert {name!r} in the library{hint}")
    return entries[name]


def _files(name: str, entry: Any) -> dict[str, dict[str, Any]]:
    """What the manifest says of an expert's files, each a plain name in the expert's own folder."""
    files = entry.get("files") if isinstance(entry, dict) else None
    if not isinstance(files, dict):
        raise ExpertError(f"expert {name!r}: {MANIFEST} lists no files; {_AGAIN}")
    for file, facts in files.items():
        if not _FILE.fullmatch(file):
            raise ExpertError(
                f"expert {name!r}: {MANIFEST} lists the file {file!r}, not a plain name in its folder; {_AGAIN}"
            )
        if not (isinstance(facts, dict) and set(facts) == {"bytes", "blake2b"}):
            raise ExpertError(f"expert {name!r}: {MANIFEST} gives no length and digest of {file}; {_AGAIN}")
    return files


def _parse_card(name: str, data: bytes) -> dict[str, Any]:
    try:
        card = parse_json(data)
    except ValueError as error:
        raise ExpertError(f"expert {name!r}: {CARD}: {reason(error)}; {_AGAIN}") from error
    if not isinstance(card, dict):
        raise ExpertError(f"expert {name!r}: {CARD} holds {type(card).__name__}; it must hold an object; {_AGAIN}")
    return card


def fetch_adapter(source: str, revision: str | None) -> Path:
    """Fetch an adapter's two files from the hub.

    Raises:
        ConfigError: there is no such adapter, or no way to it.
        ExpertError: it cannot be fetched.
    """
    source = locate(source, "adapter", revision=revision)
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - for downloads alone
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ExpertError(
            f"{source!r} is no folder here and cannot be fetched from the hub (revision {revision or 'main'}): "
            f"{reason(error)}; check the name, your access and the network"
        ) from error


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    for file, data in files.items():
        write_file(folder / file, data)


def _link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        write_file(target, source.read_bytes())
