"""Benchmarks inside a run: loop.py --eval NAME[,NAME] --eval-options FILE.json calls run() for M_0 and every M_t.

FILE.json holds what each command would be given: {"alpaca_eval": {"data": ..., "judge": ...}, "ifeval": {"data": ...}}.
"""

import dataclasses
import importlib
import json
from pathlib import Path

from data import (
    ROOT,
    Common,
    InputError,
    as_flags,
    load_json,
    on_first,
    parse_options,
    part,
    write_text,
)


def options_of(name: str, given: dict, **more):
    """The benchmark's module, and its options as its own command line would parse them."""
    module = importlib.import_module(f"eval.{name}")
    fields = {field.name for field in dataclasses.fields(module.Options)}
    return module, parse_options(
        module.Options, as_flags({**{k: v for k, v in more.items() if k in fields}, **given})
    )


def names() -> list[str]:
    return sorted(
        path.stem for path in (ROOT / "eval").glob("*.py") if "\nclass Options" in path.read_text()
    )


def check(evals: str, options: str) -> dict[str, dict]:
    """Name -> given options of the chosen benchmarks; InputError for names, options and data that do not exist."""
    given = load_json(options) if options else {}
    if not isinstance(given, dict) or not all(isinstance(one, dict) for one in given.values()):
        raise InputError(
            f'{options}: no options by name; write {{"ifeval": {{"data": "input_data.jsonl"}}}}'
        )
    chosen = [name.strip() for name in evals.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in names()]
    if unknown:
        raise InputError(
            f"--eval {unknown[0]}: no benchmark of eval/ has that name; there are {', '.join(names())}"
        )
    if given.keys() - set(chosen):
        raise InputError(
            f"{options}: options for {sorted(given.keys() - set(chosen))[0]}, which --eval does not name"
        )
    for name in chosen:
        if taken := given.get(name, {}).keys() & {"model", "prompts", "out"}:
            raise InputError(f"{options}: {name}: {min(taken)} is the run's to say; leave it out")
        module, o = options_of(name, given.get(name, {}), model="-", prompts="-", out="-")
        absent = [flag for flag in getattr(module, "NEEDS", ()) if not getattr(o, flag)]
        if absent:
            raise InputError(
                f"--eval {name}: its option {absent[0]} is missing; give --eval-options FILE.json with "
                f"{json.dumps({name: {absent[0]: '...'}})}"
            )
        if getattr(o, "data", "") and not Path(o.data).exists():
            raise InputError(f"{options}: {name}: no file or directory {o.data}; check the path")
    return {name: given.get(name, {}) for name in chosen}


def run(
    name: str, given: dict, model: str | Path, prompts: list[Path], out: Path, common: Common
) -> dict:
    """A benchmark on a checkpoint, or on the files of prompts where it reads no model; its numbers go to out/result.json."""
    module, o = options_of(
        name,
        given,
        model=str(model),
        prompts=",".join(map(str, prompts)),
        out=str(out),
        **part(common, Common),
    )
    result = (
        module.main(o) if hasattr(o, "model") or prompts else {}
    )  # there are no prompts at t = 0
    on_first(write_text, out / "result.json", json.dumps(result, indent=1))
    return {
        key: round(value, 4) if isinstance(value, float) else value
        for key, value in result.items()
        if isinstance(value, int | float)
    }
