"""A base model and domains in, a library of experts out: adapters, each with what a router must know of it.

Takes LoRA adapters, trained here or imported from PEFT folders; gives a library on disk in PEFT's own format.
Read `expert.py` first, then `library.py`.
"""
