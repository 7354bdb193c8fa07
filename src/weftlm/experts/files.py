"""Names of an expert's files, and parsers that trust nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weftlm.errors import ExpertError, reason
from weftlm.files import parse_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "card.json"
GATE, STATISTICS = "gate.safetensors", "statistics.safetensors"
METADATA = "weftlm"
"""Key of the facts in the metadata of a gate's and of statistics' file."""


def to_json(name: str, what: str, value: Mapping[str, Any]) -> str:
    """A mapping of JSON values as text.

    Raises:
        ExpertError: it holds something JSON cannot, NaN and infinity included.
    """
    try:
        return json.dumps(dict(value), indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ExpertError(
            f"expert {name!r}: {what} must hold JSON values (text, finite numbers, lists, mappings): {reason(error)}"
        ) from error


def parse_tensors(name: str, file: str, data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ExpertError: it is truncated, malformed or of an unknown type.
    """
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import load  # noqa: PLC0415 - torch; listing a library needs none

    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise ExpertError(
            f"expert {name!r}: {file} is truncated or not safetensors ({reason(error)}); copy or export it again"
        ) from error


def parse_metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file that `parse_tensors` took; {} where there is none."""
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found = header.get("__metadata__", {})
    return found if isinstance(found, dict) else {}
