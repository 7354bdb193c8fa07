"""The setting of the robust-gate benchmarks: one expert per domain, and monoliths of as many parameters and tokens.

Everything is trained once into a work folder and found there again; a run that is cut off continues.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import say, write_atomically
from _domains_text import TextDomain, encode, make_tokenizer, read_texts, shuffled
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from weftlm.corpora.source import ArraySource
from weftlm.corpora.tokens import Tokenizer
from weftlm.mixture.policy import MixtureSetting, build_policy
from weftlm.models.config import ModelConfig
from weftlm.models.factory import build_model
from weftlm.models.hf import sequence_losses
from weftlm.models.open import load_base
from weftlm.training.config import AlignmentConfig, TrainingConfig
from weftlm.training.loop import Task, Trainer
from weftlm.training.metrics import read_metrics
from weftlm.training.runtime import choose_runtime

SETS: dict[str, tuple[str, ...]] = {
    "far": ("novels_en", "legal_uscode", "chat_taskdialog", "qa_medical", "math_word", "encyc_factbook"),
    "near": ("arxiv_cs", "arxiv_math", "arxiv_physics", "arxiv_bio_stat_econ", "biomed_fulltext", "qa_medical"),
}
"""Domains whose text differs at sight, and domains that blur into each other."""
LENGTH, VOCABULARY = 128, 1024
USES: dict[str, int] = {"report": 24_000, "dev": 16_000, "gate": 26_000}
"""Tokens of each domain that are no training text: to report on, to choose by, to fit gates on. Documents differ."""


TRAINING: dict[str, Any] = {
    "sequence_length": LENGTH, "batch_sequences": 24, "lr": 3e-3, "save_every_steps": 200,
    "log_every_steps": 1_000_000, "threads": 1,
}  # fmt: skip
"""Of every model, experts and monoliths alike."""
ADAPTING: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0, "batch_sequences": 6}
"""Otherwise for adapters."""
LORA: dict[str, Any] = {"rank": 1, "alpha": 1, "target_modules": ["v_proj", "o_proj", "down_proj"]}
"""The smallest adapters that still tell domains apart: what they take is taken from the base under them."""


def architecture(hidden: int, inner: int, layers: int) -> dict[str, Any]:
    """The recipe's `model` section of a small llama."""
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    return {"architecture": "llama", "config": {**sizes, **heads}}


POLICIES: dict[str, dict[str, Any]] = {
    "uniform": {"policy": "uniform"},
    "proportional": {"policy": "proportional"},
    "group_dro": {"policy": "group_dro"},
    "doremi": {"policy": "doremi"},
    "dga": {"policy": "dga", "eta": 15.0, "precondition": "adam"},
}
"""Mixtures the monoliths train on. DGA's target: equal parts of the gate text; DoReMi's reference: `uniform`."""
PROBE = {"estimator": "shadow", "probe": "extra", "sequences_per_group": 6, "target_sequences": 48}


@dataclass(frozen=True)
class Scale:
    """Sizes of one comparison.

    Attributes:
        expert: architecture of an expert that is a model of its own.
        monolith: of a model with the parameters of six experts.
        shared: of the base under adapters; with six adapters it has the monolith's parameters.
        base_tokens: what a branched expert's base is trained on.
        expert_tokens: what each branched expert is trained on after that.
        adapter_share: part of the experts' and their base's tokens that adapters get, the rest is the shared base's.
        domain_tokens: text of a domain that there is to train on, before sizes are dealt out.
        uses: tokens of each domain that are no training text.
        policies: mixtures the monoliths are trained on.
    """

    expert: Mapping[str, Any] = field(default_factory=lambda: architecture(32, 84, 2))
    monolith: Mapping[str, Any] = field(default_factory=lambda: architecture(96, 288, 2))
    shared: Mapping[str, Any] = field(default_factory=lambda: architecture(96, 272, 2))
    base_tokens: int = 600_000
    expert_tokens: int = 600_000
    adapter_share: float = 0.05
    domain_tokens: int = 900_000
    uses: Mapping[str, int] = field(default_factory=lambda: USES)
    policies: tuple[str, ...] = tuple(POLICIES)

    @property
    def total_tokens(self) -> int:
        """What six experts together, their base and their gate are trained on: each monolith's training tokens."""
        return self.base_tokens + 6 * (self.expert_tokens + self.uses["gate"])

    @property
    def scratch_tokens(self) -> int:
        """Of an expert without a base, so that six come to the same."""
        return self.expert_tokens + self.base_tokens // 6

    @property
    def adapter_tokens(self) -> int:
        """Of an adapter."""
        return round(self.adapter_share * self.scratch_tokens)

    @property
    def shared_tokens(self) -> int:
        """Of the base under adapters, so that it and six of them come to the same."""
        return 6 * (self.scratch_tokens - self.adapter_tokens)


SHARED = "shared base"
"""Run of the model under adapters."""
COMPUTE = "monolith expert-sized"
"""A model as cheap to train and to serve as the experts one by one, on the monoliths' tokens, uniform mixture."""
WEAK_SHARE = 0.1
"""Part of its training that a weak expert gets; every second domain has one in the setting `strong and weak`."""


@dataclass(frozen=True)
class RunSpec:
    """One model to train.

    Attributes:
        name: unique within a work folder.
        model: architecture, or `pretrained`, the name of the run it goes on from, and `lora` for an adapter on it.
        domains: whose text it reads.
        mixture: the recipe's section.
        tokens: it is trained on.
        gate_text: whether the gates' text is among its training text.
        reference: name of the run whose model DoReMi compares with.
        conflict: measure cosines between the domains' gradients while training.
        training: what differs from `TRAINING`.
    """

    name: str
    model: Mapping[str, Any]
    domains: tuple[str, ...]
    mixture: Mapping[str, Any]
    tokens: int
    gate_text: bool = False
    reference: str | None = None
    conflict: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)


def runs_of(names: tuple[str, ...], scale: Scale) -> dict[str, RunSpec]:
    """Every model of one comparison, by name, in an order in which each finds what it goes on from."""
    uniform = POLICIES["uniform"]
    found = [
        RunSpec("base", scale.expert, names, uniform, scale.base_tokens),
        RunSpec(SHARED, scale.shared, names, uniform, scale.shared_tokens),
    ]
    go_on: dict[str, Any] = {"pretrained": "base"}
    adapt = {"pretrained": SHARED, "lora": LORA}
    for name in names:
        found += [
            RunSpec(f"branched {name}", go_on, (name,), uniform, scale.expert_tokens),
            RunSpec(f"scratch {name}", scale.expert, (name,), uniform, scale.scratch_tokens),
            RunSpec(f"adapter {name}", adapt, (name,), uniform, scale.adapter_tokens, training=ADAPTING),
        ]
    for name in names[1::2]:
        weak = int(WEAK_SHARE * scale.expert_tokens)
        found.append(RunSpec(f"weak {name}", go_on, (name,), uniform, weak))
    found.append(RunSpec(COMPUTE, scale.expert, names, uniform, scale.total_tokens, gate_text=True))
    for policy in scale.policies:
        found.append(
            RunSpec(
                f"monolith {policy}", scale.monolith, names, POLICIES[policy], scale.total_tokens, gate_text=True,
                reference="monolith uniform" if policy == "doremi" else None, conflict=policy == "uniform",
            )
        )  # fmt: skip
    return {run.name: run for run in found}


@dataclass(frozen=True)
class Setting:
    """One set of domains, one seed: text, and models in a work folder.

    Attributes:
        data: folder of the text.
        work: folder of this setting's models.
        names: of the domains.
        seed: of documents, weights and draws.
        scale: sizes.
    """

    data: Path
    work: Path
    names: tuple[str, ...]
    seed: int
    scale: Scale = Scale()

    @property
    def tokenizer(self) -> Tokenizer:
        """Common to all sets, so that bits per byte compare."""
        every = sorted({name for names in SETS.values() for name in names})
        return make_tokenizer(self.data, tuple(TextDomain(name, name) for name in every), VOCABULARY)

    def text(self, name: str) -> dict[str, ArraySource]:
        """A domain's tokens by use: report, dev and gate are the same for every seed, train depends on it."""
        sizes = 2.0 ** np.linspace(-0.5, 0.5, len(self.names))
        size = np.random.default_rng(self.seed).permutation(sizes)[self.names.index(name)]
        train_tokens = int(size * self.scale.domain_tokens)
        return dict(_tokens(self.data, self.tokenizer, name, self.seed, train_tokens, tuple(self.scale.uses.items())))

    def folder(self, run: str) -> Path:
        """Where a run's model lies; its name changes with what a `RunSpec` and a `Scale` say, the domains and the seed.

        After a change of this module's other constants (LENGTH, VOCABULARY, TRAINING, PROBE) take another work folder.
        """
        return self.work / f"{run.replace(' ', '-')}-{self._digest(run)}"

    def _digest(self, run: str) -> str:
        spec = self.runs[run]
        behind = [self._digest(each) for each in (spec.model.get("pretrained"), spec.reference) if each is not None]
        plain = {**spec.__dict__, "domains": list(spec.domains)}
        text = json.dumps(
            [plain, behind, self.seed, self.names, self.scale.domain_tokens, dict(self.scale.uses)], default=dict
        )
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    @property
    def runs(self) -> dict[str, RunSpec]:
        """Every model of the setting."""
        return runs_of(self.names, self.scale)

    def load(self, run: str) -> PreTrainedModel:
        """A trained model."""
        return load_base(str(self.folder(run))).eval()

    def facts(self, run: str) -> dict[str, Any]:
        """What is known of a training."""
        found: dict[str, Any] = json.loads((self.folder(run) / "facts.json").read_text())
        return found


@functools.lru_cache(maxsize=64)
def _tokens(
    data: Path, tokenizer: Tokenizer, name: str, seed: int, train_tokens: int, uses: tuple[tuple[str, int], ...]
) -> Mapping[str, ArraySource]:
    """A domain's documents, dealt out to the uses and then to training, and packed."""
    ordered = shuffled(list(read_texts(data, TextDomain(name, name))), 0)
    found, place = {}, 0
    for use, tokens in uses:
        found[use], taken = _cut(tokenizer, ordered[place:], tokens)
        place += taken
    found["train"], _ = _cut(tokenizer, shuffled(ordered[place:], seed), train_tokens)
    return found


def _cut(tokenizer: Tokenizer, texts: Sequence[str], tokens: int) -> tuple[ArraySource, int]:
    """The first so many tokens of the documents, fewer where there are not so many, and the documents they are from."""
    if not texts:
        return encode(tokenizer, []), 0
    parts: list[ArraySource] = []
    held, taken = 0, 0
    while held < tokens and taken < len(texts):
        further = min(len(texts), max(16, 2 * taken))
        parts.append(encode(tokenizer, texts[taken:further]))
        held, taken = held + len(parts[-1]), further
    size = min(tokens, held)
    packed = np.concatenate([part.read(0, len(part)) for part in parts])[:size]
    text = tokenizer.decode(packed[packed != tokenizer.eos_id])
    return ArraySource(packed, text_bytes=len(text.encode())), taken


def windows(source: ArraySource, limit: int | None = None) -> NDArray[np.int64]:
    """Windows of LENGTH scored tokens and the one before, N x (LENGTH + 1), none shared."""
    count = (len(source) - 1) // LENGTH
    starts = np.arange(count if limit is None else min(count, limit)) * LENGTH
    return np.stack([source.read(int(start), LENGTH + 1).astype(np.int64) for start in starts])


def train(setting: Setting, name: str) -> dict[str, Any]:
    """Train one model; returns its facts."""
    folder, spec = setting.folder(name), setting.runs[name]
    if (folder / "facts.json").exists():
        return setting.facts(name)
    texts = {domain: setting.text(domain) for domain in spec.domains}
    sources = []
    for domain in spec.domains:
        parts = [texts[domain]["train"], *([texts[domain]["gate"]] if spec.gate_text else [])]
        sources.append(ArraySource(np.concatenate([part.read(0, len(part)) for part in parts]), text_bytes=1))
    training = {**TRAINING, **spec.training}
    steps = spec.tokens // (training["batch_sequences"] * LENGTH)
    warmup = min(40, max(2, steps // 10))
    config = TrainingConfig.model_validate({**training, "tokens": spec.tokens, "warmup_steps": warmup})
    section = dict(spec.model)
    if "pretrained" in section:
        section["pretrained"] = str(setting.folder(section["pretrained"]))
    model = build_model(
        ModelConfig.model_validate(section), vocab_size=setting.tokenizer.vocab_size, sequence_length=LENGTH,
        eos_id=setting.tokenizer.eos_id, seed=setting.seed,
    )  # fmt: skip
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    target = np.concatenate([windows(texts[domain]["gate"], 100).reshape(-1) for domain in spec.domains])
    task = Task(
        spec.domains,
        tuple(sources),
        build_policy({"update_every_steps": 20, **spec.mixture}),
        MixtureSetting(spec.domains, torch.tensor([float(len(s)) for s in sources], dtype=torch.float64)),
        target=ArraySource(target, text_bytes=1),
        reference=None if spec.reference is None else setting.load(spec.reference),
    )
    probes = {domain: torch.from_numpy(windows(texts[domain]["dev"], 32)) for domain in spec.domains}

    def measure(module: nn.Module) -> dict[str, Any]:
        return {"conflict": gradient_cosines(module, probes)}

    trainer = Trainer(
        model, task, config, alignment=AlignmentConfig.model_validate(PROBE if spec.mixture["policy"] == "dga" else {}),
        runtime=choose_runtime(config, parameters=parameters), folder=folder / "training", seed=setting.seed,
        evaluate=measure if spec.conflict else None,
        evaluate_every_steps=max(1, config.total_steps // 4) if spec.conflict else 0,
    )  # fmt: skip
    result = trainer.run()
    trained = trainer.module
    if isinstance(trained, PeftModel):
        trained = trained.merge_and_unload()  # the same function; a pool of such models needs no adapters
    assert isinstance(trained, PreTrainedModel)
    trained.save_pretrained(folder)
    lines = read_metrics(folder / "training" / "metrics.jsonl") if spec.conflict else ()
    conflict = [{"step": line["step"], **line["conflict"]} for line in lines if line["kind"] == "eval"]
    facts = {
        "run": name, "parameters": parameters, "tokens": result.tokens, "seconds": result.seconds,
        "weights": result.weights, "conflict": conflict, "epochs": result.epochs,
    }  # fmt: skip
    write_atomically(folder / "facts.json", json.dumps(facts))
    say(f"{setting.work.name}: {name} in {sum(result.seconds.values()):.0f} s")
    return facts


def gradient_cosines(module: nn.Module, probes: Mapping[str, Tensor]) -> dict[str, Any]:
    """Cosines between the domains' gradients of the mean loss: matrix, mean of the pairs, share of them below 0."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rows = []
    with torch.enable_grad():
        for tokens_BT1 in probes.values():
            gradients = torch.autograd.grad(sequence_losses(module, tokens_BT1).mean(), parameters)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    unit_DP = torch.nn.functional.normalize(torch.stack(rows).double(), dim=1)
    cosines_DD = unit_DP @ unit_DP.T
    pairs = cosines_DD[~torch.eye(len(rows), dtype=torch.bool)]
    return {
        "mean": float(pairs.mean()),
        "least": float(pairs.min()),
        "negative": float((pairs < 0).double().mean()),
        "matrix": cosines_DD.tolist(),
    }


def in_processes(work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], *, processes: int) -> list[Any]:
    """`work(*job)` of every job, one thread per process; the answers in the jobs' order."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    if processes == 1 or len(jobs) < 2:
        return [work(*job) for job in jobs]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(work, *job) for job in jobs]]


def train_all(settings: Sequence[Setting], wanted: Sequence[str], *, processes: int) -> None:
    """Train what is missing, in waves: what others go on from comes first."""
    jobs = [(setting, name) for setting in settings for name in setting.runs if name.startswith(tuple(wanted))]
    for wave in _waves(jobs):
        todo = [(setting, name) for setting, name in wave if not (setting.folder(name) / "facts.json").exists()]
        in_processes(train, todo, processes=processes)


def _waves(jobs: Sequence[tuple[Setting, str]]) -> Iterator[list[tuple[Setting, str]]]:
    """Jobs that need no other job, then those that need only the former."""
    first, second = [], []
    for setting, name in jobs:
        spec = setting.runs[name]
        needs = [each for each in (spec.model.get("pretrained"), spec.reference) if each is not None]
        (second if needs else first).append((setting, name))
        first += [(setting, each) for each in needs if (setting, each) not in first and (setting, each) not in jobs]
    longest_first = sorted(first, key=lambda job: -job[0].runs[job[1]].tokens)
    yield longest_first
    yield sorted(second, key=lambda job: -job[0].runs[job[1]].tokens)


def quick_scale() -> Scale:
    """Sizes for a run of seconds."""
    return replace(
        Scale(expert=architecture(16, 40, 1), monolith=architecture(24, 64, 2), shared=architecture(16, 64, 2)),
        base_tokens=9_000, expert_tokens=6_000, domain_tokens=12_000,
        uses={"report": 1_500, "dev": 1_500, "gate": 3_000}, policies=("uniform", "doremi", "dga"),
    )  # fmt: skip
