"""A recipe's model section in, a causal language model out.

Takes an architecture or a pretrained name; gives a Hugging Face model and the `LanguageModel` view evaluation knows.
Read `language_model.py` first.
"""
