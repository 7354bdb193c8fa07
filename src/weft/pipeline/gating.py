"""From a library of experts to their scores, and on to a robust gate and its certificate.

<run>/scores/              the score cache (`weft.gating.scores`)
<run>/gate/                gate.safetensors, state.safetensors (to continue from), fit.json, certificate.json
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

from weft.corpora.source import Source
from weft.errors import ConfigError
from weft.evaluation.result import finite_or_none
from weft.experts.library import ExpertLibrary
from weft.gating.experts import ExpertPool
from weft.gating.scores import ScoreCache, score
from weft.pipeline.base import open_base
from weft.pipeline.expert_recipe import ExpertRecipe
from weft.pipeline.experts import process_group
from weft.pipeline.gate_recipe import GatingConfig, check_domains
from weft.pipeline.prepare import prepare
from weft.pipeline.prepared import PreparedData
from weft.training.runtime import choose_runtime


def gating_config(recipe: ExpertRecipe) -> GatingConfig:
    """The recipe's `gating` section; the defaults where it has none."""
    return GatingConfig() if recipe.gating is None else recipe.gating


def gate_plan(recipe: ExpertRecipe) -> dict[str, Any]:
    """What scoring, fitting and certifying will do, before anything is read."""
    config = gating_config(recipe)
    return {
        "base": recipe.base,
        "library": str(recipe.library_folder),
        "experts": "every expert of the library" if config.experts is None else ", ".join(config.experts),
        "domains": "every domain with held-out text" if config.domains is None else ", ".join(config.domains),
        "scores": str(recipe.scores_folder),
        "tokens_per_domain": f"{config.scores.sequences * config.scores.length} at most",
        "samples_per_expert": config.scores.samples,
        "gate": config.gate.gate,
        "fit_steps": config.fit.steps,
        "result": str(recipe.gate_folder),
    }


# -- scoring ------------------------------------------------------------------------------------------------------


def score_experts(recipe: ExpertRecipe, *, overwrite: bool = False, progress: bool = True) -> dict[str, Any]:
    """Score the domains' held-out text, and samples of each expert, under every expert of the recipe's library.

    What an interrupted run has scored is not scored again. Started by torchrun, the ranks share the work.

    Args:
        recipe: of the experts.
        overwrite: throw away scores of other experts, text or settings.
        progress: show progress on stderr.
    Returns:
        `score_summary` of the cache.
    Raises:
        ConfigError: no text is held out, or settings do not fit the experts.
        DataError, ExpertError, NumericsError, CheckpointError: as `prepare`, `open_base`, `ExpertPool` and `score`.
    """
    config = gating_config(recipe)
    group = process_group(recipe)
    first = group is None or bool(group.is_main_process)
    with nullcontext() if group is None else group.main_process_first():
        data = prepare(recipe.data, recipe.prepared_folder, progress=progress and first)
    texts = held_out_texts(data, config)
    base = open_base(recipe, data)
    device = choose_runtime(recipe.experts.training, parameters=0).device if group is None else group.device
    library = ExpertLibrary.open(recipe.library_folder)
    pool = ExpertPool.from_library(library, base.model, experts=config.experts, device=device)
    cache = score(
        pool,
        texts,
        recipe.scores_folder,
        config.scores,
        eos_id=data.tokenizer.eos_id,
        overwrite=overwrite,
        show=progress,
    )
    return score_summary(cache)


def held_out_texts(data: PreparedData, config: GatingConfig) -> dict[str, Source]:
    """The text that is scored, by domain: held out, so that no expert was trained on it.

    Raises:
        ConfigError: there is none, or of a domain that was asked for.
    """
    held: dict[str, Source] = {domain.name: domain.heldout for domain in data.domains if domain.heldout is not None}
    if not held:
        raise ConfigError("nothing is held out to score; raise data.split.fraction, or give data.heldout")
    if config.domains is None:
        return held
    check_domains(config.domains, [domain.name for domain in data.domains], "gating.domains")
    missing = [name for name in config.domains if name not in held]
    if missing:
        raise ConfigError(
            f"gating.domains: no held-out text of {', '.join(missing)}; raise data.split.fraction, or give data.heldout"
        )
    return {name: held[name] for name in config.domains}


def score_summary(cache: ScoreCache) -> dict[str, Any]:
    """What a score cache holds, as JSON.

    Returns:
        folder, fingerprint, kind, length, experts; by domain: sequences, tokens, and each expert's mean nats per token
        (None where a token is impossible under it); by expert: sequences and tokens of its samples.
    """
    domains = {}
    for name, text in cache.domains.items():
        tokens = int(text.lengths_N.sum(dtype=np.int64))
        means_E = -text.logq_NE.sum(axis=0) / tokens
        domains[name] = {
            "sequences": len(text),
            "tokens": tokens,
            "nats_per_token": {
                expert: finite_or_none(float(mean)) for expert, mean in zip(cache.experts, means_E, strict=True)
            },
        }
    return {
        "folder": str(cache.folder),
        "fingerprint": cache.fingerprint,
        "kind": cache.config.kind,
        "length": cache.config.length,
        "experts": list(cache.experts),
        "domains": domains,
        "samples": {
            name: {"sequences": len(text), "tokens": int(text.lengths_N.sum(dtype=np.int64))}
            for name, text in cache.samples.items()
        },
    }
