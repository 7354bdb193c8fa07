"""Experts of a recipe that were made elsewhere: imported once, and given a gate and statistics where asked for."""

from __future__ import annotations

from typing import Any

from weftlm.errors import ExpertError
from weftlm.experts.library import MANIFEST, ExpertLibrary
from weftlm.pipeline.expert_library import import_experts
from weftlm.pipeline.experts import gate_expert
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.recipe import Recipe


def import_recipe_experts(recipe: Recipe, *, replace: bool = False, progress: bool = True) -> dict[str, Any]:
    """Bring the adapters of `experts.imports` into the library; those that are there already are kept.

    Args:
        recipe: whose imports count.
        replace: import anew what is there under the same names; it stays until the new one is whole.
        progress: show progress on stderr.
    Returns:
        by name: source, and whether it has a gate and statistics.
    Raises:
        ExpertError: an adapter cannot be read, or another expert has its name and `replace` is not set.
        ConfigError, DataError: as `import_experts` and `gate_expert`.
    """
    folder = recipe.library_folder
    for each in recipe.expert_settings.imports:
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
            base_revision=recipe.expert_settings.revision, assume_base=each.assume_base, replace_known=replace,
        )  # fmt: skip
    wanted = {each.title: each.domain for each in recipe.expert_settings.imports if each.domain is not None}
    if wanted:
        prepare(recipe.data, recipe.prepared_folder, progress=progress)
    library = ExpertLibrary.open(folder)
    for name, domain in wanted.items():
        if not library.has_gate(name) or (
            recipe.expert_settings.statistics_examples and not library.has_statistics(name)
        ):
            gate_expert(recipe, name, domain=domain, progress=progress)
    return {
        each.title: {
            "source": each.source,
            "gate": library.has_gate(each.title),
            "statistics": library.has_statistics(each.title),
        }
        for each in recipe.expert_settings.imports
    }
