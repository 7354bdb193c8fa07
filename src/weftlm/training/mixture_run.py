"""One training run on an online mixture: what to train on next, and how training moves the mixture.

The training loop has a mixture run, and so has the callback that puts a mixture into other trainers
(`weftlm.integrations`): draws, probes and updates are the same under both, number for number. A step:

    run.begin_step(optimizer)                   # v, at steps whose update measures on the training batch
    batch = run.draw()
    with run.batch_probe() as probe:
        ...forward, run.meter(domains, tokens, losses), backward
    optimizer.step()
    update = run.finish_step(optimizer, norm, ...)   # every T_r steps: measure, update, change the weights

Alignments are measured on the training batch, or on sequences drawn for the purpose; those cost no training tokens, and
their draws are a function of (seed, step):

    v         the gradient on the target's sequences, or on sequences of all domains in equal shares
    <g_i, v>  for every group i: a domain, or a distribution over domains

Its state is the sampler's, the policy's and the sums of losses since the last update; all of it is JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from weftlm.config import Section
from weftlm.corpora.source import Source
from weftlm.errors import CheckpointError, ConfigError, reason
from weftlm.mixture.loader import Batch, MixtureLoader, sequence_counts
from weftlm.mixture.policy import (
    Alignment,
    MixturePolicy,
    MixtureSetting,
    Report,
    build_policy,
    state_from_json,
    state_to_json,
)
from weftlm.mixture.sampler import Exhaustion, MixtureSampler
from weftlm.models.hf import sequence_losses, token_losses
from weftlm.training import alignment as align
from weftlm.training.alignment import Direction
from weftlm.training.config import AlignmentConfig, derive_seed
from weftlm.training.estimators.contract import BatchProbe
from weftlm.training.estimators.direction import sum_over_ranks


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
        domains: names, in order.
        sources: training tokens of each domain.
        policy: the mixture policy.
        setting: what the policy knows of the domains before training.
        target: the target's training tokens; None where no policy asks for them.
        reference: a frozen reference model for policies that need its losses.
    """

    domains: tuple[str, ...]
    sources: tuple[Source, ...]
    policy: MixturePolicy[Any, Any]
    setting: MixtureSetting
    target: Source | None = None
    reference: nn.Module | None = None

    @classmethod
    def of_one(cls, name: str, source: Source) -> Task:
        """A task of a single domain."""
        setting = MixtureSetting((name,), torch.tensor([len(source)], dtype=torch.float64))
        return cls((name,), (source,), build_policy({"policy": "uniform"}), setting)

    def check_needs(self, *, target: str, reference: str) -> None:
        """Refuse a task that lacks what its policy needs; `target` and `reference` say where these are given.

        Raises:
            ConfigError: the target or the reference model is missing.
        """
        needs, name = self.policy.needs, self.policy.config.policy
        if "target_alignment" in needs and self.target is None:
            raise ConfigError(f"mixture policy {name!r} follows a target and there is none; give {target}")
        if "reference_losses" in needs and self.reference is None:
            raise ConfigError(f"mixture policy {name!r} needs the losses of a reference model; give {reference}")


class MixtureOptions(Section):
    """How a task's batches are drawn and its alignments measured."""

    sequence_length: int = Field(ge=1, strict=True, description="T, tokens predicted per sequence")
    seed: int = Field(0, ge=0, lt=2**63, description="random seed of the draw and the probes")
    alignment: AlignmentConfig = Field(default_factory=AlignmentConfig, description="measurement of alignments")
    exhaustion: Exhaustion = Field(
        "repeat", description="when a domain has been read `max_epochs` times: repeat it, drop it, or stop"
    )
    max_epochs: PositiveFloat | None = Field(None, description="repetition cap per domain, with drop or stop")


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


class MixtureRun:
    """The draw, the measurements and the policy of one training.

    Args:
        task: domains, sources, policy, target and reference model (moved to the model's device).
        model: the model in training, not wrapped for data parallelism.
        share: batch size, and this process's part.
        options: how batches are drawn and alignments measured.
        bf16: whether training runs under bfloat16 autocast; probes do then too.
        metering: whether training losses are metered by domain; absent: where the policy needs them.

    Attributes:
        state: the policy's.
        step: optimizer steps finished.
        choice: the estimator; None for policies that need no alignment.
        groups_GD: each group's distribution over the domains, float64.
    Raises:
        ConfigError: batch, processes, model and policy do not fit each other.
        DataError: a source is too short for one sequence.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        share: Share,
        options: MixtureOptions,
        *,
        bf16: bool = False,
        metering: bool | None = None,
    ) -> None:
        self.task, self.model, self.share, self.options, self._bf16 = task, model, share, options, bf16
        self.device = next(model.parameters()).device
        self.sampler = MixtureSampler(
            sequence_counts(task.sources, options.sequence_length, task.domains),
            share.batch_sequences, options.seed, names=task.domains,
            exhaustion=options.exhaustion, max_epochs=options.max_epochs,
        )  # fmt: skip
        self.loader = MixtureLoader(
            task.sources, self.sampler, options.sequence_length, rank=share.rank, world=share.num_processes
        )
        self.every = task.policy.config.update_every_steps
        needed = bool({"losses", "reference_losses"} & task.policy.needs)
        self.metering = needed if metering is None else metering
        self.reference = None
        if task.reference is not None:
            self.reference = task.reference.to(self.device).eval().requires_grad_(False)
        # By domain since the last report: sequences, and sums of their losses, the reference's and the excess over it.
        self._sums_4D = torch.zeros(4, len(task.domains), dtype=torch.float64, device=self.device)
        self._counts_D = np.zeros(len(task.domains), dtype=np.int64)
        self.groups_GD = torch.eye(len(task.domains), dtype=torch.float64)
        if "basis" in task.policy.needs and task.setting.basis_ND is not None:
            self.groups_GD = task.setting.basis_ND
        self.normalize = getattr(task.policy.config, "normalize", None)
        self._targets = self._target_loader()
        with self._undisturbed():
            self.choice = align.choose_for_policy(
                task.policy, options.alignment, model=model, groups=len(self.groups_GD), losses=sequence_losses,
                batch_size=share.batch_sequences,
            )  # fmt: skip
        self.state = task.policy.init(task.setting)
        state_to_json(self.state)  # a state that no checkpoint can hold is refused before training
        self.sampler.set_weights(0, task.policy.weights(self.state).numpy())
        self.step = 0
        self._direction: Direction | None = None
        self._domains_B = torch.zeros(0, dtype=torch.int64)

    def _target_loader(self) -> MixtureLoader | None:
        """Draws the target's sequences in turn; None for policies that follow no target."""
        target, options = self.task.target, self.options
        if target is None or "target_alignment" not in self.task.policy.needs:
            return None
        counts = sequence_counts([target], options.sequence_length, ["target"])
        size = min(counts[0], options.alignment.target_sequences)
        sampler = MixtureSampler(counts, size, derive_seed(options.seed, "target"))
        return MixtureLoader((target,), sampler, options.sequence_length)

    # -- what is known --------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, float]:
        """The mixture in force, by domain."""
        return dict(zip(self.task.domains, self.task.policy.weights(self.state).tolist(), strict=True))

    def epochs(self) -> dict[str, float]:
        """How often each domain has been read."""
        return dict(zip(self.task.domains, self.sampler.epochs_D().tolist(), strict=True))

    def groups(self) -> tuple[str, ...]:
        """Names of what alignments are measured for: domains, or basis distributions."""
        if "basis" in self.task.policy.needs:
            return tuple(f"basis {index}" for index in range(len(self.groups_GD)))
        return self.task.domains

    def never_updates(self, total_steps: int) -> str | None:
        """A warning where training is too short for a single update; None otherwise."""
        policy = self.task.policy
        if self.every <= total_steps or not policy.needs - {"target_histogram", "basis"}:
            return None
        return (
            f"mixture policy {policy.config.policy} updates every {self.every} steps and training takes {total_steps}: "
            "it never will"
        )

    # -- a step ---------------------------------------------------------------------------------------------------

    def begin_step(self, optimizer: Any) -> None:
        """Take v, where the update after the coming step measures alignments on its batch; call it at every step.

        Raises:
            NumericsError: it is not finite.
        """
        if (self.step + 1) % self.every == 0 and self.choice is not None and self.choice.probe == "batch":
            with self._undisturbed():
                self._direction = self._take_direction(optimizer)

    def batch_probe(self) -> AbstractContextManager[BatchProbe | None]:
        """A block around the micro-batches of a step: what measures each of them, or None where nothing does."""
        if self._direction is None or self.choice is None:
            return nullcontext()
        return align.estimators[self.choice.estimator]().on_batch(self.model, self._direction)

    def draw(self) -> Batch:
        """This process's part of the next batch; stratified where alignments are measured on it.

        Raises:
            SamplerExhausted: the repetition caps let no further batch be filled.
        """
        least = 0 if self._direction is None else self.options.alignment.min_sequences_per_domain
        batch = self.loader.next(min_per_domain=least)
        self._counts_D += np.bincount(batch.draw.domains_B, minlength=len(self._counts_D))
        self._domains_B = torch.from_numpy(batch.domains_B)
        return batch

    def meter(self, domains_B: Tensor, tokens_BT1: Tensor, losses_BT: Tensor) -> None:
        """Add the training losses of a micro-batch, and the reference model's on the same tokens."""
        losses_BT, domains_B = losses_BT.detach(), domains_B.to(self.device)
        rows = [torch.ones(len(domains_B), dtype=torch.float64, device=self.device), losses_BT.double().mean(1)]
        if self.reference is not None:
            with torch.no_grad():
                reference_BT = token_losses(self.reference, tokens_BT1)
            rows += [reference_BT.double().mean(1), (losses_BT - reference_BT).clamp(min=0).double().mean(1)]
        for row, values_B in enumerate(rows):
            self._sums_4D[row].index_add_(0, domains_B, values_B)

    def finish_step(
        self, optimizer: Any, gradient_norm: float | None = None, dots_B: Tensor | None = None
    ) -> Report | None:
        """Count an optimizer step; after every T_r of them, measure what the policy needs and let it update.

        The gradients, the optimizer, the modules' modes and the random generators are left as they are.

        Args:
            optimizer: the optimizer, for `precondition: adam`.
            gradient_norm: norm of the step's gradient over the whole batch, before clipping.
            dots_B: derivative of each sequence of the batch drawn last, from `batch_probe`.
        Returns:
            what the update rests on, whose weights are in force from the next batch on; None between updates.
        Raises:
            NumericsError: a measured number is not finite.
        """
        self.step += 1
        direction, self._direction = self._direction, None
        if self.step % self.every:
            return None
        alignment = None
        if self.choice is not None:
            if direction is None:
                with self._undisturbed():
                    alignment = self._measure(self.choice.estimator, self._take_direction(optimizer))
            else:
                assert dots_B is not None
                alignment = align.group_alignment(dots_B, self._domains_B, len(self.groups_GD), direction)
            # Only some estimators measure norms: eta must mean the same whichever was chosen, so they stay only where
            # the policy asked for them.
            norms_G = alignment.norms_G if self.normalize == "cosine" else None
            alignment = replace(alignment, norms_G=norms_G, batch_norm=gradient_norm)
        report = Report(
            step=self.step,
            tokens_D=torch.from_numpy(self._counts_D).double() * self.options.sequence_length,
            alignment=alignment,
            **(self._mean_losses() if self.metering else {}),
        )
        self.state = self.task.policy.update(self.state, report)
        self._counts_D[:] = 0
        self.sampler.set_weights(self.step, self.task.policy.weights(self.state).numpy())
        return report

    def _mean_losses(self) -> dict[str, Tensor]:
        """Mean losses over all ranks since the last report, NaN where nothing was drawn; starts the next interval."""
        sums_4D = self._summed_losses()
        self._sums_4D.zero_()
        means = dict(zip(("losses_D", "reference_losses_D", "excess_losses_D"), sums_4D[1:] / sums_4D[0], strict=True))
        return means if self.reference is not None else {"losses_D": means["losses_D"]}

    def _summed_losses(self) -> Tensor:
        return sum_over_ranks(self._sums_4D.clone()).cpu()

    def _take_direction(self, optimizer: Any) -> Direction:
        """v after so many steps; preconditioned where the policy asks, from the first step on."""
        if self._targets is not None:
            drawn = self._targets.sampler.probe(self.step, None, self._targets.sampler.batch_size)
            tokens = self._targets.probe_tokens(drawn)
        else:
            domains = len(self.task.domains)
            even = np.full((1, domains), 1.0 / domains)
            drawn = self.sampler.probe(2 * self.step + 1, even, self.options.alignment.target_sequences)
            tokens = self.loader.probe_tokens(drawn)
        found = align.gradient_direction(
            self.model, sequence_losses, self._mine(tokens).to(self.device), micro_batch=self.share.micro_batch
        )
        if self.step == 0 or getattr(self.task.policy.config, "precondition", "none") != "adam":
            return found
        return align.precondition(found, optimizer, align.trainable_parameters(self.model))

    def _measure(self, estimator: str, direction: Direction) -> Alignment:
        """<g_i, v> of every group on sequences drawn after so many steps."""
        config = self.options.alignment
        drawn = self.sampler.probe(2 * self.step, self.groups_GD.numpy(), config.sequences_per_group)
        tokens, groups = self.loader.probe_tokens(drawn), torch.from_numpy(drawn.groups_N)
        probe = align.Probe(
            self.model, sequence_losses, self._mine(tokens).to(self.device), self._mine(groups),
            len(self.groups_GD), direction, self.share.micro_batch,
        )  # fmt: skip
        return align.estimators[estimator]().measure(probe)

    def _mine(self, rows: Tensor) -> Tensor:
        """This rank's rows of a probe; sums and counts are reduced over ranks afterwards."""
        return rows[self.share.rank :: self.share.num_processes]

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """The run's precision, random generators put back, compiled models run as they are written.

        Hooks that an estimator adds would not be seen by code compiled before.
        """
        with ExitStack() as exits:
            exits.enter_context(torch.random.fork_rng([self.device] if self.device.type == "cuda" else []))
            exits.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16))
            if any(module._compiled_call_impl is not None for module in self.model.modules()):
                exits.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    # -- state ----------------------------------------------------------------------------------------------------

    def meter_state(self) -> dict[str, Any] | None:
        """Sums of losses over all processes; every process must ask. None where losses are not metered."""
        return {"sums": self._summed_losses().tolist()} if self.metering else None

    def state_dict(self, meter: dict[str, Any] | None) -> dict[str, Any]:
        """Everything the rest of the run depends on, as JSON values, exact to the last bit.

        Between two steps only: of a step in progress nothing is kept.

        Args:
            meter: what `meter_state` gave after the last step.
        """
        return {
            "sampler": self.sampler.state_dict(),
            "policy": state_to_json(self.state),
            "sequences": self._counts_D.tolist(),
            "meter": meter,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            CheckpointError: the state is of another draw or policy, or torn.
        """
        try:
            self.sampler.load_state_dict(saved["sampler"])
            self.state = state_from_json(self.state, saved["policy"])
            self._counts_D[:] = saved["sequences"]
            if self.metering:
                sums_4D = torch.tensor(saved["meter"]["sums"], dtype=torch.float64)  # kept by one rank alone
                self._sums_4D.copy_(sums_4D if self.share.rank == 0 else torch.zeros_like(sums_4D))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the state of the mixture cannot be read: {reason(error)}; use an earlier checkpoint"
            ) from error
        self.step = self.sampler.step
