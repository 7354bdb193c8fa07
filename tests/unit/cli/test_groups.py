"""Groups of commands: named without importing anything heavy, found by name, with a suggestion where they are not."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from keyword import iskeyword

import pytest

from weftlm.cli.main import COMMANDS, main

GROUPS = {name: import_module(f"weftlm.cli.{name}").COMMANDS for name in ("experts", "route", "gate")}


def test_groups_are_commands() -> None:
    assert set(GROUPS) <= set(COMMANDS)


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, table in GROUPS.items() for name in table])
def test_every_command_of_a_group_shows_its_help(group: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([group, name, "--help"])
    assert not caught.value.code
    module = import_module(f"weftlm.cli.{group}.{name}{'_' if iskeyword(name) else ''}")
    assert module.run.__doc__.split("\n")[0].split(",")[0][:30] in capsys.readouterr().out


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_its_commands(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([group, "-h"])
    assert not caught.value.code
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in GROUPS[group])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rout"], "no command 'rout'; did you mean 'route'"),
        (["route", "biuld"], "no command 'biuld' of weftlm route; did you mean 'build'"),
        (["experts", "xyz"], "no command 'xyz' of weftlm experts; allowed: gate, import, list,"),
    ],
)
def test_an_unknown_command_is_a_usage_mistake(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_of_groups_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from weftlm.cli.main import main\n"
        "for arguments in (['--help'], ['experts', '--help'], ['route', '--help']):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or None)\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
