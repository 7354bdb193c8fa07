"""Documents in, memory-mapped token stores out.

Takes text files, JSON Lines, Parquet, Hugging Face datasets and the built-in corpora; gives a `Source` per domain.
Read `source.py` first.
"""
