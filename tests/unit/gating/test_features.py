"""Features of sequences: what they say, and that length is not among it."""

import numpy as np
import pytest
import torch

from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.gating.features import FLOOR, sequence_features


def test_means_and_distances_to_the_best():
    found = sequence_features([[-4.0, -8.0], [-9.0, -3.0]], [4, 3])
    assert found.names == ("mean.0", "mean.1", "below_best.0", "below_best.1")
    assert found.sequence_BF.tolist() == [[-1.0, -2.0, 0.0, -1.0], [-3.0, -1.0, -2.0, 0.0]]


def test_a_text_said_twice_has_the_features_of_the_text_said_once():
    logq = np.random.default_rng(0).normal(-50, 10, size=(6, 3))
    once, twice = sequence_features(logq, [20] * 6), sequence_features(2 * logq, [40] * 6)
    torch.testing.assert_close(once.sequence_BF, twice.sequence_BF)


def test_impossible_experts_are_clipped_not_infinite():
    found = sequence_features([[-4.0, -np.inf]], [4])
    assert found.sequence_BF.tolist() == [[-1.0, -1.0 - FLOOR, 0.0, -FLOOR]]
    with pytest.raises(DataError, match="probability 0 under every one of 2 experts"):
        sequence_features([[-4.0, -1.0], [-np.inf, -np.inf]], [4, 4])


def test_tokens_are_counted_and_scores_are_numbers():
    with pytest.raises(ConfigError, match="one per sequence"):
        sequence_features([[-4.0]], [0])
    with pytest.raises(ConfigError, match="one per sequence"):
        sequence_features([[-4.0]], [1, 2])
    with pytest.raises(NumericsError, match="holds NaN"):
        sequence_features([[np.nan]], [1])
    with pytest.raises(NumericsError, match="inf"):
        sequence_features([[np.inf]], [1])
    with pytest.raises(ConfigError, match="loses whole nats"):
        sequence_features(np.zeros((1, 1), np.float16), [1])
