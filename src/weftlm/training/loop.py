"""The training loop: ordinary optimizer steps on batches drawn by an online mixture.

One step reads as a sentence: draw a batch by the mixture, take a gradient step on it, and let the mixture run
(`mixture_run.py`) update what is drawn next. What is minimised is a loss the trainer is given (`losses.py`). All of a
run's state is in the weights, the optimizer's moments, the mixture run and the step number; random numbers of a step
are a function of (seed, step, rank), so a run killed at any moment continues to the same bits.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from weftlm import interrupt
from weftlm.config import differences
from weftlm.errors import CheckpointError, ConfigError, NumericsError
from weftlm.files import parse_json
from weftlm.mixture.loader import Batch
from weftlm.mixture.policy import Report
from weftlm.mixture.sampler import SamplerExhausted
from weftlm.progress import ProgressBar, count_text, weights_text
from weftlm.threads import follow_load
from weftlm.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from weftlm.training.config import AlignmentConfig, TrainingConfig, derive_seed, learning_rate
from weftlm.training.estimators.direction import reshard
from weftlm.training.losses import BatchLoss
from weftlm.training.metrics import METRICS, MetricsLog, check_metrics
from weftlm.training.mixture_run import MixtureOptions, MixtureRun, Share, Task
from weftlm.training.parallel import shard, whole
from weftlm.training.runtime import Runtime
from weftlm.training.state import adamw, dump_tensors, load_tensors, save_model

__all__ = ["Evaluate", "Task", "Trainer", "TrainingResult", "adamw", "dump_tensors", "load_tensors"]

log = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module], Mapping[str, Any]]


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
        folder: the run folder, for checkpoints and metrics.jsonl; None writes neither.
        seed: random seed of the sampler, the probes and dropout.
        loss: what is minimised; absent: the cross-entropy of next tokens.
        evaluate: called with the model every `evaluate_every_steps`; its result is logged.
        evaluate_every_steps: 0 evaluates never.
        keep_best: key of a loss that `evaluate` gives: the weights of its lowest value are kept, for `restore_best`.
        identity: JSON value that says what is trained; a checkpoint of another identity is refused.
        trackers: get the numbers of every metric line.
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
        folder: Path | None,
        seed: int,
        loss: BatchLoss | None = None,
        evaluate: Evaluate | None = None,
        evaluate_every_steps: int = 0,
        keep_best: str | None = None,
        identity: Any = "",
        trackers: tuple[Any, ...] = (),
        may_shard: bool = False,
    ) -> None:
        self.task, self.config, self.runtime = task, config, runtime
        self.folder, self.seed, self.identity = folder, seed, parse_json(json.dumps(identity))
        self.evaluate, self.evaluate_every_steps, self.keep_best = evaluate, evaluate_every_steps, keep_best
        self.loss = BatchLoss(config.sequence_length) if loss is None else loss
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

        task.check_needs(target="data.target", reference="mixture.reference, a run folder")
        share = Share(config.batch_sequences, self.micro_batch, self.rank, self.world)
        options = MixtureOptions(
            sequence_length=config.sequence_length, seed=seed, alignment=alignment,
            exhaustion=config.exhaustion, max_epochs=config.max_epochs,
        )  # fmt: skip
        self.mixture = MixtureRun(task, self.module, share, options, bf16=runtime.bf16, metering=True)
        if self.mixture.choice is not None:
            if loss is not None:
                raise ConfigError("alignments are of next-token losses; with another loss take a policy without them")
            choice = self.mixture.choice
            log.info("alignment estimator %s on %s: %s", choice.estimator, choice.probe, choice.reason)
        total, warmup = config.total_steps, config.warmup_steps
        if (warning := self.mixture.never_updates(total)) is not None:
            log.warning(warning)
        if warmup >= total:
            log.warning("warm-up takes %d of %d steps: the peak learning rate is never reached", warmup, total)
        self._best: Checkpoint | None = None
        self.last_loss: float | None = None
        self.evaluated_step = -1
        self.stopping = False
        self.seconds = {"train": 0.0, "alignment": 0.0, "eval": 0.0, "save": 0.0}
        self._resume()
        if self.accelerator.is_main_process:
            self.metrics = MetricsLog(folder and folder / METRICS, resume_step=self.step, trackers=trackers)
        else:
            self.metrics = MetricsLog(None)

    # -- set-up -------------------------------------------------------------------------------------------------

    def _place(self, model: nn.Module, reference: nn.Module | None) -> None:
        """Bring the models to the device: whole, or this rank's part of them."""
        self.module, self.model = model, model
        if self.sharded:
            how: dict[str, Any] = {"device": self.device, "bf16": self.runtime.bf16}
            shard(model, compiled=self.runtime.compile, **how)
            if reference is not None:
                shard(reference.eval().requires_grad_(False), trained=False, **how)
            return
        model.to(self.device)
        if self.runtime.compile:
            model.compile()
        self.model = self.accelerator.prepare_model(model)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.mixture.step

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, on an average over what can be drawn."""
        return self._tokens_of(self.step)

    def _tokens_of(self, steps: int) -> int:
        return round(steps * self.config.batch_sequences * self.loss.tokens_per_sequence)

    # -- state --------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        checkpoint = None if self.folder is None else latest_checkpoint(self.folder / "checkpoints")
        if checkpoint is None or self.folder is None:
            return
        if (known := checkpoint.state["identity"]) != self.identity:
            changed = f" ({differences(known, self.identity)})" if isinstance(known, dict) else ""
            raise CheckpointError(
                f"{self.folder} holds a run of another recipe or other data{changed}; choose another run folder, or "
                f"remove this one to start again"
            )
        check_metrics(self.folder / METRICS, checkpoint.state.get("log"))
        load_tensors(self.module, self.optimizer, self.parameters, checkpoint.tensors)
        self.mixture.load_state_dict(checkpoint.state)
        self.seconds = dict(checkpoint.state["seconds"])
        if best := checkpoint.state.get("best"):
            kept = {name: checkpoint.tensors[f"best.{name}"] for name in self.parameters}
            self._best = Checkpoint(best["step"], kept, {"loss": best["loss"]})
        log.info("continuing from step %d", self.step)

    def save(self) -> None:
        """Write a checkpoint of the present step (every rank calls this; the first writes).

        A sharded model and its optimizer are whole on the CPU of the first rank while it writes, and nowhere else.
        """
        if self.folder is None:
            return
        start = time.perf_counter()
        meter = self.mixture.meter_state()
        writes = self.accelerator.is_main_process
        tensors = dump_tensors(self.module, self.optimizer, self.parameters, keep=writes)
        if writes:
            state = {
                "identity": self.identity,
                "seed": self.seed,
                "log": self.metrics.flush(),
                **self.mixture.state_dict(meter),
                "seconds": self.seconds,
            }
            if self._best is not None:
                tensors |= {f"best.{name}": tensor for name, tensor in self._best.tensors.items()}
                state["best"] = {"step": self._best.step, **self._best.state}
            save_checkpoint(
                self.folder / "checkpoints", Checkpoint(self.step, tensors, state), keep=self.config.keep_checkpoints
            )
        self.accelerator.wait_for_everyone()
        self.seconds["save"] += time.perf_counter() - start

    def save_model(self, folder: Path) -> None:
        """Write the model as a plain Hugging Face folder (every rank calls this; the first writes)."""
        save_model(self.module, folder, writes=self.accelerator.is_main_process)

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
            self.metrics.close()
        return TrainingResult(
            step=self.step,
            tokens=self.tokens,
            weights=self.mixture.weights(),
            epochs=self.mixture.epochs(),
            seconds=dict(self.seconds),
            stopped_early=stopped,
        )

    def _run(self) -> str | None:
        """Train to the end; returns why it came early, if it did."""
        total = self.config.total_steps
        if self.step == 0:
            self._log_mixture(None)
            self._evaluate()
        self.module.train()
        for choice in self.runtime.choices:
            log.info("%s: %s (%s)", choice.setting, choice.value, choice.reason)
        window_start, window_step = time.perf_counter(), self.step
        first = self.accelerator.is_main_process
        with ProgressBar("train", total, unit="steps", done=self.step, enabled=first) as bar, interrupt.safe_points():
            while self.step < total:
                follow_load()
                try:
                    loss, norm = self.train_step()
                except SamplerExhausted as error:
                    log.warning("training ends at step %d of %d: %s", self.step, total, error)
                    if self.evaluated_step != self.step:
                        self._evaluate()
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
                    mixture = weights_text(self.mixture.weights(), 4)
                    bar.update(self.step, f"loss {loss:.3f}  {count_text(speed)} tokens/s  mixture {mixture}")
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

    def train_step(self) -> tuple[float, float]:
        """One optimizer step and, every T_r steps, one update of the mixture; returns the loss and gradient norm."""
        start = time.perf_counter()
        torch.manual_seed(derive_seed(self.seed, f"step {self.step} rank {self.rank}"))
        self.mixture.begin_step(self.optimizer)
        aligning = time.perf_counter() - start
        batch = self.loss.prepare(self.mixture.draw())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        loss, dots_B = self._backward(batch)
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)))
        self._require_finite(loss, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        before = time.perf_counter()
        update = self.mixture.finish_step(self.optimizer, norm, dots_B)
        self.last_loss = loss
        if update is not None:
            self._log_mixture(update)
        now = time.perf_counter()
        aligning += now - before
        self.seconds["train"] += now - start - aligning
        self.seconds["alignment"] += aligning
        return loss, norm

    def _backward(self, batch: Batch) -> tuple[float, Tensor | None]:
        """Accumulate the batch's gradient; where the mixture measures on it, also each sequence's derivative.

        Returns:
            the loss over all ranks, and the derivatives of this rank's sequences.

        The loss of the global batch is sum_b w_b l_b / B, with w_b = 1 except on stratified probe steps.
        """
        tokens_BT1 = batch.tokens_BT1.to(self.device, non_blocking=True)
        weights_B = torch.from_numpy(batch.loss_weights_B).to(self.device, torch.float32)
        pieces = torch.arange(len(tokens_BT1)).split(self.micro_batch)
        dots: list[Tensor] = []
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self.mixture.batch_probe() as probe:
            for piece in pieces:
                # Sharded gradients are reduced at every micro-batch: left on their rank they would be whole there.
                reduced = piece is pieces[-1] or self.sharded
                with nullcontext() if reduced else self.accelerator.no_sync(self.model):
                    tokens, weights = tokens_BT1[piece], weights_B[piece]
                    if probe is not None:
                        probe.begin(len(piece))
                    # A context of its own, since accelerate's is shared by all runs of the process.
                    with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.runtime.bf16):
                        losses_BT = self.loss(self.model, tokens)
                        self.mixture.meter(torch.from_numpy(batch.domains_B)[piece], tokens, losses_BT)
                    scaled = (weights * losses_BT.mean(dim=1)).sum() / self.local_batch
                    self.accelerator.backward(scaled)
                    total += scaled.detach()
                    if probe is not None:
                        dots.append(probe.dots(weights / self.local_batch).cpu())
        totals = torch.stack([total, torch.full_like(total, float(interrupt.asked()))])
        totals = self.accelerator.reduce(totals, "mean") if self.world > 1 else totals
        loss, asked = totals.tolist()
        self.stopping = asked > 0
        return loss, torch.cat(dots) if dots else None

    def _require_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        saved = [] if self.folder is None else sorted((self.folder / "checkpoints").glob("step-*"))
        raise NumericsError(
            f"step {self.step}: loss {loss}, gradient norm {norm}; nothing was applied. "
            f"Last good checkpoint: {saved[-1].name if saved else 'none yet'}. "
            f"Try a lower training.lr, a longer warmup_steps or precision: fp32"
        )

    def _log_mixture(self, update: Report | None) -> None:
        """Write the mixture in force and what it rests on."""
        mixture, names = self.mixture, self.task.domains
        losses = [] if update is None or update.losses_D is None else zip(names, update.losses_D.tolist(), strict=True)
        values: dict[str, Any] = {
            "weights": mixture.weights(),
            "epochs": mixture.epochs(),
            "domain_losses": dict(losses),
            "diagnostics": dict(self.task.policy.diagnostics(mixture.state)),
        }
        if self.config.exhaustion == "drop":
            values["effective_weights"] = dict(zip(names, mixture.sampler.effective_weights_D.tolist(), strict=True))
        if update is not None and update.alignment is not None:
            values["alignment"] = dict(zip(mixture.groups(), update.alignment.dots_G.tolist(), strict=True))
            values["direction_norm"] = update.alignment.direction_norm
        self.metrics.write("mixture", self.step, self.tokens, **values)

    def _evaluate(self) -> None:
        if self.evaluate is None or self.evaluate_every_steps == 0:
            return
        start = time.perf_counter()
        result = self.evaluate(self.module)
        if self.keep_best is not None:
            self._offer(float(result[self.keep_best]))
        self.module.train()
        reshard(self.module)
        self.metrics.write("eval", self.step, self.tokens, **result)
        self.evaluated_step = self.step
        self.seconds["eval"] += time.perf_counter() - start

    def _offer(self, loss: float) -> None:
        """Keep the present weights if their loss is lower than every one before, by the mean over processes."""
        if self.world > 1:
            loss = float(self.accelerator.reduce(torch.tensor(loss, device=self.device), "mean"))
        if loss < (math.inf if self._best is None else self._best.state["loss"]):
            kept = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.parameters.items()}
            self._best = Checkpoint(self.step, kept, {"loss": loss})

    def restore_best(self) -> int:
        """Put the weights of the lowest loss back; returns their step.

        Raises:
            NumericsError: no loss was finite.
        """
        if self._best is None:
            raise NumericsError("no evaluation gave a finite loss; try a lower training.lr")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self._best.tensors[name])
        return self._best.step
