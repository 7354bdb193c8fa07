"""PHATGOOSE: gates trained by each contributor alone choose experts per token and module; and its paper's baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.experts.expert import Expert
from weftlm.routing.config import AverageActivationConfig, PhatgooseConfig, RandomConfig, RouterConfig, routers
from weftlm.routing.prototypes import StandardisedRouter, standardise
from weftlm.routing.router import Need, TargetModule


@routers.register(
    "phatgoose",
    does="takes the k experts whose trained gate is nearest, per token and module",
    costs="gates, 100 steps per expert; a prefill among 166 experts 1.3 (hidden size 2048) to 2.2 (512) times "
    "the base's, a decoded token 1.2 to 1.7 times",
    paper="arXiv:2402.05859",
)
class PhatgooseRouter(StandardisedRouter):
    """Per token and per module, the k experts whose gates agree best with the module's input.

        c_z = standardise(u) . standardise(v_z) / sqrt(I)     v_z: the expert's gate of this module, I its input width
        p   = softmax over the k highest c_z                  y = W u + sum_z p_z scale_z B_z A_z u

    Standardisation is to zero mean and unit biased variance over the I entries, epsilon 1e-5. The sigmoid of gate
    training is not used here, and the weights multiply what experts give, not what they read.

    Paper: Muqeeth, Liu, Liu, Raffel, ICML 2024, arXiv:2402.05859. `temperature` and `abstain_below` are choices of
    this implementation; their defaults change nothing.
    """

    Config: ClassVar[type[RouterConfig]] = PhatgooseConfig
    needs: ClassVar[frozenset[Need]] = frozenset({"gate"})

    def prototypes(self, experts: Sequence[Expert], target: TargetModule) -> Tensor:
        return standardise(torch.stack([each.gate.vectors[target.name] for each in experts if each.gate is not None]))


@routers.register(
    "average-activation",
    does="takes the k experts whose mean input is nearest, per token and module",
    costs="as `phatgoose`; the statistics, one pass over some text of each expert",
    paper="arXiv:2402.05859",
)
class AverageActivationRouter(StandardisedRouter):
    """As PHATGOOSE, with v_z the mean input of the module over the expert's own training examples; nothing is trained.

    A baseline of Muqeeth et al. 2024, arXiv:2402.05859.
    """

    Config: ClassVar[type[RouterConfig]] = AverageActivationConfig
    needs: ClassVar[frozenset[Need]] = frozenset({"statistics"})

    def prototypes(self, experts: Sequence[Expert], target: TargetModule) -> Tensor:
        means = [each.statistics.means[target.name] for each in experts if each.statistics is not None]
        return standardise(torch.stack(means))


@routers.register(
    "random",
    does="takes k experts by random vectors; a floor to compare with",
    costs="as `phatgoose`, without gates",
)
class RandomRouter(StandardisedRouter):
    """As PHATGOOSE, with gates drawn from a normal distribution: the floor any trained gate must beat."""

    Config: ClassVar[type[RouterConfig]] = RandomConfig
    by_place: ClassVar[bool] = True
    config: RandomConfig

    def prototypes(self, experts: Sequence[Expert], target: TargetModule) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + target.index)
        return standardise(torch.randn(len(experts), target.width, generator=generator))
