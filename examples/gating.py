"""A robust gate over frozen experts, on arrays: how good any model can be, how good the gate is, and a causal student.

The "experts" are Markov chains over four letters; of text only the log-probabilities would come from elsewhere.
"""

from __future__ import annotations

import numpy as np
import torch

from weftlm.distillation.config import DistilConfig
from weftlm.distillation.structural import distil_structural, student_kl
from weftlm.gating import FitConfig, ScoredSequences, certify, fit_robust_gate, sequence_features

random, length = np.random.default_rng(0), 24
chains = random.dirichlet(0.4 * np.ones(4), size=(3, 4))  # expert, letter before, letter


def scored(writer: int, count: int) -> ScoredSequences:
    """Sequences one chain wrote, scored by all: what `weftlm score` makes of language models and text."""
    letters = np.zeros((count, length + 1), dtype=int)
    for t in range(length):
        chance = chains[writer][letters[:, t]].cumsum(axis=1)
        letters[:, t + 1] = np.minimum((random.random((count, 1)) > chance).sum(axis=1), 3)
    logp_NTE = np.log(chains[:, letters[:, :-1], letters[:, 1:]]).transpose(1, 2, 0)
    tokens_N = np.full(count, length)
    features = sequence_features(logp_NTE.sum(axis=1), tokens_N, logp_NTE=logp_NTE)
    return ScoredSequences.of(logp_NTE.sum(axis=1), features=features, tokens_N=tokens_N)


torch.set_num_threads(1)
domains, samples, held_domains, held_samples = ([scored(k, 200) for k in range(3)] for _ in range(4))
fitted = fit_robust_gate(domains, samples, gate="linear", config=FitConfig(steps=500, best_response_steps=50))
certificate = certify(fitted, held_domains, held_samples)
for name in ("capacity", "worst", "gap", "z"):
    figure = getattr(certificate, name)
    print(f"{name}: {figure.value:.4f} ({figure.label})")
student = distil_structural(fitted.gate, samples, config=DistilConfig(steps=100)).gate
kl, error = student_kl(fitted.gate, student, held_samples)
print(f"student, KL to the gated model: {kl:.4f} ± {error:.4f} nats")
