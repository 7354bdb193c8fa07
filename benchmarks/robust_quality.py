"""Robust gates over one expert per domain against monoliths of the experts' total parameters and training tokens.

Two sets of domains (far and near), four kinds of experts (branched from a shared base, adapters over one, from scratch,
and branched with every second one weak), three offsets, mixtures nobody tuned for, text that changes domain midway.
Documents to report on are read by no training, no fit and no choice; the common tokenizer was trained on text of every
domain, theirs too.

    python benchmarks/robust_quality.py --data PATH --work PATH     # regenerates benchmarks/results/robust_quality.*
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import environment_lines, finish, parser, say, spread, table, write_atomically
from _robust_setting import COMPUTE, LENGTH, SETS, SHARED, Scale, Setting, in_processes, quick_scale, train_all, windows
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from weftlm.distillation.config import DenseConfig, DistilConfig
from weftlm.distillation.dense import WeightedText, distil_dense
from weftlm.distillation.sparse import log_served
from weftlm.distillation.structural import distil_structural, student_kl, weigh
from weftlm.gating import FitConfig, FitResult, ScoredSequences, fit_robust_gate, sampled_capacity, sequence_features
from weftlm.gating.bayes import BayesGate
from weftlm.gating.config import REFRESH_EVERY, ScoreConfig
from weftlm.gating.experts import ExpertPool
from weftlm.gating.gate import CausalGate, Gate, init_gate
from weftlm.gating.modular_lm import ModularLM
from weftlm.gating.prefix_gate import PrefixGate
from weftlm.gating.problem import log_model
from weftlm.gating.scores import score
from weftlm.models.hf import token_losses

VERSION = 3
"""Of what a comparison measures; results kept in a work folder are of one version."""
KINDS = ("branched", "adapters", "scratch", "strong and weak")
OFFSETS = ("own expert", "best known", "none")
BATCH = 64
MIXTURES = 100
SAMPLES = 256
FIT = FitConfig(steps=4000, unit="token", report_every_steps=4000, best_response_steps=0)
DIRECT_GATE = {"gate": "prefix", "base": "fixed_share"}
DIRECT = FitConfig(
    steps=400, lr=0.02, final_lr=0.002, batch_sequences=24, unit="token", report_every_steps=400, best_response_steps=0
)
DISTIL = DistilConfig(steps=600, patience=3)
DENSE_TOKENS = 1_000_000
FIRST_DEVELOPMENT_SEED = 100
"""Seeds from here on are measured on the development text."""
COMPARED = ("monolith uniform", "bayes")
"""Rows that every other's mean is set against, document by document."""


@dataclass(frozen=True, eq=False)
class Text:
    """Windows of every domain, the document each begins in, and windows that change domain midway."""

    domains: Mapping[str, NDArray[np.int64]]
    documents: Mapping[str, NDArray[np.int64]]
    bytes_per_token: Mapping[str, float]
    changing: NDArray[np.int64]


def read(setting: Setting, use: str) -> Text:
    """The windows of one use; changing ones go from each domain to each other, half a window of both, drawn at random.

    The draw is the same for every seed.
    """
    sources = {name: setting.text(name)[use] for name in setting.names}
    found = {name: windows(source) for name, source in sources.items()}
    ends = {name: np.cumsum(one.read(0, len(one)) == setting.tokenizer.eos_id) for name, one in sources.items()}
    half, rng = LENGTH // 2, np.random.default_rng(11)
    changing = []
    for first in found:
        for second in found:
            if first != second:
                pairs = zip(rng.permutation(found[first])[:6], rng.permutation(found[second])[:6], strict=True)
                changing += [np.concatenate([one[: half + 1], other[1 : half + 1]]) for one, other in pairs]
    return Text(
        found,
        {name: ends[name][np.arange(len(found[name])) * LENGTH] for name in found},
        {name: source.bytes / len(source) for name, source in sources.items()},
        np.stack(changing),
    )


@torch.inference_mode()
def model_logs(model: nn.Module, tokens_NT1: NDArray[np.int64]) -> Tensor:
    """log p(x) of windows under one model, nats, float64."""
    parts = torch.from_numpy(tokens_NT1).split(BATCH)
    return torch.cat([-token_losses(model, part).double().sum(dim=1) for part in parts])


@torch.inference_mode()
def scored(pool: ExpertPool, tokens_NT1: NDArray[np.int64], name: str) -> ScoredSequences:
    """Windows under every expert, with the scores of tokens."""
    logp_NTE = torch.cat([pool.token_log_probs(part) for part in torch.from_numpy(tokens_NT1).split(BATCH)])
    logq_NE = logp_NTE.double().sum(dim=1)
    lengths_N = torch.full((len(logq_NE),), LENGTH)
    features = sequence_features(logq_NE, lengths_N, logp_NTE=logp_NTE)
    return ScoredSequences.of(logq_NE, features=features, tokens_N=lengths_N, name=name)


def gate_logs(gate: Gate, one: ScoredSequences) -> Tensor:
    """log pi_g(x) of windows, not divided by Z."""
    wide = gate.to("cpu", torch.float64)
    rows = torch.arange(len(one)).split(BATCH)
    with torch.no_grad():
        return torch.cat([log_model(wide, one.logq_NE[each].double(), one.features.rows(each)) for each in rows])


def experts_of(kind: str, names: Sequence[str]) -> dict[str, str]:
    """Each domain's run."""
    role = {"scratch": "scratch", "adapters": "adapter"}.get(kind, "branched")
    weak = set(names[1::2]) if kind == "strong and weak" else set()
    return {name: f"weak {name}" if name in weak else f"{role} {name}" for name in names}


def base_of(kind: str) -> str | None:
    """The run the experts go on from."""
    return {"scratch": None, "adapters": SHARED}.get(kind, "base")


def monoliths_of(setting: Setting) -> list[str]:
    """The runs of the models that everything is compared with."""
    return [COMPUTE, *(f"monolith {policy}" for policy in setting.scale.policies)]


@dataclass(eq=False)
class Comparison:
    """One (set, seed, kind of experts): experts scored, models and gates evaluated on the report text."""

    setting: Setting
    kind: str
    quick: bool

    def __post_init__(self) -> None:
        self.names = self.setting.names
        experts = experts_of(self.kind, self.names)
        self.pool = ExpertPool.of({name: self.setting.load(run) for name, run in experts.items()})
        self.dev = read(self.setting, "dev")
        self.report = self.dev if self.setting.seed >= FIRST_DEVELOPMENT_SEED else read(self.setting, "report")
        self.on_report = {name: scored(self.pool, self.report.domains[name], name) for name in self.names}
        self.on_changing = scored(self.pool, self.report.changing, "changing")
        self.rows: dict[str, dict[str, Any]] = {}

    def documents(self) -> dict[str, list[int]]:
        """The document that each window of the report text begins in, by domain."""
        return {name: each.tolist() for name, each in self.report.documents.items()}

    # -- evaluating ---------------------------------------------------------------------------------------------

    def add(self, row: str, logs: Callable[[str], Tensor], changing: Tensor | None, **facts: Any) -> None:
        """A row: cross-entropy of each domain, by window and on the whole, and of changing text, nats per token."""
        each = {name: -logs(name) / LENGTH for name in self.names}
        ce = {name: float(values.mean()) for name, values in each.items()}
        facts["windows"] = {name: [round(value, 6) for value in values.tolist()] for name, values in each.items()}
        if changing is not None:
            facts["changing"] = -float(changing.mean()) / LENGTH
        self.rows[row] = {"ce": ce, **facts}

    def add_model(self, row: str, model: nn.Module, **facts: Any) -> None:
        """A language model's row."""
        logs = {name: model_logs(model, self.report.domains[name]) for name in self.names}
        dev = {name: -float(model_logs(model, self.dev.domains[name]).mean()) / LENGTH for name in self.names}
        self.add(row, logs.__getitem__, model_logs(model, self.report.changing), dev=dev, **facts)

    def add_run(self, run: str) -> None:
        """The row of a trained model that every kind of experts is compared with, measured once."""
        path = self.setting.folder(run) / f"row-{VERSION}.json"
        if path.exists():
            self.rows[run] = json.loads(path.read_text())
            return
        self.add_model(run, self.setting.load(run))
        write_atomically(path, json.dumps(self.rows[run]))

    def add_gate(self, row: str, gate: Gate, z: float = 1.0) -> None:
        """A gated model's row; the weights of a sequence-level gate are divided by Z."""
        shift = np.log(z)
        logs = {name: gate_logs(gate, one) - shift for name, one in self.on_report.items()}
        self.add(row, logs.__getitem__, gate_logs(gate, self.on_changing) - shift, z=z)

    # -- the rows -----------------------------------------------------------------------------------------------

    def single_models(self) -> None:
        """Experts, base, monoliths, average of the experts' parameters."""
        for place, name in enumerate(self.names):
            logs = {each: self.on_report[each].logq_NE[:, place] for each in self.names}
            self.add(f"expert {name}", logs.__getitem__, self.on_changing.logq_NE[:, place])
            model = self.pool.members[place].model
            dev = {each: -float(model_logs(model, self.dev.domains[each]).mean()) / LENGTH for each in self.names}
            self.rows[f"expert {name}"]["dev"] = dev
        self.rows["oracle expert"] = {
            **{key: {name: self.rows[f"expert {name}"][key][name] for name in self.names} for key in ("ce", "windows")},
            "changing": -float(self.on_changing.logq_NE.amax(dim=1).mean()) / LENGTH,
        }
        if (base := base_of(self.kind)) is not None:
            self.add_model("base", self.setting.load(base))
        self.add_model("parameter average", _average([member.model for member in self.pool.members]))
        for run in monoliths_of(self.setting):
            self.add_run(run)
        known = [row["dev"] for name, row in self.rows.items() if is_single(name)]
        self.best_known = [min(dev[name] for dev in known) for name in self.names]

    def untrained_gates(self) -> None:
        """Mixtures of the experts that need no training."""
        features = self.on_report[self.names[0]].features
        for row, section in (
            ("uniform mixture", {"gate": "fixed_share", "share": 1.0}),
            ("bayes", {"gate": "bayes"}),
            ("fixed share", {"gate": "fixed_share"}),
        ):
            self.add_gate(row, init_gate(section, len(self.names), features))

    def trained_gates(self) -> dict[str, Any]:
        """Robust gates, their students, direct gates, for every offset; facts of the fits."""
        sequences, samples = 24 if self.quick else 512, 24 if self.quick else SAMPLES
        cache = score(
            self.pool,
            {name: self.setting.text(name)["gate"] for name in self.names},
            self._scores_folder(sequences, samples),
            ScoreConfig(length=LENGTH, sequences=sequences, samples=samples, batch_size=BATCH, seed=self.setting.seed),
            eos_id=self.setting.tokenizer.eos_id,
            show=False,
        )
        domains = cache.domains
        parts = [cache.samples[name].split(0.25, self.setting.seed) for name in cache.experts]
        fit_samples, held_samples = [part[0] for part in parts], [part[1] for part in parts]
        capacity = sampled_capacity([one.logq_NE for one in held_samples])
        self.add_gate("bayes, capacity prior", BayesGate.of(capacity.lam_D))
        facts: dict[str, Any] = {"capacity": capacity.value / LENGTH, "fits": {}}
        for offset in OFFSETS:
            values = self._offsets(offset, domains)
            start = time.perf_counter()
            fit = FIT.model_copy(update={"steps": 200}) if self.quick else FIT
            found = fit_robust_gate(domains, fit_samples, gate="linear", config=fit, offsets=values)
            self.add_gate(f"robust gate, offset {offset}", found.gate, found.z)
            student = self._students(offset, found, fit_samples, held_samples)
            fit = DIRECT.model_copy(update={"steps": 20}) if self.quick else DIRECT
            direct = fit_robust_gate(domains, None, gate=DIRECT_GATE, config=fit, offsets=values)
            self.add_gate(f"direct gate, offset {offset}", direct.gate)
            facts["fits"][offset] = {
                "z": found.z, "mu": found.mu, "lam": found.lam.tolist(),
                "worst_on_fit": found.worst, "student_kl": student, "seconds": time.perf_counter() - start,
            }  # fmt: skip
        return facts

    def _scores_folder(self, sequences: int, samples: int) -> Path:
        """Where scores are kept, which other settings of gates and students find again."""
        behind = [self.setting.folder(run).name for run in experts_of(self.kind, self.names).values()]
        digest = hashlib.blake2b(json.dumps([behind, sequences, samples]).encode(), digest_size=6).hexdigest()
        return self.setting.work / f"scores-{digest}"

    def _offsets(self, offset: str, domains: Mapping[str, ScoredSequences]) -> Any:
        """As `fit_robust_gate` takes them.

        How far the best known model is ahead of the own expert is measured on the development text, and set off against
        the own expert on the sequences the gate is fitted on: cross-entropies of different documents do not compare.
        """
        if offset != "best known":
            return "expert" if offset == "own expert" else "none"
        own = [-float(domains[name].logq_NE[:, place].mean()) / LENGTH for place, name in enumerate(self.names)]
        ahead = [self.rows[f"expert {name}"]["dev"][name] for name in self.names]
        return [mine + best - known for mine, best, known in zip(own, self.best_known, ahead, strict=True)]

    def _students(
        self,
        offset: str,
        found: FitResult,
        fit_samples: Sequence[ScoredSequences],
        held_samples: Sequence[ScoredSequences],
    ) -> dict[str, float]:
        config = DISTIL.model_copy(update={"steps": 20, "evaluate_every_steps": 10}) if self.quick else DISTIL
        student = distil_structural(found.gate, fit_samples, config=config).gate
        self.add_gate(f"student, offset {offset}", student)
        kl = {"student": student_kl(found.gate, student, held_samples)[0]}
        if offset != OFFSETS[0]:
            return kl
        assert isinstance(student, PrefixGate)
        for top in (2, 1):
            chosen = student.with_top(top)
            sparse = distil_structural(found.gate, fit_samples, student=chosen, config=config).gate
            served = {name: _served(sparse, one) for name, one in self.on_report.items()}
            self.add(f"student, top {top}", served.__getitem__, _served(sparse, self.on_changing))
            self.add_gate(f"student, top {top}, all experts run", sparse)
            kl[f"top {top}"] = student_kl(found.gate, sparse, held_samples)[0]
        if self.kind == "branched":
            self.add_model("dense student", self._dense(found.gate, student, fit_samples))
        return kl

    def _dense(self, gate: Gate, student: CausalGate, fit_samples: Sequence[ScoredSequences]) -> nn.Module:
        """An expert-sized model, begun at the base, that learns the student's distributions on training text."""
        real = np.concatenate(
            [windows(self.setting.text(name)["train"], 40 if self.quick else 1500) for name in self.names]
        )
        training = {
            "sequence_length": LENGTH, "batch_sequences": 24, "tokens": 6_000 if self.quick else DENSE_TOKENS,
            "lr": 3e-3, "warmup_steps": 2 if self.quick else 40, "threads": 1,
        }  # fmt: skip
        config = DenseConfig.model_validate(
            {"training": training, "token_kl": 0.5, "real_fraction": 0.75, "evaluate_every_steps": 0}
        )
        served = ModularLM(self.pool, student)
        result = distil_dense(
            self.setting.load("base"),
            WeightedText.sampled(weigh(gate, fit_samples)),
            config,
            vocab_size=self.setting.tokenizer.vocab_size,
            eos_id=self.setting.tokenizer.eos_id,
            teacher=lambda ids_BT: served(ids_BT).logits,
            real=WeightedText.of(real),
            seed=self.setting.seed,
        )
        return result.model


def _served(gate: CausalGate, one: ScoredSequences) -> Tensor:
    """log s(x) of windows as a sparse student is served token by token."""
    rows = torch.arange(len(one)).split(4 * BATCH)
    return torch.cat([log_served(gate, one.features.rows(each), refresh_every=REFRESH_EVERY) for each in rows])


def _average(models: Sequence[PreTrainedModel]) -> PreTrainedModel:
    """The model whose parameters are the mean of these."""
    average = type(models[0])(models[0].config)
    states = [model.state_dict() for model in models]
    average.load_state_dict({key: sum(state[key] for state in states) / len(states) for key in states[0]})
    return average.eval()


def compare(setting: Setting, kind: str, work: Path, quick: bool) -> dict[str, Any]:
    """One comparison, kept in the work folder."""
    settings = [FIT.model_dump(mode="json"), DIRECT.model_dump(mode="json"), DISTIL.model_dump(mode="json")]
    used = [*experts_of(kind, setting.names).values(), base_of(kind), *monoliths_of(setting)]
    behind = [setting.folder(run).name for run in used if run is not None]
    text = json.dumps([VERSION, settings, behind, kind, SAMPLES, DENSE_TOKENS, DIRECT_GATE])
    folder = work / f"{kind.replace(' ', '-')}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
    path = folder / "result.json"
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text())
        return known
    start = time.perf_counter()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    comparison = Comparison(setting, kind, quick)
    comparison.single_models()
    comparison.untrained_gates()
    facts = comparison.trained_gates()
    found = {
        "rows": comparison.rows,
        "facts": facts,
        "bytes_per_token": dict(comparison.report.bytes_per_token),
        "documents": comparison.documents(),
        "conflict": setting.facts("monolith uniform")["conflict"],
        "parameters": {
            role: setting.facts(run)["parameters"]
            for role, run in (
                ("base", base_of(kind)),
                ("expert", experts_of(kind, setting.names)[setting.names[0]]),
                ("monolith", "monolith uniform"),
            )
            if run is not None
        },
    }
    write_atomically(path, json.dumps(found))
    say(f"{work.name}, {kind}: {time.perf_counter() - start:.0f} s")
    return found


# -- figures ------------------------------------------------------------------------------------------------------


def shifts(domains: int) -> NDArray[np.float64]:
    """Test mixtures nobody tuned for, uniform on the simplex: MIXTURES x D."""
    return np.random.default_rng(7).dirichlet(np.ones(domains), size=MIXTURES)


def is_single(row: str) -> bool:
    """Whether a row is one of the single models among which the best known of a domain is looked for."""
    return row.startswith(("expert ", "monolith ")) or row in ("base", "parameter average")


def paired(
    one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]], documents: Mapping[str, Sequence[int]]
) -> tuple[float, float]:
    """Difference of two rows' means over domains, and its standard error over documents (windows of one alone)."""
    means, variances = [], []
    for name, documents_N in documents.items():
        difference_N = np.asarray(one[name]) - np.asarray(other[name])
        place_N = np.arange(len(difference_N)) if len(set(documents_N)) < 2 else np.asarray(documents_N)
        means.append(difference_N.mean())
        sums = np.bincount(place_N, weights=difference_N - means[-1])
        variances.append(float((sums**2).sum()) / len(difference_N) ** 2)
    return float(np.mean(means)), float(np.sqrt(np.sum(variances)) / len(means))


def figures(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each row: worst value under each offset, mean cross-entropy, shifted mixtures, changing text, by domain.

    A row that is fitted once for each offset becomes one row, each figure from the fit for its offset; means are of
    the fit for the own expert's.
    """
    rows = dict(found["rows"])
    names = list(rows["oracle expert"]["ce"])
    single = [row for row in rows if is_single(row)]
    offsets = {
        "own expert": {name: rows["oracle expert"]["ce"][name] for name in names},
        "best known": {name: min(rows[row]["ce"][name] for row in single) for name in names},
        "none": dict.fromkeys(names, 0.0),
    }
    families: dict[str, dict[str, str]] = {}
    for row in rows:
        family, _, offset = row.partition(", offset ")
        families.setdefault(family, {})[offset or "all"] = row
    answer = {}
    for family, members in families.items():
        if family.startswith("expert "):
            continue
        main = rows[members.get("all", members.get("own expert", ""))]
        ce_D = np.array([main["ce"][name] for name in names])
        mixtures_MD = shifts(len(names))
        moved = {
            offset: mixtures_MD @ (ce_D - np.array([shift[name] for name in names]))
            for offset, shift in offsets.items()
        }
        worst = {}
        for offset, shift in offsets.items():
            own = rows[members.get("all", members.get(offset, ""))]["ce"]
            worst[offset] = max(own[name] - shift[name] for name in names)
        bits = {name: main["ce"][name] / np.log(2) / found["bytes_per_token"][name] for name in names}
        over = {
            f"{what}, {row}": value
            for row in COMPARED
            if row in rows
            for what, value in zip(
                ("over", "error"), paired(main["windows"], rows[row]["windows"], found["documents"]), strict=True
            )
        }
        answer[family] = {
            "worst": worst,
            "mean": float(ce_D.mean()),
            "shifted_mean": float(moved["none"].mean()),
            **{f"shifted_worst, {offset}": float(moved_M.max()) for offset, moved_M in moved.items()},
            **{f"shifted_sd, {offset}": float(moved_M.std()) for offset, moved_M in moved.items()},
            "changing": main.get("changing"),
            **over,
            "nats_per_token": {name: main["ce"][name] for name in names},
            "bits_per_byte": {**bits, "worst": max(bits.values())},
        }
    return answer


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range over seeds, to a millionth."""
    return {key: round(value, 6) for key, value in spread(values).as_json().items()}


def combine(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Spreads over seeds of every figure of every row."""
    each = [figures(run) for run in runs]
    rows = {}
    for row in each[0]:
        mine = [one[row] for one in each if row in one]
        rows[row] = {
            "worst": {offset: _spread([one["worst"][offset] for one in mine]) for offset in OFFSETS},
            **{
                key: _spread([one[key] for one in mine])
                for key in mine[0]
                if key not in ("worst", "bits_per_byte", "nats_per_token") and mine[0][key] is not None
            },
            **{
                unit: {name: _spread([one[unit][name] for one in mine]) for name in mine[0][unit]}
                for unit in ("nats_per_token", "bits_per_byte")
            },
        }
    if any(set(one) != set(each[0]) for one in each):
        raise ValueError("seeds have different rows: results of another version are in the work folder")
    measured = [line["step"] for line in runs[0]["conflict"]]
    return {
        "rows": rows,
        "seeds": len(runs),
        "capacity_nats_per_token": _spread([run["facts"]["capacity"] for run in runs]),
        "fits": [run["facts"]["fits"] for run in runs],
        "conflict": {
            str(step): {
                key: _spread([run["conflict"][place][key] for run in runs]) for key in ("mean", "least", "negative")
            }
            for place, step in enumerate(measured)
        },
        "parameters": runs[0]["parameters"],
        "documents": {name: len(set(places)) for name, places in runs[0]["documents"].items()},
    }


def to_markdown(record: Mapping[str, Any]) -> str:
    """One table per set of domains and kind of experts."""

    def show(value: Mapping[str, float] | None, form: str = "{:.4f}") -> str:
        if value is None:
            return "-"
        middle, low, high = (form.format(value[key]) for key in ("median", "low", "high"))
        return middle if low == high else f"{middle} ({low} .. {high})"

    lines = [
        "# Robust gates against monoliths",
        "",
        "Six domains, one expert each. A monolith has the experts' total parameters and is trained on the "
        f"experts', their base's and their gates' tokens together ({record['monolith_tokens']:,}). All whole "
        "models have one learning rate and batch size, which nobody searched for; those of the adapters, their "
        "rank, their modules and their share of the tokens were searched for on development text. Experts "
        "branched: whole models that go on from a base of their size. Adapters: LoRA over a shared base that, "
        "with the adapters, has the monolith's parameters. Scratch: whole models without a base. Strong and weak: "
        "as branched, every second one with a tenth of the training. The expert-sized monolith has one branched "
        "expert's parameters.",
        "",
        "Worst: the largest over domains of cross-entropy minus offset, nats per token, on report text; offsets "
        "are the own expert's cross-entropy, the best known single model's per domain (experts, base, parameter "
        "average, monoliths), and none. Robust gate, direct gate and student are fitted once for each offset; "
        "their other columns are of the fit for the own expert's. Top-1, top-2 and dense students are of that fit "
        f"alone. Top 1: as served token by token, one expert at work and the others catching up every {REFRESH_EVERY} "
        "tokens, sooner early in a text; all experts run: each is up to date at every token, which costs what the full "
        "student costs. Mean, less another's: the difference and its standard error over documents, "
        f"paired, domains weighing the same. Shifted: {MIXTURES} random mixtures nobody tuned for; mean "
        "cross-entropy, and largest (standard deviation) of the values under two offsets. Changing: windows that "
        "go from one domain to another after half of their tokens; the oracle there is the best expert of each "
        "window. Seeds are of training: all report on the same documents, and spreads over seeds do not show what "
        "other documents would change.",
        "",
        "Not equal to the monolith's budget: with strong and weak experts the modular side has fewer tokens; the "
        f"dense student learns from {record['dense_tokens']:,} further tokens, three quarters of them training "
        "text. The tokenizer was trained on text of every domain, report documents among it; documents of a book "
        "or a topic may be on both sides.",
    ]
    for title, one in record["comparisons"].items():
        conflict = "; ".join(
            f"step {step} {show(line['mean'], '{:.3f}')} ({show(line['negative'], '{:.2f}')} of the pairs below 0)"
            for step, line in one["conflict"].items()
        )
        lines += [
            "",
            f"## {title}",
            "",
            f"{one['seeds']} seeds; parameters trained: "
            + ", ".join(f"{role} {count:,}" for role, count in one["parameters"].items())
            + ". Mean cosine between two domains' gradients in the uniform "
            f"monolith: {conflict}. Capacity between the experts: {show(one['capacity_nats_per_token'])} nats/token. "
            "Report documents: " + ", ".join(f"{name} {count}" for name, count in one["documents"].items()) + ".",
            "",
            table(
                [
                    "model", *(f"worst, {offset}" for offset in OFFSETS), "mean",
                    *(f"mean, less {name}'s (± se)" for name in COMPARED), "shifted: mean",
                    *(f"shifted: worst (sd), {offset}" for offset in OFFSETS[:2]), "changing",
                ],
                [
                    [
                        name,
                        *(show(row["worst"][offset]) for offset in OFFSETS),
                        show(row["mean"]),
                        *(
                            f"{row[f'over, {other}']['median']:+.4f} ± {row[f'error, {other}']['median']:.4f}"
                            for other in COMPARED
                        ),
                        show(row["shifted_mean"]),
                        *(
                            f"{show(row[f'shifted_worst, {offset}'])} ({show(row[f'shifted_sd, {offset}'])})"
                            for offset in OFFSETS[:2]
                        ),
                        show(row.get("changing")),
                    ]
                    for name, row in one["rows"].items()
                ],
            ),
        ]  # fmt: skip
        for title_of, unit in (("Nats per token", "nats_per_token"), ("Bits per byte", "bits_per_byte")):
            lines += [
                "",
                f"{title_of} by domain:",
                "",
                table(
                    ["model", *next(iter(one["rows"].values()))[unit]],
                    [
                        [name, *(show(value, "{:.3f}") for value in row[unit].values())]
                        for name, row in one["rows"].items()
                    ],
                ),
            ]
    return "\n".join([*lines, "", environment_lines(record)])


def main() -> None:
    """Train what is not there yet, fit, evaluate, report."""
    flags = parser(str(__doc__).splitlines()[0])
    flags.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with domains/")
    flags.add_argument("--work", type=Path, default=None, help="where trained models and results are kept")
    flags.add_argument("--processes", type=int, default=2, help="models trained at a time, one thread each")
    flags.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="sets of domains")
    flags.add_argument("--first-seed", type=int, default=0, help="100 and up: development")
    flags.add_argument("--train-only", action="store_true", help="train models and stop")
    arguments = flags.parse_args()
    if not (arguments.data / "domains").is_dir():
        if not arguments.quick:
            flags.error(f"{arguments.data} holds no domains/*.jsonl.zst; name the folder with --data")
        sys.stdout.write(json.dumps({"theme": "robust_quality", "skipped": "no text; name it with --data"}) + "\n")
        return
    quick = arguments.quick
    count = 3 if quick else None
    scale = quick_scale() if quick else Scale()
    seeds = range(arguments.first_seed, arguments.first_seed + (1 if quick else arguments.seeds))
    sets = arguments.sets[:1] if quick else arguments.sets
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        settings = {
            (name, seed): Setting(arguments.data, work / f"{name}-{seed}", SETS[name][:count], seed, scale)
            for seed in seeds
            for name in sets
        }
        wanted = ["base", SHARED, "branched", "adapter", "scratch", "weak", "monolith"]
        train_all(list(settings.values()), wanted, processes=1 if quick else arguments.processes)
        if arguments.train_only:
            return
        kinds = KINDS[:1] if quick else KINDS
        jobs = [(name, kind, seed) for name in sets for kind in kinds for seed in seeds]
        found = in_processes(
            compare,
            [(settings[name, seed], kind, settings[name, seed].work, quick) for name, kind, seed in jobs],
            processes=1 if quick else arguments.processes,
        )
        done = dict(zip(jobs, found, strict=True))
        comparisons = {
            f"{name} domains, experts {kind}": combine([done[name, kind, seed] for seed in seeds])
            for name in sets
            for kind in kinds
        }
    record = {
        "sets": {name: list(SETS[name]) for name in sets},
        "seeds": list(seeds),
        "monolith_tokens": scale.total_tokens,
        "dense_tokens": DENSE_TOKENS,
        "uses": dict(scale.uses),
        "comparisons": comparisons,
    }
    theme = "robust_quality" if arguments.first_seed < 100 else "robust_quality.dev"
    finish(theme, arguments, record, to_markdown)


if __name__ == "__main__":
    main()
