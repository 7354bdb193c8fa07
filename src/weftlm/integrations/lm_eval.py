"""weftlm's models under lm-evaluation-harness: base, adapted, routed, gated and distilled ones as `--model weftlm`.

    python -m weftlm.integrations.lm_eval --model weftlm --model_args path=FOLDER --tasks TASK

is the harness's own command, told of the model first. A harness that reads the entry points `lm_eval.models` knows it
by itself: `lm_eval --model weftlm`. One that reads none (0.4.13) learns of it from a task file given by its path:

    metadata: {version: 1, model: !function weftlm.integrations.lm_eval.WeftLM}

Texts are tokenised, joined and cut as the harness does for Hugging Face models, so that its numbers for `hf` and
`weftlm` are comparable, and are weftlm.evaluation's on the same items.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from weftlm.errors import ConfigError, DataError, NumericsError, did_you_mean, install_hint, reason
from weftlm.models.device import AUTO, choose_device
from weftlm.pipeline.any_model import open_model
from weftlm.progress import progress

try:
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-untyped]
    from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]
    from lm_eval.api.registry import MODEL_REGISTRY, register_model  # type: ignore[import-untyped]
    from lm_eval.models.utils import (  # type: ignore[import-untyped]
        DEFAULT_MAX_LENGTH,
        handle_stop_sequences,
        normalize_gen_kwargs,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-untyped]
except ImportError as missing:
    raise ConfigError(
        f"lm-evaluation-harness cannot be imported ({reason(missing)}); {install_hint('lm-eval')}"
    ) from missing

log = logging.getLogger(__name__)

NAME = "weftlm"
ARGUMENTS = (
    "path", "base", "revision", "tokenizer", "dtype", "device", "batch_size", "max_batch_size", "max_length",
    "max_gen_toks", "add_bos_token", "prefix_token_id",
)  # fmt: skip
T = TypeVar("T")
A = TypeVar("A")


@dataclass(frozen=True)
class _Row:
    """One text to score: what the model reads, and which tokens at its end are judged.

    Attributes:
        request: its number.
        read_T: ids the model reads.
        judged_C: ids predicted from the last C positions.
        prompt: how many of the ids read belong to the context; None where the text has none.
    """

    request: int
    read_T: tuple[int, ...]
    judged_C: tuple[int, ...]
    prompt: int | None


class WeftLM(TemplateLM):  # type: ignore[misc]
    """Any model `open_model` opens, as the harness asks for one.

        log p(continuation | context) = sum_j log p(c_j | x, c_<j)              nats, float32; sums in float64

    Batches are padded and masked, so that neither batch size nor order changes a number by more than rounding; a model
    that reads past no padding generates for contexts of one length at a time. A routed
    model that decides once per sequence decides by the context alone, the same for every continuation of it; by the
    whole window where a text is scored by itself (`loglikelihood_rolling`).

    Under `torchrun` or `accelerate launch` every process scores its share of the requests.

    Args:
        path: as of `open_model`; `base`, `revision`, `tokenizer` and `dtype` too.
        device: where to run; None for CUDA where there is one.
        batch_size: texts per pass; `auto`: as many as fit in memory, `max_batch_size` at most.
        max_length: tokens read at most; None for what the model says. Contexts lose their beginning beyond it.
        max_gen_toks: tokens generated where a task does not say.
        add_bos_token: begin texts with the tokenizer's beginning-of-text token; None: as the tokenizer does.
        prefix_token_id: read before a text without context; None for the beginning-of-text or end-of-text token.
    Raises:
        ConfigError: an argument is unknown or out of range, or as `open_model`.
        DataError: the model comes without a tokenizer.
    """

    def __init__(
        self,
        path: str | None = None,
        base: str | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            meant = "; did you mean 'path'?" if name == "pretrained" else did_you_mean(name, ARGUMENTS)
            raise ConfigError(f"--model_args {name}: unknown argument of {NAME}{meant}")
        if path is None:
            raise ConfigError("--model_args has no path; name the model: path=runs/x, or path=owner/name on the hub")
        self._rank, self._world_size, self._device = _join(device)
        opened = open_model(
            str(path), base=base, revision=revision, tokenizer=tokenizer, dtype=dtype, device=str(self._device)
        )
        self.opened, self.model = opened, opened.model
        self.tokenizer = opened.tokenizer.hf
        self._auto = str(batch_size).startswith("auto")
        self.batch_size = _whole(max_batch_size or 64 if self._auto else batch_size, "batch_size")
        longest = opened.max_length
        self.max_length = _whole(max_length or longest or DEFAULT_MAX_LENGTH, "max_length")
        if longest is not None and self.max_length > longest:
            raise ConfigError(f"max_length is {self.max_length}; {path} reads {longest} tokens at most")
        self.max_gen_toks = _whole(max_gen_toks, "max_gen_toks")
        self._add_bos = add_bos_token
        self._prefix = prefix_token_id

    # -- what the harness asks about it -------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return self.opened.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is predicted from."""
        if self._prefix is not None:
            return self._prefix
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

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

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's template writes it.

        Raises:
            ConfigError: the tokenizer has none.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except ValueError as error:
            raise ConfigError(f"--apply_chat_template: {reason(error)}") from error
        return str(text)

    # -- processes ----------------------------------------------------------------------------------------------

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors, one after another."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor.reshape(-1)) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.reshape(-1).contiguous())
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The ranks' objects on rank `dst`; None on the others."""
        if self.world_size == 1:
            return [obj]
        found: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, found, dst=dst)
        return found

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    # -- tokens -------------------------------------------------------------------------------------------------

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; the beginning-of-text token is never put before a text that begins with it."""
        special = add_special_tokens
        if special is None:
            bos = self.tokenizer.bos_token
            special = False if bos and string.startswith(bos) else self._add_bos
        options = {} if special is None else {"add_special_tokens": special}
        return [int(token) for token in self.tokenizer.encode(string, verbose=False, **options, **kwargs)]

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

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether greedy decoding would give it.

        Raises:
            DataError: a continuation has no tokens.
        """
        for context, continuation in (request.args for request in requests):
            if not context:
                self._check(self.tok_encode(continuation, add_special_tokens=False))
        found: list[tuple[float, bool]] = super().loglikelihood(list(requests), disable_tqdm=disable_tqdm)
        return found

    # -- scoring ------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether every token of it is the most likely one."""
        del kwargs
        rows = []
        for number, (_, context, continuation) in enumerate(requests):
            self._check(continuation)
            whole = [*context, *continuation][-(self.max_length + 1) :]
            prompt = len(whole) - len(continuation)
            rows.append(_Row(number, tuple(whole[:-1]), tuple(continuation), prompt))
        found = self._score(rows, "loglikelihood", disable_tqdm)
        for (text, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts: windows of `max_length` tokens, each token predicted once."""
        rows: list[_Row] = []
        texts: list[int] = []
        for text, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, judged in map(make_disjoint_window, windows):
                rows.append(_Row(len(rows), (*context, *judged[:-1]), tuple(judged), None))
                texts.append(text)
        sums = [0.0] * len(requests)
        for text, (logp, _) in zip(texts, self._score(rows, "loglikelihood_rolling", disable_tqdm), strict=True):
            sums[text] += logp
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _check(self, continuation: list[int]) -> None:
        if not continuation:
            raise DataError("a continuation has no tokens; the task's choices or targets must hold text")
        if len(continuation) > self.max_length:
            raise DataError(
                f"a continuation takes {len(continuation)} tokens and is never cut; max_length is {self.max_length}"
            )

    def _score(self, rows: Sequence[_Row], what: str, quiet: bool) -> list[tuple[float, bool]]:
        """Rows that read the same share a pass (the one-token choices of a question); the longest go first."""
        passes: dict[tuple[Any, ...], list[_Row]] = {}
        for row in rows:
            passes.setdefault((row.read_T, row.prompt if self._asks_for_prompt else None), []).append(row)
        groups = sorted(passes.values(), key=lambda group: len(group[0].read_T), reverse=True)
        found: dict[int, tuple[float, bool]] = {}
        for answers in self._in_batches(groups, self._judge, what, quiet):
            found |= answers
        return [found[number] for number in range(len(rows))]

    @property
    def _asks_for_prompt(self) -> bool:
        return getattr(self.model, "accepts_routing_mask", False) is True

    def _in_batches(self, items: Sequence[T], run: Callable[[Sequence[T]], A], what: str, quiet: bool) -> list[A]:
        """`run` on batches; with `auto`, on half of one that does not fit, and so from there on."""
        found: list[A] = []
        first = 0
        with progress(what, len(items), unit="texts", enabled=not quiet and self.rank == 0) as counter:
            while first < len(items):
                batch = items[first : first + self.batch_size]
                try:
                    found.append(run(batch))
                except torch.OutOfMemoryError:
                    if not self._auto or len(batch) == 1:
                        raise
                    self.batch_size = len(batch) // 2
                    log.info("a batch of %d does not fit in memory; going on with %d", len(batch), self.batch_size)
                    continue
                first += len(batch)
                counter.advance(len(batch))
        return found

    @torch.inference_mode()
    def _judge(self, batch: Sequence[Sequence[_Row]]) -> dict[int, tuple[float, bool]]:
        """One pass; by request, the summed log-probability and whether greedy decoding would give the same."""
        read = [group[0].read_T for group in batch]
        ids_BT, mask_BT = self._padded(read, left=False)
        extra: dict[str, Tensor] = {}
        if self._asks_for_prompt and batch[0][0].prompt is not None:
            prompt_B = torch.tensor([group[0].prompt for group in batch], device=ids_BT.device)
            extra["routing_mask"] = torch.arange(ids_BT.shape[1], device=ids_BT.device) < prompt_B[:, None]
        logits_BTV = self.model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False, **extra).logits
        found = {}
        for place, group in enumerate(batch):
            longest = max(len(row.judged_C) for row in group)
            end = len(read[place])
            logp_CV = torch.log_softmax(logits_BTV[place, end - longest : end].float(), dim=-1)
            best_C = logp_CV.argmax(dim=-1)
            for row in group:
                judged_C = torch.tensor(row.judged_C, device=logp_CV.device)
                count = len(judged_C)
                logp = float(logp_CV[-count:].gather(-1, judged_C[:, None]).double().sum())
                if logp != logp:
                    raise NumericsError(f"a log-likelihood is not a number; the weights of {self.opened.path} hold NaN")
                found[row.request] = (logp, bool((best_C[-count:] == judged_C).all()))
        return found

    def _padded(self, texts: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        """Ids of one length, and where they are not padding."""
        width = max(map(len, texts))
        ids_BT = torch.full((len(texts), width), self._padding, dtype=torch.long)
        mask_BT = torch.zeros(len(texts), width, dtype=torch.bool)
        for row, text in enumerate(texts):
            part = slice(width - len(text), width) if left else slice(0, len(text))
            ids_BT[row, part] = torch.tensor(text)
            mask_BT[row, part] = True
        return ids_BT.to(self.device), mask_BT.to(self.device)

    @functools.cached_property
    def _reads_past_padding(self) -> bool:
        """Whether padding on the left changes nothing that follows: found by trying, with a text of two tokens.

        Some models read padding as text (RWKV): they get texts of one length alone.
        """

        def following_V(ids: list[int], mask: list[int]) -> Tensor:
            made = self.model.generate(
                input_ids=torch.tensor([ids], device=self.device),
                attention_mask=torch.tensor([mask], device=self.device),
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=self._padding,
                output_logits=True,
                return_dict_in_generate=True,
            )
            return made.logits[0][0].float()  # type: ignore[no-any-return]

        with torch.inference_mode():
            alone_V = following_V([0, 1], [1, 1])
            padded_V = following_V([self._padding] * 4 + [0, 1], [0, 0, 0, 0, 1, 1])
        return float((padded_V - alone_V).abs().max()) <= 0.01 * float(alone_V.abs().max().clamp_min(1e-6))

    @property
    def _padding(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.eot_token_id if pad is None else int(pad)

    # -- writing ------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to the first of its stop strings or the end-of-text token."""
        found: dict[int, str] = {}
        alike: dict[tuple[str, int], list[int]] = {}
        contexts: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            settings = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            contexts[number] = self._context(request.args[0], settings["max_gen_toks"])
            length = 0 if self._reads_past_padding else len(contexts[number])
            alike.setdefault((repr(sorted(request.args[1].items())), length), []).append(number)
        for numbers in alike.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
            numbers.sort(key=lambda number: len(contexts[number]), reverse=True)

            def write(batch: Sequence[int], settings: dict[str, Any] = settings) -> dict[int, str]:
                texts = self._write([contexts[number] for number in batch], dict(settings))
                for number, text in zip(batch, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                return dict(zip(batch, texts, strict=True))

            for answers in self._in_batches(numbers, write, "generate_until", disable_tqdm):
                found |= answers
        return [found[number] for number in range(len(requests))]

    def _context(self, text: str, new: int) -> list[int]:
        """A context's ids, cut from the left to leave room for what is written."""
        room = self.max_length - new
        if room < 1:
            raise ConfigError(
                f"{new} tokens are to be generated and the model reads {self.max_length}; set max_gen_toks below that"
            )
        return (self.tok_encode(text) or [self.prefix_token_id])[-room:]

    @torch.inference_mode()
    def _write(self, contexts: Sequence[Sequence[int]], settings: dict[str, Any]) -> list[str]:
        stops = [stop for stop in handle_stop_sequences(settings.pop("until"), eos=None) if stop]
        new = settings.pop("max_gen_toks")
        if not settings.get("do_sample"):
            settings = {**settings, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        ids_BT, mask_BT = self._padded(contexts, left=True)
        start = ids_BT.shape[1]
        end = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {self.eot_token_id, *(end if isinstance(end, list) else [] if end is None else [end])}
        written = self.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT.long(),
            max_new_tokens=new,
            stopping_criteria=StoppingCriteriaList([_Stops(self._text, stops, start)]),
            eos_token_id=sorted(ends),
            pad_token_id=self._padding,
            **settings,
        )
        return [self._cut(row, stops, ends) for row in written[:, start:].tolist()]

    def _cut(self, ids: list[int], stops: Sequence[str], ends: set[int]) -> str:
        """The text before the first end-of-text token and the first stop string."""
        last = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        text = str(self.tokenizer.decode(ids[:last], skip_special_tokens=True))
        return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))


class _Stops(StoppingCriteria):
    """Sequence by sequence: whether its end holds a stop string.

    A stop string of n bytes lies within the last n tokens when it is complete; a few more tokens keep characters whole.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str], start: int) -> None:
        self.decode, self.stops, self.start = decode, stops, start
        self.back = max((len(stop.encode()) for stop in stops), default=0) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which sequences are done, one truth value each."""
        del scores, kwargs
        tails = input_ids[:, max(self.start, input_ids.shape[1] - self.back) :].tolist() if self.stops else []
        texts = [self.decode(tail) for tail in tails] or [""] * len(input_ids)
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def _whole(value: Any, name: str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number") from None
    if number < 1:
        raise ConfigError(f"{name} is {number}; it must be at least 1")
    return number


def _join(device: str | None) -> tuple[int, int, torch.device]:
    """Rank, number of ranks and device: those of the processes this one was started with, or of one alone."""
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        log.warning("the harness asks for %s and PyTorch finds no CUDA device here: running on the CPU", device)
        device = None  # the harness's own default, which nobody typed
    wanted = str(choose_device(device or AUTO)) if device != "cuda" else "cuda"
    if not dist.is_available() or (int(os.environ.get("WORLD_SIZE", "1")) < 2 and not dist.is_initialized()):
        return 0, 1, torch.device(wanted)
    if wanted == "cuda":
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(wanted)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if wanted.startswith("cuda") else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size(), torch.device(wanted)


def register() -> None:
    """Tell the harness of `--model weftlm`; importing this module does it, and once is enough."""
    if NAME not in MODEL_REGISTRY:
        register_model(NAME)(WeftLM)


register()


def main() -> None:
    """The harness's own command, with `weftlm` among its models."""
    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
