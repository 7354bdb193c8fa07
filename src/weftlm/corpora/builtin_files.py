"""Where the text of the built-in domains lies: the files of the Python installation and of weftlm's own dependencies.

Nothing here imports a scanned package: a package is found through its import spec and its installed metadata, and read
as plain files.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SKIPPED_FOLDERS = frozenset(
    (
        "__pycache__",
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "testing",
        "_vendor",
        "vendor",
        "vendored",
        "externals",
        "lib2to3",
        "idlelib",
        "ensurepip",
        "pydoc_data",
        "encodings",
        "lib-dynload",
        "turtledemo",
    )
)
"""Tests, copies of other packages and tables: text that repeats or that some Pythons lack."""

RUNTIME_DISTRIBUTIONS = (
    "accelerate",
    "annotated-doc",
    "annotated-types",
    "anyio",
    "click",
    "cloudpickle",
    "contourpy",
    "cycler",
    "datasets",
    "dill",
    "filelock",
    "fonttools",
    "fsspec",
    "h11",
    "hf-xet",
    "huggingface-hub",
    "idna",
    "jinja2",
    "joblib",
    "kiwisolver",
    "markdown-it-py",
    "markupsafe",
    "matplotlib",
    "mdurl",
    "mpmath",
    "multiprocess",
    "narwhals",
    "networkx",
    "numpy",
    "packaging",
    "pandas",
    "peft",
    "pillow",
    "psutil",
    "pyarrow",
    "pydantic",
    "pydantic-core",
    "pygments",
    "pyparsing",
    "python-dateutil",
    "pyyaml",
    "regex",
    "rich",
    "safetensors",
    "scikit-learn",
    "scipy",
    "setuptools",
    "shellingham",
    "sympy",
    "threadpoolctl",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "typer",
    "typing-extensions",
    "typing-inspection",
    "tzdata",
    "xxhash",
    "zstandard",
)
"""weftlm's runtime dependencies and what they pull in; a fixed list, so that tools installed beside change nothing."""

PYTHON = "python"
"""The pseudo-package that stands for the standard library."""


@dataclass(frozen=True)
class SourceFile:
    """One file of text.

    Attributes:
        path: where it lies on this machine.
        origin: package, version and relative path, the same on every machine: `torch 2.13.0: nn/functional.py`.
    """

    path: Path
    origin: str

    def text(self) -> str | None:
        """The file as text, or None when it cannot be read or is not UTF-8."""
        try:
            return self.path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError):
            return None


@lru_cache(maxsize=256)
def installed_version(package: str) -> str | None:
    """Version of a distribution (or of Python itself), or None where it is not installed."""
    if package == PYTHON:
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_folder(package: str, module: str) -> Path | None:
    """Folder of an importable package, found without importing it; None where it is missing."""
    if package == PYTHON:
        folder = Path(sysconfig.get_paths()["stdlib"])
        return folder if folder.is_dir() else None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def package_files(
    package: str, module: str, suffixes: Sequence[str], under: str = "", skipped: frozenset[str] = SKIPPED_FOLDERS
) -> Iterator[SourceFile]:
    """The files of one package with one of the suffixes, in no particular order.

    Args:
        package: distribution name, or `PYTHON`.
        module: import name of the package.
        suffixes: endings, with the dot.
        under: folder inside the package to stay in.
        skipped: folder names, or relative folder paths, not to enter.
    """
    folder, version = package_folder(package, module), installed_version(package)
    if folder is None or version is None:
        return
    for here, folders, names in os.walk(folder / under):
        relative = Path(here).relative_to(folder)
        folders[:] = [name for name in folders if name not in skipped and (relative / name).as_posix() not in skipped]
        for name in names:
            if name.endswith(tuple(suffixes)):
                yield SourceFile(Path(here) / name, f"{package} {version}: {(relative / name).as_posix()}")


def metadata_files(package: str, wanted: Sequence[str]) -> Iterator[SourceFile]:
    """Files a distribution lists in its metadata whose lower-case path holds one of the `wanted` words."""
    version = installed_version(package)
    if version is None:
        return
    root = Path(str(importlib.metadata.distribution(package).locate_file("")))
    for name in _listed(package):
        if any(word in name.lower() for word in wanted) and (root / name).is_file():
            yield SourceFile(root / name, f"{package} {version}: {name}")


@lru_cache(maxsize=256)
def _listed(package: str) -> tuple[str, ...]:
    """Relative names of the files a distribution recorded at installation; some systems' packages record none."""
    listing = importlib.metadata.distribution(package).read_text("RECORD") or ""
    names = (row[0] for row in csv.reader(listing.splitlines()) if row)
    return tuple(name for name in names if not name.startswith(("..", "/")))


def scattered(files: Iterator[SourceFile]) -> list[SourceFile]:
    """Files in the order of a hash of their origin: a prefix of any length is spread over packages and folders."""
    unique = {file.origin: file for file in files}
    return sorted(unique.values(), key=lambda file: hashlib.blake2b(file.origin.encode(), digest_size=16).digest())


def content_hash(files: Sequence[SourceFile], known: dict[Path, bytes]) -> str:
    """BLAKE2b of origins and contents, in order; an unreadable file counts as absent.

    Args:
        files: what to hash.
        known: digests of contents already read, by path; filled as files are read.
    """
    total = hashlib.blake2b(digest_size=16)
    for file in files:
        if file.path not in known:
            try:
                known[file.path] = hashlib.blake2b(file.path.read_bytes(), digest_size=16).digest()
            except OSError:
                known[file.path] = b""
        total.update(hashlib.blake2b(file.origin.encode(), digest_size=16).digest() + known[file.path])
    return total.hexdigest()
