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

from weftlm.corpora.reading import known_labels
from weftlm.errors import ConfigError, DataError, WeftError, did_you_mean
from weftlm.evaluation.config import EvaluationConfig
from weftlm.models.config import ModelConfig
from weftlm.pipeline.data_config import RESERVED_NAMES, TARGET_DOMAIN, DataConfig
from weftlm.pipeline.gate_recipe import GatingConfig, check_domains
from weftlm.pipeline.identity import MANIFEST, input_states
from weftlm.pipeline.recipe import Recipe, check, load_recipe
from weftlm.places import locate
from weftlm.routing.config import parse_router, router_config, routers

_PLACEHOLDER_VOCABULARY = 1024


def load_checked(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    needs: Callable[[Recipe], None] = lambda recipe: None,
    ask: bool = False,
    here: bool = True,
) -> Recipe:
    """Read a recipe and check all of it; see `check_recipe`.

    Args:
        path: The recipe.
        overrides: `section.key=value` lines.
        needs: Refuses a recipe without the sections that the command works on: `require_training`, `require_experts`.
        ask: See `check_recipe`.
        here: See `check_recipe`.
    """
    recipe = load_recipe(path, overrides)
    needs(recipe)
    check_recipe(recipe, ask=ask, here=here, whole=False)
    return recipe


def check_recipe(recipe: Recipe, *, ask: bool = False, here: bool = True, whole: bool = True) -> None:
    """Refuse a project that some stage of it would refuse.

    Args:
        recipe: from a recipe.
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

    attempt(_folders, recipe)
    attempt(_held_out, recipe)
    if recipe.trains:
        for each in (recipe, *map(recipe.rival, recipe.compare.mixtures)):
            attempt(lambda one=each: check(one, packages=here))
    refuse()
    if here:
        for state in _inputs(recipe):
            attempt(state)
        attempt(_read_tasks, recipe.evaluation)
    for name, key, revision in _names(recipe):
        attempt(lambda n=name, k=key, r=revision: locate(n, k, revision=r, ask=ask))
    if recipe.trains:
        model, _, training = recipe.trained
        attempt(_model, model, recipe.data, training.sequence_length, "training")
    domains = known_domains(recipe)
    if recipe.makes_experts:
        attempt(_experts, recipe, domains)
        if here and recipe.expert_settings.statistics_examples:
            attempt(_embedder, recipe)
        attempt(_routers, recipe)
    if recipe.gating is not None:
        attempt(_gate, recipe, recipe.gating, domains, whole)
    refuse()


# -- files ----------------------------------------------------------------------------------------------------------


def _folders(recipe: Recipe) -> None:
    for key, folder in (("run", recipe.run), ("prepared", recipe.prepared_folder)):
        for place in (folder, *folder.parents):
            if place.exists():
                if not place.is_dir():
                    raise ConfigError(f"{key}: {place} is a file; name a folder, new or of an earlier run")
                break


def _inputs(recipe: Recipe) -> list[Callable[[], str]]:
    """For every corpus, a call that refuses text that is not there; none where it is prepared already."""
    if (recipe.prepared_folder / MANIFEST).exists():
        return []
    return [state for _, state in input_states(recipe.data)]


def _read_tasks(config: EvaluationConfig) -> None:
    if config.tasks:
        from weftlm.evaluation.tasks import read_tasks  # noqa: PLC0415 - torch

        read_tasks(config.tasks)


def _names(recipe: Recipe) -> list[tuple[str, str, str | None]]:
    """Every model, tokenizer and adapter that must be there before the first stage: name, key, revision."""
    tokenizer = recipe.data.tokenizer
    found: list[tuple[str | None, str, str | None]] = [
        (tokenizer.pretrained, "data.tokenizer.pretrained", tokenizer.revision)
    ]
    if (recipe.prepared_folder / MANIFEST).exists():
        found.clear()
    if recipe.model is not None and not (recipe.run / "result.json").exists():
        found.append((recipe.model.pretrained, "model.pretrained", recipe.model.revision))
    if recipe.makes_experts:
        experts = recipe.expert_settings
        found.append((experts.base, "experts.base", experts.revision))
        found += [(each.source, "experts.imports: source", each.revision) for each in experts.imports]
    for source in (recipe.gating.pool or ()) if recipe.gating is not None else ():
        key = f"gating.pool: {source.name}"
        found += [(source.model, key, source.revision), (source.library, key, None)]
    return [(name, key, revision) for name, key, revision in found if name is not None]


# -- data -----------------------------------------------------------------------------------------------------------


def _held_out(recipe: Recipe) -> None:
    data = recipe.data
    if recipe.makes_experts or recipe.trains or recipe.gating:
        none = not data.heldout and not _splits(data.split)
        target = bool(data.target_heldout) or (bool(data.target) and _splits(data.target_split))
        gated = recipe.gating is not None
        if none and (gated or not target):
            what = "score" if gated else "evaluate on"
            raise ConfigError(f"nothing is held out to {what}; raise data.split.fraction, or give data.heldout")


def _splits(split: Any) -> bool:
    return bool(split.max_documents > 0 and (split.fraction > 0 or split.min_documents > 0))


def known_domains(recipe: Recipe) -> list[str] | None:
    """Names of the domains: of the prepared data, or of the recipe's labels where those are all there will be."""
    folder = recipe.prepared_folder
    if (folder / MANIFEST).exists():
        try:
            from weftlm.pipeline.prepared import read_manifest  # noqa: PLC0415 - torch

            return list(read_manifest(folder)["domains"])
        except DataError:
            return None
    data = recipe.data
    if data.domains.by == "clusters":
        return None
    labels: set[str] = set()
    for corpus in data.corpora:
        if data.domains.by == "file":
            corpus = corpus.model_copy(update={"label": None, "label_field": None, "label_from": "file"})
        try:
            found = known_labels(corpus)
        except DataError:  # the text is elsewhere
            found = None
        if found is None:
            return None
        labels |= found
    if reserved := sorted(RESERVED_NAMES.intersection(labels)):
        raise ConfigError(
            f"a domain may not be called {reserved[0]!r}, which names the target's own set; rename the label"
        )
    return [*sorted(labels), *([TARGET_DOMAIN] if data.domains.include_target else [])]


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


def _base_configuration(recipe: Recipe) -> Any | None:
    """Of the model under the experts, before it is made or loaded."""
    from weftlm.models.factory import architecture_config  # noqa: PLC0415 - transformers

    experts = recipe.expert_settings
    if experts.base is not None:
        return _configuration(experts.base, experts.revision)
    if not recipe.trains:
        return None
    model, _, training = recipe.trained
    if model.architecture is None:
        return _configuration(str(model.pretrained), model.revision)
    return architecture_config(
        model, vocab_size=_PLACEHOLDER_VOCABULARY, sequence_length=training.sequence_length, eos_id=0
    )


# -- experts and routers --------------------------------------------------------------------------------------------


def _expert_names(recipe: Recipe, domains: Sequence[str] | None) -> list[str] | None:
    """Names of the experts that will be in the library; None where the domains are not known."""
    from weftlm.pipeline.experts import expert_domains  # noqa: PLC0415 - torch

    experts = recipe.expert_settings
    imported = [each.title for each in experts.imports]
    if not experts.trains:
        return imported
    if domains is None:
        return None
    made: Mapping[str, Any] = expert_domains([SimpleNamespace(name=name) for name in domains], experts.domains)  # type: ignore[misc]
    return [*made, *imported]


def _embedder(recipe: Recipe) -> None:
    from weftlm.experts.statistics import check_embedder  # noqa: PLC0415 - torch

    check_embedder(recipe.expert_settings.embedder)


def _experts(recipe: Recipe, domains: Sequence[str] | None) -> None:
    from weftlm.pipeline.base import check_base_kind, check_lengths  # noqa: PLC0415 - torch

    _expert_names(recipe, domains)
    if domains is not None:
        wanted = [each.domain for each in recipe.expert_settings.imports if each.domain is not None]
        check_domains(wanted, domains, "experts.imports")
    if recipe.expert_settings.base is not None:
        check_base_kind(recipe.base)
    corpora = [*recipe.data.corpora, *recipe.data.heldout]
    plain = sorted({corpus.name for corpus in corpora if corpus.prompt_field is None})
    if recipe.expert_settings.examples and plain:
        raise ConfigError(
            f"experts.examples is true and the documents of {', '.join(plain[:5])} have no prompts; give them a "
            "prompt_field (data.corpora), or leave experts.examples out"
        )
    config = _base_configuration(recipe)
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
    if recipe.trains_monolith:
        raise ConfigError(
            f"compare.monolith trains the experts' base on windows of text, and {recipe.base} is an encoder-decoder "
            "model; leave compare.monolith out"
        )
    if recipe.gating is not None:
        raise ConfigError(
            f"gating scores texts token by token, and {recipe.base} is an encoder-decoder model; leave gating out"
        )


def _routers(recipe: Recipe) -> None:
    """Routers that need what no expert of the recipe gets, and routed models of one name."""
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
    config = _base_configuration(recipe)
    for key, asked in (("routers", routing.routers or ()), ("build", routing.build)):
        for router in asked:
            name = router_config(parse_router(router)).router
            kind = routers[name]
            if "statistics" in kind.needs and not recipe.expert_settings.statistics_examples:
                raise ConfigError(
                    f"routing.{key}: {name} needs statistics of the experts, and experts.statistics_examples is 0; "
                    "raise it, or leave the router out"
                )
            without = [each.title for each in recipe.expert_settings.imports if each.domain is None]
            if kind.needs and without:
                raise ConfigError(
                    f"routing.{key}: {name} needs a {' and '.join(sorted(kind.needs))} of every expert, and the "
                    f"imported {', '.join(without)} gets none; say which domain it belongs to (experts.imports: "
                    "domain), or leave the router out"
                )
            if config is not None and config.is_encoder_decoder and not kind.supports_encoder_decoder:
                raise ConfigError(f"router {name!r} follows a text from left to right and serves decoder-only models")


# -- gates ----------------------------------------------------------------------------------------------------------


def _gate(recipe: Recipe, config: GatingConfig, domains: Sequence[str] | None, whole: bool) -> None:
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
        experts = _expert_names(recipe, domains) if recipe.makes_experts else None
        configurations = [_base_configuration(recipe)] if recipe.makes_experts else []
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
