"""Average activation: experts' mean inputs in place of trained gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.experts.expert import Expert
from weftlm.routing.config import AverageActivationConfig, RouterConfig, routers
from weftlm.routing.prototypes import StandardisedRouter, standardise
from weftlm.routing.router import Need, Site


@routers.register(
    "average-activation",
    does="takes the k experts whose mean input is nearest, per token and module",
    costs="as `phatgoose`; the statistics, one pass over some text of each expert",
    paper="arXiv:2402.05859",
)
class AverageActivationRouter(StandardisedRouter):
    """As PHATGOOSE, with v_z the mean input of the module over the expert's own training examples.

    Needs the expert's statistics and no training. A baseline of Muqeeth et al. 2024, arXiv:2402.05859.
    """

    Config: ClassVar[type[RouterConfig]] = AverageActivationConfig
    needs: ClassVar[frozenset[Need]] = frozenset({"statistics"})

    def prototypes(self, experts: Sequence[Expert], site: Site) -> Tensor:
        return standardise(
            torch.stack([expert.statistics.means[site.name] for expert in experts if expert.statistics is not None])
        )
