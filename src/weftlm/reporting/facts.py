"""The facts of a report: recipes and where they differ, environments, the prepared data, how to read the page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from weftlm.progress import count_text
from weftlm.reporting.html import DASH, Cell, column_head, data, details, escape, table
from weftlm.reporting.runs import flatten, mapping, number
from weftlm.reporting.view import OPEN_ROWS, View


def recipe_facts(view: View) -> str:
    """Where the recipes differ, and each in full."""
    recipes = [flatten(dict(run.recipe)) for run in view.runs]
    text = ""
    if len(view.runs) > 1 and all(recipes):
        keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
        differing = [key for key in keys if len({_value(recipe, key) for recipe in recipes}) > 1]
        if differing:
            rows = [
                [Cell(escape(key), "text", header=True), *(Cell(escape(_value(r, key)), "text") for r in recipes)]
                for key in differing
            ]
            head = _left_head(["Key", *(run.label for run in view.runs)])
            text += table("Where the recipes differ; all other keys are equal.", head, rows, kind="facts")
        else:
            text += "<p>The recipes are equal.</p>"
    for run in view.runs:
        if run.recipe_text:
            name = f"Resolved recipe of {escape(run.label)}" if len(view.runs) > 1 else "Resolved recipe"
            lines = "\n".join(map(escape, run.recipe_text.strip("\n").split("\n")))
            text += details(name, f"<pre>{lines}</pre>")
    return text


def _left_head(names: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<th scope="col" class="text">{escape(name)}</th>' for name in names) + "</tr>"


def _value(values: Mapping[str, Any], key: str) -> str:
    """One value as YAML writes it inline; an absent key is a dash."""
    if key not in values:
        return DASH
    value = values[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def environment_facts(view: View) -> str:
    """Versions, seeds, fingerprints and decisions: where they differ, then what is shared."""
    facts = [_named_items(dict(run.facts)) for run in view.runs]
    flat = [flatten(fact) for fact in facts]
    keys = list(dict.fromkeys(key for fact in flat for key in fact))
    if not keys:
        return ""
    shared = [key for key in keys if len({_value(fact, key) for fact in flat}) == 1]
    differing = [key for key in keys if key not in shared]
    text = ""
    if differing:
        rows = [
            [Cell(escape(key), "text", header=True), *(Cell(escape(_value(f, key)), "text") for f in flat)]
            for key in differing
        ]
        head = _left_head(["Fact", *(run.label for run in view.runs)])
        text += table("Where the runs' environments differ.", head, rows, kind="facts")
    if shared:
        rows = [[Cell(escape(key), "text", header=True), Cell(escape(_value(flat[0], key)), "text")] for key in shared]
        caption = "The same in every run." if len(view.runs) > 1 else "Versions, seeds, fingerprints and decisions."
        text += details(
            "Versions, seeds and fingerprints", table(caption, _left_head(["Fact", "Value"]), rows, kind="facts")
        )
    return text


def _named_items(facts: dict[str, Any]) -> dict[str, Any]:
    """Lists of `{setting, value, reason}` (the choices made for the machine) as one entry per setting."""
    result: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, list) and value and all("setting" in mapping(item) for item in value):
            result[key] = {
                str(item["setting"]): f"{item.get('value')}" + (f" ({item['reason']})" if item.get("reason") else "")
                for item in value
            }
        else:
            result[key] = value
    return result


def prepared_facts(prepared: Mapping[str, Any] | None) -> str:
    """The prepared data's facts: a table for what is listed by domain, the rest as keys and values."""
    if not prepared:
        return ""
    text, rest = "", dict(prepared)
    warnings = rest.pop("warnings", None)
    if isinstance(warnings, list) and warnings:
        items = "\n".join(f"<li>{escape(warning)}</li>" for warning in warnings)
        text += f'<ul class="warning" aria-label="Warnings of the preparation">\n{items}\n</ul>'
    for key, value in prepared.items():
        listed = _by_name(value)
        columns = list(dict.fromkeys(c for facts in listed.values() for c, v in facts.items() if _is_count(v)))
        if len(listed) > 1 and columns:
            del rest[key]
            rows = [
                [
                    Cell(escape(name), "text", header=True),
                    *(Cell(data(v, count_text(v))) for v in (number(facts.get(c)) for c in columns)),
                ]
                for name, facts in listed.items()
            ]
            head = column_head(
                [escape(key.capitalize().removesuffix("s")), *(escape(c.replace("_", " ")) for c in columns)]
            )
            content = table(f"Prepared {escape(key)}.", head, rows, kind="dense")
            text += details(f"{len(rows)} {escape(key)}", content, is_open=len(rows) <= OPEN_ROWS)
    flat = flatten(rest)
    rows = [[Cell(escape(key), "text", header=True), Cell(escape(_value(flat, key)), "text")] for key in flat]
    if rows:
        content = table("Facts of the prepared data.", _left_head(["Fact", "Value"]), rows, kind="facts")
        text += details("Other facts of the prepared data", content)
    return text


def _by_name(value: Any) -> dict[str, dict[str, Any]]:
    """`{name: facts}` or `[{"name": ..., facts}]` as one form, facts flattened; empty for anything else."""
    if isinstance(value, list) and all("name" in mapping(item) for item in value):
        value = {str(item["name"]): {k: v for k, v in item.items() if k != "name"} for item in value}
    if not isinstance(value, dict) or not all(isinstance(facts, dict) for facts in value.values()):
        return {}
    return {str(name): flatten(facts) for name, facts in value.items()}


def _is_count(value: Any) -> bool:
    return math.isfinite(number(value))


def reading_notes(view: View) -> str:
    """What the page's terms mean."""
    entries = {
        "Bits per byte": "Summed loss in bits over the UTF-8 bytes of the scored text. Unlike loss per token it "
        "compares models with different tokenizers. Lower is better.",
        "Target": "Held-out text of the kind the model is trained for; none of it is trained on.",
        "Generic": "The mean over all domains' held-out sets, each counting once: what the model keeps elsewhere.",
        "± one standard error": "Over windows of held-out text, taken as independent; for sets of a few long documents "
        "it is too small. The spread over training seeds is not in it.",
    }
    if view.contenders[0].repeated:
        entries["Repeated runs"] = (
            "Runs that differ only in their seed are compared through their means; there ± is one standard error over "
            "runs, which few runs estimate roughly. Called clear from two standard errors."
        )
    elif len(view.runs) > 1:
        entries["Differences"] = (
            "Paired window by window where both runs kept their window losses: what makes a window hard cancels. "
            "Called clear from two standard errors."
        )
    items = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries.items())
    return f"<dl>\n{items}\n</dl>"
