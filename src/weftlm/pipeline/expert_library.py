"""A library of experts kept by hand: import adapters, look at experts, merge some, remove some.

Importing this file needs no torch, so that a library is listed at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
        folder: Folder of the library.
        sources: Folders or hub ids of the adapters.
        name: Name of the expert, for a single source; the last part of its source where None.
        revision: Hub branch, tag or commit of the adapters.
        base: Base of a new library; the base the first adapter names where None.
        base_revision: Hub revision of `base`.
        assume_base: Whether adapters that name another base, or none, are taken as made for the library's.
        replace_known: Whether they replace experts of their names, once they are read and checked.
    Raises:
        ConfigError: one name for several sources, two that would share a name, a base for a library that has another,
            or the base cannot be loaded.
        ExpertError: an adapter cannot be read or added.
    """
    if name is not None and len(sources) != 1:
        raise ConfigError(f"one name for {len(sources)} adapters; import them one by one to name them")
    names = [each.lower() for each in ([name] if name is not None else map(import_name, sources))]
    if len(set(names)) < len(names):
        raise ConfigError(f"two of the adapters would have one name ({', '.join(names)}); import them one by one")
    known = ExpertLibrary.open(folder) if (folder / MANIFEST).exists() else None
    if known is None:
        reference = _named_base(sources[0], revision) if base is None else BaseReference(base_name(base), base_revision)
    else:
        reference = known.base
        if base is not None and base_name(base) != base_name(reference.name):
            raise ConfigError(
                f"library {folder} is for the base {reference.name}, not {base}; use a library for each base"
            )
    reference, model = _at_hand(reference)
    experts = [
        read_peft(source, reference, name=name, revision=revision, model=model, assume_base=assume_base)
        for source in sources
    ]
    library = ExpertLibrary.open(folder, reference) if known is None else known
    library.add(*experts, replace=replace_known)
    return experts


def import_name(source: str) -> str:
    """The name an imported adapter has where none is given."""
    return folder_name(Path(source).resolve().name)


def _at_hand(reference: BaseReference) -> tuple[BaseReference, nn.Module | None]:
    """A base with its fingerprint, and its modules and shapes; None for both where it is not a folder here."""
    from weftlm.models.fingerprint import base_fingerprint  # noqa: PLC0415 - torch
    from weftlm.models.lora_targets import outline  # noqa: PLC0415 - torch
    from weftlm.models.open import config_at_hand, load_base  # noqa: PLC0415 - torch

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

    folder = Path(source) if is_folder(source) else fetch_adapter(source, revision)
    reference = read_lora(folder).base
    if not reference.name:
        raise ExpertError(
            f"{source!r} does not name its base; name it for the new library (--base), with --assume-base"
        )
    return BaseReference(base_name(reference.name), reference.revision)


def import_recipe_experts(recipe: Recipe, *, replace: bool = False, progress: bool = True) -> dict[str, Any]:
    """Bring the adapters of `experts.imports` into the library; those that are there already are kept.

    Args:
        recipe: Recipe with the imports.
        replace: Whether experts of the same names are replaced, each once the new one is whole.
        progress: Whether progress is shown on stderr.
    Returns:
        By name: source, and whether it has a gate and statistics.
    Raises:
        ExpertError: an adapter cannot be read, or another expert has its name and `replace` is not set.
        ConfigError, DataError: as `import_experts` and `gate_expert`.
    """
    from weftlm.pipeline.experts import gate_expert  # noqa: PLC0415 - torch
    from weftlm.pipeline.prepare import prepare  # noqa: PLC0415 - torch

    folder, settings = recipe.library_folder, recipe.expert_settings
    for each in settings.imports:
        known = ExpertLibrary.open(folder) if (folder / MANIFEST).exists() else None
        if known is not None and each.title in known:
            source = known.card(each.title).get("source")
            if source != each.source and not replace:
                raise ExpertError(
                    f"expert {each.title!r} in {folder} came from {source!r}, not from {each.source!r}; replace it "
                    "(weftlm run --from experts), or give the import another name"
                )
            if not replace:
                continue
        import_experts(
            folder, [each.source], name=each.title, revision=each.revision, base=recipe.base,
            base_revision=settings.revision, assume_base=each.assume_base, replace_known=replace,
        )  # fmt: skip
    wanted = {each.title: each.domain for each in settings.imports if each.domain is not None}
    if wanted:
        prepare(recipe.data, recipe.prepared_folder, progress=progress)
    library = ExpertLibrary.open(folder)
    for name, domain in wanted.items():
        if not library.has_gate(name) or (settings.statistics_examples and not library.has_statistics(name)):
            gate_expert(recipe, name, domain=domain, progress=progress)
    return {
        each.title: {
            "source": each.source,
            "gate": library.has_gate(each.title),
            "statistics": library.has_statistics(each.title),
        }
        for each in settings.imports
    }


# -- looking, merging, removing ---------------------------------------------------------------------------------------


def list_experts(folder: Path) -> list[dict[str, Any]]:
    """For each expert, from its card: name, domain or source, gate and statistics or none, losses on held-out text.

    An expert whose card cannot be read is listed with its `problem`.

    Raises:
        ExpertError: there is no library.
    """
    library = ExpertLibrary.open(folder)
    rows: list[dict[str, Any]] = []
    for name in library.names:
        row: dict[str, Any] = {"name": name}
        try:
            card = library.card(name)
            row |= {
                "origin": _origin(card),
                "gate": library.has_gate(name),
                "statistics": library.has_statistics(name),
                "losses": card.get("losses"),
            }
        except ExpertError as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows


def _origin(card: dict[str, Any]) -> str:
    about, merged = card.get("about"), card.get("merged")
    if isinstance(about, dict) and about.get("domain"):
        return str(about["domain"])
    if isinstance(merged, dict):
        return "merged: " + ", ".join(merged)
    return str(card.get("source", "unknown"))


def show_library(folder: Path) -> dict[str, Any]:
    """A library: its base, its experts' names, and a fingerprint of them all.

    Raises:
        ExpertError: there is no library.
    """
    library = ExpertLibrary.open(folder)
    return {
        "library": str(folder),
        "base": asdict(library.base),
        "experts": library.names,
        "fingerprint": library.fingerprint(),
    }


def show_expert(folder: Path, name: str) -> dict[str, Any]:
    """One expert, loaded and verified: modules with rank, scale and size of the update, facts and card.

    Raises:
        ExpertError: there is no such expert, or it is broken.
    """
    from weftlm.experts.lora import update_norm  # noqa: PLC0415 - torch

    library = ExpertLibrary.open(folder)
    name = library.named(name)
    expert = library.load(name)
    modules = expert.lora.modules
    return {
        "name": name,
        "folder": str(library.path(name)),
        "base": asdict(expert.lora.base),
        "parameters": expert.lora.num_parameters,
        "modules": {
            module: {"rank": each.rank, "scale": each.scale, "update_norm": update_norm(each)}
            for module, each in modules.items()
        },
        "gate": None if expert.gate is None else expert.gate.facts,
        "statistics": None if expert.statistics is None else expert.statistics.facts,
        "card": expert.card,
    }


def merge_in_library(
    folder: Path,
    names: Sequence[str],
    *,
    into: str | None = None,
    weights: Sequence[float] | None = None,
    to: Path | None = None,
) -> dict[str, Any]:
    """Merge experts of a library into one adapter.

        dW = sum over z of w_z scale_z B_z A_z

    Args:
        folder: Folder of the library.
        names: Names of the experts.
        into: Name of the result in the library; it has neither gate nor statistics.
        weights: w_z by expert; 1 / number of experts where None.
        to: PEFT folder of the result.
    Returns:
        name, rank, the weights by expert, library and folder.
    Raises:
        ConfigError: neither `into` nor `to`, an expert named twice, or as `merge_experts`.
        ExpertError: as `merge_experts`, or the result cannot be added or written.
    """
    if into is None and to is None:
        raise ConfigError("say where the merged adapter goes: a name in the library (--as), a PEFT folder (--to), both")
    library = ExpertLibrary.open(folder)
    names = [library.named(name) for name in names]
    if len(set(names)) < len(names):
        raise ConfigError(f"an expert is named twice in {', '.join(names)}; give it a larger weight instead")
    from weftlm.experts.lora import write_lora  # noqa: PLC0415 - torch
    from weftlm.experts.merge import merge_experts  # noqa: PLC0415 - torch

    experts = [library.load(name).lora for name in names]
    name = into if into is not None else Path(str(to)).name
    merged = merge_experts(experts, weights, name=name)
    used = [1 / len(names)] * len(names) if weights is None else list(weights)
    by_name = dict(zip(names, used, strict=True))
    if into is not None:
        library.add(Expert(merged, card={"name": into, "merged": by_name}))
    if to is not None:
        write_lora(to, merged)
    return {
        "name": name,
        "weights": by_name,
        "rank": max(each.rank for each in merged.modules.values()),
        "library": str(folder) if into is not None else None,
        "folder": None if to is None else str(to),
    }


def remove_experts(folder: Path, names: Sequence[str]) -> list[str]:
    """Take experts out of a library; none of them where one is not there.

    Returns:
        The names that stay.
    Raises:
        ExpertError: there is no such expert.
    """
    library = ExpertLibrary.open(folder)
    library.remove(*dict.fromkeys(library.named(name) for name in names))
    return library.names
