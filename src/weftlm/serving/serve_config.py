"""What a server allows and where it listens."""

from __future__ import annotations

import ipaddress
import os
from contextlib import suppress

from pydantic import Field, NonNegativeInt, PositiveInt, SecretStr

from weftlm.config import Section
from weftlm.errors import ConfigError

KEYS_VARIABLE = "WEFTLM_API_KEYS"


class ServeConfig(Section):
    """Limits of a server."""

    slots: PositiveInt = Field(8, description="Batch slots per model.")
    max_waiting: NonNegativeInt = Field(64, description="Maximum queued answers per model; beyond that 429.")
    timeout_seconds: float = Field(
        120.0, gt=0, le=86_400, description="Request timeout, including time in the queue; a request may ask for less."
    )
    intake_seconds: float = Field(
        20.0, gt=0, le=3_600, description="Time for a request's head, and then its body, to arrive."
    )
    max_connections: PositiveInt = Field(400, description="Maximum number of open connections; beyond that 503.")
    max_body_bytes: PositiveInt = Field(2_000_000, description="Maximum request body size in bytes.")
    max_prompt_tokens: PositiveInt = Field(131_072, description="Maximum number of tokens of a prompt.")
    max_new_tokens: PositiveInt = Field(16_384, description="Maximum number of tokens of an answer.")
    max_answers: PositiveInt = Field(64, description="Maximum number of answers of a request, its prompts times `n`.")
    hosts: tuple[str, ...] | None = Field(
        None, description="Names the server may be reached under beside localhost and its addresses; None for any."
    )
    api_keys: tuple[SecretStr, ...] = Field((), description="Keys, any of which opens the server; empty: open to all.")


def keys_from_environment() -> tuple[str, ...]:
    """The API keys in `WEFTLM_API_KEYS`, separated by commas; none if the variable is not set.

    Raises:
        ConfigError: The variable is set and holds no key, or one that cannot be sent in a header.
    """
    given = os.environ.get(KEYS_VARIABLE)
    if given is None:
        return ()
    keys = tuple(key.strip() for key in given.split(",") if key.strip())
    if not keys:
        raise ConfigError(f"{KEYS_VARIABLE} is set and holds no key; put keys in it with commas between, or unset it")
    for place, key in enumerate(keys):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"key {place + 1} in {KEYS_VARIABLE} must be printable ASCII without blanks")
    return keys


def host_name(given: str) -> str:
    """The name or address in a Host header, without its port, in the form names are compared in."""
    name = given.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return (name.rpartition(":")[0] if name.count(":") == 1 else name).rstrip(".")


def ip_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host name is or can only mean, as localhost does; None for other names."""
    with suppress(ValueError):
        return ipaddress.ip_address("127.0.0.1" if name == "localhost" or name.endswith(".localhost") else name)
    return None
