"""Pretrained language models: every tensor accounted for, safetensors only, no code of their own.

`load_base` opens a model, `read_config` its configuration alone; `stepping_of` says how one is run token by token.
Every part of weftlm opens its models here.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from weftlm.errors import CheckpointError, ConfigError, reason
from weftlm.files import check_sealed
from weftlm.places import locate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_SIZES = {
    r"hidden_size|num_attention_heads|vocab_size|max_position_embeddings": (1, 1 << 31),
    r"n_layers?|num_(hidden_|decoder_)?layers|(en|de)coder_layers|(num|n)_(local_|routed_)?experts": (0, 4096),
}
"""Ranges of the settings that decide how large a model is; beyond them a mistake would fill the memory."""
_READ = re.compile(r"((adapter_|generation_)?config|.*\.index)\.json|.*\.safetensors")
"""Files of a model's folder that are read, beside its tokenizer's."""
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(bias|masked_bias)|attention\.(bias|masked_bias))$")
"""Tensors of older checkpoints that are computed and not learnt."""
_TRIAL_PARAMETERS = 4_000_000_000
"""Largest model tried at opening, in float32; one in half precision counts eight times, as CPUs compute it slower."""
_CACHED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_SHOWN = 3
_PROBE = 2, 16
_TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.1}
_AGAIN = "copy or download the model again"


def load_base(name: str, *, revision: str | None = None, dtype: str = "float32") -> PreTrainedModel:
    """Open a whole language model, decoder-only or encoder-decoder, from a folder or the hub.

    Refused by name: tensors that are missing, unexpected, of another size, empty, or hold NaN or infinite values;
    pickled weights; code of the model's own; an adapter in the model's place; a model that cannot run, whose logits
    are not finite, or that is no causal language model though it is opened as one. The last three are found by one
    pass over two rows of three tokens.

    Cost beside loading: one pass over the weights in memory (0.1 s per GB), and that trial (for models of up to 4e9
    parameters in float32, 5e8 in half precision).

    Args:
        name: Folder or hub name.
        revision: Hub revision.
        dtype: Dtype of the parameters; `auto`: as they are stored.
    Returns:
        The model on the CPU, in evaluation mode.
    Raises:
        ConfigError: as above, or there is no such model or it is neither kind.
        DataError: a file of the folder is missing or was altered since weftlm wrote it.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    name = locate(name, "model", revision=revision)
    local = Path(name).is_dir()
    if local:
        check_sealed(Path(name), "make the model again, or restore the file from a copy")
    config = read_config(name, revision=revision)
    if local:
        _check_weights(name, Path(name))
    encoder_decoder = config.is_encoder_decoder is True
    known = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.model_type not in known:
        raise _refusal(name, f"a {config.model_type} model is no decoder-only or encoder-decoder language model")
    kind: Any = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel
    try:
        with _quiet():
            model, info = kind.from_pretrained(
                name,
                revision=revision,
                dtype=dtype if dtype == "auto" else DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
            )
    except Exception as error:
        raise _refusal(name, _cause(error, local=local)) from error
    _check_tensors(name, model, info)
    _try_out(name, model.eval())
    return model


def read_config(name: str, *, revision: str | None = None, local_files_only: bool = False) -> PretrainedConfig:
    """A model's configuration, from a folder or the hub; code that comes with it is never run.

    Args:
        name: Folder or hub name.
        revision: Hub revision.
        local_files_only: Whether nothing is downloaded.
    Raises:
        ConfigError: there is none, it is damaged, of an unknown model type, or of sizes no model has.
    """
    name = locate(name, "model", revision=revision, ask=not local_files_only)
    folder = Path(name)
    if folder.is_dir():
        _check_files(name, folder)
        if not (folder / _CONFIG).exists():
            adapter = (folder / _ADAPTER).exists()
            why = f"it holds no {_CONFIG}; name the folder that save_pretrained wrote"
            raise _refusal(name, "it holds an adapter over another model; name that model" if adapter else why)
    try:
        with _quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                name, revision=revision, local_files_only=local_files_only, trust_remote_code=False
            )
    except Exception as error:
        if local_files_only and not folder.is_dir():
            raise ConfigError(
                f"the configuration of {name!r} is not on this machine, and nothing is downloaded here; give a local "
                f"folder that holds its config.json (with --set), weights are not needed"
            ) from error
        raise _refusal(name, _cause(error, local=folder.is_dir())) from error
    for key, value in config.to_dict().items():
        allowed = next((sizes for keys, sizes in _SIZES.items() if re.fullmatch(keys, key)), None)
        unlimited = key == "max_position_embeddings" and value == -1  # as XLNet says it
        if allowed is None or value is None or unlimited:
            continue
        if not isinstance(value, int) or not allowed[0] <= value <= allowed[1]:
            raise _refusal(
                name, f"{_CONFIG} gives {key} as {value!r:.40}; it must be from {allowed[0]} to {allowed[1]:,}"
            )
    return config


def from_architecture(config: PretrainedConfig) -> Any:
    """A language model of a configuration with fresh weights, decoder-only or encoder-decoder.

    Raises:
        ConfigError: the configuration's sizes do not fit each other, or it is of no language model.
    """
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        return kind.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, AssertionError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"the configuration makes no {config.model_type} language model: {reason(error)}") from error


def outline(config: PretrainedConfig) -> Any:
    """The same on the meta device: modules and shapes, no memory."""
    with torch.device("meta"):
        return from_architecture(config)


def config_at_hand(name: str, revision: str | None = None) -> PretrainedConfig | None:
    """The configuration of a model in a folder or in the hub's local cache; None where it is not there."""
    try:
        return read_config(name, revision=revision, local_files_only=True)
    except ConfigError:
        return None


def check_vocabulary(model: nn.Module, vocab_size: int, name: str) -> None:
    """Refuse a tokenizer that gives ids the model has no embedding or no logit for.

    Args:
        model: the model.
        vocab_size: highest id of the tokenizer + 1.
        name: Name of the model, for the message.
    Raises:
        ConfigError: it does.
    """
    held = min(_rows(model))
    if held < vocab_size:
        raise ConfigError(
            f"model {name} has {held} token embeddings and the tokenizer gives {vocab_size} ids; use the tokenizer "
            f"that comes with the model, or give the model as many embeddings (resize_token_embeddings) and train them"
        )


def require_decoder_only(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model, if it predicts a text's next tokens.

    Raises:
        ConfigError: it is an encoder-decoder.
    """
    if model.config.is_encoder_decoder:
        raise ConfigError(f"{name} is an encoder-decoder model; what is opened here predicts a text's next tokens")
    return model


def _rows(model: Any) -> list[int]:
    heads = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [int(head.weight.shape[0]) for head in heads if head is not None and hasattr(head, "weight")] or [1 << 31]


@torch.no_grad()
def keeps_cache(model: nn.Module) -> bool:
    """Whether a decoder-only model reads a text on from the `past_key_values` it gives: found by trying, once a model.

    Three tokens are read at once, and in two parts. Models whose memory has another form (state spaces) or that have
    none give other logits, or fail; their texts are read from the start for every token.
    """
    if model not in _CACHED:
        ids_1T = torch.tensor([[0, 1, 0]], device=next(model.parameters()).device)
        try:
            with _quiet():
                whole_V: Tensor = model(input_ids=ids_1T, use_cache=False).logits[0, -1]
                cache = model(input_ids=ids_1T[:, :2], use_cache=True).past_key_values
                last_V: Tensor = model(input_ids=ids_1T[:, 2:], past_key_values=cache, use_cache=True).logits[0, -1]
            apart = float((last_V - whole_V).abs().max())
            _CACHED[model] = cache is not None and apart <= 0.05 * float(whole_V.abs().max().clamp_min(1e-6))
        except Exception:  # noqa: BLE001, a model without such a cache fails in its own way
            _CACHED[model] = False
    return _CACHED[model]


@dataclass(frozen=True)
class Stepping:
    """What an engine must know of a model to run it token by token; a model's `stepper()` gives it.

    Attributes:
        inner: Models of transformers whose `forward` a pass ends in.
        keeps_cache: Whether all that is carried from token to token is a cache passed as `past_key_values`.
        in_pieces: Whether a prompt read in pieces gives what it gives in one pass.
        takes_prompt_mask: Whether `forward` takes `routing_mask`, true for the tokens of the prompt.
    """

    inner: tuple[nn.Module, ...]
    keeps_cache: bool
    in_pieces: bool
    takes_prompt_mask: bool = False


def stepping_of(model: Any) -> Stepping:
    """How a model is stepped: as its `stepper()` says, else as a model of transformers, bare or under PEFT."""
    if hasattr(model, "stepper"):
        found: Stepping = model.stepper()
        return found
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    cached = keeps_cache(inner)
    return Stepping((inner,), keeps_cache=cached, in_pieces=cached)


# -- what was written -------------------------------------------------------------------------------------------------


@torch.no_grad()
def probe_logits(model: Any) -> Tensor:
    """Logits of a fixed text of 2 x 16 tokens, float32, BTV on the CPU: by these a model is compared with its copy."""
    longest = getattr(model.config, "max_position_embeddings", None) or _PROBE[1]
    shape = _PROBE[0], min(_PROBE[1], int(longest))
    ids_BT = torch.randint(min(_rows(model)), shape, generator=torch.Generator().manual_seed(0))
    return _logits(model, ids_BT.to(next(model.parameters()).device)).float().cpu()


def _logits(model: Any, ids_BT: Tensor) -> Tensor:
    arguments = {"decoder_input_ids": ids_BT} if model.config.is_encoder_decoder else {}
    logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False, **arguments).logits
    return logits_BTV


def check_written(folder: Path, wanted_BTV: Tensor) -> None:
    """Open a written model afresh and compare its `probe_logits` with those of the model it came from.

    Raises:
        CheckpointError: they differ.
        ConfigError: it cannot be opened.
    """
    again = load_base(str(folder), dtype="auto")
    require_same_logits(probe_logits(again), wanted_BTV, str(folder), again.dtype)


def require_same_logits(found_BTV: Tensor, wanted_BTV: Tensor, what: str, dtype: torch.dtype) -> None:
    """Refuse a copy that is another model than its original.

        |found - wanted| / |wanted - its mean over the vocabulary| <= tolerance          norms over BTV

    The tolerance is that of rounding the weights once: 1e-3 in float32, 0.02 in float16, 0.1 in bfloat16.

    Raises:
        CheckpointError: they differ by more, or are not finite.
    """
    size = float((wanted_BTV - wanted_BTV.mean(dim=-1, keepdim=True)).norm())
    vocabulary = min(found_BTV.shape[-1], wanted_BTV.shape[-1])
    apart_BTV = found_BTV[..., :vocabulary] - wanted_BTV[..., :vocabulary]
    share = float(apart_BTV.norm()) / max(size, 1e-6)
    if found_BTV.shape != wanted_BTV.shape or not share <= _TOLERANCE.get(dtype, 1e-3):
        raise CheckpointError(
            f"{what} is not the model it was made from: its logits differ by up to {float(apart_BTV.abs().max()):.3g} "
            f"({share:.2%} of their spread); nothing was written. Write it in float32, or report this with the model's "
            f"architecture"
        )


# -- what is refused --------------------------------------------------------------------------------------------------


def _check_files(name: str, folder: Path) -> None:
    """Refuse broken links, and pipes, which would be waited for."""
    for path in folder.iterdir():
        if _READ.fullmatch(path.name) and not path.is_file():
            raise _refusal(name, f"{path.name} is a broken link or no plain file; {_AGAIN}")


def _check_weights(name: str, folder: Path) -> None:
    """Refuse an adapter, and pickled weights, before anything is built."""
    if (folder / _ADAPTER).exists():
        raise _refusal(name, f"it holds an adapter beside the model; move {_ADAPTER} to a folder of its own")
    if any(folder.glob("*.safetensors")):
        return
    if pickled := sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED):
        raise _refusal(
            name,
            f"its weights ({', '.join(pickled[:_SHOWN])}) are pickled, which can run code and is never loaded; "
            f"load it with transformers where you trust it: save_pretrained writes model.safetensors",
        )
    raise _refusal(name, f"it holds no weights (model.safetensors); {_AGAIN}")


def _check_tensors(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _refusal(name, "it is an adapter over another model; name that model")
    sizes = sorted(info["mismatched_keys"])
    if empty := [key for key, stored, _ in sizes if 0 in stored]:
        raise _refusal(
            name,
            f"{_listed(empty)} without values, as ZeRO-3 leaves parameters on one process; gather them before saving "
            f"(DeepSpeed: zero_to_fp32.py, or stage3_gather_16bit_weights_on_model_save)",
        )
    scratch = {buffer for buffer, _ in model.named_buffers()} - set(model.state_dict())
    unexpected = [
        key
        for key in info["unexpected_keys"]
        if not _COMPUTED.search(key) and not any(buffer.endswith(key) for buffer in scratch)
    ]
    for keys, what in (
        ([f"{key} is {tuple(stored)}, must be {tuple(wanted)}" for key, stored, wanted in sizes], "of another size"),
        (sorted(info["missing_keys"]), "missing"),
        (sorted(unexpected), "unexpected"),
    ):
        if keys:
            raise _refusal(
                name, f"{_listed(keys)} {what}; the files are not of this configuration or not complete: {_AGAIN}"
            )
    if info.get("error_msgs"):
        raise _refusal(name, " ".join(str(info["error_msgs"][0]).split())[:200])
    damaged = [key for key, tensor in model.state_dict().items() if not _finite(tensor)]
    if damaged:
        raise _refusal(
            name,
            f"{_listed(damaged)} with NaN or infinite values in {str(model.dtype).removeprefix('torch.')}; take an "
            f"earlier checkpoint, or {_AGAIN}",
        )


def _finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.numel():
        return True
    total = tensor.sum(dtype=torch.float32 if tensor.element_size() < 4 else None)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


@torch.no_grad()
def _try_out(name: str, model: PreTrainedModel) -> None:
    """Refuse a model that cannot run, or whose prediction reads what it is to predict.

    Rows 0 1 2 and 0 1 3: a causal model has the same logits in both before the last token.
    """
    weight = next(model.parameters())
    cost = 1 if weight.dtype in (torch.float32, torch.float64) else 8
    if getattr(model, "is_quantized", False) or model.num_parameters() * cost > _TRIAL_PARAMETERS:
        return
    ids_BT = torch.tensor([[0, 1, 2], [0, 1, 3]]) % min(_rows(model))
    try:
        with _quiet():
            logits_BTV = _logits(model, ids_BT)
    except Exception as error:
        raise _refusal(name, f"the model cannot run: {reason(error)}") from error
    if not bool(logits_BTV.isfinite().all()):
        raise _refusal(name, f"the model's logits are not finite; check {_CONFIG}, or download the model again")
    if not model.config.is_encoder_decoder:
        first, second = logits_BTV[:, :2].float()
        if float((first - second).abs().max()) > 0.02 * float(logits_BTV.float().abs().max().clamp_min(1e-6)):
            raise _refusal(name, f"a {model.config.model_type} model whose predictions read later tokens is no causal "
                                 "language model")  # fmt: skip


# -- messages ---------------------------------------------------------------------------------------------------------


def _refusal(name: str, why: str) -> ConfigError:
    return ConfigError(f"model {name!r} cannot be loaded: {why}")


def _cause(error: Exception, *, local: bool) -> str:
    text = str(error)
    if isinstance(error, ImportError):
        return f"it needs a package that is not installed ({reason(error)}); install it, or use a copy in float"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in text:
        return "there is not enough memory for it"
    if "custom code" in text or "trust_remote_code" in text:
        return "it needs code of its own, which weftlm never runs; convert it to a model type of transformers"
    if isinstance(error, SafetensorError):
        return f"its weights are truncated or not safetensors ({reason(error)}); {_AGAIN}"
    if "safetensors" in text and not local:
        return "it has no safetensors; weftlm loads no pickled weights, ask for a safetensors revision (--revision)"
    if not local:
        return f"{reason(error)}; check the name, your access and the network"
    return f"transformers {transformers.__version__} cannot read it ({reason(error)}); check its {_CONFIG}"


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{len(keys)} {'tensor' if len(keys) == 1 else 'tensors'} ({', '.join(keys[:_SHOWN])}{more})"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the reports and warnings of transformers back: what matters of them is an error here."""
    before, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()
