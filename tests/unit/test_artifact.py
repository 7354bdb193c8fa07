"""Results are reused, resumed or refused by what decides them, and locks hold against other processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import create_model
from support.faults import flip, held_by_another

from weftlm.artifact import Artifact, is_locked, locked, refuse_other
from weftlm.config import Section, changed_keys, sections_in, settings
from weftlm.errors import CheckpointError, DataError
from weftlm.mixture.config import DgaConfig
from weftlm.pipeline.recipe import Recipe


def sections() -> Iterator[type[Section]]:
    """Every section of a recipe."""
    waiting, seen = [Recipe], set()
    while waiting:
        section = waiting.pop()
        if section in seen:
            continue
        seen.add(section)
        yield section
        waiting += [each for field in section.model_fields.values() for each in sections_in(field.annotation)]


SECTIONS = sorted(sections(), key=lambda section: section.__name__)


def example(section: type[Section]) -> Any:
    """A section with its defaults; required keys, which no comparison looks into, hold their own names."""
    required = {name: name for name, field in section.model_fields.items() if field.is_required()}
    return section.model_construct(**required)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_a_key_that_a_section_gains_leaves_results_as_they_are(section: type[Section]) -> None:
    later = create_model(f"Later{section.__name__}", __base__=section, new_key=(int, 3))
    kept = json.loads(json.dumps(settings(example(section))))
    same = example(later)
    assert changed_keys(kept, settings(same)) == []
    other = same.model_copy(update={"new_key": 4})
    assert changed_keys(kept, settings(other)) == ["new_key: absent before, 4 now"]
    nested = {"at": kept, "list": [kept]}
    assert changed_keys(nested, {"at": settings(same), "list": [settings(same)]}) == []


def test_a_key_whose_default_changed_since_is_another_setting() -> None:
    kept = dict(settings(DgaConfig(policy="dga")))
    later = create_model("Later", __base__=DgaConfig, eta=(float, 15.0))
    assert changed_keys(kept, settings(later(policy="dga"))) == [f"eta: {kept['eta']!r} before, 15.0 now"]


@pytest.fixture
def kept(tmp_path: Path) -> Artifact:
    artifact = Artifact(tmp_path / "fit.json", {"scores": "abc", "settings": {"lr": 0.1}}, "fit again")
    artifact.begin()
    (tmp_path / "gate.bin").write_bytes(b"gate")
    artifact.finish({"worst": 0.5}, ["gate.bin"])
    return artifact


def another(kept: Artifact, **identity: Any) -> Artifact:
    return Artifact(kept.record, {**kept.identity, **identity}, "fit again")


def test_a_finished_result_is_reused_under_its_identity_alone(kept: Artifact) -> None:
    assert kept.reuse() == {"identity": kept.identity, "worst": 0.5}
    assert not kept.resume()
    assert kept.changed() is None
    other = another(kept, settings={"lr": 0.2})
    assert other.reuse() is None
    assert other.id != kept.id
    with pytest.raises(
        CheckpointError, match=r"holds a fit of something else \(settings.lr: 0.1 before, 0.2 now\); move"
    ):
        refuse_other(other, "a fit", "move it")


def test_unfinished_work_is_resumed_and_the_old_result_stays_until_the_new_one_is_whole(kept: Artifact) -> None:
    other = another(kept, scores="def")
    other.begin()
    assert other.resume()
    assert other.reuse() is None
    assert not another(kept, scores="ghi").resume()
    assert kept.reuse() is not None
    other.finish({"worst": 0.4})
    assert (kept.reuse(), other.resume()) == (None, False)


def test_a_result_keeps_its_id_when_its_section_gains_a_key(tmp_path: Path) -> None:
    config = DgaConfig(policy="dga")
    before = Artifact(tmp_path / "result.json", {"settings": settings(config)}, "train again")
    before.begin()
    later = create_model("Later", __base__=DgaConfig, new_key=(int, 3))
    now = Artifact(tmp_path / "result.json", {"settings": settings(later(policy="dga"))}, "train again")
    assert now.id == before.id
    before.finish({})
    assert now.reuse() is not None
    assert now.id == before.id


def test_a_fact_that_is_no_number_is_kept_only_where_that_is_meant(kept: Artifact) -> None:
    other = another(kept, scores="def")
    with pytest.raises(ValueError, match="not JSON compliant"):
        other.finish({"worst": float("nan")})
    assert kept.reuse() is not None
    other.finish({"perplexity": float("inf")}, nan=True)
    assert other.reuse() is not None


@pytest.mark.parametrize("name", ["fit.json", "gate.bin"])
def test_a_damaged_result_is_refused(kept: Artifact, name: str) -> None:
    flip(kept.record.with_name(name), 30 if name == "fit.json" else 1)
    with pytest.raises(DataError, match="fit again"):
        kept.reuse()


def test_a_lock_names_its_holder_and_is_free_after_its_death(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    with held_by_another(lock) as process:
        assert is_locked(lock)
        with pytest.raises(CheckpointError, match=rf"another process \({process} on "), locked(lock, CheckpointError):
            pass
    with (
        locked(lock, CheckpointError),
        pytest.raises(CheckpointError, match=rf"another process \({os.getpid()} on "),
        locked(lock, CheckpointError),
    ):
        pass
    with locked(lock, CheckpointError), locked(lock, CheckpointError, again=True):
        assert not is_locked(tmp_path / "run" / "other")
        assert not is_locked(lock)
    assert not is_locked(lock)
