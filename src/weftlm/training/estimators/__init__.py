"""A model, a loss and sequences of known groups in; how each group's gradient points along a direction out.

Takes a direction v (usually the target's gradient); gives <g_i, v> by one of four estimators, a file each.
Read `direction.py` first, then `separate.py` (the exact one), then `shadow.py`.
"""
