"""Documents and their labels in; named domains with train, held-out and target sets out.

Takes `Document`s; gives `Domain`s, embeddings, clusters and the target's histogram over domains.
Read `domain.py` first.
"""
