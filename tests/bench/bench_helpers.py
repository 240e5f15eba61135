"""What tests of bench/ share: running one of its commands."""

import sys

from conftest import run


def bench_command(name: str, args: list) -> list[str]:
    module = f"bench.{name}"
    return [sys.executable, "-m", module, *map(str, args)]


def run_bench(name: str, args: list, timeout: float = 600) -> tuple[int, str, str]:
    """Run `python -m bench.NAME ARGS`: (return code, standard output, standard error)."""
    command = ["-m", f"bench.{name}", *args]
    return run(command, timeout=timeout)
