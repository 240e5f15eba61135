"""bench/command.py: parts in other processes, options of a dataclass, watched functions."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import command

ECHO = "import os, sys; print(os.getcwd(), file=sys.stderr); print('noise'); print(sys.argv[3])"


def test_a_part_gets_absolute_paths():
    result = command.run_part([sys.executable, "-c", ECHO], "p", {"file": Path("a.txt"), "n": 1})
    assert result == {"file": str(Path("a.txt").absolute()), "n": 1}


def test_a_part_that_fails_ends_the_command():
    with pytest.raises(SystemExit, match=r"(?s)--part p.*sorry"):
        command.run_part([sys.executable, "-c", "raise SystemExit('sorry')"], "p", {})


def test_a_peer_runs_isolated_and_in_another_directory(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "last_json", lambda *given, **where: asked.append((given, where)))
    command.run_peer("PYTHON", "trl", {"steps": 1})
    [(given, where)] = asked
    python, isolated, file, *_, arguments = given[0]
    assert python == "PYTHON"
    assert isolated == "-I"
    assert Path(file).is_file()
    assert arguments == '{"steps": 1}'
    assert where["cwd"] != command.ROOT


@dataclass
class Options:
    model: Path  # a directory
    steps: int = 8  # in all


def test_options_are_a_dataclass(capsys):
    parser = command.parser_of(Options)
    args = parser.parse_args(["--model", "x", "--json", "y"])
    assert vars(args) == {"model": Path("x"), "steps": 8, "json": Path("y")}
    shown = " ".join(parser.format_help().split())
    assert "--steps STEPS in all (default: 8)" in shown
    assert __doc__.split(":")[0] in shown


def test_watched_functions_tell_their_seconds():
    owner = SimpleNamespace(double=lambda x, y=0: 2 * x + y)
    noted = []
    command.watch(owner, "double", lambda *given: noted.append(given))
    assert owner.double(3, y=1) == 7
    [(seconds, result, x)] = noted
    assert result == 7
    assert x == 3
    assert 0 <= seconds < 1
