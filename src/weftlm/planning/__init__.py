"""Time, memory, traffic and disk of a recipe on given hardware, before anything is run.

Takes a recipe and the name of a machine, gives a `Stage` of figures for each stage of the recipe, and the assumptions.
Read `plan.py` first; `counts.py` counts work, `probe.py` times this machine.
"""
