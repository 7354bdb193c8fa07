"""Reading: every format and compression, every fault by file and line, limits, labels, constant memory."""

import gzip
import json
import re
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from weftlm.config import validate
from weftlm.corpora.config import CorpusConfig
from weftlm.corpora.formats import open_binary
from weftlm.corpora.reading import ReadingReport, corpus_fingerprint, read_documents
from weftlm.errors import ConfigError, DataError

TEXTS = ["one", "zwei\n\nlines", "trois 🧵 é", "four"]


def compress(data: bytes, kind: str) -> bytes:
    if kind == ".gz":
        return gzip.compress(data)
    if kind == ".zst":
        return zstandard.ZstdCompressor().compress(data)
    return data


def jsonl(records: list[object]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read(report: ReadingReport | None = None, **config: object) -> list[tuple[str, str, str | None]]:
    documents = read_documents(validate(CorpusConfig, config, "corpus"), report or ReadingReport())
    return [(document.text, document.origin, document.label) for document in documents]


@pytest.mark.parametrize(("suffix", "compression"), [(".jsonl", ".gz"), (".json", ""), (".ndjson", ".zst")])
def test_json_lines(tmp_path: Path, suffix: str, compression: str) -> None:
    path = tmp_path / f"a{suffix}{compression}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + jsonl([{"text": text} for text in TEXTS]) + b"\n", compression))
    report = ReadingReport()
    assert read(report, path=str(path)) == [(text, f"{path}:{i}", None) for i, text in enumerate(TEXTS, 1)]
    size = sum(len(text.encode()) for text in TEXTS)
    assert (report.documents, report.bytes, report.files, report.problems) == (4, size, 1, {})


def test_text_whole_and_in_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    text = "\n  \nfirst\nline\n\n\r\nsecond\r\n \n"
    path.write_bytes(compress(text.encode(), ".gz"))
    assert read(path=str(path)) == [(text, f"{path}:1", None)]
    paragraphs = [("first\nline", f"{path}:3", None), ("second", f"{path}:7", None)]
    assert read(path=str(path), split_documents="blank_lines") == paragraphs


def test_zstd_of_several_frames_and_large_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    data = b"words " * 90 + b"." * 3_000_000
    path.write_bytes(compress(data, ".zst") + compress(b"", ".zst") + compress(b"tail", ".zst"))
    with open_binary(path) as file:
        assert file.read() == data + b"tail"


def test_parquet_with_nested_and_binary_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"data": {"text": text, "lang": "x"}, "raw": text.encode(), "id": 7} for text in TEXTS]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    expected = [(text, f"{path}[{i}]") for i, text in enumerate(TEXTS)]
    assert read(path=str(path), text_field="data.text", label_field="data.lang") == [(*row, "x") for row in expected]
    assert read(path=str(path), text_field="raw", label_field="id") == [(*row, "7") for row in expected]


def test_a_folder_is_read_in_order_of_path_and_says_what_it_leaves(tmp_path: Path) -> None:
    for name in ["b/z.py", "b/a.PY", "a.jsonl", "c.md", "d.bin", ".git/x.py", "b/.hidden.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "json"}' if name.endswith("jsonl") else name)
    report = ReadingReport()
    names = [Path(origin.rpartition(":")[0]).name for _, origin, _ in read(report, path=str(tmp_path))]
    assert names == ["a.jsonl", "a.PY", "z.py", "c.md"]
    assert (report.ignored_files, report.ignored_examples) == (1, [str(tmp_path / "d.bin")])
    assert [text for text, _, _ in read(path=str(tmp_path), format="code")] == ["b/a.PY", "b/z.py"]
    assert [text for text, _, _ in read(path=str(tmp_path), suffixes=[".bin"])] == ["d.bin"]
    assert [text for text, _, _ in read(path=f"{tmp_path}/**/*.py")] == ["b/z.py"]


def test_labels(tmp_path: Path) -> None:
    path = tmp_path / "cs.RO.jsonl.gz"
    path.write_bytes(compress(jsonl([{"text": "a", "meta": {"d": "x"}, "meta.n": 3}]), ".gz"))
    labels = {
        "fixed": {"label": "fixed"},
        "cs.RO": {"label_from": "file"},
        tmp_path.name: {"label_from": "folder"},
        "x": {"label_field": "meta.d"},
        "3": {"label_field": "meta.n"},
    }
    for label, config in labels.items():
        assert read(path=str(path), **config)[0][2] == label


FAULTS = {
    "undecodable ": (b'{"text": "\\ud800"}', "half a surrogate pair"),
    "undecodable": (b'{"text": "\xff"}', r"byte 0xff at column 11"),
    "broken_json": (b'{"text": ', "not valid JSON"),
    "not_an_object": (b'["text"]', "JSON list"),
    "missing_field": (b'{"txt": "a"}', "field 'text' is missing; fields: txt"),
    "not_text": (b'{"text": 3}', "type int, not text"),
    "empty": (b'{"text": " \\n"}', "empty"),
    "missing_label": (b'{"text": "a", "d": null}', "field 'd' holds nothing"),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_faulty_line_is_counted_or_stops_and_always_named(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    good = jsonl([{"text": "good", "d": "x"}])
    line, message = FAULTS[reason]
    path.write_bytes(good + line + b"\n" + good)
    config = {"path": str(path), "label_field": "d"} if reason == "missing_label" else {"path": str(path)}
    report = ReadingReport()
    assert [origin for _, origin, _ in read(report, **config, on_error="skip")] == [f"{path}:1", f"{path}:3"]
    assert dict(report.problems) == {reason.strip(): 1}
    assert report.examples[reason.strip()][0].startswith(f"{path}:2: ")
    report = ReadingReport()
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:2: .*{re.escape(message)}.*on_error: skip"):
        read(report, **config)
    assert report.documents == 1
    path.write_bytes((line + b"\n") * 50)
    report = ReadingReport()
    read(report, **config, on_error="skip")
    assert report.to_json()["problems"] == {reason.strip(): 50}
    assert len(report.examples[reason.strip()]) == 5


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_truncated_file_is_never_taken_for_a_short_one(tmp_path: Path, suffix: str, compression: str) -> None:
    path = tmp_path / f"a{suffix}{compression}"
    words = [f"{i * 2654435761 % 2**32:x}" for i in range(20_000)]
    data = compress(jsonl([{"text": word} for word in words]), compression)
    path.write_bytes(data[: len(data) // 2])
    report = ReadingReport()
    taken = read(report, path=str(path), on_error="skip")
    assert dict(report.problems) == {"truncated": 1}
    assert (0 < len(taken) < len(words)) if suffix == ".jsonl" else taken == []
    place = f"{path}:{len(taken) + 1}"
    assert report.examples["truncated"][0].startswith(place)
    with pytest.raises(DataError, match=re.escape(place) + ".*ends too early"):
        read(path=str(path))


def test_undecodable_rows_and_lines_are_named_singly(tmp_path: Path) -> None:
    table, lines = tmp_path / "a.parquet", tmp_path / "a.txt"
    pq.write_table(pa.table({"text": pa.array([b"ok", b"\xff", b"fine"], pa.binary()).view(pa.string())}), table)
    lines.write_bytes(b"one\n\ntwo\nbad \xff\n\nthree\n")
    with pytest.raises(DataError, match=re.escape(f"{lines}:4: byte 0xff")):
        read(path=str(lines))
    for path, how, left, place in (
        (table, {}, [("ok", f"{table}[0]", None), ("fine", f"{table}[2]", None)], f"{table}[1]: byte 0xff"),
        (lines, {"split_documents": "blank_lines"},
         [("one", f"{lines}:1", None), ("three", f"{lines}:6", None)], f"{lines}:4: byte 0xff"),
    ):  # fmt: skip
        report = ReadingReport()
        assert read(report, path=str(path), on_error="skip", **how) == left
        assert report.problems == {"undecodable": 1}
        assert report.examples["undecodable"][0].startswith(place)


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"text": "ééé"}] * 10))
    report = ReadingReport()
    assert len(read(report, path=str(path), max_documents=4)) == 4
    assert report.stopped_at == [f"{path}:4: max_documents 4"]
    assert len(read(path=str(path), max_bytes=17)) == 2
    assert len(read(path=str(path), max_bytes=18)) == 3


def test_nothing_found_says_so(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match="matches no file"):
            read(path=str(path))
    with pytest.raises(DataError, match="holds no file of format code"):
        read(path=str(tmp_path), format="code")
    (tmp_path / "odd").write_text("x")
    with pytest.raises(ConfigError, match="does not tell its format; set format"):
        read(path=str(tmp_path / "odd"))
    assert read(path=str(tmp_path / "odd"), format="text")[0][0] == "x"
    with pytest.raises(ConfigError, match="has no field 'd'"):
        read(path=str(tmp_path / "odd"), format="auto", suffixes=[""], label_field="d")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "exactly one of path, dataset and builtin"),
        ({"path": "a", "label": "x", "label_from": "file"}, "at most one"),
        ({"path": "a", "revision": "x"}, "revision goes with dataset, not with path"),
        ({"dataset": "a", "label_from": "file"}, "label_from goes with path"),
        ({"builtin": "all", "label_field": "x"}, "have no fields"),
        ({"path": "a", "format": "code", "label_field": "x"}, "use label_from"),
        ({"path": "a", "suffixes": ["py"]}, "begin with a dot"),
        ({"path": "a", "on_eror": "skip"}, "did you mean 'on_error'"),
    ],
)
def test_configurations_that_make_no_sense(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(CorpusConfig, config, "corpus")


def test_builtin_corpora() -> None:
    assert [label for _, _, label in read(builtin=["licences"], max_documents=3)] == ["licences"] * 3
    assert {label for _, _, label in read(builtin=["licences"], max_documents=2, label="law")} == {"law"}
    with pytest.raises(ConfigError, match="did you mean 'licences'"):
        read_documents(CorpusConfig(builtin=("licenses",)), ReadingReport())


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_from_a_folder(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_bytes(jsonl([{"text": text, "n": 1} for text in TEXTS]))
    rows = read(dataset=str(tmp_path / "d"), streaming=streaming, label_field="n")
    assert rows == [(text, f"{tmp_path / 'd'}[{i}]", "1") for i, text in enumerate(TEXTS)]


def test_datasets_saved_to_disk_with_class_labels(tmp_path: Path) -> None:
    topic = {"topic": datasets.ClassLabel(names=["sea", "sky"])}
    features = datasets.Features({"text": datasets.Value("string"), "meta": topic})
    data = {"text": ["a", "b", None], "meta": [{"topic": 1}, {"topic": 0}, {"topic": 1}]}
    saved = datasets.Dataset.from_dict(data, features=features)
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "d")
    report = ReadingReport()
    rows = read(report, dataset=str(tmp_path / "d"), label_field="meta.topic", on_error="skip")
    assert [(text, label) for text, _, label in rows] == [("a", "sky"), ("b", "sea")]
    assert report.examples["missing_field"][0].startswith(f"{tmp_path / 'd'}[2]: ")
    with pytest.raises(DataError, match=r"split missing.*it has the splits train"):
        read(dataset=str(tmp_path / "d"), split="missing")
    with pytest.raises(ConfigError, match="there is no folder"):
        read(dataset=str(tmp_path / "nowhere"))


def test_the_fingerprint_of_an_input_changes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"a")
    first, again = (corpus_fingerprint(CorpusConfig(path=str(path))) for _ in range(2))
    path.write_bytes(b"ab")
    assert first == again != corpus_fingerprint(CorpusConfig(path=str(path)))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress(jsonl([{"text": f"{i} " + "word " * 400} for i in range(5_000)]), ".zst"))
    config = CorpusConfig(path=str(path))
    tracemalloc.start()
    total = sum(len(document.text) for document in read_documents(config, ReadingReport()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 10_000_000
    assert peak < 8_000_000
