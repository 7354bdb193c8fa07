"""Built-in corpora: distinct, deterministic, without the text of their neighbours."""

import ast
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from weftlm.corpora import builtin, builtin_files, builtin_python, builtin_text
from weftlm.corpora.builtin import (
    builtin_documents,
    builtin_fingerprint,
    builtin_names,
    builtin_report,
    builtin_table,
)
from weftlm.corpora.builtin_files import SourceFile
from weftlm.corpora.builtin_python import Piece
from weftlm.errors import ConfigError

CAP = 40_000


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return {name: [item.text for item in builtin_documents(name, CAP)] for name in builtin_names()}


def test_there_are_eight_distinct_domains_and_one_small_one() -> None:
    table = builtin_table()
    assert len({item.name for item in table}) == len(table)
    assert sum(not item.near and not item.low_resource for item in table) >= 8
    assert [item.name for item in table if item.low_resource] == ["licences"]
    assert set(builtin_names(near=True)) == {item.name for item in table} > set(builtin_names())


def test_every_domain_fills_its_cap_with_documents_of_reasonable_length(texts: dict[str, list[str]]) -> None:
    longest = builtin_text.MOST_CHARS + builtin_text.LEAST_CHARS + 2
    for name, documents in texts.items():
        total = sum(len(text.encode()) for text in documents)
        assert 0.7 * CAP < total <= CAP, name
        assert all(builtin_text.LEAST_CHARS <= len(text) <= longest for text in documents), name


def test_no_paragraph_comes_twice_within_a_domain(texts: dict[str, list[str]]) -> None:
    for name, documents in texts.items():
        if name == "json":
            continue
        long = [" ".join(part.split()) for text in documents for part in re.split(r"\n[ \t]*\n", text)]
        long = [part for part in long if len(part) >= 60]
        assert len(long) == len(set(long)), name


def test_domains_hold_only_what_they_are_for(texts: dict[str, list[str]]) -> None:
    for name in ("python_code", "type_stubs"):
        assert not any(re.search(r"^\s*#", text, re.MULTILINE) for text in texts[name])
    assert not any("/*" in text for text in texts["cpp_headers"])
    for name in ("ml_prose", "math_prose"):
        assert not any(">>> " in text or "```" in text for text in texts[name])
    assert all(text.lstrip().startswith(">>>") for text in texts["sessions"][:5])
    assert all("Disassembly of" in text or "LOAD_" in text for text in texts["bytecode"])
    assert not any(re.search(r"0x[0-9a-f]{6,}", text) for text in texts["bytecode"])


def test_origins_name_version_and_relative_path_only() -> None:
    for name in builtin_names(near=True):
        document = next(builtin_documents(name, CAP))
        assert document.label == name
        assert re.match(r"[\w-]+ \d[\w.+]*: [^/]", document.origin), document.origin
        assert sys.prefix not in document.origin


def test_documents_do_not_depend_on_the_process() -> None:
    names = ("bytecode", "json", "sessions")
    program = (
        "import hashlib, sys\n"
        "from weftlm.corpora.builtin import builtin_documents\n"
        f"for name in {names!r}:\n"
        "    all = [(d.text, d.origin) for d in builtin_documents(name, 60000)]\n"
        "    print(name, len(all), hashlib.sha256(repr(all).encode()).hexdigest())\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().count("\n") == len(names)


def test_a_smaller_cap_gives_a_prefix() -> None:
    small, large = list(builtin_documents("licences", 20_000)), list(builtin_documents("licences", 60_000))
    assert 0 < len(small) < len(large)
    assert large[: len(small)] == small


def test_fingerprint_follows_names_and_contents(tmp_path: Path) -> None:
    assert builtin_fingerprint(["licences"]) != builtin_fingerprint(["json"])
    path = tmp_path / "a.py"
    path.write_text("x = 1\n")
    file = SourceFile(path, "package 1: a.py")
    before = builtin_files.content_hash([file], {})
    assert builtin_files.content_hash([file], {}) == before
    path.write_text("x = 2\n")
    assert builtin_files.content_hash([file], {}) != before


def test_unknown_name_and_senseless_cap_are_errors() -> None:
    with pytest.raises(ConfigError, match="did you mean 'licences'"):
        builtin_documents("licenses")
    with pytest.raises(ConfigError, match="max_bytes is 0"):
        builtin_documents("json", 0)


def test_an_absent_package_is_skipped_with_a_note(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(builtin_files.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert list(builtin_documents("math_prose", CAP)) == []
    assert "'math_prose' is skipped" in caplog.text
    (size,) = builtin_report(["math_prose"], CAP)
    assert (size.documents, size.bytes) == (0, 0)
    assert size.note is not None


def test_little_text_is_reported_unless_the_domain_is_meant_to_be_small(monkeypatch: pytest.MonkeyPatch) -> None:
    one = [Piece("package 1: a", "x" * 600)]
    monkeypatch.setattr(builtin, "_documents", lambda recipe: iter(one))
    (prose,), (licences,) = builtin_report(["ml_prose"]), builtin_report(["licences"])
    assert prose.note is not None
    assert "only 600 bytes" in prose.note
    assert licences.note is None


SOURCE = '''"""Module text."""
# a comment
import os  # trailing
import sys

@decorate  # why
class A:
    """Only a docstring."""

class B:
    """Text."""
    url = "http://x/#no-comment"

    async def go(self):
        "one line"
        return "#", """kept"""

    def stop(self): "inline"

try:
    "in try"
except ValueError:
    def handler():
        """In a handler."""
        return 1
else:
    match url:
        case 1:
            "in a case"
            x = lambda: "in code"
finally:
    "in the end"
'''


def test_code_keeps_its_meaning_and_loses_its_prose() -> None:
    pieces = list(builtin_python.code_pieces(SOURCE))
    assert [piece.name for piece in pieces] == ["line 1", "A", "B", "line 20"]
    code = "\n".join(piece.text for piece in pieces)
    tree = ast.parse(code)
    nodes = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.AsyncFunctionDef))]
    assert [ast.get_docstring(node) for node in nodes] == [None] * 4
    assert "comment\n" not in code
    assert "trailing" not in code
    assert "one line" not in code
    for gone in ("inline", "in try", "In a handler", "in a case", "in the end"):
        assert gone not in code
    assert "in code" in code
    assert 'url = "http://x/#no-comment"' in code
    assert '"#", """kept"""' in code


def test_code_of_whole_standard_modules_still_parses() -> None:
    for module in (ast, logging, subprocess, re):
        source = Path(str(module.__file__)).read_text()
        code = "\n".join(piece.text for piece in builtin_python.code_pieces(source))
        tree = ast.parse(code)
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        assert all(not ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
        assert len(list(ast.walk(tree))) > 1000


def test_a_file_that_does_not_parse_gives_nothing() -> None:
    for cutter in (builtin_python.code_pieces, builtin_python.prose_pieces, builtin_python.bytecode_pieces):
        assert list(cutter("def (:")) == []


def test_sessions_and_prose_are_complements() -> None:
    text = (
        "What it does.\n\nExamples\n========\n\n>>> f(1)\n2\n>>> for x in y:\n...     x\n\nThen::\n\n    code()\n\nEnd."
    )
    prose, sessions = builtin_python.split_sessions(text)
    assert prose == "What it does.\n\nExamples\n========\n\nThen:\n\nEnd."
    assert sessions == ">>> f(1)\n2\n>>> for x in y:\n...     x"
    assert builtin_python.split_sessions("Examples\n--------\n>>> 1\n1")[1] == ">>> 1\n1"
    assert builtin_python.split_sessions("Text.\n\nExamples\n--------\n\n>>> 1\n1")[0] == "Text."
    assert builtin_python.split_sessions("") == ("", "")


def test_bytecode_constants_do_not_follow_the_hash_seed() -> None:
    listing = "\n".join(
        piece.text for piece in builtin_python.bytecode_pieces("def f(x):\n    return x in {'b', 'a'}\n")
    )
    assert "frozenset({'a', 'b'})" in listing
    assert "<code object f>" in listing


def test_cpp_loses_comments_but_not_strings() -> None:
    (piece,) = builtin_text.cpp_pieces('/* licence */\nint a; // note\nchar* u = "http://x"; /* gone\n */ int b;\n')
    assert piece.text == 'int a;\nchar* u = "http://x";  int b;'


def test_json_is_cut_into_valid_values_without_repeats() -> None:
    import json

    items = [{"name": f"component number {i % 300}", "text": "word " * 20} for i in range(600)]
    cut = builtin_text.json_pieces(builtin_text.Repeats())
    pieces = list(cut(json.dumps({"items": items, "small": 1})))
    assert all(len(piece.text) <= builtin_text.MOST_CHARS for piece in pieces)
    found = [item for piece in pieces for item in json.loads(piece.text) if isinstance(item, dict)]
    assert len(found) == 300
    assert list(cut("{broken")) == []


def test_packing_joins_short_pieces_and_splits_long_ones() -> None:
    short = [Piece(f"f{i}", "a" * 300) for i in range(30)]
    packed = list(builtin_text.pack(short))
    assert "".join(item.text for item in packed).count("a") == 30 * 300
    assert packed[0].name.startswith("f0 .. f")
    long = list(builtin_text.pack([Piece("g", "b" * 20_000)]))
    assert sum(item.text.count("b") for item in long) == 20_000
    assert max(len(item.text) for item in long) <= builtin_text.MOST_CHARS + builtin_text.LEAST_CHARS + 2
    assert list(builtin_text.pack([Piece("h", "c" * 10)])) == []
