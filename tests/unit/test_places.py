"""A name is a folder here, a hub name, or a mistake: said before any network."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from weftlm import places
from weftlm.corpora.reading import CorpusConfig, ReadingReport, read_documents
from weftlm.corpora.tokens import load_pretrained
from weftlm.errors import ConfigError, DataError
from weftlm.experts.expert import BaseReference
from weftlm.experts.peft_import import read_peft
from weftlm.models.factory import ModelConfig, build_model, load_base
from weftlm.models.open import read_config
from weftlm.pipeline.any_model import open_model
from weftlm.pipeline.expert_library import import_experts
from weftlm.places import locate


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run in it, and a hub that nobody may ask."""
    (tmp_path / "runs" / "first" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "_asked", asked)
    return tmp_path


def asked(*_: Any) -> str | None:
    raise AssertionError("the hub was asked")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/first/modle", "did you mean runs/first/model"),
        ("runs/frist", "did you mean runs/first"),
        ("runs/nothing", "runs holds first"),
        ("run/first", "did you mean runs"),
        ("runs/first/model/", None),
        ("rnus/first", "did you mean runs"),
        ("/nowhere/at/all", "a hub name would be owner/name"),
        ("./model", "a hub name would be owner/name"),
        ("../model", "a hub name would be owner/name"),
        ("~/nowhere-at-all", "a hub name would be owner/name"),
        ("a/b/c", "a hub name would be owner/name"),
        ("a\\b", "a hub name would be owner/name"),
        ("a b", "it cannot be a hub name either"),
        ("my--model", "it cannot be a hub name either"),
        ("x" * 300, "it cannot be a hub name either"),
        ("", "give a folder or a hub name"),
        ("a\0b", "give a folder or a hub name"),
    ],
)
def test_paths_are_told_from_hub_names_without_asking(name: str, said: str | None) -> None:
    if said is None:
        assert locate(name, "base") == name
        return
    with pytest.raises(ConfigError) as caught:
        locate(name, "experts.base")
    assert said in str(caught.value)
    assert "experts.base" in str(caught.value)


DOORS: dict[str, Callable[[str], Any]] = {
    "base": load_base,
    "training": lambda name: build_model(
        ModelConfig(pretrained=name), vocab_size=8, sequence_length=8, eos_id=0, seed=0
    ),
    "tokenizer": load_pretrained,
    "any model": open_model,
    "plan": lambda name: read_config(name, local_files_only=True),
    "dataset": lambda name: list(read_documents(CorpusConfig(dataset=name, label="x"), ReadingReport())),
    "imported adapter": lambda name: import_experts(Path("library"), [name]),
    "adapter of a base": lambda name: read_peft(name, BaseReference("base")),
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS.keys())
def test_every_door_says_that_a_mistyped_path_is_one(door: Callable[[str], Any]) -> None:
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"there is no folder runs/frist .*did you mean runs/first"):
        door("runs/frist")
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("raised", "offline", "said"),
    [
        (ConnectionError("no route"), False, r"the hub cannot be reached \(ConnectionError\)"),
        (TimeoutError(), False, r"the hub cannot be reached \(TimeoutError\)"),
        (AssertionError("it is asked"), True, r".*HF_HUB_OFFLINE is set"),
    ],
)
def test_a_hub_that_does_not_answer_is_said_to_be_so(
    raised: Exception, offline: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repo_info(self: Any, *_: Any, timeout: float, **__: Any) -> None:
        assert timeout <= 5.0
        raise raised

    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    places._asked.cache_clear()
    with pytest.raises(ConfigError, match=rf"'some/model' is no folder here, and {said}"):
        locate("some/model", "base")
    places._asked.cache_clear()


def test_a_plan_asks_nobody() -> None:
    assert locate("some/model", "base", ask=False) == "some/model"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("rnus/first/a.jsonl", "did you mean runs?"),
        ("runs/frist/*.jsonl", "did you mean runs/first?"),
        ("runs/first/a.jsonl", "runs/first holds model"),
        ("elsewhere.jsonl", "check the spelling"),
    ],
)
def test_text_that_is_not_there_is_likened_to_what_is(path: str, said: str) -> None:
    with pytest.raises(DataError, match="matches no file") as caught:
        list(read_documents(CorpusConfig(path=path), ReadingReport()))
    assert said in str(caught.value)
