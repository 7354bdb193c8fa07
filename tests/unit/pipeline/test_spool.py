"""Documents spooled to disk come back as they were, in order, a bounded batch at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from weftlm.corpora.source import Document
from weftlm.pipeline import spool as module
from weftlm.pipeline.spool import NO_LABEL, Spool, SpoolWriter

DOCUMENTS = [
    Document("one", "a.jsonl:1", "law"),
    Document("zwei \N{GRINNING FACE}", "caf\udce9.txt", "caf\udce9"),
    Document("three and a target", "a.jsonl:3", None, 5),
    Document("", "empty", "law"),
]


def write(folder: Path, documents: list[Document]) -> Spool:
    with SpoolWriter(folder) as writer:
        for document in documents:
            writer.add(document)
    return Spool(folder)


def test_documents_come_back_as_they_were(tmp_path: Path) -> None:
    spool = write(tmp_path / "with:colon", DOCUMENTS)
    assert len(spool) == 4
    assert list(spool) == DOCUMENTS
    assert [number for block in spool.label_numbers() for number in block.tolist()] == [0, 1, NO_LABEL, 0]
    assert list(spool.digests()) == [(each.digest(), len(each.text.encode())) for each in DOCUMENTS]
    assert list(write(tmp_path / "none", [])) == []


def test_large_documents_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_BYTES", 100)
    spool = write(tmp_path, [Document("x" * 60, str(number), "a") for number in range(10)])
    assert [len(block) for block in spool.label_numbers()] == [2, 2, 2, 2, 2]


def test_what_an_interrupted_writer_left_goes(tmp_path: Path) -> None:
    def interrupted() -> None:
        with SpoolWriter(tmp_path) as writer:
            writer.add(DOCUMENTS[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
