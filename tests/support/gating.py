"""Problems for the tests of the gating room: the reference problem of its tables, and small random ones."""

import itertools

import numpy as np


def normalised(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return rows / rows.sum(axis=-1, keepdims=True)


def reference(eps):
    """3 domains and 3 experts over 40 points; experts differ from their domains by noise of size eps."""
    r = np.random.default_rng(0)
    P = normalised(np.exp(1.5 * r.normal(size=(3, 40))))
    return P, normalised(P * np.exp(eps * r.normal(size=(3, 40))))


def random_problem(seed, domains=3, experts=3, points=8, noise=1.0):
    """Random domains and experts over a few points."""
    r = np.random.default_rng(seed)
    P = normalised(np.exp(1.5 * r.normal(size=(domains, points))))
    base = P[np.arange(experts) % domains]
    return P, normalised(base * np.exp(noise * r.normal(size=(experts, points))))


def kl(p, q):
    """KL of two distributions, nats."""
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / q[seen])).sum())


def markov(seed, experts=3, letters=3):
    """Start and transition probabilities of Markov chains: (E x V, E x V x V)."""
    r = np.random.default_rng(seed)
    start = normalised(np.exp(r.normal(size=(experts, letters))))
    return start, normalised(np.exp(1.5 * r.normal(size=(experts, letters, letters))))


def chain_scores(start, step, text):
    """log q_k(x_t | x_<t) of one text, T x E."""
    first = [np.log(start[:, text[0]])]
    return np.stack(first + [np.log(step[:, a, b]) for a, b in itertools.pairwise(text)])
