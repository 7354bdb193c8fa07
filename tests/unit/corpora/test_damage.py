"""Damaged, misnamed, hostile and endless inputs: for every reader a `DataError` with file and place, in little time."""

import bz2
import csv
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
from weftlm.errors import DataError

RAW = re.compile(r"Errno|Traceback|NoneType|object at 0x|codec can't|set_int_max_str_digits|recursion depth")
PICKLE = b"\x80\x04\x95\x06\x00\x00\x00\x00\x00\x00\x00]\x94\x8c\x01a\x94a."
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": lambda data: gzip.compress(data, 9, mtime=0), ".zst": zstandard.compress, ".xz": lzma.compress,
    ".bz2": bz2.compress,
}  # fmt: skip


def read(report: ReadingReport | None = None, **config: object) -> list[str]:
    documents = read_documents(validate(CorpusConfig, config, "corpus"), report or ReadingReport())
    return [document.text for document in documents]


def refused(**config: object) -> str:
    """The message of a refusal, which must be plain and come within two seconds."""
    begin = time.process_time()
    with pytest.raises(DataError) as caught:
        read(**config)
    assert time.process_time() - begin < 2
    assert not RAW.search(str(caught.value)), caught.value
    return str(caught.value)


ROWS = [{"text": f"{i * 2654435761 % 2**32:x} text"} for i in range(400)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def table(rows: list[Any] = ROWS) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


CELLS = b"text\n" + b"".join(f'"{row["text"]},"\n'.encode() for row in ROWS)
WHOLE = {
    ".jsonl": LINES, ".json": json.dumps(ROWS, indent=1).encode(), ".csv": CELLS, ".tsv": CELLS, ".txt": LINES,
    ".py": LINES, ".parquet": table(),
}  # fmt: skip
NAMES = [
    suffix + compression
    for suffix in WHOLE
    for compression in (("", *COMPRESSIONS) if suffix in (".jsonl", ".json", ".csv", ".txt") else ("",))
]


def flip(data: bytes) -> bytes:
    """Sixteen bytes changed, the first of them near the beginning."""
    found, rng = bytearray(data), np.random.default_rng(0)
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
    "bytes changed": flip,
    "twice": lambda data: data + data,
    "UTF-16": lambda data: "text of another kind\n".encode("utf-16"),
    "UTF-16 without a mark": lambda data: "text of another kind\n".encode("utf-16-le"),
    "a pickle": lambda data: PICKLE,
    "a zip archive": lambda data: b"PK\x03\x04" + data,
    "gzip": gzip.compress,
    "Parquet": lambda data: table(ROWS[:3]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damage_is_a_crash_and_none_is_silent(tmp_path: Path, damage: str) -> None:
    for name in NAMES:
        suffix, compression = formats.split_suffix(Path("a" + name))
        damaged = DAMAGE[damage](COMPRESS[compression](WHOLE[suffix]))
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


BINARY = "binary data, or UTF-16 or UTF-32 text"


@pytest.mark.parametrize(
    ("suffix", "data", "says"),
    [
        (".txt", "ä".encode("utf-16"), BINARY),
        (".csv", "text\nä".encode("utf-32"), BINARY),
        (".txt", lzma.compress(b"{}"), BINARY),
        (".txt", PICKLE, "pickles, arrays and archives are never opened"),
        (".parquet", b'{"text": "a"}\n', "cannot be read"),
        (".parquet", table([{"body": "a"}]), "has no column for text; it has body"),
        (".txt.gz", b"plain text that is long enough", "cannot be read"),
        (".txt.bz2", gzip.compress(b"text", mtime=0), "cannot be read"),
        (".jsonl", b'[{"text": "a"}]\n', "must end in .json"),
        (".json", b'[{"text": "a"}, {"text": "b"', "not valid JSON"),
        (".json", b'[{"text": "a"} {"text": "b"}]', "not valid JSON"),
        (".json", b'["a"]', "holds a JSON str"),
        (".json", b'[{"text": ' + b"[" * 100_000, "nested too deep"),
        (".jsonl", b'{"text": ' + b"[" * 100_000, "nested too deep"),
        (".jsonl", b'{"text": "a", "n": ' + b"9" * 50_000 + b"}", "too many digits"),
        (".csv", b"text,text\na,b\n", "2 columns are named 'text'"),
        (".csv", b"text,n\na\n", "has 1 cells and the header 2"),
        (".csv", b'text\n"a', "not valid CSV"),
        (".csv", b"text\n\xff\n", "holds bytes that are not UTF-8"),
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
    wanted = [row["text"] for row in ROWS]
    wanted[1] = 'quotes " , ] } \\ and\nlines \N{SPOOL OF THREAD}' + "x" * 1_200_000
    quoted = [text.replace('"', '""') for text in wanted]
    bodies = {
        ".jsonl": "\n".join(json.dumps({"text": text}) for text in wanted),
        ".json": "\ufeff" + json.dumps([{"text": text, "n": [1, {"a": 2}]} for text in wanted], indent=2),
        ".csv": "\ufefftext,n\r\n" + "".join(f'"{text}",1\r\n' for text in quoted),
        ".tsv": "n\ttext\n" + "".join(f'1\t"{text}"\n' for text in quoted),
    }
    for suffix, body in bodies.items():
        path = tmp_path / f"a{suffix}{compression}"
        path.write_bytes(COMPRESS[compression](body.encode()))
        assert read(path=str(path)) == wanted


def test_values_that_python_cannot_hold_and_doubled_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    days = pa.array([0, 2**31 - 1, 5], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"text": ["a", "b", "c"], "day": days}), path)
    report = ReadingReport()
    assert read(report, path=str(path), label_field="text") == ["a", "b", "c"]
    assert read(report, path=str(path), label_field="day", on_error="skip") == []
    assert report.problems == {"unreadable": 1, "missing_label": 2}
    assert f"{path}[1]: cannot be read" in report.examples["unreadable"][0]
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "text", "body"]), path)
    assert "2 columns are named 'text'; keep one" in refused(path=str(path))
    assert read(path=str(path), text_field="body") == ["c"]


def test_windows_of_zstd_above_128_mib(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    options = zstandard.ZstdCompressionParameters.from_level(1, window_log=30)
    made = zstandard.ZstdCompressor(compression_params=options).compressobj()
    path.write_bytes(made.compress(b"far back " * 9) + made.flush())
    assert read(path=str(path)) == ["far back " * 9]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(("suffix", "start"), [(".txt", b""), (".jsonl", b'{"text": "')])
def test_bombs_end_before_they_fill_memory(
    tmp_path: Path, suffix: str, start: bytes, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "GROWTH_FROM", 1 << 22)
    path = tmp_path / f"a{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](start) + COMPRESS[compression](b"x" * (1 << 20)) * 9)
    assert path.stat().st_size < 1 << 15
    tracemalloc.start()
    message = refused(path=str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "over 250 times as many" in message
    assert peak < 8 << 22


def test_a_bomb_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "GROWTH_FROM", 1 << 22)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * (1 << 22)] * 2}), path, compression="zstd", use_dictionary=False)
    assert "over 250 times as many" in refused(path=str(path))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_one_document_is_bounded(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert csv.field_size_limit() == formats.DOCUMENT_BYTES
    for module in ("formats", "reading"):
        monkeypatch.setattr(f"weftlm.corpora.{module}.DOCUMENT_BYTES", 1 << 21)
    text = "word " * (1 << 19)
    record = json.dumps({"text": text})
    body = {".txt": text, ".jsonl": record, ".json": f"[{record}]", ".csv": f"text\n{text}\n"}
    path = tmp_path / f"a{suffix}"
    path.write_bytes(table([{"text": text}]) if suffix == ".parquet" else body[suffix].encode())
    assert "a document may hold 2 MiB" in refused(path=str(path))


def special(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
        return path
    secret = folder.parent / "secret.jsonl"
    secret.write_bytes(LINES)
    path.symlink_to({"device": "/dev/zero", "loop": path, "gone": folder / "nowhere", "link out": secret}[kind])
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "gone", "link out"])
def test_what_is_no_file_of_the_folder_is_left_out_and_counted(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}\n')
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
    (blobs / "abcd").write_bytes(LINES)
    (snapshot / "a.jsonl").symlink_to("../../blobs/abcd")
    assert len(read(path=str(snapshot))) == len(ROWS)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "~nobody-of-that-name/a.jsonl", "", "/proc/self/mem/x"])
def test_paths_that_no_system_takes(path: str) -> None:
    refused(path=path)


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


LABELS: dict[str, tuple[Any, list[Any]]] = {
    "missing class": (datasets.ClassLabel(names=["sea", "sky"]), [None, 0]),
    "list": (datasets.List(datasets.Value("string")), [["sea"], []]),
    "fraction": (datasets.Value("float32"), [1.0, 2.0]),
}


@pytest.mark.parametrize("label", [None, [], ["sea"], {"a": 1}, 1.5, True, "", "\ud800", *LABELS], ids=repr)
def test_labels_of_other_kinds_are_named(tmp_path: Path, label: Any) -> None:
    if isinstance(label, str) and label in LABELS:
        feature, values = LABELS[label]
        features = datasets.Features({"text": datasets.Value("string"), "label": feature})
        datasets.Dataset.from_dict({"text": ["a", "b"], "label": values}, features=features).save_to_disk(
            tmp_path / "d"
        )
        said = refused(dataset=str(tmp_path / "d"), label_field="label")
    else:
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"text": "a", "label": label}) + "\n")
        said = refused(path=str(path), label_field="label")
    assert "field 'label' holds" in said


def test_faults_are_counted_by_label(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1, "d": "sea"}\n{"d": "sea"}\n{"text": "a"}\nbroken\n{"text": "b", "d": "sky"}\n')
    report = ReadingReport()
    assert read(report, path=str(path), label_field="d", on_error="skip") == ["b"]
    assert report.faults_by_label == {"sea": 2, "": 2}
