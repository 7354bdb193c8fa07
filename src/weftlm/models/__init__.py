"""A recipe's model section in, a causal language model out.

Takes an architecture or a pretrained name; gives a Hugging Face model, with adapters where they are asked for.
Read `factory.py` first.
"""
