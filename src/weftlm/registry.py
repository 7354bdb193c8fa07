"""Name -> class registries: the methods of a folder of weftlm, and those of other packages.

A method is one file: `@policies.register("doremi", does="...", costs="...", paper="arXiv:2305.10429")` on its class is
the whole seam. Another package names its module under the entry-point group of the registry:

    [project.entry-points."weftlm.policies"]
    progress_share = "my_package.progress_share"
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import SourceFileLoader
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from weftlm.config import Section, validate
from weftlm.errors import ConfigError, did_you_mean, reason

T = TypeVar("T")

_REGISTERED = re.compile(r"^@\w+\.register\(\s*[\"']([^\"']+)", re.MULTILINE)


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered method.

    Attributes:
        name: Name in recipes and on the command line.
        cls: Class of the method.
        does: What it does, in a line.
        costs: What it costs in time or memory, in a line.
        paper: Paper it follows, `arXiv:...` where it is there; None for none.
    """

    name: str
    cls: type[T]
    does: str
    costs: str
    paper: str | None


class Registry(Generic[T]):
    """The methods found in one package.

    Names come from the modules' text and settings from the package's `config.py`, so that a recipe is checked, and a
    name completed, without importing a method and the tensors it works on. A method with settings in its own file works
    as well; its module is imported when its name comes up.

    Args:
        kind: What the entries are, for messages ("mixture policy").
        package: Package whose modules register themselves when imported.
        key: Key of a method's settings that holds its name ("policy").
        group: Entry-point group under which other packages name their modules ("weftlm.policies").
    """

    def __init__(self, kind: str, package: str, key: str, group: str) -> None:
        self.kind = kind
        self.package = package
        self.key = key
        self.group = group
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, does: str, costs: str, paper: str | None = None) -> Callable[[type[T]], type[T]]:
        """Class decorator that enters a class under `name`; see `Entry`."""

        def enter(cls: type[T]) -> type[T]:
            present = self._entries.get(name)
            if present is not None and present.cls.__qualname__ != cls.__qualname__:
                raise ConfigError(f"{self.kind} {name!r} is registered twice: {present.cls!r} and {cls!r}")
            self._entries[name] = Entry(name, cls, does, costs, paper)
            return cls

        return enter

    def entry(self, name: str) -> Entry[T]:
        """The entry called `name`.

        Raises:
            ConfigError: no such method, with a suggestion.
        """
        if name not in self._entries and name in self._modules:
            self._import(name)
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} {name!r}{did_you_mean(name, self)}")
        return self._entries[name]

    def settings(self, value: Mapping[str, Any], where: str) -> Section:
        """The validated settings of the method that `value[key]` names.

        Raises:
            ConfigError: no or an unknown name, an unknown key or a wrong value, each with what is allowed.
        """
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}; it must be a mapping with the key {self.key!r}")
        name = value.get(self.key)
        if not isinstance(name, str):
            raise ConfigError(f"{where}.{self.key} is {name!r}; it must be one of: {', '.join(self)}")
        section = self._sections[name] if name in self._sections else self.entry(name).cls.Config  # type: ignore[attr-defined]
        found: Section = validate(section, dict(value), where)
        return found

    def __getitem__(self, name: str) -> type[T]:
        return self.entry(name).cls

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._entries, *self._modules}))

    def __len__(self) -> int:
        return len({*self._entries, *self._modules})

    def _import(self, name: str) -> None:
        """Import the module that registers a method.

        Raises:
            ConfigError: a module of another package cannot be imported, or registers no method of this name.
        """
        module = self._modules[name]
        where = f"{self.kind} {name!r} of another package ({module}, entry point of {self.group})"
        try:
            importlib.import_module(module)
        except Exception as error:
            if module.startswith(f"{self.package}."):
                raise
            raise ConfigError(
                f"{where} cannot be imported ({reason(error)}); repair or uninstall the package"
            ) from error
        if name not in self._entries:
            raise ConfigError(f"{where} registers no method of that name; its module must call register({name!r}, ...)")

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Module by the name it registers: of this package, read from its text, and of others, by entry points.

        A method of weftlm comes before one of the same name of another package.
        """
        found = {each.name: each.module for each in entry_points(group=self.group)}
        for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__, f"{self.package}."):
            spec = importlib.util.find_spec(module.name)
            if spec is not None and isinstance(spec.loader, SourceFileLoader):
                text = spec.loader.get_source(module.name) or ""
                found.update(dict.fromkeys(_REGISTERED.findall(text), module.name))
        return found

    @cached_property
    def _sections(self) -> dict[str, type[Section]]:
        """Settings by method, of the package's `config.py`."""
        sections = vars(importlib.import_module(f"{self.package}.config")).values()
        own = [each for each in sections if isinstance(each, type) and issubclass(each, Section)]
        named = {each: each.model_fields[self.key].default for each in own if self.key in each.model_fields}
        return {name: section for section, name in named.items() if isinstance(name, str)}
