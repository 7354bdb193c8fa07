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
from weftlm.corpora.tokenise import tokenise_by_label
from weftlm.corpora.tokens import Tokenizer, train_tokenizer
from weftlm.errors import DataError

DOCUMENTS = [
    Document(f"document {i} says {i * 7919 % 1000} times hello, é", f"here:{i}", f"d{i % 3}") for i in range(300)
]
OFTEN = {"batch_bytes": 500, "commit_bytes": 500}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer((document.text for document in DOCUMENTS), TrainConfig(vocab_size=300))


def breaking(after: int) -> Iterator[Document]:
    yield from DOCUMENTS[:after]
    raise DataError("the stream broke")


def break_at(after: int, tokenizer: Tokenizer, path: Path) -> None:
    with pytest.raises(DataError, match="the stream broke"):
        tokenise_by_label(breaking(after), tokenizer, path, **OFTEN)
    assert not path.exists()


def prints(stores: dict[str, TokenStore]) -> dict[str, str]:
    return {label: store.fingerprint for label, store in stores.items()}


def test_documents_come_back_in_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen: list[int] = []
    stores = tokenise_by_label(DOCUMENTS, tokenizer, tmp_path / "s", batch_bytes=1000, progress=seen.append)
    for label, store in stores.items():
        mine = [document for document in DOCUMENTS if document.label == label]
        assert tokenizer.decode(store.read(0, len(store))) == "".join(d.text + "<|endoftext|>" for d in mine)
        assert store.bytes == sum(len(document.text.encode()) for document in mine)
        assert store.tokenizer == tokenizer.fingerprint
    assert len(seen) > 3
    assert seen == sorted(set(seen))
    assert seen[-1] == sum(store.bytes for store in stores.values())


def test_only_what_was_not_on_record_is_encoded_again(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokenise_by_label(DOCUMENTS, tokenizer, tmp_path / "t")
    break_at(200, tokenizer, tmp_path / "s")
    encoded: list[str] = []
    real = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: encoded.extend(texts) or real(texts))
    stores = tokenise_by_label(DOCUMENTS, tokenizer, tmp_path / "s")
    assert 100 < len(encoded) < 130
    assert encoded == [document.text for document in DOCUMENTS[-len(encoded) :]]
    assert prints(stores) == prints(whole)


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
    break_at(200, tokenizer, tmp_path / "s")
    with pytest.raises(DataError, match=r"not those of the interrupted run.*delete .*\.s\.partial to start again"):
        tokenise_by_label(changed, tokenizer, tmp_path / "s")
    assert len(tokenise_by_label(DOCUMENTS, tokenizer, tmp_path / "s")) == 3


def test_another_tokenizer_starts_again(tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    break_at(200, tokenizer, tmp_path / "s")
    other = train_tokenizer(["hello"] * 3, TrainConfig(vocab_size=260))
    stores = tokenise_by_label(DOCUMENTS, other, tmp_path / "s")
    assert "starting again" in caplog.text
    assert prints(stores) == prints(tokenise_by_label(DOCUMENTS, other, tmp_path / "t"))


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "journal"])
def test_a_damaged_record_starts_again(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    break_at(200, tokenizer, tmp_path / "s")
    path = tmp_path / ".s.partial" / "d1" / "tokens.bin"
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "cut":
        path.write_bytes(data[:3])
    elif damage == "delete":
        path.unlink()
    else:
        (tmp_path / ".s.partial" / "journal.json").write_text("[1")
    with caplog.at_level(logging.WARNING):
        result = tokenise_by_label(DOCUMENTS, tokenizer, tmp_path / "s")
    assert "starting again" in caplog.text
    assert prints(result) == prints(tokenise_by_label(DOCUMENTS, tokenizer, tmp_path / "t"))


def test_no_documents_and_no_label_leave_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document"):
        tokenise_by_label([], tokenizer, tmp_path / "s")
    with pytest.raises(DataError, match="document here has no label"):
        tokenise_by_label([Document("text", "here")], tokenizer, tmp_path / "s")
    with pytest.raises(DataError, match="broke"):
        tokenise_by_label(breaking(3), tokenizer, tmp_path / "s")
    assert not list(tmp_path.iterdir())


SCRIPT = """
import sys, time
from pathlib import Path
from weftlm.corpora.source import Document
from weftlm.corpora.tokenise import tokenise_by_label
from weftlm.corpora.tokens import Tokenizer
root = Path(sys.argv[1])
def stream():
    for i in range(600):
        yield Document(f"number {i} of the stream", f"o{i}", "d")
        if i > 100:
            time.sleep(0.005)
tokenise_by_label(stream(), Tokenizer.load(root / "tok"), root / "s", batch_bytes=300, commit_bytes=300)
"""


def test_a_killed_process_leaves_no_store_and_is_resumed(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path / "tok")
    journal = tmp_path / ".s.partial" / "journal.json"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.DEVNULL)
    while not journal.exists():
        assert process.poll() is None, "the process ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "s").exists()
    documents = [Document(f"number {i} of the stream", f"o{i}", "d") for i in range(600)]
    whole = tokenise_by_label(documents, tokenizer, tmp_path / "t")
    encoded: list[str] = []
    real = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: encoded.extend(texts) or real(texts))
    assert prints(tokenise_by_label(documents, tokenizer, tmp_path / "s")) == prints(whole)
    assert 0 < len(encoded) < 600
    TokenStore(tmp_path / "s" / "d")
