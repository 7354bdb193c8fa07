"""`weftlm route`: choose experts per token and per module, and see what that gives.

Takes arguments; gives results on stdout. One file per command, loaded lazily. Read `build.py` first.
"""

COMMANDS: dict[str, str] = {
    "build": "Write a routed model: base, experts and router in one folder.",
    "trace": "Show which experts work on each token of a text.",
    "eval": "Compare routers, single experts and the base on held-out text.",
}
"""Name -> one line for `weftlm route --help`, in the order of use."""
