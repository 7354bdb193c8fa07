"""Damaged, misnamed, hostile and endless inputs: for every reader a `DataError` with file and place, in little time."""

import bz2
import gzip
import json
import lzma
import os
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from weftlm.config import validate
from weftlm.corpora import formats
from weftlm.corpora.config import CorpusConfig
from weftlm.corpora.formats import COMPRESSIONS
from weftlm.corpora.reading import ReadingReport, corpus_fingerprint, read_documents
from weftlm.errors import DataError, WeftError

RAW = re.compile(r"Errno|Traceback|NoneType|object at 0x|codec can't|set_int_max_str_digits|recursion depth")
PICKLE = b"\x80\x04\x95\x06\x00\x00\x00\x00\x00\x00\x00]\x94\x8c\x01a\x94a."
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, 9, mtime=0),
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def read(report: ReadingReport | None = None, **config: object) -> list[str]:
    documents = read_documents(validate(CorpusConfig, config, "corpus"), report or ReadingReport())
    return [document.text for document in documents]


def refused(kind: type[WeftError] = DataError, **config: object) -> str:
    """The message of a refusal, which must be plain and come within two seconds."""
    begin = time.process_time()
    with pytest.raises(kind) as caught:
        read(**config)
    assert time.process_time() - begin < 2
    assert not RAW.search(str(caught.value)), caught.value
    return str(caught.value)


def lines(count: int = 400) -> bytes:
    return b"".join(json.dumps({"text": f"{i * 2654435761 % 2**32:x} text"}).encode() + b"\n" for i in range(count))


def array(count: int = 400) -> bytes:
    return json.dumps([json.loads(line) for line in lines(count).splitlines()], indent=1).encode()


def table(count: int = 400) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in lines(count).splitlines()]), sink)
    return sink.getvalue().to_pybytes()


def cells(count: int = 400) -> bytes:
    return b"text\n" + b"".join(b'"%x, text"\n' % (i * 2654435761 % 2**32) for i in range(count))


WHOLE: dict[str, Callable[[], bytes]] = {
    ".jsonl": lines, ".json": array, ".csv": cells, ".tsv": cells, ".txt": lines, ".md": lines, ".py": lines,
    ".parquet": table,
}  # fmt: skip
NAMES = [
    suffix + compression
    for suffix in WHOLE
    for compression in (("", *COMPRESSIONS) if suffix in (".jsonl", ".json", ".csv", ".txt") else ("",))
]


def whole(name: str) -> bytes:
    suffix, compression = formats.split_suffix(Path("a" + name))
    return COMPRESS[compression](WHOLE[suffix]())


def flip(data: bytes, seed: int) -> bytes:
    """Sixteen bytes changed, the first of them near the beginning."""
    found = bytearray(data)
    rng = np.random.default_rng(seed)
    for place in [int(rng.integers(min(64, len(data)))), *map(int, rng.integers(len(data), size=15))]:
        found[place] ^= int(rng.integers(1, 256))
    return bytes(found)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda data: data[: len(data) // 2],
    "all but the end": lambda data: data[:-7],
    "no beginning": lambda data: data[5:],
    "one byte": lambda data: data[:1],
    "nothing": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: np.random.default_rng(3).bytes(len(data)),
    "bytes changed": lambda data: flip(data, 0),
    "other bytes changed": lambda data: flip(data, 1),
    "twice": lambda data: data + data,
    "UTF-16": lambda data: "text of another kind\n".encode("utf-16"),
    "UTF-16 without a mark": lambda data: "text of another kind\n".encode("utf-16-le"),
    "a pickle": lambda data: PICKLE,
    "a zip archive": lambda data: b"PK\x03\x04" + data,
    "gzip": gzip.compress,
    "Parquet": lambda data: table(3),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damage_is_a_crash_and_none_is_silent(tmp_path: Path, damage: str) -> None:
    for name in NAMES:
        data = whole(name)
        damaged = DAMAGE[damage](data)
        path = tmp_path / f"a{name}"
        path.write_bytes(damaged)
        report = ReadingReport()
        taken = read(report, path=str(path), on_error="skip")
        for places in report.examples.values():
            assert all(place.startswith(str(path)) and not RAW.search(place) for place in places), places
        if report.problems:
            assert str(path) in refused(path=str(path))
        else:  # what is left is text by itself: nothing of it may be missing
            assert taken == read(path=str(path))
            assert damaged.count(b"\n") >= (len(taken) if name in (".jsonl", ".csv", ".tsv") else 0)
        if damage in ("a pickle", "a zip archive", "UTF-16", "UTF-16 without a mark"):
            assert report.problems.total() == 1, name


@pytest.mark.parametrize(
    ("suffix", "data", "says"),
    [
        (".txt", "ä".encode("utf-16"), "UTF-16 text; convert it"),
        (".jsonl", '{"text": "ä"}'.encode("utf-16-be"), "UTF-16 text; convert it"),
        (".csv", "text\nä".encode("utf-32"), "UTF-32 text; convert it"),
        (".jsonl", gzip.compress(b"{}", mtime=0), "gzip data; let its name end in .gz"),
        (".txt", lzma.compress(b"{}"), "xz data; let its name end in .xz"),
        (".json", table(2), "Parquet; let its name end in .parquet"),
        (".parquet", b'{"text": "a"}\n', "cannot be read"),
        (".txt.gz", b"plain text that is long enough", "not compressed as its name"),
        (".txt.bz2", gzip.compress(b"text", mtime=0), "not compressed as its name"),
        (".txt", PICKLE, "a pickle, which is never opened"),
        (".jsonl", b'[{"text": "a"}]\n', "must end in .json"),
        (".json", b'[{"text": "a"}, {"text": "b"', "not valid JSON"),
        (".json", b'[{"text": "a"} {"text": "b"}]', "not valid JSON"),
        (".json", b'["a"]', "holds a JSON string"),
        (".json", b'[{"text": ' + b"[" * 100_000, "nested too deep"),
        (".jsonl", b'{"text": ' + b"[" * 100_000, "nested too deep"),
        (".jsonl", b'{"text": "a", "n": ' + b"9" * 50_000 + b"}", "too many digits"),
        (".csv", b"text,text\na,b\n", "2 columns are named 'text'"),
        (".csv", b"text,n\na\n", "has 1 cells and the header 2"),
        (".csv", b'text\n"a', "not valid CSV"),
        (".csv", b"text\n\xff\n", "bytes that are not UTF-8"),
        (".csv", b"body\na\n", "field 'text' is missing; fields: body"),
    ],
)  # fmt: skip
def test_the_message_says_what_came_and_what_to_do(tmp_path: Path, suffix: str, data: bytes, says: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    message = refused(path=str(path))
    assert says in message
    assert message.startswith(str(path))


@pytest.mark.parametrize("compression", ["", ".xz"])
def test_arrays_and_tables_read_as_lines_do(tmp_path: Path, compression: str) -> None:
    wanted = [json.loads(line)["text"] for line in lines().splitlines()]
    wanted[1] = 'quotes " , ] } \\ and\nlines \N{SPOOL OF THREAD}' + "x" * 1_200_000
    bodies = {
        ".jsonl": "\n".join(json.dumps({"text": text}) for text in wanted),
        ".json": "\ufeff" + json.dumps([{"text": text, "n": [1, {"a": 2}]} for text in wanted], indent=2),
        ".csv": "\ufefftext,n\r\n" + "".join(f'"{text.replace(chr(34), chr(34) * 2)}",1\r\n' for text in wanted),
        ".tsv": "n\ttext\n" + "".join(f'1\t"{text.replace(chr(34), chr(34) * 2)}"\n' for text in wanted),
    }
    for suffix, body in bodies.items():
        path = tmp_path / f"a{suffix}{compression}"
        path.write_bytes(COMPRESS[compression](body.encode()))
        assert read(path=str(path)) == wanted
    assert read(path=str(tmp_path / "*.t*"), label="x") == wanted


def test_values_that_python_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    days = pa.array([0, 2**31 - 1, 5], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"text": ["a", "b", "c"], "day": days}), path)
    report = ReadingReport()
    assert read(report, path=str(path), label_field="text") == ["a", "b", "c"]
    assert read(report, path=str(path), label_field="day", on_error="skip") == []
    assert report.problems == {"unreadable": 1, "missing_label": 2}
    assert f"{path}[1]: cannot be read" in report.examples["unreadable"][0]
    assert "a label must be text" in refused(path=str(path), label_field="day")
    doubled = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "text", "body"])
    pq.write_table(doubled, path)
    assert "2 columns are named 'text'; keep one" in refused(path=str(path))
    assert read(path=str(path), text_field="body") == ["c"]


def test_windows_of_zstd_above_128_mib(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    options = zstandard.ZstdCompressionParameters.from_level(1, window_log=30)
    made = zstandard.ZstdCompressor(compression_params=options).compressobj()
    path.write_bytes(made.compress(b"far back " * 9) + made.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 30
    assert read(path=str(path)) == ["far back " * 9]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_bombs_end_before_they_fill_memory(
    tmp_path: Path, suffix: str, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "GROWTH_FROM", 1 << 22)
    path = tmp_path / f"a{suffix}{compression}"
    begin = {".txt": b"", ".jsonl": b'{"text": "'}[suffix]
    path.write_bytes(BOMBS[compression](begin))
    assert path.stat().st_size < 1 << 15
    tracemalloc.start()
    message = refused(path=str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "over 250 times as many" in message
    assert peak < 8 << 22


def _repeated(start: bytes, compressor: Any, blocks: int = 9) -> bytes:
    block = b"x" * (1 << 20)
    return compressor.compress(start) + b"".join(compressor.compress(block) for _ in range(blocks)) + compressor.flush()


BOMBS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda start: gzip.compress(start, mtime=0) + gzip.compress(b"x" * (1 << 20)) * 9,
    ".zst": lambda start: _repeated(start, zstandard.ZstdCompressor().compressobj()),
    ".xz": lambda start: lzma.compress(start) + lzma.compress(b"x" * (1 << 20)) * 9,
    ".bz2": lambda start: bz2.compress(start) + bz2.compress(b"x" * (1 << 20)) * 9,
}


def test_a_bomb_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "GROWTH_FROM", 1 << 22)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * (1 << 22)] * 2}), path, compression="zstd", use_dictionary=False)
    assert "over 250 times as many" in refused(path=str(path))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_one_document_is_bounded(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("formats", "reading"):
        monkeypatch.setattr(f"weftlm.corpora.{module}.DOCUMENT_BYTES", 1 << 21)
    text = "word " * (1 << 19)
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": [text]}), path)
    else:
        record = json.dumps({"text": text})
        body = {".txt": text, ".jsonl": record, ".json": f"[{record}]", ".csv": f"text\n{text}\n"}[suffix]
        path.write_text(body)
    assert "a document may hold 2 MiB" in refused(path=str(path))


def special(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "gone":
        path.symlink_to(folder / "nowhere")
    else:
        secret = folder.parent / "secret.jsonl"
        secret.write_bytes(lines(1))
        path.symlink_to(secret)
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "gone", "link out"])
def test_what_is_no_file_of_the_folder_is_left_out_and_counted(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.jsonl").write_bytes(lines(2))
    (folder / "inner.jsonl").symlink_to(folder / "sub" / "a.jsonl")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "sub" / "up again").symlink_to(folder)
    path = special(folder, kind)
    for asked in (str(folder), f"{folder}/**/*.jsonl", f"{folder}/**/**/*"):
        report = ReadingReport()
        assert len(read(report, path=asked)) == 4
        assert any(str(path) in example for example in report.ignored_examples), report.ignored_examples
        corpus_fingerprint(CorpusConfig(path=asked))
    if kind != "link out":  # what is named by itself is read
        assert str(path) in refused(path=str(path))
    assert str(path) in refused(dataset=str(folder))


def test_the_snapshot_of_a_hub_cache_is_one_folder(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "1234"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / "abcd").write_bytes(lines(2))
    (snapshot / "a.jsonl").symlink_to("../../blobs/abcd")
    assert len(read(path=str(snapshot))) == 2


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "~nobody-of-that-name/a.jsonl", "", "/proc/self/mem/x"])
def test_paths_that_no_system_takes(path: str) -> None:
    refused(path=path)


SAVED: dict[str, tuple[Any, list[Any], str]] = {
    "missing": (datasets.ClassLabel(names=["sea", "sky"]), [0, None], "holds nothing"),
    "a list of texts": (datasets.List(datasets.Value("string")), [["sea"], []], "holds a list of labels"),
    "numbers": (datasets.Value("float32"), [1.0, 2.0], "must be text or a whole number"),
}


@pytest.mark.parametrize("kind", SAVED)
def test_labels_of_datasets(tmp_path: Path, kind: str) -> None:
    feature, values, says = SAVED[kind]
    features = datasets.Features({"text": datasets.Value("string"), "topic": feature})
    datasets.Dataset.from_dict({"text": ["a", "b"], "topic": values}, features=features).save_to_disk(tmp_path / "d")
    assert says in refused(dataset=str(tmp_path / "d"), label_field="topic")


def test_class_labels_within_a_field_have_their_names(tmp_path: Path) -> None:
    topic = {"topic": datasets.ClassLabel(names=["sea", "sky"])}
    features = datasets.Features({"text": datasets.Value("string"), "meta": topic})
    rows = {"text": ["a", "b"], "meta": [{"topic": 1}, {"topic": 0}]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "d")
    config = validate(CorpusConfig, {"dataset": str(tmp_path / "d"), "label_field": "meta.topic"}, "corpus")
    assert [document.label for document in read_documents(config, ReadingReport())] == ["sky", "sea"]


@pytest.mark.parametrize("damage", ["state.json torn", "state.json odd", "no data", "data torn", "given as a path"])
def test_damaged_folders_of_save_to_disk(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "d"
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(folder)
    (data,) = folder.glob("*.arrow")
    if damage.startswith("state.json"):
        (folder / "state.json").write_text("[]" if damage.endswith("odd") else '{"_data')
    elif damage == "no data":
        data.unlink()
    elif damage == "data torn":
        data.write_bytes(data.read_bytes()[:100])
    else:
        assert "give it as dataset, not path" in refused(path=str(folder))
        return
    assert str(folder) in refused(dataset=str(folder))


@pytest.mark.parametrize("label", [None, [], ["sea"], {"a": 1}, 1.5, True, "", "\ud800"])
def test_labels_of_other_kinds_are_named(tmp_path: Path, label: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a", "label": label}) + "\n")
    assert "field 'label' holds" in refused(path=str(path), label_field="label")


def test_faults_are_counted_by_label(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1, "d": "sea"}\n{"d": "sea"}\n{"text": "a"}\nbroken\n{"text": "b", "d": "sky"}\n')
    report = ReadingReport()
    assert read(report, path=str(path), label_field="d", on_error="skip") == ["b"]
    assert report.faults_by_label == {"sea": 2, "": 2}


def test_our_own_mistakes_are_not_blamed_on_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(1))
    monkeypatch.setattr(formats, "json", object())
    with pytest.raises(AttributeError):
        read(path=str(path), on_error="skip")
