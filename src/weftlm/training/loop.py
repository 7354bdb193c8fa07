"""The training loop: ordinary optimizer steps on batches drawn by an online mixture.

One step reads as a sentence: draw a batch by the mixture, take a gradient step on it, and every T_r steps measure what
the policy needs, let it update, and give the sampler its new weights from the next step on. All of a run's state is in
the weights, the optimizer's moments, the sampler, the policy and the step number; random numbers of a step are a
function of (seed, step, rank), so a run killed at any moment continues to the same bits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from weftlm import interrupt
from weftlm.corpora.source import Source
from weftlm.errors import CheckpointError, ConfigError, NumericsError
from weftlm.mixture.loader import Batch, MixtureLoader, sequence_counts
from weftlm.mixture.policy import (
    Alignment,
    MixturePolicy,
    MixtureSetting,
    Report,
    state_from_json,
    state_to_json,
)
from weftlm.mixture.sampler import MixtureSampler, SamplerExhausted
from weftlm.models.hf import token_losses
from weftlm.progress import TrainingDisplay
from weftlm.threads import follow_load
from weftlm.training import alignment as align
from weftlm.training.alignment import Direction
from weftlm.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from weftlm.training.config import AlignmentConfig, TrainingConfig, derive_seed, learning_rate
from weftlm.training.meter import DomainMeter
from weftlm.training.metrics import METRICS, MetricsLog, check_metrics
from weftlm.training.parallel import shard, units, whole
from weftlm.training.probes import AlignmentProbes
from weftlm.training.runtime import Runtime
from weftlm.training.state import adamw, dump_tensors, load_tensors, save_model

__all__ = ["Evaluate", "Task", "Trainer", "TrainingResult", "adamw", "dump_tensors", "load_tensors"]

log = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module], Mapping[str, Any]]


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
    policy: MixturePolicy[Any]
    setting: MixtureSetting
    target: Source | None = None
    reference: nn.Module | None = None


@dataclass
class TrainingResult:
    """What a finished (or cleanly stopped) run knows.

    Attributes:
        step: optimizer steps taken.
        tokens: tokens trained on.
        weights: final mixture by domain.
        epochs: passes over each domain's tokens.
        seconds: wall time by part: train, alignment, eval, save; this process only.
        stopped_early: why training ended before its last step, or None.
    """

    step: int
    tokens: int
    weights: dict[str, float]
    epochs: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    stopped_early: str | None = None


class Trainer:
    """Trains one model on an online mixture.

    Args:
        model: a causal language model, in memory on the CPU.
        task: domains, sources, policy and target.
        config: the recipe's `training` section.
        alignment: the recipe's `alignment` section.
        runtime: device, precision and compilation, from `choose_runtime`.
        folder: the run folder; checkpoints and metrics.jsonl go there.
        seed: of the sampler, the probes and dropout.
        evaluate: called with the model every `evaluate_every_steps`; its result is logged.
        evaluate_every_steps: 0 evaluates never.
        identity: fingerprint of what is trained; a checkpoint of another identity is refused.
        sinks: further receivers of metric lines.
        may_shard: the caller can work with a model whose parameters are split over processes: it calls the trainer,
            `evaluate` and `save_model` on every rank and reads no parameter itself.

    Raises:
        ConfigError: batch, processes and domains do not fit each other, or the policy needs what the task lacks.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainingConfig,
        *,
        alignment: AlignmentConfig,
        runtime: Runtime,
        folder: Path,
        seed: int,
        evaluate: Evaluate | None = None,
        evaluate_every_steps: int = 0,
        identity: str = "",
        sinks: tuple[Any, ...] = (),
        may_shard: bool = False,
    ) -> None:
        self.task, self.config, self.alignment_config, self.runtime = task, config, alignment, runtime
        self.folder, self.seed, self.identity = folder, seed, identity
        self.evaluate, self.evaluate_every_steps = evaluate, evaluate_every_steps
        self.accelerator = Accelerator(cpu=runtime.device.type == "cpu")
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.local_batch, self.micro_batch = config.local_batch(self.world), config.micro_batch(self.world)
        self.sharded = config.sharded(self.world)
        if self.sharded and not may_shard:
            raise ConfigError(
                "training.parallel: fsdp2 splits the model of `weftlm train`; adapters and gates are small, and what "
                "makes them reads them whole: use parallel: ddp there"
            )
        self._place(model, task.reference)
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.parameters, config)

        self.sampler = MixtureSampler(
            sequence_counts(task.sources, config.sequence_length, task.domains),
            config.batch_sequences, seed, names=task.domains,
            exhaustion=config.exhaustion, max_epochs=config.max_epochs,
        )  # fmt: skip
        self.loader = MixtureLoader(
            task.sources, self.sampler, config.sequence_length,
            rank=self.rank, world=self.world, prefetch_steps=config.prefetch_steps,
        )  # fmt: skip
        self.every = task.policy.config.update_every_steps
        self._check_needs()
        self.probes = AlignmentProbes(
            task.policy, task.setting, task.target, self.loader, alignment,
            seed=seed, sequence_length=config.sequence_length, micro_batch=self.micro_batch,
            device=self.device, rank=self.rank, world=self.world,
        )  # fmt: skip
        self.choice = self._choose_estimator()
        self.meter = DomainMeter(len(task.domains), self.device)
        self.state = task.policy.init(task.setting)
        self.loader.set_weights(0, task.policy.weights(self.state).numpy())
        self.step = 0
        self.evaluated_step = -1
        self.stopping = False
        self.seconds = {"train": 0.0, "alignment": 0.0, "eval": 0.0, "save": 0.0}
        self._warn_of_what_cannot_happen()
        self._resume()
        self.metrics = MetricsLog(
            folder / METRICS, resume_step=self.step, sinks=sinks, enabled=self.accelerator.is_main_process
        )

    # -- set-up -------------------------------------------------------------------------------------------------

    def _place(self, model: nn.Module, reference: nn.Module | None) -> None:
        """Bring the models to the device: whole, or this rank's part of them."""
        self.module, self.model, self.reference = model, model, reference
        if reference is not None:
            reference.eval().requires_grad_(False)
        if self.sharded:
            how: dict[str, Any] = {"device": self.device, "bf16": self.runtime.bf16}
            shard(model, compiled=self.runtime.compile, **how)
            if reference is not None:
                shard(reference, trained=False, **how)
            return
        model.to(self.device)
        if self.runtime.compile:
            model.compile()
        self.model = self.accelerator.prepare_model(model)
        if reference is not None:
            reference.to(self.device)

    def _check_needs(self) -> None:
        needs = self.task.policy.needs
        name = self.task.policy.config.policy
        if "target_alignment" in needs and self.task.target is None:
            raise ConfigError(f"mixture policy {name!r} follows a target and the data has none; give data.target")
        if "reference_losses" in needs and self.reference is None:
            raise ConfigError(f"mixture policy {name!r} needs a reference model; give mixture.reference a run folder")

    def _warn_of_what_cannot_happen(self) -> None:
        total, name = self.config.total_steps, self.task.policy.config.policy
        if self.task.policy.needs - {"target_histogram", "basis"} and self.every > total:
            log.warning(
                "mixture policy %s updates every %d steps and training takes %d: it never will", name, self.every, total
            )
        warmup = self.config.warmup_steps
        if warmup >= total:
            log.warning("warm-up takes %d of %d steps: the peak learning rate is never reached", warmup, total)

    def _choose_estimator(self) -> align.Choice | None:
        choice = self.probes.choose(
            self.module,
            accumulation_steps=math.ceil(self.local_batch / self.micro_batch),
            batch_size=self.config.batch_sequences,
        )
        if choice is not None:
            log.info("alignment estimator %s on %s: %s", choice.estimator, choice.probe, choice.reason)
        return choice

    # -- state --------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        checkpoint = latest_checkpoint(self.folder / "checkpoints")
        if checkpoint is None:
            return
        if checkpoint.state["identity"] != self.identity:
            raise CheckpointError(
                f"{self.folder} holds a run of another recipe or other data; choose another run folder, or remove this "
                f"one to start again"
            )
        check_metrics(self.folder / METRICS, checkpoint.state.get("log"))
        load_tensors(self.module, self.optimizer, self.parameters, checkpoint.tensors)
        self.loader.load_state_dict(checkpoint.state["sampler"])
        self.state = state_from_json(self.state, checkpoint.state["policy"])
        self.meter.load_state_dict(checkpoint.state["meter"], keep=self.rank == 0)
        self.seconds = dict(checkpoint.state["seconds"])
        self.step = checkpoint.step
        log.info("continuing from step %d", self.step)

    def save(self) -> None:
        """Write a checkpoint of the present step (every rank calls this; the first writes).

        A sharded model and its optimizer are whole on the CPU of the first rank while it writes, and nowhere else.
        """
        start = time.perf_counter()
        meter = self.meter.state_dict(self.accelerator)
        writes = self.accelerator.is_main_process
        tensors = dump_tensors(self.module, self.optimizer, self.parameters, keep=writes)
        if writes:
            state = {
                "identity": self.identity,
                "seed": self.seed,
                "log": self.metrics.flush(),
                "sampler": self.loader.state_dict(),
                "policy": state_to_json(self.state),
                "meter": meter,
                "seconds": self.seconds,
            }
            save_checkpoint(
                self.folder / "checkpoints", Checkpoint(self.step, tensors, state), keep=self.config.keep_checkpoints
            )
        self.accelerator.wait_for_everyone()
        self.seconds["save"] += time.perf_counter() - start

    def save_model(self, folder: Path) -> None:
        """Write the model as a plain Hugging Face folder (every rank calls this; the first writes)."""
        save_model(self.module, folder, writes=self.accelerator.is_main_process)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.batch_sequences * self.config.sequence_length

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> TrainingResult:
        """Train to the last step (or to exhaustion) and return what is known then.

        Raises:
            NumericsError: the loss or the gradient is not finite; the last good checkpoint stays.
            CheckpointError: a checkpoint cannot be written; the last good one stays.
            Stopped: a process of the run was asked to stop; the last step is in a checkpoint.
        """
        try:
            stopped = self._run()
        finally:
            self.close()
        return TrainingResult(
            step=self.step,
            tokens=self.tokens,
            weights=self._weights_by_domain(),
            epochs=self._epochs_by_domain(),
            seconds=dict(self.seconds),
            stopped_early=stopped,
        )

    def close(self) -> None:
        """End background reading and close metrics.jsonl."""
        self.loader.close()
        self.metrics.close()

    def _run(self) -> str | None:
        """Train to the end; returns why it came early, if it did."""
        total = self.config.total_steps
        if self.step == 0:
            self._log_mixture(None, {})
            self._evaluate()
        self.module.train()
        for choice in self.runtime.choices:
            log.info("%s: %s (%s)", choice.setting, choice.value, choice.reason)
        window_start, window_step = time.perf_counter(), self.step
        with TrainingDisplay(enabled=self.accelerator.is_main_process) as display, interrupt.safe_points():
            while self.step < total:
                follow_load()
                try:
                    loss, norm = self._train_step()
                except SamplerExhausted as error:
                    log.warning("training ends at step %d of %d: %s", self.step, total, error)
                    self.save()
                    return str(error)
                last = self.step == total
                if self.step % self.config.log_every_steps == 0 or last:
                    elapsed = time.perf_counter() - window_start
                    speed = self._tokens_of(self.step - window_step) / max(elapsed, 1e-9)
                    rate = learning_rate(self.config, self.step - 1)
                    self.metrics.write(
                        "train", self.step, self.tokens, loss=loss, lr=rate, grad_norm=norm, tokens_per_second=speed
                    )
                    display.update(self.step, total, self.tokens, loss, speed, self._weights_by_domain())
                    window_start, window_step = time.perf_counter(), self.step
                before = time.perf_counter()
                if self.evaluate_every_steps and (self.step % self.evaluate_every_steps == 0 or last):
                    self._evaluate()
                if self.step % self.config.save_every_steps == 0 or last or self.stopping:
                    self.save()
                if self.stopping and not last:
                    interrupt.stop()
                window_start += time.perf_counter() - before
        return None

    def _train_step(self) -> tuple[float, float]:
        """One optimizer step and, every T_r steps, one policy update; returns the loss and the gradient norm."""
        start = time.perf_counter()
        aligning = 0.0
        updating = (self.step + 1) % self.every == 0
        in_batch = updating and self.choice is not None and self.choice.probe == "batch"
        torch.manual_seed(derive_seed(self.seed, f"step {self.step} rank {self.rank}"))
        direction: Direction | None = None
        if in_batch:
            direction = self._direction()
            aligning += time.perf_counter() - start
        batch = self.loader.next(min_per_domain=self.alignment_config.min_sequences_per_domain if in_batch else 0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        loss, dots_B, order_B = self._backward(batch, direction)
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)))
        self._require_finite(loss, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if updating:
            before = time.perf_counter()
            alignment = None
            if self.choice is not None:
                if in_batch:
                    assert direction is not None and dots_B is not None
                    groups_B = torch.from_numpy(batch.domains_B)[order_B]
                    alignment = align.group_alignment(dots_B, groups_B, len(self.probes.groups_GD), direction)
                else:
                    alignment = self._probe()
                alignment = self.probes.for_policy(alignment, norm)
            self._update_policy(alignment)
            aligning += time.perf_counter() - before
        elapsed = time.perf_counter() - start
        self.seconds["train"] += elapsed - aligning
        self.seconds["alignment"] += aligning
        return loss, norm

    def _backward(self, batch: Batch, direction: Direction | None) -> tuple[float, Tensor | None, Tensor]:
        """Accumulate the batch's gradient; with a direction, also each sequence's derivative along it.

        The loss of the global batch is sum_b w_b l_b / B, with w_b = 1 except on stratified probe steps.
        """
        tokens_BT1 = batch.tokens_BT1.to(self.device, non_blocking=True)
        domains_B = torch.from_numpy(batch.domains_B)
        weights_B = torch.from_numpy(batch.loss_weights_B).to(self.device, torch.float32)
        estimator = None if direction is None or self.choice is None else align.estimators[self.choice.estimator]()
        pure = estimator is not None and estimator.pure
        pieces = list(_pieces(domains_B, self.micro_batch, pure=pure))
        order_B = torch.cat(pieces)
        dots: list[Tensor] = []
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with (
            nullcontext()
            if estimator is None or direction is None
            else estimator.on_batch(self.module, self.parameters, direction) as probe
        ):
            for index, piece in enumerate(pieces):
                with self._unreduced(index == len(pieces) - 1 and not pure):
                    tokens, weights = tokens_BT1[piece], weights_B[piece]
                    if probe is not None:
                        probe.begin(len(piece))
                    with self._autocast():
                        losses = self._losses(tokens, domains_B[piece])
                    scaled = (weights * losses).sum() / self.local_batch
                    self.accelerator.backward(scaled)
                    total += scaled.detach()
                    if probe is not None:
                        dots.append(probe.dots(weights / self.local_batch).cpu())
        totals = torch.stack([total, torch.full_like(total, float(interrupt.asked()))])
        totals = self.accelerator.reduce(totals, "mean") if self.world > 1 else totals
        loss, asked = totals.tolist()
        self.stopping = asked > 0
        return loss, torch.cat(dots) if dots else None, order_B

    def _unreduced(self, last: bool) -> AbstractContextManager[Any]:
        """Leave a micro-batch's gradient on its rank until the last one of the step.

        Sharded gradients are reduced at every micro-batch: left on their rank they would be whole there.
        """
        return nullcontext() if last or self.sharded else self.accelerator.no_sync(self.model)

    def _losses(self, tokens_BT1: Tensor, domains_B: Tensor) -> Tensor:
        """Training losses per sequence, metered by domain; with a reference model also its losses and the excess."""
        losses_BT = token_losses(self.model, tokens_BT1)
        reference_BT = None
        if self.reference is not None:
            with torch.no_grad():
                reference_BT = token_losses(self.reference, tokens_BT1)
        self.meter.add(domains_B, losses_BT.detach(), reference_BT)
        return losses_BT.mean(dim=1)

    def _require_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        saved = sorted((self.folder / "checkpoints").glob("step-*"))
        raise NumericsError(
            f"step {self.step}: loss {loss}, gradient norm {norm}; nothing was applied. "
            f"Last good checkpoint: {saved[-1].name if saved else 'none yet'}. "
            f"Try a lower training.lr, a longer warmup_steps or precision: fp32"
        )

    # -- alignment and the policy -------------------------------------------------------------------------------

    def _direction(self) -> Direction:
        """v: the target's gradient (or the mean gradient over domains), preconditioned where the policy asks."""
        with self._probing():
            return self.probes.direction(self.module, self.step, self.optimizer, self.parameters)

    def _probe(self) -> Alignment:
        """Alignments of every group on sequences drawn for the purpose, which cost no training tokens."""
        assert self.choice is not None
        direction = self._direction()
        with self._probing():
            return self.probes.measure(self.choice.estimator, self.module, self.step, direction)

    @contextmanager
    def _probing(self) -> Iterator[None]:
        """Probes run on the bare module, uncompiled, in the run's precision."""
        with _eager(self.module), self._autocast():
            yield

    def _autocast(self) -> torch.autocast:
        """bf16 autocast where the runtime chose it; a context of its own, since accelerate's is shared by all runs."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.runtime.bf16)

    def _update_policy(self, alignment: Alignment | None) -> None:
        measured = self.meter.report(self.accelerator)
        report = Report(
            step=self.step,
            tokens_D=measured.sequences_D * self.config.sequence_length,
            losses_D=measured.losses_D,
            reference_losses_D=measured.reference_losses_D,
            excess_losses_D=measured.excess_losses_D,
            alignment=alignment,
        )
        self.state = self.task.policy.update(self.state, report)
        self.loader.set_weights(self.step, self.task.policy.weights(self.state).numpy())
        losses = dict(zip(self.task.domains, measured.losses_D.tolist(), strict=True))
        self._log_mixture(alignment, losses)

    def _log_mixture(self, alignment: Alignment | None, losses: Mapping[str, float]) -> None:
        values: dict[str, Any] = {
            "weights": self._weights_by_domain(),
            "epochs": self._epochs_by_domain(),
            "domain_losses": dict(losses),
            "diagnostics": dict(self.task.policy.diagnostics(self.state)),
        }
        if self.config.exhaustion == "drop":
            left = self.sampler.effective_weights_D.tolist()
            values["effective_weights"] = dict(zip(self.task.domains, left, strict=True))
        if alignment is not None:
            basis = len(alignment.dots_G) != len(self.task.domains) or "basis" in self.task.policy.needs
            names: Sequence[str] = [f"basis {i}" for i in range(len(alignment.dots_G))] if basis else self.task.domains
            values["alignment"] = dict(zip(names, alignment.dots_G.tolist(), strict=True))
            values["direction_norm"] = alignment.direction_norm
        self.metrics.write("mixture", self.step, self.tokens, **values)

    def _evaluate(self) -> None:
        if self.evaluate is None or self.evaluate_every_steps == 0:
            return
        start = time.perf_counter()
        result = self.evaluate(self.module)
        self.module.train()
        for unit in units(self.module):
            unit.reshard()
        self.metrics.write("eval", self.step, self.tokens, **result)
        self.evaluated_step = self.step
        self.seconds["eval"] += time.perf_counter() - start

    def _weights_by_domain(self) -> dict[str, float]:
        return dict(zip(self.task.domains, self.task.policy.weights(self.state).tolist(), strict=True))

    def _epochs_by_domain(self) -> dict[str, float]:
        return dict(zip(self.task.domains, self.sampler.epochs_D().tolist(), strict=True))

    def _tokens_of(self, steps: int) -> int:
        return steps * self.config.batch_sequences * self.config.sequence_length


def _pieces(domains_B: Tensor, size: int, *, pure: bool) -> Iterator[Tensor]:
    """Row indices of each micro-batch, in order; with `pure` none of them mixes domains."""
    rows = torch.arange(len(domains_B))
    if not pure:
        yield from rows.split(size)
        return
    for domain in domains_B.unique().tolist():
        yield from rows[domains_B == domain].split(size)


@contextmanager
def _eager(module: nn.Module) -> Iterator[None]:
    """Run what was compiled in place as if it were not: hooks added later must be seen."""
    compiled = [(part, part._compiled_call_impl) for part in module.modules() if part._compiled_call_impl is not None]
    for part, _ in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call
