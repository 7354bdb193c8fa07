"""PEFT LoRA adapters from a folder or the Hugging Face hub as experts of a library's base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftlm.corpora.labels import folder_name
from weftlm.errors import ExpertError, reason
from weftlm.experts.expert import CONFIG, WEIGHTS, BaseReference, Expert, base_problem, is_folder, same_base
from weftlm.experts.library import check_name
from weftlm.places import locate

if TYPE_CHECKING:
    from torch import nn


def read_peft(
    source: str,
    base: BaseReference,
    *,
    name: str | None = None,
    revision: str | None = None,
    model: nn.Module | None = None,
    assume_base: bool = False,
) -> Expert:
    """Read a PEFT LoRA adapter for a library; nothing pickled is fetched.

    An adapter is taken that names the library's base, or a folder that holds the same model, and whose modules and
    shapes are those of that base.

    Args:
        source: Folder, or hub id such as `owner/adapter`.
        base: Base of the library.
        name: Name of the expert; the last part of `source` where None.
        revision: Hub branch, tag or commit.
        model: The base, or its outline on the meta device; None where it is not at hand: modules and shapes are then
            checked when it is loaded.
        assume_base: Whether an adapter that names another base, or none, is taken as made for this one; the card
            records it.
    Returns:
        The expert; its card holds the source, the commit, and the base it named where that was overruled.
    Raises:
        ExpertError: nothing is there, it is no plain LoRA, or it is of another base.
    """
    from weftlm.experts.lora import check_fits, read_lora  # noqa: PLC0415 - torch; listing a library needs none
    from weftlm.models.fingerprint import base_fingerprint  # noqa: PLC0415
    from weftlm.models.open import load_base  # noqa: PLC0415

    folder = Path(source).resolve()
    card: dict[str, Any] = {"source": source}
    name = folder_name(folder.name) if name is None else name
    check_name(name)
    if not is_folder(source):
        folder = fetch_adapter(source, revision)
        card["revision"] = folder.name
    lora = read_lora(folder, name)
    named = lora.base
    if not same_base(named, base):
        if assume_base:
            card["assumed_base"] = {"named": named.name or None, "revision": named.revision}
        else:
            if base.fingerprint is not None and is_folder(named.name):
                named = replace(named, fingerprint=base_fingerprint(load_base(named.name, dtype="auto")))
            if (problem := base_problem(named, base)) is not None:
                raise ExpertError(
                    f"expert {name!r} {problem}; use a library for each base; if it was made for this very model, say "
                    f"so (weftlm experts import --assume-base, or assume_base: true in experts.imports)"
                )
    lora = replace(lora, base=base)
    if model is not None:
        check_fits(lora, model)
    return Expert(lora, card=card)


def fetch_adapter(source: str, revision: str | None) -> Path:
    """Fetch an adapter's two files from the hub.

    Raises:
        ConfigError: there is no such adapter, or no way to it.
        ExpertError: it cannot be fetched.
    """
    source = locate(source, "adapter", revision=revision)
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - for downloads alone
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ExpertError(
            f"{source!r} is no folder here and cannot be fetched from the hub (revision {revision or 'main'}): "
            f"{reason(error)}; check the name, your access and the network"
        ) from error
