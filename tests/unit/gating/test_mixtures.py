"""Sets of mixtures: corners, projections, refusals."""

import numpy as np
import pytest

from weftlm.errors import ConfigError
from weftlm.gating import Box
from weftlm.gating.mixtures import kl_projection, player


def test_projection_by_hand():
    z = np.exp(kl_projection(np.log([0.7, 0.2, 0.1]), np.zeros(3), np.array([0.4, 1.0, 1.0])))
    assert z == pytest.approx([0.4, 0.4, 0.2])
    z = np.exp(kl_projection(np.log([0.7, 0.2, 0.1]), np.array([0.0, 0.0, 0.3]), np.ones(3)))
    assert z == pytest.approx([0.7 * 7 / 9, 0.7 * 2 / 9, 0.3])


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


def test_vertices_mix_the_domains():
    assert player([[0.5, 0.5], [1.0, 0.0]], 2).lam(np.array([0.5, 0.5])) == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize(
    ("mixtures", "match"),
    [
        ([[0.5, 0.6]], "sum to 1"),
        ([[1.0]], "needs 2"),
        (np.zeros((0, 2)), "hold no mixture"),
        (Box(0.6), "no mixture is within"),
        (Box(None, 0.4), "no mixture is within"),
        (Box([0.5, 0.0], [0.4, 1.0]), "no mixture is within"),
        (Box([0.1, 0.1, 0.1]), "needs 2 numbers"),
        (Box(-0.1), "from 0 to 1"),
    ],
)
def test_what_is_refused(mixtures, match):
    with pytest.raises(ConfigError, match=match):
        player(mixtures, 2)
