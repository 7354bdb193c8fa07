"""The page, read as a browser or a screen reader would."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from weftlm.errors import ConfigError, DataError
from weftlm.reporting.report import write_report

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Tables as rows of (text, [exact values]), the elements and attributes met, and whether every tag closes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[tuple[str, list[float]]]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.styles = ""
        self._open: list[str] = []
        self._rows: list[list[tuple[str, list[float]]]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append(("", []))
        elif tag == "data":
            self._rows[-1][-1][1].append(float(dict(attrs)["value"] or "nan"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, (tag, self.getpos())
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.styles += data
            return
        self.text += data
        if "caption" in self._open:
            self._caption += data
        elif ("td" in self._open or "th" in self._open) and self._rows:
            text, values = self._rows[-1][-1]
            self._rows[-1][-1] = (text + data, values)

    def rows(self, caption: str) -> dict[str, list[tuple[str, list[float]]]]:
        found = next(rows for name, rows in self.tables.items() if name.startswith(caption))
        return {row[0][0]: row[1:] for row in found}


def page_of(runs: list[Path], tmp_path: Path, **options: Any) -> Page:
    return Page(write_report(runs, tmp_path / "report.html", **options).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def three(three_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    """The page of the three finished runs, parsed and as text."""
    text = write_report(three_runs, tmp_path_factory.mktemp("page") / "report.html").read_text(encoding="utf-8")
    return Page(text), text


def close(shown: str, value: float, unit: float = 0.0005) -> bool:
    return abs(float(shown.replace("−", "-")) - value) <= unit * 1.0001


# -------------------------------------------------------------------------------------------------------------- tables


def test_every_number_of_the_summary_is_the_runs(three_runs: list[Path], three: tuple[Page, str]) -> None:
    rows = three[0].rows("Held-out text")
    results = {folder.name: json.loads((folder / "result.json").read_text()) for folder in three_runs}
    base = results["uniform"]
    for name, result in results.items():
        target, gap, generic, generic_gap, tokens, seconds, share = rows[name]
        for (text, values), score in ((target, result["sets"]["target"]), (generic, result["generic"])):
            assert values == [score["bits_per_byte"], score["bits_per_byte_se"]]
            shown = re.findall(r"\d+\.\d+", text)
            assert close(shown[0], score["bits_per_byte"])
            assert close(shown[1], score["bits_per_byte_se"])
        assert tokens == ("3.28M", [result["train_tokens"]])
        total = result["seconds"]["train"] + result["seconds"]["alignment"]
        assert seconds == ("1m 50s" if name == "dga" else "1m 47s", [pytest.approx(total)])
        assert share[1] == [pytest.approx(result["seconds"]["alignment"] / total)]
        assert share[0] == f"{share[1][0]:.1%}"
        if name == "uniform":
            assert gap[0] == generic_gap[0] == "baseline"
            continue
        for (text, values), pick in ((gap, lambda r: r["sets"]["target"]), (generic_gap, lambda r: r["generic"])):
            assert values[0] == pytest.approx(pick(result)["bits_per_byte"] - pick(base)["bits_per_byte"], abs=1e-12)
            shown = re.findall(r"[+−]?\d+\.\d+", text)
            assert close(shown[0], values[0])
            assert close(shown[1], values[1])
            assert 0 < values[1] < 0.01


def test_the_lowest_value_is_marked_for_eyes_and_ears(three_runs: list[Path], three: tuple[Page, str]) -> None:
    rows = three[0].rows("Held-out text")
    results = {folder.name: json.loads((folder / "result.json").read_text()) for folder in three_runs}
    best = min(results, key=lambda name: results[name]["sets"]["target"]["bits_per_byte"])
    assert [name for name in results if "(lowest)" in rows[name][0][0]] == [best] == ["dga"]
    assert three[1].count('<strong class="best">') == 2 + 9  # target, generic, and each domain's row


def test_the_domain_table_holds_losses_and_weights(three_runs: list[Path], three: tuple[Page, str]) -> None:
    rows = three[0].rows("Final bits per byte")
    results = [json.loads((folder / "result.json").read_text()) for folder in three_runs]
    for name in results[0]["weights"]:
        for position, result in enumerate(results):
            score, weight, passes = rows[name][3 * position : 3 * position + 3]
            expected = result["sets"][name]
            assert score[1] == [expected["bits_per_byte"], expected["bits_per_byte_se"]]
            assert weight == (f"{result['weights'][name]:.1%}", [result["weights"][name]])
            assert passes[1] == [result["epochs"][name]]


def test_recipes_are_shown_and_compared(three: tuple[Page, str]) -> None:
    page = three[0]
    rows = page.rows("Where the recipes differ")
    assert [text for text, _ in rows["mixture.policy"]] == ["uniform", "importance", "dga"]
    assert [text for text, _ in rows["mixture.eta"]] == ["–", "–", "5.0"]
    assert "training.lr" not in rows
    assert "batch_sequences: 16" in page.text
    shared = page.rows("Versions, seeds and fingerprints, the same in every run")
    assert shared["packages.torch"][0][0] == "2.13.0"
    assert shared["runtime.precision"][0][0] == "fp32 (no fast bf16 here)"
    assert [text for text, _ in page.rows("Where the runs' environments differ")["fingerprints.run"]] == [
        "uniform",
        "importance",
        "dga",
    ]


def test_prepared_data_is_shown_when_given(three_runs: list[Path], tmp_path: Path) -> None:
    sets = {name: {"documents": 3, "bytes": 5000, "train_tokens": n} for name, n in (("a", 1200), ("<b>", 3_400_000))}
    prepared = {"fingerprint": "f00d", "vocab_size": 4096, "sets": sets, "warnings": ["<b> is small"]}
    page = page_of(three_runs, tmp_path, prepared=prepared)
    rows = page.rows("Prepared sets")
    assert rows["<b>"][2] == ("3.40M", [3_400_000.0])
    assert page.rows("Other facts of the prepared data")["vocab_size"][0][0] == "4096"
    assert "<b> is small" in page.text


# ---------------------------------------------------------------------------------------------- self-contained, safe


def test_the_page_needs_nothing_from_elsewhere(three: tuple[Page, str]) -> None:
    page, text = three
    assert "://" not in text
    assert "//" not in page.styles.replace("*/", "")
    assert "@import" not in page.styles
    assert "url(" not in page.styles
    tags = {tag for tag, _ in page.elements}
    assert [tag for tag, _ in page.elements].count("script") == 1, "the theme's alone"
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "foreignobject"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]


def test_anchors_and_ids_fit(three: tuple[Page, str]) -> None:
    page = three[0]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert len(links) == 9
    assert {str(link)[1:] for link in links} <= set(ids)
    labels = {str(a["aria-labelledby"]) for _, a in page.elements if "aria-labelledby" in a}
    assert labels <= set(ids)


def test_charts_speak_and_headers_have_a_scope(three: tuple[Page, str]) -> None:
    page = three[0]
    charts = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(charts) == 5
    assert all(chart["role"] == "img" and len(str(chart["aria-label"])) > 30 for chart in charts)
    assert sum(tag == "figcaption" for tag, _ in page.elements) == 5
    assert all(attributes.get("scope") for tag, attributes in page.elements if tag == "th")
    tables = sum(tag == "table" for tag, _ in page.elements)
    assert tables == sum(tag == "caption" for tag, _ in page.elements) == len(page.tables)
    assert ("html", {"lang": "en"}) in page.elements


def test_the_same_runs_give_the_same_bytes(three_runs: list[Path], three: tuple[Page, str], tmp_path: Path) -> None:
    again = write_report([str(run) for run in three_runs], tmp_path / "a" / "one.html").read_text(encoding="utf-8")
    assert again == three[1]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["one.html"]


HOSTILE = "<script>alert(1)</script>"
ODD = ['"><img src=x onerror=alert(1)>', "a & b", "$x_1$ {{}} ${title} $title", "名前 🧵", "']]>"]


def test_names_are_text_whatever_they_hold(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    names = [HOSTILE, *ODD]
    folder = make_run(tmp_path / HOSTILE.replace("/", "_"), "dga", names, stop=100)
    other = make_run(tmp_path / "$title", HOSTILE, names)
    text = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(text + "\n# <script>alert(2)</script>\n")
    page = page_of([folder, other], tmp_path, title=f"{HOSTILE} & $style")
    assert [tag for tag, _ in page.elements].count("script") == 1, "the theme's alone"
    assert not {tag for tag, _ in page.elements} & {"img"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert HOSTILE in page.text
    assert f"{HOSTILE} & $style" in page.text
    assert "<script>alert(2)</script>" in page.text
    assert "$x_1$ {{}} ${title} $title" in page.text


def test_a_name_that_no_text_file_can_hold_is_shown_with_a_mark(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "run", "dga", ["a", "b"], stop=100)
    metrics = (folder / "metrics.jsonl").read_text().replace('"b"', json.dumps("b\x00\ud800\nc"))
    (folder / "metrics.jsonl").write_text(metrics)
    page = page_of([folder], tmp_path)
    assert r"b\x00\ud800\nc" in page.text


# ------------------------------------------------------------------------------------------------- incomplete inputs


def test_a_running_run_beside_a_finished_one(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    done, running = make_run(tmp_path / "u", "uniform"), make_run(tmp_path / "d", "dga", stop=430)
    metrics = running / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-40])
    page = page_of([done, running], tmp_path)
    assert "not finished, step 430" in page.text or "not finished, step 420" in page.text
    assert "Not finished: dga; latest numbers shown." in page.text
    assert "The last line of metrics.jsonl is incomplete" in page.text
    row = next(row for name, row in page.rows("Held-out text").items() if name.startswith("dga"))
    last = [json.loads(line) for line in metrics.read_text().splitlines()[:-1] if '"kind": "eval"' in line][-1]
    assert row[0][1][0] == last["sets"]["target"]["bits_per_byte"]
    assert row[5][0] == "–"


def test_a_run_that_has_only_started(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    page = page_of([make_run(tmp_path / "run", "dga", stop=0)], tmp_path)
    assert "bits per byte on the target" in page.text


@pytest.mark.parametrize("missing", ["result.json", "run.json", "recipe.yaml", "metrics.jsonl"])
def test_each_file_may_be_missing(tmp_path: Path, make_run: Callable[..., Path], missing: str) -> None:
    folders = [make_run(tmp_path / policy, policy, ["a", "b"]) for policy in ("uniform", "dga")]
    (folders[1] / missing).unlink()
    page = page_of(folders, tmp_path)
    assert missing in page.text
    assert math.isfinite(page.rows("Held-out text")[next(k for k in page.rows("Held-out text") if "dga" in k)][0][1][0])


def test_an_empty_folder_still_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    page = page_of([tmp_path / "run"], tmp_path)
    assert "No run has a result on the target yet." in page.text
    assert "There is no metrics.jsonl" in page.text


def test_null_and_nan_are_dashes_and_gaps(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "run", "dga", ["a", "b"])
    result = json.loads((folder / "result.json").read_text())
    result["sets"]["a"]["bits_per_byte"] = None
    result["sets"]["a"]["bits_per_byte_se"] = None
    result["weights"]["a"] = math.nan
    result["epochs"]["a"] = math.inf
    (folder / "result.json").write_text(json.dumps(result))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[::3]:
        for key, value in line.items():
            if isinstance(value, float):
                line[key] = math.nan
            elif isinstance(value, dict):
                line[key] = dict.fromkeys(value, None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of([folder], tmp_path)
    assert page.rows("Final bits per byte")["a"] == [("–", [])] * 3
    assert "nan" not in page.text.lower().replace("finance", "")


def test_runs_over_different_domains(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = [make_run(tmp_path / "u", "uniform", ["a", "b"]), make_run(tmp_path / "d", "dga", ["b", "c", "d"])]
    rows = page_of(folders, tmp_path).rows("Final bits per byte")
    assert rows["a"][3:] == [("–", [])] * 3
    assert rows["c"][:3] == [("–", [])] * 3


def test_many_domains_are_gathered_and_said(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    names = [f"cluster-{i:02d}" for i in range(64)]
    page = page_of([make_run(tmp_path / "dga", "dga", names)], tmp_path)
    assert "the other 55 are added up" in page.text
    assert "20 of 64" in page.text
    assert "All 64 domains as a table" in page.text
    assert set(names) <= set(page.rows("Final bits per byte"))
    assert (tmp_path / "report.html").stat().st_size < 600_000


def test_alignments_of_basis_distributions_have_their_own_names(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "run", "dga", ["a", "b"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "alignment" in line:
            line["alignment"] = {"basis 0": 0.1, "basis 1": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of([folder], tmp_path)
    assert "each basis distribution's gradient" in page.text
    assert "basis 1" in page.text


def test_mistakes_are_said(tmp_path: Path, three_runs: list[Path]) -> None:
    with pytest.raises(ConfigError, match="at least one run folder"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(DataError, match="is not a run folder"):
        write_report([tmp_path / "none"], tmp_path / "r.html")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        write_report(three_runs[:1], tmp_path / "file" / "r.html")


def test_repeated_runs_are_shown_as_means_and_one_by_one(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = [
        make_run(tmp_path / f"{policy}-{seed}", policy, ["a", "b"], seed=seed, target_bits=level + 0.01 * seed)
        for policy, level in (("uniform", 1.9), ("dga", 1.8))
        for seed in range(2)
    ]
    page = page_of(folders, tmp_path)
    means, each, by_domain = (page.rows(name) for name in ("Means over runs", "Held-out text", "Final bits per byte"))
    results = {folder.name: json.loads((folder / "result.json").read_text()) for folder in folders}
    for policy in ("uniform", "dga"):
        pair = [results[f"{policy}-{seed}"] for seed in range(2)]
        low, high = sorted(result["sets"]["target"]["bits_per_byte"] for result in pair)
        assert means[policy][0][1] == pytest.approx([(low + high) / 2, (high - low) / 2])
        assert means[policy][-1][0] == "2"
        column = 0 if policy == "uniform" else 3
        assert by_domain["a"][column][1][0] == pytest.approx(
            sum(result["sets"]["a"]["bits_per_byte"] for result in pair) / 2
        )
    assert means["dga"][1][1][0] == pytest.approx(means["dga"][0][1][0] - means["uniform"][0][1][0])
    for name, result in results.items():
        row = next(row for label, row in each.items() if label.startswith(name))
        assert row[0][1][0] == result["sets"]["target"]["bits_per_byte"]
