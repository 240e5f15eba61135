"""The ablations that the paper never ran, on the demo: one option at a time, over random seeds.

    python -m bench.ablations --out runs/ablations

A variant is the recipe with the flags of VARIANTS, run by loop.py in a process of its own on one
thread; its output is OUT/seedS/VARIANT.log. All variants of a random seed start from one M_0. What
no flag of a variant can change is hard-linked from the base's run: loop.py finds it up to date by
its manifest, or refuses if it would have been different. Killed at any time, rerun the same command
to resume. As many variants run at once as there are cores: for a model as small as the demo's that
gets more done than one variant on all of them.
"""

import fcntl
import os
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import mean, stdev

from bench.command import ROOT, finish, make_parser
from bench.tables import add_json_flag, write_figures
from eval.table import table
from plumbing.options import in_project
from plumbing.records import InputError, load_json, read_text, write_json
from plumbing.stage import counts_of

# Files of the base's run: those that follow from M_0 and the seeds alone, from the generator too,
# and so on.
IMPROVER = (
    "iter0",
    "iter1/seed_answers*",
    "iter1/improver",
    "iter1/*_improver*",
    "iter1/heldout_rewrites*",
)
REWRITES = (*IMPROVER, "generator", "iter*/prompts*", "iter*/base_answers*", "iter1/rewrites*")
PAIRS = (*REWRITES, "iter1/pairs*")
RUN = ("config.json", "*.jsonl", "generator", "reference", "iter*")
SIMPO = "--policy.loss simpo --policy.beta 10 --policy.gamma 1.6 --policy.lr 2e-4 "

VARIANTS = {  # name -> flags of loop.py, files shared with the base
    "base": ("--keep-improvers", ()),  # others need their weights
    "rejected previous": ("--rejected previous", REWRITES),
    "start previous": ("--start previous", PAIRS),
    "data fresh": ("--data fresh", PAIRS),
    "no noise": ("--generator.noise 0", IMPROVER),
    "1 keyword": ("--generator.keywords 1 --generator.noise 0", IMPROVER),
    # with more of their own: few seeds have four keywords
    "5 keywords": ("--generator.keywords 5 --generator.noise 1", IMPROVER),
    "no filter": ("--pairs.scorer none", REWRITES),
    "rubric filter": ("--pairs.scorer demo/build.py:score", REWRITES),
    "simpo": (SIMPO + "--policy.nll 0", PAIRS),
    "simpo + nll": (SIMPO + "--policy.nll 0.5", PAIRS),
    "controls": ("", RUN),  # methods/controls.py on a copy of the base's finished run
}
CONTROLS = {  # row -> its checkpoint and its evaluation, below controls/
    "seeds: SFT": ("seed_sft", "seed_sft_eval.json"),
    "seeds: pairs": ("seed_pairs", "seed_pairs_eval.json"),
    "one shot": ("one_shot/iter1/policy", "one_shot/iter1/eval.json"),
}


def parse(argv: list[str]) -> Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="of all runs")
    parser.add_argument("--recipe", default="recipes/demo.toml", help="what all variants share")
    parser.add_argument("--seeds", default="0,1,2", help="random seeds")
    parser.add_argument("--variants", default="", help="names; base always runs (default: all)")
    parser.add_argument("--iters", type=int, default=3, help="T")
    workers = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=workers, help="variants that run at once")
    add_json_flag(parser)
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------- one run


def run_of(name: str, seed: int, o: Namespace) -> Path:
    """The directory of a run."""
    return o.out / f"seed{seed}" / slug(name)


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def flags(name: str, seed: int, o: Namespace) -> list[str]:
    """loop.py's command line for a variant: the recipe, then what the variant changes."""
    given = ["--config", o.recipe, "--seed", str(seed), "--iters", str(o.iters)]
    given += ["--out", str(run_of(name, seed, o))]
    if name != "base":
        # on the M_0 and data that the base has made
        made = load_json(run_of("base", seed, o) / "config.json")
        given += ["--prepare", ""]
        for key in ("model", "seeds", "corpus", "heldout"):
            given += [f"--{key}", made[key]]
    return given + VARIANTS[name][0].split()


def link(base: Path, run: Path, patterns: tuple[str, ...]) -> None:
    """Hard-link files of the base's run. A stage writes beside a file and renames, so neither run
    can change the other's.
    """
    # an improver whose weights the variant has already discarded must not get them back
    finished = {path.parent for path in run.rglob("manifest.json")}
    shared = [path for pattern in patterns for path in base.glob(pattern)]
    for path in shared:
        for file in [path, *path.rglob("*")]:
            target = run / file.relative_to(base)
            if file.is_file() and not target.exists() and target.parent not in finished:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, target)


def run_variant(name: str, seed: int, o: Namespace, lock) -> dict:
    """Run a variant to its end, unless it is up to date.

    Returns {"rows": row of the table -> figures, "seconds"}, or {"failed": why, "seconds"}.
    """
    run = run_of(name, seed, o)
    kept = run.with_suffix(".json")
    what = {"recipe": read_text(in_project(o.recipe)), "iters": o.iters, "flags": VARIANTS[name][0]}
    if kept.is_file() and load_json(kept)["what"] == what:
        return {**load_json(kept), "seconds": 0}

    # what the base has made already, then the command
    start = time.time()
    run.mkdir(parents=True, exist_ok=True)
    link(run_of("base", seed, o), run, VARIANTS[name][1])
    command = [str(ROOT / "loop.py"), *flags(name, seed, o)]
    if name == "controls":
        command = ["-m", "methods.controls", "--run", str(run)]
    log = run.with_suffix(".log")
    with open(log, "w") as file:
        code = subprocess.run(
            [sys.executable, *command],
            pass_fds=(lock.fileno(),),  # a child holds the lock too: it may outlive us
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    result = {"seconds": round(time.time() - start, 1)}
    if code:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        why = lines[-1] if lines else f"exit code {code}"
        return {**result, "failed": f"{log}: {why}"}

    result["rows"] = control_rows(run) if name == "controls" else rows_of(name, run, o.iters)
    write_json(kept, {**result, "what": what})
    return result


def rows_of(name: str, run: Path, T: int) -> dict[str, dict]:
    """Figures of a finished run: scores and pairs by iteration, words of M_T's responses."""
    evals = [load_json(run / f"iter{t}/eval.json") for t in range(T + 1)]
    pairs = [counts_of(run / f"iter{t}/pairs.jsonl")["pairs"] for t in range(1, T + 1)]
    rows = {name: {**last_of(evals[T], pairs), "first": evals[1]["score"]}}
    # M_0 is evaluated in the base's run
    return {"M_0": last_of(evals[0], []), **rows} if name == "base" else rows


def last_of(evaluation: dict, pairs: list[int]) -> dict:
    return {"last": evaluation["score"], "words": evaluation["words"], "pairs": pairs}


def control_rows(run: Path) -> dict[str, dict]:
    """Figures of the controls: a score, words, and the pairs that each was trained on."""
    rows = {}
    for row, (checkpoint, evaluation) in CONTROLS.items():
        pairs = counts_of(run / "controls" / checkpoint).get("pairs")
        found = load_json(run / "controls" / evaluation)
        rows[row] = last_of(found, [pairs] if pairs else [])
    return rows


# ---------------------------------------------------------------------------------- all of them


def run_all(jobs: list[tuple[str, int]], o: Namespace, lock) -> dict[tuple[str, int], dict]:
    """(variant, random seed) -> result. A seed's base runs before its variants; a line per run."""
    results = {}
    running = {}
    with ThreadPoolExecutor(o.workers) as pool:

        def submit(chosen: list[tuple[str, int]]) -> None:
            for name, seed in chosen:
                running[pool.submit(run_variant, name, seed, o, lock)] = (name, seed)

        # the bases first: what they make is linked into their variants
        submit([job for job in jobs if job[0] == "base"])
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    results[job] = future.result()
                    if job[0] == "base" and "rows" in results[job]:
                        submit([one for one in jobs if one[1] == job[1] and one[0] != "base"])
                    show_run(job, results, len(jobs), o)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def show_run(job: tuple[str, int], results: dict, total: int, o: Namespace) -> None:
    """A line for a run that has ended, and how long the others may take."""
    name, seed = job
    result = results[job]
    spent = [one["seconds"] for one in results.values() if one["seconds"]]
    minutes = (total - len(results)) * mean(spent or [0]) / o.workers / 60
    figures = result.get("failed")
    if not figures:
        figures = "  ".join(f"{row} {r['last']:.3f}" for row, r in result["rows"].items())
    progress = f"{len(results):>2} of {total}, about {minutes:.0f} min left"
    seconds = f"{result['seconds']:5.0f} s"
    print(f"seed {seed}  {name:<18} {seconds}  {progress}   {figures}", flush=True)


# ---------------------------------------------------------------------------------- figures


def summarise(rows: dict[str, dict[int, dict]]) -> dict[str, dict]:
    """row -> random seed -> figures, to row -> [mean, standard deviation over seeds] of each.

    "gain" is that of M_T over the base's with the same seed.
    """
    summary = {}
    for row, by_seed in rows.items():
        gains = []
        # differences with the same seed: the spread of M_0 and of the data drops out
        if row != "base":
            gains = [r["last"] - rows["base"][seed]["last"] for seed, r in by_seed.items()]
        figures = by_seed.values()
        summary[row] = {
            "seeds": sorted(by_seed),
            "M_1": mean_and_deviation([r["first"] for r in figures if "first" in r]),
            "M_T": mean_and_deviation([r["last"] for r in figures]),
            "gain": mean_and_deviation(gains),
            "pairs": [mean(column) for column in zip(*(r["pairs"] for r in figures), strict=True)],
            "words": mean(r["words"] for r in figures),
        }
    return summary


def mean_and_deviation(values: list[float]) -> list | None:
    """None where there are none; no deviation of a single one."""
    if not values:
        return None
    return [mean(values), stdev(values) if len(values) > 1 else None]


def cell(value: list | None, sign: str = "") -> str:
    """mean +- standard deviation."""
    if value is None:
        return "-"
    middle, deviation = value
    return f"{middle:{sign}.3f}" + ("" if deviation is None else f" +- {deviation:.3f}")


def shown(summary: dict[str, dict]) -> list[dict]:
    """The rows of the table."""
    # padded: a table aligns to the right
    return [
        {
            "variant": row.ljust(17),
            "M_1": cell(r["M_1"]),
            "M_T": cell(r["M_T"]),
            "M_T - base's": cell(r["gain"], "+"),
            "seeds": len(r["seeds"]),
            "pairs by iteration": " ".join(f"{n:.0f}" for n in r["pairs"]) or "-",
            "words": f"{r['words']:.1f}",
        }
        for row, r in summary.items()
    ]


# ---------------------------------------------------------------------------------- the command


def chosen(o: Namespace) -> tuple[list[str], list[int]]:
    """Names of variants in VARIANTS' order, and random seeds; InputError for others."""
    wanted = [name.strip() for name in o.variants.split(",") if name.strip()] or list(VARIANTS)
    for name in wanted:
        if name not in VARIANTS:
            raise InputError(f"--variants: no variant {name!r}; there are {', '.join(VARIANTS)}")
    try:
        seeds = [int(seed) for seed in o.seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds must be numbers with commas between, got {o.seeds}") from None
    return [name for name in VARIANTS if name == "base" or name in wanted], seeds


def main(o: Namespace) -> dict:
    names, seeds = chosen(o)
    read_text(in_project(o.recipe))
    o.out.mkdir(parents=True, exist_ok=True)
    with open(o.out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for runs that a killed command left running
        results = run_all([(name, seed) for name in names for seed in seeds], o, lock)

    # figures by row and seed, in the order of VARIANTS
    rows: dict[str, dict[int, dict]] = {}
    failed = {}
    for name, seed in sorted(results, key=lambda job: names.index(job[0])):
        result = results[name, seed]
        if "failed" in result:
            failed[f"{name}, seed {seed}"] = result["failed"]
        for row, figures in result.get("rows", {}).items():
            rows.setdefault(row, {})[seed] = figures
    summary = summarise(rows) if "base" in rows else {}
    print(f"\nmean +- standard deviation over random seeds {o.seeds}; T = {o.iters}")
    print(table(shown(summary)) if summary else "no base")
    write_json(o.out / "results.json", {"summary": summary, "by_seed": rows, "failed": failed})
    write_figures(o.json, shown(summary))
    return {"iters": o.iters, "summary": summary, "failed": failed}


if __name__ == "__main__":
    finish(main, parse(sys.argv[1:]))
