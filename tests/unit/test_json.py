"""JSON of unknown origin that nests without end is an error in words, wherever it is read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import weftlm
from weftlm.corpora.store import open_stores
from weftlm.errors import WeftError
from weftlm.experts.library import ExpertLibrary
from weftlm.experts.lora import read_lora
from weftlm.files import read_object
from weftlm.gating.modular_lm import ModularLM
from weftlm.models.open import load_base
from weftlm.pipeline.prepared import read_manifest
from weftlm.routing.routed_model import RoutedModel
from weftlm.training.checkpoint import load_checkpoint

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
SOURCES = Path(weftlm.__file__).parent
OWN = {
    "files.py", "experts/lora.py", "models/fingerprint.py", "serving/chat_template.py",
    "corpora/formats.py",
    "recipe_text.py", "gating/scores.py",
}  # fmt: skip
"""Files that read JSON this process wrote, or that have a guard of their own."""


def test_every_reader_uses_the_one_that_guards() -> None:
    found = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in ("load", "loads")
                and getattr(node.value, "id", "") == "json"
            ):
                found.add(path.relative_to(SOURCES).as_posix())
    assert found <= OWN


READERS = {
    "library.json": ExpertLibrary.open,
    "adapter_config.json": lambda folder: read_lora(folder, "a"),
    "routed.json": RoutedModel.from_pretrained,
    "modular.json": ModularLM.from_pretrained,
    "prepared.json": read_manifest,
    "stores.json": open_stores,
    "digests.json": load_checkpoint,
    "config.json": lambda folder: load_base(str(folder)),
    "result.json": lambda folder: read_object(folder / "result.json", "make it again"),
}
"""File -> what reads it, of its folder."""


@pytest.mark.parametrize("file", READERS)
def test_a_file_that_nests_without_end_is_refused_by_name(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(DEEP)
    with pytest.raises(WeftError) as caught:
        READERS[file](tmp_path)
    assert "Recursion" not in str(caught.value)
    assert str(tmp_path) in str(caught.value) or file in str(caught.value)
