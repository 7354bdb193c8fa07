"""The setting of the routing benchmarks: a small base model, experts on domains and tasks, gates, and what is unseen.

Everything is trained once into a work folder and found there again; a run that is cut off continues.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from _common import say, write_atomically
from _domains_text import TextDomain, encode, make_tokenizer, read_texts, shuffled
from transformers import PreTrainedModel

from weftlm.corpora.source import ArraySource
from weftlm.corpora.tokens import Tokenizer
from weftlm.evaluation.choices import ChoiceQuestion
from weftlm.experts.config import ExpertTraining, GateConfig
from weftlm.experts.expert import BaseReference, Expert, Gate
from weftlm.experts.library import ExpertLibrary
from weftlm.experts.train import train_expert, train_gate
from weftlm.mixture.policy import MixtureSetting, build_policy
from weftlm.models.config import ModelConfig
from weftlm.models.factory import build_model, count_parameters
from weftlm.models.fingerprint import base_fingerprint
from weftlm.models.open import load_base
from weftlm.training.config import AlignmentConfig, TrainingConfig
from weftlm.training.loop import Task, Trainer
from weftlm.training.runtime import choose_runtime

VOCABULARY, LENGTH = 2048, 128
MODEL: dict[str, Any] = {
    "architecture": "llama",
    "config": {
        "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
}  # fmt: skip
BASE_TRAINING: dict[str, Any] = {
    "sequence_length": LENGTH, "batch_sequences": 32, "tokens": 3_000_000, "lr": 3e-3, "warmup_steps": 50,
    "save_every_steps": 200, "log_every_steps": 100, "threads": 1,
}  # fmt: skip
EXPERT: dict[str, Any] = {
    "lora": {"rank": 8, "alpha": 8},
    "training": {
        "sequence_length": LENGTH, "batch_sequences": 16, "steps": 120, "lr": 3e-3, "threads": 1,
        "save_every_steps": 120, "log_every_steps": 100,
    },
    "gate": {"batch_sequences": 8},
    "validate_every_steps": 40, "validation_tokens": 4096, "statistics_examples": 400,
}  # fmt: skip
BASE_TOKENS, EXPERT_TOKENS = 120_000, 250_000
HELDOUT_TOKENS = 12_000
"""Per set and split; development and report read different documents."""
QUESTIONS = 50

HELD_OUT_SUBS = {"arxiv_cs": "cs.RO", "qa_medical": None, "legal_uscode": None}
"""Sub-domains kept from base and experts; None: the file's most frequent label but one."""
DOMAINS = (
    "arxiv_cs", "biomed_fulltext", "qa_medical", "novels_en", "novels_fr", "legal_uscode", "chat_taskdialog",
    "math_latex", "math_word", "reviews_movies", "encyc_factbook", "wikipedia_en",
)  # fmt: skip
TASKS: dict[str, tuple[str, ...]] = {
    "task_nli": ("glue_mnli", "glue_boolq"),
    "task_sentiment": ("nltk_sentence_polarity", "nltk_subjectivity", "nltk_pros_cons"),
    "task_questions": ("qa_arc_easy", "qa_commonsenseqa"),
    "task_words": ("ii_antonyms", "ii_synonyms", "ii_rhymes", "ii_singular_to_plural", "ii_larger_animal"),
    "task_translation": ("ii_translation_en-fr", "ii_translation_en-es", "ii_translation_en-de"),
    "task_arithmetic": ("math_mawps", "math_gsm8k", "ii_sum", "ii_diff"),
}
"""Experts on tasks: their training splits, as `input output` lines."""
UNSEEN = {
    "dev": ("arxiv_math", "rp_stackexchange", "sub:qa_medical", "task:qa_openbookqa", "task:bb_implicatures"),
    "report": (
        "arxiv_physics", "arxiv_bio_stat_econ", "rp_c4", "stories_tiny", "sub:arxiv_cs", "sub:legal_uscode",
        "task:qa_arc_challenge", "task:glue_dbpedia", "task:hellaswag", "task:qa_social_iqa", "task:bb_timedial",
        "task:bb_question_selection", "task:mmlu_high_school_biology", "task:mmlu_professional_law",
        "task:bbh_date_understanding",
    ),
}  # fmt: skip
"""Data no expert saw, by split: settings are chosen on `dev`, `report` only reports. `task:` means its test split."""


@dataclass(frozen=True)
class EvaluationSet:
    """One set: tokens to score, and questions with choices where the task has them."""

    name: str
    heldout: ArraySource
    questions: tuple[ChoiceQuestion, ...] = ()


@functools.cache
def _tasks(data: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted((data / "tasks").glob("*.jsonl.zst")):
        with path.open("rb") as raw:
            for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8"):
                task = json.loads(line)
                found[task["task"]] = task
    return found


def _instances(data: Path, task: str, *, train: bool) -> list[Mapping[str, Any]]:
    return [i for i in _tasks(data)[task]["instances"] if (i["split"] == "train") is train and i["outputs"]]


def _line(instance: Mapping[str, Any]) -> str:
    return f"{instance['input']}\n{instance['outputs'][0]}"


def _question(instance: Mapping[str, Any]) -> ChoiceQuestion | None:
    choices = tuple(dict.fromkeys(instance.get("choices") or ()))
    if len(choices) < 2 or len(choices) != len(instance["choices"]) or instance["outputs"][0] not in choices:
        return None
    return ChoiceQuestion(f"{instance['input']}\n", choices, choices.index(instance["outputs"][0]))


@functools.cache
def held_out_sub(data: Path, file: str) -> str:
    """The sub-domain of a file that neither base nor experts see."""
    named = HELD_OUT_SUBS[file]
    if named is not None:
        return named
    counts: dict[str, int] = {}
    for sub in _subs(data, file):
        counts[sub] = counts.get(sub, 0) + 1
    return sorted(counts, key=lambda sub: (-counts[sub], sub))[1]


def _subs(data: Path, file: str) -> list[str]:
    with (data / "domains" / f"{file}.jsonl.zst").open("rb") as raw:
        stream = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8")
        return [json.loads(line).get("sub", "") for line in stream]


@functools.cache
def _documents(data: Path, domain: str) -> tuple[str, ...]:
    """A domain's documents in a fixed order, its held-out sub-domain left out."""
    banned: set[str] = set()
    if domain in HELD_OUT_SUBS:
        banned = set(read_texts(data, TextDomain(domain, domain, held_out_sub(data, domain))))
    return tuple(text for text in shuffled(list(read_texts(data, TextDomain(domain, domain))), 0) if text not in banned)


class Setting:
    """Base, experts and evaluation sets over one folder of data, kept in one work folder."""

    def __init__(self, data: Path, work: Path, *, quick: bool = False) -> None:
        self.data, self.work, self.quick = data, work, quick
        self.tokenizer: Tokenizer = make_tokenizer(
            data, tuple(TextDomain(domain, domain) for domain in DOMAINS), VOCABULARY
        )
        self.domains = DOMAINS[:3] if quick else DOMAINS
        self.tasks = dict(list(TASKS.items())[:1]) if quick else TASKS
        self.names = (*self.domains, *self.tasks)
        self.training = {**BASE_TRAINING, "tokens": 40_000} if quick else BASE_TRAINING
        steps = {"steps": 5} if quick else {}
        self.expert = {**EXPERT, "training": {**EXPERT["training"], **steps}}
        if quick:
            self.expert |= {"statistics_examples": 8, "validate_every_steps": 0, "gate": {"steps": 3}}
        self.heldout_tokens = 1_000 if quick else HELDOUT_TOKENS
        work.mkdir(parents=True, exist_ok=True)

    # -- text ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def parts(self) -> dict[str, dict[str, ArraySource]]:
        """Every expert's tokens by use: base, train, validation, dev, report; documents are never shared."""
        found = {}
        for name in self.names:
            sizes = {"report": self.heldout_tokens, "dev": self.heldout_tokens, "validation": 8192 + 1}
            if name in self.tasks:
                tests = [_line(i) for task in TASKS[name] for i in _instances(self.data, task, train=False)]
                trains = [_line(i) for task in TASKS[name] for i in _instances(self.data, task, train=True)]
                held = self._cut(shuffled(tests, 0), {"report": sizes["report"], "dev": sizes["dev"]})
                rest = self._cut(shuffled(trains, 0), {"validation": 4096 + 1, "train": EXPERT_TOKENS})
                found[name] = {**held, **rest}
            else:
                wanted = {**sizes, "base": BASE_TOKENS, "train": EXPERT_TOKENS}
                if self.quick:
                    wanted |= {"base": 4_000, "train": 8_000, "validation": 1_000}
                found[name] = self._cut(_documents(self.data, name), wanted)
        return found

    def _cut(self, documents: Sequence[str], sizes: Mapping[str, int]) -> dict[str, ArraySource]:
        """Documents dealt out in order, to each use until it has its tokens."""
        found, place = {}, 0
        for use, tokens in sizes.items():
            chosen, held = [], 0
            while place < len(documents) and held < tokens:
                text = documents[place]
                chosen.append(text)
                held += len(text.encode()) // 3
                place += 1
            found[use] = encode(self.tokenizer, chosen)
        return found

    def sets(self, split: str) -> dict[str, list[EvaluationSet]]:
        """Evaluation sets of a split: `held_in`, one per expert, and `unseen`."""
        held_in = []
        for name in self.names:
            questions = self._questions(TASKS[name], split) if name in self.tasks else ()
            held_in.append(EvaluationSet(name, self.parts[name][split], questions))
        unseen = UNSEEN[split][:2] if self.quick else UNSEEN[split]
        return {"held_in": held_in, "unseen": [self._unseen(name, split) for name in unseen]}

    def _questions(self, tasks: Sequence[str], split: str) -> tuple[ChoiceQuestion, ...]:
        """Questions of the tasks' test splits; every second one is for development."""
        found: list[ChoiceQuestion] = []
        for task in tasks:
            own = [_question(i) for i in _instances(self.data, task, train=False)]
            usable = [question for question in own if question is not None and len(question.prompt) < 900]
            found += usable[(split == "report") :: 2][: 10 if self.quick else QUESTIONS]
        return tuple(found)

    def _unseen(self, name: str, split: str) -> EvaluationSet:
        kind, _, rest = name.rpartition(":")
        if kind == "task":
            lines = shuffled([_line(i) for i in _instances(self.data, rest, train=False)], 0)
            return EvaluationSet(name, self._held(lines), self._questions([rest], split))
        domain = TextDomain(rest, rest, held_out_sub(self.data, rest) if kind == "sub" else None)
        return EvaluationSet(name, self._held(shuffled(list(read_texts(self.data, domain)), 0)))

    def _held(self, documents: Sequence[str]) -> ArraySource:
        return self._cut(documents, {"held": self.heldout_tokens})["held"]

    # -- models -------------------------------------------------------------------------------------------------

    def base(self) -> PreTrainedModel:
        """The base model, trained by weftlm on the uniform mixture of the experts' domains."""
        folder = self.work / "base"
        if not (folder / "config.json").exists():
            config = TrainingConfig.model_validate(self.training)
            model = build_model(
                ModelConfig.model_validate(MODEL), vocab_size=self.tokenizer.vocab_size, sequence_length=LENGTH,
                eos_id=self.tokenizer.eos_id, seed=0,
            )  # fmt: skip
            sources = tuple(self.parts[name]["base"] for name in self.domains)
            setting = MixtureSetting(self.domains, torch.tensor([float(len(s)) for s in sources], dtype=torch.float64))
            task = Task(self.domains, sources, build_policy({"policy": "uniform"}), setting)
            trainer = Trainer(
                model, task, config, alignment=AlignmentConfig(), folder=self.work / "base-training", seed=0,
                runtime=choose_runtime(config, parameters=count_parameters(model)),
            )  # fmt: skip
            trainer.run()
            model.save_pretrained(folder)
            say("base model trained")
        return load_base(str(folder))

    def reference(self, model: PreTrainedModel) -> BaseReference:
        """The base as experts name it."""
        return BaseReference(str(self.work / "base"), None, base_fingerprint(model))

    def train_experts(self, names: Sequence[str] | None = None) -> None:
        """Train what the library lacks: every domain's and task's expert, and `multitask`: one adapter, all their data
        and as many steps as all of them together."""
        model = self.base()
        library = ExpertLibrary.open(self.work / "library", self.reference(model))
        for name in names if names is not None else (*self.names, "multitask"):
            if name in library:
                continue
            config = ExpertTraining.model_validate(self.expert)
            if name == "multitask":
                source, heldout = self._all_data("train"), self._all_data("validation")
                steps = self.expert["training"]["steps"] * len(self.names)
                training = {**self.expert["training"], "steps": steps}
                changed = {"training": training, "gate": {"steps": 0}, "statistics_examples": 0}
                if self.expert["validate_every_steps"]:
                    changed |= {"validate_every_steps": steps // 8, "validation_tokens": None}
                config = ExpertTraining.model_validate({**self.expert, **changed})
            else:
                source, heldout = self.parts[name]["train"], self.parts[name]["validation"]
            expert = train_expert(
                model, library.base, source, config, name=name, folder=self.work / "training" / name, seed=0,
                heldout=heldout,
            )  # fmt: skip
            library.add(expert)
            losses = expert.card["losses"] or {}
            say(f"{name}: {json.dumps(losses)[:200]}")

    def _all_data(self, use: str) -> ArraySource:
        """Every expert's tokens of one use, in a random order of windows, each window of one expert's data."""
        pieces = [self.parts[name][use] for name in self.names]
        windows = [
            piece.read(start, LENGTH).astype("int64")
            for piece in pieces
            for start in range(0, len(piece) - LENGTH + 1, LENGTH)
        ]
        order = np.random.default_rng(0).permutation(len(windows))
        share = len(windows) * LENGTH / sum(len(piece) for piece in pieces)
        return ArraySource(
            np.concatenate([windows[place] for place in order]),
            text_bytes=round(share * sum(piece.bytes for piece in pieces)),
        )

    def experts(self, *, gate_steps: int = 100, gate_seed: int = 0) -> list[Expert]:
        """The pool with gates of so many steps and such a seed; seed 0 and 100 steps are the library's own."""
        library = ExpertLibrary.open(self.work / "library")
        pool = [library.load(name) for name in self.names]
        if (gate_steps, gate_seed) == (100, 0):
            return pool
        model = self.base()
        training = ExpertTraining.model_validate(self.expert).training
        config = GateConfig(steps=gate_steps, batch_sequences=self.expert["gate"]["batch_sequences"])
        found = []
        for expert in pool:
            folder = self.work / "gates" / f"{expert.name}-{gate_steps}-{gate_seed}"
            source = self.parts[expert.name]["train"]
            if gate_steps:
                gate = train_gate(model, expert.lora, source, config, folder=folder, seed=gate_seed, training=training)
            else:  # every token gets half the adapter
                gate = Gate({name: torch.zeros(part.widths[0]) for name, part in expert.lora.modules.items()})
            found.append(replace(expert, gate=gate))
        return found

    def multitask(self) -> Expert:
        """The adapter trained on everything."""
        return ExpertLibrary.open(self.work / "library").load("multitask")

    def remember(self, name: str, value: Any) -> None:
        """Keep a finished result in the work folder."""
        write_atomically(self.work / f"{name}.json", json.dumps(value))

    def remembered(self, name: str) -> Any:
        """A finished result, or None."""
        path = self.work / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None
