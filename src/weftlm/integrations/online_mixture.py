"""An online mixture for other training loops: what to train on next, and how training moves the mixture.

`OnlineMixture` names what is mixed; an `OnlineRun` is the mixture run of weftlm's own loop
(`weftlm.training.mixture_run`) handed out in micro-batches. It measures on extra sequences only, and otherwise draws
and updates number for number as under weftlm's loop, so runs can be compared.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import datasets
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from weftlm.config import differences, validate
from weftlm.corpora.source import ArraySource, Source
from weftlm.errors import CheckpointError, ConfigError, DataError
from weftlm.integrations.mixture_dataset import SlotDataset
from weftlm.mixture.loader import sequence_counts
from weftlm.mixture.policy import MixtureSetting, Report, build_policy
from weftlm.mixture.sampler import SamplerExhausted
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.train import training_task
from weftlm.training.mixture_run import MixtureOptions, MixtureRun, Share, Task

Tokens: TypeAlias = Source | datasets.Dataset | ArrayLike
"""Token ids of a domain: a source, one row of integers, or a `datasets.Dataset` with a column `input_ids`."""


class OnlineMixture:
    """Domains, a policy and how alignments are measured: everything but the model and the batch size.

    Args:
        task: domains, sources, policy, target and reference model.
        options: as in `MixtureOptions`; an example holds `sequence_length` + 1 tokens, input and labels in one, and
            alignments are always measured on sequences of their own (`probe: extra`).
    Raises:
        ConfigError: the policy needs what the task lacks, or alignments are to be measured on the training batch.
        DataError: a source is too short for one sequence.
    """

    def __init__(self, task: Task, **options: Any) -> None:
        checked = validate(MixtureOptions, options, "")
        how = checked.alignment
        if how.probe == "batch":
            raise ConfigError(
                "alignment.probe is batch; measuring on the training batch needs weftlm's own loop: leave it out"
            )
        self.task = task
        self.options = checked.model_copy(update={"alignment": how.model_copy(update={"probe": "extra"})})
        if task.reference is not None and not isinstance(task.reference, nn.Module):
            raise ConfigError(f"reference is a {type(task.reference).__name__}; give a model (torch.nn.Module)")
        task.check_needs(target="target=", reference="reference=")
        self.sequences_D = sequence_counts(task.sources, self.options.sequence_length, task.domains)
        task.policy.init(task.setting)
        example = task.sources[0].read(0, self.options.sequence_length + 1)
        self.dataset = SlotDataset(uuid.uuid4().hex, example, sum(self.sequences_D))

    @classmethod
    def of(
        cls,
        sources: Mapping[str, Tokens] | PreparedData | str | Path,
        policy: str | Mapping[str, Any] = "dga",
        *,
        target: Tokens | None = None,
        reference: nn.Module | None = None,
        update_every_steps: int | None = None,
        **options: Any,
    ) -> OnlineMixture:
        """A mixture of token sources, or of the domains of a folder that `weftlm prepare` wrote.

        Args:
            sources: tokens by domain name, or prepared data or its folder.
            policy: its name, or `{"policy": name, ...}` as in a recipe's `mixture` section.
            target: tokens the mixture is steered towards; absent, those of the prepared data.
            reference: a frozen model for policies that compare losses with it.
            update_every_steps: T_r, optimizer steps between two updates; absent, what the policy's section says.
            options: `sequence_length` and the others of `MixtureOptions`.
        Raises:
            ConfigError: no domain, an unknown policy or option, or a policy that needs what is not given.
            DataError: tokens that cannot be read, or too few.
        """
        section = {"policy": policy} if isinstance(policy, str) else policy
        if update_every_steps is not None and isinstance(section, Mapping):
            section = {**section, "update_every_steps": update_every_steps}
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
        return cls(task, **options)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the draws and the updates; a state of other settings is refused."""
        task, options = self.task, self.options.model_dump(mode="json")
        sources = zip(task.domains, task.sources, strict=True)
        return {
            "policy": task.policy.config.model_dump(mode="json"),
            "domains": [[name, source.fingerprint] for name, source in sources],
            "target": None if task.target is None else task.target.fingerprint,
            **{name: options[name] for name in ("sequence_length", "seed", "alignment")},
        }


class OnlineRun(MixtureRun):
    """A mixture run handed out in micro-batches, to a loop that knows nothing of domains.

    A step of the loop around it:

        for _ in range(micro-batches):
            tokens_BT1 = run.take()
            ...forward, run.observe(token losses) if run.metering, backward...
        norm = ...norm of the gradient before clipping, if run.norm_needed_at(step)...
        optimizer.step(), gradients to zero
        update = run.end_step(optimizer, norm)

    Args:
        mixture: what is mixed.
        model: the model in training.
        share: batch size, and this process's part.
        bf16: whether training runs under bfloat16 autocast.
        saved: what `saved_state` gave, to continue from; None begins.
    Raises:
        ConfigError: batch, processes, model and policy do not fit each other.
        CheckpointError: the state is of another mixture, or torn.
    """

    def __init__(
        self,
        mixture: OnlineMixture,
        model: nn.Module,
        share: Share,
        *,
        bf16: bool = False,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(mixture.task, model, share, mixture.options, bf16=bf16)
        self.mixture = mixture
        self._waiting: deque[tuple[Tensor, Tensor]] = deque()  # micro-batches of this step not yet taken
        self._unobserved: deque[tuple[Tensor, Tensor]] = deque()  # micro-batches taken whose losses are to come
        if saved is not None:
            if changed := differences(saved.get("settings"), mixture.settings):
                raise CheckpointError(
                    f"the checkpoint is of another mixture ({changed}); resume with the same, or begin a new training "
                    "from the checkpoint's model"
                )
            self.load_state_dict(saved)
        self._metered = self._read_meter()

    def norm_needed_at(self, step: int) -> bool:
        """Whether the update after `step` optimizer steps wants the norm of that step's gradient, unclipped."""
        return self.choice is not None and self.normalize == "scale" and step % self.every == 0

    def exhausted(self) -> bool:
        """Whether the repetition caps leave too little for another batch."""
        if self.options.exhaustion == "repeat":
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
            if self.sampler.step > self.step:
                raise ConfigError(
                    f"more micro-batches were asked for in step {self.step} than a batch of "
                    f"{self.share.batch_sequences} sequences has; the loop accumulates over another number of them"
                )
            batch, size = self.draw(), self.share.micro_batch
            domains_B = torch.from_numpy(batch.domains_B)
            self._waiting.extend(zip(batch.tokens_BT1.split(size), domains_B.split(size), strict=True))
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
        self.meter(domains_B, tokens_BT1, losses_BT)

    def end_step(self, optimizer: Any, gradient_norm: float | None = None) -> Report | None:
        """`finish_step`, after a check that every micro-batch was trained on.

        Raises:
            ConfigError: the step did not train on the batch it should have.
            NumericsError: a measured number is not finite.
        """
        if self._waiting or self._unobserved or self.sampler.step != self.step + 1:
            raise ConfigError(
                f"step {self.step + 1} ended after the mixture delivered {self.sampler.step} batches, "
                f"{len(self._waiting)} micro-batches short and {len(self._unobserved)} without losses; train on every "
                "micro-batch exactly once, with the model in training mode"
            )
        update = self.finish_step(optimizer, gradient_norm)
        self._metered = self._read_meter()
        return update

    def _read_meter(self) -> dict[str, Any] | None:
        """Sums over all processes: taken after every step where there are several, because only one of them saves."""
        return self.meter_state() if self.share.num_processes > 1 else None

    def saved_state(self) -> dict[str, Any]:
        """`state_dict` on any one process, and the settings of the mixture it belongs to."""
        meter = self._metered if self.share.num_processes > 1 else self.meter_state()
        return {"settings": self.mixture.settings, **self.state_dict(meter)}


def _source(tokens: Tokens, what: str) -> Source:
    if isinstance(tokens, Source):
        return tokens
    try:
        if not isinstance(tokens, datasets.Dataset):
            return ArraySource(cast(ArrayLike, tokens))
        if "input_ids" not in tokens.column_names:
            raise DataError(f"its columns are {', '.join(tokens.column_names)}; it must have input_ids: tokenise it")
        rows = tokens["input_ids"]
        for number, row in enumerate(rows):
            if not isinstance(row, list | np.ndarray | torch.Tensor):
                raise DataError(f"input_ids of row {number} is {row!r:.60}; it must be a list of token ids")
        return ArraySource(np.concatenate([ArraySource(row).read(0, len(row)) for row in rows]) if rows else [])
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
