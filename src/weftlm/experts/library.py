"""A library of experts: a folder that many processes may add to and that never shows half an expert.

    library.json                  format, base, and each expert's folder, files (size, BLAKE2b) and base
    NAME/                         one expert
      adapter_model.safetensors   the adapter, in PEFT's format: PeftModel.from_pretrained(base, library / NAME) works
      adapter_config.json
      card.json
      gate.safetensors            optional
      statistics.safetensors      optional

Every change happens at one moment, the replacement of `library.json` by a rename. A folder that it lists is never
written to: an expert that replaces another gets the folder `NAME~2`, which `ExpertLibrary.path` gives. What a killed
process leaves is removed by the next change.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, NonNegativeInt

from weftlm.artifact import locked
from weftlm.config import Section, validate
from weftlm.corpora.labels import MAX_NAME, expert_name, folder_name, is_name
from weftlm.errors import ConfigError, DataError, ExpertError, did_you_mean, reason
from weftlm.experts.expert import BaseReference, Expert, same_base
from weftlm.experts.files import CARD, CONFIG, GATE, STATISTICS, WEIGHTS, to_json
from weftlm.files import check_listed, checksum, hidden, parse_json, read_object, remove, room, sync_file, write_object

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

FORMAT = "weftlm expert library 1"
MANIFEST = "library.json"

_LOCK = ".lock"
_UNLISTED = ".unlisted"
"""Marks an expert's folder while the manifest does not list it, before an addition and after a removal."""
_AGAIN = "remove it and add it again"


class _File(Section):
    bytes: NonNegativeInt
    blake2b: str


class _Entry(Section):
    """What the manifest says of an expert."""

    model_config = ConfigDict(extra="ignore")

    folder: Annotated[str, Field(pattern=r"^[^~/]+(~[0-9]+)?$")]
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], _File]
    base: BaseReference


class ExpertLibrary:
    """The experts in a folder.

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
        with library._writing():
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
        base = _read_manifest(Path(folder)).get("base")
        try:
            return cls(Path(folder), BaseReference(**base))  # type: ignore[arg-type]
        except TypeError as error:
            raise ExpertError(
                f"library {folder}: {MANIFEST} does not say which base it is for; restore it from a copy"
            ) from error

    @classmethod
    def open_or_create(cls, folder: Path, base: BaseReference) -> ExpertLibrary:
        """Open a library, or start one where there is none.

        Raises:
            ExpertError: there is one for another base, or it is broken.
        """
        library = cls(Path(folder), base)
        with library._writing():
            if not (library.folder / MANIFEST).exists():
                library._commit({})
                return library
        library = cls.open(folder)
        library._check_base(f"the base {base.name!r}", base)
        return library

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the experts, sorted."""
        return sorted(self._entries())

    def __len__(self) -> int:
        """Number of experts."""
        return len(self._entries())

    def __contains__(self, name: object) -> bool:
        return name in self._entries()

    def named(self, name: str) -> str:
        """The name of an expert that is given by its name or by its domain's label.

        Raises:
            ExpertError: there is no such expert.
        """
        known = expert_name(name)
        self._entry(known)
        return known

    def path(self, name: str) -> Path:
        """The folder of an expert, readable by `PeftModel.from_pretrained`.

        Raises:
            ExpertError: there is no such expert, or its entry leads out of the library.
        """
        return self.folder / self._entry(name).folder

    def has_gate(self, name: str) -> bool:
        """Whether an expert has a gate."""
        return GATE in self._entry(name).files

    def has_statistics(self, name: str) -> bool:
        """Whether an expert has statistics."""
        return STATISTICS in self._entry(name).files

    def base_of(self, name: str) -> BaseReference:
        """The base that an expert was added for."""
        return self._entry(name).base

    def card(self, name: str) -> dict[str, Any]:
        """An expert's card, without loading its tensors.

        Raises:
            ExpertError: there is no such expert, or its card is missing or altered.
        """
        return _parse_card(name, self._read(name, self._entry(name), [CARD])[CARD])

    def contents(self, name: str) -> dict[str, bytes]:
        """The contents of an expert's files, of the sizes and digests that the manifest lists.

        Raises:
            ExpertError: there is no such expert, or its files are missing or altered.
        """
        entry = self._entry(name)
        return self._read(name, entry, list(entry.files))

    def load(self, name: str) -> Expert:
        """Load an expert, verified: sizes, digests, finiteness, and that gate and statistics fit the adapter.

        Raises:
            ExpertError: there is no such expert, or its files are missing, altered or unsound.
        """
        while True:
            entry = self._entry(name)
            try:
                return self._load(name, entry)
            except ExpertError:
                if self._entry(name) == entry:  # else another process has replaced it
                    raise

    def load_all(self, names: Sequence[str] | None = None) -> tuple[list[Expert], dict[str, str]]:
        """Load experts, leaving out broken ones.

        Args:
            names: Names of the experts, in the order of the result; all where None.
        Returns:
            The experts that are whole, and for each other its name and what is wrong with it.
        Raises:
            ExpertError: a name is not in the library.
        """
        entries = self._entries()
        experts, problems = [], dict[str, str]()
        for name in sorted(entries) if names is None else names:
            _check_known(name, entries)
            try:
                experts.append(self.load(name))
            except ExpertError as error:
                problems[name] = str(error)
        return experts, problems

    def load_fitting(
        self, model: nn.Module, names: Sequence[str] | None = None, *, fingerprint: str | None = None
    ) -> tuple[list[Expert], dict[str, str]]:
        """Load the experts that can be used on a base.

        Args:
            model: Base model.
            names: Names or labels of the experts, in the order of the result; None for all, and then those that are
                broken or of another base are left out with a warning.
            fingerprint: Fingerprint of the base, where it can be compared.
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

    def fingerprint(self, names: Sequence[str] | None = None) -> str:
        """Fingerprint of some experts' adapters, gates and statistics, from the manifest; cards do not count.

        Args:
            names: Names of the experts, in any order; all where None.
        Returns:
            32 hexadecimal digits.
        Raises:
            ExpertError: a name is not in the library, or its entry is broken.
        """
        entries = self._entries()
        return checksum({
            name: {file: facts.blake2b for file, facts in self._entry(name, entries).files.items() if file != CARD}
            for name in (entries if names is None else names)
        })  # fmt: skip

    def _entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = _read_manifest(self.folder)["experts"]
        return entries

    def _entry(self, name: str, entries: Mapping[str, Any] | None = None) -> _Entry:
        entries = self._entries() if entries is None else entries
        _check_known(name, entries)
        try:
            entry = validate(_Entry, entries[name], name)
        except ConfigError as error:
            raise ExpertError(f"expert {name!r}: {MANIFEST}: {'; '.join(str(error).splitlines())}; {_AGAIN}") from error
        if entry.folder.partition("~")[0] != name or (self.folder / entry.folder).is_symlink():
            raise ExpertError(
                f"expert {name!r}: {MANIFEST} gives {entry.folder!r}, not its own folder in the library; {_AGAIN}"
            )
        return entry

    def _read(self, name: str, entry: _Entry, files: Sequence[str]) -> dict[str, bytes]:
        for file in files:
            if file not in entry.files:
                raise ExpertError(f"expert {name!r}: {MANIFEST} lists no {file}; {_AGAIN}")
        folder = self.folder / entry.folder
        try:
            check_listed(folder, {file: entry.files[file].model_dump() for file in files}, _AGAIN)
            return {file: (folder / file).read_bytes() for file in files}
        except (DataError, OSError) as error:
            raise ExpertError(f"expert {name!r}: {reason(error)}") from error

    def _load(self, name: str, entry: _Entry) -> Expert:
        from weftlm.experts.companions import decode_gate, decode_statistics  # noqa: PLC0415 - torch; listing needs none
        from weftlm.experts.lora import parse_lora  # noqa: PLC0415 - torch; listing a library needs none

        data = self._read(name, entry, list({CONFIG, WEIGHTS, CARD, *entry.files}))
        lora = replace(parse_lora(name, data[CONFIG], data[WEIGHTS]), base=entry.base)
        return Expert(
            lora,
            decode_gate(lora, data[GATE]) if GATE in data else None,
            decode_statistics(lora, data[STATISTICS]) if STATISTICS in data else None,
            _parse_card(name, data[CARD]),
        )

    # -- writing ------------------------------------------------------------------------------------------------

    def add(self, *experts: Expert, replace: bool = False) -> None:
        """Add experts, all of them or none; no other expert's files are touched. The very same again changes nothing.

        Args:
            experts: Experts to add.
            replace: Whether they take the place of experts of their names.
        Raises:
            ExpertError: a name is taken (and not `replace`) or not allowed, an expert is of another base or unsound, or
                the library cannot be written.
            CheckpointError: the disk is full.
        """
        contents = {}
        for expert in experts:
            check_name(expert.name)
            self._check_base(f"expert {expert.name!r}", expert.lora.base)
            contents[expert.name] = _files_of(expert)
        with self._writing():
            entries, added = self._entries(), dict[str, Any]()
            for expert in experts:
                name, files = expert.name, contents[expert.name]
                entry = {
                    "files": {file: _described(data) for file, data in sorted(files.items())},
                    "base": asdict(expert.lora.base),
                }
                found = entries.get(name)
                if isinstance(found, dict) and entry.items() <= found.items():
                    continue
                if name in entries and not replace:
                    raise ExpertError(
                        f"expert {name!r} is already in {self.folder}; choose another name, or remove that one first "
                        f"(weftlm experts remove {self.folder} {name})"
                    )
                added[name] = {"folder": self._build(name, files), **entry}
            if added:
                self._mark(entries[name] for name in added if name in entries)
                self._commit({**entries, **added})

    def remove(self, *names: str) -> None:
        """Take experts out and delete their files, all or none; no other expert's files are touched.

        Raises:
            ExpertError: there is no such expert, or the library cannot be written.
        """
        with self._writing():
            entries = self._entries()
            for name in names:
                _check_known(name, entries)
            self._mark(entries[name] for name in names)
            self._commit({name: entry for name, entry in entries.items() if name not in names})

    def _check_base(self, what: str, base: BaseReference) -> None:
        """Refuse another base: by fingerprints where both have one, by name and revision otherwise."""
        own = self.base
        if base.fingerprint is not None and own.fingerprint is not None:
            if base.fingerprint != own.fingerprint:
                raise ExpertError(
                    f"{what} is of another base than library {self.folder}: {base.name or 'unnamed'} "
                    f"({base.fingerprint}), not {own.name} ({own.fingerprint}); use a library for each base"
                )
        elif not same_base(base, own):
            raise ExpertError(
                f"{what} names the base {base}, library {self.folder} is for {own}, and there are no fingerprints to "
                f"compare; use a library for each base"
            )

    def _build(self, name: str, files: Mapping[str, bytes]) -> str:
        """Write a folder that no entry points to yet: of the expert's name, or with ~2, ~3, ... where that is taken."""
        candidates = chain([name], (f"{name}~{number}" for number in count(2)))
        folder = next(each for each in candidates if not os.path.lexists(self.folder / each))
        making = hidden(self.folder / folder, "writing")
        making.mkdir()
        (making / _UNLISTED).touch()
        for file, data in files.items():
            (making / file).write_bytes(data)
        for path in (*making.iterdir(), making):
            sync_file(path)
        making.rename(self.folder / folder)
        return folder

    def _mark(self, entries: Iterator[Any]) -> None:
        """Mark the folders of entries for removal, which happens once no entry points to them."""
        for entry in entries:
            folder = entry.get("folder") if isinstance(entry, dict) else None
            if isinstance(folder, str) and "/" not in folder and not (self.folder / folder).is_symlink():
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    (self.folder / folder / _UNLISTED).touch()

    def _commit(self, entries: Mapping[str, Any]) -> None:
        """Replace the manifest: the moment at which a change happens."""
        manifest = {"format": FORMAT, "base": asdict(self.base), "experts": dict(sorted(entries.items()))}
        write_object(self.folder / MANIFEST, manifest, sync=True)
        sync_file(self.folder)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Be the only writer; remove what is left over before and after, whether the body fails or not."""
        try:
            with room(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                with locked(self.folder / _LOCK, ExpertError, patience_s=math.inf):
                    self._clean()
                    try:
                        yield
                    finally:
                        self._clean()
        except OSError as error:
            raise ExpertError(
                f"library {self.folder} cannot be written: {reason(error)}; see that the folder is writable"
            ) from error

    def _clean(self) -> None:
        """Remove temporary files and marked folders that no entry points to; for the holder of the lock."""
        entries = self._entries() if (self.folder / MANIFEST).exists() else {}
        listed = {entry.get("folder") for entry in entries.values() if isinstance(entry, dict)}
        for path in self.folder.iterdir():
            if path.name.startswith(".") and path.name.endswith((".writing", ".removing")):
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


def _files_of(expert: Expert) -> dict[str, bytes]:
    """The contents of an expert's files, each checked.

    Raises:
        ExpertError: the expert is not sound, or card or facts are not JSON.
    """
    from weftlm.experts.companions import encode_gate, encode_statistics  # noqa: PLC0415 - torch; listing needs none
    from weftlm.experts.lora import lora_files  # noqa: PLC0415 - torch; listing a library needs none

    files = lora_files(expert.lora)
    files[CARD] = (to_json(expert.name, "its card", expert.card) + "\n").encode()
    if expert.gate is not None:
        files[GATE] = encode_gate(expert.lora, expert.gate)
    if expert.statistics is not None:
        files[STATISTICS] = encode_statistics(expert.lora, expert.statistics)
    return files


def _described(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest()}


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


def _check_known(name: str, entries: Mapping[str, Any]) -> None:
    if name not in entries:
        hint = did_you_mean(name, entries) if entries else "; it is empty"
        raise ExpertError(f"no expert {name!r} in the library{hint}")


def _parse_card(name: str, data: bytes) -> dict[str, Any]:
    try:
        card = parse_json(data)
    except ValueError as error:
        raise ExpertError(f"expert {name!r}: {CARD}: {reason(error)}; {_AGAIN}") from error
    if not isinstance(card, dict):
        raise ExpertError(f"expert {name!r}: {CARD} holds {type(card).__name__}; it must hold an object; {_AGAIN}")
    return card
