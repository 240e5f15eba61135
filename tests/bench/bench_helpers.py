"""What tests of bench/ share: running one of its commands."""

import os
import subprocess
import sys

from conftest import ROOT


def bench_command(name: str, args: list) -> list[str]:
    return [sys.executable, "-m", f"bench.{name}", *map(str, args)]


def run_bench(name: str, args: list, timeout: float = 600) -> tuple[int, str, str]:
    """Run `python -m bench.NAME ARGS`: (return code, standard output, standard error)."""
    done = subprocess.run(
        bench_command(name, args),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    return done.returncode, done.stdout, done.stderr
