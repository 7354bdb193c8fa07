"""Name -> class registries, filled by importing every module of a folder once.

A method is one file: `@policies.register("doremi", paper="arXiv:2305.10429")` on its class is the whole seam.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from weftlm.config import did_you_mean
from weftlm.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered method: its name, its class and the paper it follows."""

    name: str
    cls: type[T]
    paper: str | None


class Registry(Generic[T]):
    """The methods found in one package.

    Args:
        kind: what the entries are, for messages ("mixture policy").
        package: the package whose modules register themselves when imported.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, Entry[T]] = {}
        self._discovered = False

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
        self._discover()
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} {name!r}{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def __getitem__(self, name: str) -> type[T]:
        return self.entry(name).cls

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._discover()
        return len(self._entries)

    def _discover(self) -> None:
        if self._discovered:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        self._discovered = True
