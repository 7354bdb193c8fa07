"""Models leave weftlm: plain Hugging Face checkpoints, PEFT adapters, GGUF through llama.cpp's own converter.

What is written is opened afresh and compared with the model it came from; where logits differ nothing is left behind.
One checkpoint is one set of weights. An adapter is merged into its base, a pool of experts with fixed weights is folded
in, W + sum_z w_z scale_z B_z A_z, and what chooses for every token is refused, with what can be exported instead.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from weftlm.corpora.labels import expert_name
from weftlm.errors import CheckpointError, ConfigError, ExpertError
from weftlm.experts.adapted import adapted, unchanged
from weftlm.experts.expert import BaseReference, LoRAExpert, base_name
from weftlm.experts.fold import fold, scaled
from weftlm.experts.library import MANIFEST as LIBRARY
from weftlm.experts.library import ExpertLibrary
from weftlm.experts.lora import from_peft_model, write_lora
from weftlm.files import whole_folder
from weftlm.gating.modular_lm import ModularLM
from weftlm.models.factory import count_parameters, peft_warnings
from weftlm.models.open import DTYPES, check_written, load_base, probe_logits, require_same_logits
from weftlm.pipeline.any_model import OpenModel, open_model
from weftlm.routing.config import MANIFEST as ROUTED
from weftlm.routing.config import parse_router
from weftlm.routing.routed_model import BASE, EXPERTS, RoutedModel

log = logging.getLogger(__name__)

Format = Literal["hf", "peft", "gguf"]
"""A Hugging Face checkpoint; one PEFT folder per expert; a GGUF file."""
CONVERTER = "convert_hf_to_gguf.py"
_CONVERTERS = (CONVERTER, "convert-hf-to-gguf")
_SHOWN = 2_000


def export_model(
    path: str | Path,
    output: Path,
    *,
    format: Format = "hf",
    router: str | None = None,
    expert: str | None = None,
    base: str | None = None,
    revision: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    converter: Path | None = None,
    outtype: str = "auto",
) -> dict[str, Any]:
    """Write a model, or an expert library, in a format that needs no weftlm to load.

    The options are those of `weftlm export`; the output appears whole or not at all.

    Returns:
        source, output, format, kind, weight by expert, base, dtype, parameters and files.
    Raises:
        ConfigError: the model is no single set of weights, an option does not fit it, the output is not empty, or there
            is no converter.
        CheckpointError: the converter failed, or what was written is not the model it came from.
        DataError, ExpertError: the model comes without a tokenizer; there is no such expert, or it is broken.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    if router is not None and expert is not None:
        raise ConfigError("a router folds experts, and one expert alone has none; give --router or --expert, not both")
    folder, output = Path(path), Path(output)
    if format == "peft":
        for option, given in (("--router", router), ("--dtype", dtype), ("--tokenizer", tokenizer)):
            if given is not None:
                raise ConfigError(f"{option} {given}: --format peft writes adapters as they are: leave it out")
        return _export_adapters(folder, output, expert, base, revision)
    script = find_converter(converter) if format == "gguf" else None
    library: dict[str, Any] = {}
    if (folder / LIBRARY).exists():
        if router is None and expert is None:
            raise ConfigError(
                f"{folder} is a library of experts; say how they become one model (--router merged), which one to "
                "export (--expert NAME), or write them as PEFT adapters (--format peft)"
            )
        library = {"router": router or "merged", "experts": None if expert is None else [expert]}
    opened = open_model(
        path, base=base, revision=revision, tokenizer=tokenizer, dtype=dtype or "float32", **library
    )  # fmt: skip
    wanted_BTV = probe_logits(opened.model) if isinstance(opened.model, PeftModel) else None
    model, adapters, weights = _one_set_of_weights(opened, router, expert)
    if adapters:
        if wanted_BTV is None:
            with ExitStack() as stack:
                for adapter in adapters:
                    stack.enter_context(adapted(model, adapter))
                wanted_BTV = probe_logits(model)
        fold(model, adapters)
        require_same_logits(probe_logits(model), wanted_BTV, f"{path} with its adapters folded in", model.dtype)
    if dtype is not None:
        nn.Module.to(model, DTYPES[dtype])
    with whole_folder(output, "exported model") as making:
        checkpoint = making if script is None else making / output.name
        model.save_pretrained(checkpoint)
        opened.tokenizer.save(checkpoint)
        check_written(checkpoint, probe_logits(model))
        if script is not None:
            _convert(script, checkpoint, making / f"{output.name}.gguf", outtype)
            shutil.rmtree(checkpoint)
        return {
            "source": str(path),
            "output": str(output),
            "format": format,
            "kind": opened.kind,
            "experts": weights,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": count_parameters(model),
            "files": sorted(file.name for file in making.iterdir()),
        }


# -- one set of weights -------------------------------------------------------------------------------------------


def _one_set_of_weights(
    opened: OpenModel, router: str | None, expert: str | None
) -> tuple[PreTrainedModel, list[LoRAExpert], dict[str, float] | None]:
    """A plain model, the adapters to fold into it, and the weight of each expert there; None where it has none."""
    path = opened.path
    if isinstance(opened.model, RoutedModel):
        known = {each.name: each.lora for each in opened.model.experts}
        weights = _fixed_weights(opened, router) if expert is None else {_known(expert, list(known), path): 1.0}
        used = [scaled(known[name], weight) for name, weight in weights.items() if weight]
        return opened.model.unload(), used, weights
    if router is not None:
        raise ConfigError(f"--router is for routed models and expert libraries; {path} is {opened.kind}")
    if isinstance(opened.model, ModularLM):
        pool = opened.model.pool
        if expert is None:
            raise ConfigError(
                f"{path} is a gated model: it mixes the predictions of {len(pool)} models again for every token, which "
                "no single checkpoint can. Export the dense student (students.dense of weftlm gate distil), or one of "
                f"its models: --expert {'|'.join(pool.names)}"
            )
        member = pool.members[pool.place(expert)]
        pool.release()
        return member.model, [] if member.lora is None else [member.lora], {expert: 1.0}
    if expert is not None:
        raise ConfigError(f"--expert names a part of a routed or gated model; {path} is one set of weights")
    if isinstance(opened.model, PeftModel):
        adapter = from_peft_model(opened.model, "adapter", base=BaseReference(""))
        return opened.model.unload(), [adapter], None
    return opened.model, [], None


def _known(expert: str, names: Sequence[str], path: Path | str) -> str:
    name = expert_name(expert)
    if name not in names:
        raise ExpertError(f"{path} has no expert {name!r}; it has {', '.join(names)}")
    return name


def _fixed_weights(opened: OpenModel, spec: str | None) -> dict[str, float]:
    """Weight of each expert under a router that gives every token the same; None: the model's own.

    Raises:
        ConfigError: the router chooses for every token or sequence.
    """
    if spec is not None:
        opened.model.use_router(parse_router(spec))
    names, router = opened.experts, opened.model.router
    if router.static_weights_E is None:
        raise ConfigError(
            f"router {router.config.router!r} of {opened.path} chooses experts for every token or text, which no "
            f"single checkpoint can. Fold them with fixed weights (--router merged, --router single:expert={names[0]}),"
            f" export one (--expert {'|'.join(names)}), or write them as PEFT adapters (--format peft)"
        )
    return dict(zip(names, router.static_weights_E.tolist(), strict=True))


# -- adapters -----------------------------------------------------------------------------------------------------


def _export_adapters(
    folder: Path, output: Path, expert: str | None, base: str | None, revision: str | None
) -> dict[str, Any]:
    """Every expert of a routed model or a library as a PEFT folder."""
    place = folder / EXPERTS if (folder / ROUTED).exists() else folder
    if not (place / LIBRARY).exists():
        raise ConfigError(
            f"--format peft writes the experts of a routed model or of an expert library, and {folder} is neither; "
            "use --format hf"
        )
    library = ExpertLibrary.open(place)
    chosen = library.names if expert is None else [_known(expert, library.names, folder)]
    reference = library.base
    if base is not None:
        reference = BaseReference(base_name(base), revision, reference.fingerprint)
    elif (folder / BASE / "config.json").exists():
        reference = replace(reference, name=base_name(str(folder / BASE)), revision=None)
    with whole_folder(output, "exported adapters") as making:
        here = reference if Path(reference.name).is_dir() else library.base
        try:
            model = load_base(here.name, revision=here.revision)
        except ConfigError as error:
            raise ConfigError(
                f"{error}. Adapters are compared on their base when they are exported; name it (--base)"
            ) from error
        for name in chosen:
            lora = library.load(name).lora
            write_lora(making / name, replace(lora, base=reference))
            with adapted(model, lora):
                wanted_BTV = probe_logits(model)
            with unchanged(model), peft_warnings():  # as PEFT alone loads what was written
                found_BTV = probe_logits(PeftModel.from_pretrained(model, str(making / name), use_safetensors=True))
            require_same_logits(found_BTV, wanted_BTV, str(making / name), model.dtype)
        return {
            "source": str(folder),
            "output": str(output),
            "format": "peft",
            "kind": "routed",
            "experts": dict.fromkeys(chosen, 1.0),
            "base": reference.name,
            "files": sorted(file.name for file in making.iterdir()),
        }


# -- GGUF ---------------------------------------------------------------------------------------------------------


def find_converter(given: Path | None = None) -> Path:
    """llama.cpp's `convert_hf_to_gguf.py`.

    It is the script that is given, or in the folder given; else in the folder in the environment variable LLAMA_CPP, or
    on PATH.

    Raises:
        ConfigError: it is not there.
    """
    named = os.environ.get("LLAMA_CPP") if given is None else str(given)
    places: Iterable[str | None] = map(shutil.which, _CONVERTERS)
    if named:
        places = [named, *(os.path.join(named, name) for name in _CONVERTERS)]
    for place in places:
        if place is not None and Path(place).is_file():
            return Path(place).resolve()
    if named:
        raise ConfigError(
            f"{'LLAMA_CPP' if given is None else '--converter'} is {named}, where there is no {CONVERTER}; name that "
            "script or the folder it is in"
        )
    raise ConfigError(
        f"GGUF files are written by llama.cpp's own {CONVERTER}, which is not here; clone "
        "https://github.com/ggml-org/llama.cpp, install its requirements (pip install gguf), and name the folder: "
        "--converter FOLDER, or the environment variable LLAMA_CPP"
    )


def _convert(script: Path, checkpoint: Path, file: Path, outtype: str) -> None:
    """Run the converter.

    Raises:
        CheckpointError: it failed, with what it said, or wrote nothing.
    """
    command = [str(script), str(checkpoint), "--outfile", str(file), "--outtype", outtype]
    with script.open("rb") as opened:
        first = opened.readline(200)
    if script.suffix == ".py" or b"python" in first:
        command.insert(0, sys.executable)
    log.info("running %s", " ".join(command))
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0 or not file.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing")[-_SHOWN:]
        raise CheckpointError(f"{script} failed (exit {done.returncode}) and wrote no GGUF file:\n{said}")
