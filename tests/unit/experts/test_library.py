"""A library never shows half an expert, never runs what it reads, and one bad expert spoils no other."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.faults import Killed, killing

from weftlm import files, places
from weftlm.errors import CheckpointError, ConfigError, ExpertError
from weftlm.experts import library as module
from weftlm.experts.expert import BaseReference, Expert, Gate, LoRAExpert, LoRAFactors, Statistics
from weftlm.experts.files import encode
from weftlm.experts.library import ExpertLibrary
from weftlm.experts.lora import write_lora
from weftlm.experts.peft_import import read_peft
from weftlm.files import describe

BASE = BaseReference("tiny", "main", "f" * 32)
WIDTHS = {"model.a": (6, 5), "model.b": (4, 7)}


def lora(name: str, seed: int = 0, base: BaseReference = BASE) -> LoRAExpert:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LoRAFactors(torch.randn(2, i, generator=generator), torch.randn(o, 2, generator=generator), 1.5)
        for path, (i, o) in WIDTHS.items()
    }
    return LoRAExpert(name, base, modules, {})


def gate(seed: int = 0) -> Gate:
    generator = torch.Generator().manual_seed(seed)
    vectors = {path: torch.randn(i, generator=generator) for path, (i, _) in WIDTHS.items()}
    return Gate(vectors, {"steps": 100, "seed": seed})


def statistics() -> Statistics:
    return Statistics(
        means={path: torch.full((i,), 0.5) for path, (i, _) in WIDTHS.items()},
        embeddings_NF=F.normalize(torch.arange(1.0, 13.0).reshape(3, 4), dim=1),
        embedder="tokens-4",
        token_counts_V=torch.tensor([0.0, 3.0, 1.0]),
        bigram_counts_K=torch.tensor([2.0, 0.0]),
        facts={"examples": 3},
    )


def full(name: str, seed: int = 0) -> Expert:
    return Expert(lora(name, seed), gate(seed), statistics(), {"data": "abc", "bits_per_byte": 1.25})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = ExpertLibrary.open(tmp_path_factory.mktemp("original") / "library", BASE)
    library.add(*(full(name, seed) for seed, name in enumerate(("code", "law", "medicine"))))
    return library.folder


@pytest.fixture
def library(tmp_path: Path, original: Path) -> ExpertLibrary:
    shutil.copytree(original, tmp_path / "library")
    return ExpertLibrary.open(tmp_path / "library")


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def edit_manifest(library: ExpertLibrary, change: Callable[[dict[str, Any]], object]) -> None:
    path = library.folder / "library.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    change(manifest)
    path.write_text(json.dumps(manifest))


# -- what goes in and comes out ---------------------------------------------------------------------------------------


def test_an_expert_comes_back_as_it_went_in(library: ExpertLibrary) -> None:
    assert library.names == ["code", "law", "medicine"]
    assert len(library) == 3
    assert "law" in library
    library.add(Expert(lora("bare")))
    loaded, given = ExpertLibrary.open(library.folder).load("law"), full("law", 1)
    assert (loaded.name, loaded.lora.base) == ("law", BASE)
    assert encode(loaded) == encode(given)
    assert {module: part.scale for module, part in loaded.lora.modules.items()} == dict.fromkeys(WIDTHS, 1.5)
    found, made = loaded.statistics, given.statistics
    assert torch.equal(loaded.gate.vectors["model.a"], given.gate.vectors["model.a"])
    assert (loaded.gate.facts, found.embedder, found.facts) == (given.gate.facts, made.embedder, made.facts)
    assert torch.equal(found.embeddings_NF, made.embeddings_NF)
    assert loaded.card == library.card("law") == {"data": "abc", "bits_per_byte": 1.25}
    assert library.path("law") == library.folder / "law"
    bare = library.load("bare")
    assert (bare.gate, bare.statistics, bare.card) == (None, None, {})
    assert [library.has_gate(name) for name in ("bare", "law")] == [False, True]
    assert [library.has_statistics(name) for name in ("bare", "law")] == [False, True]


def test_adding_and_removing_touch_no_other_expert_and_the_very_same_changes_nothing(library: ExpertLibrary) -> None:
    everything = contents(library.folder)
    before = {name: contents(library.folder / name) for name in ("code", "medicine")}
    library.add(library.load("law"), library.load("code"))
    library.add(library.load("law"), replace=True)
    assert contents(library.folder) == everything
    library.add(full("music", 9))
    library.remove("law")
    assert library.names == ["code", "medicine", "music"]
    assert {name: contents(library.folder / name) for name in before} == before
    assert {path.name for path in library.folder.iterdir()} - {".lock"} == {"code", "library.json", "medicine", "music"}


def test_a_name_is_taken_until_it_is_replaced(library: ExpertLibrary) -> None:
    before = library.fingerprint(["law"])
    with pytest.raises(ExpertError, match=r"'law' is already in .*; choose another name, or remove that one first"):
        library.add(full("law", 7))
    assert library.fingerprint(["law"]) == before
    library.add(full("law", 7), replace=True)
    assert torch.equal(library.load("law").lora.modules["model.a"].A_RI, lora("law", 7).modules["model.a"].A_RI)
    assert len(list(library.folder.glob("law*"))) == 1
    assert not [path for path in library.folder.rglob(".*") if path.name != ".lock"]
    # A new gate takes the place of the old one where the adapter is the one it was trained on.
    library.add(replace(full("law", 7), gate=gate(9)), replace=True, same_adapter=True)
    assert torch.equal(library.load("law").gate.vectors["model.a"], gate(9).vectors["model.a"])
    seen = library.fingerprint()
    for expert in (full("law", 1), full("gone", 1)):
        with pytest.raises(ExpertError, match="was replaced or removed while its gate was trained; nothing is written"):
            library.add(expert, replace=True, same_adapter=True)
    assert library.fingerprint() == seen


@pytest.mark.parametrize("name", ["", ".law", "../law", "a/b", "law~2", "ä", "x" * 161, "a b", "law\n", "con", "law."])
def test_names_that_could_be_paths_are_refused(library: ExpertLibrary, name: str) -> None:
    with pytest.raises(ExpertError, match=r"expert name .* is not allowed"):
        library.add(full(name))


def test_unknown_names_get_a_suggestion(library: ExpertLibrary, tmp_path: Path) -> None:
    for call in (library.load, library.remove, library.card, library.path, library.named):
        with pytest.raises(ExpertError, match="no expert 'medicin' in the library; did you mean 'medicine'"):
            call("medicin")
    with pytest.raises(ExpertError, match="did you mean 'law'"):
        library.load_all(["laws"])
    with pytest.raises(ExpertError, match="no expert 'x' in the library; it is empty"):
        ExpertLibrary.open(tmp_path / "empty", BASE).load("x")


def test_a_library_is_of_one_base_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExpertError, match="holds no expert library"):
        ExpertLibrary.open(tmp_path / "library")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExpertError, match="cannot be written"):
        ExpertLibrary.open(tmp_path / "file", BASE)
    library = ExpertLibrary.open(tmp_path / "library", BASE)
    assert ExpertLibrary.open(tmp_path / "library", replace(BASE, name="/models/tiny")).base == BASE
    others = {
        BaseReference("other", None, "0" * 32): r"is of another base than the library: other \(0+\), not tiny",
        replace(BASE, fingerprint="0" * 32): "is of another base",
        BaseReference("other"): r"names the base other, the library is for tiny \(revision main\).* no fingerprints",
        BaseReference(""): "does not name its base, the library is for tiny",
        BaseReference("tiny", "v2"): r"names the base tiny \(revision v2\), the library is for tiny \(revision main\)",
    }
    for base, message in others.items():
        with pytest.raises(ExpertError, match=f"the base '.*' {message}.*use a library for each base"):
            ExpertLibrary.open(tmp_path / "library", base)
        with pytest.raises(ExpertError, match=f"expert 'x' {message}"):
            library.add(Expert(lora("x", base=base)))
    library.add(
        Expert(lora("copy", base=replace(BASE, name="/models/tiny"))), Expert(lora("y", base=BaseReference("tiny")))
    )
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    ExpertLibrary.open(tmp_path / "local", BaseReference(str(tmp_path / "base"))).add(
        Expert(lora("x", base=BaseReference("base")))
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no JSON object"),
        ('{"format": "weftlm expert library 9"}', "this version reads 'weftlm expert library 1'"),
        ('{"format": "weftlm expert library 1"}', "library.json.experts: missing"),
        ('{"format": "weftlm expert library 1", "experts": {}}', "library.json.base: missing"),
    ],
)
def test_a_broken_manifest_is_refused(library: ExpertLibrary, text: str, message: str) -> None:
    (library.folder / "library.json").write_text(text)
    with pytest.raises(ExpertError, match=message):
        ExpertLibrary.open(library.folder)


def test_a_fingerprint_is_of_contents(library: ExpertLibrary, tmp_path: Path) -> None:
    other = ExpertLibrary.open(tmp_path / "other", BASE)
    other.add(*(replace(full(name, seed), card={"x": 1}) for seed, name in ((2, "medicine"), (1, "law"), (0, "code"))))
    assert other.fingerprint() == library.fingerprint() == library.fingerprint(["medicine", "code", "law"])
    assert library.fingerprint(["law"]) != library.fingerprint(["code"])
    other.add(replace(other.load("law"), gate=gate(9)), replace=True)
    assert other.fingerprint() != library.fingerprint()


# -- hostile experts --------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def link_folder_out(path: Path) -> None:
    outside = path.parents[2] / "outside-folder"
    path.parent.rename(outside)
    path.parent.symlink_to(outside)


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "its digest differs"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes when it was written|when it was"),
    "deleted": (lambda path: path.unlink(), "is missing"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "when it was written"),
    "a folder elsewhere": (link_folder_out, "not its own folder in the library"),
    "a folder gone": (lambda path: shutil.rmtree(path.parent), "is missing"),
}


def check_law_alone_is_broken(library: ExpertLibrary, message: str) -> None:
    experts, problems = library.load_all()
    assert [expert.name for expert in experts] == ["code", "medicine"]
    assert list(problems) == ["law"]
    assert problems["law"].startswith("expert 'law': ")
    assert message in problems["law"]
    library.remove("law")
    library.add(full("law"))
    assert library.load("law").name == "law"


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "card.json"])
@pytest.mark.parametrize("harm", HARMS)
def test_harmed_files_are_reported_and_the_others_load(library: ExpertLibrary, file: str, harm: str) -> None:
    damage, message = HARMS[harm]
    damage(library.folder / "law" / file)
    check_law_alone_is_broken(library, message.split("|")[-1])


def entry(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["experts"]["law"]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: entry(m).update(folder="../law"), "law.folder"),
        (lambda m: entry(m).update(folder="/etc"), "law.folder"),
        (lambda m: entry(m).update(folder="code"), "not its own folder in the library"),
        (lambda m: entry(m).update(folder=None), "law.folder"),
        (lambda m: entry(m)["files"].update({"../code/card.json": entry(m)["files"]["card.json"]}), "law.files"),
        (lambda m: entry(m)["files"].update({"/etc/passwd": entry(m)["files"]["card.json"]}), "law.files"),
        (lambda m: entry(m)["files"].update({"..": entry(m)["files"]["card.json"]}), "law.files"),
        (lambda m: entry(m)["files"].pop("card.json"), "lists no card.json"),
        (lambda m: entry(m)["files"].pop("adapter_config.json"), "lists no adapter_config.json"),
        (lambda m: entry(m)["files"].update({"card.json": 5}), "law.files.card.json"),
        (lambda m: entry(m).update(files=[]), "law.files"),
        (lambda m: entry(m).update(base="tiny"), "law.base"),
        (lambda m: m["experts"].update(law=3), "law"),
    ],
)
def test_a_hostile_manifest_entry_is_reported_and_the_others_load(
    library: ExpertLibrary, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_manifest(library, change)
    check_law_alone_is_broken(library, message)


def test_an_entry_whose_name_is_a_path_is_refused(library: ExpertLibrary) -> None:
    edit_manifest(library, lambda m: m["experts"].update({"../law": m["experts"].pop("law")}))
    assert "not its own folder in the library" in library.load_all()[1]["../law"]


def rewrite(
    library: ExpertLibrary, file: str, change: Callable[[dict[str, torch.Tensor]], object], metadata: str
) -> None:
    """Change a file and its digest, as a hostile contributor can."""
    path = library.folder / "law" / file
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"weftlm": metadata})
    edit_manifest(library, lambda m: entry(m)["files"].update({file: describe(path)}))


GOOD = json.dumps({"facts": {}, "embedder": "tokens-4"})


@pytest.mark.parametrize(
    ("file", "change", "metadata", "message"),
    [
        ("gate", lambda t: t.pop("model.a"), GOOD, "gate: one vector per adapted module.*nothing for model.a"),
        ("gate", lambda t: t.update(x=torch.ones(3)), GOOD, "x is not adapted"),
        ("gate", lambda t: t.update({"model.a": torch.ones(5)}), GOOD, r"model.a is \(5,\); it must be \(6,\)"),
        ("gate", lambda t: t["model.b"].fill_(float("nan")), GOOD, "model.b holds NaN"),
        ("gate", lambda t: t["model.b"].fill_(3e38), GOOD, "model.b has a norm of .*more than 1e.09; train"),
        ("gate", lambda t: None, "[]", r"gate.safetensors does not say what it holds"),
        ("statistics", lambda t: t.pop("means.model.a"), GOOD, "nothing for model.a"),
        ("statistics", lambda t: t.pop("embeddings"), GOOD, "must hold embeddings"),
        ("statistics", lambda t: t["embeddings"].mul_(1.01), GOOD, "each must be 1 ± 0.001"),
        ("statistics", lambda t: t["embeddings"].fill_(float("nan")), GOOD, "each must be 1 ± 0.001"),
        ("statistics", lambda t: t.update(embeddings=torch.ones(3)), GOOD, "must be inputs x width"),
        ("statistics", lambda t: t["token_counts"].sub_(1), GOOD, "token counts must be"),
        ("statistics", lambda t: t["bigram_counts"].fill_(float("inf")), GOOD, "bigram counts must be"),
        ("adapter_model", lambda t: next(iter(t.values())).fill_(float("nan")), GOOD, "holds NaN"),
    ],
)
def test_unsound_tensors_are_reported_even_with_the_right_digest(
    library: ExpertLibrary, file: str, change: Callable[[dict[str, torch.Tensor]], object], metadata: str, message: str
) -> None:
    rewrite(library, f"{file}.safetensors", change, metadata)
    with pytest.raises(ExpertError, match=f"expert 'law': .*{message}"):
        library.load("law")


# -- what may not be written ------------------------------------------------------------------------------------------


def test_what_would_not_load_is_not_written(library: ExpertLibrary) -> None:
    before = contents(library.folder)
    for expert, message in (
        (replace(full("new"), gate=Gate({"model.a": torch.ones(6)})), "expert 'new': gate: one vector per adapted"),
        (replace(full("new"), statistics=replace(statistics(), token_counts_V=torch.tensor([-1.0]))), "token counts"),
        (replace(full("new"), card={"loss": float("nan")}), r"its card must hold JSON values"),
        (replace(full("new"), gate=replace(gate(), facts={"x": torch.ones(1)})), r"facts must hold JSON values"),
        (Expert(replace(lora("new"), modules={})), "the adapter is empty"),
    ):
        with pytest.raises(ExpertError, match=message):
            library.add(full("other"), expert)
    assert contents(library.folder) == before


# -- crashes and concurrency ------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[ExpertLibrary], object]] = {
    "add": lambda library: library.add(full("new", 5), full("newer", 6)),
    "replace": lambda library: library.add(full("law", 5), full("code", 6), replace=True),
    "remove": lambda library: library.remove("law", "code"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_crash_at_any_moment_leaves_all_or_nothing_and_the_next_write_cleans_up(
    original: Path, tmp_path: Path, change: str
) -> None:
    """Dies just before the first, the second, ... change of the disk, until it runs out of them."""
    outcomes = []
    while outcomes[-1:] != ["done"]:
        folder = tmp_path / str(len(outcomes)) / "library"
        shutil.copytree(original, folder)
        library = ExpertLibrary.open(folder)
        before = library.fingerprint()
        try:
            with killing(len(outcomes)):
                CHANGES[change](library)
        except Killed:
            outcomes.append("old" if library.fingerprint() == before else "new")
        else:
            outcomes.append("done")
        seen = library.fingerprint()
        assert library.load_all()[1] == {}
        library.add(full("medicine", 2))
        kept = {library.path(name).name for name in library.names} | {".lock", "library.json"}
        assert {path.name for path in folder.iterdir()} == kept
        assert not list(folder.rglob(".unlisted"))
        assert library.fingerprint() == seen
    assert outcomes == sorted(outcomes, key=["old", "new", "done"].index)
    assert len({library.fingerprint(), before}) == 2
    assert outcomes.count("old") >= 2


def test_an_expert_is_on_disk_before_the_manifest_and_the_manifest_before_the_old_one_goes(
    library: ExpertLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, sync, publish, drop = [], files.sync_file, os.rename, files.remove
    monkeypatch.setattr(module, "sync_file", lambda path: (done.append(f"sync {path.name}"), sync(path)))
    monkeypatch.setattr(files, "sync_file", lambda path: (done.append("sync manifest"), sync(path)))
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append(f"rename {Path(new).name}"), publish(old, new)))
    monkeypatch.setattr(module, "remove", lambda path: (done.append(f"remove {path.name}"), drop(path)))
    library.add(full("law", 6), replace=True)
    names = ["adapter_config.json", "adapter_model.safetensors", "card.json", "gate.safetensors"]
    placed = done.index("rename law~2")
    assert {f"sync {name}" for name in names} < set(done[: placed - 1])
    assert done[placed - 1].endswith(".writing")
    assert done[placed + 1 : placed + 4] == ["sync manifest", "sync library", "remove law"]


def test_an_interrupted_change_and_leftovers_leave_the_library_as_it_was(
    library: ExpertLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = contents(library.folder)
    for change in CHANGES.values():
        with monkeypatch.context() as patch:
            patch.setattr(ExpertLibrary, "_commit", interrupt)
            with pytest.raises(KeyboardInterrupt):
                change(library)
        assert contents(library.folder) == before
    (library.folder / "notes").mkdir()
    (library.folder / "notes" / "a.txt").write_text("mine")
    (library.folder / ".new.1@host.writing").mkdir()
    assert library.names == ["code", "law", "medicine"]
    library.add(full("notes"))
    assert library.path("notes").name == "notes~2"
    assert library.load("notes").name == "notes"
    assert not list(library.folder.glob(".*.writing"))
    library.remove("notes")
    assert (library.folder / "notes" / "a.txt").read_text() == "mine"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("make", [threading.Thread, multiprocessing.get_context("fork").Process])
def test_threads_and_processes_adding_at_once_all_land(tmp_path: Path, make: Any) -> None:
    folder = tmp_path / "library"
    workers = [make(target=_add_some, args=(folder, str(number))) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    library = ExpertLibrary.open(folder)
    assert library.names == sorted(f"e{number}-{turn}" for number in range(2) for turn in range(3))
    assert library.load_all()[1] == {}


def _add_some(folder: Path, label: str) -> None:
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # a forked process has none of its parent's OpenMP threads
    for turn in range(3):
        ExpertLibrary.open(folder, BASE).add(full(f"e{label}-{turn}", turn))


def test_a_reader_finds_an_expert_that_is_replaced_while_it_reads(
    library: ExpertLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = library._entries()
    library.add(full("law", 6), replace=True)
    real = ExpertLibrary._entries
    stale = iter([entries])
    monkeypatch.setattr(ExpertLibrary, "_entries", lambda self: next(stale, None) or real(self))
    loaded = library.load("law")
    assert torch.equal(loaded.lora.modules["model.a"].A_RI, lora("law", 6).modules["model.a"].A_RI)


def test_a_full_disk_is_an_error_with_a_cure(library: ExpertLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, value: object, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = contents(library.folder)
    monkeypatch.setattr(module, "write_object", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*: the disk is full"):
        library.add(full("new"))
    assert contents(library.folder) == before


# -- imports ----------------------------------------------------------------------------------------------------------


def test_adapters_are_read_from_folders_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lora(tmp_path / "c0ffee", lora("c0ffee", 4))
    local = read_peft(str(tmp_path / "c0ffee"), BASE)
    assert (local.name, local.lora.base, local.card) == ("c0ffee", BASE, {"source": str(tmp_path / "c0ffee")})
    assert torch.equal(local.lora.modules["model.a"].A_RI, lora("x", 4).modules["model.a"].A_RI)
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        if repository == "a/b":
            raise OSError("no network")
        asked.update(options, repository=repository)
        return str(tmp_path / "c0ffee")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(places, "_cached", lambda *_: False)
    monkeypatch.setattr(places, "_asked", lambda *_: None)
    expert = read_peft("someone/law-lora", BASE, revision="v1")
    assert (expert.name, expert.card) == ("law-lora", {"source": "someone/law-lora", "revision": "c0ffee"})
    patterns = ["adapter_config.json", "adapter_model.safetensors"]
    assert asked == {"repository": "someone/law-lora", "revision": "v1", "allow_patterns": patterns}
    with pytest.raises(ExpertError, match=r"'a/b' is no folder here and cannot be fetched.*no network; check"):
        read_peft("a/b", BASE)
    with pytest.raises(ConfigError, match="there is no folder"):
        read_peft(str(tmp_path / "nowhere"), BASE)
