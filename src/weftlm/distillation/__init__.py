"""A gate over frozen experts in, a student that can be served out: a causal gate, a sparse one, or one small model.

Takes gates and samples of the experts, scored per token; gives students, and how far from the gated model they are.
Read `structural.py` first, then `sparse.py` and `dense.py`.
"""
