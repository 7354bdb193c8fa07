"""A whole project whose domains, experts and tasks have hostile names: every command, page and route shows them."""

from __future__ import annotations

import json
import random
import re
from contextlib import ExitStack
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from support.hostile import harmless_line
from support.tiny_project import WORDS, recipe_value, sentence

from weftlm.cli.main import main
from weftlm.corpora.labels import folder_name
from weftlm.pipeline.any_model import open_model
from weftlm.serving.app import build_app
from weftlm.serving.engine import Engine
from weftlm.serving.serve_config import ServeConfig
from weftlm.text import printable

NAMES = (
    "[/news]", "\x1b[2J\x1b[H", "two\nlines\u202e", "../up", "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}",
)  # fmt: skip
"""One of each kind in `support.hostile`."""
TASK = "</title><h1>%s"
SECTIONS: dict[str, Any] = {
    "mixture": {"policy": "dga", "update_every_steps": 2},
    "training": {**recipe_value()["training"], "sequence_length": 16, "steps": 4, "save_every_steps": 4},
    "evaluation": {"every_steps": 4, "max_tokens_per_set": 64, "tasks": [{"path": "ask.jsonl", "name": TASK}]},
    "experts": {
        "lora": {"rank": 2, "alpha": 4},
        "training": {"sequence_length": 16, "batch_sequences": 4, "steps": 2, "device": "cpu"},
        "validate_every_steps": 0,
        "gate": {"steps": 1},
        "statistics_examples": 4,
    },
    "routing": {"routers": ["merged", "phatgoose"], "build": ["phatgoose"]},
    "gating": {
        "scores": {"length": 8, "sequences": 8, "samples": 8, "batch_size": 8},
        "fit": {"steps": 8, "report_every_steps": 4, "best_response_steps": 4},
        "students": {"distil": {"steps": 4, "evaluate_every_steps": 4}, "experts_per_token": [1]},
    },
}  # fmt: skip


class Elements(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a project that can be run."""
    folder = tmp_path_factory.mktemp("hostile")
    rng = random.Random(0)
    words = [word for each in WORDS.values() for word in each]
    places = []
    for number, _ in enumerate((*NAMES, "target")):
        rng.shuffle(words)
        texts = [" ".join(sentence(rng, words[:12]) for _ in range(4)) for _ in range(24)]
        places.append(f"{number}.jsonl")
        (folder / places[-1]).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "ask.jsonl").write_text(json.dumps({"prompt": "pan ", "choices": ["pot", "mast"], "answer": 0}) + "\n")
    corpora = [{"path": place, "label": name} for place, name in zip(places, NAMES, strict=False)]
    data = {"corpora": corpora, "target": [{"path": places[-1]}], "tokenizer": {"train": {"vocab_size": 300}}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe_value(), **SECTIONS, "data": data}))
    return folder


def names_of(found: Any) -> set[str]:
    """Every key and every text in a JSON value."""
    if isinstance(found, dict):
        return set(found).union(*map(names_of, found.values()))
    if isinstance(found, list):
        return set().union(*map(names_of, found))
    return {found} if isinstance(found, str) else set()


def test_hostile_names_go_through_a_whole_project(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("COLUMNS", "1000")

    def call(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        said = capsys.readouterr()
        assert not caught.value.code, said.err
        assert harmless_line(said.out + said.err), arguments
        return said.out + said.err

    for shows, arguments in (
        ("", ("run", "recipe.yaml")),
        ("", ("status", "runs/one")),
        ("domains", ("prepare", "recipe.yaml")),
        ("domains", ("domains", "recipe.yaml")),
        ("experts", ("experts", "list", "runs/one/experts")),
        ("domains", ("gate", "certify", "recipe.yaml")),
        ("domains", ("eval", "recipe.yaml")),
        ("experts", ("route", "trace", "runs/one/routed/phatgoose", "pan butter", "--top", "10")),
    ):
        said = call(*arguments)
        for name in NAMES:
            shown = {"domains": printable(name), "experts": folder_name(name), "": ""}[shows]
            assert shown in said, (arguments, name)
    called = json.loads(call("experts", "show", "runs/one/experts", folder_name(NAMES[4]), "--json"))
    assert NAMES[4] in names_of(called)

    # -- the page
    page = Elements()
    source = (project / "runs/one/report.html").read_text()
    page.feed(source)
    text = "".join(page.text)
    for name in (*NAMES, TASK):
        assert printable(name) in text, name
    assert not [attributes for tag, attributes in page.tags if tag == "img" or "onerror" in attributes]
    assert "alert(1)" not in "".join(text for text in re.findall(r"(?s)<script[^>]*>(.*?)</script>", source))


def test_hostile_names_are_served_as_they_are(project: Path) -> None:
    """Over every route of a server whose models have hostile names too."""
    run = project / "runs/one"
    places = {NAMES[5]: "routed/phatgoose", NAMES[6]: "students/student", "c++": "model"}
    served = {name: open_model(run / place) for name, place in places.items()}
    engines = {name: Engine(opened, slots=1, max_waiting=2) for name, opened in served.items()}
    app = build_app(engines, ServeConfig())
    with TestClient(app) as client, ExitStack() as closing:
        for engine in engines.values():
            closing.callback(engine.close)
        listed = client.get("/v1/models").json()
        assert [model["id"] for model in listed["data"]] == list(served)
        for name in served:
            answer = client.post("/v1/completions", json={"model": name, "prompt": "pan", "max_tokens": 2})
            assert answer.json()["model"] == name
        labels = {
            sample.labels["model"]
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for sample in family.samples
            if "model" in sample.labels
        }
        assert labels == set(served)
        known = names_of(client.get("/api/models").json())
        assert set(served) <= known
        routed, gated = list(served)[:2]
        for asked in ({"model": routed, "text": "pan butter"}, {"model": gated, "text": "pan butter"}):
            told = client.post("/api/inspect", json=asked)
            assert told.status_code == 200, told.text
            assert {folder_name(name) for name in NAMES} <= names_of(told.json()) | known
        assert "onerror" not in client.get("/").text
        refused = client.post("/v1/completions", json={"model": NAMES[5] + "x", "prompt": "pan"})
        assert refused.status_code == 404
        assert refused.headers["content-type"] == "application/json"
