"""An online mixture inside `transformers.Trainer` and TRL's `SFTTrainer`.

    mixture = OnlineMixture.of(sources, "dga", target=target, sequence_length=1024)
    trainer = Trainer(model, args, train_dataset=mixture.dataset, callbacks=[MixtureCallback(mixture)])
    trainer.train()

The dataset promises batches (`mixture_dataset.py`), the callback draws them, measures after the optimizer steps at
which the mixture moves, and keeps its state in `trainer_state.json`, so `trainer.train(resume_from_checkpoint=True)`
goes on to the same bits. Draws, alignments and weights are those of weftlm's own loop (`online_mixture.py`).

TRL prepares datasets unless told not to: `SFTConfig(..., dataset_kwargs={"skip_prepare_dataset": True})`.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from weftlm.errors import CheckpointError, ConfigError
from weftlm.integrations.mixture_dataset import Feed, Promise, SlotDataset, owners
from weftlm.integrations.online_mixture import OnlineMixture, OnlineRun, gradient_norm
from weftlm.training.mixture_run import Share, Update

__all__ = ["MixtureCallback", "OnlineMixture"]

log = logging.getLogger(__name__)


class MixtureCallback(TrainerCallback, ExportableState):
    """Draws the training batches of a `Trainer` by an online mixture, and moves the mixture as training goes.

    Give it to the trainer's constructor. It sets `args.train_sampling_strategy` to "sequential", because the mixture
    does the shuffling. At the steps where a policy scales alignments by the norm of the gradient, it clips to
    `args.max_grad_norm` in the trainer's stead, because trainers clip before a callback may look.

    `trainer.state.log_history` gets an entry for every update, with `mixture/<domain>`, the weight from then on, and
    `mixture/alignment/<domain>` or `mixture/loss/<domain>`; the trainer's own entries get the weights too. Reporting
    callbacks (TensorBoard, Weights & Biases) see the weights if they come after this one: `report_to="none"` and
    `callbacks=[MixtureCallback(mixture), TensorBoardCallback()]`.

    Args:
        mixture: what is mixed; None takes the one the training dataset belongs to, once training begins.
        logged_domains: domains named in the logs, those of largest weight first.
    """

    def __init__(self, mixture: OnlineMixture | None = None, *, logged_domains: int = 64) -> None:
        self.mixture = mixture
        self.logged_domains = logged_domains
        self.run: OnlineRun | None = None
        self.saved: dict[str, Any] | None = None
        self._feed: Feed | None = None
        self._hook: RemovableHandle | None = None
        self._clip: float | None = None
        self._norm: float | None = None

    # -- before training ----------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Refuse what cannot work with a mixture and make an epoch a whole number of batches."""
        if self.mixture is None:
            raise ConfigError("MixtureCallback was given no mixture; write MixtureCallback(mixture)")
        _check_arguments(args)
        if getattr(args, "train_sampling_strategy", None) == "random":
            args.train_sampling_strategy = "sequential"
        self.mixture.dataset.fit(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Start the run of the mixture, where the trainer starts, and let its data loader promise batches."""
        self.on_train_end(args, state, control)
        mixture = self._find_mixture(train_dataloader.dataset)
        share = _share(args, train_dataloader)
        _check_model(model, mixture)
        saved = self._saved_state(state)
        run = mixture.start(model, share, bf16=bool(args.bf16), saved=saved)
        if run.step != state.global_step:
            raise CheckpointError(
                f"the trainer goes on from step {state.global_step}, the mixture's state is of step {run.step}; use an "
                "earlier checkpoint"
            )
        if run.choice is not None:
            log.info("alignment estimator %s on extra sequences: %s", run.choice.estimator, run.choice.reason)
        if (warning := run.never_updates(state.max_steps)) is not None:
            log.warning(warning)
        loader = train_dataloader.base_dataloader
        self._feed = Feed(mixture.dataset.key, run.take, loader.collate_fn)
        loader.collate_fn = Promise(mixture.dataset.key)
        train_dataloader.dataset.fed = True
        self.mixture, self.run = mixture, run
        if run.metering:
            hook = partial(_observe, run)
            self._hook = model.register_forward_hook(torch.compiler.disable(hook) if args.torch_compile else hook)

    def _find_mixture(self, dataset: Any) -> OnlineMixture:
        if not isinstance(dataset, SlotDataset):
            raise ConfigError(
                f"the trainer has a train_dataset of type {type(dataset).__name__}; MixtureCallback needs "
                "train_dataset=mixture.dataset"
            )
        mixture = self.mixture if self.mixture is not None else owners.get(dataset.key)
        if mixture is None or mixture.dataset.key != dataset.key:
            raise ConfigError(
                "the train_dataset belongs to another mixture than the callback; give both of the same one"
            )
        return mixture

    def _saved_state(self, state: TrainerState) -> dict[str, Any] | None:
        if state.global_step == 0:
            return None
        stored = cast(dict[str, Any], state.stateful_callbacks).get(type(self).__name__)
        saved = stored["attributes"]["saved"] if isinstance(stored, dict) else None
        if saved is None:
            raise CheckpointError(
                f"the checkpoint of step {state.global_step} holds no state of a mixture: it was written without "
                "MixtureCallback, or with several; start a training anew from its model"
            )
        return dict(saved)

    # -- a step -------------------------------------------------------------------------------------------------

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """At a step whose gradient norm is wanted, take clipping over."""
        if self._running.norm_needed_at(state.global_step + 1) and args.max_grad_norm > 0:
            self._clip, args.max_grad_norm = args.max_grad_norm, math.inf

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Measure the norm of the whole gradient, and clip if that was taken over."""
        if self._running.norm_needed_at(state.global_step + 1):
            self._norm = gradient_norm(model.parameters(), self._clip)
            self._give_back_clipping(args)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Update the mixture when it is due; end training when the domains are used up."""
        run = self._running
        update = run.end_step(optimizer, self._norm)
        self._norm = None
        if update is not None:
            entry = self._weights() | _measured(update, run, self.logged_domains)
            state.log_history.append(entry | {"epoch": state.epoch, "step": state.global_step})
        if state.global_step < state.max_steps and run.exhausted():
            log.warning("training ends at step %d: the domains are read as often as they may", state.global_step)
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Put the weights beside the training loss."""
        if self.run is not None and logs is not None and "loss" in logs:
            logs.update(self._weights())
            state.log_history[-1].update(self._weights())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End background reading and take the hook off the model."""
        self._give_back_clipping(args)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.run is not None:
            self.run.close()

    def state(self) -> dict[str, Any]:
        """The callback for `trainer_state.json`."""
        saved = None if self.run is None else self.run.saved_state()
        return {"args": {"logged_domains": self.logged_domains}, "attributes": {"saved": saved}}

    @property
    def _running(self) -> OnlineRun:
        if self.run is None:
            raise ConfigError("MixtureCallback was added during training; give it to the trainer's constructor")
        return self.run

    def _give_back_clipping(self, args: TrainingArguments) -> None:
        if self._clip is not None:
            args.max_grad_norm, self._clip = self._clip, None

    def _weights(self) -> dict[str, float]:
        weights = self._running.weights()
        heaviest = sorted(weights, key=weights.__getitem__, reverse=True)[: self.logged_domains]
        return {f"mixture/{name}": weights[name] for name in weights if name in set(heaviest)}


def _measured(update: Update, run: OnlineRun, most: int) -> dict[str, float]:
    """What an update rests on, by group."""
    found: dict[str, float] = {}
    if update.alignment is not None:
        found |= _named("alignment", run.groups(), update.alignment.dots_G, most)
    if update.losses_D is not None:
        found |= _named("loss", run.task.domains, update.losses_D, most)
    return found


def _named(what: str, names: tuple[str, ...], values_G: Tensor, most: int) -> dict[str, float]:
    pairs = list(zip(names, values_G.tolist(), strict=True))[:most]
    return {f"mixture/{what}/{name}": value for name, value in pairs if math.isfinite(value)}


def _observe(run: OnlineRun, module: nn.Module, _: Any, output: Any) -> None:
    """Forward hook: meter the training losses of the micro-batch the model has just seen."""
    if module.training:
        run.observe(partial(_token_losses, output))


def _token_losses(output: Any, tokens_BT1: Tensor) -> Tensor:
    """losses_BT, nats per token, of what the model has answered in the training pass."""
    shape = (len(tokens_BT1), tokens_BT1.shape[1])
    log_probs_BT = getattr(output, "log_probs", None)  # TRL's fused head gives these instead of logits
    if log_probs_BT is not None and log_probs_BT.shape == (shape[0], shape[1] - 1):
        return -cast(Tensor, log_probs_BT).detach().float()
    logits_BTV = getattr(output, "logits", None)
    if logits_BTV is None or logits_BTV.shape[:2] != shape:
        came = "no logits" if logits_BTV is None else f"logits of shape {tuple(logits_BTV.shape)}"
        raise ConfigError(
            f"this policy needs the training loss of every domain, and the model gave {came} for a batch of {shape}; "
            "switch fused losses (use_liger_kernel) and padding of the collator off, or take a policy that needs "
            "alignments"
        )
    labels_BT = tokens_BT1[:, 1:]
    logits_NV = logits_BTV.detach()[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(logits_NV, labels_BT.flatten(), reduction="none").view(labels_BT.shape)


def _check_arguments(args: TrainingArguments) -> None:
    """Refuse arguments under which batches would not be those the mixture drew.

    Raises:
        ConfigError: with the argument and what to set.
    """
    strategy = getattr(args, "train_sampling_strategy", "random")
    problems = {
        f"n_gpu is {args.n_gpu}: one process drives several GPUs; start the script with torchrun or accelerate launch, "
        "or set CUDA_VISIBLE_DEVICES to one": args.n_gpu > 1,
        "auto_find_batch_size is on; the mixture draws whole batches of one size: switch it off": (
            args.auto_find_batch_size
        ),
        f"train_sampling_strategy is {strategy!r}; the mixture decides the order: leave it at 'random'": (
            strategy not in ("random", "sequential")
        ),
        "group_by_length is on; the mixture decides the order: switch it off": getattr(args, "group_by_length", False),
        "packing is on; a mixture's sequences are full already: switch it off": getattr(args, "packing", False),
        "padding_free is on; it hides which row is of which domain: switch it off": (
            getattr(args, "padding_free", False)
        ),
        "deepspeed is on; it keeps gradients where no callback can measure them: use DDP or FSDP2": args.deepspeed,
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise ConfigError("; ".join(found))


def _share(args: TrainingArguments, loader: Any) -> Share:
    """This process's part of each batch, as the trainer's data loader cuts it.

    Raises:
        ConfigError: the loader does not leave drawing to each process, or an epoch is not a whole number of batches.
    """
    if not isinstance(loader, DataLoaderShard) or loader.device is None:
        raise ConfigError(
            f"the trainer's data loader is a {type(loader).__name__} that does not move batches to a device; leave "
            "dispatch_batches in accelerator_config and device placement at their defaults"
        )
    sampler = loader.batch_sampler
    processes = getattr(sampler, "num_processes", 1)
    if processes != args.world_size:
        raise ConfigError(
            f"{args.world_size} processes share {processes} parts of a batch; tensor, context and sequence parallelism "
            "do not work with a mixture: use DDP or FSDP2"
        )
    total = loader.total_batch_size
    batch = total * args.gradient_accumulation_steps
    if len(loader.dataset) % batch:
        raise ConfigError(
            f"an epoch of {len(loader.dataset)} sequences is not a whole number of batches of {batch}; give "
            "MixtureCallback(mixture) to the trainer's constructor"
        )
    return Share(batch, total // processes, getattr(sampler, "process_index", 0), processes)


def _check_model(model: Any, mixture: OnlineMixture) -> None:
    """Refuse a model that cannot take the sequences, or whose gradients cannot be taken.

    Raises:
        ConfigError: with what to change.
    """
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and longest <= mixture.sequence_length:
        raise ConfigError(
            f"sequence_length is {mixture.sequence_length}, so examples have {mixture.sequence_length + 1} tokens, and "
            f"the model has {longest} positions; set sequence_length to {longest - 1} or less"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ConfigError("the model is sharded by FSDP version 1; set fsdp_version: 2 in fsdp_config")
