"""The plan of a recipe: a stage of figures for each stage the recipe has, and what was assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from weftlm.corpora.store import DOCUMENT, Vocabulary
from weftlm.corpora.tokens import load_pretrained
from weftlm.errors import ConfigError
from weftlm.mixture.policy import build_policy
from weftlm.models.config import ModelConfig
from weftlm.models.factory import architecture_config
from weftlm.models.open import pretrained_config
from weftlm.pipeline.checks import known_domains
from weftlm.pipeline.data_config import DataConfig
from weftlm.pipeline.identity import MANIFEST
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe, check
from weftlm.pipeline.stage import stages_of
from weftlm.planning.counts import TARGET_SHARE, Counted
from weftlm.planning.hardware import Hardware
from weftlm.planning.machine import DISK, DOES_NOT_FIT, Machine, Stage, Time
from weftlm.planning.pool import Sharing, experts_stage, gate_stage, scoring_stage, serving_stage, sharings_of
from weftlm.planning.probe import Probe
from weftlm.planning.training import Run, alignment_stage, settle, training_stage
from weftlm.training.runtime import choose_runtime

DOCUMENT_TOKENS = 1000
"""Tokens of a document where nothing is known of the text; decides the size of the documents' index alone."""


@dataclass(frozen=True)
class Assumed:
    """What the recipe does not say; None leaves it to the plan.

    Attributes:
        domains: D, number of domains.
        experts: E, number of experts.
        data_tokens: training tokens of all domains.
        requests: most requests served at once.
        prompt: tokens of a prompt.
        new: tokens generated for a request.
        chosen: K, experts per token of a routed model.
    """

    domains: int | None = None
    experts: int | None = None
    data_tokens: int | None = None
    requests: int = 32
    prompt: int | None = None
    new: int = 256
    chosen: int = 2


@dataclass(frozen=True)
class Plan:
    """What a recipe will cost.

    Attributes:
        recipe: where the recipe was read from.
        hardware: name of the hardware.
        mfu: utilisation assumed of matrix products; None where passes were timed.
        stages: the stages in the order of work.
        assumptions: plain sentences.
    """

    recipe: str
    hardware: str
    mfu: float | None
    stages: tuple[Stage, ...]
    assumptions: tuple[str, ...]

    def stage(self, name: str) -> Stage:
        """A stage by its name.

        Raises:
            KeyError: there is none.
        """
        return {stage.name: stage for stage in self.stages}[name]

    @property
    def seconds(self) -> float:
        """Wall-clock time of all stages, one after the other."""
        return sum(stage.time.seconds for stage in self.stages if stage.time is not None)

    @property
    def disk_bytes(self) -> float:
        """Bytes on disk of all stages."""
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def problems(self) -> tuple[str, ...]:
        """Problems of all stages."""
        return tuple(problem for stage in self.stages for problem in stage.problems)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "recipe": self.recipe,
            "hardware": self.hardware,
            "mfu": self.mfu,
            "stages": [stage.to_json() for stage in self.stages],
            "seconds": self.seconds,
            "disk_bytes": self.disk_bytes,
            "problems": list(self.problems),
            "assumptions": list(self.assumptions),
        }


def plan_recipe(
    recipe: Recipe,
    hardware: Hardware,
    *,
    name: str = "recipe",
    mfu: float | None = None,
    assumed: Assumed | None = None,
    probe: Probe | None = None,
) -> Plan:
    """Time, memory, traffic and disk of a recipe on some hardware.

    Of the files only the recipe, configurations of models and, where it is there, the prepared data are read. On the
    CPU passes of the recipe's own models are timed (`Probe`), with the threads and memory settings training chooses.

    Args:
        recipe: a checked recipe.
        hardware: the hardware, from `parse_hardware`.
        name: name of the recipe in the plan.
        mfu: part of the peak that matrix products reach; None: the device's default.
        assumed: what the recipe does not say.
        probe: measurements to go on with.
    Raises:
        ConfigError: the recipe is wrong, or something needed is not known.
    """
    if mfu is not None and not 0.0 < mfu <= 1.0:
        raise ConfigError(f"mfu is {mfu}; it is a part of the peak, above 0 and at most 1")
    assumed = assumed if assumed is not None else Assumed()
    used = hardware.device.mfu if mfu is None else mfu
    planner = _Planner(recipe, Machine(hardware, used, probe or Probe()), assumed, _facts(recipe, assumed))
    stages = tuple(planner.stages())
    measured = hardware.device.measured
    return Plan(name, hardware.name, None if measured else used, stages, tuple(planner.assumptions(stages)))


@dataclass
class _Facts:
    """What is known of the data, and the sentences that say where it came from."""

    domains: int
    vocab_size: int | None
    data_tokens: int | None = None
    documents: int | None = None
    heldout: tuple[int, ...] | None = None
    target_heldout: int = 0
    sentences: list[str] = field(default_factory=list)


def _facts(recipe: Recipe, assumed: Assumed) -> _Facts:
    """Domains, vocabulary and size of the text: from the prepared data, else from the recipe, else assumed."""
    folder = recipe.prepared_folder
    if (folder / MANIFEST).exists():
        data = PreparedData.load(folder)
        found = _Facts(
            len(data.domains), data.tokenizer.vocab_size,
            sum(len(domain.train) for domain in data.domains), sum(domain.documents for domain in data.domains),
            tuple(0 if domain.heldout is None else len(domain.heldout) for domain in data.domains),
            0 if data.target_heldout is None else len(data.target_heldout),
            [f"Domains, vocabulary and size of the text are those of the prepared data in {folder}."],
        )  # fmt: skip
    else:
        found = _Facts(*_unprepared(recipe))
    if assumed.domains is not None:
        found.domains, found.heldout = assumed.domains, None
        found.sentences = [f"{assumed.domains:,} domains, as given (--domains)."]
    if assumed.data_tokens is not None:
        found.data_tokens, found.documents = assumed.data_tokens, None
    return found


def _unprepared(recipe: Recipe) -> tuple[Any, ...]:
    """Domains, vocabulary and sentences from the recipe alone."""
    data, sentences = recipe.data, []
    names = known_domains(recipe)
    if data.domains.clusters is not None:
        domains = int(data.domains.clusters.n) + int(data.domains.include_target)
    elif names is not None:
        domains = len(names)
    else:
        named = {*((recipe.experts and recipe.experts.domains) or ())}
        domains = max(len(named), len(data.corpora) + int(data.domains.include_target))
        sentences.append(
            "The number of domains is not known before the text is read; taken as "
            f"{domains}, {'those the recipe names' if domains == len(named) else 'one per corpus'} (set --domains)."
        )
    return domains, _vocabulary_of(data), None, None, None, 0, sentences


def _vocabulary_of(data: DataConfig) -> int | None:
    name = data.tokenizer.pretrained
    if data.tokenizer.train is not None:
        return int(data.tokenizer.train.vocab_size)
    try:
        found = load_pretrained(name, data.tokenizer.revision) if name is not None and Path(name).is_dir() else None
    except ConfigError:
        return None
    return None if found is None else found.vocab_size


@dataclass
class _Planner:
    recipe: Recipe
    machine: Machine
    assumed: Assumed
    facts: _Facts

    def stages(self) -> list[Stage]:
        """Every stage that the recipe has and that is planned."""
        recipe, names = self.recipe, {stage.name for stage in stages_of(self.recipe)}
        found: list[Stage] = []
        if recipe.trains:
            counted = self._counted(recipe)
            found += self._training(recipe, counted)
            for policy in recipe.compare.mixtures:
                found.append(_together(f"baseline {policy.policy}", self._training(recipe.baseline(policy), counted)))
        if recipe.makes_experts:
            found += self._experts(names)
        elif "score" in names:
            found += self._gate(self._pool())
        else:
            found.append(self._serving([Sharing(counted, 1)]))
        return [self._data(found), *found]

    def _training(self, recipe: Recipe, counted: Counted) -> list[Stage]:
        """A model trained on a mixture: training, alignment, evaluation."""
        check(recipe)
        _, mixture, config = recipe.trained
        hardware = self.machine.hardware
        devices = max(n for n in range(1, hardware.devices + 1) if config.batch_sequences % n == 0)
        if devices < hardware.devices:
            self.facts.sentences.append(
                f"A batch of {config.batch_sequences} sequences cannot be shared equally by {hardware.devices} "
                f"devices: {devices} are used; set training.batch_sequences to a multiple of {hardware.devices}."
            )
        policy, groups = build_policy(mixture.model_dump()), self.facts.domains
        if "basis" in policy.needs and (basis := recipe.data.domains.basis) is not None:
            groups = len(basis.sets) if basis.count is None else int(basis.count)
        extra = []
        if policy.needs & {"target_alignment", "generalist_alignment"}:
            extra.append(("direction", 4.0 * counted.sizes.trainable))
        if "reference_losses" in policy.needs:
            extra.append(("reference model", float(counted.sizes.weight_bytes)))
        if self.machine.measured:
            choose_runtime(config, parameters=counted.sizes.parameters)
        run, layout, problems = settle(Run(counted, config, self.machine.training(config), devices, tuple(extra)))
        aligning = alignment_stage(run, recipe.alignment, policy, groups)
        return [
            training_stage(run, policy, self.facts.domains, layout, problems),
            *([] if aligning is None else [aligning]),
            self._evaluation(recipe, run),
        ]

    def _evaluation(self, recipe: Recipe, run: Run) -> Stage:
        """Held-out text of every domain and of the target, a number of times; sets are dealt out to the devices."""
        config, facts, most = recipe.evaluation, self.facts, recipe.evaluation.max_tokens_per_set
        times = 1 + (math.ceil(run.config.total_steps / config.every_steps) if config.every_steps else 0)
        sets = facts.domains + bool(recipe.data.target)
        if facts.heldout is not None:
            sizes = [*facts.heldout, facts.target_heldout]
            tokens = float(sum(size if most is None else min(size, most) for size in sizes))
        elif most is not None:
            tokens = float(most * sets)
        else:
            held = recipe.data.split.fraction or 0.0
            tokens = (facts.data_tokens or 0) * held / max(1e-9, 1.0 - held)
            facts.sentences.append(f"Each evaluation scores all held-out text, taken as {held:.0%} of the text.")
        size = config.batch_size, run.config.sequence_length
        passes = times * tokens / (size[0] * size[1])
        time = run.machine.time(run.counted, "forward", *size) * (passes / run.devices)
        return Stage(
            "evaluation", f"{times} times {tokens:,.0f} tokens of {sets} sets", time, time.limit,
            run.counted.forward(*size).flops * passes, facts={"times": times, "tokens_each": tokens, "sets": sets},
        )  # fmt: skip

    def _experts(self, names: set[str]) -> list[Stage]:
        """Experts over a base, and what the recipe makes of them: a monolith, a routed model, a gate."""
        recipe, config, checkpointing = self.recipe, self.recipe.expert_settings, False
        imports = config.imports
        if config.base is not None:
            base = pretrained_config(config.base, config.revision)
        else:
            model, _, training = recipe.trained
            base, checkpointing = self._config(model, training.sequence_length), model.gradient_checkpointing
        named = self.facts.domains if config.domains is None else len(config.domains)
        trained = (
            (named if config.trains else 0)
            if self.assumed.experts is None
            else max(0, self.assumed.experts - len(imports))
        )
        stages = []
        if recipe.trains_monolith:
            baseline = recipe.monolith(trained)
            stages.append(_together("baseline monolith", self._training(baseline, self._counted(baseline, base))))
        machine = self.machine.training(config.training)
        counted = Counted(base, config.dtype, machine.precision == "bf16", checkpointing, config.lora)
        heldout = sum(self.facts.heldout) / len(self.facts.heldout) if self.facts.heldout else None
        if heldout is not None and base.is_encoder_decoder:
            heldout *= TARGET_SHARE / (1.0 + TARGET_SHARE)
        if self.machine.measured:
            choose_runtime(config.training, parameters=counted.sizes.parameters)
        gated = sum(each.domain is not None for each in imports)
        stages.append(
            experts_stage(
                config, counted, self.machine, trained=trained, gated=gated, imported=len(imports), heldout=heldout
            )
        )
        if base.is_encoder_decoder:
            self.facts.sentences.append(
                "Prompts are taken as long as experts.training.sequence_length, "
                f"{config.training.sequence_length:,} tokens, and targets as {TARGET_SHARE:.0%} of that. Serving of "
                "encoder-decoders is not planned."
            )
            return stages
        experts = trained + len(imports)
        if "route" in names:
            stages.append(self._serving([Sharing(counted, experts)], min(self.assumed.chosen, experts)))
        if "score" in names:
            gating = recipe.gating_settings
            if gating.pool is not None:
                return [*stages, *self._gate(self._pool())]
            bf16 = gating.scores.bf16(fast=not self.machine.measured)
            wanted = experts if gating.experts is None else len(gating.experts)
            stages += self._gate([Sharing(counted.like(bf16=bf16, checkpointing=False), wanted)])
        return stages

    def _pool(self) -> Sequence[Sharing]:
        """The experts of `gating.pool`."""
        gating = self.recipe.gating_settings
        assert gating.pool is not None
        bf16 = gating.scores.bf16(fast=not self.machine.measured)
        return sharings_of(gating.pool, dtype=self.recipe.expert_settings.dtype, bf16=bf16)

    def _gate(self, sharings: Sequence[Sharing]) -> list[Stage]:
        """Scores, the gate and its serving."""
        gating = self.recipe.gating_settings
        scores, facts, experts = gating.scores, self.facts, sum(each.experts for each in sharings)
        counts = [scores.sequences] * facts.domains
        if facts.heldout is not None:
            counts = [min(scores.sequences, math.ceil(max(0, size - 1) / scores.length)) for size in facts.heldout]
        domains = len(counts) if gating.domains is None else len(gating.domains)
        texts = round(sum(counts) * domains / max(1, len(counts)))
        bf16 = scores.bf16(fast=not self.machine.measured)
        machine = Machine(self.machine.hardware, self.machine.mfu, self.machine.probe, "bf16" if bf16 else "fp32")
        return [
            scoring_stage(sharings, gating, machine, texts),
            gate_stage(gating, experts, domains, texts),
            self._serving(sharings),
        ]

    def _serving(self, sharings: Sequence[Sharing], chosen: int | None = None) -> Stage:
        prompts = []
        for each in sharings:
            longest = getattr(each.counted.config, "max_position_embeddings", None)
            length = self.assumed.prompt or self._length
            prompts.append(length if longest is None else max(1, min(length, int(longest) - self.assumed.new)))
        return serving_stage(
            sharings, self.machine, chosen=chosen, prompt=min(prompts), new=self.assumed.new,
            requests=self.assumed.requests,
        )  # fmt: skip

    @property
    def _length(self) -> int:
        """Tokens of a training sequence, or of those that are scored."""
        recipe = self.recipe
        if recipe.makes_experts:
            return recipe.expert_settings.training.sequence_length
        return recipe.training.sequence_length if recipe.training else recipe.gating_settings.scores.length

    def _data(self, stages: Sequence[Stage]) -> Stage:
        """The prepared text on disk: 2 bytes per token up to 65,536 ids and 4 beyond, and the documents' index."""
        facts = self.facts
        trained, scored = (
            max((int(s.facts.get(key, 0)) for s in stages), default=0) for key in ("tokens", "text_tokens")
        )
        tokens = facts.data_tokens if facts.data_tokens is not None else trained or scored
        if facts.data_tokens is None:
            facts.sentences.append(
                f"The text is not prepared and its size is not given (--data-tokens): taken as the {tokens:,} tokens "
                f"that are {'trained on' if trained else 'scored'}, each read once."
            )
        item = Vocabulary(facts.vocab_size or 1 << 17, 0, "").dtype.itemsize
        documents = facts.documents if facts.documents is not None else math.ceil(tokens / DOCUMENT_TOKENS)
        return Stage(
            "data", f"{tokens:,} tokens of {facts.domains:,} domains, prepared", limit=DISK,
            disk={"tokens": float(tokens * item), "documents": float(documents * DOCUMENT.itemsize)},
            facts={"tokens": tokens, "domains": facts.domains, "vocab_size": facts.vocab_size},
        )  # fmt: skip

    def _config(self, section: ModelConfig, length: int) -> PretrainedConfig:
        """The configuration of a recipe's model, without its weights."""
        if section.pretrained is not None:
            config = pretrained_config(section.pretrained, section.revision)
            if config.is_encoder_decoder:
                raise ConfigError(
                    f"model.pretrained {section.pretrained} is an encoder-decoder model, and a mixture trains "
                    "decoder-only language models; an encoder-decoder can be the base of experts: experts.base"
                )
            return config
        if self.facts.vocab_size is None:
            raise ConfigError(
                "the size of the vocabulary is not known before the tokenizer is there; prepare the data first, or "
                "give data.tokenizer.train.vocab_size or a local folder as data.tokenizer.pretrained"
            )
        return architecture_config(section, vocab_size=self.facts.vocab_size, sequence_length=length, eos_id=0)

    def _counted(self, recipe: Recipe, config: PretrainedConfig | None = None) -> Counted:
        """The model of a recipe that trains one."""
        section, _, training = recipe.trained
        bf16 = self.machine.training(training).precision == "bf16"
        found = self._config(section, training.sequence_length) if config is None else config
        return Counted(found, section.dtype, bf16, section.gradient_checkpointing, section.lora)

    def assumptions(self, stages: Sequence[Stage]) -> list[str]:
        """What the figures rest on."""
        machine, names = self.machine, {stage.name for stage in stages}
        device = machine.hardware.device
        lines = [*self.facts.sentences]
        if machine.measured:
            lines += [
                "Passes of the recipe's models, with random weights, were timed on this machine; other work on it "
                "meanwhile slows both the timing and the run. What was not timed is taken in proportion to FLOPs.",
                "Memory counts Python and the libraries as they are loaded now.",
            ]
        else:
            lines += [
                f"Matrix products reach {machine.mfu:.0%} of the peak of {device.name} (--mfu), recomputed ones "
                "included; small ones are limited by memory and launches, which are counted apart.",
                "Compiled code moves half the bytes and launches a third of the kernels; a launch takes "
                f"{device.launch * 1e6:.0f} us.",
                f"A device sends {machine.hardware.exchange / 1e9:.0f} GB/s to the others, all at once, 80 % of the "
                "links' rate; in DDP the last micro-batch's backward pass hides traffic, in FSDP2 all computing does.",
                "Devices do not wait for text: it is tokenised beforehand and read ahead.",
            ]
        lines.append("6 % of a device's memory is left to fragmentation and libraries.")
        if any("fsdp2" in str(stage.facts.get("layout", "")) for stage in stages):
            lines.append("FSDP2 gathers one layer ahead; checkpoints are whole in the first machine's memory.")
        if "experts" in names:
            lines.append("An adapter is trained by one process; the devices train experts in parallel.")
        if "scores" in names:
            lines.append("Every domain and expert has as many sequences as the recipe asks for.")
            lines.append("The time of fitting a gate is that of one x86 core (benchmarks/results/gate_fit.md).")
            lines.append("Under a gate models run one after the other, adapters over one model together.")
        lines.append(
            "Not planned: reading and tokenising text, comparing routers, students of a gate, the last evaluation of "
            "every model, tasks, failures of machines."
        )
        return list(dict.fromkeys(lines))


def _together(name: str, stages: Sequence[Stage]) -> Stage:
    """Stages of one baseline as one; the fullest stage decides the memory."""
    training, problems = stages[0], tuple(problem for stage in stages for problem in stage.problems)
    timed = {stage.name: stage.time for stage in stages if stage.time is not None}
    time = sum(timed.values(), Time())
    return Stage(
        name, training.what, time, DOES_NOT_FIT if problems else time.limit, sum(stage.flops for stage in stages),
        max(stages, key=lambda stage: stage.memory_bytes).memory, sum(stage.sent for stage in stages), training.disk,
        {
            **{key: training.facts[key] for key in ("parameters", "tokens", "steps", "layout")},
            **{f"seconds_of_{stage}": spent.seconds for stage, spent in timed.items()},
        },
        problems,
    )  # fmt: skip
