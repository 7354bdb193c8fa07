"""What a request gets beside others is what it gets alone, bit for bit, whatever the others are and when they come."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.asking import Answer, ask, collect, requests
from support.served import KINDS, write_model

from weft.pipeline.any_model import OpenModel, open_model
from weft.serving.engine import Engine, EngineConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(folder / kind, kind) for kind in KINDS}


def check(opened: OpenModel, config: EngineConfig, *, count: int = 16, seed: int = 0) -> None:
    """Compare answers, log-probabilities and all, of one engine given many requests and one given them one by one."""
    asked = requests(count, seed)
    rng = random.Random(seed)
    engine = Engine(opened, config)
    try:
        alone = [ask(engine, prompt, sampling) for prompt, sampling in asked]
        order = rng.sample(range(count), count)
        found: dict[int, Answer] = {}
        under_way = []
        for place in order:
            under_way.append((place, engine.submit(*asked[place])))
            # Some come while others are in the middle of their answers: after a few events of one that runs.
            for _ in range(rng.choice([0, 0, 0, 2])):
                under_way[0][1].next(60.0)
        for place, ticket in under_way[1:]:
            found[place] = collect(ticket)
    finally:
        engine.close()
    for place, answer in found.items():
        assert answer == alone[place]


@pytest.mark.parametrize("kind", KINDS)
def test_one_request_per_pass(folders: dict[str, Path], kind: str) -> None:
    check(open_model(folders[kind]), EngineConfig(slots=8, batching=False, prompt_piece_tokens=16))


@pytest.mark.parametrize("kind", KINDS)
def test_requests_in_shared_passes(folders: dict[str, Path], kind: str, caplog: pytest.LogCaptureFixture) -> None:
    check(open_model(folders[kind]), EngineConfig(slots=5, prompt_piece_tokens=16), count=40)
    assert "in turn" not in caplog.text
