"""weftlm: modular language models over PyTorch and Hugging Face.

Takes text in several domains; gives mixtures, models and reports. Read `docs/index.md` first, then `corpora/source.py`.
"""

__version__ = "0.1.0"
