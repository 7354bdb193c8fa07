"""Domains in, an online mixture over them out.

Takes what a training loop measured; gives weights over domains and the resumable draw that follows them.
Read `policy.py` first, then `sampler.py`.
"""
