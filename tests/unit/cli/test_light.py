"""Help, completion, wrong calls and wrong recipes, status and listings: no heavy library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
import yaml
from support.tiny_project import recipe_value

from weftlm.cli.main import commands, main
from weftlm.experts.expert import BaseReference, Expert, LoRAExpert, LoRAFactors
from weftlm.experts.library import ExpertLibrary

HEAVY = (
    "accelerate", "datasets", "fastapi", "huggingface_hub", "matplotlib", "pandas", "peft", "pyarrow", "ray", "scipy",
    "sklearn", "tokenizers", "torch", "transformers", "uvicorn",
)  # fmt: skip
CALLS = """
import contextlib, io, json, os, sys
from weftlm.cli.main import main
found = []
for words, environment in json.loads(sys.argv[1]):
    os.environ.update(environment)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            code = end.code or 0
    for name in environment:
        del os.environ[name]
    heavy = sorted({name.partition(".")[0] for name in sys.modules} & set(json.loads(sys.argv[2])))
    found.append([code, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(found))
"""


def every_command() -> Iterator[list[str]]:
    """Every command and group of commands."""
    group = commands()
    waiting = [([], group)]
    while waiting:
        words, command = waiting.pop()
        yield words
        if hasattr(command, "list_commands"):
            context = typer.Context(command)
            waiting += [([*words, name], command.get_command(context, name)) for name in command.list_commands(context)]


def answers(calls: list[tuple[list[str], dict[str, str]]]) -> list[tuple[int, str, str, list[str]]]:
    """Code, output, errors, heavy libraries of calls in one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(calls), json.dumps(HEAVY)],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    return json.loads(done.stdout)


def check(calls: list[tuple[list[str], dict[str, str]]], code: int) -> list[str]:
    found = answers(calls)
    for (words, _), (got, out, err, heavy) in zip(calls, found, strict=True):
        assert not heavy, f"weftlm {' '.join(words)} imports {', '.join(heavy)}"
        assert got == code, (words, out, err)
    return [out + err for _, out, err, _ in found]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "experts"
    made = ExpertLibrary.open(folder, BaseReference("base"))
    factors = LoRAFactors(torch.ones(2, 3), torch.ones(4, 2), 0.5)
    for name in ("code", "prose"):
        made.add(Expert(LoRAExpert(name, BaseReference("base"), {"layer": factors}, {}), card={"source": "here"}))
    return folder


def test_help_of_every_command() -> None:
    calls = [([*words, "--help"], {}) for words in every_command()]
    assert len(calls) > 25
    for said in check([*calls, (["--version"], {})], 0):
        assert "Usage" in said or said.startswith("weftlm ")


def test_wrong_calls_of_every_command() -> None:
    for said in check([([*words, "--no-such-option"], {}) for words in every_command()], 2):
        assert "no-such-option" in said


WRONG: dict[str, dict[str, object]] = {
    "trainig: unknown key": {"trainig": {}},
    "did you mean 'dga'": {"mixture": {"policy": "dgaa"}},
    "did you mean 'eta'": {"mixture": {"policy": "dga", "etaa": 1}},
    "did you mean 'linear'": {"gating": {"gate": "liner"}, "experts": {}},
    "did you mean 'phatgoose'": {"routing": {"routers": ["phatgose"]}, "experts": {}},
}


def test_wrong_recipes(tmp_path: Path) -> None:
    calls = []
    for number, change in enumerate(WRONG.values()):
        recipe = tmp_path / f"recipe{number}.yaml"
        value = {**recipe_value(), "run": str(tmp_path / "run"), **change}
        recipe.write_text(yaml.safe_dump(value), encoding="utf-8")
        calls.append((["run", str(recipe)], {}))
    for told, said in zip(WRONG, check(calls, 2), strict=True):
        assert told in said


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    torn = tmp_path / "torn.yaml"
    torn.write_text("run: [", encoding="utf-8")
    takes_recipe = ["run", "plan", "prepare", "domains", "train", "eval", "score", "gate fit", "gate certify"]
    takes_recipe += ["gate distil", "experts train", "route eval"]
    calls = [([*words.split(), str(path)], {}) for words in takes_recipe for path in (torn, tmp_path / "none.yaml")]
    for said in check(calls, 2):
        assert "torn.yaml" in said or "none.yaml" in said


def test_status_and_listings(library: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "stages").mkdir(parents=True)
    (run / "stages/recipe.yaml").write_text(
        yaml.safe_dump({**recipe_value(), "run": str(run), "experts": {}, "routing": {}, "gating": {}}),
        encoding="utf-8",
    )
    calls = [
        ["status", str(run)], ["experts", "list", str(library)], ["experts", "show", str(library)],
    ]  # fmt: skip
    said = check([(words, {}) for words in calls], 0)
    assert "to do" in said[0]
    assert "prose" in said[1]
    assert "code" in said[2]


def test_an_expert_is_shown_with_the_size_of_its_update(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["experts", "show", str(library), "code"])
    out = capsys.readouterr().out
    assert "layer" in out
    assert f"{0.5 * (6 * 4) ** 0.5 * 2**0.5:.4f}" in out  # B A is 2 everywhere on 4 x 3: its norm is 2 sqrt(12)


def test_what_tab_offers(library: Path) -> None:
    wanted = {
        "run r.yaml --from ga": "gate",
        "run r.yaml --until dis": "distil",
        "train r.yaml --set mixture.policy=dg": "mixture.policy=dga",
        "train r.yaml --set training.comp": "training.compile=",
        "train r.yaml --set gating.gate=lin": "gating.gate=linear",
        "train r.yaml --set tra": "training.",
        "route build lib --router phat": "phatgoose",
        "route eval r.yaml --routers uniform,phat": "uniform,phatgoose",
        f"experts show {library} pro": "prose",
        f"experts remove {library} code pro": "prose",
        "export model --format pe": "peft",
        "exp": "export",
        "nonsense ": "",
    }
    calls = []
    for line in wanted:
        shown = {"_WEFTLM_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": f"weftlm {line}"}
        calls.append(([], shown))
    for offered, expected in zip(answers(calls), wanted.values(), strict=True):
        assert not offered[3]
        assert expected in offered[1]
        assert "weftlm:" not in offered[2]
