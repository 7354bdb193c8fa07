"""The modules of a model that LoRA adapts, known from its configuration before anything is trained.

The results are full names of linear modules, so that an adapter trained on them is one that the expert library,
exports and the server take. Settings name modules by their full names, by ends of names and by regular expressions,
which come from files and recipes and are matched within a bound of time: a short pattern can take years on a short
name, and `re` cannot be interrupted; `regex` can.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module

import regex
from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weftlm.errors import ConfigError, reason
from weftlm.models.open import outline

ALL_LINEAR = "all-linear"
MAX_PATTERN = 4096
"""Largest length of one pattern, in characters."""
MAX_SECONDS = 2.0
"""Largest time for all names of a setting's patterns."""
_SHOWN = 6
_CONVERSION = "peft.utils.transformers_weight_conversion"


def lora_targets(model: nn.Module, targets: str | Sequence[str], where: str = "lora") -> list[str]:
    """Full names of the modules that `lora.target_modules` means, in the model's order.

    `all-linear` is every linear module but the output head. Experts and routers of a mixture-of-experts model are
    fused parameters and no linear modules, so that it means attention and the dense layers there. PEFT cannot address
    a linear module whose name it keeps for fused experts (`shared_expert.up_proj` beside `experts.gate_up_proj`), and
    `all-linear` leaves it out.

    Args:
        model: Bare model, on the meta device too.
        targets: `all-linear`, names (`q_proj`, `model.layers.0.self_attn.q_proj`), or a regular expression of whole
            names.
        where: Section that gives them, for messages.
    Raises:
        ConfigError: a name matches nothing, or something that no expert can hold: an embedding, a convolution, fused
            experts; the message lists the names that can be given.
    """
    where = f"{where}.target_modules"
    known = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in known.items() if linear_widths(module)]
    reserved = _reserved(model, {name.rpartition(".")[2] for name in linear})
    good = [name for name in linear if name.rpartition(".")[2] not in reserved]
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        found = [name for name in good if known[name] is not head and isinstance(known[name], nn.Linear | Conv1D)]
        if not found:
            raise ConfigError(f"{where}: all-linear finds no linear module in this model")
        return found
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in good if known[name] is not head))
    more = f" and {len(short) - _SHOWN} more" if len(short) > _SHOWN else ""
    cure = f"give {ALL_LINEAR}, or names of linear modules: {', '.join(short[:_SHOWN])}{more}"
    meant = named_by(targets, list(known), where)
    if not meant:
        raise ConfigError(f"{where} is empty; {cure}")
    if lost := [target for target, names in meant.items() if not names]:
        raise ConfigError(f"{where}: {lost[0]!r:.80} matches no module of this model; {cure}")
    chosen = [name for name in known if any(name in names for names in meant.values())]
    if wrong := next((name for name in chosen if name not in good), None):
        why = f"is of type {type(known[wrong]).__name__} and no linear module"
        if wrong in linear:
            why = "carries a name that PEFT keeps for this model's fused experts"
        raise ConfigError(f"{where}: {wrong} {why}, which no expert can hold; {cure}")
    return chosen


def check_targets(config: PretrainedConfig, targets: str | Sequence[str], where: str = "lora") -> None:
    """Refuse `target_modules` that a model of this configuration cannot be adapted on.

    Raises:
        ConfigError: as `lora_targets`.
    """
    try:
        model = outline(config)
    except ConfigError:  # what is wrong with the model is said where it is built
        return
    lora_targets(model, targets, where)


def _reserved(model: nn.Module, leaves: set[str]) -> set[str]:
    """Names of modules that PEFT turns into fused parameters of a mixture-of-experts model, by asking it."""
    try:
        conversion = import_module(_CONVERSION)
    except ImportError:  # a PEFT that converts nothing
        return set()
    found = set()
    for leaf in leaves:
        section = LoraConfig(target_modules=[leaf])
        try:
            conversion.convert_peft_config_for_transformers(section, model, None)
        except ValueError:  # it wants others beside this one, which are fused with it
            found.add(leaf)
            continue
        if leaf not in set(section.target_modules or ()):
            found.add(leaf)
    return found


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear module; None of any other.

    Linear, GPT-2's Conv1D (whose weight is input x output), and anything that has both widths, as quantised linears do.
    """
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


def named_by(entries: str | Sequence[str], names: Sequence[str], what: str) -> dict[str, set[str]]:
    """The modules that each entry of a setting means, as PEFT reads it.

    A text is a regular expression of whole names; an entry of a list is the end of names, from a dot or the start on.

    Args:
        entries: Setting.
        names: Names of modules.
        what: The setting's name, for messages.
    Raises:
        ConfigError: as `matches`.
    """
    if isinstance(entries, str):
        (hits,) = matches([entries], names, what)
        return {entries: {name for name, hit in zip(names, hits, strict=True) if hit}}
    ends: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for first in range(len(parts)):
            ends.setdefault(".".join(parts[first:]), set()).add(name)
    return {each: ends.get(each, set()) for each in entries}


def matches(patterns: Sequence[str], names: Sequence[str], what: str, *, tail: bool = False) -> list[list[bool]]:
    r"""Which names each pattern matches.

        matches([r"model\.layers\.[01]\..*q_proj"], ["model.layers.1.self_attn.q_proj"], "target_modules")
        -> [[True]]

    Args:
        patterns: Regular expressions.
        names: Names of modules.
        what: The setting they come from, for messages.
        tail: Match the end of a name from any dot on too, `(.*\.)?(pattern)`; else the whole name.
    Returns:
        For each pattern, for each name.
    Raises:
        ConfigError: a pattern is no regular expression or longer than `MAX_PATTERN`, or matching takes more than
            `MAX_SECONDS`.
    """
    cure = "write it with module names and simple wildcards, or list the modules"
    end = time.monotonic() + MAX_SECONDS
    found = []
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN:
            raise ConfigError(f"{what} has a pattern of {len(pattern):,} characters; the limit is {MAX_PATTERN:,}")
        try:
            compiled = regex.compile(rf"(.*\.)?({pattern})" if tail else pattern)
            hits = [compiled.fullmatch(name, timeout=max(0.01, end - time.monotonic())) is not None for name in names]
        except (regex.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{what}: {pattern!r:.80} is not a regular expression ({reason(error)}); {cure}"
            ) from error
        except (TimeoutError, MemoryError) as error:
            raise ConfigError(f"{what}: {pattern!r:.80} needs too much time or memory to match; {cure}") from error
        found.append(hits)
    return found
