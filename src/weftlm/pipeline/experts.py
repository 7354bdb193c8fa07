"""One recipe, a library of experts: one expert per domain, each made without the others.

Experts are independent of each other, so any number of processes may make them at once, on one machine or several that
share the run folder: a lock per expert keeps two from making the same one, and the library takes additions in turn. A
worker that takes over from one that died goes on from its last checkpoint, or finds the expert in the library.

<run>/training/NAME/ID/     checkpoints and metrics of an expert, ID a digest of what decides it
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from accelerate import PartialState

from weftlm.artifact import locked
from weftlm.config import changed_keys, differences, settings, validate
from weftlm.corpora.examples import examples_of
from weftlm.corpora.labels import folder_name
from weftlm.errors import CheckpointError, ConfigError, DataError, ExpertError, did_you_mean
from weftlm.experts.config import ExpertTraining
from weftlm.experts.examples import training_source
from weftlm.experts.expert import Expert
from weftlm.experts.library import ExpertLibrary, check_name
from weftlm.experts.lora import adapter_fingerprint, check_fits
from weftlm.experts.train import describe, train_expert
from weftlm.fan_out import fan_out, keep, new_key, processes
from weftlm.files import checksum, remove
from weftlm.models.device import choose_device
from weftlm.models.factory import count_parameters
from weftlm.models.lora_targets import check_targets
from weftlm.pipeline.base import Base, open_base
from weftlm.pipeline.expert_library import fact_of
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.prepared import Domain, PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.run_folder import alone
from weftlm.pipeline.train import HOURS_TO_WAIT_FOR_PREPARATION
from weftlm.progress import write_line
from weftlm.training.runtime import choose_runtime

_GATE_PARTS = ("gate", "statistics_examples", "embedder")
"""Keys of an expert's settings that its adapter does not depend on."""
_PATIENCE_S = 120.0
"""How long a worker waits for the lock of one that died: a file system may notice that only after a while."""


def expert_domains(domains: Sequence[Domain], wanted: Sequence[str] | None = None) -> dict[str, Domain]:
    """The domains that get an expert, all or those that are wanted, by the expert's name.

    Raises:
        ConfigError: no such domain, or two whose experts would have the same name.
    """
    known = {domain.name: domain for domain in domains}
    for name in wanted or ():
        if name not in known:
            raise ConfigError(f"experts.domains names {name!r}, which is no domain{did_you_mean(name, known)}")
    found: dict[str, Domain] = {}
    for domain in domains if wanted is None else [each for each in domains if each.name in wanted]:
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
    recipe: Recipe, *, replace: bool = False, executor: Executor | None = None, progress: bool = True
) -> dict[str, Any]:
    """Make an expert of every domain and add each to the library as soon as it is whole.

    Run again after an interruption, it continues: experts in the library are kept, an unfinished one goes on from its
    last checkpoint. Each is made by one process alone, so that it does not depend on how many there are: this one, the
    ranks of torchrun, which deal the experts out among themselves, or the workers of an executor, which see the same
    folders. Sums over another number of threads may differ in the last bits.

    Returns:
        library, base, and by expert: domain, status (made now, or kept), and its card's losses and adapter facts.
    Raises:
        ExpertError: an expert of other settings, data or seed has the name and `replace` is not set.
        WeftError: as `open_base`, `expert_domains`, `prepare`, `train_expert` and `fan_out`.
    """
    group = process_group(recipe)
    first = group.is_main_process
    with alone(recipe.run) if first else nullcontext(), ExitStack() as stack:
        with group.main_process_first():
            making = _Making.open(recipe, prepare(recipe.data, recipe.prepared_folder, progress=progress and first))
        check_targets(making.base.model.config, recipe.expert_settings.lora.target_modules, "experts.lora")
        made = [name for name in making.domains if not making.has(name, replace=replace)]
        making.check_lengths(made)
        todo = made[group.process_index :: group.num_processes]
        if executor is None and group.num_processes > 1:
            # The training loop joins the group that the environment tells of; a process beside this one trains alone.
            executor = stack.enter_context(processes(1))
        if executor is None:
            for number, name in enumerate(todo, 1):
                if progress:
                    write_line(f"expert {number} of {len(todo)}: {name}")
                making.make(name, replace=replace)
        elif todo:
            key = new_key()
            fan_out(
                executor, {f"expert {name!r}": (key, recipe, name, replace) for name in todo},
                _make_far, lambda *_: None,
                shared=shared_folders(recipe), description="train", unit="experts", show=progress and first,
            )  # fmt: skip
        group.wait_for_everyone()
        experts = {}
        for name, domain in making.domains.items():
            card, status = making.library.card(name), "made" if name in made else "kept"
            facts = {key: card.get(key) for key in ("losses", "adapter")}
            experts[name] = {"domain": domain.name, "status": status, **facts}
        return {"library": str(making.library.folder), "base": making.base.reference.name, "experts": experts}


def gate_expert(recipe: Recipe, name: str, *, domain: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Train one expert's gate again and collect its statistics again, on its own domain alone.

    Works on an expert of any origin, and knows nothing of the others. Without steps, or examples, it has none after.
    The domain is that which is named, the one it was made from, or the one of its name.

    Returns:
        expert, domain, and the facts of gate and statistics.
    Raises:
        ConfigError: the domain is not there, or not to be guessed.
        DataError: the expert was made from other text of that domain; naming the domain says that this is meant.
        ExpertError: there is no such expert, it does not fit the base, or it was replaced or removed meanwhile.
    """
    with alone(recipe.run):
        making = _Making.open(recipe, prepare(recipe.data, recipe.prepared_folder, progress=progress))
        library, base, config = making.library, making.base, recipe.expert_settings.expert_training
        name = library.named(name)
        expert = library.load(name)
        check_fits(expert.lora, base.model, fingerprint=base.reference.fingerprint)
        text, adapter = making.domain_of(expert, domain), adapter_fingerprint(expert.lora)
        if progress:
            write_line(f"gate of {name} on {text.name}")
        home = recipe.training_folder(name)
        work = home / f"gate-{checksum([adapter, text.train.fingerprint, recipe.seed, _deciding(config)])[:12]}"
        runtime = choose_runtime(config.training, parameters=count_parameters(base.model))
        source = training_source(text.train, text.name, config.examples)
        with _alone(home, name):
            gate, statistics = describe(
                base.model, expert.lora, source, config, folder=work, seed=recipe.seed, runtime=runtime
            )
            parts = {"gate": gate, "statistics": statistics}
            facts = {key: None if part is None else dict(part.facts) for key, part in parts.items()}
            card = {**expert.card, **facts}
            if isinstance(card.get("settings"), dict):
                now = config.model_dump(mode="json")
                card["settings"] = {**card["settings"], **{key: now[key] for key in _GATE_PARTS}}
            library.add(Expert(expert.lora, gate, statistics, card), replace=True, same_adapter=True)
            remove(work)
        return {"expert": name, "domain": text.name, **facts}


def remove_unwanted(recipe: Recipe) -> None:
    """Take experts out of a recipe's library that were trained for domains it no longer makes experts of.

    Experts made elsewhere stay.
    """
    experts = recipe.expert_settings
    wanted = {each.title for each in experts.imports}
    if experts.trains:
        wanted |= set(expert_domains(PreparedData.load(recipe.prepared_folder).domains, experts.domains))
    library = ExpertLibrary.open(recipe.library_folder)
    for name in library.names:
        if name not in wanted and "settings" in library.card(name):
            library.remove(name)
            remove(recipe.training_folder(name))


# -- one expert ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Making:
    """What experts are made of: base and data opened, the library that takes them, and each expert's domain by name."""

    recipe: Recipe
    data: PreparedData
    base: Base
    library: ExpertLibrary
    domains: dict[str, Domain]

    @classmethod
    def open(cls, recipe: Recipe, data: PreparedData) -> Self:
        """Load the base, and open the library or start it; errors as `open_base`, `expert_domains`, `ExpertLibrary`."""
        domains, base = expert_domains(data.domains, recipe.expert_settings.domains), open_base(recipe, data)
        return cls(recipe, data, base, ExpertLibrary.open(recipe.library_folder, base.reference), domains)

    def make(self, name: str, *, replace: bool, patience_s: float = 0.0) -> None:
        """Make one expert and add it to the library, unless it is there.

        Raises:
            CheckpointError: another process is making it, for longer than `patience_s`.
        """
        recipe, domain, home = self.recipe, self.domains[name], self.recipe.training_folder(name)
        work = home / checksum(self._identity(name))[:12]
        with _alone(home, name, patience_s):
            if self.has(name, replace=replace):
                return
            about = {
                "domain": domain.name,
                "domains_by": recipe.data.domains.by,
                "corpora": [corpus.name for corpus in recipe.data.corpora],
                "documents": domain.train.documents,
                "prepared": self.data.fingerprint,
            }
            expert = train_expert(
                self.base.model, self.base.reference, domain.train, recipe.expert_settings.expert_training,
                name=name, folder=work, seed=recipe.seed, heldout=domain.heldout, about=about,
            )  # fmt: skip
            self.library.add(expert, replace=replace)
            for other in home.iterdir():
                if other != work:
                    remove(other)

    def has(self, name: str, *, replace: bool) -> bool:
        """Whether the very expert that is wanted is in the library, by its card.

        Raises:
            ExpertError: another one has its name, and `replace` is not set.
        """
        check_name(name)
        if name not in self.library:
            return False
        card, wanted = self.library.card(name), self._identity(name)
        made: dict[str, Any] = {key: fact_of(card, key, "fingerprint") for key in ("base", "data", "heldout")}
        made |= {"seed": card.get("seed"), "settings": card.get("settings")}
        with suppress(ConfigError):  # settings of another version of weftlm are left as they are, and different
            made["settings"] = _deciding(validate(ExpertTraining, made["settings"], "settings"))
        changes = changed_keys(made, wanted)
        if changes and not replace:
            parts = tuple(f"settings.{key}" for key in _GATE_PARTS)
            gate = all(change.startswith(parts) for change in changes)
            trained = "settings" in card
            raise ExpertError(
                f"expert {name!r} in {self.library.folder} is another one than the recipe makes "
                f"({differences(made, wanted) if trained else 'it was not made by weftlm experts train'}); replace it "
                f"(weftlm experts train --replace), or choose another library"
                + ("; gate and statistics alone are made again by weftlm experts gate" if gate else "")
            )
        return not changes

    def _identity(self, name: str) -> dict[str, Any]:
        """All that decides an expert."""
        domain = self.domains[name]
        return {
            "base": self.base.reference.fingerprint,
            "data": domain.train.fingerprint,
            "heldout": None if domain.heldout is None else domain.heldout.fingerprint,
            "seed": self.recipe.seed,
            "settings": _deciding(self.recipe.expert_settings.expert_training),
        }

    def check_lengths(self, names: Sequence[str]) -> None:
        """Refuse domains too short for one sequence, all of them at once, before any expert is trained."""
        experts = self.recipe.expert_settings
        length = max(experts.training.sequence_length, experts.gate.sequence_length or 0)
        sources = {name: training_source(self.domains[name].train, name, experts.examples) for name in names}
        short = [name for name, source in sources.items() if examples_of(source) is None and len(source) <= length]
        if short:
            sizes = ", ".join(f"{name} ({len(sources[name]):,} tokens)" for name in short[:5])
            more = f" and {len(short) - 5} more" if len(short) > 5 else ""
            raise DataError(
                f"{sizes}{more}: too little text for a sequence of {length} tokens; leave them out with "
                f"experts.domains, or lower experts.training.sequence_length"
            )

    def domain_of(self, expert: Expert, asked: str | None) -> Domain:
        """The domain an expert belongs to; errors as `gate_expert`."""
        known = {domain.name: domain for domain in self.data.domains}
        own = self.domains.get(expert.name)
        name = asked or fact_of(expert.card, "about", "domain") or (None if own is None else own.name)
        if name not in known:
            raise ConfigError(
                f"expert {expert.name!r} belongs to no domain of the data"
                + (f" ({name!r}{did_you_mean(name, known)})" if name else f"; allowed: {', '.join(known)}")
                + "; name its domain"
            )
        domain, trained = known[name], fact_of(expert.card, "data", "fingerprint")
        if asked is None and trained not in (None, domain.train.fingerprint):
            raise DataError(
                f"expert {expert.name!r} was made from other text of {name!r} (fingerprint {trained}, here "
                f"{domain.train.fingerprint}); a gate belongs on the expert's own text: give the prepared data it was "
                f"made from, or name the domain to mean this text"
            )
        return domain


def _deciding(config: ExpertTraining) -> dict[str, Any]:
    return {**settings(config), "training": config.training.deciding()}


# -- processes ----------------------------------------------------------------------------------------------------


def _alone(home: Path, name: str, patience_s: float = 0.0) -> AbstractContextManager[None]:
    """Hold an expert's training folder against other processes."""

    def refusal(who: str) -> CheckpointError:
        return CheckpointError(f"{who} is making expert {name!r} in {home}; wait for it")

    return locked(home.parent / f".{home.name}.lock", refusal, patience_s=patience_s)


def process_group(recipe: Recipe) -> PartialState:
    """The process group torchrun started this process in; of one process on its own."""
    cpu = choose_device(recipe.expert_settings.training.device).type == "cpu"
    return PartialState(timeout=timedelta(hours=HOURS_TO_WAIT_FOR_PREPARATION), cpu=cpu)


def shared_folders(recipe: Recipe) -> list[Path]:
    """Those folders of a recipe of experts that are there, and that all machines which work on it must see."""
    folders = (recipe.run, recipe.prepared_folder, recipe.library_folder, Path(recipe.base))
    return [folder for folder in folders if folder.is_dir()]


def _make_far(key: str, recipe: Recipe, name: str, replace: bool) -> None:
    making = keep(key, lambda: _Making.open(recipe, PreparedData.load(recipe.prepared_folder)))
    making.make(name, replace=replace, patience_s=_PATIENCE_S)
