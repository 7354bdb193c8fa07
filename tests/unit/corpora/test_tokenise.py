"""Tokenising streams: interruption, kill, changed streams, progress."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from weftlm.corpora.config import TrainConfig
from weftlm.corpora.source import Document
from weftlm.corpora.store import TokenStore
from weftlm.corpora.tokenise import TokeniseProgress, tokenise_by_label, tokenise_documents
from weftlm.corpora.tokens import Tokenizer, train_tokenizer
from weftlm.errors import DataError

DOCUMENTS = [
    Document(f"document {i} says {i * 7919 % 1000} times hello, é", f"here:{i}", f"d{i % 3}") for i in range(300)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer((document.text for document in DOCUMENTS), TrainConfig(vocab_size=300))


def breaking(after: int) -> Iterator[Document]:
    yield from DOCUMENTS[:after]
    raise DataError("the stream broke")


def test_documents_come_back_in_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen: list[TokeniseProgress] = []
    store = tokenise_documents(DOCUMENTS, tokenizer, tmp_path / "s", batch_bytes=1000, progress=seen.append)
    texts = "".join(document.text + "<|endoftext|>" for document in DOCUMENTS)
    assert tokenizer.decode(store.read(0, len(store))) == texts
    assert store.bytes == sum(len(document.text.encode()) for document in DOCUMENTS)
    assert store.tokenizer == tokenizer.fingerprint
    assert len(seen) > 3
    assert [progress.documents for progress in seen] == sorted({progress.documents for progress in seen})
    assert seen[-1] == TokeniseProgress(300, len(store), store.bytes, 0)


def test_only_what_was_not_on_record_is_encoded_again(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="the stream broke"):
        tokenise_documents(breaking(200), tokenizer, tmp_path / "s", batch_bytes=500, commit_bytes=500)
    assert not (tmp_path / "s").exists()
    encoded: list[str] = []
    real = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: encoded.extend(texts) or real(texts))
    seen: list[TokeniseProgress] = []
    store = tokenise_documents(DOCUMENTS, tokenizer, tmp_path / "s", progress=seen.append)
    assert seen[-1].resumed_documents == 300 - len(encoded)
    assert 100 < len(encoded) < 130
    assert encoded == [document.text for document in DOCUMENTS[-len(encoded) :]]
    assert store.fingerprint == tokenise_documents(DOCUMENTS, tokenizer, tmp_path / "t").fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        [Document("other", "x", "d0"), *DOCUMENTS[1:]],
        [DOCUMENTS[1], DOCUMENTS[0], *DOCUMENTS[2:]],
        [Document(DOCUMENTS[0].text, "x", "d1"), *DOCUMENTS[1:]],
        DOCUMENTS[:50],
    ],
)
def test_a_changed_stream_is_refused(tokenizer: Tokenizer, tmp_path: Path, changed: list[Document]) -> None:
    with pytest.raises(DataError, match="broke"):
        tokenise_documents(breaking(200), tokenizer, tmp_path / "s", batch_bytes=500, commit_bytes=500)
    with pytest.raises(DataError, match=r"not those of the interrupted run.*delete .*\.s\.partial to start again"):
        tokenise_documents(changed, tokenizer, tmp_path / "s")
    assert len(tokenise_documents(DOCUMENTS, tokenizer, tmp_path / "s")) > 0


def test_another_tokenizer_starts_again(tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="broke"):
        tokenise_documents(breaking(200), tokenizer, tmp_path / "s", batch_bytes=500, commit_bytes=500)
    other = train_tokenizer(["hello"] * 3, TrainConfig(vocab_size=260))
    with caplog.at_level(logging.WARNING):
        store = tokenise_documents(DOCUMENTS, other, tmp_path / "s")
    assert "starting again" in caplog.text
    assert store.fingerprint == tokenise_documents(DOCUMENTS, other, tmp_path / "t").fingerprint


def test_a_damaged_record_starts_again(tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = tokenise_by_label(DOCUMENTS, tokenizer, tmp_path / "t")
    for damage in ("flip", "cut", "delete", "journal"):
        with pytest.raises(DataError, match="broke"):
            tokenise_by_label(breaking(200), tokenizer, tmp_path / damage, batch_bytes=500, commit_bytes=500)
        partial = tmp_path / f".{damage}.partial"
        path = partial / "d1" / "tokens-00000.bin"
        data = path.read_bytes()
        if damage == "flip":
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        elif damage == "cut":
            path.write_bytes(data[:3])
        elif damage == "delete":
            path.unlink()
        else:
            (partial / "journal.json").write_text("[1")
        caplog.clear()
        result = tokenise_by_label(DOCUMENTS, tokenizer, tmp_path / damage)
        assert ("starting again" in caplog.text) == (damage != "journal")
        assert {k: v.fingerprint for k, v in result.items()} == {k: v.fingerprint for k, v in whole.items()}


def test_no_documents_leave_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for function in (tokenise_documents, tokenise_by_label):
        with pytest.raises(DataError, match="no document"):
            function([], tokenizer, tmp_path / "s")
    with pytest.raises(DataError, match="broke"):
        tokenise_documents(breaking(3), tokenizer, tmp_path / "s")
    assert not list(tmp_path.iterdir())


SCRIPT = """
import sys, time
from pathlib import Path
from weftlm.corpora.source import Document
from weftlm.corpora.tokenise import tokenise_documents
from weftlm.corpora.tokens import Tokenizer
root = Path(sys.argv[1])
def stream():
    for i in range(600):
        yield Document(f"number {i} of the stream", f"o{i}")
        if len(sys.argv) > 2 and i > 100:
            time.sleep(0.005)
store = tokenise_documents(stream(), Tokenizer.load(root / "tok"), root / "s", batch_bytes=300, commit_bytes=300)
print(store.fingerprint)
"""


def test_a_killed_process_leaves_no_store_and_is_taken_up(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tok")
    journal = tmp_path / ".s.partial" / "journal.json"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), "slow"], stdout=subprocess.DEVNULL)
    while not journal.exists():
        assert process.poll() is None, "the process ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "s").exists()
    documents = [Document(f"number {i} of the stream", f"o{i}") for i in range(600)]
    seen: list[TokeniseProgress] = []
    store = tokenise_documents(documents, tokenizer, tmp_path / "s", progress=seen.append)
    assert 0 < seen[-1].resumed_documents < 600
    assert store.fingerprint == tokenise_documents(documents, tokenizer, tmp_path / "t").fingerprint
    TokenStore(tmp_path / "s").verify()
