"""Documents and their labels in; named domains with train, held-out and target sets out.

Takes `Document`s; gives embeddings, clusters, splits and the target's histogram over domains.
"""
