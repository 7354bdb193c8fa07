"""Labels of domains as names of folders and experts, and back.

    c++  <->  c%2B%2B        médecine  <->  m%C3%A9decine        .net  <->  %2Enet        con  <->  %63on

A name holds letters, digits and `.`, `_`, `-`, `%`, begins with a letter, a digit or `%`, and is safe on every file
system. Two labels have two names; where they differ in case alone, so do the names.
"""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from typing import Annotated

from pydantic import AfterValidator

MAX_NAME = 160
"""Largest length of a name; what would be longer is cut and ends in `%-` and 16 digits of its digest."""

_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices."""
_CUT = "%-"


def folder_name(label: str) -> str:
    """The name of a label."""
    name = urllib.parse.quote(label, safe="", encoding="utf-8", errors="surrogatepass").replace("~", "%7E")
    if not name:
        return "%"
    if not (name[0].isalnum() or name[0] == "%") or _RESERVED.fullmatch(name):
        name = _encoded(name[0]) + name[1:]
    if name.endswith("."):
        name = name[:-1] + _encoded(".")
    if len(name) > MAX_NAME:
        digest = hashlib.blake2b(label.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        name = re.sub(r"%.?$", "", name[: MAX_NAME - len(_CUT) - len(digest)]) + _CUT + digest
    return name


def label_of(name: str) -> str | None:
    """The label that has this name; None where it was too long, or where no label has it."""
    try:
        label = "" if name == "%" else urllib.parse.unquote(name, encoding="utf-8", errors="surrogatepass")
    except UnicodeDecodeError:
        return None
    return label if folder_name(label) == name and _CUT not in name else None


def is_name(text: str) -> bool:
    """Whether a text is some label's name."""
    if re.search(re.escape(_CUT) + "[0-9a-f]{16}$", text):
        return len(text) <= MAX_NAME and re.fullmatch(r"[A-Za-z0-9%][A-Za-z0-9._%-]*", text) is not None
    return label_of(text) is not None


def expert_name(text: str) -> str:
    """The name of an expert that is given by its name or by its domain's label."""
    return text if is_name(text) else folder_name(text)


ExpertName = Annotated[str, AfterValidator(expert_name)]
"""An expert in a recipe or an option, by its name or by its domain's label."""


def _encoded(letter: str) -> str:
    return f"%{ord(letter):02X}"
