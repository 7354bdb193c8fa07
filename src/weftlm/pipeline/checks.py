"""What any stage of a project would refuse, asked before the first one begins.

Every check here is the function by which the stage itself decides, or a fact of the recipe and of files on disk that
decides it: nothing is trained, downloaded or written. All problems of the recipe alone are said at once, and where it
has none, all that files, models and other libraries show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from weftlm.config import apply_overrides
from weftlm.errors import ConfigError, DataError, WeftError, did_you_mean
from weftlm.evaluation.config import EvaluationConfig
from weftlm.models.config import ModelConfig
from weftlm.pipeline.data_config import RESERVED_NAMES, TARGET_DOMAIN, DataConfig
from weftlm.pipeline.expert_recipe import ExpertRecipe, load_expert_recipe
from weftlm.pipeline.gate_recipe import GatingConfig, check_domains
from weftlm.pipeline.identity import MANIFEST, input_states
from weftlm.pipeline.project import Project, make_project
from weftlm.pipeline.recipe import Recipe, check, load_recipe
from weftlm.places import locate
from weftlm.recipe_text import read_yaml
from weftlm.routing.config import parse_router, router_config, routers

_PLACEHOLDER_VOCABULARY = 1024


def load_checked_project(
    path: str | Path, overrides: Sequence[str] = (), *, ask: bool = False, here: bool = True, whole: bool = False
) -> Project:
    """Read a recipe of any kind and check it; see `check_project`."""
    project = make_project(apply_overrides(read_yaml(path), overrides))
    check_project(project, ask=ask, here=here, whole=whole)
    return project


def load_checked_recipe(path: str | Path, overrides: Sequence[str] = (), *, ask: bool = False) -> Recipe:
    """Read a recipe that trains a model and check all of it; see `check_project`."""
    recipe = load_recipe(path, overrides)
    load_checked_project(path, overrides, ask=ask)
    return recipe


def load_checked_expert_recipe(path: str | Path, overrides: Sequence[str] = (), *, ask: bool = False) -> ExpertRecipe:
    """Read a recipe of experts and check all of it; see `check_project`."""
    recipe = load_expert_recipe(path, overrides)
    load_checked_project(path, overrides, ask=ask)
    return recipe


def check_project(project: Project, *, ask: bool = False, here: bool = True, whole: bool = True) -> None:
    """Refuse a project that some stage of it would refuse.

    Args:
        project: from a recipe.
        ask: the hub, whether it has the models and data that are named and not here.
        here: whether corpora, tasks and packages must be on this machine.
        whole: whether all stages follow, the distillation of a fitted gate too.
    Raises:
        ConfigError: one line for every problem.
        DataError: likewise, where text alone is missing or faulty.
    """
    problems: list[str] = []
    kinds: set[type[WeftError]] = set()

    def attempt(work: Callable[..., Any], *arguments: Any) -> None:
        try:
            work(*arguments)
        except WeftError as error:
            kinds.add(type(error))
            problems.extend(line for line in str(error).splitlines() if line not in problems)

    def refuse() -> None:
        if problems:
            raise (DataError if kinds == {DataError} else ConfigError)("\n".join(problems))

    attempt(_folders, project)
    attempt(_held_out, project)
    if project.whole is not None:
        for recipe in (project.whole, *map(project.rival, project.mixtures)):
            attempt(lambda each=recipe: check(each, packages=here))
    refuse()
    if here:
        for state in _inputs(project):
            attempt(state)
        attempt(_read_tasks, project.evaluation)
    for name, key, revision in _names(project):
        attempt(lambda n=name, k=key, r=revision: locate(n, k, revision=r, ask=ask))
    if project.whole is not None:
        attempt(_model, project.whole.model, project.whole.data, project.whole.training.sequence_length, "training")
    domains = known_domains(project)
    if project.makes_experts:
        attempt(_experts, project, domains)
        if here and project.pool_recipe.experts.statistics_examples:
            attempt(_embedder, project)
        attempt(_routers, project)
    if project.parts is not None and project.parts.gating is not None:
        attempt(_gate, project, project.parts.gating, domains, whole)
    refuse()


# -- files ----------------------------------------------------------------------------------------------------------


def _folders(project: Project) -> None:
    for key, folder in (("run", project.run), ("prepared", project.prepared_folder)):
        for place in (folder, *folder.parents):
            if place.exists():
                if not place.is_dir():
                    raise ConfigError(f"{key}: {place} is a file; name a folder, new or of an earlier run")
                break


def _inputs(project: Project) -> list[Callable[[], str]]:
    """For every corpus, a call that refuses text that is not there; none where it is prepared already."""
    if (project.prepared_folder / MANIFEST).exists():
        return []
    return [state for _, state in input_states(project.data)]


def _read_tasks(config: EvaluationConfig) -> None:
    if config.tasks:
        from weftlm.evaluation.tasks import read_tasks  # noqa: PLC0415 - torch

        read_tasks(config.tasks)


def _names(project: Project) -> list[tuple[str, str, str | None]]:
    """Every model, tokenizer and adapter that must be there before the first stage: name, key, revision."""
    tokenizer = project.data.tokenizer
    found: list[tuple[str | None, str, str | None]] = [
        (tokenizer.pretrained, "data.tokenizer.pretrained", tokenizer.revision)
    ]
    if (project.prepared_folder / MANIFEST).exists():
        found.clear()
    if project.whole is not None and not (project.run / "result.json").exists():
        found.append((project.whole.model.pretrained, "model.pretrained", project.whole.model.revision))
    if project.makes_experts:
        experts = project.pool_recipe.experts
        found.append((experts.base, "experts.base", experts.revision))
        found += [(each.source, "experts.imports: source", each.revision) for each in experts.imports]
    gating = None if project.parts is None else project.parts.gating
    for source in (gating.pool or ()) if gating is not None else ():
        key = f"gating.pool: {source.name}"
        found += [(source.model, key, source.revision), (source.library, key, None)]
    return [(name, key, revision) for name, key, revision in found if name is not None]


# -- data -----------------------------------------------------------------------------------------------------------


def _held_out(project: Project) -> None:
    data = project.data
    if project.makes_experts or project.whole is not None or (project.parts and project.parts.gating):
        none = not data.heldout and not _splits(data.split)
        target = bool(data.target_heldout) or (bool(data.target) and _splits(data.target_split))
        gated = project.parts is not None and project.parts.gating is not None
        if none and (gated or not target):
            what = "score" if gated else "evaluate on"
            raise ConfigError(f"nothing is held out to {what}; raise data.split.fraction, or give data.heldout")


def _splits(split: Any) -> bool:
    return bool(split.max_documents > 0 and (split.fraction > 0 or split.min_documents > 0))


def known_domains(project: Project) -> list[str] | None:
    """Names of the domains: of the prepared data, or of the recipe's labels where those are all there will be."""
    folder = project.prepared_folder
    if (folder / MANIFEST).exists():
        try:
            from weftlm.pipeline.prepared import read_manifest  # noqa: PLC0415 - torch

            return list(read_manifest(folder)["domains"])
        except DataError:
            return None
    data = project.data
    if data.domains.by != "label" or any(
        corpus.label is None or corpus.label_field is not None or corpus.label_from is not None
        for corpus in data.corpora
    ):
        return None
    labels = sorted({str(corpus.label) for corpus in data.corpora})
    if reserved := sorted(RESERVED_NAMES.intersection(labels)):
        raise ConfigError(
            f"a domain may not be called {reserved[0]!r}, which names the target's own set; rename the label"
        )
    return [*labels, *([TARGET_DOMAIN] if data.domains.include_target else [])]


# -- models ---------------------------------------------------------------------------------------------------------


def _configuration(name: str, revision: str | None) -> Any | None:
    """A model's configuration, of a folder or the hub's cache; None where it is not here."""
    from weftlm.models.open import pretrained_config  # noqa: PLC0415 - transformers

    try:
        return pretrained_config(name, revision)
    except ConfigError:
        return None


def _model(model: ModelConfig, data: DataConfig, length: int, key: str) -> None:
    """Sizes that do not fit each other, and sequences longer than the model's positions."""
    from weftlm.models.factory import architecture_config, check_positions  # noqa: PLC0415 - transformers

    if model.architecture is not None:
        vocabulary = _PLACEHOLDER_VOCABULARY if data.tokenizer.train is None else data.tokenizer.train.vocab_size
        config: Any = architecture_config(model, vocab_size=vocabulary, sequence_length=length, eos_id=0)
    else:
        config = _configuration(str(model.pretrained), model.revision)
    check_positions(config, length, f"{key}.sequence_length", "the model")


def _base_configuration(project: Project) -> Any | None:
    """Of the model under the experts, before it is made or loaded."""
    from weftlm.models.factory import architecture_config  # noqa: PLC0415 - transformers

    experts = project.pool_recipe.experts
    if experts.base is not None:
        return _configuration(experts.base, experts.revision)
    if project.whole is None:
        return None
    whole = project.whole
    if whole.model.architecture is None:
        return _configuration(str(whole.model.pretrained), whole.model.revision)
    return architecture_config(
        whole.model,
        vocab_size=_PLACEHOLDER_VOCABULARY,
        sequence_length=whole.training.sequence_length,
        eos_id=0,
    )


# -- experts and routers --------------------------------------------------------------------------------------------


def _expert_names(project: Project, domains: Sequence[str] | None) -> list[str] | None:
    """Names of the experts that will be in the library; None where the domains are not known."""
    from weftlm.pipeline.experts import expert_domains  # noqa: PLC0415 - torch

    experts = project.pool_recipe.experts
    imported = [each.title for each in experts.imports]
    if not experts.trains:
        return imported
    if domains is None:
        return None
    made: Mapping[str, Any] = expert_domains([SimpleNamespace(name=name) for name in domains], experts.domains)  # type: ignore[misc]
    return [*made, *imported]


def _embedder(project: Project) -> None:
    from weftlm.experts.statistics import check_embedder  # noqa: PLC0415 - torch

    check_embedder(project.pool_recipe.experts.embedder)


def _experts(project: Project, domains: Sequence[str] | None) -> None:
    from weftlm.pipeline.base import check_base_kind, check_lengths  # noqa: PLC0415 - torch

    recipe = project.pool_recipe
    _expert_names(project, domains)
    if domains is not None:
        wanted = [each.domain for each in recipe.experts.imports if each.domain is not None]
        check_domains(wanted, domains, "experts.imports")
    if recipe.experts.base is not None:
        check_base_kind(recipe.base)
    corpora = [*project.data.corpora, *project.data.heldout]
    plain = sorted({corpus.name for corpus in corpora if corpus.prompt_field is None})
    if recipe.experts.examples and plain:
        raise ConfigError(
            f"experts.examples is true and the documents of {', '.join(plain[:5])} have no prompts; give them a "
            "prompt_field (data.corpora), or leave experts.examples out"
        )
    config = _base_configuration(project)
    if config is None:
        return
    check_lengths(recipe, config)
    if not config.is_encoder_decoder:
        return
    if plain:
        raise ConfigError(
            f"the base {recipe.base} is an encoder-decoder model, which learns from prompts and targets, and documents "
            f"of {', '.join(plain[:5])} have none; give their corpora a prompt_field, the held-out ones too"
        )
    if project.monolith:
        raise ConfigError(
            f"compare.monolith trains the experts' base on windows of text, and {recipe.base} is an encoder-decoder "
            "model; leave compare.monolith out"
        )
    if recipe.gating is not None:
        raise ConfigError(
            f"gating scores texts token by token, and {recipe.base} is an encoder-decoder model; leave gating out"
        )


def _routers(project: Project) -> None:
    """Routers that need what no expert of the recipe gets, and routed models of one name."""
    recipe = project.pool_recipe
    routing = recipe.routing
    if routing is None:
        return
    places: dict[str, str] = {}
    for router in routing.build:
        folder = router.replace(":", ",")
        if folder in places:
            raise ConfigError(
                f"routing.build: {places[folder]!r} and {router!r} would be one folder; leave one of them"
            )
        places[folder] = router
    config = _base_configuration(project)
    for key, asked in (("routers", routing.routers or ()), ("build", routing.build)):
        for router in asked:
            name = router_config(parse_router(router)).router
            kind = routers[name]
            if "statistics" in kind.needs and not recipe.experts.statistics_examples:
                raise ConfigError(
                    f"routing.{key}: {name} needs statistics of the experts, and experts.statistics_examples is 0; "
                    "raise it, or leave the router out"
                )
            without = [each.title for each in recipe.experts.imports if each.domain is None]
            if kind.needs and without:
                raise ConfigError(
                    f"routing.{key}: {name} needs a {' and '.join(sorted(kind.needs))} of every expert, and the "
                    f"imported {', '.join(without)} gets none; say which domain it belongs to (experts.imports: "
                    "domain), or leave the router out"
                )
            if config is not None and config.is_encoder_decoder and not kind.supports_encoder_decoder:
                raise ConfigError(f"router {name!r} follows a text from left to right and serves decoder-only models")


# -- gates ----------------------------------------------------------------------------------------------------------


def _gate(project: Project, config: GatingConfig, domains: Sequence[str] | None, whole: bool) -> None:
    from weftlm.models.factory import check_positions  # noqa: PLC0415 - transformers
    from weftlm.pipeline.gating import check_samples, own_experts  # noqa: PLC0415 - torch
    from weftlm.pipeline.students import check_teaching_samples  # noqa: PLC0415 - torch

    check_samples(config, scored=config.scores.samples > 0)
    if whole:
        check_teaching_samples(config, scored=config.scores.samples > 0, direct=False)
    if config.pool is not None:
        experts: list[str] | None = [source.name for source in config.pool]
        configurations = [_configuration(each.model, each.revision) for each in config.pool if each.model is not None]
    else:
        experts = _expert_names(project, domains) if project.makes_experts else None
        configurations = [_base_configuration(project)] if project.makes_experts else []
    for found in configurations:
        check_positions(found, config.scores.length, "gating.scores.length", "an expert")
    if config.pool is None and experts is not None and config.experts is not None:
        for name in config.experts:
            if name not in experts:
                raise ConfigError(f"gating.experts names {name!r}, which is no expert{did_you_mean(name, experts)}")
        experts = config.experts
    if domains is None:
        return
    if config.domains is not None:
        check_domains(config.domains, domains, "gating.domains")
    scored = domains if config.domains is None else config.domains
    config.offsets_over(scored)
    config.mixtures.over(scored)
    if config.offsets == "expert" and experts is not None:
        own_experts(scored, experts)
