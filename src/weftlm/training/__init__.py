"""A model, sources and a mixture policy in; a trained model and its history out.

Takes a sampler, a policy and an alignment engine; gives checkpoints and metrics that survive any interruption.
Read `loop.py` first, then `alignment.py`.
"""
