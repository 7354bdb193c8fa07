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
from weftlm.integrations.mixture_dataset import Coming, Feed, feeds
from weftlm.integrations.online_mixture import OnlineMixture, OnlineRun
from weftlm.mixture.policy import Report
from weftlm.training.mixture_run import Share
from weftlm.training.parallel import whole

__all__ = ["MixtureCallback", "OnlineMixture"]

log = logging.getLogger(__name__)

_LOGGED = 64
"""Most domains named in the logs, those of largest weight first."""
_OFF = {
    "auto_find_batch_size": "the mixture draws whole batches of one size",
    "restore_callback_states_from_checkpoint": "resume_from_checkpoint restores the mixture",
    "group_by_length": "the mixture decides the order",
    "packing": "a mixture's sequences are full already",
    "padding_free": "it hides which row is of which domain",
    "deepspeed": "it keeps gradients where no callback can measure them (DDP and FSDP2 do not)",
}
"""Arguments that must be off, with the reason."""


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
        mixture: what is mixed.
    Raises:
        ConfigError: no mixture was given, as where the class itself is among a trainer's callbacks.
    """

    def __init__(self, mixture: OnlineMixture | None = None) -> None:
        if mixture is None:  # a trainer calls a class that is given to it
            raise ConfigError("MixtureCallback has no mixture; give the trainer callbacks=[MixtureCallback(mixture)]")
        self.mixture = mixture
        self.run: OnlineRun | None = None
        self._feed: Feed | None = None
        self._hook: RemovableHandle | None = None
        self._clip: float | None = None
        self._norm: float | None = None

    # -- before training ----------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Refuse what cannot work with a mixture and make an epoch a whole number of batches."""
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
        mixture, dataset = self.mixture, train_dataloader.dataset
        if getattr(dataset, "key", None) != mixture.dataset.key:
            raise ConfigError(
                f"the trainer has a train_dataset of type {type(dataset).__name__} that is not the callback's; "
                "MixtureCallback needs train_dataset=mixture.dataset, of the same mixture"
            )
        share = _share(args, train_dataloader)
        _check_model(model, mixture)
        run = OnlineRun(mixture, model, share, bf16=bool(args.bf16), saved=self._saved_state(state))
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
        self._feed = feeds[dataset.key] = Feed(run.take, loader.collate_fn)
        loader.collate_fn = partial(Coming, dataset.key)
        dataset.fed = True
        self.run = run
        if run.metering:
            hook = partial(_observe, run)
            self._hook = model.register_forward_hook(torch.compiler.disable(hook) if args.torch_compile else hook)

    def _saved_state(self, state: TrainerState) -> dict[str, Any] | None:
        if state.global_step == 0:
            return None
        stored = cast(dict[str, Any], state.stateful_callbacks).get(type(self).__name__)
        saved = stored["attributes"]["saved"] if isinstance(stored, dict) else None
        if saved is None:
            raise CheckpointError(
                f"the checkpoint of step {state.global_step} holds no state of a mixture: it was written without "
                "MixtureCallback, or with several; begin a new training from its model"
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
            limit = math.inf if self._clip is None else self._clip
            self._norm = float(whole(nn.utils.clip_grad_norm_(model.parameters(), limit)))
            self._give_back_clipping(args)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Update the mixture when it is due; end training when the domains are used up."""
        run = self._running
        update = run.end_step(optimizer, self._norm)
        self._norm = None
        if update is not None:
            entry = self._weights() | _measured(update, run)
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
        """Take the hook off the model."""
        self._give_back_clipping(args)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state(self) -> dict[str, Any]:
        """The callback for `trainer_state.json`."""
        saved = None if self.run is None else self.run.saved_state()
        return {"args": {}, "attributes": {"saved": saved}}

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
        heaviest = sorted(weights, key=weights.__getitem__, reverse=True)[:_LOGGED]
        return {f"mixture/{name}": weights[name] for name in weights if name in set(heaviest)}


def _measured(update: Report, run: OnlineRun) -> dict[str, float]:
    """What an update rests on, by group."""
    found: dict[str, float] = {}
    dots_G = None if update.alignment is None else update.alignment.dots_G
    for what, names, values in (("alignment", run.groups(), dots_G), ("loss", run.task.domains, update.losses_D)):
        pairs = [] if values is None else list(zip(names, values.tolist(), strict=True))[:_LOGGED]
        found |= {f"mixture/{what}/{name}": value for name, value in pairs if math.isfinite(value)}
    return found


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
    found = [f"{name} is on: {why}; switch it off" for name, why in _OFF.items() if getattr(args, name, None)]
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy not in ("random", "sequential"):
        found.append(f"train_sampling_strategy is {strategy!r}; the mixture decides the order: leave it at 'random'")
    if args.n_gpu > 1:
        found.append(
            f"n_gpu is {args.n_gpu}: one process drives several GPUs; start the script with torchrun or accelerate "
            "launch, or set CUDA_VISIBLE_DEVICES to one"
        )
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
    length = mixture.options.sequence_length
    if isinstance(longest, int) and longest <= length:
        raise ConfigError(
            f"sequence_length is {length}, so examples have {length + 1} tokens, and "
            f"the model has {longest} positions; set sequence_length to {longest - 1} or less"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ConfigError("the model is sharded by FSDP version 1; set fsdp_version: 2 in fsdp_config")
