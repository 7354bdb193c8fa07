"""A recipe in, a run folder out.

Takes a YAML recipe; gives prepared data, trained models, evaluations and reports by calling the rooms in order.
Read `recipe.py` first.
"""
