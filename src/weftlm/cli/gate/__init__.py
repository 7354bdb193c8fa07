"""`weftlm gate`: one gate over frozen experts, best against the worst mixture of domains.

Takes a recipe whose experts are scored (`weftlm score`); gives results on stdout. One file per command, loaded lazily.
Read `fit.py` first.
"""

COMMANDS: dict[str, str] = {
    "fit": "Fit the gate that is best against the worst mixture of domains.",
    "distil": "Make causal models of the gate that can be served: full, sparse, dense.",
    "certify": "Measure a gate on held-out sequences: bounds, estimates, exact figures.",
}
"""Name -> one line for `weftlm gate --help`, in the order of use."""
