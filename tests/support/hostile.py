"""Names that try to break or spoof what shows them, and what must not be left of them where a person reads."""

from __future__ import annotations

import re
import unicodedata

NAMES = (
    "[/news]", "[bold]loud[/bold]", "[link=file:///etc/passwd]x[/link]", ":smile:", "\x1b[2J\x1b[H", "\x1b]0;title\x07",
    "two\nlines", "back\rward", "tab\there", "\u202egnp.exe", "ze\u200bro", "\u2028line", "\x9b2J", "\x7f",
    "<script>alert(1)</script>", "</title><h1>", '"><img src=x onerror=alert(1)>', "]]>", "-->", "{{ 7 * 7 }}",
    "{name}", "$title ${title}", "%s %d %(x)s", "=cmd()", "a`b``c", "_under", "👨\u200d👩\u200d👧", "名前",
    "c++", "../up", "__proto__", "n" * 300,
)  # fmt: skip
"""Names of domains, experts, runs, tasks and models: all of them work, and none is refused."""


def harmless_line(text: str) -> bool:
    """Whether no character of a printed text can act: line ends and rich's own styles aside."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return not any(
        (unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") and one != "\n")
        or (unicodedata.category(one) == "Cf" and one != "\u200d")
        for one in plain
    )  # fmt: skip
