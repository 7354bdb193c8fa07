"""What one Python file holds, taken apart: code without prose, docstrings, interpreter sessions, comments, bytecode.

Each function is pure: source text in, `Piece`s out. Text that does not parse gives nothing.
"""

from __future__ import annotations

import ast
import dis
import gc
import io
import itertools
import re
import textwrap
import tokenize
import types
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

GONE = "\0"
"""Marks a line that was removed, so that line numbers stay valid while a file is taken apart."""

_LEAST_DOCUMENTATION_CHARS = 200
_LONGEST_CONSTANT_CHARS = 80
_DIRECTIVES = re.compile(r"^(\s*)\.\. (?:plot|code|code-block|ipython|jupyter-execute|sourcecode|doctest)::.*$")
_FENCED = re.compile(r"^[ \t]*(```|~~~)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"[^\n]+\n\s*([-=~^*])\1{2,}\s*")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Piece(NamedTuple):
    """A named part of a file, in file order."""

    name: str
    text: str


def parse(source: str) -> ast.Module | None:
    """Parse without running anything; None where the text is not Python of this version."""
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is millions of objects without a cycle: looking for some costs more than parsing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    finally:
        if collecting:
            gc.enable()


def code_pieces(source: str) -> Iterator[Piece]:
    """Code alone: every comment, docstring and bare string statement removed.

    A piece is a top-level class or function, or a run of other statements.
    """
    tree = parse(source)
    if tree is None:
        return
    lines = [line.replace(GONE, "") for line in source.split("\n")]
    try:
        comments = [
            token.start
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        ]
    except (tokenize.TokenError, SyntaxError):
        return
    for row, column in comments:
        lines[row - 1] = lines[row - 1][:column].rstrip() or GONE
    for body in _bodies(tree):
        _remove_strings(body, lines)
    yield from _top_level(tree, lines)


def _top_level(tree: ast.Module, lines: list[str]) -> Iterator[Piece]:
    starts: list[tuple[int, str]] = []
    plain = False
    for statement in tree.body:
        named = isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *(item.lineno for item in decorators)])
        if (named or not plain) and (not starts or first > starts[-1][0]):
            starts.append((first, getattr(statement, "name", f"line {first}")))
        plain = not named
    for (first, name), (end, _) in itertools.pairwise([*starts, (len(lines) + 1, "")]):
        kept = [line.rstrip() for line in lines[first - 1 : end - 1] if line != GONE]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
        if text.strip():
            yield Piece(name, text)


def _bodies(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    """Every list of statements, without a look into expressions: they are most of a tree."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        waiting += [*getattr(node, "handlers", ()), *getattr(node, "cases", ())]
        for body in (getattr(node, field, None) for field in ("body", "orelse", "finalbody")):
            if isinstance(body, list):
                yield body
                waiting += body


def _remove_strings(body: list[ast.stmt], lines: list[str]) -> None:
    strings = [
        item
        for item in body
        if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) and isinstance(item.value.value, str)
    ]
    for item in strings:
        first, last = item.lineno - 1, (item.end_lineno or item.lineno) - 1
        before = lines[first].encode()[: item.col_offset].decode(errors="replace")
        after = lines[last].encode()[item.end_col_offset or 0 :].decode(errors="replace")
        if before.strip() or after.strip():
            lines[first] = f'{before}""{after}' if first == last else before + '""'
            if first != last:
                lines[last] = GONE if not after.strip() else after
        else:
            lines[first] = lines[last] = GONE
        lines[first + 1 : last] = [GONE] * max(0, last - first - 1)
        if len(strings) == len(body) and item is body[0] and not before.strip() and before:
            lines[first] = before + "pass"


def docstrings(source: str) -> Iterator[Piece]:
    """Docstrings with the dotted name of what they document; in files of documentation also their long strings."""
    tree = parse(source)
    if tree is None:
        return
    yield from _docstrings(tree, "")
    for statement in tree.body:  # sympy and mpmath, torch and numpy keep some documentation in module-level strings
        value = getattr(statement, "value", None)
        texts: list[Any] = [value] if isinstance(statement, ast.Assign) else getattr(value, "args", [])
        for node in texts:
            found = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else node
            if isinstance(found, ast.Constant) and isinstance(found.value, str) and _is_documentation(found.value):
                target: ast.AST = statement.targets[0] if isinstance(statement, ast.Assign) else texts[0]
                yield Piece(_reference(target), _clean(found.value))


def _is_documentation(text: str) -> bool:
    return len(text) >= _LEAST_DOCUMENTATION_CHARS and "\n\n" in text


def _reference(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_reference(node.value)}.{node.attr}"
    if isinstance(node, ast.Constant):
        return str(node.value)[:40]
    return "text"


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[Piece]:
    if node.body and isinstance(node.body[0], ast.Expr):
        value = node.body[0].value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield Piece(name or "module", _clean(value.value))
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}" if name else child.name)


def _clean(text: str) -> str:
    """Docstring indentation removed, trailing blanks too; lone surrogates replaced."""
    head, newline, rest = text.expandtabs().partition("\n")
    whole = head.strip() + newline + textwrap.dedent(rest)
    whole = "\n".join(line.rstrip() for line in whole.split("\n")).strip()
    return whole.encode("utf-8", "replace").decode("utf-8")


def split_sessions(docstring: str) -> tuple[str, str]:
    """Split a docstring into (prose, interpreter sessions).

    A session runs from a `>>>` line to the next blank line. From the prose are also removed: fenced code, literal
    blocks, code directives and headings that have nothing left under them.
    """
    prose: list[str] = []
    sessions: list[str] = []
    block: list[str] = []
    unfenced = _FENCED.sub(lambda fence: f"\n{fence[2]}\n" if ">>>" in fence[2] else "", docstring)
    for line in [*unfenced.split("\n"), ""]:
        if block or line.lstrip().startswith(">>>"):
            if line.strip():
                block.append(line)
                continue
            sessions.append(textwrap.dedent("\n".join(block)))
            block = []
        prose.append(line)
    return _prose("\n".join(prose)), "\n\n".join(sessions)


def _prose(text: str) -> str:
    kept: list[str] = []
    margin = None
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip())
        if margin is not None:
            if not line.strip() or indent > margin:
                continue
            margin = None
        directive = _DIRECTIVES.match(line)
        if directive:
            margin = len(directive.group(1))
            kept.append("")
            continue
        if line.rstrip().endswith("::") and not line.lstrip().startswith(".. "):
            margin = indent
            kept += [line.rstrip()[:-1], ""]
            continue
        kept.append(line)
    paragraphs = [part for part in re.split(r"\n\s*\n", "\n".join(kept)) if part.strip()]
    full = [
        part
        for part, following in itertools.zip_longest(paragraphs, paragraphs[1:])
        if not (_HEADING.fullmatch(part) and (following is None or _HEADING.fullmatch(following)))
    ]
    return "\n\n".join(part.strip("\n") for part in full)


def prose_pieces(source: str) -> Iterator[Piece]:
    """The prose of each docstring."""
    for name, text in docstrings(source):
        prose, _ = split_sessions(text)
        if prose:
            yield Piece(name, prose)


def session_pieces(source: str) -> Iterator[Piece]:
    """The interpreter sessions of each docstring."""
    if ">>>" not in source:
        return
    for name, text in docstrings(source):
        _, sessions = split_sessions(text)
        if sessions:
            yield Piece(name, sessions)


def comment_pieces(source: str) -> Iterator[Piece]:
    """Runs of whole-line comments, without their hash signs."""
    if "#" not in source:
        return
    try:
        rows = [
            (token.start[0], token.string.lstrip("#!:").strip())
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
        ]
    except (tokenize.TokenError, SyntaxError):
        return
    run: list[str] = []
    first = 0
    for row, text in [*rows, (-1, "")]:
        if run and row != first + len(run):
            yield Piece(f"line {first}", "\n".join(run).strip())
            run = []
        if not run:
            first = row
        run += [text]


def bytecode_pieces(source: str) -> Iterator[Piece]:
    """Disassembly of each function and class body, docstrings compiled away; no address, no path, no hash order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code = compile(source, "module", "exec", dont_inherit=True, optimize=2)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
    yield from _listing(code)


def _listing(code: types.CodeType) -> Iterator[Piece]:
    lines = [f"Disassembly of {code.co_qualname}:"]
    inner: list[types.CodeType] = []
    for step in dis.get_instructions(code):
        mark = ">>" if step.is_jump_target else "  "
        shown = step.argrepr
        if shown and not isinstance(step.argval, str | int):
            shown = stable_repr(step.argval)
        if isinstance(step.argval, types.CodeType):
            inner.append(step.argval)
        if len(shown) > _LONGEST_CONSTANT_CHARS:
            shown = shown[: _LONGEST_CONSTANT_CHARS - 3] + "..."
        argument = "" if step.arg is None else f"{step.arg:>5}" + (f" ({shown})" if shown else "")
        lines.append(f"{mark} {step.offset:>5} {step.opname:<24} {argument}".rstrip())
    yield Piece(code.co_qualname, _ADDRESS.sub("", "\n".join(lines)).encode("utf-8", "replace").decode("utf-8"))
    for child in inner:
        yield from _listing(child)


def stable_repr(value: object) -> str:
    """`repr` of a constant, without addresses and with frozen sets in sorted order."""
    if isinstance(value, types.CodeType):
        return f"<code object {value.co_qualname}>"
    if isinstance(value, frozenset):
        return f"frozenset({{{', '.join(sorted(map(stable_repr, value)))}}})"
    if isinstance(value, tuple):
        return f"({', '.join(map(stable_repr, value))}{',' if len(value) == 1 else ''})"
    return repr(value)
