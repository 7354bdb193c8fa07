"""Built-in corpora: real text in distinct domains, assembled from what is installed wherever weftlm is.

Nothing is downloaded and nothing is shipped: the text is that of the running Python's standard library and of the
packages weftlm depends on, read as files, never imported. Contents therefore follow the installed versions;
`builtin_fingerprint` names them. For given versions the documents are the same on every machine and in every process.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from weftlm.corpora import builtin_files, builtin_python, builtin_text
from weftlm.corpora.builtin_files import PYTHON, SourceFile, package_files
from weftlm.corpora.builtin_python import Piece
from weftlm.corpora.source import Document
from weftlm.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 2_000_000
LITTLE_BYTES = 100_000
"""Below this a domain that is not meant to be small is reported."""

_MATHEMATICS = (("sympy", "sympy"), ("mpmath", "mpmath"), ("networkx", "networkx"))
_LEARNING = (
    ("transformers", "transformers"),
    ("peft", "peft"),
    ("huggingface_hub", "huggingface_hub"),
    ("accelerate", "accelerate"),
    ("datasets", "datasets"),
)
_NUMERICS = (("numpy", "numpy"), ("scipy", "scipy"), ("scikit-learn", "sklearn"), ("pandas", "pandas"))
_STUBBED = (
    ("torch", "torch"),
    ("numpy", "numpy"),
    ("matplotlib", "matplotlib"),
    ("tokenizers", "tokenizers"),
    ("pandas", "pandas"),
    ("pydantic-core", "pydantic_core"),
    ("scipy", "scipy"),
    ("safetensors", "safetensors"),
    ("zstandard", "zstandard"),
    ("kiwisolver", "kiwisolver"),
    ("contourpy", "contourpy"),
    ("pillow", "PIL"),
)
_GENERATED_HEADERS = frozenset({"include/ATen/ops", "include/google", "__pycache__"})


@dataclass(frozen=True)
class BuiltinDomain:
    """What is known of a built-in domain before it is assembled.

    Attributes:
        name: its name, and the label of its documents.
        about: what it is, in one line.
        low_resource: deliberately small.
        near: overlaps in subject or form with another domain; not part of "all".
    """

    name: str
    about: str
    low_resource: bool = False
    near: bool = False


@dataclass(frozen=True)
class BuiltinSize:
    """What assembling a domain gave here.

    Attributes:
        domain: the domain.
        documents: number of documents.
        bytes: UTF-8 bytes.
        packages: packages and versions it came from.
        note: None, or why it is missing or small.
    """

    domain: BuiltinDomain
    documents: int
    bytes: int
    packages: tuple[str, ...]
    note: str | None


Cutter = Callable[[str], Iterator[Piece]]


@dataclass(frozen=True)
class _Recipe:
    domain: BuiltinDomain
    files: Callable[[], Iterator[SourceFile]]
    cutter: Callable[[builtin_text.Repeats], Cutter]
    by_paragraph: bool = True


def _python(packages: Sequence[tuple[str, str]], *suffixes: str) -> Callable[[], Iterator[SourceFile]]:
    def files() -> Iterator[SourceFile]:
        for package, module in packages:
            yield from package_files(package, module, suffixes or (".py",))

    return files


def _headers() -> Iterator[SourceFile]:
    yield from package_files("torch", "torch", (".h", ".hpp", ".cuh"), "include", _GENERATED_HEADERS)
    yield from package_files("pyarrow", "pyarrow", (".h",), "include")


def _json_files() -> Iterator[SourceFile]:
    for package in builtin_files.RUNTIME_DISTRIBUTIONS:
        for file in builtin_files.metadata_files(package, (".json",)):
            parts = file.origin.split("/")
            if file.origin.endswith(".json") and not builtin_files.SKIPPED_FOLDERS.intersection(parts):
                yield file


def _licences() -> Iterator[SourceFile]:
    folder = builtin_files.package_folder(PYTHON, PYTHON)
    for name in ("LICENSE.txt", "LICENSE"):
        if folder is not None and (folder / name).is_file():
            yield SourceFile(folder / name, f"python {builtin_files.installed_version(PYTHON)}: {name}")
    for package in builtin_files.RUNTIME_DISTRIBUTIONS:
        for file in builtin_files.metadata_files(package, ("licen", "copying", "notice")):
            if file.path.suffix.lower() not in {".py", ".pyc", ".pyi", ".json", ".h"}:
                yield file


def _plain(cutter: Cutter) -> Callable[[builtin_text.Repeats], Cutter]:
    return lambda repeats: cutter


_STDLIB = ((PYTHON, PYTHON),)
_RECIPES = {
    recipe.domain.name: recipe
    for recipe in (
        _Recipe(
            BuiltinDomain("python_code", "Python standard library, comments and docstrings removed"),
            _python(_STDLIB),
            _plain(builtin_python.code_pieces),
        ),
        _Recipe(
            BuiltinDomain("cpp_headers", "C++ headers of PyTorch and Arrow, comments removed"),
            _headers,
            _plain(builtin_text.cpp_pieces),
        ),
        _Recipe(
            BuiltinDomain("ml_prose", "documentation of machine-learning libraries, examples removed"),
            _python(_LEARNING),
            _plain(builtin_python.prose_pieces),
        ),
        _Recipe(
            BuiltinDomain("math_prose", "documentation of mathematics libraries, examples removed"),
            _python(_MATHEMATICS),
            _plain(builtin_python.prose_pieces),
        ),
        _Recipe(
            BuiltinDomain("sessions", "interactive Python sessions with their results"),
            _python((*_MATHEMATICS, *_NUMERICS)),
            _plain(builtin_python.session_pieces),
        ),
        _Recipe(
            BuiltinDomain("bytecode", "disassembly of the standard library"),
            _python(_STDLIB),
            _plain(builtin_python.bytecode_pieces),
        ),
        _Recipe(
            BuiltinDomain("type_stubs", "type stubs of compiled libraries, comments and docstrings removed"),
            _python(_STUBBED, ".pyi", ".pyi.in"),
            _plain(builtin_python.code_pieces),
        ),
        _Recipe(
            BuiltinDomain("json", "JSON tables and software bills of materials"),
            _json_files,
            builtin_text.json_pieces,
            by_paragraph=False,
        ),
        _Recipe(
            BuiltinDomain("licences", "software licences and notices", low_resource=True),
            _licences,
            _plain(builtin_text.text_pieces),
        ),
        _Recipe(
            BuiltinDomain("numeric_prose", "documentation of numerical libraries, examples removed", near=True),
            _python(_NUMERICS),
            _plain(builtin_python.prose_pieces),
        ),
        _Recipe(
            BuiltinDomain("torch_prose", "documentation of PyTorch, examples removed", near=True),
            _python((("torch", "torch"),)),
            _plain(builtin_python.prose_pieces),
        ),
        _Recipe(
            BuiltinDomain("stdlib_prose", "docstrings of the standard library, examples removed", near=True),
            _python(_STDLIB),
            _plain(builtin_python.prose_pieces),
        ),
        _Recipe(
            BuiltinDomain("comments", "whole-line comments of the standard library and PyTorch", near=True),
            _python((*_STDLIB, ("torch", "torch"))),
            _plain(builtin_python.comment_pieces),
        ),
    )
}


def builtin_table(*, near: bool = True) -> tuple[BuiltinDomain, ...]:
    """Every built-in domain, with or without the near ones, whether or not its packages are installed."""
    return tuple(recipe.domain for recipe in _RECIPES.values() if near or not recipe.domain.near)


def builtin_names(*, near: bool = False) -> tuple[str, ...]:
    """Names of the built-in domains: the clearly distinct ones, or with the near ones too."""
    return tuple(domain.name for domain in builtin_table(near=near))


def _recipe(name: str) -> _Recipe:
    if name not in _RECIPES:
        raise ConfigError(f"unknown built-in corpus {name!r}{did_you_mean(name, _RECIPES)}")
    return _RECIPES[name]


def builtin_documents(name: str, max_bytes: int | None = DEFAULT_MAX_BYTES) -> Iterator[Document]:
    """The documents of one built-in domain, assembled while they are read.

    Files are taken in the order of a hash of their names, so that a capped domain is a sample of the whole. Paragraphs
    that came before in the domain are dropped. A domain whose packages are absent gives nothing; that, or little text,
    is logged as a warning.

    Args:
        name: one of `builtin_names(near=True)`.
        max_bytes: stop before the UTF-8 text exceeds this; None for all there is.
    Raises:
        ConfigError: no such domain, or a cap below one.
    """
    recipe = _recipe(name)
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"built-in corpus {name!r}: max_bytes is {max_bytes}; it must be at least 1, or null")
    return _assemble(recipe, max_bytes)


def _assemble(recipe: _Recipe, max_bytes: int | None) -> Iterator[Document]:
    total = 0
    for piece in _documents(recipe):
        size = len(piece.text.encode())
        if max_bytes is not None and total + size > max_bytes:
            return
        total += size
        yield Document(piece.text, piece.name, recipe.domain.name)
    note = _note(recipe.domain, total, max_bytes)
    if note is not None:
        log.warning("%s", note)


def _note(domain: BuiltinDomain, total: int, max_bytes: int | None) -> str | None:
    if total == 0:
        return f"built-in corpus {domain.name!r} is skipped: no installed package holds text for it"
    if total < min(LITTLE_BYTES, max_bytes or LITTLE_BYTES) // 2 and not domain.low_resource:
        return f"built-in corpus {domain.name!r} holds only {total} bytes with the packages installed here"
    return None


def _documents(recipe: _Recipe) -> Iterator[Piece]:
    repeats = builtin_text.Repeats()
    cutter = recipe.cutter(repeats)
    for file in builtin_files.scattered(recipe.files()):
        source = file.text()
        if source is None:
            continue
        pieces = list(cutter(source))
        if recipe.by_paragraph:
            pieces = [Piece(name, repeats.drop(text)) for name, text in pieces]
        for name, text in builtin_text.pack(piece for piece in pieces if piece.text.strip()):
            yield Piece(f"{file.origin}: {name}" if name else file.origin, text)


def builtin_report(
    names: Sequence[str] | None = None, max_bytes: int | None = DEFAULT_MAX_BYTES
) -> tuple[BuiltinSize, ...]:
    """Assemble domains and say how much text each has here, and why one is missing or small."""
    sizes = []
    for name in builtin_names() if names is None else names:
        recipe = _recipe(name)
        documents = total = 0
        packages: set[str] = set()
        for document in builtin_documents(name, max_bytes):
            documents += 1
            total += len(document.text.encode())
            packages.add(document.origin.partition(":")[0])
        note = _note(recipe.domain, total, max_bytes)
        sizes.append(BuiltinSize(recipe.domain, documents, total, tuple(sorted(packages)), note))
    return tuple(sizes)


def builtin_fingerprint(names: Sequence[str]) -> str:
    """Hash of everything the named domains are made of: Python and package versions, the files, and weftlm's own rules.

    Two machines with equal fingerprints assemble equal documents.
    """
    return _fingerprint(tuple(names))


@lru_cache(maxsize=32)
def _fingerprint(names: tuple[str, ...]) -> str:
    total = hashlib.blake2b(digest_size=16)
    total.update(sys.version.encode())
    for module in (builtin_files, builtin_python, builtin_text):
        total.update(Path(str(module.__file__)).read_bytes())
    total.update(Path(__file__).read_bytes())
    known: dict[Path, bytes] = {}
    for name in names:
        files = builtin_files.scattered(_recipe(name).files())
        total.update(name.encode() + b"\0" + builtin_files.content_hash(files, known).encode())
    return total.hexdigest()
