"""Documents written to disk come back as they were, in order, and only those asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from weftlm.corpora.source import Document
from weftlm.pipeline import documents as module
from weftlm.pipeline.documents import Documents, write_documents

WRITTEN = [
    ("target", Document("one", "a.jsonl:1", "law")),
    ("corpora", Document("zwei \N{GRINNING FACE}", "caf\udce9.txt", "caf\udce9")),
    ("corpora", Document("three and a target", "a.jsonl:3", None, 5)),
    ("corpora", Document("", "empty", "law")),
]


@pytest.mark.parametrize("at_once", [1, 30, 1 << 23])
def test_documents_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(module, "_BATCH_BYTES", at_once)
    path = tmp_path / "with:colon"
    write_documents(path, WRITTEN)
    found = Documents(path)
    assert [document for _, document in found.stream(np.ones(4, bool))] == [document for _, document in WRITTEN]
    assert list(found.stream(np.array([False, True, False, True]))) == [(n, WRITTEN[n][1]) for n in (1, 3)]
    assert found.of("target").tolist() == [True, False, False, False]
    assert [found.labels[n] if n >= 0 else None for n in found.label_N] == [each.label for _, each in WRITTEN]
    assert found.bytes_N.tolist() == [len(each.text.encode()) for _, each in WRITTEN]
    assert found.digests == [each.digest() for _, each in WRITTEN]


def test_no_documents_are_none(tmp_path: Path) -> None:
    write_documents(tmp_path / "none", [])
    found = Documents(tmp_path / "none")
    assert (len(found), found.labels, list(found.stream(np.zeros(0, bool)))) == (0, [], [])
