"""What a server allows and where it listens."""

from __future__ import annotations

from pydantic import Field, SecretStr

from weftlm.config import Section


class ServeConfig(Section):
    """Limits of the HTTP side; what an engine holds is in its own section.

    Attributes:
        timeout_seconds: a request may take, its wait in the queue included; a request may ask for less.
        intake_seconds: a request's headers, and then its body, may take to arrive.
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
