"""README, CONTRIBUTING and docs/: every block of code is carried out, or says why not (support/pages.py)."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from support.command_line import Call
from support.pages import PAGES, ROOT, Reader, blocks, smaller
from support.tiny_project import TARGET_WORDS, WORDS, sentence
from transformers import AutoModelForCausalLM

from weftlm.cli.main import main
from weftlm.gating.config import gates
from weftlm.mixture.config import policies
from weftlm.models.factory import peft_warnings
from weftlm.routing.config import routers

LABELS = {"code": WORDS["algebra"], "prose": WORDS["cooking"], "law": WORDS["sailing"]}
TRAINING = {"sequence_length": 16, "batch_sequences": 8, "steps": 4, "warmup_steps": 1, "device": "cpu"}
POOL: dict[str, Any] = {
    "run": "runs/pool",
    "data": {
        "corpora": [{"path": f"text/{name}.jsonl", "label": name} for name in LABELS],
        "tokenizer": {"train": {"vocab_size": 300}},
    },
    "model": {
        "architecture": "llama",
        "config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "num_key_value_heads": 2, "max_position_embeddings": 256},
    },
    "mixture": {"policy": "uniform"},
    "training": TRAINING,
    "evaluation": {"max_tokens_per_set": 256},
    "experts": {"lora": {"rank": 2}, "training": TRAINING, "gate": {"steps": 2}, "statistics_examples": 4},
    "gating": {
        "scores": {"length": 16, "sequences": 8, "samples": 8},
        "fit": {"unit": "token", "steps": 8, "best_response_steps": 4},
        "held_out_fraction": 0.5,
        "students": {"distil": {"steps": 4}, "experts_per_token": [1], "direct": {"fit": {"steps": 8}}},
    },
}  # fmt: skip
FIRST: dict[str, Any] = {
    **{key: POOL[key] for key in ("model", "training", "evaluation")},
    "run": "runs/first",
    "data": {**POOL["data"], "target": [{"path": "mine.jsonl"}], "target_split": {"fraction": 0.5}},
    "mixture": {"policy": "dga", "update_every_steps": 2},
    "alignment": {"target_sequences": 4},
}


def command(*arguments: str) -> None:
    """The command line, where no test is."""
    said = io.StringIO()
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said)
    with quiet[0], quiet[1], pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code, said.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the pages take for granted: text, recipes, a pool of experts with a gate, models and adapters of others."""
    folder, before = tmp_path_factory.mktemp("world"), Path.cwd()
    rng = random.Random(0)
    os.chdir(folder)
    try:
        texts = {f"text/{name}.jsonl": words for name, words in LABELS.items()} | {"mine.jsonl": TARGET_WORDS}
        Path("text").mkdir()
        for path, words in {**texts, "my_text.jsonl": LABELS["law"]}.items():
            rows = [{"text": " ".join(sentence(rng, words) for _ in range(4))} for _ in range(30)]
            Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [{"text": sentence(rng, words), "source": name} for name, words in LABELS.items() for _ in range(80)]
        Path("generic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, recipe in {"pool": POOL, "recipe": FIRST}.items():
            Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        command("run", "pool.yaml", "--until", "distil")
        command("route", "build", "runs/pool/experts", "--router", "phatgoose", "--to", "runs/pool/routed")
        shutil.copytree("runs/pool/model", "runs/base")
        shutil.copytree("runs/pool/model", "my/base")
        for place, base in {"path/to/adapter": "runs/pool/model", "adapters/law": "my/base", "adapters/code": "my/base",
                            "converted/mine": "runs/pool/model"}.items():  # fmt: skip
            torch.manual_seed(len(place))
            with peft_warnings():
                model = get_peft_model(
                    AutoModelForCausalLM.from_pretrained(base),
                    LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
                )
                model.save_pretrained(place)
        Path("docs").symlink_to(ROOT / "docs")
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture
def reader(call: Call, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """Policies, routers and gates that a page registers do not outlive the test."""
    kept = []
    for registry in (policies, routers, gates):
        assert all(map(registry.entry, registry))  # all of them are imported: a module registers itself once
        kept.append((registry, dict(registry._entries)))
    yield Reader(call, monkeypatch, ids=torch.tensor([[5, 6, 7]]))
    for registry, entries in kept:
        registry._entries.clear()
        registry._entries.update(entries)


@pytest.fixture
def offline_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task `hellaswag` of two questions in the place of the harness's own tasks, which need a network."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"query": "pan butter", "choices": ["onion", "mast"], "gold": place} for place in (0, 1)]
    (folder / "hellaswag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "hellaswag", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(folder / "hellaswag.jsonl")}}, "doc_to_text": "{{query}}",
        "doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / "hellaswag.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=str(folder))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda *args, **options: own())
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


LEFT: Mapping[str, list[str]] = {
    "mixture": ["runs/tutorial.html", "runs/first/model/model.safetensors", "runs/importance/result.json"],
    "routing": ["runs/routing/routing.json", "runs/mine/routed/routed.json"],
    "gating": ["runs/gating/gate/certificate.json", "runs/gating/students/student-top-1/config.json"],
}
"""What a tutorial leaves behind."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# PEFT reads a property that transformers renames; it goes away with either's next release.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.usefixtures("offline_harness")
@pytest.mark.parametrize("page", [page for page in PAGES if "```" in page.read_text(encoding="utf-8")], ids=name_of)
def test_a_page_can_be_followed(page: Path, world: Path, reader: Reader, tmp_path: Path) -> None:
    if page.parent.name != "tutorials":  # they begin with nothing
        shutil.copytree(world, tmp_path, symlinks=True, dirs_exist_ok=True)
    text = page.read_text(encoding="utf-8")
    if "--to runs/pool/routed\n" in text:  # it makes this folder itself
        shutil.rmtree("runs/pool/routed")
    reader.follow(text)
    if page.parent.name == "tutorials":
        assert len(reader.commands) > 5
        assert [path for path in LEFT[page.stem] if not Path(path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_escapes(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^\s*(?:`{3,}|~{3,})", text, re.MULTILINE)
    assert len(fences) == 2 * len(list(blocks(text)))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    "page",
    [
        "```bash\n.venv/bin/weftlm experts trian pool.yaml\n```",
        "```bash\nmake test\n```",
        "Save this as `a.yaml`:\n```yaml\nmodle: {}\n```\n```bash\n.venv/bin/weftlm run a.yaml --dry-run\n```",
        "```python\nfrom weftlm.routing import no_such_router\n```",
        "```text\n$ .venv/bin/weftlm train absent.yaml\nweftlm: another message\n```",
        "```\nls\n```",
    ],
)
def test_a_page_that_shows_what_does_not_exist_fails(reader: Reader, page: str) -> None:
    with pytest.raises((AssertionError, ImportError, ValueError, KeyError)):
        reader.follow(page)


def test_sizes_are_replaced_and_nothing_else() -> None:
    assert smaller("training: {tokens: 800000, lr: 3.0e-3, warmup_steps: 20}") == (
        "training: {tokens: 1024, lr: 3.0e-3, warmup_steps: 1}"
    )
    assert smaller("MAX_BYTES = 300_000\nSTEPS = 60\nmodel.generate(ids, max_new_tokens=20)") == (
        "MAX_BYTES = 30000\nSTEPS = 4\nmodel.generate(ids, max_new_tokens=4)"
    )
    assert smaller("scores: {length: 128, sequences: 96}") == "scores: {length: 16, sequences: 8}"
    assert smaller("# 60 steps of 128") == "# 60 steps of 128"
