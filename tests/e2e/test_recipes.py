"""Every shipped recipe, planned as it is and carried out on tiny stand-ins for its text and its models."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from support import served
from support.command_line import Call
from support.tiny_project import WORDS, sentence

from weftlm.models.factory import peft_warnings
from weftlm.models.open import load_base
from weftlm.pipeline.checks import check_recipe
from weftlm.pipeline.quick import quick
from weftlm.pipeline.recipe import load_recipe, make_recipe
from weftlm.pipeline.runner import plan_stages, run_project
from weftlm.planning.hardware import parse_hardware
from weftlm.planning.plan import plan_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALLER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "sequence_length": 16, "batch_sequences": 8, "micro_batch_sequences": 4, "batch_size": 8, "vocab_size": 300,
    "sample_documents": 50, "n": 3, "min_bytes": 1, "count": 2, "target_train_documents": 8, "length": 8,
    "precision": "fp32", "dtype": "float32", "target_sequences": 4, "dimensions": 4,
}  # fmt: skip
"""Sizes by key, wherever a recipe has it, beside those of `--quick`; all else stays as it ships."""

DATASETS = ["mrpc", "sciq"]
"""Of the datasets that a recipe names as domains, those that have stand-ins."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_planned(path: Path) -> None:
    project = load_recipe(path)
    check_recipe(project, here=False)
    planned = plan_stages(project)
    assert {act for _, act in planned} == {"run"}
    assert planned[0][0].stage.name == "prepare"
    assert planned[-1][0].stage.name == "report"


def test_a_dry_run_names_the_text_that_is_not_there(call: Call) -> None:
    path = next(each for each in RECIPES if each.stem == "own_text")
    call("run", path, "--dry-run", code=1)
    data = load_recipe(path).data
    assert call.err.count("matches no file") == len(data.corpora) + len(data.target)


@pytest.mark.parametrize(("least", "most"), [(300e6, 400e6), (650e6, 800e6)])
def test_the_larger_models_a_recipe_names_are_of_that_size(call: Call, least: float, most: float) -> None:
    path = RECIPES[0].parent / "dga_redpajama_pile.yaml"
    lines = [line for line in path.read_text().splitlines() if line.startswith("#   --set")]
    chosen = lines[:2] if most < 500e6 else lines[2:]
    planned = call("plan", path, "--hardware", "8xH100", "--json", *" ".join(chosen).replace("#", "").split())
    facts = {stage["name"]: stage["facts"] for stage in planned["stages"]}
    assert least < facts["training"]["parameters"] < most


class StandIns:
    """Text, models and adapters of a few kilobytes in the place of a recipe's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = str(served.write_model(folder / "base", "plain"))
        self.texts = iter(range(1000))
        words = served.tokenizer(fewer=1).hf
        words.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
        words.save_pretrained(self.base)
        self.chat = str(shutil.copytree(self.base, folder / "chat"))
        words.eos_token = "<|im_end|>"
        words.save_pretrained(self.chat)

    def encoder_decoder(self) -> str:
        """A T5 in the place of a T5."""
        return str(served.write_encoder_decoder(self.folder / "t5"))

    def examples(self, section: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Prompts and targets in the same fields, a folder for each of some datasets."""
        rng = random.Random(next(self.texts))
        folder = self.folder / f"examples-{rng.random()}"
        for name in names:
            (folder / name).mkdir(parents=True)
            answers = [rng.sample(WORDS["algebra"], 1 + number % 3) for number in range(40)]
            lines = [
                {section["prompt_field"]: f"{name} {rng.random()}?", section["text_field"]: " ".join(answer)}
                for answer in answers
            ]
            (folder / name / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {**section, "path": f"{folder}/*/some.jsonl"}

    def tasks(self, sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Questions with answers, one file where there was one and two where there were many."""
        found = []
        for number, section in enumerate(sections):
            many = "*" in section["path"]
            for name in ("one", "two") if many else (Path(section["path"]).stem,):
                path = self.folder / f"tasks-{number}" / f"{name}.jsonl"
                path.parent.mkdir(exist_ok=True)
                line = {"prompt": "the ring is", "choices": ["a field", "an ideal", "exact"], "answer": 1}
                path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "answer": "exact"}) + "\n")
            found.append({**section, "path": str(path.parent / "*.jsonl" if many else path)})
        return found

    def corpus(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """The same labels, made-up sentences."""
        if "prompt_field" in section:
            return self.examples(section, DATASETS)
        rng = random.Random(next(self.texts))
        words = [word for each in WORDS.values() for word in each]
        rng.shuffle(words)
        texts = [" ".join(sentence(rng, words[: 15 + rng.randrange(5)]) for _ in range(6)) for _ in range(40)]
        kept = {key: value for key, value in section.items() if key in ("label", "label_field", "on_error")}
        path = self.folder / f"text-{rng.random()}.jsonl"
        path.write_text("".join(json.dumps({"text": text, "source": "web"}) + "\n" for text in texts))
        return {**kept, "path": str(path)}

    def adapter(self, source: str) -> str:
        """A random adapter over the stand-in base."""
        place = self.folder / source
        with peft_warnings():
            config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
            get_peft_model(load_base(self.base), config).save_pretrained(place)
        return str(place)

    def replace(self, value: Any, key: str = "") -> Any:
        """A recipe's value with every text, model and size replaced."""
        if key in ("corpora", "target", "heldout", "target_heldout"):
            return [self.corpus(section) for section in value]
        if key == "tasks":
            return self.tasks(value)
        if key == "domains" and isinstance(value, list):
            return DATASETS
        if key == "embedder":
            return {} if isinstance(value, Mapping) else "tokens-64"
        if key in ("pretrained", "base", "model") and isinstance(value, str):
            if value.endswith("-Instruct"):  # ends its texts with another token of the same vocabulary
                return self.chat
            return self.encoder_decoder() if "t5" in value else self.base
        if key == "source":
            return self.adapter(value)
        if key in SMALLER and not isinstance(value, Mapping):
            return SMALLER[key]
        if isinstance(value, Mapping):
            return {name: self.replace(each, name) for name, each in value.items()}
        if isinstance(value, list):
            return [self.replace(each) for each in value]
        return value


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_carried_out(path: Path, tmp_path: Path) -> None:
    value = {**StandIns(tmp_path).replace(yaml.safe_load(path.read_text())), "run": str(tmp_path / "run")}
    project = quick(make_recipe(value))
    planned = plan_recipe(project, parse_hardware("8xH100"))
    stages = {stage.name for stage in planned.stages}
    assert ("training" in stages) == project.trains
    assert ("experts" in stages) == project.makes_experts
    assert ("gated serving" in stages) == ("gating" in value)
    assert planned.seconds > 0
    assert {status.state for status in run_project(project, progress=False)} == {"done"}
    assert (project.run / "report.html").stat().st_size > 1000
    if tasks := value.get("evaluation", {}).get("tasks"):
        accuracy = json.loads((project.run / "routing.json").read_text())["rows"]["phatgoose"]["tasks"]
        names = {task.get("name") or Path(task["path"]).stem for task in tasks}
        assert {name.partition("/")[0] for name in accuracy} == names


def test_the_pool_of_the_paper_has_its_36_experts_and_11_tasks_nobody_was_trained_on() -> None:
    recipe = load_recipe(RECIPES[0].parent / "phatgoose_t0.yaml")
    assert recipe is not None
    assert recipe.experts.domains is not None
    assert len(set(recipe.experts.domains)) == 36
    heldout = {Path(task.path).stem for task in recipe.evaluation.tasks if "t0_heldout" in task.path}
    assert len(heldout) == 11
    assert not heldout & set(recipe.experts.domains)
    training = recipe.experts.training
    assert (training.total_steps, training.warmup_steps, training.batch_sequences) == (1000, 60, 1024)
