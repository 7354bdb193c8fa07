"""The code and the recipes shown in the documents are real: Python runs, recipes are valid, named files exist."""

import re
from pathlib import Path

import pytest
import yaml
from support import served
from support.experts import make_pool, prompts

from weftlm.experts.expert import BaseReference
from weftlm.experts.library import ExpertLibrary
from weftlm.gating.experts import ExpertPool
from weftlm.gating.modular_lm import ModularLM
from weftlm.gating.prefix_gate import PrefixGate, with_top
from weftlm.models.fingerprint import base_fingerprint
from weftlm.pipeline.recipe import make_recipe

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = ROOT / "docs/tutorials"
"""Their blocks build on one another; tests/e2e/test_tutorials.py carries them out in order."""


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        if language == "python" and page.parent == TUTORIALS:
            continue
        code = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        found += [pytest.param(text, id=f"{page.relative_to(ROOT)}-{i}") for i, text in enumerate(code)]
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return served.tokenizer()


@pytest.fixture
def pool(tmp_path, tokenizer):
    """What the pages call runs/pool: a base, a library of experts over it, a student of a gate; the ids of a prompt."""
    model = served.llama()
    folder = tmp_path / "runs" / "pool"
    model.save_pretrained(folder / "model")
    tokenizer.save(folder / "model")
    base = BaseReference("runs/pool/model", None, base_fingerprint(model))
    library = ExpertLibrary.create(folder / "experts", base)
    for expert in make_pool(model, 2, base=base):
        library.add(expert)
    gate = with_top(PrefixGate.of([0.5, 0.5]), 1)
    experts = ExpertPool.from_library(library, folder / "model")
    ModularLM(experts, gate).save_pretrained(folder / "students" / "student-top-1")
    return {"ids": prompts(1, 5)}


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, execute, pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute(code, **pool)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_and_parts_of_recipes_are_valid(text):
    part = yaml.safe_load(text)
    whole = {
        "run": "runs/x",
        "data": {"corpora": [{"builtin": "all"}]},
        "model": {"architecture": "llama"},
        "mixture": {"policy": "uniform"},
        "training": {"steps": 1},
    }
    make_recipe(whole | part)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
