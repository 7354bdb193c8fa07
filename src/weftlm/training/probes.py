"""Where gradient alignment is measured: which sequences are drawn for it, and what becomes of the numbers.

    v         the gradient on the target's sequences, or on sequences of all domains in equal shares
    <g_i, v>  for every group i: a domain, or a distribution over domains

Sequences drawn here cost no training tokens, and draws are a function of (seed, step). The training loop and the loops
of others (`weftlm.integrations.online_mixture`) probe alike, number for number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weftlm.corpora.source import Source
from weftlm.mixture.loader import MixtureLoader, sequence_counts
from weftlm.mixture.policy import Alignment, MixturePolicy, MixtureSetting
from weftlm.mixture.sampler import MixtureSampler
from weftlm.models.hf import sequence_losses
from weftlm.training import alignment as align
from weftlm.training.alignment import Direction
from weftlm.training.config import AlignmentConfig, derive_seed


class AlignmentProbes:
    """What a policy wants measured, on sequences of their own.

    Args:
        policy: its `needs` decide the direction, the groups and whether norms count.
        setting: what is known of the domains.
        target: the target's tokens; needed by policies that follow a target.
        loader: of the domains.
        config: how much is drawn, and the estimator's options.
        seed: of the draws.
        micro_batch: sequences per backward pass of one process.
        device: sequences are measured on.
        rank: this process.
        world: processes; each measures its rows, and sums are reduced over all.

    Attributes:
        kind: `target` or `generalist`, the direction's; None for policies that need no alignment.
        groups_GD: each group's distribution over the domains, float64.
    """

    def __init__(
        self,
        policy: MixturePolicy[Any],
        setting: MixtureSetting,
        target: Source | None,
        loader: MixtureLoader,
        config: AlignmentConfig,
        *,
        seed: int,
        sequence_length: int,
        micro_batch: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.policy = policy
        self.loader, self.config, self.micro_batch, self.device = loader, config, micro_batch, device
        self.rank, self.world = rank, world
        self.kind = next((kind for kind in ("target", "generalist") if f"{kind}_alignment" in policy.needs), None)
        self.basis = "basis" in policy.needs
        self.groups_GD = torch.eye(len(setting.domains), dtype=torch.float64)
        if self.basis and setting.basis_ND is not None:
            self.groups_GD = setting.basis_ND
        self.normalize = getattr(policy.config, "normalize", None)
        self._adam = getattr(policy.config, "precondition", "none") == "adam"
        self._rotating: MixtureLoader | None = None
        if self.kind == "target":
            assert target is not None
            counts = sequence_counts([target], sequence_length, ["target"])
            sampler = MixtureSampler(counts, min(counts[0], config.target_sequences), derive_seed(seed, "target"))
            self._rotating = MixtureLoader((target,), sampler, sequence_length)

    def choose(self, model: nn.Module, *, accumulation_steps: int, batch_size: int) -> align.Choice | None:
        """The estimator (`choose_for_policy`); None for policies that need no alignment.

        Raises:
            ConfigError: no estimator can measure what the policy needs on this model.
        """
        return align.choose_for_policy(
            self.policy, self.config, model=model, groups=len(self.groups_GD), accumulation_steps=accumulation_steps,
            batch_size=batch_size, losses=sequence_losses,
        )  # fmt: skip

    def direction(
        self, model: nn.Module, step: int, optimizer: Any, parameters: Mapping[str, nn.Parameter]
    ) -> Direction:
        """v after so many steps; preconditioned where the policy asks, from the first step on.

        Raises:
            NumericsError: it is not finite.
        """
        if self._rotating is not None:
            tokens = self._rotating.probe_tokens(
                self._rotating.sampler.probe(step, None, self._rotating.sampler.batch_size)
            )
        else:
            domains = self.groups_GD.shape[1]
            drawn = self.loader.sampler.probe(
                2 * step + 1, np.full((1, domains), 1.0 / domains), self.config.target_sequences
            )
            tokens = self.loader.probe_tokens(drawn)
        found = align.gradient_direction(
            model, sequence_losses, self._share(tokens).to(self.device), micro_batch=self.micro_batch
        )
        return align.precondition(found, optimizer, parameters) if self._adam and step > 0 else found

    def measure(self, estimator: str, model: nn.Module, step: int, direction: Direction) -> Alignment:
        """<g_i, v> of every group on sequences drawn after so many steps.

        Raises:
            NumericsError: a number is not finite.
        """
        drawn = self.loader.sampler.probe(2 * step, self.groups_GD.numpy(), self.config.sequences_per_group)
        tokens, groups = self.loader.probe_tokens(drawn), torch.from_numpy(drawn.groups_N)
        return align.probe_alignment(
            estimator, model, sequence_losses, self._share(tokens).to(self.device), self._share(groups),
            len(self.groups_GD), direction, self.config, micro_batch=self.micro_batch,
        )  # fmt: skip

    def for_policy(self, alignment: Alignment, gradient_norm: float | None) -> Alignment:
        """What the policy is told: with the norm of the step's gradient, where it is known.

        Only some estimators measure the groups' norms: eta must mean the same whichever was chosen, so these stay only
        where the policy asked for them.
        """
        if gradient_norm is not None:
            alignment = align.with_batch_norm(alignment, gradient_norm)
        return alignment if self.normalize == "cosine" else dataclasses.replace(alignment, norms_G=None)

    def _share(self, rows: Tensor) -> Tensor:
        """This rank's rows of a probe; sums and counts are reduced over ranks afterwards."""
        return rows[self.rank :: self.world]
