"""What a server allows and where it listens."""

from __future__ import annotations

import ipaddress
import os
import socket

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, SecretStr

from weftlm.config import Section
from weftlm.errors import ConfigError

KEYS_VARIABLE = "WEFTLM_API_KEYS"


class ServeConfig(Section):
    """Limits of the HTTP side; what an engine holds is in its own section.

    Attributes:
        timeout_seconds: a request may take, its wait in the queue included; a request may ask for less.
        intake_seconds: a request's headers, and then its body, may take to arrive.
        keep_alive_seconds: a connection may wait for its next request, or to be read to its end.
        max_connections: open at a time, over all clients; fewer where the system allows fewer open files.
        max_connections_per_client: of them from one address.
        max_body_bytes: of a request.
        max_prompt_characters: of one prompt, or of one part of a message.
        max_prompt_tokens: of one prompt; the model's own context may be shorter.
        max_new_tokens: one answer may have; the model's own context may be shorter.
        max_prompts: in one request.
        max_choices: answers to one prompt (`n`).
        max_answers: to all prompts of a request; no more than an engine runs and lets wait.
        max_messages: of one chat.
        max_top_logprobs: alternatives reported for each token.
        hosts: names the server may be reached under beside localhost and its addresses; None for any name.
        api_keys: any of them opens the server; empty for a server open to all who reach it.
    """

    timeout_seconds: float = Field(default=120.0, gt=0, le=86_400, allow_inf_nan=False)
    intake_seconds: float = Field(default=20.0, gt=0, le=3_600, allow_inf_nan=False)
    keep_alive_seconds: float = Field(default=30.0, gt=0, le=3_600, allow_inf_nan=False)
    max_connections: int = Field(default=1_024, ge=1)
    max_connections_per_client: int = Field(default=128, ge=1)
    max_body_bytes: int = Field(default=2_000_000, ge=1)
    max_prompt_characters: int = Field(default=500_000, ge=1)
    max_prompt_tokens: int = Field(default=131_072, ge=1)
    max_new_tokens: int = Field(default=16_384, ge=1)
    max_prompts: int = Field(default=64, ge=1)
    max_choices: int = Field(default=16, ge=1)
    max_answers: int = Field(default=64, ge=1)
    max_messages: int = Field(default=1_000, ge=1)
    max_top_logprobs: int = Field(default=20, ge=0, le=20)
    hosts: tuple[str, ...] | None = None
    api_keys: tuple[SecretStr, ...] = ()


class EngineConfig(Section):
    """How an engine shares a model among requests."""

    slots: PositiveInt = Field(8, description="requests generated at a time")
    max_waiting: NonNegativeInt = Field(64, description="requests that may wait for a place; more are refused")
    timeout_seconds: PositiveFloat | None = Field(
        120.0, description="from asking to the last token, where a request does not say; null: no limit then"
    )
    prompt_piece_tokens: int = Field(
        512, ge=2, description="tokens of a prompt read between two tokens of the requests that run"
    )
    batching: bool = Field(True, description="false: every request in passes of its own, in turn")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host's addresses; False for a name that has none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def keys_from_environment() -> tuple[str, ...]:
    """The API keys in `WEFTLM_API_KEYS`, with commas between; none where the variable is not set.

    Raises:
        ConfigError: the variable is set and holds no key, or one that cannot stand in a header.
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
