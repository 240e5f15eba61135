"""Runs of loop.py on the micro world, for every test file that goes on with one: a pytest plug-in.

pytest_plugins = ["cycle"]
from cycle import call, go

PYTEST_DONT_REWRITE, as test files import it before pytest does.
"""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import micro
import pytest
from conftest import ROOT, last_json, read_rows, run, tiny_checkpoint

import loop
from plumbing import options
from plumbing.stage import read_manifest


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict[str, str]:
    """M_0, its data and options.json, as loop.py's options."""
    return micro.make(tmp_path_factory.mktemp("micro"), tiny_checkpoint)


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory) -> tuple[Path, str]:
    """A run of two iterations by the command line, nothing in its way: (run directory, output)."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    code, text, errors = run(["loop.py", *flags(world, out)])
    assert code == 0, errors
    return out, text


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished run that a test may go on with."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def flags(world: dict[str, str], out: Path, *more: str) -> list[str]:
    named = [text for name, value in world.items() for text in (f"--{name}", value)]
    return [*named, "--out", str(out), *more]


def command(function: Callable, argv: list[str], default_config: str = "") -> tuple[int, str, str]:
    """A command in this process, which is quicker than a new one: (return code, output, errors)."""
    text = io.StringIO()
    errors = io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(text), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["x", *argv])
        patch.setattr(options, "distributed", nullcontext)  # there is a process group already
        patch.chdir(ROOT)
        try:
            options.cli(function, default_config)
        except SystemExit as end:
            code = end.code
    return code, text.getvalue(), errors.getvalue()


def call(world: dict[str, str], out: Path, *more: str) -> tuple[int, str, str]:
    """loop.py in this process: (return code, output, errors)."""
    return command(loop.main, flags(world, out, *more), "recipes/demo.toml")


def go(world: dict[str, str], out: Path, *more: str) -> dict:
    """call() that must succeed; returns its JSON line."""
    code, text, errors = call(world, out, *more)
    assert code == 0, errors
    return last_json(text)


def one_line(code: int, errors: str) -> str:
    """The one line on standard error of a command that ended with a user's error."""
    assert code == 2, errors
    assert errors.startswith("error: "), errors
    assert errors.count("\n") == 1, errors
    return errors.removeprefix("error: ")


def inputs(result: Path) -> dict:
    """Hashes of what a result was made from, by name."""
    return read_manifest(result)["inputs"]


def counts(result: Path) -> dict:
    return read_manifest(result)["counts"]


def responses(path: Path, field: str = "response") -> dict[str, str]:
    return {row["id"]: row[field] for row in read_rows(path)}


def stamps(out: Path) -> dict[str, float]:
    """When each result of a run was finished, by the path of its manifest."""
    found = sorted(out.glob("**/*manifest.json"))
    return {str(path.relative_to(out)): json.loads(path.read_text())["time"] for path in found}


def cached_and_computed(text: str) -> list[tuple[int, int]]:
    """What the lines on reference log-probs say, one a training."""
    found = re.findall(r"reference log-probs +(\d+) cached +(\d+) computed", text)
    return [(int(cached), int(computed)) for cached, computed in found]
