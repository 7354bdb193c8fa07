"""What a recipe will cost on given hardware, before anything is run.

Takes a recipe and the name of a machine, gives time, memory, traffic and disk of every stage and what limits each.
Read `estimate.py` first; `trace.py` tells how work is counted, `calibrate.py` how this machine's speed is measured.
"""
