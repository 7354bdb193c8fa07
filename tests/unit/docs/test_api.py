"""The page of the Python interface names what there is."""

import re
from importlib import import_module


def test_every_module_and_member_of_the_page_is_there(root):
    page = (root / "docs/reference/api.md").read_text(encoding="utf-8")
    entries = re.findall(r"^::: (\S+)\n(?:    options:\n      members: \[(.*)\])?", page, re.MULTILINE)
    assert entries
    gone = [
        f"{module}.{name}"
        for module, names in entries
        for name in filter(None, names.split(", "))
        if not hasattr(import_module(module), name)
    ]
    assert not gone
