"""Write docs/reference/commands.md and docs/reference/recipe.md from the code; `--check` fails where they are stale.

The commands come from the typer application, the recipe's keys from its pydantic models and the registered policies.
A key or an option without a description is an error: nothing a user can type goes undocumented.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from weftlm.cli.main import commands
from weftlm.gating.config import GateConfig, gates
from weftlm.mixture.config import policies
from weftlm.pipeline.inherited import INHERITED, names_of
from weftlm.pipeline.recipe import Recipe
from weftlm.routing.config import routers

FOLDER = Path(__file__).parent / "reference"
NOTICE = "<!-- Written by docs/generate_reference.py; `make fix` renews it. -->"


class UndocumentedError(Exception):
    """Something a user can type has no description."""


# ------------------------------------------------------------------------------------------------------------ commands


def commands_page() -> str:
    """Every command with its arguments and options, in the order of `weftlm --help`."""
    group: Any = commands()
    context = typer.Context(group, info_name="weftlm")
    lines = [
        "# Commands",
        "",
        NOTICE,
        "",
        prose(group.help or ""),
        "",
        "Results go to stdout, logs and progress to stderr. Exit codes: 0 success, 1 the run failed, 2 the call or the "
        "recipe was wrong, 130 stopped by Ctrl-C, 143 by SIGTERM (a server asked to stop ends with 0).",
        "",
        *parameter_tables(group, "weftlm"),
    ]
    for name, command in commands_of(group, context, "weftlm"):
        lines += ["", f"## {name}", ""]
        if hasattr(command, "list_commands"):
            lines += [prose(command.help)]
            continue
        arguments = [usage_name(parameter) for parameter in command.params if is_argument(parameter)]
        lines += ["```text", " ".join([name, *arguments, "[OPTIONS]"]), "```", "", prose(command.help), ""]
        lines += parameter_tables(command, name)
    return finished(lines)


def commands_of(group: Any, context: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command below a group with its whole name, depth first, a group before its own commands."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if getattr(command, "hidden", False):
            continue
        if not command.help:
            raise UndocumentedError(f"{path} {name}")
        yield f"{path} {name}", command
        if hasattr(command, "list_commands"):
            yield from commands_of(command, context, f"{path} {name}")


def is_argument(parameter: Any) -> bool:
    """Whether a click parameter is positional."""
    return bool(parameter.param_type_name == "argument")


def usage_name(parameter: Any) -> str:
    """How an argument appears in the usage line."""
    name = str(parameter.metavar or parameter.name.upper())
    if (parameter.nargs == -1 or getattr(parameter, "multiple", False)) and not name.endswith("..."):
        name += "..."
    return name if parameter.required else f"[{name}]"


def parameter_tables(command: Any, where: str) -> list[str]:
    """A table of the arguments and one of the options of a command, each where there are any."""
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    for parameter in shown:
        if not getattr(parameter, "help", None):
            raise UndocumentedError(f"{where}: {parameter.name}")
    arguments = [[f"`{usage_name(p)}`", cell(p.help)] for p in shown if is_argument(p)]
    options = [[option_name(p), cell(p.help), option_default(p)] for p in shown if not is_argument(p)]
    lines: list[str] = []
    if arguments:
        lines += [*table(["argument", "meaning"], arguments), ""]
    if options:
        lines += [*table(["option", "meaning", "default"], options), ""]
    return lines


def option_name(parameter: Any) -> str:
    """`--set KEY=VALUE` (may repeat), `--json`, `--plain / --no-plain`."""
    names = ", ".join(f"`{name}`" for name in sorted(parameter.opts, key=len, reverse=True))
    if parameter.secondary_opts:
        return f"{names} / " + ", ".join(f"`{name}`" for name in parameter.secondary_opts)
    if parameter.is_flag:
        return names
    value = parameter.metavar or parameter.name.upper()
    said = "repeatable" in parameter.help
    return f"{names} `{value}`" + (", repeatable" if parameter.multiple and not said else "")


def option_default(parameter: Any) -> str:
    """The default as text; empty where there is none."""
    default = parameter.default
    if default is None or default == [] or default == () or (parameter.is_flag and not default):
        return ""
    if callable(default):
        return "computed"
    return f"`{default}`"


# -------------------------------------------------------------------------------------------------------------- recipe


def recipe_page() -> str:
    """Every section of the recipe, then the keys of each mixture policy, of each router and of each gate."""
    lines = [
        "# Recipe",
        "",
        NOTICE,
        "",
        "A recipe is one YAML file. Unknown keys are errors with a suggestion, nothing is coerced silently, and the "
        "run folder keeps the recipe with every default spelled out. `--set section.key=value` overrides a key; "
        "`--dry-run` prints the resolved recipe.",
        "",
    ]
    places: dict[type[BaseModel], list[str]] = {}
    for place, section in sections(Recipe, ""):
        places.setdefault(section, []).append(place)
    for section, shared in places.items():
        if shared != [""]:
            lines += [f"## {', '.join(shared)}", ""]
        lines += [*section_body(section, shared[0] or "recipe", places=shared), ""]
    lines += ["## mixture, by policy", "", "The keys of `mixture` depend on `mixture.policy`.", ""]
    for name in policies:
        entry = policies.entry(name)
        lines += [f"### {name}", "", first_paragraph(entry.cls) + paper_link(entry.paper), ""]
        lines += [*section_body(entry.cls.Config, f"mixture policy {name}", introduce=False), ""]
    lines += ["## Routers", "", "What `weftlm route build --router NAME --set router.KEY=VALUE` takes.", ""]
    for name in routers:
        router = routers.entry(name)
        lines += [f"### {name}", "", first_paragraph(router.cls) + paper_link(router.paper), ""]
        lines += [*section_body(router.cls.Config, f"router {name}", introduce=False, without="router"), ""]
    lines += ["## Gates", "", "What `gating.gate` takes in a recipe: `gate: NAME`, or a mapping with these keys.", ""]
    for name in gates:
        gate = gates.entry(name)
        sees = "sees the prefix" if gate.cls.causal else "sees the whole sequence"
        lines += [f"### {name}", "", f"{first_paragraph(gate.cls)} It {sees}." + paper_link(gate.paper), ""]
        lines += [*section_body(gate.cls.Config, f"gate {name}", introduce=False, without="gate"), ""]
    return finished(lines)


def sections(section: type[BaseModel], place: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """The section itself and every section below it, depth first, each with its dotted place.

    The policies' and gates' sections are left out: they are listed by name from the registry.
    """
    yield place, section
    configs = {policies[name].Config for name in policies} | {GateConfig}
    for name, field in section.model_fields.items():
        for model, many in models_in(field.annotation):
            if model not in configs:
                yield from sections(model, f"{place}.{name}".lstrip(".") + ("[]" if many else ""))


def models_in(annotation: Any, many: bool = False) -> list[tuple[type[BaseModel], bool]]:
    """The pydantic models in an annotation, and whether each stands in a list or mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, many)]
    many = many or typing.get_origin(annotation) in (list, tuple, dict)
    return [found for inner in typing.get_args(annotation) for found in models_in(inner, many)]


def section_body(
    section: type[BaseModel], where: str, introduce: bool = True, without: str = "", places: Sequence[str] = ()
) -> list[str]:
    """A section's one-paragraph description and the table of its keys, less the one named.

    Of a key that the section takes from another one at one of its places, the description says so.
    """
    descriptions = attribute_descriptions(section)
    rows = []
    for name, field in section.model_fields.items():
        if name == without:
            continue
        description = field.description or descriptions.get(name)
        if not description:
            raise UndocumentedError(f"{where}: {name}")
        description += "".join(inherited_text(place, name, several=len(places) > 1) for place in places)
        rows.append([f"`{field.alias or name}`", cell(type_text(field)), default_text(field), cell(description)])
    introduction = [first_paragraph(section), ""] if introduce else []
    return [*introduction, *(table(["key", "type", "default", "meaning"], rows) if rows else ["No keys."])]


def inherited_text(place: str, name: str, *, several: bool) -> str:
    """`; absent: as training.sequence_length`, where a key of the section at this place follows another one."""
    sources = [
        f"`{source}.{there}`"
        for source, _, target, keys in reversed(INHERITED)
        for there, here in map(names_of, keys)
        if (target, here) == (place, name)
    ]
    where = f" in {place}" if several else ""
    return f"; absent{where}: as {', else '.join(sources)}" if sources else ""


def attribute_descriptions(section: type[BaseModel]) -> dict[str, str]:
    """What the `Attributes:` part of a section's docstring, or of its bases' docstrings, says of each key."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        text = inspect.cleandoc(cls.__doc__ or "")
        block = re.search(r"^Attributes:\n((?:[ \t]+.*\n?|\n)+)", text, flags=re.MULTILINE)
        for item in re.finditer(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", block.group(1) if block else "", re.MULTILINE):
            found[item.group(1)] = " ".join(item.group(2).split())
    return found


def type_text(field: FieldInfo) -> str:
    """A key's type in words a YAML author knows, with its bounds; null is not named where absence says it."""
    annotation = field.annotation
    if field.default is None and typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
        return " or ".join([annotation_text(argument) for argument in rest]) + bounds_text(field.metadata)
    return annotation_text(annotation) + bounds_text(field.metadata)


def bounds_text(metadata: Sequence[Any]) -> str:
    """The strictest of each kind of bound: ` ≥ 0, < 1`."""
    found = {
        attribute: getattr(constraint, attribute)
        for constraint in metadata
        for attribute in ("gt", "ge", "lt", "le")
        if getattr(constraint, attribute, None) is not None
    }
    if "ge" in found and found.get("gt", -math.inf) < found["ge"]:
        found.pop("gt", None)
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    text = ", ".join(f"{signs[attribute]} {limit:g}" for attribute, limit in found.items())
    return f" {text}" if text else ""


WORDS = {
    int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "any value",
    Path: "path", dict: "mapping", list: "list",
}  # fmt: skip


def annotation_text(annotation: Any) -> str:
    """A type annotation in words."""
    if annotation in WORDS:
        return WORDS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return annotation_text(arguments[0]) + bounds_text(arguments[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(annotation_text(argument) for argument in arguments))
    if origin is list or (origin is tuple and arguments[-1:] == (...,)):
        return f"list of {annotation_text(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: " + ", ".join(annotation_text(argument) for argument in arguments)
    if origin is dict:
        return f"mapping of {annotation_text(arguments[0])} to {annotation_text(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return getattr(annotation, "__name__", str(annotation))


def default_text(field: FieldInfo) -> str:
    """A key's default as YAML would write it; of a section, only the keys that differ from the section's own."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        own = {name: inner.get_default() for name, inner in type(value).model_fields.items()}
        changed = {name: set_to for name in own if (set_to := getattr(value, name)) != own[name]}
        plain = {name: set_to for name, set_to in changed.items() if not isinstance(set_to, BaseModel)}
        return ", ".join(f"`{name}: {yaml_text(set_to)}`" for name, set_to in plain.items())
    return "absent" if value is None else f"`{yaml_text(value)}`"


def yaml_text(value: Any) -> str:
    """A plain value as YAML writes it on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(yaml_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


# -------------------------------------------------------------------------------------------------------------- prose


def finished(lines: Sequence[str]) -> str:
    """Lines as a page: never two empty ones in a row, one newline at the end."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def paper_link(paper: str | None) -> str:
    """` ([arXiv:1234.5678](...))` for an arXiv identifier, the text itself for anything else."""
    if paper is None:
        return ""
    identifier = paper.removeprefix("arXiv:")
    return f" ([{paper}](https://arxiv.org/abs/{identifier}))" if identifier != paper else f" ({paper})"


def first_paragraph(cls: type) -> str:
    """The summary of a class, one line."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return " ".join(text.split("\n\n")[0].split())


def prose(text: str) -> str:
    """A docstring as Markdown: indented equations become code, the rest stays."""
    blocks = []
    for block in inspect.cleandoc(text).replace("\b\n", "").split("\n\n"):
        lines = block.splitlines()
        if lines and all(line.startswith("  ") for line in lines):
            blocks.append("\n".join(["```text", inspect.cleandoc(block), "```"]))
        else:
            blocks.append(block)
    return "\n\n".join(blocks)


def cell(text: str) -> str:
    """Text for a table cell: one line, no full stop after a single sentence, pipes and angle brackets escaped."""
    text = " ".join(text.split())
    text = text.removesuffix(".") if ". " not in text else text
    return text.replace("|", "\\|").replace("<", "&lt;")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "| " + " | ".join("---" for _ in header) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def main() -> int:
    """Write both pages, or with `--check` compare them; 1 where something is stale or undocumented."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is stale")
    check = parser.parse_args().check
    try:
        pages = {"commands.md": commands_page(), "recipe.md": recipe_page()}
    except UndocumentedError as error:
        print(f"docs/generate_reference.py: no description: {error}", file=sys.stderr)
        return 1
    FOLDER.mkdir(exist_ok=True)
    stale = []
    for name, text in pages.items():
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"stale: docs/reference/{', docs/reference/'.join(stale)}; run `make fix`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
