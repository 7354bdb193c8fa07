"""The page, read as a browser or a screen reader would."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.blocks import Html
from support.gates import certificate, fit, rows

from weftlm.errors import ConfigError, DataError
from weftlm.reporting.gating import GatingFacts
from weftlm.reporting.page import Page, render_page, write_page
from weftlm.reporting.report import report_page
from weftlm.reporting.score_table import model_table
from weftlm.reporting.traces import RoutingFacts
from weftlm.routing.trace import Trace

MakeRun = Callable[..., Path]
HOSTILE = "<script>alert(1)</script>"
ODD = ['"><img src=x onerror=alert(1)>', "a & b", "$x_1$ {{}} ${title} $title", "名前 🧵", "']]>", "b\x00\nc"]


def page_of(runs: list[Path], **options: Any) -> Html:
    return Html(render_page(report_page(runs, **options)))


@pytest.fixture(scope="module")
def three(three_runs: list[Path]) -> tuple[Html, str]:
    text = render_page(report_page(three_runs))
    return Html(text), text


def results_of(runs: list[Path]) -> dict[str, dict[str, Any]]:
    return {folder.name: json.loads((folder / "result.json").read_text()) for folder in runs}


def row_of(page: Html, caption: str, name: str) -> list[tuple[str, list[float]]]:
    return next(cells for label, cells in page.rows(caption).items() if label.startswith(name))


def test_every_number_of_the_tables_is_the_runs(three_runs: list[Path], three: tuple[Html, str]) -> None:
    page, results = three[0], results_of(three_runs)
    losses, weights = page.rows("The same values"), page.rows("Final mixture weight")
    for position, (name, result) in enumerate(results.items()):
        cells = row_of(page, "Held-out bits per byte by run, in windows of 256 tokens", name)[:2]
        for (text, values), key in zip(cells, ("target", None), strict=True):
            score, base = (one["sets"][key] if key else one["generic"] for one in (result, results["uniform"]))
            assert values[:2] == [score["bits_per_byte"], score["bits_per_byte_se"]]
            assert text.startswith(f"{values[0]:.3f}")
            if name != "uniform":
                assert values[2] == pytest.approx(score["bits_per_byte"] - base["bits_per_byte"], abs=1e-12)
                assert 0 < values[3] < 0.01
        tokens, steps, train, alignment, _ = row_of(page, "Cost", name)
        assert (tokens, steps[1]) == (("3.28M", [result["train_tokens"]]), [800])
        assert (train, alignment[1]) == (("1m 47s", [107.4]), [result["seconds"]["alignment"]])
        for domain, weight in result["weights"].items():
            expected = result["sets"][domain]
            assert losses[domain][position][1][:2] == [expected["bits_per_byte"], expected["bits_per_byte_se"]]
            assert weights[domain][position] == (f"{weight:.1%}1.5 passes", [weight, 1.5])
    lowest = [name for name, cells in page.rows("Held-out bits per byte by run").items() if "(lowest)" in cells[0][0]]
    assert lowest == ["dga"]


def test_recipes_are_shown_and_compared(three: tuple[Html, str]) -> None:
    page, policies = three[0], ["uniform", "importance", "dga"]
    rows = page.rows("Where the settings and environments of the runs differ")
    assert [text for text, _ in rows["mixture.policy"]] == policies
    assert [text for text, _ in rows["mixture.eta"]] == ["–", "–", "5.0"]
    assert "training.lr" not in rows
    assert "batch_sequences: 16" in page.text
    shared = page.rows("Settings, versions and fingerprints of every run")
    assert shared["packages.torch"][0][0] == "2.13.0"
    assert shared["runtime.precision"][0][0] == "fp32 no fast bf16 here"


def test_a_project_page_opens_with_its_best_model_and_has_a_section_for_everything(
    tmp_path: Path, make_run: MakeRun
) -> None:
    sets = {name: {"documents": 3, "bytes": 5000, "train_tokens": n} for name, n in (("a", 1200), ("<b>", 3_400_000))}
    prepared = {"fingerprint": "f00d", "vocab_size": 4096, "sets": sets, "warnings": ["<b> is small"]}
    given = {
        name: {"role": role, "sets": {"a": {"bits_per_byte": value}}, "path": name}
        for name, role, value in (("base", "base", 2.0), ("routed", "router", 1.5))
    }
    models = model_table(given, "model", 128)
    trace = ("a text", Trace((7,), ("a", "b"), ("l.0.up",), torch.tensor([[[0.75, 0.25]]])), ["x"])
    gating = GatingFacts(certificate(), fit(), rows())
    facts = {"prepared": prepared, "models": models, "routing": RoutingFacts(models, [trace]), "gating": gating}
    text = render_page(report_page([make_run(tmp_path / "run", "dga", ["a"])], **facts))
    assert text.index('<p class="headline">routed: 1.500') < text.index('class="answer"') < text.index("<nav")
    page = Html(text)
    assert "Mixtures alone: dga: 1.7" in page.text, "the mixtures' finding follows"
    assert page.rows("Prepared sets")["<b>"][2] == ("3.40M", [3_400_000.0])
    assert page.rows("Other facts of the prepared data")["vocab_size"][0][0] == "4096"
    assert "<b> is small" in page.text
    links = [str(attributes["href"])[1:] for tag, attributes in page.elements if tag == "a"]
    assert links == "summary models mixture alignment training routing gating data recipe reading".split()


def test_the_page_needs_nothing_from_elsewhere_and_is_the_same_every_time(
    three_runs: list[Path], three: tuple[Html, str], tmp_path: Path
) -> None:
    page, text = three
    assert "://" not in text
    assert not any(one in page.styles.replace("*/", "") for one in ("//", "@import", "url(", ".tokens {"))
    assert page.count("script") == 1, "the theme's alone"
    assert not {tag for tag, _ in page.elements} & {"link", "img", "iframe", "object", "embed", "base", "foreignobject"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name == "src" for name in attributes), (tag, attributes)
        assert str(attributes.get("href", "#")).startswith("#")
    written = write_page(report_page([str(run) for run in three_runs]), tmp_path / "a" / "one.html")
    assert written.read_text(encoding="utf-8") == text
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["one.html"]


def test_anchors_fit_charts_speak_and_headers_have_a_scope(three: tuple[Html, str]) -> None:
    page = three[0]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {str(attributes["href"])[1:] for tag, attributes in page.elements if tag == "a"}
    assert len(links) == 6
    assert links | {str(a["aria-labelledby"]) for _, a in page.elements if "aria-labelledby" in a} <= set(ids)
    charts = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(charts) == page.count("figcaption") == 3
    assert all(chart["role"] == "img" and len(str(chart["aria-label"])) > 30 for chart in charts)
    assert all(attributes.get("scope") for tag, attributes in page.elements if tag == "th")
    assert page.count("table") == page.count("caption") == len(page.tables)
    assert ("html", {"lang": "en"}) in page.elements


def test_names_are_text_whatever_they_hold(tmp_path: Path, make_run: MakeRun) -> None:
    names = [HOSTILE, *ODD]
    folder = make_run(tmp_path / HOSTILE.replace("/", "_"), "dga", names, stop=100)
    other = make_run(tmp_path / "$title", HOSTILE, names[:2], stop=100)
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "\n# <script>alert(2)</script>\n")
    page = page_of([folder, other], title=f"{HOSTILE} & $style")
    assert (page.count("script"), page.count("img")) == (1, 0), "the theme's script alone"
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    shown = (HOSTILE, f"{HOSTILE} & $style", "<script>alert(2)</script>", ODD[2], r"b\x00\nc")
    assert [one for one in shown if one not in page.text] == []


def test_runs_that_are_not_finished_or_broken_still_give_a_page(tmp_path: Path, make_run: MakeRun) -> None:
    done, running = make_run(tmp_path / "u", "uniform", ["a"]), make_run(tmp_path / "d", "dga", ["a"], stop=430)
    metrics = running / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-40])
    page = page_of([done, running])
    assert "not finished, step 4" in page.text
    assert "Not finished: dga; latest numbers shown." in page.text
    assert "lines of metrics.jsonl cannot be read and are left out" in page.text
    last = [json.loads(line) for line in metrics.read_text().splitlines()[:-1] if '"kind": "eval"' in line][-1]
    assert row_of(page, "Held-out", "dga")[0][1][0] == last["sets"]["target"]["bits_per_byte"]
    assert row_of(page, "Cost", "dga")[2][0] == "–"
    (tmp_path / "run").mkdir()
    assert "Nothing was measured on held-out text." in page_of([tmp_path / "run"]).text
    with pytest.raises(ConfigError, match="at least one run folder"):
        report_page([])
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        write_page(Page("title", "kicker", "headline", []), tmp_path / "file" / "r.html")


def test_null_and_nan_are_dashes_and_gaps(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path / "run", "dga", ["a", "b"])
    result = json.loads((folder / "result.json").read_text())
    result["sets"]["a"] |= {"bits_per_byte": None, "bits_per_byte_se": None}
    result["weights"]["a"], result["epochs"]["a"] = math.nan, math.inf
    (folder / "result.json").write_text(json.dumps(result))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[::3]:
        line |= {key: dict.fromkeys(value) for key, value in line.items() if isinstance(value, dict)}
        line |= {key: math.nan for key, value in line.items() if isinstance(value, float)}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of([folder])
    assert row_of(page, "Held-out", "dga")[2] == ("–", [])
    assert page.rows("Final mixture weight")["a"] == [("–", [])]
    assert "nan" not in page.text.lower()


def test_many_domains_are_gathered_and_said(tmp_path: Path, make_run: MakeRun) -> None:
    names = [f"cluster-{i:02d}" for i in range(64)]
    text = render_page(report_page([make_run(tmp_path / "dga", "dga", names)]))
    page = Html(text)
    assert "the other 55 are added up" in page.text
    assert "All 64 one by one" in page.text
    assert set(names) <= set(page.rows("The same values"))
    assert len(text) < 600_000
