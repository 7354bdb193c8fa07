"""Strict configuration sections, and messages about what is wrong in them.

Every section of a recipe is a `Section`: unknown keys are errors with a suggestion, nothing is coerced silently, and a
resolved section can be written back with every default spelled out.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from weftlm.errors import ConfigError, did_you_mean
from weftlm.recipe_text import MAX_DEPTH, parse_yaml


class Section(BaseModel):
    """Base of every recipe section: frozen, no unknown keys, finite numbers, defaults validated too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every random generator in use takes."""


def _possible(path: Path) -> Path:
    try:
        data = os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError("a path with half a character in it; give a path that can be written") from None
    if b"\0" in data:
        raise ValueError("a path with a NUL character in it; give a path that can be written")
    if len(data) > 4000 or any(len(os.fsencode(part)) > 200 for part in path.parts):
        raise ValueError("a path that is too long; at most 200 bytes to a name and 4,000 in all")
    return path


Folder = Annotated[Path, AfterValidator(_possible)]
"""A path that a folder can be made at."""


S = TypeVar("S", bound=BaseModel)


def apply_overrides(recipe: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=value` overrides to a nested mapping; the value is read as YAML, a numeric part indexes a list.

    Raises:
        ConfigError: an override has no `=`, an empty key, or steps into something that has no keys.
    """
    result: dict[str, Any] = copy.deepcopy(dict(recipe))
    for override in overrides:
        key, equals, raw = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts) or len(parts) > MAX_DEPTH:
            raise ConfigError(f"--set {override!r:.80} is not of the form section.key=value")
        value = parse_yaml(raw, f"--set {override!r:.80}: the value")
        here: Any = result
        for depth, part in enumerate(parts):
            last = depth == len(parts) - 1
            place: Any = part
            if isinstance(here, list):
                if not (part.isascii() and part.isdigit()) or int(part) >= len(here):
                    raise ConfigError(f"--set {override!r:.80}: {part!r} is not a position in a list of {len(here)}")
                place = int(part)
            elif not isinstance(here, dict):
                raise ConfigError(f"--set {override!r:.80}: cannot step into {here!r:.80} with {part!r}")
            elif not last and here.get(part) is None:
                here[part] = {}
            if last:
                here[place] = value
            here = here[place]
    return result


# -- how two configurations differ --------------------------------------------------------------------------------

_ABSENT = object()
_SHOWN = 60
"""Characters shown of each of two values that differ."""


class Settings(dict[str, Any]):
    """The values of a section as JSON values, for the identity of a result.

    Attributes:
        stated: Those that are not the default. A result that was kept before a key existed is of the same settings
            where the key is not among these, since it was made as the default makes it.
    """

    stated: Mapping[str, Any] = {}


def settings(section: BaseModel, *, only: Collection[str] | None = None, without: Collection[str] = ()) -> Settings:
    """The values of a section that decide a result.

    Args:
        section: The section; those within it are included.
        only: Keys to include, instead of all.
        without: Keys to leave out.
    """
    names = {name for name in type(section).model_fields if (only is None or name in only) and name not in without}
    found = Settings(section.model_dump(mode="json", include=names))
    found.stated = section.model_dump(mode="json", include=names, exclude_defaults=True)
    return found


def changed_keys(old: Any, new: Any, place: str = "", stated: Any = None) -> list[str]:
    """Dotted keys at which two resolved configurations differ, with both values, cut where they differ.

    A key that `old` lacks and that is at its default in `new` (`Settings`) does not count; `stated` are the others.
    """
    stated = new.stated if isinstance(new, Settings) else stated
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {key: (old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in sorted(old.keys() | new.keys())}
        inner = {key: None if stated is None else stated.get(key, {}) for key in pairs}
        default = set() if stated is None else new.keys() - old.keys() - stated.keys()
        return [
            line
            for key, pair in pairs.items()
            if key not in default
            for line in changed_keys(*pair, f"{place}.{key}" if place else key, inner[key])
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = stated if isinstance(stated, list) else [None if stated is None else {}] * len(new)
        return [
            line
            for number, (before, now, part) in enumerate(zip(old, new, parts, strict=True))
            for line in changed_keys(before, now, f"{place}.{number}", part)
        ]
    if old is new or (old == new and type(old) is type(new)):
        return []
    was, now = _around("absent" if old is _ABSENT else repr(old), "absent" if new is _ABSENT else repr(new))
    return [f"{place}: {was} before, {now} now"]


def differences(old: Any, new: Any, place: str = "", most: int = 5) -> str:
    """`changed_keys` on one line, the first few and the number of the others; empty where nothing differs."""
    found = changed_keys(old, new, place)
    return "; ".join([*found[:most], *([f"{len(found) - most} more"] if len(found) > most else [])])


def _around(*texts: str) -> list[str]:
    """Texts that differ, each cut to the part around the first place where they do."""
    same = len(os.path.commonprefix(texts))  # noqa: RUF071 - by character is what is meant
    start = 0 if max(map(len, texts)) <= _SHOWN else max(0, same - _SHOWN // 3)
    return ["…" * (start > 0) + text[start : start + _SHOWN] + "…" * (len(text) > start + _SHOWN) for text in texts]


def validate(section: type[S], value: Any, where: str) -> S:
    """Validate `value` as `section`, turning pydantic's report into one ConfigError that names every wrong key.

    Args:
        section: the pydantic model.
        value: what the user wrote.
        where: the dotted place in the recipe, for the message; empty for the whole recipe.
    Raises:
        ConfigError: with one line per problem, and a suggestion for each unknown key.
    """
    try:
        return section.model_validate(value)
    except ValidationError as error:
        raise ConfigError(explain(section, error, where)) from None


def explain(section: type[BaseModel], error: ValidationError, where: str) -> str:
    """One line per problem of a pydantic report: place, what is allowed, what came."""
    lines: dict[tuple[str, str], list[str]] = {}
    problems = error.errors()
    within = {problem["loc"][:end] for problem in problems for end in range(len(problem["loc"]))}
    for problem in problems:
        if problem["type"] == "too_short" and problem["loc"] in within:
            continue  # its entries are wrong, and not too few
        loc = tuple(part for part in problem["loc"] if not (isinstance(part, str) and _BRANCH.fullmatch(part)))
        place = ".".join(str(part) for part in (where, *loc) if part != "")
        cause = problem.get("ctx", {}).get("error")
        if problem["type"] == "extra_forbidden":
            lines[place, ""] = [f"{place}: unknown key{_hint(section, loc, where)}"]
        elif problem["type"] == "missing":
            lines[place, ""] = [f"{place}: missing"]
        elif isinstance(cause, ConfigError):
            lines[place, ""] = [line if place in line else f"{place}: {line}" for line in str(cause).splitlines()]
        elif problem["type"] == "value_error" and isinstance(problem["input"], dict | list | tuple | BaseModel):
            lines[place, ""] = [f"{place or 'recipe'}: {cause}"]
        else:
            lines.setdefault((place or "recipe", f"{problem['input']!r:.120}"), []).append(_said(problem))
    found = []
    for (place, came), said in lines.items():
        if not came:
            found += said
            continue
        plain = came in ("True", "False", "None") or came.isdigit()
        quote = "; put it in quotes to mean text" if plain and _TEXT in said else ""
        found.append(f"{place}: {' or '.join(dict.fromkeys(said)).replace(' or must be ', ' or ')} (got {came}){quote}")
    return "\n".join(found)


_BRANCH = re.compile(
    r"(str|int|float|bool|none|is-instance|constrained-\w+|(list|tuple|dict|literal|nullable|function-\w+|lax-or-strict)\[.*\])"
)
"""Parts of a pydantic place that name a branch of a union and no key."""
_TEXT = "must be text"
_WORDS = (
    (r"^(Input|\w+) should", "must"), (r"( after validation)?, (unable|got|error|not) .*$", ""), (r"None$", "null"),
    (r"greater than or equal to", "at least"), (r"less than or equal to", "at most"), (r"greater than", "above"),
    (r"less than", "below"), (r"a valid string", "text"), (r"a valid boolean", "true or false"),
    (r"a valid integer", "a whole number"), (r"a valid number", "a number"), (r"a valid (list|tuple|set)", "a list"),
    (r"a valid (dictionary|mapping).*", "a mapping"), (r"Input is not a valid path.*", "must be a path"),
)  # fmt: skip
"""Words of pydantic's messages, and plain ones."""


def _said(problem: Any) -> str:
    """What is allowed where a pydantic problem is, in plain words."""
    if problem["type"] in ("value_error", "assertion_error"):
        return str(problem["ctx"]["error"])
    said: str = problem["msg"]
    for words, plain in _WORDS:
        said = re.sub(words, plain, said)
    return said


# -- keys people type -----------------------------------------------------------------------------------------------

_CALLED_ELSEWHERE = """
lr: learning_rate max_lr peak_lr
batch_sequences: batch_size per_device_train_batch_size train_batch_size global_batch_size
micro_batch_sequences: micro_batch_size gradient_accumulation_steps grad_accum
steps: max_steps num_steps train_steps total_steps max_iters epochs num_train_epochs num_epochs
tokens: max_tokens train_tokens num_tokens
sequence_length: seq_len seq_length max_seq_length max_length block_size context_length
rank: r lora_r lora_rank
alpha: lora_alpha
dropout: lora_dropout
target_modules: lora_target_modules modules
lora: peft peft_config lora_config
pretrained: model_name_or_path model_name model_id base_model
architecture: model_type
config: model_config hidden_size intermediate_size num_hidden_layers num_attention_heads n_layer n_embd n_head
corpora: dataset datasets train_data train_file
dataset: dataset_name path_or_name hf_dataset
text_field: text_column dataset_text_field text_key
run: output_dir out_dir save_dir run_dir
schedule: lr_scheduler_type lr_scheduler scheduler
clip_norm: max_grad_norm grad_clip gradient_clip_val
precision: bf16 fp16 mixed_precision
log_every_steps: logging_steps log_every
save_every_steps: save_steps save_every
keep_checkpoints: save_total_limit
every_steps: eval_steps eval_every
trackers: report_to logger
batch_size: batch_sequences per_device_eval_batch_size
"""
"""Key of a recipe: its names in other programs."""
_MEANT = {key: names.split() for key, _, names in (line.partition(":") for line in _CALLED_ELSEWHERE.split("\n"))}


def _hint(section: type[BaseModel], loc: Sequence[int | str], where: str) -> str:
    """What was meant by an unknown key: a key of its section, or of another where people look for it here."""
    name, own = str(loc[-1]), tuple(part for part in loc[:-1] if isinstance(part, str))
    paths = list(_paths(section, ()))
    here = [path[-1] for path in paths if path[:-1] == own]
    meant = [key for key, others in _MEANT.items() if name.lower() in others]
    for key in (*meant, *difflib.get_close_matches(name, here, n=1, cutoff=0.75)):
        if key in here:
            return f"; did you mean {key!r}?"
    names = [*meant, name]
    elsewhere = min(
        (path for path in paths if path[-1] in names),
        key=lambda path: (-len(os.path.commonprefix([own, path[:-1]])), len(path), names.index(path[-1])),  # noqa: RUF071
        default=(),
    )
    if elsewhere:
        return f"; did you mean {'.'.join(filter(None, (where, *elsewhere)))}?"
    return did_you_mean(name, here) if here else ""


def _paths(section: type[BaseModel], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every key of a section and of those in it, as a path; without the items of lists."""
    for name, field in section.model_fields.items():
        yield (*above, name)
        inner = sections_in(field.annotation)
        if len(inner) == 1:
            yield from _paths(inner[0], (*above, name))


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in sections_in(inner)]
