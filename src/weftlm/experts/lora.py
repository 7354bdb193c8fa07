"""LoRA adapters in and out: PEFT folders, live PEFT models, and whether an adapter fits a base model.

    y = W u + scale * B (A u)

Reading is strict: an adapter weftlm cannot reproduce exactly is refused, never approximated.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from peft import PeftModel, TaskType, get_peft_model_state_dict
from pydantic import ConfigDict, Field, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from weftlm.config import Section, validate
from weftlm.errors import ConfigError, ExpertError, did_you_mean, reason
from weftlm.experts.expert import CONFIG, WEIGHTS, BaseReference, LoRAExpert, LoRAFactors, plain
from weftlm.files import check_sealed, parse_json, whole_folder
from weftlm.models.factory import peft_warnings
from weftlm.models.lora_targets import ALL_LINEAR, linear_widths, matches, named_by
from weftlm.models.open import load_base, require_decoder_only

MAX_UPDATE_NORM = 1e4
"""Largest ||scale * B A||_F taken for a trained adapter; the weights of large models have norms of about 1e2."""
MAX_CONFIG = 16 << 20
"""Largest adapter_config.json, in bytes."""

_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_VARIANTS = frozenset(
    "alora_invocation_tokens arrow_config kasa_config layer_replication lora_bias megatron_config modules_to_save "
    "monteclora_config target_parameters trainable_token_indices".split()
)
_BASE_CHANGING = ("pissa", "corda", "olora", "loftq", "lora_ga")
_SHOWN = 3
_TASKS = frozenset(task.value for task in TaskType)

_Alpha = Annotated[int | float, Field(ge=-1e12, le=1e12)]


class _Settings(Section):
    """The settings of `adapter_config.json` that are read."""

    model_config = ConfigDict(extra="ignore", strict=True)

    r: PositiveInt
    lora_alpha: _Alpha
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None


@contextmanager
def about(name: str) -> Iterator[None]:
    """Put an expert's name before what is wrong with it."""
    try:
        yield
    except (ConfigError, ExpertError) as error:
        raise ExpertError(f"expert {name!r}: {error}") from error


def read_lora(folder: Path, name: str | None = None) -> LoRAExpert:
    """Read a PEFT LoRA folder: `adapter_config.json` and `adapter_model.safetensors`.

        scale = alpha / rank, or alpha / sqrt(rank) with `use_rslora`

    Rank and alpha are looked up per module as PEFT does (`rank_pattern`, `alpha_pattern`).

    Args:
        folder: Folder of the adapter.
        name: Name of the expert; the folder's name where None.
    Raises:
        ExpertError: files are missing, pickled, truncated or inconsistent, or the adapter is not a plain LoRA on linear
            modules.
        DataError: a file was altered since weftlm wrote the folder.
    """
    folder = Path(folder)
    name = folder.resolve().name if name is None else name
    check_sealed(folder, "write the adapter again")
    with about(name):
        config = _read(folder / CONFIG, MAX_CONFIG)
        if (folder / _PICKLED).exists():
            cure = (
                f"remove it, if {WEIGHTS} beside it is the adapter you mean"
                if (folder / WEIGHTS).exists()
                else f"load it with PEFT where you trust it and save it again: save_pretrained writes {WEIGHTS}"
            )
            raise ExpertError(
                f"{folder} holds pickled weights ({_PICKLED}), which can run code and are never loaded; {cure}"
            )
        weights = _read(folder / WEIGHTS)
    return parse_lora(name, config, weights)


def parse_lora(name: str, config: bytes, weights: bytes) -> LoRAExpert:
    """`read_lora` from the contents of the two files.

    Raises:
        ExpertError: as `read_lora`.
    """
    modules = {}
    with about(name):
        settings = _parse_config(config)
        pairs = _pairs(parse_tensors(WEIGHTS, weights), settings)
        ranks = _numbers(settings, "rank_pattern", "r", list(pairs))
        alphas = _numbers(settings, "alpha_pattern", "lora_alpha", list(pairs))
        for (module, (A_RI, B_OR)), rank, alpha in zip(pairs.items(), ranks, alphas, strict=True):
            if A_RI.ndim == 2 and A_RI.numel() and A_RI.shape[0] != rank:
                raise ExpertError(
                    f"{module} has rank {A_RI.shape[0]}, its {CONFIG} says {rank}; the two files do not belong "
                    f"together: export the adapter again"
                )
            modules[module] = LoRAFactors(A_RI, B_OR, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))
    base = BaseReference(settings.get("base_model_name_or_path") or "", settings.get("revision"))
    expert = LoRAExpert(name, base, modules, settings)
    check_lora(expert)
    return expert


def parse_tensors(file: str, data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ExpertError: it is truncated, malformed or of an unknown type.
    """
    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        why = f"is truncated or not safetensors ({reason(error)})"
        raise ExpertError(f"{file} {why}; copy or export it again") from error


def load_adapted(
    folder: Path, *, base: str | None = None, revision: str | None = None, dtype: str = "float32"
) -> PeftModel:
    """Open an adapter's folder over its base as a PEFT model, frozen; PEFT reads what `read_lora` took, written anew.

    Args:
        folder: Folder of the adapter.
        base: Another place to load the base from; None for the one the adapter names.
        revision: Hub revision of that base.
        dtype: Dtype of the base; the adapter is float32.
    Raises:
        ExpertError: as `read_lora` and `check_fits`, or the adapter names no base.
        ConfigError: the base cannot be loaded.
    """
    expert = read_lora(folder)
    if base is None:
        base, revision = expert.base.name, expert.base.revision
    if not base:
        raise ExpertError(f"expert {expert.name!r}: {folder / CONFIG} does not name its base; name it (--base)")
    model = load_base(base, revision=revision, dtype=dtype)
    check_fits(expert, model)
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    with TemporaryDirectory() as scratch, peft_warnings():
        checked = Path(scratch) / "adapter"
        write_lora(checked, replace(expert, peft_config={**expert.peft_config, "task_type": kind}))
        adapted = PeftModel.from_pretrained(model, str(checked))
    if from_peft_model(adapted, expert.name, base=expert.base).modules.keys() != expert.modules.keys():
        raise ExpertError(f"expert {expert.name!r}: PEFT adapts other modules of a {model.config.model_type} model")
    return adapted


def load_trained(folder: Path, *, dtype: str = "float32") -> nn.Module:
    """Open what `weftlm train` wrote: a whole model, or an adapter with the name of its base.

    Raises:
        ConfigError, ExpertError: as `load_base` and `load_adapted`, or the model is an encoder-decoder.
    """
    if (folder / CONFIG).exists():
        return load_adapted(folder, dtype=dtype)
    return require_decoder_only(load_base(str(folder), dtype="auto"), str(folder))


def write_lora(folder: Path, expert: LoRAExpert) -> None:
    """Write an adapter in PEFT's format: `PeftModel.from_pretrained(base, folder)` gives the same logits.

    The folder appears whole or not at all.

    Raises:
        ConfigError: the folder holds something.
        ExpertError: it cannot be written, or the expert is not sound (`check_lora`).
        CheckpointError: the disk is full.
    """
    files = lora_files(expert)
    try:
        with whole_folder(Path(folder), "adapter") as making:
            for file, data in files.items():
                (making / file).write_bytes(data)
    except OSError as error:
        raise ExpertError(
            f"expert {expert.name!r}: {folder} cannot be written: {reason(error)}; see that the folder is writable"
        ) from error


def lora_files(expert: LoRAExpert) -> dict[str, bytes]:
    """The contents of an adapter's two files by name, in PEFT's format; equal experts give equal bytes.

    Raises:
        ExpertError: the expert is not sound (`check_lora`).
    """
    check_lora(expert)
    tensors = {}
    for module, factors in expert.modules.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = plain(factors.A_RI)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = plain(factors.B_OR)
    config = _config_of(expert)
    return {WEIGHTS: save(tensors, {"format": "pt"}), CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


def _config_of(expert: LoRAExpert) -> dict[str, Any]:
    """The `adapter_config.json` of an expert: the commonest rank and alpha, and patterns for modules that differ.

        alpha = scale * rank

    Of the settings it came with, `task_type`, `lora_dropout` and `fan_in_fan_out` are kept.
    """
    base, like = expert.base, expert.peft_config
    ranks = {module: factors.rank for module, factors in sorted(expert.modules.items())}
    alphas = {module: _alpha(factors) for module, factors in sorted(expert.modules.items())}
    (rank, alpha), _ = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": task if (task := like.get("task_type")) in _TASKS else None,
        "base_model_name_or_path": base.name or None,
        "revision": base.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(module): each for module, each in ranks.items() if each != rank},
        "alpha_pattern": {_exactly(module): each for module, each in alphas.items() if each != alpha},
        "use_rslora": False,
        "target_modules": list(ranks),
        "fan_in_fan_out": bool(like.get("fan_in_fan_out", False)),
        "lora_dropout": like.get("lora_dropout", 0.0),
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def from_peft_model(model: PeftModel, name: str, *, adapter: str = "default", base: BaseReference) -> LoRAExpert:
    """Take an adapter out of a live PEFT model, with the scales it is using now; the tensors are copies.

    Raises:
        ExpertError: there is no such adapter, or it is not a plain LoRA on linear modules.
    """
    modules = {}
    with about(name):
        if adapter not in model.peft_config:
            raise ExpertError(f"no adapter {adapter!r} here{did_you_mean(adapter, model.peft_config)}")
        settings: dict[str, Any] = json.loads(json.dumps(model.peft_config[adapter].to_dict(), default=sorted))
        _refuse_variants(settings)
        if settings.get("bias", "none") != "none":
            raise ExpertError(f"it trains biases (bias={settings['bias']!r}); train it with bias='none'")
        state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        for module, (A_RI, B_OR) in _pairs(state, settings).items():
            layer: Any = model.get_base_model().get_submodule(module)
            modules[module] = LoRAFactors(plain(A_RI, copy=True), plain(B_OR, copy=True), float(layer.scaling[adapter]))
    expert = LoRAExpert(name, base, modules, settings)
    check_lora(expert)
    return expert


def check_lora(expert: LoRAExpert) -> None:
    """Refuse an adapter that cannot have come from training.

        ||scale * B A||_F^2 = scale^2 * sum over r, s of (A A^T)_rs (B^T B)_rs

    Raises:
        ExpertError: no modules, factors that do not fit each other, NaN or infinite values, or an update whose norm
            exceeds `MAX_UPDATE_NORM`.
    """
    with about(expert.name):
        if not expert.modules:
            raise ExpertError("the adapter is empty; it must adapt at least one linear module")
        for module, factors in expert.modules.items():
            A_RI, B_OR = factors.A_RI, factors.B_OR
            if not (A_RI.numel() and B_OR.numel()):
                raise ExpertError(
                    f"{module} has empty tensors (lora_A {tuple(A_RI.shape)}, lora_B {tuple(B_OR.shape)}); a model "
                    f"whose parameters were split over processes (DeepSpeed ZeRO-3, FSDP) was saved without gathering "
                    f"them: gather, and save the adapter again"
                )
            if A_RI.ndim != 2 or B_OR.ndim != 2 or A_RI.shape[0] != B_OR.shape[1]:
                raise ExpertError(
                    f"{module}: lora_A is {tuple(A_RI.shape)} and lora_B {tuple(B_OR.shape)}; they must be rank x "
                    f"input and output x rank, of one rank: adapters of convolutions are not supported"
                )
            if not (math.isfinite(factors.scale) and torch.isfinite(A_RI).all() and torch.isfinite(B_OR).all()):
                raise ExpertError(f"{module} holds NaN or infinite values; take an earlier checkpoint, or train again")
            if (norm := update_norm(factors)) > MAX_UPDATE_NORM:
                raise ExpertError(
                    f"{module} changes its weight by a norm of {norm:.3g}, more than {MAX_UPDATE_NORM:g}: the adapter "
                    f"has diverged or is corrupt; train it again, with a lower learning rate"
                )


def update_norm(factors: LoRAFactors) -> float:
    """||scale * B A||_F through the two rank x rank Gram matrices, in float64; the O x I matrix is never formed."""
    A_RI, B_OR = factors.A_RI.double(), factors.B_OR.double()
    squared = float(((A_RI @ A_RI.T) * (B_OR.T @ B_OR)).sum())
    return abs(factors.scale) * math.sqrt(max(squared, 0.0))


def adapter_fingerprint(expert: LoRAExpert) -> str:
    """Hash of an expert's factors and scales; the name does not enter."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(expert.modules):
        factors = expert.modules[name]
        total.update(json.dumps([name, *factors.A_RI.shape, *factors.B_OR.shape, factors.scale]).encode())
        for tensor in (factors.A_RI, factors.B_OR):
            total.update(plain(tensor).numpy().tobytes())
    return total.hexdigest()


def check_fits(expert: LoRAExpert, model: nn.Module, *, fingerprint: str | None = None) -> None:
    """Check that an adapter was made for this model.

    Args:
        expert: The adapter.
        model: The base, on the meta device too.
        fingerprint: `base_fingerprint` of the model, compared where the expert has its base's too.
    Raises:
        ExpertError: modules are missing on either side, are not linear or have other widths, or the fingerprints
            differ.
    """
    known = dict(model.named_modules())
    linear = {name: widths for name, module in known.items() if (widths := linear_widths(module)) is not None}
    if lacking := _absent(expert, list(linear)):
        raise ExpertError(
            f"expert {expert.name!r}: {CONFIG} names {some(lacking, ', ')} (target_modules), and {WEIGHTS} holds "
            f"nothing for it; the file is incomplete: export the adapter again"
        )
    wrong = []
    for module, factors in expert.modules.items():
        found, wanted = linear.get(module), factors.widths
        if module not in known:
            wrong.append(f"{module} is not in the model")
        elif found is None:
            wrong.append(f"{module} is a {type(known[module]).__name__} and no linear module")
        elif found != wanted:
            wrong.append(f"{module} maps {found[0]} to {found[1]}, the adapter {wanted[0]} to {wanted[1]}")
    if wrong:
        raise ExpertError(
            f"expert {expert.name!r} was made for another base ({expert.base.name or 'unnamed'}): "
            f"{some(wrong, '; ')}; load the base it was trained on"
        )
    if fingerprint is not None and expert.base.fingerprint not in (None, fingerprint):
        raise ExpertError(
            f"expert {expert.name!r} was made for another base: its base {expert.base.name or 'unnamed'} has "
            f"fingerprint {expert.base.fingerprint}, this model {fingerprint}; load the base it was trained on"
        )


def _read(path: Path, limit: int | None = None) -> bytes:
    cure = "save the adapter with PeftModel.save_pretrained"
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise ExpertError(f"{path} is no plain file; {cure}")
        if limit is not None and facts.st_size > limit:
            raise ExpertError(f"{path} has {facts.st_size:,} bytes, more than {limit:,}; {cure}")
        return path.read_bytes()
    except OSError as error:
        why = "there is none" if isinstance(error, FileNotFoundError) else error.strerror
        raise ExpertError(f"cannot read {path}: {why}; {cure}") from error


def _parse_config(data: bytes) -> dict[str, Any]:
    try:
        settings = parse_json(data)
    except ValueError as error:
        raise ExpertError(f"{CONFIG}: {reason(error)}; export the adapter again") from error
    if not isinstance(settings, dict):
        raise ExpertError(f"{CONFIG} holds {type(settings).__name__}; it must hold an object")
    _refuse_variants(settings)
    try:
        validate(_Settings, settings, CONFIG)
    except ConfigError as error:
        raise ExpertError(f"{some(str(error).splitlines(), '; ')}; export the adapter again") from error
    return settings


def _absent(expert: LoRAExpert, names: Sequence[str]) -> list[str]:
    """Linear modules of a base that an adapter's configuration means, as PEFT reads it, and its weights lack.

    PEFT would start them again from zero. `layers_to_transform` limits entries that end names, and nothing else.
    """
    settings = expert.peft_config
    targets, layers = settings.get("target_modules"), settings.get("layers_to_transform")
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return []
    with about(expert.name):
        meant = set[str]().union(*named_by(targets, names, "target_modules").values())
        excluded = named_by(settings.get("exclude_modules") or [], names, "exclude_modules").values()
    if isinstance(targets, list) and layers is not None and layers != []:
        wanted = {layers} if isinstance(layers, int) else set(layers)
        meant = {name for name in meant if name in targets or _layer(name, settings.get("layers_pattern")) in wanted}
    return sorted(meant.difference(expert.modules, *excluded))


def _layer(name: str, pattern: str | Sequence[str] | None) -> int | None:
    """The number of the layer a module is in: the first in its name, after one of the pattern's names if there is one.

    _layer("model.layers.1.mlp.experts.0.up_proj", None)  ->  1
    """
    allowed = [pattern] if isinstance(pattern, str) and pattern else pattern
    parts = pairwise(name.split("."))
    return next((int(part) for before, part in parts if part.isdecimal() and (not allowed or before in allowed)), None)


def _refuse_variants(settings: Mapping[str, Any]) -> None:
    """Refuse what is not y = W u + scale B A u over an unchanged base."""
    if settings.get("auto_map"):
        raise ExpertError(f"{CONFIG} asks for code of its own (auto_map), which is never run")
    if (kind := settings.get("peft_type")) != "LORA":
        raise ExpertError(f"peft_type is {kind!r}; only LORA adapters can be used: train one")
    for key in sorted(settings):
        if settings[key] and (key in _VARIANTS or (key.startswith("use_") and key != "use_rslora")):
            raise ExpertError(
                f"{key} is set to {settings[key]!r:.80}, which is more than a plain LoRA and cannot be combined with "
                f"others exactly; train it without {key}"
            )
    init = str(settings.get("init_lora_weights")).lower()
    if init.startswith(_BASE_CHANGING):
        raise ExpertError(
            f"init_lora_weights={init!r} trained the adapter against a changed base; convert it to a plain LoRA with "
            f"PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), or train without it"
        )


def _pairs(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_A and lora_B by module, sorted; float32."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        match, tensor = _KEY.fullmatch(key), tensors[key]
        if match is None:
            raise ExpertError(_stranger(key, settings))
        if not tensor.dtype.is_floating_point:
            raise ExpertError(f"{WEIGHTS}: {key} holds {tensor.dtype}; it must hold floating-point numbers")
        factors.setdefault(match["module"], {})[match["factor"]] = plain(tensor)
    for module, pair in factors.items():
        for there, lacking in (("A", "B"), ("B", "A")):
            if lacking not in pair:
                raise ExpertError(
                    f"{module} has lora_{there} but no lora_{lacking}; the file is incomplete: export the adapter again"
                )
    return {module: (factors[module]["A"], factors[module]["B"]) for module in sorted(factors)}


def _stranger(key: str, settings: Mapping[str, Any]) -> str:
    """Why a tensor is refused that is neither lora_A nor lora_B of a module."""
    if ".lora_embedding_" in key:
        return f"{key} adapts an embedding; train it on linear modules only (target_modules)"
    if key.endswith(".bias"):
        return (
            f"{WEIGHTS} holds the bias {key} (bias={settings.get('bias', 'none')!r}), which LoRA factors cannot "
            f"express; train it with bias='none'"
        )
    if ".lora_" not in key:
        return (
            f"{WEIGHTS} holds {key}, a whole copy of a base parameter, as where the vocabulary was resized; train it "
            f"without modules_to_save and save it with save_embedding_layers=False"
        )
    return (
        f"{WEIGHTS} holds {key}; keys must be {_PREFIX}MODULE.lora_A.weight and .lora_B.weight: save a plain LoRA with "
        f"PeftModel.save_pretrained"
    )


def _numbers(settings: Mapping[str, Any], pattern_key: str, default_key: str, modules: Sequence[str]) -> list[Any]:
    """A number for each module: of the first pattern that matches the end of its name, as in PEFT."""
    patterns = settings.get(pattern_key) or {}
    hits = matches(list(patterns), modules, pattern_key, tail=True)
    found = [settings.get(default_key)] * len(modules)
    for row, value in reversed(list(zip(hits, patterns.values(), strict=True))):
        found = [value if hit else known for hit, known in zip(row, found, strict=True)]
    return found


def some(texts: Sequence[str], separator: str) -> str:
    """The first few of some texts, and how many more there are."""
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return separator.join(texts[:_SHOWN]) + more


def _exactly(module: str) -> str:
    """A PEFT pattern that matches one module and no other."""
    return f"^{re.escape(module)}"


def _alpha(factors: LoRAFactors) -> float:
    """The alpha for which alpha / rank is the scale again, a whole number where one does it."""
    alpha = factors.scale * factors.rank
    near = (float(round(alpha)), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    best = min(near, key=lambda value: abs(value / factors.rank - factors.scale))
    return int(best) if best.is_integer() else best
