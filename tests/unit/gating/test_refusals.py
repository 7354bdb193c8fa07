"""What the room refuses, each with what came and what is allowed."""

import numpy as np
import pytest
import torch
from support.gating import random_problem

from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.gating import Box, ScoredSequences, channel_capacity, enumerated, sampled_capacity
from weftlm.gating.bayes import BayesGate, FixedShareGate
from weftlm.gating.config import gate_config
from weftlm.gating.gate import Features, init_gate
from weftlm.gating.linear import ConstantGate
from weftlm.gating.mixtures import player
from weftlm.gating.prefix_gate import PrefixGate
from weftlm.gating.problem import make_problem
from weftlm.gating.sequences import sequence_features

P, Q = random_problem(3)
POINTS, FAR = (Features(points_B=torch.tensor([0, last])) for last in (4, 5))


def features(rows, names=()):
    return Features(sequence_BF=torch.tensor(rows, dtype=torch.float64), names=names)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Features(3, points_B=torch.zeros(2, dtype=torch.int64)), ConfigError, "how many sequences"),
        (Features, ConfigError, "how many sequences"),
        (lambda: features([[1.0]], ("a", "b")), ConfigError, "2 names"),
        (lambda: features([[float("-inf")]]), NumericsError, "clips"),
        (lambda: Features(logp_BTE=torch.full((1, 2, 2), torch.nan)), NumericsError, "token scores"),
        (lambda: Features(logp_BTE=torch.zeros(1, 2, 2), mask_BT=torch.ones(1, 3)), ConfigError, "mask"),
        (lambda: Features.joined([features([[1.0]]), Features(2)]), ConfigError, "different features"),
        (lambda: Features.joined([features([[1.0]]), features([[1.0, 2.0]])]), ConfigError, "width"),
        (lambda: init_gate("linear", 2, Features(3)), ConfigError, "sequence_features"),
        (lambda: init_gate("liner", 2, Features(3)), ConfigError, "did you mean 'linear'"),
        (lambda: gate_config({"gate": "linear", "featurs": 3}), ConfigError, "unknown key"),
        (lambda: gate_config({}), ConfigError, "must be one of"),
        (lambda: ConstantGate.of([1.5, -0.5]), ConfigError, "sum to 1"),
        (lambda: PrefixGate.of([0.5, 0.5]).with_top(3), ConfigError, "top is 3"),
        (lambda: sequence_features([[-1.0], [-np.inf]], [4, 4]), DataError, "probability 0 under every one of 1"),
        (lambda: sequence_features([[-4.0]], [0]), ConfigError, "one per sequence"),
        (lambda: sequence_features([[np.inf]], [1]), NumericsError, "inf"),
        (lambda: sequence_features(np.zeros((1, 1), np.float16), [1]), ConfigError, "loses whole nats"),
        (lambda: ScoredSequences.of(np.zeros((0, 2)), name="law"), DataError, "law: 0 sequences"),
        (lambda: ScoredSequences.of([[0.0, np.nan]]), NumericsError, r"first at \(0, 1\)"),
        (lambda: ScoredSequences.of([0.0]), ConfigError, "N x E"),
        (lambda: ScoredSequences.of([[0.0]], tokens_N=[0]), ConfigError, "tokens_N"),
        (lambda: ScoredSequences.of([[0.0]], features=Features(2)), ConfigError, "features of 2"),
        (lambda: ScoredSequences.of([[0.0], [0.0]], weights_N=[0.5, 0.4]), NumericsError, r"sum to 0\.9"),
        (lambda: ScoredSequences.of([[0.0]]).split(0.5, 0), DataError, "cannot be split"),
        (lambda: ScoredSequences.of([[0.0], [0.0]]).split(1.0, 0), ConfigError, "hold out"),
        (lambda: enumerated([[0.5, 0.5]], [[1.0]]), ConfigError, "one support"),
        (lambda: enumerated([[0.5, 0.4]], [[0.5, 0.5]]), NumericsError, r"row 0 of P sums to 0.9"),
        (lambda: enumerated([[1.5, -0.5]], [[0.5, 0.5]]), NumericsError, "both signs"),
        (lambda: player([[0.5, 0.6]], 2), ConfigError, "sum to 1"),
        (lambda: player([[1.0]], 2), ConfigError, "needs 2"),
        (lambda: player(np.zeros((0, 2)), 2), ConfigError, "hold no mixture"),
        (lambda: player(Box(0.6), 2), ConfigError, "no mixture is within"),
        (lambda: player(Box(None, 0.4), 2), ConfigError, "no mixture is within"),
        (lambda: player(Box([0.5, 0.0], [0.4, 1.0]), 2), ConfigError, "no mixture is within"),
        (lambda: player(Box([0.1, 0.1, 0.1]), 2), ConfigError, "needs 2 numbers"),
        (lambda: player(Box(-0.1), 2), ConfigError, "from 0 to 1"),
        (lambda: FixedShareGate.of([0.5, 0.5], 1.5), ConfigError, r"share.*1"),
        (lambda: BayesGate.of([0.3, 0.7]).log_weights(Features(logp_BTE=torch.zeros(1, 1, 3))), ConfigError, "over 2"),
        (lambda: init_gate("bayes", 2, Features(2)), ConfigError, "log-probability of every token"),
        (lambda: init_gate("tabular", 2, POINTS).log_weights(FAR), ConfigError, "over 5 points"),
        (lambda: channel_capacity([[0.5, 0.5], [0.5, 0.3]]), NumericsError, r"row 1 of logP_DX sums to 0\.8"),
        (lambda: channel_capacity(np.zeros((0, 3))), ConfigError, "a row and a column"),
        (lambda: channel_capacity([[1.0]], max_iterations=0), ConfigError, "max_iterations"),
        (lambda: sampled_capacity([]), DataError, "no domains"),
        (lambda: sampled_capacity([[[-1.0, -2.0]], np.zeros((0, 2))]), DataError, "domain 1 has no samples"),
        (lambda: sampled_capacity([[[-np.inf, -2.0]], [[-1.0, -1.0]]]), DataError, "own model"),
        (lambda: sampled_capacity([[[-1.0]]], scale_D=[0.0]), ConfigError, "a positive number"),
        (lambda: sampled_capacity([[[-1.0]], [[-1.0]]]), ConfigError, "1 columns"),
        (lambda: make_problem([[0.5, 0.5]], [[1.0, 0.0]]), DataError, "probability 0 under every one of 1 experts"),
        (lambda: make_problem(P, 1.1 * Q), NumericsError, r"of Q sums to 1\.1"),
        (lambda: make_problem(P * np.nan, Q), NumericsError, "holds NaN"),
        (lambda: make_problem(P[0], Q), ConfigError, "D x X"),
        (lambda: make_problem(P, Q, offsets=[0.0]), ConfigError, "one finite number each"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
