"""Preparation: whole, deterministic, without leaks, reused when nothing changed and never replaced unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from support.faults import dead_process, host
from transformers import PreTrainedTokenizerFast

from weftlm.config import validate
from weftlm.errors import ConfigError, DataError
from weftlm.pipeline import prepare as module
from weftlm.pipeline.data_config import DataConfig
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.prepared import PreparedData

WORDS = {
    "sea": "ship sails over deep water past the harbour and grey wave breaks on a hull while gulls cry".split(),
    "code": "def return for in range ( ) : total += index print import self None while yield lambda".split(),
    "law": "licensee shall not be liable damages arising out of agreement herein notwithstanding clause".split(),
}
EMBEDDER = {"embedder": {"dimensions": 8}}
CLUSTERS = {"by": "clusters", "clusters": {"n": 3, "min_bytes": 100}, **EMBEDDER}


def texts(kind: str, count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng([seed, *kind.encode()])
    return [f"{kind} {seed} {i}: " + " ".join(rng.choice(WORDS[kind], 40)) for i in range(count)]


def write(path: Path, documents: list[str], label: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"text": text} | ({} if label is None else {"label": label}) for text in documents]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


Make = Callable[..., DataConfig]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Three domains of 30 documents, a target of 20 like `sea`; keywords change the data section."""
    for kind in WORDS:
        write(tmp_path / "in" / f"{kind}.jsonl", texts(kind, 30), kind)
    write(tmp_path / "in" / "target.jsonl", texts("sea", 20, seed=9))

    def config(**changes: Any) -> DataConfig:
        value: dict[str, Any] = {
            "corpora": [{"path": str(tmp_path / "in" / f"{kind}.jsonl"), "label_field": "label"} for kind in WORDS],
            "target": [{"path": str(tmp_path / "in" / "target.jsonl")}],
            "tokenizer": {"train": {"vocab_size": 320}},
            "split": {"fraction": 0.1},
            "domains": EMBEDDER,
        }
        return validate(DataConfig, {**value, **changes}, "data")

    return config


def run(config: DataConfig, folder: Path, **named: Any) -> PreparedData:
    return prepare(config, folder, progress=False, **named)


def decoded(data: PreparedData, source: Any) -> list[str]:
    spans = source.document_spans.tolist()
    return [data.tokenizer.decode(source.read(first, last - first - 1)) for first, last in spans]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_everything_is_there_and_nothing_is_lost(make: Make, tmp_path: Path) -> None:
    data = run(make(), tmp_path / "data")
    everything: list[str] = []
    for domain in data.domains:
        train, held = decoded(data, domain.train), decoded(data, domain.heldout)
        assert (len(train), len(held), domain.train.documents) == (27, 3, 27)
        assert domain.train.bytes == sum(len(text.encode()) for text in train)
        everything += train + held
    assert sorted(everything) == sorted(text for kind in WORDS for text in texts(kind, 30))
    target = decoded(data, data.target_train), decoded(data, data.target_heldout)
    assert [len(part) for part in target] == [16, 4]
    assert sorted(target[0] + target[1]) == sorted(texts("sea", 20, seed=9))
    parts = ["digests.json", "heldout", "prepared.json", "tokenizer", "train"]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == parts
    assert data.basis_ND is None
    assert data.target_histogram_D is not None
    assert data.target_histogram_D.dtype == torch.float64
    assert data.target_histogram_D.tolist() == [0.0, 0.0, 1.0]
    sea = data.domain_facts()[2]
    assert (sea["name"], sea["documents"]) == ("sea", 27)
    assert all(item["excerpt"].startswith("sea") for item in sea["typical"])
    assert {item["name"] for item in sea["neighbours"]} == {"code", "law"}
    assert "sea.jsonl" in sea["typical"][0]["origin"]


def test_the_bits_do_not_depend_on_time_or_process_but_on_the_seed(make: Make, tmp_path: Path) -> None:
    config = make(domains=CLUSTERS)
    here = run(config, tmp_path / "a")
    program = (
        "import sys\n"
        "from weftlm.pipeline.data_config import DataConfig\n"
        "from weftlm.pipeline.prepare import prepare\n"
        "prepare(DataConfig.model_validate_json(sys.argv[1]), sys.argv[2], progress=False)\n"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    command = [sys.executable, "-c", program, config.model_dump_json(), str(tmp_path / "b")]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    other = run(make(domains=CLUSTERS, seed=1), tmp_path / "c")
    assert decoded(here, here.domains[0].heldout) != decoded(other, other.domains[0].heldout)


def test_what_is_prepared_is_reused_unchanged_and_replaced_on_request_alone(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    first = run(make(), folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(module, "read_documents", lambda *_: pytest.fail("read again"))
        for rebuild in (False, True):
            assert run(make(), folder, rebuild=rebuild).fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in before} == before
    changed = make(split={"fraction": 0.2})
    with pytest.raises(DataError, match=r"data\.split\.fraction: 0\.1 before, 0\.2 now.*--rebuild"):
        run(changed, folder)
    write(tmp_path / "in" / "law.jsonl", texts("law", 31), "law")
    with pytest.raises(DataError, match=r"inputs\.corpora\.2 .*law\.jsonl\): .* before, .* now"):
        run(make(), folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run(changed, folder, rebuild=True).domains[0].heldout.documents == 6  # type: ignore[union-attr]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="holds files but no prepared data"):
        run(make(), tmp_path / "thesis", rebuild=True)
    assert files(tmp_path / "thesis") == {"thesis.tex": b"mine"}


def test_a_leak_is_an_error(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = module._Preparation._split

    def leaking(self: Any) -> None:
        split(self)
        self.train_N |= self.heldout_N

    monkeypatch.setattr(module._Preparation, "_split", leaking)
    with pytest.raises(DataError, match="sets that must be apart share documents: 13 texts"):
        run(make(), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_an_interrupted_preparation_leaves_what_was_there(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module._Preparation, "_described", stop)
        with pytest.raises(KeyboardInterrupt):
            run(make(), folder)
        assert not folder.exists()
        patched.undo()
        before = run(make(), folder).fingerprint
        patched.setattr(module._Preparation, "_described", stop)
        with pytest.raises(KeyboardInterrupt):
            run(make(seed=1), folder, rebuild=True)
    assert PreparedData.load(folder).fingerprint == before
    leaving = tmp_path / f".data.{dead_process()}@{host()}.writing"
    leaving.mkdir()
    assert run(make(seed=1), folder, rebuild=True).fingerprint != before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.lock", "data", "in"]


def test_a_damaged_folder_is_refused_and_can_be_rebuilt(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    first = run(make(), folder)
    for name, damage, says in (
        ("train/sea/tokens.bin", lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:], "was altered since"),
        ("heldout/digests.json", None, "is missing since"),
        ("tokenizer/tokenizer.json", lambda data: data[:999], "has 999 bytes"),
        ("tokenizer/tokenizer.json", None, "is missing since"),
        ("tokenizer/added_tokens.json", lambda data: b"{}", "was added since"),
        ("prepared.json", lambda data: data.replace(b'"code"', b'"c0de"'), "was altered since it was written"),
        ("prepared.json", lambda data: b"{", "cannot be read"),
    ):
        whole = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).unlink(missing_ok=True) if damage is None else (folder / name).write_bytes(damage(whole))
        with pytest.raises(DataError, match=f"{says}.*; .*prepare .*again"):
            run(make(), folder)
        (folder / name).unlink(missing_ok=True) if whole is None else (folder / name).write_bytes(whole)
    (folder / "prepared.json").write_text("{")
    assert run(make(), folder, rebuild=True).fingerprint == first.fingerprint
    other = run(make(seed=1), tmp_path / "other")
    (folder / "train").rename(tmp_path / "away")
    (other.folder / "train").rename(folder / "train")
    with pytest.raises(DataError, match=r"train/digests\.json was altered"):
        PreparedData.load(folder)


def test_domains_by_file(make: Make, tmp_path: Path) -> None:
    config = make(corpora=[{"path": str(tmp_path / "in")}], domains={"by": "file", **EMBEDDER})
    data = run(config, tmp_path / "data")
    assert [domain.name for domain in data.domains] == ["code", "law", "sea"]  # the target's file is all target


def test_clusters_find_the_planted_kinds_and_small_ones_are_dissolved(make: Make, tmp_path: Path) -> None:
    data = run(make(domains=CLUSTERS), tmp_path / "data")
    assert [domain.name for domain in data.domains] == ["cluster_0", "cluster_1", "cluster_2"]
    kinds = [{text.split()[0] for text in decoded(data, domain.train)} for domain in data.domains]
    assert sorted(map(sorted, kinds)) == [["code"], ["law"], ["sea"]]
    assert data.target_histogram_D is not None
    assert data.target_histogram_D[kinds.index({"sea"})] == 1.0
    size = len(texts("sea", 1)[0]) * 8
    many = run(make(domains={**CLUSTERS, "clusters": {"n": 20, "min_bytes": size}}), tmp_path / "many")
    held: list[Any] = [domain.heldout for domain in many.domains]
    assert 3 <= len(many.domains) < 20
    assert min(domain.train.bytes + each.bytes for domain, each in zip(many.domains, held, strict=True)) >= size
    assert sum(domain.train.documents + each.documents for domain, each in zip(many.domains, held, strict=True)) == 90


def test_token_caps_are_exact_and_random(make: Make, tmp_path: Path) -> None:
    full = run(make(), tmp_path / "full")
    data = run(make(domains={"max_train_tokens": 700, **EMBEDDER}), tmp_path / "data")
    assert [len(domain.train) for domain in data.domains] == [700, 700, 700]
    assert all(domain.train.documents < 27 for domain in data.domains)
    assert data.tokenizer.fingerprint == full.tokenizer.fingerprint
    assert decoded(data, data.domains[0].heldout) == decoded(full, full.domains[0].heldout)
    *mine, last = decoded(data, data.domains[0].train)
    everything = decoded(full, full.domains[0].train)
    assert set(mine) < set(everything)
    assert any(text.startswith(last) for text in set(everything) - set(mine))
    assert mine != everything[: len(mine)]
    loose = run(make(domains={"max_train_tokens": 10**6, **EMBEDDER}), tmp_path / "loose")
    assert [len(domain.train) for domain in loose.domains] == [len(domain.train) for domain in full.domains]


def test_few_target_examples_nest(make: Make, tmp_path: Path) -> None:
    chosen = []
    for count in (3, 8):
        data = run(make(target_train_documents=count), tmp_path / str(count))
        chosen.append(set(decoded(data, data.target_train)))
        assert len(decoded(data, data.target_heldout)) == 4
    assert len(chosen[0]) == 3
    assert chosen[0] < chosen[1]


def test_separate_heldout_sets(make: Make, tmp_path: Path) -> None:
    sea = texts("sea", 30)
    write(tmp_path / "in" / "held.jsonl", sea[:2] + texts("sea", 3, seed=4), "sea")
    write(tmp_path / "in" / "target_held.jsonl", texts("sea", 6, seed=7))
    held = [{"path": str(tmp_path / "in" / "held.jsonl"), "label_field": "label"}]
    target_held = [{"path": str(tmp_path / "in" / "target_held.jsonl")}]
    data = run(make(heldout=held, target_heldout=target_held), tmp_path / "data")
    assert [domain.heldout is None for domain in data.domains] == [True, True, False]
    assert decoded(data, data.domains[2].heldout) == sea[:2] + texts("sea", 3, seed=4)
    assert data.domains[2].train.documents == 28
    assert (len(decoded(data, data.target_heldout)), len(decoded(data, data.target_train))) == (6, 20)
    assert "no held-out text for 2 domains (code, law)" in data.summary()["warnings"][0]
    write(tmp_path / "in" / "held.jsonl", texts("sea", 3, seed=4), "ocean")
    with pytest.raises(DataError, match="label 'ocean', which no corpus has"):
        run(make(heldout=held), tmp_path / "other")


@pytest.mark.parametrize("of", ["target_shards", "groups", "sets"])
def test_a_basis_holds_distributions(make: Make, tmp_path: Path, of: str) -> None:
    basis: dict[str, Any] = {"of": of, "count": 2}
    if of == "sets":
        basis = {"of": of, "sets": [{"path": str(tmp_path / "in" / f"{kind}.jsonl")} for kind in ("law", "code")]}
    data = run(make(domains={"basis": basis, **EMBEDDER}), tmp_path / "data")
    assert data.basis_ND is not None
    assert (data.basis_ND.dtype, data.basis_ND.shape) == (torch.float64, (2, 3))
    assert torch.allclose(data.basis_ND.sum(1), torch.ones(2, dtype=torch.float64))
    if of == "target_shards":
        assert data.basis_ND.tolist() == [[0, 0, 1], [0, 0, 1]]
    if of == "groups":
        assert (data.basis_ND > 0).sum(0).tolist() == [1, 1, 1]
    if of == "sets":
        assert data.basis_ND.tolist() == [[0, 1, 0], [1, 0, 0]]
        assert [item["set"] for item in data.summary()["reading"]].count("basis") == 2


def test_the_target_may_be_a_domain_or_absent(make: Make, tmp_path: Path) -> None:
    data = run(make(domains={"include_target": True, **EMBEDDER}), tmp_path / "with")
    assert [domain.name for domain in data.domains] == ["code", "law", "sea", "target_examples"]
    assert data.domains[3].heldout is None
    assert data.target_train is not None
    assert data.domains[3].train.fingerprint == data.target_train.fingerprint
    assert data.target_histogram_D is not None
    assert data.target_histogram_D.shape == (4,)
    data = run(make(target=[]), tmp_path / "without")
    assert (data.target_train, data.target_heldout, data.target_histogram_D) == (None, None, None)
    assert set(data.summary()["sets"]) == set(WORDS)


def test_single_documents_stay_in_training(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "in" / "target.jsonl", texts("sea", 1, seed=9))
    write(tmp_path / "in" / "law.jsonl", texts("law", 1), "law")
    data = run(make(), tmp_path / "data")
    assert (data.domains[1].train.documents, data.domains[1].heldout, data.target_heldout) == (1, None, None)
    first, second = data.summary()["warnings"]
    assert first == "the target has one document: nothing of it is held out, so it cannot be evaluated"
    assert second == "no held-out text for 1 domains (law): they are not evaluated"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpora": [{"path": "law.jsonl", "label": "a"}, {"path": "sea.jsonl"}]}, r"sea\.jsonl:1 has no label"),
        ({"corpora": [{"path": "sea.jsonl", "label": "target"}]}, "may not be called 'target'"),
        ({"domains": {**CLUSTERS, "clusters": {"n": 91}}}, "n is 91 but there are only 90 documents"),
        ({"corpora": [{"path": "target.jsonl", "label": "sea"}]}, r"data\.corpora holds no document that is not in an"),
        ({"domains": {"basis": {"of": "target_shards", "count": 17}}}, "17 but the target has 16 training documents"),
        ({"corpora": [{"path": f"{kind}.jsonl", "label": label} for kind, label in zip(WORDS, ("Law", "LAW", "law"),
         strict=True)]}, "'LAW' and 'Law' and 'law'; rename them"),
    ],
)  # fmt: skip
def test_data_that_makes_no_domains_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    config = make(**changes)
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises((ConfigError, DataError), match=message):
        run(config, tmp_path / "data")


def test_senseless_sections_are_refused(make: Make) -> None:
    for wrong, message in (
        ({"domains": {"by": "clusters"}}, "clusters goes with by"),
        ({"domains": {"basis": {"of": "groups"}}}, "need a count"),
        ({"domains": {"by": "file"}, "corpora": [{"builtin": "all"}]}, "by: file needs corpora that are files"),
        ({"corpora": []}, "at least 1 item"),
        ({"domain": {}}, "did you mean 'domains'"),
        ({"target": [], "target_train_documents": 3}, "needs a target"),
        ({"target": [], "domains": {"include_target": True}}, "needs a target"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**wrong)


def test_who_comes_second_waits_and_finds_the_work_done(make: Make, tmp_path: Path) -> None:
    config = make()
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run, config, tmp_path / "data") for _ in range(2)]
        assert len({future.result().fingerprint for future in both}) == 1


# -- tokenizers that lose text ----------------------------------------------------------------------------------------


def words_tokenizer(folder: Path, *, known: int) -> dict[str, str]:
    """A word-level tokenizer that knows some of the words of the corpora."""
    words = sorted({word for kind in WORDS.values() for word in kind})[:known]
    ids = {word: number for number, word in enumerate(["[UNK]", "</s>", *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]").save_pretrained(folder)
    return {"pretrained": str(folder)}


def test_where_text_is_lost_there_are_no_bits_per_byte_and_most_of_it_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the tokenizer loses text of 4 sets .*over 20% is refused"):
        run(make(tokenizer=words_tokenizer(tmp_path / "few", known=9)), tmp_path / "refused")
    # texts that only the tokenizer takes for equal are no leak either
    write(tmp_path / "in" / "law.jsonl", [text.replace(" ", "  ") for text in texts("sea", 20, seed=9)], "law")
    data = run(make(tokenizer=words_tokenizer(tmp_path / "most", known=999)), tmp_path / "data")
    assert data.summary()["duplicates"] == []
    assert any("bits per byte is not given for them" in line for line in data.summary()["warnings"])
    sets = data.summary()["sets"]
    assert all(0.8 < sets[name]["given_back"] < 1 and 0 < sets[name]["unknown"] < 0.2 for name in ("sea", "target"))
    assert [domain.heldout.bytes for domain in data.domains if domain.heldout is not None] == [0, 0, 0]


# -- what becomes of documents ----------------------------------------------------------------------------------------


def test_what_became_of_every_document_is_counted_and_warned_of(make: Make, tmp_path: Path) -> None:
    sea, law = texts("sea", 30), texts("law", 30)
    write(tmp_path / "in" / "target.jsonl", sea)
    lines = [json.dumps({"text": text, "label": "law"}) for text in [*law, *law[:5]]]
    lines += [json.dumps({"label": "law"})] * 4 + ["broken", json.dumps({"text": "x", "label": None})]
    (tmp_path / "in" / "law.jsonl").write_text("\n".join(lines))
    corpora = [
        {"path": str(tmp_path / "in" / f"{kind}.jsonl"), "label_field": "label", "on_error": "skip"} for kind in WORDS
    ]
    data = run(make(corpora=corpora), tmp_path / "data")
    none = {"duplicates": 0, "in_target": 0, "faulty": 0}
    assert data.summary()["documents"] == {
        "(no label)": {**none, "read": 2, "kept": 0, "faulty": 2},
        "code": {**none, "read": 30, "kept": 30},
        "law": {"read": 39, "kept": 30, "duplicates": 5, "in_target": 0, "faulty": 4},
        "sea": {**none, "read": 30, "kept": 0, "in_target": 30},
        "target": {**none, "read": 30, "kept": 30},
    }
    warnings = "\n".join(data.summary()["warnings"])
    assert "domain 'sea' disappears: 30 read, 30 in the target too, 0 kept" in warnings
    assert (
        "domain 'law' loses 23% of its documents: 39 read, 5 duplicates or held-out text, 4 faulty, 30 kept" in warnings
    )
    assert "'code'" not in warnings
    law_path = tmp_path / "in" / "law.jsonl"
    assert data.summary()["duplicates"] == [
        {"set": "corpora", "already_in": "corpora", "documents": 5,
         "examples": [f"{law_path}:{number}" for number in range(31, 36)]},
        {"set": "corpora", "already_in": "target", "documents": 30,
         "examples": [f"{tmp_path / 'in' / 'sea.jsonl'}:{number}" for number in range(1, 6)]},
    ]  # fmt: skip


def test_all_domains_that_are_too_small_are_named_dropped_or_merged(make: Make, tmp_path: Path) -> None:
    for kind, count in {"sea": 30, "code": 5, "law": 4}.items():
        write(tmp_path / "in" / f"{kind}.jsonl", texts(kind, count), kind)
    held = [{"path": str(tmp_path / "in" / "held.jsonl"), "label_field": "label"}]
    write(tmp_path / "in" / "held.jsonl", texts("law", 3, seed=5), "law")

    def prepared(small: str, least: int = 900, **changes: Any) -> PreparedData:
        domains = {"embedder": {"dimensions": 4}, "min_tokens": least, "small": small}
        return run(make(domains=domains, **changes), tmp_path / f"{small}-{least}")

    with pytest.raises(
        DataError, match=r"2 domains have fewer .* 900: code \(\d+\), law \(\d+\); .*data.domains.small"
    ):
        prepared("stop")
    dropped, merged = prepared("drop", heldout=held), prepared("other")
    assert [domain.name for domain in dropped.domains] == ["sea"]
    assert dropped.domains[0].heldout is None
    assert any("2 domains are " in line for line in dropped.summary()["warnings"])
    assert [domain.name for domain in merged.domains] == ["other", "sea"]
    both = decoded(merged, merged.domains[0].train) + decoded(merged, merged.domains[0].heldout)
    assert sorted(both) == sorted([*texts("code", 5), *texts("law", 4)])
    for small in ("drop", "other"):
        with pytest.raises(DataError, match="too small"):
            prepared(small, 10**7)
