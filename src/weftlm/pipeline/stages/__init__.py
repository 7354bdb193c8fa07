"""The stages of a project, one file each: what decides it, what it leaves, what would make it fail, how it is made.

Takes a recipe, gives the files of a run folder. Read `weftlm.pipeline.stage` first, then `prepare.py`.
"""
