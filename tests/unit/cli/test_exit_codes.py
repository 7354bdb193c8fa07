"""The exit code of every kind of end: 0, 1, 2, and 128 plus the signal that stopped it."""

from __future__ import annotations

import os
import signal

import pytest

from weftlm.cli.main import main
from weftlm.errors import CheckpointError, ConfigError, DataError, ExpertError, NumericsError

FAULTS = {
    "ConfigError": (lambda: _raise(ConfigError("wrong")), 2),
    "DataError": (lambda: _raise(DataError("torn")), 1),
    "CheckpointError": (lambda: _raise(CheckpointError("torn")), 1),
    "NumericsError": (lambda: _raise(NumericsError("infinite")), 1),
    "ExpertError": (lambda: _raise(ExpertError("of another base")), 1),
    "OSError": (lambda: _raise(OSError(28, "No space left on device", "f")), 1),
    "SIGINT": (lambda: os.kill(os.getpid(), signal.SIGINT), 130),
    "SIGTERM": (lambda: os.kill(os.getpid(), signal.SIGTERM), 143),
    "nothing": (list, 0),
}


def _raise(error):
    raise error


def code_of(*words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code or 0


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "library.json").write_text("{}")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_inside_a_command_gives_its_code(fault, monkeypatch, capsys):
    work, code = FAULTS[fault]
    monkeypatch.setattr("weftlm.pipeline.expert_library.list_experts", lambda library: work() or [])
    assert code_of("experts", "list", "l") == code
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Usage"), (["experts"], "import"), (["rout"], "Did you mean 'route'"),
        (["experts", "lst"], "Did you mean 'list'"), (["--nope"], "No such option"),
    ],
)  # fmt: skip
def test_no_command_or_an_unknown_one_is_2(words, said, capsys):
    assert code_of(*words) == 2
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_processes_of_torchrun_but_the_first_print_nothing(monkeypatch, capsys):
    monkeypatch.setattr("weftlm.pipeline.expert_library.list_experts", lambda library: [])
    monkeypatch.setenv("RANK", "1")
    assert code_of("experts", "list", "l", "--json") == 0
    assert capsys.readouterr().out == ""
