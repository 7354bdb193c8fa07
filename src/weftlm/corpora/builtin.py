"""Built-in corpora: real text in distinct domains, assembled from what is installed wherever weftlm is.

Nothing is downloaded and nothing is shipped: the text is that of the running Python's standard library and of the
packages weftlm depends on, read as files, never imported. Contents therefore follow the installed versions;
`builtin_fingerprint` names them. For given versions the documents are the same on every machine and in every process.
"""

from __future__ import annotations

import ast
import dis
import doctest
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import sys
import sysconfig
import tokenize
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from weftlm.corpora.source import Document
from weftlm.errors import ConfigError, did_you_mean
from weftlm.files import parse_json

log = logging.getLogger(__name__)

NEAR = "numeric_prose"
"""The domain that is near another, `math_prose`, and not part of "all"."""
LEAST_CHARS, USUAL_CHARS = 500, 3000
"""A document is closed at the paragraph that would take it past `USUAL_CHARS`; a shorter rest joins the one before."""

_PYTHON = "python"  # a pseudo-package: the standard library
_MATHEMATICS = ("sympy", "mpmath", "networkx")
_NUMERICS = ("numpy", "scipy", "scikit-learn", "pandas")
_LEARNING = ("transformers", "peft", "huggingface_hub", "accelerate", "datasets")
_RUNTIME = tuple(
    "accelerate annotated-doc annotated-types anyio click cloudpickle contourpy cycler datasets dill filelock "
    "fonttools fsspec h11 hf-xet huggingface-hub idna jinja2 joblib kiwisolver markdown-it-py markupsafe matplotlib "
    "mdurl mpmath multiprocess narwhals networkx numpy packaging pandas peft pillow psutil pyarrow pydantic "
    "pydantic-core pygments pyparsing python-dateutil pyyaml regex rich safetensors scikit-learn scipy setuptools "
    "shellingham sympy threadpoolctl tokenizers torch tqdm transformers typer typing-extensions typing-inspection "
    "tzdata xxhash zstandard".split()
)
"""weftlm's dependencies and theirs; a fixed list, so that tools installed beside them change nothing."""
_SKIPPED = frozenset(
    "__pycache__ site-packages dist-packages test tests testing _vendor vendor vendored externals lib2to3 idlelib "
    "ensurepip pydoc_data encodings lib-dynload turtledemo".split()
)
"""Folders of tests, copies of other packages and tables: text that repeats or that some Pythons lack."""

_PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*?(?=[^\n])")
_CPP = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)
_FENCED = re.compile(r"^[ \t]*(```|~~~)[^\n]*\n.*?^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)
_LITERAL = re.compile(
    r"^([ \t]*)(?:\.\. (?:plot|code|code-block|ipython|jupyter-execute|sourcecode|doctest)::.*|(?!\.\. ).*::[ \t]*)\n"
    r"(?:[ \t]*\n|\1[ \t]+.*(?:\n|\Z))*",
    re.MULTILINE,
)
"""A directive that shows code, or a line that ends in `::`, with the indented lines after it."""
_UNSTABLE = re.compile(r" at 0x[0-9a-fA-F]+[^>]*|(?<=frozenset\(\{).*(?=\}\))")
"""What the printed form of a constant owes to the process: addresses, and the order of sets."""
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class _Domain(NamedTuple):
    """How a domain is assembled: whose files, a pattern of their paths, and from the content of one to its text."""

    packages: tuple[str, ...]
    files: str
    text: Callable[[str], str]


def builtin_names(*, near: bool = False) -> tuple[str, ...]:
    """Names of the built-in domains: the clearly distinct ones, or also the one that is near another in subject."""
    return tuple(name for name in _DOMAINS if near or name != NEAR)


def builtin_documents(name: str, max_bytes: int | None = 2_000_000) -> Iterator[Document]:
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
    domain = _domain(name)
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"built-in corpus {name!r}: max_bytes is {max_bytes}; it must be at least 1, or null")
    return _assemble(name, domain, max_bytes)


def builtin_fingerprint(names: Sequence[str]) -> str:
    """Hash of everything the named domains are made of: Python and package versions, the files, and weftlm's own rules.

    Two machines with equal fingerprints assemble equal documents.
    """
    total = hashlib.blake2b(_digest(sys.version.encode()) + _digest(Path(__file__).read_bytes()), digest_size=16)
    for name in names:
        for origin, path in _files(_domain(name)):
            total.update(_digest(f"{name}/{origin}".encode()) + _digest(path.read_bytes()))
    return total.hexdigest()


def _domain(name: str) -> _Domain:
    if name not in _DOMAINS:
        raise ConfigError(f"unknown built-in corpus {name!r}{did_you_mean(name, _DOMAINS)}")
    return _DOMAINS[name]


def _assemble(name: str, domain: _Domain, max_bytes: int | None) -> Iterator[Document]:
    seen: set[str] = set()
    total = 0
    for origin, path in _files(domain):
        try:
            source = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                text = domain.text(source)
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue  # no text, or none of this version of Python
        for number, document in enumerate(_packed(_paragraphs(text), seen), start=1):
            size = len(document.encode())
            if max_bytes is not None and total + size > max_bytes:
                return
            total += size
            yield Document(document, f"{origin} [{number}]", name)
    if total < min(50_000, max_bytes or 50_000):
        log.warning("built-in corpus %r holds only %d bytes with the packages installed here", name, total)


def _files(domain: _Domain) -> list[tuple[str, Path]]:
    """Origins (`torch 2.13.0: torch/nn/functional.py`) and paths, in the order of a hash of the origins."""
    found = [
        (origin, path)
        for package in domain.packages
        for origin, path in _listed(package)
        if re.search(domain.files, origin.partition(": ")[2]) and path.is_file()
    ]
    return sorted(found, key=lambda file: _digest(file[0].encode()))


@cache
def _listed(package: str) -> list[tuple[str, Path]]:
    """Origins and paths of the files that a distribution recorded when it was installed, or of the standard library."""
    if package == _PYTHON:
        root, version = Path(sysconfig.get_paths()["stdlib"]), platform.python_version()
        paths = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in _SKIPPED]
            paths += [Path(folder, name) for name in names]
        return [(f"{package} {version}: {path.relative_to(root).as_posix()}", path) for path in paths]
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return []
    version, found = distribution.version, distribution.files or ()
    files = [file for file in found if not _SKIPPED.intersection(file.parts) and file.parts[0] not in ("..", "/")]
    return [(f"{package} {version}: {file}", Path(str(file.locate()))) for file in files]


def _documented(tree: ast.Module) -> Iterator[ast.Module | _Definition]:
    """What may have a docstring: the module, its classes and functions. Expressions are not entered."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop(0)
        inner = ast.iter_child_nodes(node)
        waiting += [child for child in inner if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)]
        if isinstance(node, ast.Module | _Definition):
            yield node


def _code(source: str) -> str:
    """Python without comments and docstrings."""
    lines = source.split("\n")
    gone: set[int] = set()
    for node in _documented(ast.parse(source)):
        string = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
        if string is not None and not lines[string.lineno - 1][: string.col_offset].strip():
            gone.update(range(string.lineno, (string.end_lineno or string.lineno) + 1))
            if len(node.body) == 1 and not isinstance(node, ast.Module):
                lines[string.lineno - 1] = " " * string.col_offset + "pass"
                gone.remove(string.lineno)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.start[0] not in gone:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]].rstrip()
            gone |= {token.start[0]} if not lines[token.start[0] - 1] else set()
    return "\n".join(line.rstrip() for number, line in enumerate(lines, start=1) if number not in gone)


def _prose(source: str) -> str:
    """Docstrings without sessions, code and literal blocks."""
    split = doctest.DocTestParser().parse
    parts = (part for text in _docstrings(source) for part in (*split(_FENCED.sub("", text)), "\n\n"))
    return _LITERAL.sub("\n", "".join(part for part in parts if isinstance(part, str)))


def _sessions(source: str) -> str:
    """The interpreter sessions of docstrings."""
    if ">>>" not in source:
        return ""
    sessions: list[str] = []
    for docstring in _docstrings(source):
        for part in doctest.DocTestParser().parse(docstring.replace("```", "")):
            if isinstance(part, doctest.Example):
                sessions.append(">>> " + part.source.rstrip("\n").replace("\n", "\n... ") + "\n" + part.want)
            elif part.strip():
                sessions.append("\n\n")
        sessions.append("\n\n")
    return "".join(sessions)


def _docstrings(source: str) -> Iterator[str]:
    return filter(None, map(ast.get_docstring, _documented(ast.parse(source))))


def _bytecode(source: str) -> str:
    """Disassembly of each function and class body; no address, no path, no order of sets."""
    waiting = [compile(source, "module", "exec", dont_inherit=True, optimize=2)]
    texts = []
    while waiting:
        code = waiting.pop()
        lines = [f"Disassembly of {code.co_qualname}:"]
        for step in dis.get_instructions(code):
            if isinstance(step.argval, types.CodeType):
                waiting.append(step.argval)
            argument = "" if step.arg is None else f"{step.arg:>5} ({_UNSTABLE.sub('', step.argrepr)[:80]})"
            mark = ">>" if step.is_jump_target else "  "
            lines.append(f"{mark} {step.offset:>5} {step.opname:<24} {argument}".rstrip())
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _cpp(source: str) -> str:
    """C++ without comments."""
    return _CPP.sub(lambda found: found.group() if found.group()[0] in "\"'" else "", source)


def _json(source: str) -> str:
    """Indented JSON, a blank line after every value near the top, so that repeated items of lists are dropped."""
    text = json.dumps(parse_json(source), indent=2, ensure_ascii=False)
    return re.sub(r"^( {2,6}[]}],?)$", r"\1\n", text, flags=re.MULTILINE)


def _paragraphs(text: str) -> Iterator[str]:
    """The parts of a text between blank lines, those over `USUAL_CHARS` cut; half a surrogate pair becomes `?`."""
    for part in _PARAGRAPH_END.split(text.encode("utf-8", "replace").decode("utf-8")):
        rest = part.strip("\n").rstrip()
        while rest.strip():
            line_end = rest.rfind("\n", LEAST_CHARS, USUAL_CHARS)
            end = len(rest) if len(rest) <= USUAL_CHARS else line_end if line_end > 0 else USUAL_CHARS
            yield rest[:end]
            rest = rest[end:].strip("\n")


def _packed(paragraphs: Iterable[str], seen: set[str]) -> list[str]:
    """Neighbouring paragraphs joined to documents, without those of 40 characters and more that were seen before."""
    documents = [""]
    for paragraph in paragraphs:
        words = " ".join(paragraph.split())
        if len(words) >= 40 and words in seen:
            continue
        seen.add(words)
        if len(documents[-1]) >= LEAST_CHARS and len(documents[-1]) + len(paragraph) > USUAL_CHARS:
            documents.append("")
        documents[-1] += "\n\n" + paragraph
    if len(documents) > 1 and len(documents[-1]) < LEAST_CHARS:
        documents[-2:] = ["".join(documents[-2:])]
    return [document.strip("\n") for document in documents if len(document) >= LEAST_CHARS + 2]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


_DOMAINS = {
    "python_code": _Domain((_PYTHON,), r"\.py$", _code),
    "cpp_headers": _Domain(("torch", "pyarrow"), r"^\w+/include/(?!ATen/ops|google).*\.(h|hpp|cuh)$", _cpp),
    "ml_prose": _Domain(_LEARNING, r"\.py$", _prose),
    "math_prose": _Domain(_MATHEMATICS, r"\.py$", _prose),
    "sessions": _Domain((*_MATHEMATICS, *_NUMERICS), r"\.py$", _sessions),
    "bytecode": _Domain((_PYTHON,), r"\.py$", _bytecode),
    "type_stubs": _Domain(_RUNTIME, r"\.pyi(\.in)?$", _code),
    "json": _Domain(_RUNTIME, r"\.json$", _json),
    "licences": _Domain((_PYTHON, *_RUNTIME), r"(?i)(licen|copying|notice)(?!.*\.(py|pyc|pyi|json|h)$)", str),
    NEAR: _Domain(_NUMERICS, r"\.py$", _prose),
}
