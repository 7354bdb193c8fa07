"""A library of experts kept by hand: import adapters, look at experts.

Importing this file needs no torch, so that a library is listed at once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftlm.corpora.labels import folder_name
from weftlm.errors import ConfigError, ExpertError
from weftlm.experts.expert import BaseReference, Expert, base_name, is_folder
from weftlm.experts.library import MANIFEST, ExpertLibrary
from weftlm.experts.peft_import import fetch_adapter, read_peft

if TYPE_CHECKING:
    from torch import nn

    from weftlm.pipeline.recipe import Recipe

log = logging.getLogger(__name__)


# -- importing ----------------------------------------------------------------------------------------------------


def import_experts(
    folder: Path,
    sources: Sequence[str],
    *,
    name: str | None = None,
    revision: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    assume_base: bool = False,
    replace_known: bool = False,
) -> list[Expert]:
    """Add PEFT LoRA adapters to a library, which is started where there is none: all of them, or none.

    The very same again changes nothing. Where the base is a folder here, it is fingerprinted for a new library, and the
    adapters' modules and shapes are compared with its own; a base on the hub is compared when it is loaded.

    Args:
        sources, revision: Folders or hub ids of the adapters, and their hub revision.
        name: Name of the expert, for a single source; the last part of its source where None.
        base, base_revision: Base of a new library; the one the first adapter names where None.
        assume_base: Whether adapters that name another base, or none, are taken as made for the library's.
        replace_known: Whether they replace experts of their names, once they are read and checked.
    Raises:
        ConfigError: one name for several sources, two that would share a name, a base for a library that has another,
            or the base cannot be loaded.
        ExpertError: an adapter cannot be read or added.
    """
    if name is not None and len(sources) != 1:
        raise ConfigError(f"one name for {len(sources)} adapters; import them one by one to name them")
    names = [folder_name(Path(source).resolve().name).lower() for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"two of the adapters would have one name ({', '.join(names)}); import them one by one")
    known = ExpertLibrary.open(folder) if (folder / MANIFEST).exists() else None
    if known is None:
        wanted = _named_base(sources[0], revision) if base is None else BaseReference(base_name(base), base_revision)
    else:
        wanted = known.base
        if base is not None and base_name(base) != base_name(wanted.name):
            raise ConfigError(
                f"library {folder} is for the base {wanted.name}, not {base}; use a library for each base"
            )
    reference, model = _at_hand(wanted)
    experts = [
        read_peft(source, reference, name=name, revision=revision, model=model, assume_base=assume_base)
        for source in sources
    ]
    (known or ExpertLibrary.open(folder, reference)).add(*experts, replace=replace_known)
    return experts


def _at_hand(reference: BaseReference) -> tuple[BaseReference, nn.Module | None]:
    """A base with its fingerprint, and its modules and shapes; as it is, and None, where it is not a folder here."""
    from weftlm.models.fingerprint import base_fingerprint  # noqa: PLC0415 - torch
    from weftlm.models.open import config_at_hand, load_base, outline  # noqa: PLC0415 - torch

    if not is_folder(reference.name):
        log.warning(
            "the base %s is not a folder here; that the adapters fit it is checked when it is loaded",
            reference.name or "without a name",
        )
        return reference, None
    config = None if reference.fingerprint is None else config_at_hand(reference.name)
    if config is not None:
        return reference, outline(config)
    model = load_base(reference.name, revision=reference.revision)
    return replace(reference, fingerprint=base_fingerprint(model)), model


def _named_base(source: str, revision: str | None) -> BaseReference:
    """The base an adapter says it is for."""
    from weftlm.experts.lora import read_lora  # noqa: PLC0415 - torch

    reference = read_lora(Path(source) if is_folder(source) else fetch_adapter(source, revision)).base
    if not reference.name:
        raise ExpertError(
            f"{source!r} does not name its base; name it for the new library (--base), with --assume-base"
        )
    return BaseReference(base_name(reference.name), reference.revision)


def import_recipe_experts(recipe: Recipe, *, replace: bool = False, progress: bool = True) -> None:
    """Bring the adapters of `experts.imports` into the library, with gates and statistics where they have a domain.

    Those that are there already are kept; with `replace` each is replaced once the new one is whole.

    Raises:
        ExpertError: an adapter cannot be read, or another expert has its name and `replace` is not set.
        ConfigError, DataError: as `import_experts` and `gate_expert`.
    """
    from weftlm.pipeline.experts import gate_expert  # noqa: PLC0415 - torch

    folder, settings = recipe.library_folder, recipe.expert_settings
    for each in settings.imports:
        known = ExpertLibrary.open(folder) if (folder / MANIFEST).exists() else None
        if known is None or replace or each.title not in known:
            import_experts(
                folder, [each.source], name=each.title, revision=each.revision, base=recipe.base,
                base_revision=settings.revision, assume_base=each.assume_base, replace_known=replace,
            )  # fmt: skip
        elif (source := known.card(each.title).get("source")) != each.source:
            raise ExpertError(
                f"expert {each.title!r} in {folder} came from {source!r}, not from {each.source!r}; replace it "
                "(weftlm run --from experts), or give the import another name"
            )
    library = ExpertLibrary.open(folder)
    for each in settings.imports:
        whole = (library.has_gate(each.title) or not settings.gate.steps) and (
            library.has_statistics(each.title) or not settings.statistics_examples
        )
        if each.domain is not None and not whole:
            gate_expert(recipe, each.title, domain=each.domain, progress=progress)


# -- looking ------------------------------------------------------------------------------------------------------


def fact_of(card: Mapping[str, Any], part: str, key: str) -> str | None:
    """A text in one part of an expert's card, which may be of anybody's making; None where there is none."""
    value = card.get(part)
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, str) else None


def list_experts(folder: Path) -> list[dict[str, Any]]:
    """For each expert, from its card: name, domain or source, gate and statistics or none, losses on held-out text.

    An expert whose card cannot be read is listed with its `problem`.

    Raises:
        ExpertError: there is no library.
    """
    library = ExpertLibrary.open(folder)
    rows: list[dict[str, Any]] = []
    for name in library.names:
        try:
            card = library.card(name)
            parts = {"gate": library.has_gate(name), "statistics": library.has_statistics(name)}
            origin = fact_of(card, "about", "domain") or card.get("source", "unknown")
            rows.append({"name": name, "origin": str(origin), **parts, "losses": card.get("losses")})
        except ExpertError as error:
            rows.append({"name": name, "problem": str(error)})
    return rows


def show_expert(folder: Path, name: str | None = None) -> dict[str, Any]:
    """One expert, loaded and verified: modules with rank, scale and size of the update, facts and card.

    Without a name the library: its base, its experts' names, and a fingerprint of them all.

    Raises:
        ExpertError: there is no such library or expert, or it is broken.
    """
    library = ExpertLibrary.open(folder)
    if name is None:
        facts = {"base": asdict(library.base), "experts": library.names, "fingerprint": library.fingerprint()}
        return {"library": str(folder), **facts}
    from weftlm.experts.lora import update_norm  # noqa: PLC0415 - torch

    expert = library.load(library.named(name))
    return {
        "name": expert.name,
        "folder": str(library.path(expert.name)),
        "base": asdict(expert.lora.base),
        "parameters": expert.lora.num_parameters,
        "modules": {
            module: {"rank": each.rank, "scale": each.scale, "update_norm": update_norm(each)}
            for module, each in expert.lora.modules.items()
        },
        "gate": None if expert.gate is None else expert.gate.facts,
        "statistics": None if expert.statistics is None else expert.statistics.facts,
        "card": expert.card,
    }
