"""One recipe, a library of experts: one expert per domain, each made without the others.

Experts are independent of each other, so any number of processes may make them at once, on one machine or several that
share the run folder: a lock per expert keeps two from making the same one, and the library takes additions in turn. A
worker that takes over from one that died goes on from its last checkpoint, or finds the expert in the library.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from weftlm.artifact import Artifact, locked
from weftlm.config import changed_keys, differences, settings, validate
from weftlm.corpora.examples import examples_of
from weftlm.corpora.labels import folder_name
from weftlm.domains.domain import Domain
from weftlm.errors import CheckpointError, ConfigError, DataError, ExpertError, did_you_mean
from weftlm.experts.config import ExpertTraining
from weftlm.experts.examples import training_source
from weftlm.experts.expert import Expert
from weftlm.experts.library import ExpertLibrary, check_name
from weftlm.experts.lora import adapter_fingerprint, check_fits
from weftlm.experts.train import data_identity, describe, train_expert
from weftlm.fan_out import Task, fan_out, keep, new_key, processes
from weftlm.files import checksum, remove
from weftlm.models.config import ModelConfig
from weftlm.models.device import choose_device
from weftlm.models.factory import config_to_be, count_parameters
from weftlm.models.lora_targets import check_targets
from weftlm.models.open import config_at_hand
from weftlm.pipeline.base import Base, open_base
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.run_folder import alone
from weftlm.pipeline.train import HOURS_TO_WAIT_FOR_PREPARATION
from weftlm.progress import write_line
from weftlm.training.config import NOT_DECIDING
from weftlm.training.runtime import choose_runtime

_GATE_PARTS = ("gate", "statistics_examples", "embedder")
"""Keys of an expert's settings that its adapter does not depend on."""
_GATE_SETTINGS = tuple(f"settings.{key}" for key in _GATE_PARTS)

_PATIENCE_S = 120.0
"""How long a worker waits for the lock of one that died: a file system may notice that only after a while."""

Status = Literal["made", "kept"]


@dataclass(frozen=True)
class ExpertMaking:
    """What experts are made of: base and data opened, and the library that takes them.

    Attributes:
        recipe: Recipe of the experts.
        data: The prepared data.
        base: The model under the experts.
        library: The library to which experts are added.
        domains: Domain of each expert, by the expert's name.
    """

    recipe: Recipe
    data: PreparedData
    base: Base
    library: ExpertLibrary
    domains: Mapping[str, Domain]


def open_for_making(recipe: Recipe, *, progress: bool = True) -> ExpertMaking:
    """Prepare the data or reuse it, load the base, and open the library or start it.

    Raises:
        ConfigError, DataError: as `prepare` and `open_base`, or a domain is named that is not there.
        ExpertError: the library is for another base, or two domains' experts would share a name.
    """
    return _opened(recipe, prepare(recipe.data, recipe.prepared_folder, progress=progress))


def _opened(recipe: Recipe, data: PreparedData) -> ExpertMaking:
    domains = expert_domains(data.domains, recipe.expert_settings.domains)
    base = open_base(recipe, data)
    return ExpertMaking(recipe, data, base, ExpertLibrary.open(recipe.library_folder, base.reference), domains)


def check_experts(recipe: Recipe, model: ModelConfig | None = None) -> None:
    """Refuse, before anything is read or trained, adapters that no library would take.

    The base's modules are known from its configuration, where that is on this machine.

    Args:
        recipe: Recipe of the experts.
        model: Section `model`, where the recipe trains the base.
    Raises:
        ConfigError: `experts.lora.target_modules` names what no expert can hold, or what the base does not have.
    """
    if not recipe.expert_settings.trains:
        return
    config = config_at_hand(recipe.base, recipe.expert_settings.revision)
    if config is None and recipe.expert_settings.base is None and model is not None:
        config = config_to_be(model, sequence_length=recipe.expert_settings.training.sequence_length)
    if config is not None:
        check_targets(config, recipe.expert_settings.lora.target_modules, "experts.lora")


def expert_domains(domains: Sequence[Domain], wanted: Sequence[str] | None = None) -> dict[str, Domain]:
    """The domains that get an expert, by the expert's name.

    Args:
        domains: Domains of the data.
        wanted: Names of some of them; None for all.
    Raises:
        ConfigError: no such domain, or two whose experts would have the same name.
    """
    known = {domain.name: domain for domain in domains}
    for name in wanted or ():
        if name not in known:
            raise ConfigError(f"experts.domains names {name!r}, which is no domain{did_you_mean(name, known)}")
    found: dict[str, Domain] = {}
    for domain in domains:
        if wanted is not None and domain.name not in wanted:
            continue
        name = folder_name(domain.name)
        twin = next((other for title, other in found.items() if title.lower() == name.lower()), None)
        if twin is not None:
            raise ConfigError(
                f"domains {twin.name!r} and {domain.name!r} would both have the expert {name!r}, as some file systems "
                f"see no difference; relabel one of them"
            )
        found[name] = domain
    return found


def train_experts(
    recipe: Recipe,
    *,
    only: Sequence[str] | None = None,
    replace: bool = False,
    executor: Executor | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Make an expert of every domain and add each to the library as soon as it is whole.

    Run again after an interruption, it continues: experts in the library are kept, an unfinished one goes on from its
    last checkpoint. Started by torchrun, the ranks deal the experts out among themselves; each is still made by one
    process alone, so that it does not depend on how many there were.

    Args:
        recipe: Recipe of the experts.
        only: Experts (or their domains) to make; None for all.
        replace: Whether to discard experts, and unfinished work, of other settings, data or seed under the same names.
        executor: Executor of one task per expert (`fan_out.processes`, `integrations.ray_executor`). Its
            workers must see the run folder, the prepared data, the base and the library. None: in this process, or for
            each process of torchrun in one beside it. Sums over another number of threads may differ in the last bits.
        progress: Whether to show progress on stderr.
    Returns:
        library, base, and by expert: domain, status (made now, or kept), and its card's losses and adapter facts.
    Raises:
        ConfigError, DataError, ExpertError, CheckpointError, NumericsError: as `open_for_making` and `train_expert`; a
            name in `only` is not there; an expert of other settings has the name and `replace` is not set.
        ConfigError, WeftError: as `fan_out`.
    """
    check_experts(recipe)
    group = process_group(recipe)
    first = bool(group is None or group.is_main_process)
    progress = progress and first
    with alone(recipe.run) if first else nullcontext():
        with nullcontext() if group is None else group.main_process_first():
            making = open_for_making(recipe, progress=progress)
        names = _chosen(making, only)
        kept = {name for name in names if _standing(making, name, replace=replace)}
        _check_lengths(making, [name for name in names if name not in kept])
        rank, world = (0, 1) if group is None else (group.process_index, group.num_processes)
        todo = [name for name in names if name not in kept][rank::world]
        # The training loop joins the group that the environment tells of; a process beside this one trains alone.
        with ExitStack() as stack:
            if executor is None and group is not None:
                executor = stack.enter_context(processes(1))
            if executor is not None and todo:
                _make_with(executor, making, todo, replace=replace, progress=progress)
            for number, name in enumerate(todo if executor is None else ()):
                if progress:
                    write_line(f"expert {number + 1} of {len(todo)}: {name}")
                make_one(making, name, replace=replace)
        if group is not None:
            group.wait_for_everyone()
        return {
            "library": str(making.library.folder),
            "base": making.base.reference.name,
            "experts": {name: _summary(making, name, "kept" if name in kept else "made") for name in names},
        }


def make_one(making: ExpertMaking, name: str, *, replace: bool = False, patience_s: float = 0.0) -> Status:
    """Make one expert and add it to the library, or find it there.

    Args:
        making: Base, data and library.
        name: Name of the expert.
        replace: Whether to discard what is there of other settings, data or seed.
        patience_s: Time to wait for another process that makes it.
    Raises:
        CheckpointError: another process is making it, or its folder holds work of other settings and `replace` is not
            set.
        WeftError: as `train_experts`.
    """
    recipe, domain = making.recipe, making.domains[name]
    work = recipe.training_folder(name)
    with _alone(work, name, patience_s):
        if _standing(making, name, replace=replace):
            return "kept"
        _claim(work, name, _wanted(making, name), replace=replace)
        expert = train_expert(
            making.base.model,
            making.base.reference,
            domain.train,
            recipe.expert_settings.expert_training,
            name=name,
            folder=work,
            seed=recipe.seed,
            heldout=domain.heldout,
            about=_about(making, domain),
        )
        making.library.add(expert, replace=replace)
    return "made"


def gate_expert(recipe: Recipe, name: str, *, domain: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Train one expert's gate again and collect its statistics again, on its own domain alone.

    Works on an expert of any origin, and knows nothing of the others.

    Args:
        recipe: Recipe with the settings of gate, training and statistics.
        name: Name of the expert in the library.
        domain: Domain to which it belongs; None for the one it was made from, or the one of its name.
        progress: Whether to show progress on stderr.
    Returns:
        expert, domain, and the facts of gate and statistics.
    Raises:
        ConfigError: the domain is not there, or not to be guessed.
        DataError: the expert was made from other text of that domain; naming the domain says that this is meant.
        ExpertError: there is no such expert, it does not fit the base, or it was replaced or removed meanwhile.
    """
    with alone(recipe.run):
        making = open_for_making(recipe, progress=progress)
        name = making.library.named(name)
        expert = making.library.load(name)
        check_fits(expert.lora, making.base.model, fingerprint=making.base.reference.fingerprint)
        found = _domain_of(making, expert, domain)
        config = recipe.expert_settings.expert_training
        source = training_source(found.train, found.name, config.examples)
        choices = [settings(config.gate), settings(config.training, without=NOT_DECIDING)]
        identity = checksum([choices, adapter_fingerprint(expert.lora), data_identity(source), recipe.seed])
        work = recipe.training_folder(name) / f"gate-{identity[:12]}"
        runtime = choose_runtime(config.training, parameters=count_parameters(making.base.model))
        if progress:
            write_line(f"gate of {name} on {found.name}")
        with _alone(work, name):
            gate, statistics = describe(
                making.base.model, expert.lora, source, config, folder=work, seed=recipe.seed, runtime=runtime
            )
            gate, statistics = gate or expert.gate, statistics or expert.statistics
            facts = {
                "gate": None if gate is None else dict(gate.facts),
                "statistics": None if statistics is None else dict(statistics.facts),
            }
            card = {**expert.card, **{key: value for key, value in facts.items() if value is not None}}
            if "settings" in card:
                now = config.model_dump(mode="json")
                card["settings"] = {**card["settings"], **{key: now[key] for key in _GATE_PARTS}}
            making.library.add(Expert(expert.lora, gate, statistics, card), replace=True, same_adapter=True)
            remove(work)
        return {"expert": name, "domain": found.name, **facts}


def remove_unwanted(recipe: Recipe) -> list[str]:
    """Take experts out of a recipe's library that were trained for domains it no longer makes experts of.

    Experts made elsewhere stay.

    Returns:
        Their names.
    """
    domains = PreparedData.load(recipe.prepared_folder).domains
    wanted = {each.title for each in recipe.expert_settings.imports}
    if recipe.expert_settings.trains:
        wanted |= set(expert_domains(domains, recipe.expert_settings.domains))
    library = ExpertLibrary.open(recipe.library_folder)
    found = [name for name in library.names if name not in wanted and "settings" in library.card(name)]
    for name in found:
        library.remove(name)
        remove(recipe.training_folder(name))
    return found


# -- which experts ------------------------------------------------------------------------------------------------


def _chosen(making: ExpertMaking, only: Sequence[str] | None) -> list[str]:
    if only is None:
        return list(making.domains)
    by_domain = {domain.name: name for name, domain in making.domains.items()}
    known = {**by_domain, **{name: name for name in making.domains}}
    for asked in only:
        if asked not in known:
            raise ConfigError(f"no expert {asked!r} is to be made{did_you_mean(asked, known)}")
    wanted = {known[asked] for asked in only}
    return [name for name in making.domains if name in wanted]


def _check_lengths(making: ExpertMaking, names: Sequence[str]) -> None:
    """Refuse domains too small for one sequence before anything is trained."""
    length = making.recipe.expert_settings.training.sequence_length
    length = max(length, making.recipe.expert_settings.gate.sequence_length or 0)
    asked = making.recipe.expert_settings.examples
    sources = {name: training_source(making.domains[name].train, name, asked) for name in names}
    short = [name for name, source in sources.items() if examples_of(source) is None and len(source) <= length]
    if short:
        sizes = ", ".join(f"{name} ({len(making.domains[name].train):,} tokens)" for name in short[:5])
        more = f" and {len(short) - 5} more" if len(short) > 5 else ""
        raise DataError(
            f"{sizes}{more}: too little text for a sequence of {length} tokens; leave them out with experts.domains, "
            f"or lower experts.training.sequence_length"
        )


def _wanted(making: ExpertMaking, name: str) -> dict[str, Any]:
    """All that decides an expert."""
    domain = making.domains[name]
    return {
        "base": making.base.reference.fingerprint,
        "data": domain.train.fingerprint,
        "heldout": None if domain.heldout is None else domain.heldout.fingerprint,
        "seed": making.recipe.seed,
        "settings": _choices(making.recipe.expert_settings.expert_training),
    }


def _choices(config: ExpertTraining) -> dict[str, Any]:
    found = settings(config)
    found["training"] = config.training.deciding()
    return found


def _said(card: Mapping[str, Any]) -> dict[str, Any]:
    """The same of an expert in the library, from its card."""
    settings = card.get("settings")
    with suppress(ConfigError):  # of another version of weftlm: left as it is, and different
        settings = _choices(validate(ExpertTraining, settings, "settings"))
    said = {key: (card.get(key) or {}).get("fingerprint") for key in ("base", "data", "heldout")}
    return {**said, "seed": card.get("seed"), "settings": settings}


def _standing(making: ExpertMaking, name: str, *, replace: bool) -> bool:
    """Whether the very expert that is wanted is in the library.

    Raises:
        ExpertError: another one has its name, and `replace` is not set.
    """
    check_name(name)
    if name not in making.library:
        return False
    card = making.library.card(name)
    if "settings" not in card:
        changes, told = ["it was not made by weftlm experts train"], "it was not made by weftlm experts train"
    else:
        changes = changed_keys(_said(card), _wanted(making, name))
        told = differences(_said(card), _wanted(making, name))
    if changes and not replace:
        only_gate = all(change.startswith(_GATE_SETTINGS) for change in changes)
        raise ExpertError(
            f"expert {name!r} in {making.library.folder} is another one than the recipe makes "
            f"({told}); replace it (weftlm experts train --replace), or choose another library"
            + ("; gate and statistics alone are made again by weftlm experts gate" if only_gate else "")
        )
    return not changes


def _domain_of(making: ExpertMaking, expert: Expert, asked: str | None) -> Domain:
    """The domain an expert belongs to."""
    known = {domain.name: domain for domain in making.data.domains}
    name = asked
    if name is None:
        about = expert.card.get("about")
        name = about.get("domain") if isinstance(about, Mapping) else None
    if name is None:
        name = next((domain.name for title, domain in making.domains.items() if title == expert.name), None)
    if name is None or name not in known:
        raise ConfigError(
            f"expert {expert.name!r} belongs to no domain of the data"
            + (f" ({name!r}{did_you_mean(name, known)})" if name is not None else f"; allowed: {', '.join(known)}")
            + "; name its domain"
        )
    domain = known[name]
    trained = (expert.card.get("data") or {}).get("fingerprint")
    if asked is None and trained not in (None, domain.train.fingerprint):
        raise DataError(
            f"expert {expert.name!r} was made from other text of {name!r} (fingerprint {trained}, here "
            f"{domain.train.fingerprint}); a gate belongs on the expert's own text: give the prepared data it was made "
            f"from, or name the domain to mean this text"
        )
    return domain


def _about(making: ExpertMaking, domain: Domain) -> dict[str, Any]:
    """What an expert's card says of its text."""
    config = making.recipe.data
    return {
        "domain": domain.name,
        "domains_by": config.domains.by,
        "corpora": [corpus.name for corpus in config.corpora],
        "documents": domain.documents,
        "prepared": making.data.fingerprint,
    }


def _summary(making: ExpertMaking, name: str, status: Status) -> dict[str, Any]:
    card = making.library.card(name)
    return {
        "domain": making.domains[name].name,
        "status": status,
        "losses": card.get("losses"),
        "adapter": card.get("adapter"),
    }


# -- work folders and processes -----------------------------------------------------------------------------------


@contextmanager
def _alone(work: Path, name: str, patience_s: float = 0.0) -> Iterator[None]:
    """Hold an expert's work folder against other processes."""

    def refusal(who: str) -> CheckpointError:
        return CheckpointError(f"{who} is making expert {name!r} in {work}; wait for it")

    with locked(work.parent / f".{work.name}.lock", refusal, patience_s=patience_s):
        yield


def _claim(work: Path, name: str, wanted: Mapping[str, Any], *, replace: bool) -> None:
    """Mark a work folder as that of one expert; what it holds of another is discarded where that is asked for."""
    artifact = Artifact(
        work / "expert.json", wanted, "discard the training of this expert (weftlm experts train --replace)"
    )
    try:
        changed = artifact.changed()
    except DataError:
        if not replace:
            raise
        changed = "its record is damaged"
    if changed is not None:
        if not replace:
            raise CheckpointError(
                f"{work} holds the training of another expert {name!r} ({changed}); "
                "discard it (weftlm experts train --replace), or choose another run folder"
            )
        remove(work)
    if not artifact.resume():
        artifact.begin()


def process_group(recipe: Recipe) -> PartialState | None:
    """The process group torchrun started this process in; None for a process on its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    return PartialState(
        timeout=timedelta(hours=HOURS_TO_WAIT_FOR_PREPARATION),
        cpu=choose_device(recipe.expert_settings.training.device).type == "cpu",
    )


def _make_with(
    executor: Executor, making: ExpertMaking, names: Sequence[str], *, replace: bool, progress: bool
) -> None:
    """Make each expert on some worker of an executor."""
    recipe, key = making.recipe, new_key()
    recipe.run.mkdir(parents=True, exist_ok=True)
    fan_out(
        executor,
        [Task(f"expert {name!r}", (key, recipe, name, replace)) for name in names],
        _make_far,
        lambda task, status: None,
        shared=shared_folders(recipe),
        description="train",
        unit="experts",
        show=progress,
    )


def shared_folders(recipe: Recipe) -> list[Path]:
    """Those folders of a recipe of experts that are there, and that all machines which work on it must see."""
    folders = (recipe.run, recipe.prepared_folder, recipe.library_folder, Path(recipe.base))
    return [folder for folder in folders if folder.is_dir()]


def _make_far(key: str, recipe: Recipe, name: str, replace: bool) -> Status:
    making = keep(key, lambda: _opened(recipe, PreparedData.load(recipe.prepared_folder)))
    return make_one(making, name, replace=replace, patience_s=_PATIENCE_S)
