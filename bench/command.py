"""What the commands of bench/ share: parts in processes of their own, and how a command ends.

A part in a process of its own is timed and weighed alone. A benchmark that has such parts calls
run_part(); its own main() begins with answer(PARTS).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.tables import write_figures
from eval.table import table
from plumbing.records import InputError

ROOT = Path(__file__).resolve().parents[1]


def run_part(
    command: list[str], part: str, arguments: dict, cwd: Path = ROOT, env: dict | None = None
) -> dict:
    """Run COMMAND --part PART JSON to its end; returns the JSON object that it prints last."""
    done = subprocess.run(
        [*command, "--part", part, json.dumps(arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{part}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(parts: dict) -> None:
    """Do what run_part() asks for and end, if this process was started by it."""
    if sys.argv[1:2] == ["--part"]:
        result = parts[sys.argv[2]](**json.loads(sys.argv[3]))
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(result), flush=True)
        sys.exit()


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help begins with a module's docstring."""
    return argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def finish(main, *args) -> None:
    """Print what main(*args) returns as the last line; a user's error is one line, exit code 2."""
    try:
        print(json.dumps(main(*args)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def measure(parts: dict, args: argparse.Namespace) -> dict[str, list[dict]]:
    """All parts of a benchmark, or the one that --only names; returns their tables by name."""
    tables = {}
    for name, part in parts.items():
        if args.only in (None, name):
            made = part(args)
            print(*map(table, made.values()), sep="\n\n", end="\n\n", flush=True)
            tables.update(made)
    write_figures(args.json, tables)
    return tables


def progress(text: str) -> None:
    """A line for who waits; results go to standard output."""
    print(text, file=sys.stderr, flush=True)
