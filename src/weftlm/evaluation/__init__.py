"""A language model and held-out tokens in; numbers with standard errors out.

Takes token sources; gives nats per token, perplexity and bits per byte for each set.
Read `result.py` first.
"""
