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

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, NonNegativeInt

from weftlm.artifact import locked
from weftlm.config import Section, validate
from weftlm.corpora.labels import MAX_NAME, expert_name, folder_name, is_name
from weftlm.errors import ConfigError, DataError, ExpertError, did_you_mean, reason
from weftlm.experts.expert import CARD, CONFIG, GATE, STATISTICS, WEIGHTS, BaseReference, Expert, base_problem
from weftlm.files import check_listed, checksum, hidden, parse_json, read_object, remove, room, sync_file, write_object

if TYPE_CHECKING:
    from torch import nn

FORMAT = "weftlm expert library 1"
MANIFEST = "library.json"

_LOCK = ".lock"
_UNLISTED = ".unlisted"
"""Marks an expert's folder while the manifest does not list it, before an addition and after a removal."""
_AGAIN = "remove it and add it again"


class _File(Section):
    bytes: NonNegativeInt
    blake2b: str


class _Manifest(Section):
    """What `library.json` holds; entries are checked when they are used, so that a broken one spoils no other."""

    model_config = ConfigDict(extra="ignore")

    base: BaseReference
    experts: dict[str, Any]


class _Entry(Section):
    """An expert in the manifest."""

    model_config = ConfigDict(extra="ignore")

    folder: Annotated[str, Field(pattern=r"^[^~/]+(~[0-9]+)?$")]
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], _File]
    base: BaseReference


class ExpertLibrary:
    """The experts in a folder.

    Every call reads the manifest afresh, so an object sees what other processes add. A call that is given a name raises
    ExpertError where there is no such expert, or where its entry or files are missing, altered or unsound. Attributes
    `folder` and `base` do not change.
    """

    def __init__(self, folder: Path, base: BaseReference) -> None:
        """Use `open`."""
        self.folder = folder
        self.base = base

    @classmethod
    def open(cls, folder: Path, base: BaseReference | None = None) -> ExpertLibrary:
        """Open a library; where there is none and a base is given, start one.

        Args:
            folder: Folder of the library.
            base: Base of the experts; None for that of the library that is there.
        Raises:
            ExpertError: there is none, it is for another base, its manifest is broken or of another format, or the
                folder cannot be written.
        """
        folder = Path(folder)
        if base is not None and not (folder / MANIFEST).exists():
            library = cls(folder, base)
            with library._writing():
                if not (folder / MANIFEST).exists():
                    library._commit({})
        library = cls(folder, _read_manifest(folder).base)
        if base is not None:
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
        """The name of an expert that is given by its name or by its domain's label."""
        known = expert_name(name)
        self._entry(known)
        return known

    def path(self, name: str) -> Path:
        """The folder of an expert, readable by `PeftModel.from_pretrained`."""
        return self.folder / self._entry(name).folder

    def has_gate(self, name: str) -> bool:
        """Whether an expert has a gate."""
        return GATE in self._entry(name).files

    def has_statistics(self, name: str) -> bool:
        """Whether an expert has statistics."""
        return STATISTICS in self._entry(name).files

    def card(self, name: str) -> dict[str, Any]:
        """An expert's card, without loading its tensors."""
        return _parse_card(name, self._read(name, self._entry(name), [CARD])[CARD])

    def load(self, name: str) -> Expert:
        """Load an expert, verified: sizes, digests, finiteness, and that gate and statistics fit the adapter."""
        from weftlm.experts.files import decode  # noqa: PLC0415 - torch; listing a library needs none

        while True:
            entry = self._entry(name)
            try:
                data = self._read(name, entry, list({CONFIG, WEIGHTS, CARD, *entry.files}))
                return decode(name, data, entry.base, _parse_card(name, data[CARD]))
            except ExpertError:
                if self._entry(name) == entry:  # else another process has replaced it
                    raise

    def load_all(
        self, names: Sequence[str] | None = None, *, model: nn.Module | None = None, fingerprint: str | None = None
    ) -> tuple[list[Expert], dict[str, str]]:
        """Load experts, leaving out those that are broken or were made for another base than a model.

        Args:
            names: Names of the experts, in the order of the result; all where None.
            model: Base model that the experts must fit; None for any.
            fingerprint: Fingerprint of that model, where it can be compared.
        Returns:
            The experts that can be used, and for each other its name and what is wrong with it.
        Raises:
            ExpertError: a name is not in the library.
        """
        from weftlm.experts.lora import check_fits  # noqa: PLC0415 - torch; listing a library needs none

        entries = self._entries()
        experts, problems = [], dict[str, str]()
        for name in sorted(entries) if names is None else names:
            _check_known(name, entries)
            try:
                expert = self.load(name)
                if model is not None:
                    check_fits(expert.lora, model, fingerprint=fingerprint)
                experts.append(expert)
            except ExpertError as error:
                problems[name] = str(error)
        return experts, problems

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
        return _read_manifest(self.folder).experts

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

    # -- writing ------------------------------------------------------------------------------------------------

    def add(self, *experts: Expert, replace: bool = False, same_adapter: bool = False) -> None:
        """Add experts, all of them or none; no other expert's files are touched. The very same again changes nothing.

        Args:
            experts: Experts to add.
            replace: Whether they take the place of experts of their names.
            same_adapter: Whether each must take the place of an expert with its very adapter, whose gate, statistics
                and card change.
        Raises:
            ExpertError: a name is taken (and not `replace`) or not allowed, an expert is of another base or unsound,
                `same_adapter` and the adapter is gone or another one, or the library cannot be written.
            CheckpointError: the disk is full.
        """
        from weftlm.experts.files import encode  # noqa: PLC0415 - torch; listing a library needs none
        from weftlm.experts.lora import adapter_fingerprint as digest  # noqa: PLC0415

        contents = {}
        for expert in experts:
            check_name(expert.name)
            self._check_base(f"expert {expert.name!r}", expert.lora.base)
            contents[expert.name] = encode(expert)
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
                if same_adapter and (name not in entries or digest(self.load(name).lora) != digest(expert.lora)):
                    raise ExpertError(
                        f"expert {name!r} was replaced or removed while its gate was trained; nothing is written: run "
                        f"the command again for the adapter that is there now"
                    )
                added[name] = {"folder": self._build(name, files), **entry}
            if added:
                self._mark(entries[name] for name in added if name in entries)
                self._commit({**entries, **added})

    def remove(self, *names: str) -> None:
        """Take experts out and delete their files, all or none; no other expert's files are touched."""
        with self._writing():
            entries = self._entries()
            for name in names:
                _check_known(name, entries)
            self._mark(entries[name] for name in names)
            self._commit({name: entry for name, entry in entries.items() if name not in names})

    def _check_base(self, what: str, base: BaseReference) -> None:
        if (problem := base_problem(base, self.base)) is not None:
            raise ExpertError(f"{what} {problem} (library {self.folder}); use a library for each base")

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
                with suppress(FileNotFoundError, NotADirectoryError):
                    (self.folder / folder / _UNLISTED).touch()

    def _commit(self, entries: Mapping[str, Any]) -> None:
        """Replace the manifest: the moment at which a change happens."""
        manifest = {"format": FORMAT, "base": asdict(self.base), "experts": dict(sorted(entries.items()))}
        write_object(self.folder / MANIFEST, manifest, sync=True)
        sync_file(self.folder)

    @contextmanager
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


def _described(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest()}


def _read_manifest(folder: Path) -> _Manifest:
    cure = "restore it from a copy"
    try:
        manifest = read_object(folder / MANIFEST, cure)
    except DataError as error:
        raise ExpertError(f"library {folder}: {error}") from error
    if manifest is None:
        raise ExpertError(f"{folder} holds no expert library (no {MANIFEST}); create one, or check the path")
    if (found := manifest.get("format")) != FORMAT:
        raise ExpertError(f"library {folder} has format {found!r}; this version reads {FORMAT!r}")
    try:
        return validate(_Manifest, manifest, MANIFEST)
    except ConfigError as error:
        raise ExpertError(f"library {folder}: {'; '.join(str(error).splitlines())}; {cure}") from error


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
