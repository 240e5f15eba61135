"""Benchmarks inside a run: loop.py --eval NAME[,NAME] --eval-options FILE.json, on every M_t.

FILE.json holds the flags of each command, by benchmark:
{"alpaca_eval": {"data": ..., "judge": ...}, "ifeval": {"data": ...}}
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

from eval import alpaca_eval, arena_hard, diversity, head_to_head, ifeval, leaderboard, mt_bench
from plumbing.files import InputError, load_json, write_json
from plumbing.options import RunOptions, as_flags, parse_options
from plumbing.ranks import on_rank0
from plumbing.stage import Stage

BENCHMARKS = {
    "alpaca_eval": alpaca_eval,
    "arena_hard": arena_hard,
    "diversity": diversity,
    "head_to_head": head_to_head,
    "ifeval": ifeval,
    "leaderboard": leaderboard,
    "mt_bench": mt_bench,
}
GIVEN_BY_RUN = ("model", "prompts", "out")
EXAMPLE = '{"ifeval": {"data": "input_data.jsonl"}}'


def options_of(name: str, given: dict, run: RunOptions, **by_run):
    """A benchmark's options as its command parses them, with those of by_run that it has."""
    options = BENCHMARKS[name].Options
    known = {field.name for field in fields(options)}
    by_run = {key: value for key, value in by_run.items() if key in known}
    return parse_options(options, as_flags({**asdict(run), **by_run, **given}))


def check(evals: str, options: str) -> dict[str, dict]:
    """Name -> given options of the chosen benchmarks.

    Raises InputError on names, options and data that do not exist.
    """
    given = load_json(options) if options else {}
    if not isinstance(given, dict) or not all(isinstance(one, dict) for one in given.values()):
        raise InputError(f"{options}: must hold options by benchmark, like {EXAMPLE}")
    # names: all chosen ones exist, and all that have options are chosen
    chosen = [name.strip() for name in evals.split(",") if name.strip()]
    for name in chosen:
        if name not in BENCHMARKS:
            names = ", ".join(BENCHMARKS)
            raise InputError(f"--eval {name}: no such benchmark; there are {names}")
    for name in sorted(given.keys() - chosen):
        raise InputError(f"{options}: options for {name}, which --eval does not name")
    benchmarks = {name: given.get(name, {}) for name in chosen}
    for name, flags in benchmarks.items():
        check_options(name, flags, options)
    return benchmarks


def check_options(name: str, given: dict, path: str) -> None:
    """Raise InputError if options of a benchmark are unknown or missing, or its data is missing."""
    for key in GIVEN_BY_RUN:
        if key in given:
            raise InputError(f"{path}: {name}: {key} is set by the run; leave it out")
    o = options_of(name, given, RunOptions(), model="-", prompts="-", out="-")
    for key in getattr(BENCHMARKS[name], "NEEDS", ()):
        if not getattr(o, key):
            fix = f"give --eval-options FILE.json with {json.dumps({name: {key: '...'}})}"
            raise InputError(f"--eval {name}: its option {key} is missing; {fix}")
    data = getattr(o, "data", None)
    if data and not data.exists():
        raise InputError(f"{path}: {name}: no file or directory {data}; check the path")


def run(
    name: str, given: dict, model: Path, prompts: list[Path], out: Path, run: RunOptions
) -> Path:
    """Stage: a benchmark on a checkpoint, or on files of prompts if it reads no model.

    It encloses the benchmark's own stages, so a finished benchmark needs nothing when rerun: no
    package, no judge's key, no scorer. Its numbers go to out/result.json.
    """
    # what it reads: the paths among its options
    files = ",".join(map(str, prompts))
    o = options_of(name, given, run, model=model, prompts=files, out=out)
    reads = {key: value for key, value in vars(o).items() if isinstance(value, Path)}
    del reads["out"]
    if "model" not in reads:
        reads["prompts"] = prompts
    if "data" in reads and o.data.is_dir():
        reads["data"] = sorted(o.data.glob("*.jsonl"))
    result = out / "result.json"
    stage = Stage(result, run=run, benchmark=given, **reads)
    if stage.done:
        return result

    # there are no prompts before the first iteration
    numbers = {}
    if "model" in reads or prompts:
        numbers = BENCHMARKS[name].main(o)
    on_rank0(write_json, result, numbers)
    counts = {k: round(v, 4) for k, v in numbers.items() if isinstance(v, int | float)}
    return stage.finish(**counts)
