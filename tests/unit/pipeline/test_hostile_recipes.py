"""Recipes that nobody should send: each is refused in words, and nothing is written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from support.tiny_project import recipe_value

from weftlm.config import sections_in
from weftlm.errors import ConfigError
from weftlm.pipeline.recipe import Recipe, load_recipe, make_recipe
from weftlm.recipe_text import read_yaml

RAW = re.compile(
    r"\[Errno|Input should|should be a valid|type=|pydantic|Traceback|NoneType|object at 0x|unable to parse"
)
"""What a library says and a person should not have to read."""
PLAIN = yaml.safe_dump(recipe_value())


def with_line(line: str) -> str:
    return PLAIN + line + "\n"


TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "comments alone": "# nothing\n",
    "a list": "- 1\n",
    "a number": "3\n",
    "not UTF-8": b"run: \xff\xfe\n",
    "binary": bytes(range(256)),
    "NUL bytes": b"run: a\0b\n",
    "100 MB": b"x: " + b"a" * 100_000_000,
    "aliases": "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 10}]\n" for n in range(1, 9)),
    "alias mappings": "a0: &a0 {}\n" + "".join(f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}\n" for n in range(1, 40)),
    "a merge of itself": "run: &a {<<: *a}\n",
    "a mapping of itself": "run: &a {b: *a}\n",
    "merge of text": "run: {<<: text}\n",
    "deep closed lists": "run: " + "[" * 50_000 + "]" * 50_000,
    "deep blocks": "".join(" " * n + "a:\n" for n in range(600)),
    "a python object": "run: !!python/object/apply:os.system ['true']\n",
    "a tag of one's own": "run: !mine x\n",
    "two documents": PLAIN + "---\n" + PLAIN,
    "duplicate section": with_line("training: {steps: 1}"),
    "duplicate key": "a: {b: 1, c: 2, b: 3}\n",
    "key is null": with_line("null: x"),
    "key is a list": with_line("? [a, b]\n: x"),
    "long key": with_line("k" * 50_000 + ": x"),
    "open quote": 'run: "abc\n',
    "at sign": "run: @home\n",
    "half a character": 'run: "\\ud800"\n',
}  # fmt: skip

SETTINGS: dict[str, str] = {
    "huge seed": "seed=4294967296",
    "endless seed": f"seed={'9' * 5000}",
    "infinite rate": "training.lr=.inf",
    "no rate": "training.lr=.nan",
    "nan beta": "training.betas=[.nan, 0.9]",
    "infinite in a free section": "model.config.rope_theta=.inf",
    "no steps": "training.steps=0",
    "endless steps": f"training.steps={'1' * 30}",
    "list for a section": "training=[1, 2]",
    "null section": "training=null",
    "mapping for text": "run={a: b}",
    "long path": f"run={'a/' * 3000}b",
    "NUL in a path": 'run="a\\0b"',
    "deep value": f"model.config.x={'[' * 5000}",
    "deep key": "model.config" + ".a" * 5000 + "=1",
    "a tag": "run=!!python/object/apply:os.system [ls]",
    "two documents": "run=a\n---\nb",
    "unknown device": "training.device=quantum",
    "both lengths": "training.tokens=100",
    "unknown policy": "mixture.policy=magic",
    "policy is a list": "mixture.policy=[dga]",
    "no corpora": "data.corpora=[]",
    "unicode digit index": "data.corpora.².path=x",
    "index out of the list": "data.corpora.99.path=x",
    "steps into text": "run.x.y=1",
    "gate of no kind": "gating={gate: 3}",
    "baseline unknown": "compare.mixtures=[nothing]",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_hostile_texts_are_refused_in_words(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(lambda: load_recipe(path), tmp_path, {"recipe.yaml"})


@pytest.mark.parametrize("override", SETTINGS.values(), ids=SETTINGS.keys())
def test_hostile_settings_are_refused_in_words(override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(PLAIN)
    refused(lambda: load_recipe(path, [override]), tmp_path, {"recipe.yaml"})


def nearly(path: Path) -> Path:
    (path / "recipe.yaml").write_text(PLAIN)
    return path / "recpie.yaml"


def fifo(path: Path) -> Path:
    os.mkfifo(path / "pipe.yaml")
    return path / "pipe.yaml"


def loop(path: Path) -> Path:
    (path / "loop.yaml").symlink_to(path / "loop.yaml")
    return path / "loop.yaml"


PLACES: dict[str, Callable[[Path], Path]] = {
    "absent": lambda path: path / "absent.yaml",
    "nearly": nearly,
    "folder": lambda path: path,
    "fifo": fifo,
    "loop": loop,
    "below a file": lambda path: nearly(path).with_name("recipe.yaml") / "recipe.yaml",
    "endless device": lambda path: Path("/dev/zero"),
    "longer": lambda path: path / ("a/" * 4000 + "b.yaml"),
    "NUL": lambda path: path / "a\0b.yaml",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_recipes_that_are_no_files_are_refused_in_words(place: Callable[[Path], Path], tmp_path: Path) -> None:
    path = place(tmp_path)
    before = {each.name for each in tmp_path.iterdir()}
    refused(lambda: load_recipe(path), tmp_path, before)


def test_a_recipe_of_nearly_that_name_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*recipe\.yaml"):
        load_recipe(nearly(tmp_path))


def refused(work: Callable[[], Any], folder: Path, left: set[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        work()
    message = str(caught.value)
    assert message
    assert RAW.search(message) is None, message
    assert all(len(line) < 700 for line in message.splitlines()), message[:900]
    assert {each.name for each in folder.iterdir()} == left


def test_duplicate_keys_are_refused_with_both_lines(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("run: a\ntraining:\n  steps: 1\n  lr: 0.1\n  steps: 2\n")
    with pytest.raises(ConfigError, match=r"r\.yaml, line 5: the key 'steps' comes twice, first in line 3"):
        load_recipe(tmp_path / "r.yaml")


def test_what_yaml_means_by_itself_is_kept_and_its_surprises_are_not(tmp_path: Path) -> None:
    text = "a: &x {b: 1, c: .5}\nd: {<<: *x, b: 2}\ne: 2020-01-01\nf: 12:30\ng: 1_000\nh: 0x10\ni: 007\nj: 3e-4\nk: ~\n"
    (tmp_path / "r.yaml").write_text(text)
    assert read_yaml(tmp_path / "r.yaml") == {
        "a": {"b": 1, "c": 0.5}, "d": {"b": 2, "c": 0.5}, "e": "2020-01-01", "f": "12:30", "g": 1000, "h": 16,
        "i": "007", "j": 0.0003, "k": None,
    }  # fmt: skip


def fields(section: type[BaseModel], place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, field in section.model_fields.items():
        found.append((*place, name))
        for inner in sections_in(field.annotation):
            found += fields(inner, (*place, name))
    return found


ODD: list[Any] = [None, True, -1, 1.5, float("nan"), "text", [], [[1]], {"a": 1}, 2**70]


def test_no_odd_value_in_any_key_brings_a_librarys_words() -> None:
    for place in fields(Recipe):
        for odd in ODD:
            value: dict[str, Any] = {**recipe_value(), "experts": {}, "gating": {}, "routing": {}}
            here: Any = value
            for part in place[:-1]:
                here[part] = dict(here[part]) if isinstance(here.get(part), dict) else {}
                here = here[part]
            here[place[-1]] = odd
            message = ""
            try:
                make_recipe(value)
            except ConfigError as error:
                message = str(error)
            assert RAW.search(message) is None, (place, odd, message)
