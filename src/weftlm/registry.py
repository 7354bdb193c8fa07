"""Name -> class registries, filled by importing every module of a folder once.

A method is one file: `@policies.register("doremi", paper="arXiv:2305.10429")` on its class is the whole seam.
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
from typing import Any, Generic, TypeVar

from weftlm.config import Section, validate
from weftlm.errors import ConfigError, did_you_mean

T = TypeVar("T")

_REGISTERED = re.compile(r"^@\w+\.register\(\s*[\"']([^\"']+)", re.MULTILINE)


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered method: its name, its class and the paper it follows."""

    name: str
    cls: type[T]
    paper: str | None


class Registry(Generic[T]):
    """The methods found in one package.

    Names come from the modules' text and settings from the package's `config.py`, so that a recipe is checked, and a
    name completed, without importing a method and the tensors it works on. A method with settings in its own file works
    as well; its module is imported when its name comes up.

    Args:
        kind: what the entries are, for messages ("mixture policy").
        package: the package whose modules register themselves when imported.
        key: the key of a method's settings that holds its name ("policy").
    """

    def __init__(self, kind: str, package: str, key: str) -> None:
        self.kind = kind
        self.package = package
        self.key = key
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, paper: str | None = None) -> Callable[[type[T]], type[T]]:
        """Class decorator that enters a class under `name`."""

        def enter(cls: type[T]) -> type[T]:
            present = self._entries.get(name)
            if present is not None and present.cls.__qualname__ != cls.__qualname__:
                raise ConfigError(f"{self.kind} {name!r} is registered twice: {present.cls!r} and {cls!r}")
            self._entries[name] = Entry(name, cls, paper)
            return cls

        return enter

    def entry(self, name: str) -> Entry[T]:
        """The entry called `name`.

        Raises:
            ConfigError: no such method, with a suggestion.
        """
        if name not in self._entries and name in self._modules:
            importlib.import_module(self._modules[name])
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

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Module by the name it registers, read from its text."""
        found = {}
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
