"""weftlm inside other people's loops and harnesses.

Takes policies, estimators and models; gives callbacks, datasets and model adapters in the other project's terms.
Read `hf_trainer.py` first.
"""
