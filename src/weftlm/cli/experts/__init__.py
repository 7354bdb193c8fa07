"""`weftlm experts`: make experts, and keep a library of them.

Takes arguments; gives results on stdout. One file per command, loaded lazily; `import_.py` is `weftlm experts import`.
Read `train.py` first.
"""

COMMANDS: dict[str, str] = {
    "train": "Make an expert of every domain: adapter, gate, statistics; continues where it stopped.",
    "gate": "Train one expert's gate again on its own domain alone.",
    "import": "Add PEFT LoRA adapters to a library.",
    "list": "List the experts of a library.",
    "show": "Show a library, or one expert in full.",
    "merge": "Merge experts into one adapter.",
    "remove": "Take experts out of a library.",
}
"""Name -> one line for `weftlm experts --help`, in the order of use."""
