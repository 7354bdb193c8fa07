"""Sets of mixtures: corners, projections, refusals."""

import numpy as np
import pytest

from weftlm.gating import Box
from weftlm.gating.mixtures import kl_projection, player


def test_bounds_that_leave_one_point():
    point = np.array([0.2, 0.5, 0.3])
    assert np.exp(kl_projection(np.log([0.9, 0.05, 0.05]), point, np.ones(3))) == pytest.approx(point)
    assert np.exp(kl_projection(np.log([0.9, 0.05, 0.05]), np.zeros(3), point)) == pytest.approx(point)
    value, nu = player(Box(point), 3).best(np.array([1.0, 2.0, 4.0]))
    assert value == pytest.approx(float(point @ [1.0, 2.0, 4.0]))
    assert nu == pytest.approx(point)


def test_an_ignored_mixture_comes_back_quickly():
    adversary = player(None, 2)
    log_nu = adversary.start()
    for _ in range(1000):
        log_nu = adversary.step(log_nu, np.array([1.0, 0.0]))
    for _ in range(31):
        log_nu = adversary.step(log_nu, np.array([0.0, 1.0]))
    assert np.exp(log_nu)[1] > 0.5
