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
    """Limits of a server.

    Attributes:
        slots: Batch slots per model.
        max_waiting: Maximum number of queued answers per model; beyond that the server answers 429.
        timeout_seconds: Request timeout in seconds, including time in the queue; a request may ask for less.
        intake_seconds: Time for a request's head, and then its body, to arrive, in seconds.
        max_connections: Maximum number of open connections; beyond that the server answers 503.
        max_body_bytes: Maximum request body size in bytes.
        max_prompt_tokens: Maximum number of tokens of a prompt; the model's own context may be shorter.
        max_new_tokens: Maximum number of tokens of an answer; the model's own context may be shorter.
        max_answers: Maximum number of answers of a request, its prompts times `n`.
        hosts: Names the server may be reached under beside localhost and its addresses; None for any name.
        api_keys: Keys, any of which opens the server; empty for a server open to all who reach it.
    """

    slots: PositiveInt = 8
    max_waiting: NonNegativeInt = 64
    timeout_seconds: float = Field(default=120.0, gt=0, le=86_400)
    intake_seconds: float = Field(default=20.0, gt=0, le=3_600)
    max_connections: PositiveInt = 400
    max_body_bytes: PositiveInt = 2_000_000
    max_prompt_tokens: PositiveInt = 131_072
    max_new_tokens: PositiveInt = 16_384
    max_answers: PositiveInt = 64
    hosts: tuple[str, ...] | None = None
    api_keys: tuple[SecretStr, ...] = ()


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
