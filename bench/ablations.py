"""The ablations that the paper never ran, on the demo: one option at a time, over random seeds.

    python bench/ablations.py --out runs/ablations

A variant is the recipe with the flags of VARIANTS, run by loop.py in a process of its own on one thread, its output in
OUT/seedS/VARIANT.log. All variants of a random seed start from one M_0. What of a base's stages no flag of a variant can change
is linked into the variant's directory, where loop.py finds it done by its manifest, or stops if it would have been another.
Killed at any time, the same command goes on. Beside each other run as many variants as there are cores: for a model as small
as the demo's that is more work done than one variant on all of them.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import ROOT, InputError, command, in_project, load_json, manifest_path, say, write_text
from eval.report import table

# Files of the base's run: what follows from M_0 and the seeds alone, what follows from the generator too, and so on.
IMPROVER = (
    "iter0",
    "iter1/seed_answers*",
    "iter1/improver",
    "iter1/*_improver*",
    "iter1/heldout_rewrites*",
)
REWRITES = (*IMPROVER, "generator", "iter*/prompts*", "iter*/base_answers*", "iter1/rewrites*")
PAIRS = (*REWRITES, "iter1/pairs*")
ALL = ("generator", "reference", "iter*")
SIMPO = "--policy.loss simpo --policy.beta 10 --policy.gamma 1.6 --policy.lr 2e-4 "

VARIANTS = {  # name -> flags of loop.py, files shared with the base
    "base": ("--keep-improvers", ()),  # whose weights others need
    "rejected previous": ("--rejected previous", REWRITES),
    "start previous": ("--start previous", PAIRS),
    "data fresh": ("--data fresh", PAIRS),
    "no noise": ("--generator.noise 0", IMPROVER),
    "1 keyword": ("--generator.keywords 1 --generator.noise 0", IMPROVER),
    "5 keywords": (
        "--generator.keywords 5 --generator.noise 1",
        IMPROVER,
    ),  # few seeds have four of their own
    "no filter": ("--filter.scorer none", REWRITES),
    "rubric filter": ("--filter.scorer demo/build.py:score", REWRITES),
    "simpo": (SIMPO + "--policy.nll 0", PAIRS),
    "simpo + nll": (SIMPO + "--policy.nll 0.5", PAIRS),
    "controls": ("--controls", ALL),  # on top of the base's finished run
}
CONTROLS = {
    "seeds: SFT": "seed_sft",
    "seeds: pairs": "seed_pairs",
    "one shot": "one_shot/iter1/policy",
}  # below controls/


@dataclass(kw_only=True)
class Options:
    out: str = (
        "runs/ablations"  # directory of all runs; the same command again goes on where it stopped
    )
    recipe: str = "recipes/demo.json"  # options of loop.py that all variants share
    seeds: str = "0,1,2"  # random seeds
    variants: str = ""  # some of them, by name; base always runs; default: all
    iters: int = 3  # T
    workers: int = os.cpu_count() or 1  # variants that run beside each other, one thread each


# ---------------------------------------------------------------------------------------------- one run


def flags(name: str, seed: int, o: Options) -> list[str]:
    """loop.py's command line for a variant: the recipe, then what the variant changes, on the M_0 and data of the base."""
    home = Path(o.out) / f"seed{seed}"
    given = [
        "--config",
        o.recipe,
        "--seed",
        str(seed),
        "--iters",
        str(o.iters),
        "--out",
        str(home / slug(name)),
    ]
    if name != "base":
        made, keys = load_json(home / "base/config.json"), ("model", "seeds", "corpus", "heldout")
        given += ["--prepare", "", *(text for key in keys for text in (f"--{key}", made[key]))]
    return given + VARIANTS[name][0].split()


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def link(base: Path, run: Path, patterns: tuple[str, ...]) -> None:
    """Hard-link files of the base's run; a stage writes anew and renames, so neither run can change the other's."""
    files = [
        f
        for pattern in patterns
        for path in base.glob(pattern)
        for f in ([path] if path.is_file() else path.rglob("*"))
    ]
    for file in files:
        target = run / file.relative_to(base)
        if file.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)


def run_variant(name: str, seed: int, o: Options, lock) -> dict:
    """Run a variant to its end, if it was not; returns {"rows": row of the table -> figures, "seconds"}, or {"failed": why}."""
    run = Path(o.out) / f"seed{seed}" / slug(name)
    done = run.with_suffix(".json")
    what = {"recipe": load_json(in_project(o.recipe)), "iters": o.iters, "flags": VARIANTS[name][0]}
    if done.is_file() and load_json(done)["what"] == what:
        return {**load_json(done), "seconds": 0}
    start = time.time()
    run.mkdir(parents=True, exist_ok=True)
    link(run.parent / "base", run, VARIANTS[name][1])
    with open(
        run.with_suffix(".log"), "w"
    ) as log:  # the child holds the lock too: it may outlive this process
        code = subprocess.run(
            [sys.executable, str(ROOT / "loop.py"), *flags(name, seed, o)],
            pass_fds=(lock.fileno(),),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode
    if code:
        lines = [line for line in Path(log.name).read_text().splitlines() if line.strip()]
        return {
            "failed": f"{log.name}: {lines[-1] if lines else f'exit code {code}'}",
            "seconds": time.time() - start,
        }
    result = {
        "what": what,
        "rows": rows_of(name, run, o.iters),
        "seconds": round(time.time() - start, 1),
    }
    write_text(done, json.dumps(result, indent=1))
    return result


def rows_of(name: str, run: Path, T: int) -> dict[str, dict]:
    """Figures of a finished run: scores by iteration, pairs by iteration, words of the last model's held-out answers."""
    evals = [load_json(run / f"iter{t}/eval.json") for t in range(T + 1)]
    counts = lambda path: load_json(manifest_path(path))["counts"]  # noqa: E731
    if name == "controls":
        last = {
            row: load_json(
                run
                / "controls"
                / (
                    f"{where}_eval.json"
                    if where in ("seed_sft", "seed_pairs")
                    else "one_shot/iter1/eval.json"
                )
            )
            for row, where in CONTROLS.items()
        }
        return {
            row: {
                "last": last[row]["score"],
                "words": last[row]["words"],
                "pairs": [p] if (p := counts(run / "controls" / where).get("pairs")) else [],
            }
            for row, where in CONTROLS.items()
        }
    pairs = [counts(run / f"iter{t}/pairs.jsonl")["pairs"] for t in range(1, T + 1)]
    own = {
        name: {
            "first": evals[1]["score"],
            "last": evals[T]["score"],
            "words": evals[T]["words"],
            "pairs": pairs,
        }
    }
    return (
        {"M_0": {"last": evals[0]["score"], "words": evals[0]["words"], "pairs": []}}
        if name == "base"
        else {}
    ) | own


# ---------------------------------------------------------------------------------------------- all of them


def run_all(jobs: list[tuple[str, int]], o: Options, lock) -> dict[tuple[str, int], dict]:
    """(variant, random seed) -> result. A seed's base runs before its variants; a line per finished run."""
    results, spent = {}, []
    with ThreadPoolExecutor(o.workers) as pool:
        submit = lambda job: (pool.submit(run_variant, *job, o, lock), job)  # noqa: E731
        running = dict(submit(job) for job in jobs if job[0] == "base")
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name, seed = job = running.pop(future)
                    result = results[job] = future.result()
                    if name == "base" and "rows" in result:
                        running |= dict(
                            submit((n, s)) for n, s in jobs if s == seed and n != "base"
                        )
                    spent += [result["seconds"]] if result["seconds"] else []
                    left = (len(jobs) - len(results)) * mean(spent or [0]) / o.workers
                    figures = result.get("failed") or "  ".join(
                        f"{row} {r['last']:.3f}" for row, r in result["rows"].items()
                    )
                    say(
                        f"seed {seed}  {name:<18} {result['seconds']:5.0f} s  {len(results):>2} of {len(jobs)}, about "
                        f"{left / 60:.0f} min left   {figures}"
                    )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def summarise(rows: dict[str, dict[int, dict]]) -> dict[str, dict]:
    """row -> random seed -> figures, to row -> [mean, standard deviation over seeds] of each; "gain": of M_T over the base's
    with the same seed."""

    def spread(values):
        return [mean(values), stdev(values) if len(values) > 1 else None] if values else None

    return {
        row: {
            "seeds": sorted(by),
            "M_1": spread([r["first"] for r in by.values() if "first" in r]),
            "M_T": spread([r["last"] for r in by.values()]),
            "gain": spread([r["last"] - rows["base"][s]["last"] for s, r in by.items()])
            if row != "base"
            else None,
            "pairs": [
                mean(column) for column in zip(*(r["pairs"] for r in by.values()), strict=True)
            ],
            "words": mean(r["words"] for r in by.values()),
        }
        for row, by in rows.items()
    }


def show(summary: dict[str, dict]) -> str:
    cell = lambda v, sign="": (
        "-" if v is None else f"{v[0]:{sign}.3f}" + (f" +- {v[1]:.3f}" if v[1] is not None else "")
    )  # noqa: E731
    return table(
        [
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
    )


def main(o: Options) -> dict:
    wanted = [name.strip() for name in o.variants.split(",") if name.strip()] or [*VARIANTS]
    unknown = [name for name in wanted if name not in VARIANTS]
    if unknown:
        raise InputError(f"--variants: no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    try:
        seeds = [int(seed) for seed in o.seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds {o.seeds}: give numbers with commas between") from None
    names = [name for name in VARIANTS if name in {"base", *wanted}]
    load_json(in_project(o.recipe))
    Path(o.out).mkdir(parents=True, exist_ok=True)
    with open(Path(o.out) / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for runs that a killed command left behind
        results = run_all([(name, seed) for name in names for seed in seeds], o, lock)
    rows = {}
    for name, seed in sorted(results, key=lambda job: names.index(job[0])):
        for row, figures in results[name, seed].get("rows", {}).items():
            rows.setdefault(row, {})[seed] = figures
    summary = summarise(rows) if "base" in rows else {}
    failed = {
        f"{name}, seed {seed}": r["failed"] for (name, seed), r in results.items() if "failed" in r
    }
    say(
        f"\nmean +- standard deviation over random seeds {o.seeds}; T = {o.iters}\n{show(summary) if summary else 'no base'}"
    )
    write_text(
        Path(o.out) / "results.json",
        json.dumps({"summary": summary, "by_seed": rows, "failed": failed}, indent=1),
    )
    return {"iters": o.iters, "summary": summary, "failed": failed}


if __name__ == "__main__":
    command(main, Options)
