"""What tests of bench/ share: running one of its commands, and a recipe to run it on.

pytest_plugins = ["bench_helpers"]

PYTEST_DONT_REWRITE, as test files import it before pytest does.
"""

import sys
from pathlib import Path

import micro
import pytest
from conftest import run, tiny_checkpoint

from plumbing.files import write_json


def bench_command(name: str, args: list) -> list[str]:
    module = f"bench.{name}"
    return [sys.executable, "-m", module, *map(str, args)]


def run_bench(name: str, args: list, timeout: float = 600) -> tuple[int, str, str]:
    """Run `python -m bench.NAME ARGS`: (return code, standard output, standard error)."""
    command = ["-m", f"bench.{name}", *args]
    return run(command, timeout=timeout)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    """The options of a micro run, model and data included: what the demo's gets from `prepare`."""
    folder = tmp_path_factory.mktemp("ablations")
    world = micro.make(folder, tiny_checkpoint)
    named = {name: value for name, value in world.items() if name != "config"}
    write_json(folder / "recipe.json", {**micro.OPTIONS, **named})
    return folder / "recipe.json"
