"""Lets the reference's parser see a docstring's sections, which in this code follow each other with no empty line."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"(?<!\n)\n((?:Args|Attributes|Raises|Returns|Yields):\n)")


class SeparateSections(griffe.Extension):
    """Puts an empty line before every section heading."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class and function that is read."""
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub(r"\n\n\1", obj.docstring.value)
