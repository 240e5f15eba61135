"""What tests of bench/ share: running one of its commands."""

import sys

from conftest import run


def bench_command(name: str, args: list) -> list[str]:
    return [sys.executable, "-m", f"bench.{name}", *map(str, args)]


def run_bench(name: str, args: list, timeout: float = 600) -> tuple[int, str, str]:
    """Run `python -m bench.NAME ARGS`: (return code, standard output, standard error)."""
    return run(["-m", f"bench.{name}", *args], timeout=timeout)
