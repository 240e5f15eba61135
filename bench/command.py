"""What the commands of bench/ share: options, parts in processes of their own, and how a command
ends.

A part in a process of its own is timed and weighed alone. A benchmark that has such parts calls
run_part(); its own main() begins with answer(PARTS).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import wraps
from pathlib import Path

from bench.tables import add_json_flag, write_figures
from eval.table import table
from plumbing.files import InputError
from plumbing.options import flags_of

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "bench/peers.py"


def last_json(command: list[str], cwd: Path = ROOT, env: dict | None = None) -> dict:
    """Run a command to its end; returns the JSON object that it prints last."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_part(command: list[str], part: str, arguments: dict, **where) -> dict:
    """Run COMMAND --part PART JSON; where: last_json()'s cwd and env."""
    # paths become absolute: the part may run in another directory
    given = json.dumps(arguments, default=os.path.abspath)
    return last_json([*command, "--part", part, given], **where)


def run_peer(python: str, part: str, arguments: dict) -> dict:
    """Run a part of bench/peers.py with the Python of an environment that has the peer."""
    # isolated, and not in our directory: a peer must not take our files for its own
    return run_part([python, "-I", str(PEERS)], part, arguments, cwd=PEERS.parent)


def wait_for(lock) -> None:
    """Lock a file, after runs that a killed command left running have ended."""
    import fcntl  # here, as Windows has none and plumbing/files.py must say so first

    fcntl.flock(lock, fcntl.LOCK_EX)


def answer(parts: dict) -> None:
    """Do what run_part() asks for and end, if this process was started by it."""
    if sys.argv[1:2] == ["--part"]:
        result = parts[sys.argv[2]](**json.loads(sys.argv[3]))
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(result), flush=True)
        sys.exit()


def watch(owner, name: str, note) -> None:
    """Call note(seconds, result, *args) after every call of owner.name.

    It is replaced where it is looked up, so its callers need not know.
    """
    function = getattr(owner, name)

    @wraps(function)
    def watched(*args, **named):
        start = time.perf_counter()
        result = function(*args, **named)
        note(time.perf_counter() - start, result, *args)
        return result

    setattr(owner, name, watched)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help begins with a module's docstring."""
    return argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parser_of(options: type) -> argparse.ArgumentParser:
    """A parser of --json and of a dataclass's fields, whose comments are their help texts."""
    parser = make_parser(sys.modules[options.__module__].__doc__)
    for flag in flags_of(options, []):
        flag.add_to(parser)
    add_json_flag(parser)
    return parser


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
    """A progress line on standard error; results go to standard output."""
    print(text, file=sys.stderr, flush=True)
