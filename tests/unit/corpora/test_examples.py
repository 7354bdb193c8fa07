"""Prompts and targets: read apart, stored together, found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from weftlm.corpora.config import CorpusConfig, TrainConfig
from weftlm.corpora.examples import ExampleSource, examples_of
from weftlm.corpora.reading import ReadingReport, read_documents
from weftlm.corpora.source import ArraySource, Document
from weftlm.corpora.store import TokenStore, open_stores
from weftlm.corpora.store_writer import tokenise_by_label, write_stores
from weftlm.corpora.tokens import train_tokenizer
from weftlm.errors import ConfigError, DataError

PAIRS = [("is é a letter? ", "yes"), ("is 7 a letter? ", "no, a number"), ("say nothing much: ", "well")]


TOKENIZER = train_tokenizer(["is a letter a number, yes or no, well much " * 9], TrainConfig(vocab_size=280))


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def documents(pairs: list[tuple[str, str]] = PAIRS) -> list[Document]:
    return [Document(p + t, f"o{i}", "task", len(p)) for i, (p, t) in enumerate(pairs)]


def read(config: dict[str, Any]) -> list[Document]:
    return list(read_documents(CorpusConfig.model_validate(config), ReadingReport()))


def test_prompts_are_read_from_their_field(tmp_path: Path) -> None:
    records = [{"in": {"text": p}, "out": t} for p, t in PAIRS]
    config = {"path": write(tmp_path / "a.jsonl", records), "text_field": "out", "prompt_field": "in.text"}
    found = read(config)
    assert [(d.text[: d.prompt], d.text[d.prompt :]) for d in found] == PAIRS
    assert [d.prompt for d in read({**config, "prompt_field": None})] == [None] * 3
    pq.write_table(pa.table({"in": [p for p, _ in PAIRS], "out": [t for _, t in PAIRS]}), tmp_path / "a.parquet")
    again = read({"path": str(tmp_path / "a.parquet"), "text_field": "out", "prompt_field": "in"})
    assert [(d.text, d.prompt) for d in again] == [(d.text, d.prompt) for d in found]


@pytest.mark.parametrize("record", [{"out": "x"}, {"in": 3, "out": "x"}, {"in": " ", "out": "x"}, {"in": "x"}])
def test_a_faulty_prompt_is_a_faulty_record(tmp_path: Path, record: dict[str, Any]) -> None:
    config = {"path": write(tmp_path / "a.jsonl", [record]), "text_field": "out", "prompt_field": "in"}
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        read(config)
    assert read({**config, "on_error": "skip"}) == []


def test_what_has_no_fields_has_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match="has no field 'p'"):
        read({"path": str(tmp_path / "a.txt"), "prompt_field": "p"})
    for wrong in ({"path": "a", "format": "code"}, {"builtin": "all"}):
        with pytest.raises(ValueError, match="prompt_field"):
            CorpusConfig.model_validate({**wrong, "prompt_field": "p"})


def test_a_store_gives_its_examples_back(tmp_path: Path) -> None:
    store = tokenise_by_label(documents(), TOKENIZER, tmp_path / "s", batch_bytes=20)["task"]
    examples = examples_of(store)
    assert examples is not None
    assert len(examples) == store.documents == 3
    for (prompt, target), found in zip(PAIRS, examples.read([0, 1, 2]), strict=True):
        assert TOKENIZER.decode(found.prompt_P.tolist()) == prompt
        assert TOKENIZER.decode(found.target_C.tolist()) == target
        assert found.prompt_P.tolist() == TOKENIZER.encode_batch([prompt])[0].tolist()
    assert examples.target_bytes_N.tolist() == [len(t.encode()) for _, t in PAIRS]
    assert store.bytes == sum(len((p + t).encode()) for p, t in PAIRS)
    assert [len(part) for part in examples.read([2])[0]] == [examples.prompts_N[2], examples.targets_N[2]]
    with pytest.raises(IndexError, match="example 3 of 3"):
        examples.read([3])


def test_prompts_belong_to_the_fingerprint_and_to_what_is_verified(tmp_path: Path) -> None:
    def made(name: str, cut: int | None) -> TokenStore:
        with write_stores(tmp_path / name, TOKENIZER.vocabulary) as writer:
            writer.append([1, 2, 3, 4], 9, "d", prompt=None if cut is None else (cut, 2 * cut))
        return open_stores(tmp_path / name)["d"]

    stores = [made("plain", None), made("one", 1), made("two", 2), made("again", 2)]
    prints = [store.fingerprint for store in stores]
    assert len(set(prints)) == 3
    assert prints[2] == prints[3]
    assert examples_of(stores[0]) is None
    assert not (tmp_path / "plain/d/prompts.bin").exists()
    path = tmp_path / "two/d/prompts.bin"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    with pytest.raises(DataError, match=r"prompts\.bin was altered"):
        open_stores(tmp_path / "two")


def test_a_domain_is_of_one_kind(tmp_path: Path) -> None:
    mixed = [*documents(), Document("plain", "p", "task")]
    with pytest.raises(DataError, match="has no prompt, unlike those before it"):
        tokenise_by_label(mixed, TOKENIZER, tmp_path / "a")
    with pytest.raises(DataError, match="has a prompt, unlike"):
        tokenise_by_label(mixed[::-1], TOKENIZER, tmp_path / "b")
    two = [*documents(), Document("plain", "p", "text")]
    stores = tokenise_by_label(two, TOKENIZER, tmp_path / "c")
    assert [examples_of(stores[label]) is None for label in ("task", "text")] == [False, True]


def test_a_limit_keeps_whole_examples_and_cuts_text(tmp_path: Path) -> None:
    mixed = [*documents(), *(Document("a letter a number", "p", "text") for _ in range(3))]
    whole = tokenise_by_label(mixed, TOKENIZER, tmp_path / "whole")
    ends = whole["task"].document_spans[:, 1].tolist()
    for number, (limit, count) in enumerate([(ends[2], 3), (ends[2] - 1, 2), (ends[1], 2), (ends[0] + 1, 1)]):
        stores = tokenise_by_label(mixed, TOKENIZER, tmp_path / str(number), limits={"task": limit, "text": limit})
        found = examples_of(stores["task"])
        assert found is not None
        assert len(found) == stores["task"].documents == count
        assert len(stores["text"]) == min(limit, len(whole["text"]))
        begin = len(stores["text"]) - 1
        assert stores["text"].read(0, begin).tolist() == whole["text"].read(0, begin).tolist()
        assert stores["text"].read(begin, 1).tolist() == [TOKENIZER.eos_id]


def test_examples_in_memory() -> None:
    source = ExampleSource([([1, 2], [3]), ([4], [5, 6]), ([7], [8])], eos_id=9, target_bytes=[1, 2, 1])
    assert source.read(0, len(source)).tolist() == [1, 2, 3, 9, 4, 5, 6, 9, 7, 8, 9]
    assert [part.tolist() for part in source.examples.read(np.array([1]))[0]] == [[4], [5, 6]]
    assert examples_of(ArraySource([1, 2, 3])) is None
    with pytest.raises(DataError, match="each with a target"):
        ExampleSource([([1], [])], eos_id=9)
