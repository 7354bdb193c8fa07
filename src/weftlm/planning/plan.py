"""The plan of a recipe: figures for each stage that the recipe has and for serving the result, and what was assumed.

    pool in memory    the weights of every model once, E R sum (I + O) factors, 4 E sum I bytes of prototypes
    routing a token   2 E sum I FLOPs for the scores, 2 K R sum (I + O) for the chosen
    score cache       N T E x 4  +  N (T + 1) x 4  +  N x 8 bytes
    KV cache          2 L (KV heads) (head width) x bytes, per token of a request; under a gate, once per expert

E experts, K chosen, R rank, I and O input and output width, sums over the adapted modules; N sequences of T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from weftlm.corpora.store import Vocabulary
from weftlm.corpora.tokens import load_pretrained
from weftlm.errors import ConfigError
from weftlm.experts.statistics import BIGRAM_BUCKETS
from weftlm.gating.config import gates
from weftlm.gating.experts import experts_per_pass
from weftlm.mixture.policy import build_policy
from weftlm.models.factory import architecture_config
from weftlm.models.open import outline, read_config, require_decoder_only
from weftlm.pipeline.checks import known_domains
from weftlm.pipeline.data_config import MANIFEST
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.stage import stages_of
from weftlm.planning.counts import TARGET_SHARE, Counted
from weftlm.planning.hardware import USABLE, Hardware, Work
from weftlm.planning.probe import Probe
from weftlm.planning.training import Run
from weftlm.training.config import TrainingConfig
from weftlm.training.runtime import choose_runtime

EXPERT_SECONDS = 0.15
"""Seconds of an expert beside its passes: setting up, fingerprints, files; measured on one x86 core."""
CARD_BYTES = 8192
"""Bytes of an expert's card, configuration and file headers, about."""
CHOSEN = 2
"""K, experts per token of a routed model."""
FIT_MEMORY = 8.0
"""Peak memory of a fit over the bytes of its data, from benchmarks/results/gate_fit.md."""
TOKEN_COPIES = {"batches": 3.0, "whole": 12.0}
"""Peak memory of a fit of a causal gate over the bytes of all scores of tokens, measured with gate `bayes`: 2.9 with
mini-batches (cache, its two parts, what is joined for the steps), 12 with all sequences in every step."""
PREFIX_BYTES = 850.0
"""Bytes of a step of gate `prefix` per token and expert of its sequences, measured: about a hundred float64."""


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
class Stage:
    """A stage of a plan: FLOPs over all devices, memory and traffic of one, figures, and what to do about problems.

    `limit` is the resource that takes most of the time, or "does not fit".
    """

    name: str
    what: str
    seconds: float
    limit: str
    flops: float
    memory_bytes: Mapping[str, float]
    disk_bytes: Mapping[str, float]
    sent_bytes: float
    facts: Mapping[str, Any]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What a recipe costs on some hardware, its stages one after the other; `mfu` is None where work was timed."""

    recipe: str
    hardware: str
    mfu: float | None
    stages: list[Stage]
    assumptions: list[str]

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def disk_bytes(self) -> float:
        """Bytes on disk of all stages."""
        return sum(sum(stage.disk_bytes.values()) for stage in self.stages)

    @property
    def problems(self) -> list[str]:
        """What will not work, and what to do about it."""
        return [problem for stage in self.stages for problem in stage.problems]

    def stage(self, name: str) -> Stage:
        """A stage by its name.

        Raises:
            KeyError: there is none.
        """
        return {stage.name: stage for stage in self.stages}[name]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        sums = {"seconds": self.seconds, "disk_bytes": self.disk_bytes, "problems": self.problems}
        return {**asdict(self), **sums}


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
        recipe: Checked recipe.
        hardware: Hardware, from `parse_hardware`.
        name: Name of the recipe in the plan.
        mfu: Part of the peak that matrix products reach; None for the device's default.
        assumed: What the recipe does not say.
        probe: Measurements to go on with.
    Raises:
        ConfigError: the recipe is wrong, or something needed is not known.
    """
    if mfu is not None and not 0.0 < mfu <= 1.0:
        raise ConfigError(f"mfu is {mfu}; it is a part of the peak, above 0 and at most 1")
    timed = (probe or Probe()) if hardware.name == "cpu" else None
    hardware = replace(hardware, mfu=mfu or hardware.mfu, probe=timed)
    planner = _Planner(recipe, hardware, assumed or Assumed())
    planner.plan()
    notes = list(dict.fromkeys([*planner.notes, *_assumptions(hardware, planner.stages)]))
    return Plan(name, hardware.name, None if timed else hardware.mfu, planner.stages, notes)


@dataclass
class _Planner:
    """Plans one recipe; `notes` are sentences on what was found or guessed."""

    recipe: Recipe
    hardware: Hardware
    assumed: Assumed
    notes: list[str] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)

    def plan(self) -> None:
        """Plan every stage that the recipe has and that is planned."""
        recipe, names = self.recipe, {stage.name for stage in stages_of(self.recipe)}
        models: list[Counted] = []
        if recipe.trains:
            models = [self._model(recipe)]
            self._training("training", recipe, models[0])
            for each in recipe.compare.mixtures:
                self._training(f"baseline {each.policy}", recipe.baseline(each), models[0])
        if recipe.makes_experts:
            models = self._experts()
        routed = recipe.makes_experts and "route" in names and not models[0].config.is_encoder_decoder
        if routed or not (recipe.makes_experts or "score" in names):
            self._serving(models, routed=routed)
        if "score" in names:
            self._gate(models)
        self._data()
        self.stages.insert(0, self.stages.pop())

    def _add(
        self,
        name: str,
        what: str,
        work: Work = Work(),  # noqa: B008 (frozen)
        *,
        half: bool = False,
        flops: float = 0.0,
        memory: Mapping[str, float] | None = None,
        disk: Mapping[str, float] | None = None,
        problems: Sequence[str] = (),
        facts: Mapping[str, Any],
    ) -> None:
        """Add a stage: `work` is a device's part, `flops` are those of all."""
        seconds, limit = self.hardware.time(work, half=half)
        limit = "does not fit" if problems else limit
        stage = Stage(name, what, seconds, limit, flops, memory or {}, disk or {}, work.sent, facts, tuple(problems))
        self.stages.append(stage)

    # -- the text -----------------------------------------------------------------------------------------------------

    @cached_property
    def data(self) -> PreparedData | None:
        """The prepared data, where it is there and no other number of domains is asked for."""
        folder = self.recipe.prepared_folder
        if self.assumed.domains is not None or not (folder / MANIFEST).exists():
            return None
        self.notes.append(f"Domains, vocabulary and size of the text are those of the prepared data in {folder}.")
        return PreparedData.load(folder)

    @cached_property
    def domains(self) -> int:
        """Number of domains: as given, else as prepared or by the recipe's clusters or labels."""
        data, given = self.recipe.data, self.assumed.domains
        if given is not None:
            self.notes.append(f"{given:,} domains, as given (--domains).")
            return given
        if self.data is None and data.domains.clusters is not None:
            return int(data.domains.clusters.n) + int(data.domains.include_target)
        if (known := known_domains(self.recipe)) is not None:
            return len(known)
        named = self.recipe.expert_settings.domains or ()
        guess = max(len(named), len(data.corpora) + int(data.domains.include_target))
        self.notes.append(
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

    def _data(self) -> None:
        """The prepared text on disk: 2 bytes per token up to 65,536 ids and 4 beyond."""
        tokens = self.assumed.data_tokens
        if tokens is None and self.data is not None:
            tokens = sum(len(domain.train) for domain in self.data.domains)
        if tokens is None:
            tokens = max(int(stage.facts.get(key, 0)) for stage in self.stages for key in ("tokens", "text_tokens"))
            self.notes.append(
                f"The text is not prepared and its size is not given (--data-tokens): taken as the {tokens:,} tokens "
                "that are trained on or scored, each read once."
            )
        try:
            item = Vocabulary(self.vocab_size, 0, "").dtype.itemsize
        except ConfigError:
            item = 4
        what = f"{tokens:,} tokens of {self.domains:,} domains, prepared"
        facts = {"tokens": tokens, "domains": self.domains}
        self._add("data", what, disk={"tokens": float(tokens * item)}, facts=facts)

    # -- training -----------------------------------------------------------------------------------------------------

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

    def _training(self, name: str, recipe: Recipe, counted: Counted) -> None:
        """A model trained on a mixture, with alignments, reference losses and evaluations."""
        (_, mixture, config), evaluation = recipe.trained, recipe.evaluation
        there, steps, sequences = self.hardware.devices, config.total_steps, config.batch_sequences
        devices = max(n for n in range(1, there + 1) if sequences % n == 0)
        if devices < there:
            self.notes.append(f"A batch of {sequences} sequences is shared equally by {devices} of {there} devices.")
        policy, groups = build_policy(mixture.model_dump()), self.domains
        if "basis" in policy.needs and (basis := recipe.data.domains.basis) is not None:
            groups = len(basis.sets) if basis.count is None else int(basis.count)
        asked = Run(counted, config, self.hardware, devices, policy, recipe.alignment, groups)
        run, layout, problems = asked.fitting()
        work = run.step * steps
        try:
            aligning, aligned = run.alignments()
            work = work + aligning
        except ConfigError as error:
            aligned, problems = {}, (*problems, str(error))
        if "reference_losses" in policy.needs:
            work = work + run.work("forward", sequences * steps)
            if getattr(policy.config, "reference", None) is None:  # which is trained first
                work = work + run.step * steps
        times = 1 + (steps // evaluation.every_steps if evaluation.every_steps else 0)
        most = evaluation.max_tokens_per_set
        held = self.heldout or [most or 0] * (self.domains + bool(recipe.data.target))
        scored = sum(size if most is None else min(most, size) for size in held)
        evaluating = run.work("forward", times * scored / config.sequence_length)
        work, step = work + evaluating, run.seconds(run.step)
        self._add(
            name, f"{counted.parameters / 1e6:,.1f}M parameters, {config.total_tokens:,} tokens, {mixture.policy}",
            work, half=counted.half, flops=work.flops * devices, memory=run.memory, disk=run.disk, problems=problems,
            facts={
                "parameters": counted.parameters,
                "trainable_parameters": counted.trainable,
                "steps": steps,
                "tokens": config.total_tokens,
                "seconds_per_step": step,
                "tokens_per_second": sequences * config.sequence_length / step,
                "layout": layout,
                "evaluations": times,
                "seconds_of_evaluation": run.seconds(evaluating),
                **aligned,
            },
        )  # fmt: skip

    # -- experts ------------------------------------------------------------------------------------------------------

    def _experts(self) -> list[Counted]:
        """Adapters, each trained by one process that holds the whole base; returns the base with all of them."""
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
            self._training("baseline monolith", monolith, self._model(monolith, base))
        training, examples = config.training, config.statistics_examples
        counted = Counted(base, config.dtype, checkpointing=checkpointing, adapter=config.lora)
        run = Run(self._as_trained(counted, training), training, self.hardware, 1)
        counted, length = run.counted, training.sequence_length
        if base.is_encoder_decoder:
            self.notes.append(
                f"Prompts are taken as long as experts.training.sequence_length, {length:,} tokens, and targets as "
                f"{TARGET_SHARE:.0%} of that. Serving of encoder-decoders is not planned."
            )
        sizes = [config.validation_tokens, sum(self.heldout) / len(self.heldout) if self.heldout else None]
        validation = min((size for size in sizes if size is not None), default=0)
        looks = 1 + (training.total_steps // config.validate_every_steps if config.validate_every_steps else 1)
        gate = config.gate.training(training).total_tokens if config.gate.steps else 0
        # A gate's backward pass goes through the same activations as an adapter's.
        after = run.work("step", gate / length) + run.work("forward", examples) + Work(seconds=EXPERT_SECONDS)
        one = run.step * training.total_steps
        one = one + run.work("forward", looks * validation / counted.predicted(length)) + after
        gated = sum(each.domain is not None for each in config.imports)  # imports that get gates and statistics
        weights = (counted.parameters * counted.item + 12.0 * counted.trainable) / USABLE / 1e9
        problem = (
            f"an adapter is trained by one process, which holds the whole base: {run.shortage}; set experts.dtype: "
            "bfloat16 or experts.training.micro_batch_sequences: 1, or use a device of more than "
            f"{weights:.0f} GB, which weights and optimizer alone take"
        )
        inputs = 4.0 * sum(i for i, _ in counted.targets.values())
        width = int(config.embedder.removeprefix("tokens-"))
        statistics = inputs + 4.0 * (examples * width + int(counted.config.vocab_size) + BIGRAM_BUCKETS)
        library = CARD_BYTES + 4.0 * counted.trainable + (inputs if gate else 0.0) + (statistics if examples else 0.0)
        self._add(
            "experts",
            f"{trained:,} experts of rank {config.lora.rank}, {training.total_steps} steps each, {imported:,} imported",
            one * math.ceil(trained / self.hardware.devices) + after * gated, half=counted.half,
            flops=one.flops * trained + after.flops * gated, memory=run.memory,
            disk={"library": library * (trained + imported), "checkpoints": run.disk["checkpoints"] * trained},
            problems=() if run.fits else (problem,),
            facts={
                "experts": trained + imported,
                "parameters_per_expert": counted.trainable,
                "tokens": training.total_tokens * trained,
                "seconds_per_expert": run.seconds(one),
                "seconds_per_adapter_step": run.seconds(run.step),
                "imported": imported,
                "seconds_per_imported_expert": run.seconds(after),
            },
        )  # fmt: skip
        return [replace(counted, checkpointing=False, experts=trained + imported)]

    # -- a gate -------------------------------------------------------------------------------------------------------

    def _gate(self, models: list[Counted]) -> None:
        """Text and samples scored under every expert, the gate fitted on the scores, and its serving."""
        gating, config, hardware = self.recipe.gating_settings, self.recipe.gating_settings.scores, self.hardware
        bf16 = config.bf16(fast=hardware.probe is None)
        if gating.pool is not None:
            models = Counted.of_pool(gating.pool, dtype=self.recipe.expert_settings.dtype, bf16=bf16)
        else:
            wanted = models[0].experts if gating.experts is None else len(gating.experts)
            models = [replace(models[0], bf16=bf16, experts=wanted)]
        experts, batch, length = sum(each.experts for each in models), config.batch_size, config.length
        domains = self.domains if gating.domains is None else len(gating.domains)
        there = [min(config.sequences, math.ceil(max(0, size - 1) / length)) for size in self.heldout]
        texts = round(sum(there) * domains / len(there)) if there else config.sequences * domains
        samples = experts * config.samples
        every = texts + samples
        work = self._pass(models, batch, length) * (every / batch)
        for each in models:  # an expert draws its own samples
            token = self._pass([replace(each, experts=1)], batch, 1, length // 2)
            work = work + token * (length / batch * each.experts * config.samples)
        activations = max(each.activations(batch, length, training=False) for each in models)
        memory, have = {**_held(models), "activations": activations}, hardware.device.memory
        needed = sum(memory.values())
        problem = (
            f"scoring holds all experts on one device: {needed / 1e9:.0f} GB on {have / 1e9:.0f} GB; score fewer "
            "experts (gating.experts), of a smaller rank, with experts.dtype: bfloat16, or on the CPU"
        )
        self._add(
            "scores", f"{every:,} sequences of {length} tokens under {experts:,} experts",
            work * (1.0 / hardware.devices), half=models[0].half, flops=work.flops, memory=memory,
            disk={"score cache": float(every * (length * experts * 4 + (length + 1) * 4 + 8))},
            problems=(problem,) if needed > hardware.memory else (),
            facts={"text_sequences": texts, "text_tokens": texts * length, "sample_sequences": samples},
        )  # fmt: skip
        fitted = int(every * (1.0 - gating.held_out_fraction))
        data = fitted * (12.0 * experts + 8.0)
        memory = {"data": data, "fit": (FIT_MEMORY - 1.0) * data, "token ids": 4.0 * every * (length + 1)}
        if gates[gating.gate.gate].causal:
            copies = TOKEN_COPIES["whole" if gating.fit.batch_sequences is None else "batches"]
            memory["scores of tokens"] = copies * 4.0 * every * length * experts
            if gating.gate.gate == "prefix":
                drawn = min(fitted, domains * (gating.fit.batch_sequences or fitted))
                memory["step"] = PREFIX_BYTES * drawn * length * experts
        what = f"{gating.gate.gate} over {experts:,} experts, {gating.fit.steps} steps at most, time not planned"
        disk = {"gate": 8.0 * experts * (2 * experts + 1)}
        self._add("gate", what, memory=memory, disk=disk, facts={"sequences": fitted})
        self._serving(models)

    # -- serving ------------------------------------------------------------------------------------------------------

    def _serving(self, models: Sequence[Counted], *, routed: bool = False) -> None:
        """Generation by one copy of a model, routed experts or a gate over all, for one request and several at once.

        Over several devices layers run one after the other; requests are fewer where memory does not hold their caches.
        """
        recipe, hardware, new = self.recipe, self.hardware, self.assumed.new
        trained = recipe.expert_settings.training if recipe.makes_experts else recipe.training
        prompt = self.assumed.prompt or (trained.sequence_length if trained else recipe.gating_settings.scores.length)
        positions = [getattr(each.config, "max_position_embeddings", None) or prompt + new for each in models]
        prompt = max(1, min([prompt, *(int(most) - new for most in positions)]))
        models = [replace(each, bf16=False) for each in models]
        experts, first, memory, routing = sum(each.experts for each in models), models[0], _held(models), Work()
        gated = experts > 1 and not routed
        if routed:  # one pass of the base, and per token the router's scores and the chosen factors
            inputs = sum(i for i, _ in first.targets.values())
            memory["prototypes"] = 4.0 * experts * inputs
            flops = 2.0 * experts * inputs + 2.0 * min(CHOSEN, experts) * first.adapter_parameters
            routing = Work(flops, memory["prototypes"], 12.0 * len(first.targets))
            models = [replace(first, adapter=None, experts=1)]

        def time(batch: int, length: int, context: int | None = None) -> tuple[float, str]:
            """A pass of everything over prompts, or over a token of every request behind `context` others."""
            work = self._pass(models, batch, length, context)
            added = replace(routing, flops=routing.flops * batch * length)
            added = replace(added, seconds=work.seconds * added.flops / work.flops)
            return hardware.time(work + added, half=first.half)

        kv_bytes, held = sum(each.experts * each.kv_bytes for each in models), sum(memory.values())
        cache, there = kv_bytes * (prompt + new), hardware.devices
        needed = max(1, math.ceil((held + cache) / hardware.memory))
        at_most = int((needed * hardware.memory - held) // cache)
        at_once = max(1, min(self.assumed.requests, at_most))
        token = {batch: time(batch, 1, prompt + new // 2) for batch in (1, at_once)}
        problem = (
            f"one copy needs {held / 1e9:.0f} GB and a request {cache / 1e9:.3g} GB, {needed} devices; there are "
            f"{there}: take more, or hold it in bfloat16"
        )
        name = "routed model" if routed else f"gate over {experts:,} experts" if gated else "plain model"
        parts = {**memory, "KV cache": cache * at_once}
        self._add(
            "gated serving" if gated else "serving", f"{name}, prompts of {prompt}, {new} new tokens",
            memory={part: size / needed for part, size in parts.items()},
            problems=(problem,) if needed > there else (),
            facts={
                "kv_bytes_per_token": kv_bytes,
                "devices_per_copy": needed,
                "requests_in_memory": at_most,
                **{f"tokens_per_second_at_{batch}": batch / seconds for batch, (seconds, _) in token.items()},
                **{f"limit_at_{batch}": limit for batch, (_, limit) in token.items()},
                "seconds_to_first_token": time(1, prompt)[0],
            },
        )  # fmt: skip

    def _pass(self, models: Sequence[Counted], batch: int, length: int, context: int | None = None) -> Work:
        """Forward passes of all experts over one batch, or over a token of every sequence behind `context` others.

        Experts over one model share passes as `ExpertPool` has them share; on this machine passes are timed.
        """
        probe, work = self.hardware.probe, Work()
        for each in models:
            most = experts_per_pass(batch * length, int(each.config.vocab_size), "cpu" if probe else "cuda")
            together = min(each.experts, most)
            one, rows = each.forward(batch * together, length, context), batch * together
            if probe:
                seconds = probe.forward(each, rows, length) if context is None else probe.token(each, rows)
                one = replace(one, seconds=seconds)
            work = work + one * (each.experts / together)
        return work


def _held(models: Sequence[Counted]) -> dict[str, float]:
    """Bytes of all models, and of all adapters over them."""
    adapters = [each.adapter_parameters * each.item for each in models]
    return {
        "weights": float(sum(each.parameters * each.item for each in models) - sum(adapters)),
        "experts' factors": float(sum(each.experts * size for each, size in zip(models, adapters, strict=True))),
    }


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
