"""An online mixture for somebody else's training loop: what to train on next, and how training moves the mixture.

`OnlineMixture` says what is mixed; `start` gives a `MixtureRun`, which the loop asks for micro-batches and tells of
every optimizer step. Draws, probes and updates are those of `weftlm.training.loop` with `alignment.probe: extra`,
number for number, so a run under one loop can be compared with a run under the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import ArrayLike
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from weftlm.config import Section, Seed, differences, validate
from weftlm.corpora.source import ArraySource, Source
from weftlm.errors import CheckpointError, ConfigError, DataError, reason
from weftlm.integrations.mixture_dataset import SlotDataset
from weftlm.mixture.loader import MixtureLoader, sequence_counts
from weftlm.mixture.policy import Alignment, MixtureSetting, Report, build_policy, state_from_json, state_to_json
from weftlm.mixture.sampler import Exhaustion, MixtureSampler, SamplerExhausted
from weftlm.models.hf import token_losses
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.train import training_task
from weftlm.training.config import AlignmentConfig
from weftlm.training.estimators.direction import trainable_parameters
from weftlm.training.loop import Task
from weftlm.training.meter import DomainMeter
from weftlm.training.probes import AlignmentProbes

Tokens: TypeAlias = Source | datasets.Dataset | ArrayLike
"""Token ids of a domain: a source, one row of integers, or a `datasets.Dataset` with a column `input_ids`."""


class OnlineMixture:
    """Domains, a policy and how alignments are measured: everything but the model and the batch size.

    Args:
        task: domains, sources, policy, target and reference model.
        sequence_length: T, tokens predicted per sequence; an example holds T + 1 tokens, input and labels in one.
        seed: of the draw and the probes.
        alignment: how alignments are measured; always on sequences of their own (`probe: extra`).
        exhaustion: what happens when a domain has been read `max_epochs` times: `repeat`, `drop` or `stop`.
        max_epochs: repetition cap per domain, with `drop` or `stop`.
        prefetch_steps: batches read ahead by a thread; changes nothing but the time.
    Raises:
        ConfigError: the policy needs what the task lacks, or alignments are to be measured on the training batch.
        DataError: a source is too short for one sequence.
    """

    def __init__(
        self,
        task: Task,
        *,
        sequence_length: int,
        seed: int = 0,
        alignment: AlignmentConfig | Mapping[str, Any] | None = None,
        exhaustion: Exhaustion = "repeat",
        max_epochs: float | None = None,
        prefetch_steps: int = 0,
    ) -> None:
        options = {
            "sequence_length": sequence_length, "seed": seed, "exhaustion": exhaustion, "max_epochs": max_epochs,
            "prefetch_steps": prefetch_steps,
        }  # fmt: skip
        validate(_Options, options, "")
        self.task, self.sequence_length, self.seed = task, sequence_length, seed
        self.alignment = _extra_probes(alignment)
        self.exhaustion, self.max_epochs, self.prefetch_steps = exhaustion, max_epochs, prefetch_steps
        needs, name = task.policy.needs, task.policy.config.policy
        if "target_alignment" in needs and task.target is None:
            raise ConfigError(f"mixture policy {name!r} follows a target and there is none; give target=")
        if task.reference is not None and not isinstance(task.reference, nn.Module):
            raise ConfigError(f"reference is a {type(task.reference).__name__}; give a model (torch.nn.Module)")
        if "reference_losses" in needs and task.reference is None:
            raise ConfigError(f"mixture policy {name!r} needs the losses of a reference model; give reference=")
        self.sequences_D = sequence_counts(task.sources, sequence_length, task.domains)
        task.policy.init(task.setting)
        example = task.sources[0].read(0, sequence_length + 1)
        self.dataset = SlotDataset(uuid.uuid4().hex, example, sum(self.sequences_D), self)

    @classmethod
    def of(
        cls,
        sources: Mapping[str, Tokens] | PreparedData | str | Path,
        policy: str | Mapping[str, Any] = "dga",
        *,
        target: Tokens | None = None,
        sequence_length: int,
        seed: int = 0,
        update_every_steps: int | None = None,
        reference: nn.Module | None = None,
        alignment: AlignmentConfig | Mapping[str, Any] | None = None,
        exhaustion: Exhaustion = "repeat",
        max_epochs: float | None = None,
        prefetch_steps: int = 0,
    ) -> OnlineMixture:
        """A mixture of token sources, or of the domains of a folder that `weftlm prepare` wrote.

        Args:
            sources: tokens by domain name, or prepared data or its folder.
            policy: its name, or `{"policy": name, ...}` as in a recipe's `mixture` section.
            target: tokens the mixture is steered towards; absent, those of the prepared data.
            sequence_length: T, tokens predicted per sequence.
            seed: of the draw and the probes.
            update_every_steps: T_r, optimizer steps between two updates; absent, what the policy's section says.
            reference: a frozen model for policies that compare losses with it.
            alignment: a recipe's `alignment` section.
            exhaustion: see `OnlineMixture`.
            max_epochs: see `OnlineMixture`.
            prefetch_steps: see `OnlineMixture`.
        Raises:
            ConfigError: no domain, an unknown policy or option, or a policy that needs what is not given.
            DataError: tokens that cannot be read, or too few.
        """
        if not isinstance(policy, str | Mapping):
            raise ConfigError(f"policy is {policy!r:.60}; give a policy's name or its section, a mapping")
        section: dict[str, Any] = {"policy": policy} if isinstance(policy, str) else dict(policy)
        if update_every_steps is not None:
            section["update_every_steps"] = update_every_steps
        built = build_policy(section, "policy")
        goal = None if target is None else _source(target, "target")
        if isinstance(sources, Mapping):
            names: list[Any] = list(sources)
            if unnamed := [name for name in names if not isinstance(name, str)]:
                raise ConfigError(f"sources names a domain {unnamed[0]!r:.60}; domains are named by text")
            if not sources:
                raise ConfigError("sources holds no domain; give tokens by domain name")
            read = {name: _source(tokens, f"domain {name!r}") for name, tokens in sources.items()}
            sizes_D = torch.tensor([len(source) for source in read.values()], dtype=torch.float64)
            setting = MixtureSetting(domains=tuple(read), tokens_D=sizes_D)
            task = Task(tuple(read), tuple(read.values()), built, setting, goal, reference)
        elif not isinstance(sources, PreparedData | str | Path):
            raise ConfigError(
                f"sources is a {type(sources).__name__}; give tokens by domain name, or prepared data or its folder"
            )
        else:
            data = sources if isinstance(sources, PreparedData) else PreparedData.load(sources)
            task = training_task(data, built, reference)
            task = task if goal is None else dataclasses.replace(task, target=goal)
        return cls(
            task, sequence_length=sequence_length, seed=seed, alignment=alignment,
            exhaustion=exhaustion, max_epochs=max_epochs, prefetch_steps=prefetch_steps,
        )  # fmt: skip

    @property
    def identity(self) -> str:
        """Hash of what decides the draws and the updates; a state of another identity is refused."""
        return hashlib.blake2b(json.dumps(self.settings).encode(), digest_size=16).hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """What `identity` is of."""
        task = self.task
        sources = zip(task.domains, task.sources, strict=True)
        return {
            "policy": task.policy.config.model_dump(mode="json"),
            "domains": [[name, source.fingerprint] for name, source in sources],
            "target": None if task.target is None else task.target.fingerprint,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "alignment": self.alignment.model_dump(mode="json"),
        }

    def start(
        self, model: nn.Module, share: Share, *, bf16: bool = False, saved: Mapping[str, Any] | None = None
    ) -> MixtureRun:
        """Begin training, or go on from a state that `MixtureRun.state_dict` gave.

        Raises:
            ConfigError: batch, processes, model and policy do not fit each other.
            CheckpointError: the state is of another mixture, or torn.
        """
        return MixtureRun(self, model, share, bf16=bf16, saved=saved)


@dataclass(frozen=True)
class Share:
    """How a batch is cut.

    Attributes:
        batch_sequences: B, sequences per optimizer step over all processes.
        micro_batch: sequences per backward pass of one process.
        rank: this process.
        num_processes: processes that share each batch.
    """

    batch_sequences: int
    micro_batch: int
    rank: int = 0
    num_processes: int = 1


@dataclass(frozen=True)
class Update:
    """One update of the mixture.

    Attributes:
        step: optimizer steps taken.
        weights_D: the mixture from this step on.
        alignment: what was measured for it; None for policies that need none.
        losses_D: mean training loss per domain since the last update; None for policies that need none.
    """

    step: int
    weights_D: Tensor
    alignment: Alignment | None
    losses_D: Tensor | None


class MixtureRun:
    """One training run on an online mixture.

    A step of the loop around it:

        for _ in range(micro-batches):
            tokens_BT1 = run.take()
            ...forward, run.observe(token losses) if run.metering, backward...
        norm = ...norm of the gradient before clipping, if run.norm_needed_at(step)...
        optimizer.step(), gradients to zero
        update = run.finish_step(optimizer, norm)

    Attributes:
        state: the policy's.
        metering: whether the policy wants the training losses by domain.
    """

    def __init__(
        self, mixture: OnlineMixture, model: nn.Module, share: Share, *, bf16: bool, saved: Mapping[str, Any] | None
    ) -> None:
        task = mixture.task
        self.mixture, self.model, self.share, self._bf16 = mixture, model, share, bf16
        self.device = next(model.parameters()).device
        self.sampler = MixtureSampler(
            mixture.sequences_D, share.batch_sequences, mixture.seed, names=task.domains,
            exhaustion=mixture.exhaustion, max_epochs=mixture.max_epochs,
        )  # fmt: skip
        self.loader = MixtureLoader(
            task.sources, self.sampler, mixture.sequence_length,
            rank=share.rank, world=share.num_processes, prefetch_steps=mixture.prefetch_steps,
        )  # fmt: skip
        self.every = task.policy.config.update_every_steps
        self.metering = bool({"losses", "reference_losses"} & task.policy.needs)
        self.reference = task.reference.to(self.device).eval().requires_grad_(False) if task.reference else None
        self._meter = DomainMeter(len(task.domains), self.device)
        self._counts_D = np.zeros(len(task.domains), dtype=np.int64)
        self._waiting: deque[tuple[Tensor, Tensor]] = deque()  # micro-batches of this step not yet taken
        self._unobserved: deque[tuple[Tensor, Tensor]] = deque()  # micro-batches taken whose losses are to come
        self.probes = AlignmentProbes(
            task.policy, task.setting, task.target, self.loader, mixture.alignment,
            seed=mixture.seed, sequence_length=mixture.sequence_length, micro_batch=share.micro_batch,
            device=self.device, rank=share.rank, world=share.num_processes,
        )  # fmt: skip
        with self._undisturbed():
            self.choice = self.probes.choose(model, accumulation_steps=1, batch_size=share.batch_sequences)
        self.state = task.policy.init(task.setting)
        self.loader.set_weights(0, task.policy.weights(self.state).numpy())
        self._finished = 0
        if saved is not None:
            self._resume(saved)
        self._meter_state = self._read_meter()

    # -- what the loop asks -------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps finished."""
        return self._finished

    @property
    def weights_D(self) -> Tensor:
        """The mixture in force, float64."""
        return self.mixture.task.policy.weights(self.state)

    def weights(self) -> dict[str, float]:
        """The mixture in force, by domain."""
        return dict(zip(self.mixture.task.domains, self.weights_D.tolist(), strict=True))

    def epochs(self) -> dict[str, float]:
        """How often each domain has been read."""
        return dict(zip(self.mixture.task.domains, self.sampler.epochs_D().tolist(), strict=True))

    def groups(self) -> tuple[str, ...]:
        """Names of what alignments are measured for: domains, or basis distributions."""
        if "basis" in self.mixture.task.policy.needs:
            return tuple(f"basis {index}" for index in range(len(self.probes.groups_GD)))
        return self.mixture.task.domains

    def norm_needed_at(self, step: int) -> bool:
        """Whether the update after `step` optimizer steps wants the norm of that step's gradient, unclipped."""
        return self.probes.kind is not None and self.probes.normalize == "scale" and step % self.every == 0

    def exhausted(self) -> bool:
        """Whether the repetition caps leave too little for another batch."""
        if self.mixture.exhaustion == "repeat":
            return False
        try:
            self.sampler.copy().draw()
        except SamplerExhausted:
            return True
        return False

    def take(self) -> Tensor:
        """This process's next micro-batch, int64 of shape (micro_batch, T + 1).

        Raises:
            ConfigError: it belongs to the step after the one in progress.
            SamplerExhausted: the repetition caps let no further batch be filled.
        """
        if not self._waiting:
            if self.sampler.step > self._finished:
                raise ConfigError(
                    f"more micro-batches were asked for in step {self._finished} than a batch of "
                    f"{self.share.batch_sequences} sequences has; the loop accumulates over another number of them"
                )
            batch = self.loader.next()
            self._counts_D += np.bincount(batch.draw.domains_B, minlength=len(self._counts_D))
            size = self.share.micro_batch
            parts = zip(batch.tokens_BT1.split(size), torch.from_numpy(batch.domains_B).split(size), strict=True)
            self._waiting.extend(parts)
        taken = self._waiting.popleft()
        if self.metering:
            self._unobserved.append(taken)
        return taken[0]

    def observe(self, losses_of: Callable[[Tensor], Tensor]) -> None:
        """Meter the training losses of the oldest micro-batch taken and not yet observed.

        Args:
            losses_of: called with its tokens_BT1, gives losses_BT, nats per token.
        Raises:
            ConfigError: every micro-batch taken has been observed already.
        """
        if not self._unobserved:
            raise ConfigError("the model ran in training mode more often than it was given batches of the mixture")
        tokens_BT1, domains_B = self._unobserved.popleft()
        tokens_BT1 = tokens_BT1.to(self.device)
        with torch.no_grad():
            losses_BT = losses_of(tokens_BT1)
            reference_BT = None if self.reference is None else token_losses(self.reference, tokens_BT1)
        self._meter.add(domains_B, losses_BT, reference_BT)

    def finish_step(self, optimizer: Any, gradient_norm: float | None = None) -> Update | None:
        """Tell of an optimizer step; after every T_r of them, measure what the policy needs and let it update.

        The gradients, the optimizer, the modules' modes and the random generators are left as they are.

        Args:
            optimizer: for `precondition: adam`.
            gradient_norm: of the step's gradient over the whole batch, before clipping; see `norm_needed_at`.
        Returns:
            the update, in force from the next batch on; None between updates.
        Raises:
            ConfigError: the step did not train on the batch it should have.
            NumericsError: a measured number is not finite.
        """
        self._finished += 1
        if self._waiting or self._unobserved or self.sampler.step != self._finished:
            raise ConfigError(
                f"step {self._finished} ended after the mixture delivered {self.sampler.step} batches, "
                f"{len(self._waiting)} micro-batches short and {len(self._unobserved)} without losses; train on every "
                "micro-batch exactly once, with the model in training mode"
            )
        update = self._update(optimizer, gradient_norm) if self._finished % self.every == 0 else None
        self._meter_state = self._read_meter()
        return update

    def close(self) -> None:
        """End background reading."""
        self.loader.close()

    # -- the update ---------------------------------------------------------------------------------------------

    def _update(self, optimizer: Any, gradient_norm: float | None) -> Update:
        task = self.mixture.task
        alignment = None
        if self.choice is not None:
            with self._undisturbed():
                direction = self.probes.direction(
                    self.model, self._finished, optimizer, trainable_parameters(self.model)
                )
                alignment = self.probes.measure(self.choice.estimator, self.model, self._finished, direction)
            alignment = self.probes.for_policy(alignment, gradient_norm)
        measured = self._meter.report(self._ranks) if self.metering else None
        report = Report(
            step=self._finished,
            tokens_D=torch.from_numpy(self._counts_D).double() * self.mixture.sequence_length,
            losses_D=None if measured is None else measured.losses_D,
            reference_losses_D=None if measured is None else measured.reference_losses_D,
            excess_losses_D=None if measured is None else measured.excess_losses_D,
            alignment=alignment,
        )
        self.state = task.policy.update(self.state, report)
        self._counts_D[:] = 0
        weights_D = task.policy.weights(self.state)
        self.loader.set_weights(self._finished, weights_D.numpy())
        return Update(self._finished, weights_D, alignment, report.losses_D)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """The run's precision, random generators put back, compiled models run as they are written."""
        with ExitStack() as exits:
            exits.enter_context(torch.random.fork_rng([self.device] if self.device.type == "cuda" else []))
            exits.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16))
            if any(module._compiled_call_impl is not None for module in self.model.modules()):
                exits.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    # -- state --------------------------------------------------------------------------------------------------

    @property
    def _ranks(self) -> Accelerator:
        """What the meter reads of an accelerator: the number of processes."""
        return cast(Accelerator, self.share)

    def _read_meter(self) -> dict[str, Any] | None:
        """Sums over all processes: taken after every step where there are several, because only one of them saves."""
        return self._meter.state_dict(self._ranks) if self.metering and self.share.num_processes > 1 else None

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on, as JSON values, exact to the last bit; on any one process.

        Between two steps only: of a step in progress nothing is kept.
        """
        meter = self._meter_state
        if self.metering and meter is None:
            meter = self._meter.state_dict(self._ranks)
        return {
            "identity": self.mixture.identity,
            "settings": self.mixture.settings,
            "sampler": self.loader.state_dict(),
            "policy": state_to_json(self.state),
            "sequences": self._counts_D.tolist(),
            "meter": meter,
        }

    def _resume(self, saved: Mapping[str, Any]) -> None:
        try:
            if saved["identity"] != self.mixture.identity:
                raise CheckpointError(
                    f"the checkpoint is of another mixture ({differences(saved['settings'], self.mixture.settings)}); "
                    "resume with the same, or start a training anew from the checkpoint's model"
                )
            self.loader.load_state_dict(saved["sampler"])
            self.state = state_from_json(self.state, saved["policy"])
            self._counts_D[:] = saved["sequences"]
            if self.metering:
                self._meter.load_state_dict(saved["meter"], keep=self.share.rank == 0)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the state of the mixture cannot be read: {reason(error)}; use an earlier checkpoint"
            ) from error
        self._finished = self.sampler.step


def gradient_norm(parameters: Any, clip: float | None = None) -> float:
    """Clip gradients to a global norm, or only measure it; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return float(whole)


def _extra_probes(alignment: AlignmentConfig | Mapping[str, Any] | None) -> AlignmentConfig:
    config = alignment
    if not isinstance(config, AlignmentConfig):
        config = validate(AlignmentConfig, {} if config is None else config, "alignment")
    if config.probe == "batch" or config.estimator == "cumulative":
        raise ConfigError(
            f"alignment asks for estimator {config.estimator} with probe {config.probe}; measuring on the training "
            "batch needs weftlm's own loop: leave both out, or choose separate, shadow or finite_difference with extra"
        )
    return config.model_copy(update={"probe": "extra"})


def _source(tokens: Tokens, what: str) -> Source:
    if isinstance(tokens, datasets.Dataset):
        if "input_ids" not in tokens.column_names:
            raise DataError(
                f"{what} is a dataset with the columns {', '.join(tokens.column_names)}; it must have input_ids, so "
                "tokenise it first"
            )
        rows = tokens["input_ids"]
        for number, row in enumerate(rows):
            if not isinstance(row, list | np.ndarray | torch.Tensor):
                raise DataError(f"{what}: input_ids of row {number} is {row!r:.60}; it must be a list of token ids")
        try:
            return ArraySource(np.concatenate([ArraySource(row).read(0, len(row)) for row in rows]) if rows else [])
        except DataError as error:
            raise DataError(f"{what}, column input_ids: {error}") from error
    if isinstance(tokens, Source):
        return tokens
    try:
        return ArraySource(cast(ArrayLike, tokens))
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


class _Options(Section):
    """What `OnlineMixture` takes beside a task: as in a recipe."""

    sequence_length: int = Field(ge=1, strict=True)
    seed: Seed
    exhaustion: Exhaustion
    max_epochs: PositiveFloat | None
    prefetch_steps: NonNegativeInt
