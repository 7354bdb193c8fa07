"""Small Markov chains as experts, every text listed: whatever distillation claims can be summed up by brute force."""

import itertools

import numpy as np
import torch
from support.gating import chain_scores, markov

from weftlm.gating import Features, ScoredSequences
from weftlm.gating.sequences import sequence_features


class Language:
    """All texts of one length under Markov chains.

    texts: X x T; logp_XTE: log q_k(x_t | x_<t); q_XE: probabilities of whole texts.
    """

    def __init__(self, seed, experts=3, letters=3, length=5, chains=None):
        start, step = chains or markov(seed, experts, letters)
        self.letters, self.length, self.experts = letters, length, len(start)
        self.chains = (start, step)
        self.texts = list(itertools.product(range(letters), repeat=length))
        scores = np.stack([chain_scores(start, step, text) for text in self.texts])
        self.logp_XTE = torch.from_numpy(scores)
        self.logq_XE = self.logp_XTE.sum(dim=1)
        self.q_XE = self.logq_XE.exp().numpy()
        tokens = torch.full((len(self.texts),), float(length))
        plain = sequence_features(self.logq_XE, tokens, logp_NTE=self.logp_XTE)
        self.features = Features(
            sequence_BF=plain.sequence_BF,
            names=plain.names,
            points_B=torch.arange(len(self.texts)),
            logp_BTE=self.logp_XTE,
        )

    def scored(self, rows, weights=None, name=""):
        rows = torch.as_tensor(rows)
        return ScoredSequences.of(
            self.logq_XE[rows],
            features=self.features.rows(rows),
            tokens_N=[self.length] * len(rows),
            weights_N=weights,
            name=name,
        )

    def support(self, p_X, name=""):
        """The whole language with the probabilities of one distribution."""
        return self.scored(torch.arange(len(self.texts)), p_X, name)

    def enumerated(self):
        return [self.support(self.q_XE[:, k], f"expert {k}") for k in range(self.experts)]

    def draws(self, count, seed):
        r = np.random.default_rng(seed)
        rows = [r.choice(len(self.texts), count, p=self.q_XE[:, k]) for k in range(self.experts)]
        return [self.scored(each, name=f"expert {k}") for k, each in enumerate(rows)]

    def model(self, gate):
        """pi_g(x) by the definition, X, not divided by Z."""
        return (gate.log_weights(self.features).exp().numpy() * self.q_XE).sum(axis=1)

    def causal_model(self, gate):
        """A causal gate's probability of every text, token by token."""
        logw_XTE = gate.log_weights(self.features)
        return torch.logsumexp(logw_XTE + self.logp_XTE, dim=-1).sum(dim=1).exp().numpy()

    def best_router(self, gate):
        """gamma_k(x_<t) prop. to q_k(x_<t) E_{q_k}[g(x, k) | x_<t] = sum over completions of g q: X x T x E."""
        joint_XE = gate.log_weights(self.features).exp().numpy() * self.q_XE
        out = np.zeros((len(self.texts), self.length, self.experts))
        for t in range(self.length):
            totals = {}
            for text, row in zip(self.texts, joint_XE, strict=True):
                totals[text[:t]] = totals.get(text[:t], 0.0) + row
            for x, text in enumerate(self.texts):
                out[x, t] = totals[text[:t]] / totals[text[:t]].sum()
        return out

    def optimal_router(self, pi_X, updates=3000):
        """Weights per prefix that maximise E_{x_t ~ pi | x_<t} log sum_k gamma_k q_k(x_t | x_<t), by EM: X x T x E.

        No causal gate over these experts has a lower KL(pi || .): the problem falls apart over prefixes and is concave.
        """
        q_XTE = self.logp_XTE.exp().numpy()
        tree_X = (pi_X / pi_X.sum()).reshape((self.letters,) * self.length)  # texts stand in lexicographic order
        out = np.zeros((len(self.texts), self.length, self.experts))
        for t in range(self.length):
            mass_PV = tree_X.reshape(self.letters**t, self.letters, -1).sum(axis=2)
            mass_PV = mass_PV / mass_PV.sum(axis=1, keepdims=True)
            q_PVE = q_XTE[:, t].reshape(self.letters**t, self.letters, -1, self.experts)[:, :, 0]
            gamma_PE = np.full((len(mass_PV), self.experts), 1.0 / self.experts)
            for _ in range(updates):
                mixed_PV = (q_PVE * gamma_PE[:, None]).sum(axis=2)
                gamma_PE = gamma_PE * (q_PVE * (mass_PV / mixed_PV)[..., None]).sum(axis=1)
            out[:, t] = gamma_PE.repeat(len(out) // len(gamma_PE), axis=0)
        return out

    def best_single(self, pi_X):
        """The expert per prefix that maximises E_{x_t ~ pi | x_<t} log q_k(x_t | x_<t), as one-hot weights."""
        pi_X = pi_X / pi_X.sum()
        out = np.zeros((len(self.texts), self.length, self.experts))
        for t in range(self.length):
            members = {}
            for x, text in enumerate(self.texts):
                members.setdefault(text[:t], []).append(x)
            for rows in members.values():
                worth = pi_X[rows] @ self.logp_XTE[rows, t].numpy()
                out[np.ix_(rows, [t], [int(worth.argmax())])] = 1.0
        return out

    def routed(self, gamma_XTE):
        """The model of a router given as a table."""
        return (gamma_XTE * self.logp_XTE.exp().numpy()).sum(axis=-1).prod(axis=-1)
