"""Built-in corpora: distinct, deterministic, without the text of their neighbours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from weftlm.corpora import builtin
from weftlm.corpora.builtin import builtin_documents, builtin_fingerprint, builtin_names
from weftlm.errors import ConfigError

CAP = 40_000


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return {name: [item.text for item in builtin_documents(name, CAP)] for name in builtin_names()}


def test_every_domain_fills_its_cap_with_documents_of_reasonable_length(texts: dict[str, list[str]]) -> None:
    assert len(texts) >= 8
    longest = builtin.USUAL_CHARS + 2 * builtin.LEAST_CHARS + 4
    for name, documents in texts.items():
        total = sum(len(text.encode()) for text in documents)
        assert 0.7 * CAP < total <= CAP, name
        assert all(builtin.LEAST_CHARS <= len(text) <= longest for text in documents), name


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
        assert re.match(r"[\w-]+ \d[\w.+]*: [^/].* \[1\]$", document.origin), document.origin
        assert sys.prefix not in document.origin


def test_documents_do_not_depend_on_the_process() -> None:
    names = ("bytecode", "sessions")
    program = (
        "import hashlib, sys\n"
        "from weftlm.corpora.builtin import builtin_documents\n"
        f"for name in {names!r}:\n"
        "    all = [(d.text, d.origin) for d in builtin_documents(name, 30000)]\n"
        "    print(name, len(all), hashlib.sha256(repr(all).encode()).hexdigest())\n"
    )
    command = [sys.executable, "-c", program]
    outputs = {
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, stdout=subprocess.PIPE).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().count(b"\n") == len(names)


def test_fingerprint_follows_names_and_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert builtin_fingerprint(["licences"]) != builtin_fingerprint(["json"])
    path = tmp_path / "a.json"
    monkeypatch.setattr(builtin, "_listed", lambda package: [("package 1: a.json", path)])
    absent = builtin_fingerprint(["json"])
    path.write_text("1")
    before = builtin_fingerprint(["json"])
    assert builtin_fingerprint(["json"]) == before != absent
    path.write_text("2")
    assert builtin_fingerprint(["json"]) not in (before, absent)


def test_unknown_name_and_senseless_cap_are_errors() -> None:
    with pytest.raises(ConfigError, match="did you mean 'licences'"):
        builtin_documents("licenses")
    with pytest.raises(ConfigError, match="max_bytes is 0"):
        builtin_documents("json", 0)


def test_absent_packages_and_files_that_cannot_be_taken_apart_give_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, data in (("a.py", b"def (:"), ("b.py", b"\xff"), ("c.py", b"")):
        (tmp_path / name).write_bytes(data)
    files = [(f"package 1: {path.name}", path) for path in tmp_path.iterdir()]
    for found in (files, []):
        monkeypatch.setattr(builtin, "_listed", lambda package, found=found: found)
        for name in ("python_code", "ml_prose", "sessions", "bytecode"):
            assert list(builtin_documents(name)) == []
    assert "'sessions' holds only 0 bytes with the packages installed here" in caplog.text
