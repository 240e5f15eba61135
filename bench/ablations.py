"""The ablations that the paper never ran, on the demo: one option at a time, over random seeds.

    python -m bench.ablations --out runs/ablations

A variant is the recipe with the flags of VARIANTS, run by loop.py in a process of its own on one
thread; its output is OUT/seedS/VARIANT.log. All variants of a random seed start from one M_0. What
no flag of a variant can change is hard-linked from the base's run: loop.py finds it up to date by
its manifest, or refuses if it would have been different. Killed at any time, rerun the same command
to resume. As many variants run at once as there are cores: for a model as small as the demo's, that
is faster than one variant on all cores.
"""

import os
import re
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from collections import defaultdict
from fnmatch import fnmatch
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import mean, stdev

from bench.command import ROOT, finish, make_parser, wait_for
from bench.tables import add_json_flag, write_figures
from eval.table import table
from plumbing.files import load_json, write_json
from plumbing.stage import counts_of

# Files of the base's run: those that follow from M_0 and the seeds alone, from the generator too,
# and so on. A star matches folders as well.
SEEDS = ("iter0/*", "iter1/seed_answers*", "iter1/improver/*")
DRAFTS = (*SEEDS, "generator/*", "iter*/prompts*", "iter*/base_answers*")
IMPROVER = (*SEEDS, "iter1/*_improver*", "iter1/heldout_rewrites*", "iter1/eval_rewrites*")
REWRITES = (*IMPROVER, *DRAFTS, "iter1/rewrites*")
PAIRS = (*REWRITES, "iter1/pairs*")
RUN = ("config.json", "*.jsonl", "generator/*", "reference/*", "iter*")
SIMPO = "--policy.loss simpo --policy.beta 10 --policy.gamma 1.6 "
LIKELIHOOD = "--rewrites.scorer likelihood --pairs.scorer likelihood --pairs.threshold 0"
# the held-out score in the loop, as an upper bound
EXACT = (
    "--rewrites.scorer demo/sorting.py:score --pairs.scorer demo/sorting.py:score "
    "--pairs.threshold 0"
)

VARIANTS = {  # name -> flags of loop.py, files shared with the base
    "base": ("--keep-improvers", ()),  # others need their weights
    "rejected previous": ("--rejected previous", REWRITES),
    "start previous": ("--start previous", PAIRS),
    "data cumulative": ("--data cumulative", PAIRS),
    "no noise": ("--generator.noise 0", IMPROVER),
    "1 keyword": ("--generator.keywords 1 --generator.noise 0", IMPROVER),
    # with more of their own: few seeds have four keywords
    "5 keywords": ("--generator.keywords 5 --generator.noise 1", IMPROVER),
    "no filter": ("--pairs.scorer none", REWRITES),
    "no scorer": ("--pairs.scorer none --rewrites.scorer none", DRAFTS),
    "1 rewrite": ("--rewrites.best-of 1", DRAFTS),
    "likelihood": (LIKELIHOOD, DRAFTS),
    "exact score": (EXACT, DRAFTS),
    "no form filter": ("--prompts.keep=", (*IMPROVER, "generator/*")),
    "dpo alone": ("--policy.nll 0", PAIRS),
    "dpo alone slow": ("--policy.nll 0 --policy.lr 1e-4", PAIRS),
    "simpo slow": (SIMPO + "--policy.nll 0 --policy.lr 1e-4", PAIRS),
    "simpo + nll": (SIMPO, PAIRS),
    "controls": ("", RUN),  # methods/controls.py on a copy of the base's finished run
}
CONTROLS = {  # row -> its evaluation, and what counted its pairs, below controls/
    "seeds: SFT": ("seed_sft_eval.json", ()),
    "seeds: pairs": ("seed_pairs_eval.json", ("seed_pairs",)),
    "one shot": ("one_shot/iter1/eval.json", ("one_shot/iter1/policy",)),
    "nll alone": ("nll/iter{T}/eval.json", ("nll/iter{T}/policy",)),
    "nll, one shot": ("nll_one_shot/iter1/eval.json", ("nll_one_shot/iter1/policy",)),
    "R_1 T times": ("repeated/iter{T}/eval.json", ("repeated/iter{T}/policy",)),
}
Job = tuple[str, int]  # a variant and a random seed


def parse(argv: list[str]) -> Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/ablations"), help="directory of all runs")
    add("--recipe", default="recipes/demo.toml", help="what all variants share")
    add("--seeds", type=numbers, default="0,1,2", help="random seeds")
    help_text = "names; base always runs (default: all)"
    add("--variants", type=variants, default=list(VARIANTS), help=help_text)
    add("--iters", type=int, default=3, help="number of iterations, T")
    add("--workers", type=int, default=os.cpu_count() or 1, help="variants that run at once")
    add_json_flag(parser)
    return parser.parse_args(argv)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def variants(text: str) -> list[str]:
    """Comma-separated names -> these and the base, in VARIANTS' order."""
    wanted = {name.strip() for name in text.split(",")} | {"base"}
    for name in wanted - VARIANTS.keys():
        raise ArgumentTypeError(f"no variant {name!r}; there are {', '.join(VARIANTS)}")
    return [name for name in VARIANTS if name in wanted]


# ---------------------------------------------------------------------------------- one run


def run_of(name: str, seed: int, o: Namespace) -> Path:
    """The directory of a run."""
    return o.out / f"seed{seed}" / re.sub(r"\W", "_", name)


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
    for file in base.rglob("*"):
        name = str(file.relative_to(base))
        target = run / name
        if not file.is_file() or target.exists() or target.parent in finished:
            continue
        if any(fnmatch(name, pattern) for pattern in patterns):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)


def run_variant(job: Job, o: Namespace, lock) -> tuple[Job, dict[str, dict], str]:
    """Run a variant to its end; returns it with its rows of the table, or with why it failed."""
    name, seed = job
    run = run_of(name, seed, o)
    run.mkdir(parents=True, exist_ok=True)
    link(run_of("base", seed, o), run, VARIANTS[name][1])
    command = ["-m", "methods.controls", "--run", str(run)]
    if name != "controls":
        command = [str(ROOT / "loop.py"), *flags(name, seed, o)]
    why = run_command(command, run.with_suffix(".log"), lock)
    if why:
        return job, {}, why
    return job, rows_of(name, run, o.iters), ""


def run_command(command: list[str], log: Path, lock) -> str:
    """Run Python with a command line on one thread, its output in log; returns why it failed."""
    with open(log, "w") as file:
        code = subprocess.run(
            [sys.executable, *command],
            pass_fds=(lock.fileno(),),  # a child holds the lock too: it may outlive us
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    if not code:
        return ""
    text = log.read_text().strip() or f"exit code {code}"
    return f"{log}: {text.splitlines()[-1]}"


def rows_of(name: str, run: Path, T: int) -> dict[str, dict]:
    """Row of the table -> figures of a finished run."""
    if name == "controls":
        rows = {}
        for row, (evaluation, counted) in CONTROLS.items():
            folder = run / "controls"
            pairs = [folder / path.format(T=T) for path in counted]
            rows[row] = figures_of(folder / evaluation.format(T=T), pairs)
        return rows
    pairs = [run / f"iter{t}/pairs.jsonl" for t in range(1, T + 1)]
    figures = figures_of(run / f"iter{T}/eval.json", pairs)
    figures["first"] = load_json(run / "iter1/eval.json")["score"]
    if name == "base":
        # M_0 is evaluated in the base's run only
        return {"M_0": figures_of(run / "iter0/eval.json", []), name: figures}
    return {name: figures}


def figures_of(evaluation: Path, pairs: list[Path]) -> dict:
    """Score and words of the last model's responses, and the pairs that it was trained on."""
    found = load_json(evaluation)
    numbers_of_pairs = [counts_of(path)["pairs"] for path in pairs]
    return {"last": found["score"], "words": found["words"], "pairs": numbers_of_pairs}


# ---------------------------------------------------------------------------------- all of them


def run_all(jobs: list[Job], o: Namespace, lock) -> tuple[dict[Job, dict], dict[str, str]]:
    """Run all variants, and print a line when one ends; returns the rows by job, and failures."""
    done = {}
    failed = {}
    with ThreadPool(o.workers) as pool:

        def run_each(some: list[Job]) -> None:
            for job, rows, why in pool.imap_unordered(partial(run_variant, o=o, lock=lock), some):
                name, seed = job
                done[job] = rows
                if why:
                    failed[f"{name}, seed {seed}"] = why
                scores = "  ".join(f"{row} {r['last']:.3f}" for row, r in rows.items())
                progress = f"{len(done):>2} of {len(jobs)}"
                print(f"seed {seed}  {name:<18} {progress}   {why or scores}", flush=True)

        # the bases first: what they make is linked into their variants
        run_each([job for job in jobs if job[0] == "base"])
        run_each([job for job in jobs if job not in done and done["base", job[1]]])
    return done, failed


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


def main(o: Namespace) -> dict:
    o.out.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed) for name in o.variants for seed in o.seeds]
    with open(o.out / "lock", "w") as lock:
        wait_for(lock)
        done, failed = run_all(jobs, o, lock)

    # figures by row and seed, in the order of VARIANTS
    rows = defaultdict(dict)
    for job in jobs:
        for row, figures in done.get(job, {}).items():
            rows[row][job[1]] = figures
    summary = summarise(rows) if "base" in rows else {}
    print(f"\nmean +- standard deviation over random seeds {o.seeds}; T = {o.iters}")
    print(table(shown(summary)) if summary else "no base")
    write_json(o.out / "results.json", {"summary": summary, "by_seed": rows, "failed": failed})
    write_figures(o.json, shown(summary))
    return {"iters": o.iters, "summary": summary, "failed": failed}


if __name__ == "__main__":
    finish(main, parse(sys.argv[1:]))
