"""Killed commands go on to what they would have made, and no damaged file is read as if it were whole.

A sample of what `benchmarks/faults.py` tries; see `support.faulty_project`.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.faulty_project import COMMANDS, LIBRARY, RECIPE, RUN, Project, full, kill

from weftlm.errors import DataError, WeftError
from weftlm.experts.library import ExpertLibrary
from weftlm.experts.lora import lora_files, read_lora
from weftlm.gating.scores import ScoreCache
from weftlm.pipeline.any_model import open_model
from weftlm.pipeline.expert_library import list_experts
from weftlm.pipeline.gating import open_gate, student_folders
from weftlm.pipeline.heldout import read_evaluation
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.project_report import gate_facts
from weftlm.pipeline.recipe import load_recipe
from weftlm.pipeline.routes import read_routing
from weftlm.pipeline.runner import project_status
from weftlm.pipeline.scoring import open_scores
from weftlm.pipeline.train import read_result, require_same_data
from weftlm.reporting.runs import read_runs
from weftlm.training.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield Project(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("command", "point"),
    [
        ("experts import", 1), ("experts import", 4), ("experts import", 5), ("experts remove", 3), ("gate fit", 2),
        ("gate fit", 4), ("export", 3), ("score", 3),
    ],
)  # fmt: skip
def test_a_killed_command_goes_on_to_what_it_would_have_made(project: Project, command: str, point: int) -> None:
    assert kill(project, COMMANDS[command], point, of=6) == ""


@pytest.mark.parametrize("command", ["score", "experts import"])
def test_a_full_disk_is_said_and_leaves_nothing_half_written(project: Project, command: str) -> None:
    assert full(project, COMMANDS[command], limit=1000) == ""


# -- what is read is checked ------------------------------------------------------------------------------------------


def _library(library: ExpertLibrary) -> Any:
    return [library.fingerprint(), {name: lora_files(library.load(name).lora) for name in library.names}]


def _page(run: Path) -> Any:
    found = read_runs([run])[0]
    if found.problems:
        raise DataError("; ".join(found.problems))
    return found


READ: Sequence[tuple[str, Callable[[str], Any]]] = [
    (f"{RUN}/prepared/", lambda _: _prepared(PreparedData.load(f"{RUN}/prepared"))),
    (f"{RUN}/model/", lambda _: _model(RUN)),
    (f"{RUN}/routed/", lambda _: _model(f"{RUN}/routed/merged")),
    (f"{RUN}/students/student/", lambda _: _model(f"{RUN}/students/student")),
    (f"{RUN}/students/", lambda _: [student_folders(_recipe()), gate_facts(Path(RUN))]),
    (f"{LIBRARY}/", lambda _: [_library(ExpertLibrary.open(Path(LIBRARY))), list_experts(Path(LIBRARY))]),
    (f"{RUN}/scores/", lambda _: _scores(ScoreCache.open(f"{RUN}/scores"))),
    (f"{RUN}/gate/g", lambda _: open_gate(_recipe(), open_scores(_recipe()))),
    (f"{RUN}/gate/f", lambda _: open_gate(_recipe(), open_scores(_recipe()))),
    (f"{RUN}/gate/c", lambda _: gate_facts(Path(RUN))),
    (f"{RUN}/checkpoints/", lambda name: load_checkpoint(Path(name).parent)),
    (f"{RUN}/stages/", lambda _: [(each.state, each.why) for each in project_status(load_recipe(RECIPE))]),
    (f"{RUN}/evaluation.json", lambda _: read_evaluation(load_recipe(RECIPE))),
    (f"{RUN}/routing.json", lambda _: read_routing(_recipe())),
    (f"{RUN}/run.json", lambda _: require_same_data(Path(RUN), PreparedData.load(f"{RUN}/prepared"))),
    (f"{RUN}/result.json", lambda _: [read_result(Path(RUN)), _page(Path(RUN))]),
    (f"{RUN}/metrics.jsonl", lambda _: _page(Path(RUN))),
    (f"{RUN}/windows.safetensors", lambda _: _page(Path(RUN))),
    ("adapters/algebra/", lambda _: lora_files(read_lora(Path("adapters/algebra")))),
]
"""Beginning of a path -> what reads it; gives what it found."""
UNREAD = ("report.html", "summary.json", "recipe.yaml", ".jsonl", "README.md", ".lock")


def _recipe() -> Any:
    return load_recipe(RECIPE)


def _prepared(data: PreparedData) -> Any:
    stores = [store for domain in data.domains for store in (domain.train, domain.heldout) if store is not None]
    return [data.summary(), data.domain_facts(), [store.read(0, len(store)) for store in stores]]


def _model(path: str) -> Any:
    opened = open_model(path)
    with torch.inference_mode():
        logits_BTV = opened.model(torch.arange(24)[None]).logits
    return [logits_BTV.numpy(), opened.tokenizer.vocabulary_fingerprint, opened.experts]


def _scores(cache: ScoreCache) -> Any:
    texts = [*cache.domains.values(), *cache.samples.values()]
    return [cache.fingerprint, [(text.name, text.features.logp_BTE.numpy(), text.tokens_NT1.numpy()) for text in texts]]


def _known(value: Any) -> str:
    """A digest of whatever a reader found, arrays in full."""
    with np.printoptions(threshold=10**9):
        return hashlib.blake2b(repr(value).encode()).hexdigest()


@pytest.mark.parametrize("start", [start for start, _ in READ])
def test_a_damaged_file_is_refused_by_name_or_changes_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    project.restore()
    monkeypatch.chdir(project.place)
    read = next(each for begins, each in READ if begins == start)
    names = [name for name in project.whole_files() if next((s for s, _ in READ if name.startswith(s)), "") == start]
    assert names
    for name in names if "routed" not in start else names[::5]:  # where reading takes longest, and all files are alike
        path, whole = Path(name), _known(read(name))
        data = path.read_bytes()
        for damaged in _damages(data, random.Random(name)):
            _put(path, damaged)
            try:
                found = _known(read(name))
            except WeftError as error:
                said = str(error)
                assert path.name in said or f"{path.parent}" in said, f"{name}: {said}"
            else:
                assert found == whole, f"{name} is read as if it were whole"
        _put(path, data)


def _damages(data: bytes, rng: random.Random) -> Iterator[bytes]:
    for _ in range(2):
        place = rng.randrange(8 * len(data))
        yield data[: place // 8] + bytes([data[place // 8] ^ 1 << place % 8]) + data[place // 8 + 1 :]
    yield data[: len(data) // 2]


def _put(path: Path, data: bytes) -> None:
    """Replace a file, since what was read before may still be mapped."""
    path.with_name("other").write_bytes(data)
    os.replace(path.with_name("other"), path)


def test_every_file_that_a_project_leaves_is_read_by_some_reader(project: Project) -> None:
    names = [name for name in project.whole_files() if name.startswith(RUN) and not name.endswith(UNREAD)]
    unread = [
        name for name in names if not name.startswith(tuple(start for start, _ in READ)) and "/training/" not in name
    ]
    assert unread == []
