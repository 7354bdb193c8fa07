"""The plan of a recipe: figures for each stage that the recipe has and for serving the result, and what was assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from weftlm.corpora.store import Vocabulary
from weftlm.corpora.tokens import load_pretrained
from weftlm.errors import ConfigError
from weftlm.mixture.policy import build_policy
from weftlm.models.factory import architecture_config
from weftlm.models.lora_targets import outline
from weftlm.models.open import read_config, require_decoder_only
from weftlm.pipeline.checks import known_domains
from weftlm.pipeline.data_config import MANIFEST
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.stage import stages_of
from weftlm.planning.counts import TARGET_SHARE, Counted
from weftlm.planning.hardware import Hardware, Stage
from weftlm.planning.pool import experts_stage, gate_stage, models_of, scoring_stage, serving_stage
from weftlm.planning.probe import Probe
from weftlm.planning.training import Run, aligning_memory, alignments, fitting
from weftlm.training.config import TrainingConfig
from weftlm.training.runtime import choose_runtime


@dataclass(frozen=True)
class Assumed:
    """What the recipe does not say; None leaves it to the recipe, its prepared data, or a guess that the plan names."""

    domains: int | None = None
    experts: int | None = None
    data_tokens: int | None = None
    requests: int = 32
    prompt: int | None = None
    new: int = 256


@dataclass(frozen=True)
class Plan:
    """What a recipe costs on some hardware, its stages one after the other; `mfu` is None where work was timed."""

    recipe: str
    hardware: str
    mfu: float | None
    stages: list[Stage]
    assumptions: list[str]
    seconds: float
    disk_bytes: float
    problems: list[str]

    def stage(self, name: str) -> Stage:
        """A stage by its name.

        Raises:
            KeyError: there is none.
        """
        return {stage.name: stage for stage in self.stages}[name]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "stages": [stage.to_json() for stage in self.stages]}


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

    Of the files only the recipe, configurations of models, adapters of `gating.pool` and, where it is there, the
    prepared data are read. On the CPU work on the recipe's own models is timed (`Probe`).

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
    timed = (probe or Probe()) if hardware.name == "cpu" else None
    hardware = replace(hardware, mfu=mfu or hardware.mfu, probe=timed)
    planner = _Planner(recipe, hardware, assumed or Assumed())
    stages = planner.stages()
    return Plan(
        name, hardware.name, None if timed else hardware.mfu, stages,
        list(dict.fromkeys([*planner.told, *_assumptions(hardware, stages)])),
        seconds=sum(stage.time.seconds for stage in stages),
        disk_bytes=sum(sum(stage.disk_bytes.values()) for stage in stages),
        problems=[problem for stage in stages for problem in stage.problems],
    )  # fmt: skip


@dataclass
class _Planner:
    """Plans one recipe; `told` are sentences on what was found or guessed."""

    recipe: Recipe
    hardware: Hardware
    assumed: Assumed
    told: list[str] = field(default_factory=list)

    # -- the text -----------------------------------------------------------------------------------------------------

    @cached_property
    def data(self) -> PreparedData | None:
        """The prepared data, where it is there and no other number of domains is asked for."""
        folder = self.recipe.prepared_folder
        if self.assumed.domains is not None or not (folder / MANIFEST).exists():
            return None
        self.told.append(f"Domains, vocabulary and size of the text are those of the prepared data in {folder}.")
        return PreparedData.load(folder)

    @cached_property
    def domains(self) -> int:
        """Number of domains: as given, else as prepared or as the recipe's labels tell."""
        data, given = self.recipe.data, self.assumed.domains
        if given is not None:
            self.told.append(f"{given:,} domains, as given (--domains).")
            return given
        if self.data is None and data.domains.clusters is not None:
            return int(data.domains.clusters.n) + int(data.domains.include_target)
        known = known_domains(self.recipe)
        if known is not None:
            return len(known)
        named = len((self.recipe.experts and self.recipe.experts.domains) or ())
        guess = max(named, len(data.corpora) + int(data.domains.include_target))
        self.told.append(
            f"The number of domains is not known before the text is read; taken as {guess} (set --domains)."
        )
        return guess

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary.

        Raises:
            ConfigError: it is not known yet.
        """
        tokenizer = self.recipe.data.tokenizer
        if self.data is not None:
            return self.data.tokenizer.vocab_size
        if tokenizer.train is not None:
            return int(tokenizer.train.vocab_size)
        if tokenizer.pretrained is not None and Path(tokenizer.pretrained).is_dir():
            return load_pretrained(tokenizer.pretrained, tokenizer.revision).vocab_size
        raise ConfigError(
            "the size of the vocabulary is not known before the tokenizer is there; prepare the data first, or give "
            "data.tokenizer.train.vocab_size or a local folder as data.tokenizer.pretrained"
        )

    @property
    def heldout(self) -> list[int]:
        """Held-out tokens of every domain; none where they are not known."""
        held = [] if self.data is None else [domain.heldout for domain in self.data.domains]
        return [0 if source is None else len(source) for source in held]

    # -- the stages ---------------------------------------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """Every stage that the recipe has and that is planned."""
        recipe, names, found = self.recipe, {stage.name for stage in stages_of(self.recipe)}, []
        models: list[Counted] = []
        if recipe.trains:
            models = [self._model(recipe)]
            others = {f"baseline {each.policy}": recipe.baseline(each) for each in recipe.compare.mixtures}
            found = [self._training(name, each, models[0]) for name, each in {"training": recipe, **others}.items()]
        if recipe.makes_experts:
            models = self._experts(found)
        if not recipe.makes_experts and "score" not in names:
            found.append(self._serving(models))
        elif "route" in names and not models[0].config.is_encoder_decoder:
            found.append(self._serving(models, routed=True))
        if "score" in names:
            self._gate(found, models)
        return [self._data(found), *found]

    def _model(self, recipe: Recipe, config: PretrainedConfig | None = None) -> Counted:
        """The model that a recipe trains; `config`: of a base that is not there yet."""
        section, _, training = recipe.trained
        if config is None and section.pretrained is not None:
            config = read_config(section.pretrained, revision=section.revision, local_files_only=True)
            require_decoder_only(outline(config), section.pretrained)
        if config is None:
            length = training.sequence_length
            config = architecture_config(section, vocab_size=self.vocab_size, sequence_length=length, eos_id=0)
        model = Counted(config, section.dtype, checkpointing=section.gradient_checkpointing, adapter=section.lora)
        return self._as_trained(model, training)

    def _as_trained(self, counted: Counted, training: TrainingConfig) -> Counted:
        """A model in the precision, and on this machine with the threads and memory settings, that training chooses."""
        if self.hardware.probe:
            choose_runtime(training, parameters=counted.parameters)
        return replace(counted, bf16=training.bf16(fast=self.hardware.probe is None))

    def _training(self, name: str, recipe: Recipe, counted: Counted) -> Stage:
        """A model trained on a mixture, with alignments, reference losses and evaluations."""
        (_, mixture, config), evaluation, hardware = recipe.trained, recipe.evaluation, self.hardware
        there, steps, sequences = hardware.devices, config.total_steps, config.batch_sequences
        devices = max(n for n in range(1, there + 1) if sequences % n == 0)
        if devices < there:
            self.told.append(f"A batch of {sequences} sequences is shared equally by {devices} of {there} devices.")
        policy, groups, extra = build_policy(mixture.model_dump()), self.domains, {}
        if "basis" in policy.needs and (basis := recipe.data.domains.basis) is not None:
            groups = len(basis.sets) if basis.count is None else int(basis.count)
        if "reference_losses" in policy.needs:
            extra["reference model"] = float(counted.parameters * counted.item)
        asked = run = Run(counted, config, hardware, devices)
        for _ in range(2):  # the layout decides which estimator there is, and its memory which layout fits
            more = aligning_memory(run, recipe.alignment, policy, groups)
            run, layout, problems = fitting(replace(asked, extra={**more, **extra}))
        work = run.step * steps
        try:
            aligning, aligned = alignments(run, recipe.alignment, policy, groups)
            work = work + aligning
        except ConfigError as error:
            aligned, problems = {}, (*problems, str(error))
        if "reference_losses" in policy.needs:
            work = work + run.work("forward", sequences * steps)
            if getattr(policy.config, "reference", None) is None:  # which is trained first
                work = work + run.step * steps
        times, most = 1 + (steps // evaluation.every_steps if evaluation.every_steps else 0), math.inf
        most = evaluation.max_tokens_per_set or most
        held: list[float] = [*self.heldout] or [most if most < math.inf else 0] * (
            self.domains + bool(recipe.data.target)
        )
        evaluating = run.work("forward", times * sum(min(most, size) for size in held) / config.sequence_length)
        work, half = work + evaluating, counted.half
        step = hardware.time(run.step, half=half).seconds
        return Stage(
            name, f"{counted.parameters / 1e6:,.1f}M parameters, {config.total_tokens:,} tokens, {mixture.policy}",
            hardware.time(work, half=half), work.flops * devices, run.memory, run.disk, work.sent,
            {
                "parameters": counted.parameters,
                "trainable_parameters": counted.trainable,
                "steps": steps,
                "tokens": config.total_tokens,
                "seconds_per_step": step,
                "tokens_per_second": sequences * config.sequence_length / step,
                "layout": layout,
                "evaluations": times,
                "seconds_of_evaluation": hardware.time(evaluating, half=half).seconds,
                **aligned,
            },
            problems,
        )  # fmt: skip

    def _experts(self, found: list[Stage]) -> list[Counted]:
        """Experts over a base, and the monolith beside them; returns the base with all its adapters."""
        recipe, config, checkpointing = self.recipe, self.recipe.expert_settings, False
        if config.base is not None:
            base = read_config(config.base, revision=config.revision, local_files_only=True)
        else:
            base, checkpointing = self._model(recipe).config, recipe.trained[0].gradient_checkpointing
        imported, given = len(config.imports), self.assumed.experts
        trained = (self.domains if config.domains is None else len(config.domains)) if config.trains else 0
        trained = trained if given is None else max(0, given - imported)
        if recipe.trains_monolith:
            monolith = recipe.monolith(trained)
            found.append(self._training("baseline monolith", monolith, self._model(monolith, base)))
        counted = Counted(base, config.dtype, checkpointing=checkpointing, adapter=config.lora)
        counted = self._as_trained(counted, config.training)
        scored = [config.validation_tokens, sum(self.heldout) / len(self.heldout) if self.heldout else None]
        validation = min((size for size in scored if size is not None), default=0)
        if base.is_encoder_decoder:
            self.told.append(
                "Prompts are taken as long as experts.training.sequence_length, "
                f"{config.training.sequence_length:,} tokens, and targets as {TARGET_SHARE:.0%} of that. Serving of "
                "encoder-decoders is not planned."
            )
        gated = sum(each.domain is not None for each in config.imports)
        run = Run(counted, config.training, self.hardware, 1)
        found.append(experts_stage(config, run, validation, trained=trained, imported=imported, gated=gated))
        return [replace(counted, checkpointing=False, experts=trained + imported)]

    def _gate(self, found: list[Stage], models: list[Counted]) -> None:
        """Scores, the gate and its serving."""
        gating, experts, held = self.recipe.gating_settings, self.recipe.expert_settings, self.heldout
        scores, bf16 = gating.scores, gating.scores.bf16(fast=self.hardware.probe is None)
        if gating.pool is not None:
            models = models_of(gating.pool, dtype=experts.dtype, bf16=bf16)
        else:
            wanted = models[0].experts if gating.experts is None else len(gating.experts)
            models = [replace(models[0], bf16=bf16, experts=wanted)]
        domains = self.domains if gating.domains is None else len(gating.domains)
        there = [min(scores.sequences, math.ceil(max(0, size - 1) / scores.length)) for size in held]
        texts = round(sum(there) * domains / len(there)) if there else scores.sequences * domains
        found.append(scoring_stage(models, gating, self.hardware, texts))
        found.append(gate_stage(gating, sum(each.experts for each in models), texts))
        found.append(self._serving(models))

    def _serving(self, models: Sequence[Counted], *, routed: bool = False) -> Stage:
        recipe, new = self.recipe, self.assumed.new
        length = recipe.training.sequence_length if recipe.training else recipe.gating_settings.scores.length
        length = recipe.expert_settings.training.sequence_length if recipe.makes_experts else length
        prompt = self.assumed.prompt or length
        positions = [getattr(each.config, "max_position_embeddings", None) or prompt + new for each in models]
        prompt = max(1, min([prompt, *(int(most) - new for most in positions)]))
        requests = self.assumed.requests
        return serving_stage(models, self.hardware, routed=routed, prompt=prompt, new=new, requests=requests)

    def _data(self, stages: Sequence[Stage]) -> Stage:
        """The prepared text on disk: 2 bytes per token up to 65,536 ids and 4 beyond."""
        tokens = self.assumed.data_tokens
        if tokens is None and self.data is not None:
            tokens = sum(len(domain.train) for domain in self.data.domains)
        if tokens is None:
            tokens = max(int(stage.facts.get(key, 0)) for stage in stages for key in ("tokens", "text_tokens"))
            self.told.append(
                f"The text is not prepared and its size is not given (--data-tokens): taken as the {tokens:,} tokens "
                "that are trained on or scored, each read once."
            )
        try:
            item = Vocabulary(self.vocab_size, 0, "").dtype.itemsize
        except ConfigError:
            item = 4
        return Stage(
            "data", f"{tokens:,} tokens of {self.domains:,} domains, prepared",
            disk_bytes={"tokens": float(tokens * item)}, facts={"tokens": tokens, "domains": self.domains},
        )  # fmt: skip


def _assumptions(hardware: Hardware, stages: Sequence[Stage]) -> list[str]:
    """What the figures rest on."""
    lines = [
        f"Matrix products reach {hardware.mfu:.0%} of the peak of {hardware.device.name} (--mfu), recomputed ones "
        "included; memory traffic and launches are counted apart, and the slowest resource hides the others.",
        f"A kernel takes {hardware.device.launch * 1e6:.0f} us to launch; training is compiled, generation is not.",
        f"A device sends {hardware.exchange / 1e9:.0f} GB/s to the others, all at once, 80 % of the links' rate. FSDP2 "
        "gathers one layer ahead; checkpoints are whole in the first machine's memory.",
        "Text is tokenised beforehand; the time to read a batch, between two steps, is not counted.",
    ]
    if hardware.probe:
        lines = [
            "Work on the recipe's models, with random weights, was timed on this machine; other work on it meanwhile "
            "slows both the timing and the run. What was not timed is taken in proportion to FLOPs.",
            "Memory counts Python and the libraries as they are loaded now.",
        ]
    if {"experts", "scores"} & {stage.name for stage in stages}:
        lines.append(
            "An adapter is trained by one process; the devices train experts in parallel. Every domain has as many "
            "sequences as the recipe asks for. Under a gate models run one after the other, adapters together."
        )
    return [
        *lines,
        "6 % of a device's memory is left to fragmentation and libraries.",
        "Not planned: reading and tokenising text, comparing routers, time of fitting a gate, students of it, the last "
        "evaluation of every model, tasks, failures of machines.",
    ]
