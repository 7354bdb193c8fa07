"""A base model and a library of experts in, one model out that chooses experts per token and per module.

Takes adapters, gates and statistics; gives a Hugging Face model with `forward`, `generate` and a trace of its choices.
Read `router.py` first, then `routed_model.py`.
"""
