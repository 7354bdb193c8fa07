"""weftlm's models under lm-evaluation-harness: base, adapted, routed, gated and distilled ones as `--model weftlm`.

    python -m weftlm.integrations.lm_eval --model weftlm --model_args path=FOLDER --tasks TASK

is the harness's own command with this model registered. A harness that reads the entry points `lm_eval.models` knows it
by itself: `lm_eval --model weftlm`. One that reads none (0.4.13) learns of it from a task file given by its path:

    metadata: {version: 1, model: !function weftlm.integrations.lm_eval.WeftLM}

Texts are tokenised, joined, cut and batched by the harness's own class for Hugging Face models, so its numbers for `hf`
and `weftlm` are comparable, and are weftlm.evaluation's on the same items.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from weftlm.config import Section, validate
from weftlm.errors import ConfigError, DataError, NumericsError, install_hint, reason
from weftlm.models.device import AUTO, choose_device
from weftlm.pipeline.any_model import open_model

try:
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-untyped]
    from lm_eval.api.registry import MODEL_REGISTRY, register_model  # type: ignore[import-untyped]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
except ImportError as missing:
    raise ConfigError(
        f"lm-evaluation-harness cannot be imported ({reason(missing)}); {install_hint('lm-eval')}"
    ) from missing

log = logging.getLogger(__name__)

NAME = "weftlm"
_Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""A text for the harness's cache (None for a window of a longer one), the ids of a context and of its continuation."""


class _Arguments(Section):
    """What `--model_args` may hold, beside what the harness adds of its own options.

    Attributes:
        path: as of `open_model`; `base`, `revision`, `tokenizer` and `dtype` too.
        device: where to run; None for CUDA where there is one.
        batch_size: texts per pass; `auto`: as many as fit in memory, `max_batch_size` at most; `auto:N`: N times anew
            as texts get shorter, in one process.
        max_length: tokens read at most; None for what the model says. Contexts lose their beginning beyond it.
        max_gen_toks: tokens generated where a task does not say.
        add_bos_token: begin texts with the tokenizer's beginning-of-text token; None: as the tokenizer does.
        prefix_token_id: read before a text without context; None for the beginning-of-text or end-of-text token.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)  # the harness takes the name 2024 for a number

    path: str
    base: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    dtype: str = "float32"
    device: str | None = None
    batch_size: PositiveInt | Annotated[str, Field(pattern=r"^auto(:[1-9]\d*)?$")] = 1
    max_batch_size: PositiveInt | None = None
    max_length: PositiveInt | None = None
    max_gen_toks: PositiveInt = 256
    add_bos_token: bool | None = None
    prefix_token_id: NonNegativeInt | None = None


class WeftLM(HFLM):  # type: ignore[misc]
    """Any model `open_model` opens, as the harness asks for one.

        log p(continuation | context) = sum_j log p(c_j | x, c_<j)              nats, float32

    Neither batch size nor order changes a number by more than rounding. A routed model that decides once per sequence
    decides by the context alone, the same for every continuation of it; by the whole window where a text is scored by
    itself (`loglikelihood_rolling`). Under `torchrun` or `accelerate launch` every process scores its share of the
    requests.

    Args:
        arguments: as in `_Arguments`.
    Raises:
        ConfigError: an argument is unknown or out of range, or as `open_model`.
        DataError: the model comes without a tokenizer.
        NumericsError: in scoring, the weights hold NaN.
    """

    def __init__(self, **arguments: Any) -> None:
        given = validate(_Arguments, arguments, "--model_args")
        place, several = _device(given.device), int(os.environ.get("WORLD_SIZE", "1")) > 1
        if several and str(given.batch_size).startswith("auto:"):
            raise ConfigError(f"batch_size is {given.batch_size}; several processes need batch_size=auto, or a number")
        accelerator = None
        if several:
            accelerator = Accelerator(cpu=place.type == "cpu")
            place = accelerator.device
        opened = open_model(
            given.path, base=given.base, revision=given.revision, tokenizer=given.tokenizer, dtype=given.dtype,
            device=str(place),
        )  # fmt: skip
        length = given.max_length or opened.max_length or self._DEFAULT_MAX_LENGTH
        if opened.max_length is not None and length > opened.max_length:
            raise ConfigError(f"max_length is {length}; {given.path} reads {opened.max_length} tokens at most")
        harness = logging.getLogger(HFLM.__module__)
        level = harness.level
        harness.setLevel(logging.ERROR)  # it warns of models it did not load itself
        super().__init__(
            # In the model's stead, whose weights HFLM would tie and a routed model does not let go of.
            SimpleNamespace(device=place, config=opened.model.config),
            backend="causal", tokenizer=opened.tokenizer.hf, batch_size=given.batch_size,
            max_batch_size=given.max_batch_size or 64, max_length=length, softmax_dtype="float32",
            add_bos_token=given.add_bos_token, prefix_token_id=given.prefix_token_id,
        )  # fmt: skip
        harness.setLevel(level)
        self.opened, self._model = opened, opened.model
        self._max_gen_toks = given.max_gen_toks
        self._decided_by: int | None = None
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    # -- what the harness asks about it -------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return self.opened.tokenizer.eos_id

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated where a task does not say."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """For the names of the harness's caches."""
        return f"{NAME}__{self.opened.tokenizer.fingerprint}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "weftlm_kind": self.opened.kind,
            "weftlm_experts": list(self.opened.experts),
        }

    # -- scoring ------------------------------------------------------------------------------------------------

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The harness's split of a text, or one before the token that spans the boundary and leaves nothing to judge.

        The harness cuts the ids of the whole text where those of the context alone end. Of a text that has no more
        tokens than its context nothing would be left, and `hf` stops there. What is judged instead is what the ids of
        text and context have not in common: the joining token and those after it. A context of white space alone, which
        goes to the continuation, leaves the prefix token.
        """
        context_T, continuation_C = super()._encode_pair(context, continuation)
        if not continuation_C and continuation:
            whole_T = self.tok_encode(context + continuation)
            pairs = enumerate(zip(context_T, whole_T, strict=False))
            common = next((place for place, (one, other) in pairs if one != other), len(whole_T) - 1)
            context_T, continuation_C = whole_T[:common], whole_T[common:]
        return context_T or [self.prefix_token_id], continuation_C

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether every token of it is the most likely one.

        Requests go in groups: where a router decides once per sequence, those that decide by equally many tokens; and
        never one text in two splits, which the harness's cache of logits takes for one another.
        """
        routed = getattr(self.model, "accepts_routing_mask", False) is True
        groups: dict[tuple[int | None, int], list[int]] = {}
        splits: dict[tuple[int, ...], list[int]] = {}
        for number, (text, context, continuation) in enumerate(requests):
            if not continuation:
                raise DataError("a continuation has no tokens; the task's choices or targets must hold text")
            if len(continuation) > self.max_length:
                raise DataError(
                    f"a continuation takes {len(continuation)} tokens and is never cut; max_length is {self.max_length}"
                )
            read = min(len(context) + len(continuation), self.max_length + 1) - 1
            deciding = read if text is None else read + 1 - len(continuation)
            lengths = splits.setdefault((*context, *continuation[:-1]), [])
            if len(context) not in lengths:
                lengths.append(len(context))
            key = deciding if routed else None, lengths.index(len(context))
            groups.setdefault(key, []).append(number)
        if self.batch_size == "auto" and override_bs is None and len(groups) > 1:  # else every group looks for it
            override_bs = self._detect_batch_size([max(requests, key=lambda each: len(each[1]) + len(each[2]))])
        found: dict[int, tuple[float, bool]] = {}
        for (self._decided_by, _), numbers in groups.items():
            these = [requests[number] for number in numbers]
            answers = super()._loglikelihood_tokens(these, disable_tqdm=disable_tqdm, override_bs=override_bs)
            found |= dict(zip(numbers, answers, strict=True))
        self._decided_by = None
        return [found[number] for number in range(len(requests))]

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        """Log-probabilities of the tokens that are judged."""
        found_CV: Tensor = super()._select_cont_toks(logits, contlen, inplen)
        if found_CV[:, 0].isnan().any():  # before the harness's cache gets it
            raise NumericsError(f"a log-likelihood is not a number; the weights of {self.opened.path} hold NaN")
        return found_CV

    @torch.inference_mode()
    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits of ids padded on the right, which a causal model does not see from the left."""
        extra = {}
        if self._decided_by is not None:
            row_T = torch.arange(inps.shape[1], device=inps.device) < self._decided_by
            extra["routing_mask"] = row_T.expand(inps.shape)
        logits: Tensor = self.model(input_ids=inps, use_cache=False, **extra).logits
        return logits

    # -- writing ------------------------------------------------------------------------------------------------

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Ends at the end-of-text token of the tokenizer, too."""
        end = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {self.eot_token_id, *(end if isinstance(end, list) else [] if end is None else [end])}
        made: Tensor = super()._model_generate(context, max_length, stop, eos_token_id=sorted(ends), **settings)
        return made


def _device(asked: str | None) -> torch.device:
    """Where to run: as asked, or the accelerator there is; the harness's own default is CUDA, which nobody typed."""
    if asked is not None and asked.startswith("cuda") and not torch.cuda.is_available():
        log.warning("the harness asks for %s and PyTorch finds no CUDA device here: running on the CPU", asked)
        asked = None
    return choose_device(asked or AUTO)


if NAME not in MODEL_REGISTRY:
    register_model(NAME)(WeftLM)


def main() -> None:
    """The harness's own command, with `weftlm` among its models."""
    cli_evaluate()


if __name__ == "__main__":
    main()
