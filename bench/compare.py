"""SynPO, its rivals and its controls on one base model, seeds, prompts and budget.

    python -m bench.compare --world sorting --out runs/compare_sorting --svg docs/compare.svg
    python -m bench.compare --world facts --out runs/compare_facts

Every row of ROWS is a run of its own on one thread; its output is OUT/seedS/ROW.log. All of one
random seed start from one M_0, and iterations that need new prompts take SynPO's, hard-linked as in
bench/ablations.py; one shots write their own.

Budget: an iteration of every method takes about as many optimizer steps as SynPO's, S. So M_t lies
about t S steps from its start, but for SynPO on fresh pairs, whose M_t lies S steps from M_0. Where
a method has fewer pairs, it takes fewer steps. Learning rates and filters of pairs are each
method's own, as its recipe or FLAGS say.

Scores are means over random seeds with their standard deviations, differences are paired by random
seed; the picture has standard errors. In the second table, M_T, chosen and rejected are words of a
response; `chosen better` is the share of pairs kept whose chosen side has the higher exact score,
among those that differ. Tokens, steps and seconds leave M_0 and all evaluations out; what is shared
counts for every row. Seconds are of a machine that is busy with --workers runs.

Killed at any time, rerun the same command to resume.
"""

import argparse
import os
import re
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from bench.ablations import cell, link, mean_and_deviation, numbers, run_command
from bench.command import ROOT, finish, make_parser, wait_for
from bench.tables import add_json_flag, write_figures
from eval.report import KINDS, finished_stages
from eval.stats import mean, standard_error
from eval.table import table
from formats.plugins import load_function
from formats.records import read_jsonl
from plumbing.files import load_json
from plumbing.stage import counts_of

OF_M_0 = ("iter0/*",)
OF_G = (*OF_M_0, "generator/*", "iter*/prompts*")


@dataclass(frozen=True)
class Row:
    program: str  # a file or module with a command line
    gold: str  # what reads gold responses, besides G
    flags: str = ""
    shared: tuple[str, ...] = OF_G  # files of SynPO's run


ROWS = {
    "SynPO": Row("loop.py", "R_t"),
    "SynPO, cumulative": Row("loop.py", "R_t", "--data cumulative"),
    "SynPO, fresh": Row("loop.py", "R_t", "--data fresh"),
    "SynPO, one shot": Row("loop.py", "R_1", "--one-shot", OF_M_0),
    "SPIN": Row("methods.spin", "chosen", shared=OF_M_0),
    "SPIN without NLL": Row("methods.spin", "chosen", "--policy.nll 0", OF_M_0),
    "SAPO": Row("methods.sapo", "chosen", shared=OF_M_0),
    "SAPO without NLL": Row("methods.sapo", "chosen", "--policy.nll 0", OF_M_0),
    "ALMoST, M_1 by SFT": Row("methods.almost", "assistants"),
    "Sampling-Ranking": Row("methods.sampling_ranking", "-"),
    "Sampling-Ranking, one shot": Row("methods.sampling_ranking", "-", "--one-shot", OF_M_0),
    "Self-Rewarding": Row("methods.self_rewarding", "S, judge"),
}
# Models that are trained once: row -> the run that has it, and its evaluation there.
ONCE = {
    "SFT on the seeds": ("SynPO", "controls/seed_sft_eval.json"),
    "Self-Rewarding's S": ("Self-Rewarding", "first/model_eval.json"),
}

# world -> the row that is SynPO's recipe once more
SAME = {"sorting": "SynPO, fresh", "facts": "SynPO, cumulative"}
# program -> what the method fixes, which SynPO's recipe may say otherwise
FIXED = {
    "methods.spin": "--rejected previous --start previous",
    "methods.sapo": "--rejected previous --start previous",
    "methods.almost": "--rejected previous --start previous --data fresh",
    "methods.sampling_ranking": "--rejected previous",
    "methods.self_rewarding": "--rejected previous --start previous --data fresh",
}
# world -> SynPO's recipe
RECIPES = {"sorting": "recipes/demo.toml", "facts": "recipes/facts.toml"}
# world -> program -> flags after the recipe: what it does not say of the method, and as many steps
# an iteration as SynPO takes. For SPIN and SAPO in the sorting world several learning rates between
# 1e-5 and 3e-4, 80 and 320 steps, and beta 0.1, 1 and 5 were tried on random seeds 41 and 42: every
# M_3 breaks most lists, and none is clearly better. No search has been made for the others.
FLAGS = {
    "sorting": {
        "methods.spin": "--policy.epochs 32 --policy.lr 3e-5",
        "methods.sapo": "--sapo.steps 320 --sapo.reference 320 --policy.lr 3e-5",
        "methods.almost": "--rlsf.steps 320",
    },
    "facts": {
        "methods.spin": "--spin.samples 4 --spin.equal",
        "methods.sapo": "--sapo.steps 25 --sapo.segment 16 --sapo.buffer 256 --sapo.reference 25",
        "methods.almost": (
            "--almost.assistants sft:100,sft:25,sft:0 --sampling.max-new-tokens 96 "
            "--reward.lr 1e-4 --reward.batch 32 --reward.max-length 256 --demonstrations.lr 2e-4 "
            "--demonstrations.batch 32 --demonstrations.epochs 2 --demonstrations.max-length 256 "
            "--rlsf.lr 5e-5 --rlsf.batch 64 --rlsf.refresh 5 --rlsf.max-length 256 "
            "--rlsf.max-new-tokens 96"
        ),
        "methods.self_rewarding": (
            "--verdicts.max-new-tokens 24 --rewarding.template '{prompt} Answer: {response}'"
        ),
    },
}
Job = tuple[str, int]  # a row and a random seed
Figures = dict[str, dict[int, dict]]  # row -> random seed -> figures of a run


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--world", choices=RECIPES, default="sorting", help="the demo's world, or that of facts")
    add("--out", type=Path, default=Path("runs/compare"), help="directory of all runs")
    add("--seeds", type=numbers, default="31,32,33", help="random seeds")
    help_text = "names with semicolons between; SynPO always runs (default: all)"
    add("--rows", type=names, default=list(ROWS), help=help_text)
    add("--iters", type=int, default=3, help="number of iterations, T")
    add("--workers", type=int, default=os.cpu_count() or 1, help="runs at once")
    add("--svg", type=Path, help="write the picture there")
    add_json_flag(parser)
    o = parser.parse_args(argv)
    o.rows = [name for name in o.rows if name != SAME[o.world]]
    return o


def names(text: str) -> list[str]:
    """Names, with ; between as names have commas -> these and SynPO, in ROWS' order."""
    wanted = {name.strip() for name in text.split(";")} | {"SynPO"}
    for name in wanted - ROWS.keys():
        raise argparse.ArgumentTypeError(f"no row {name!r}; there are {'; '.join(ROWS)}")
    return [name for name in ROWS if name in wanted]


# ---------------------------------------------------------------------------------- one run


def run_of(name: str, seed: int, o: argparse.Namespace) -> Path:
    return o.out / f"seed{seed}" / re.sub(r"\W+", "_", name)


def recipe_of(row: Row, o: argparse.Namespace) -> str:
    """A method's own recipe for the demo's world, else SynPO's."""
    own = f"recipes/methods/{row.program.removeprefix('methods.')}.toml"
    if o.world == "sorting" and (ROOT / own).is_file():
        return own
    return RECIPES[o.world]


def command(name: str, seed: int, o: argparse.Namespace) -> list[str]:
    """The command line of a row: its recipe, what the world needs, then what the row changes."""
    row, run = ROWS[name], run_of(name, seed, o)
    program = [row.program]
    if row.program.startswith("methods."):
        program = ["-m", row.program]
    given = ["--config", recipe_of(row, o), "--out", str(run)]
    given += ["--seed", str(seed), "--iters", str(o.iters)]
    if name != "SynPO":
        # on the M_0 and data that SynPO's run has made
        made = load_json(run_of("SynPO", seed, o) / "config.json")
        given += ["--prepare", ""]
        for key in ("model", "seeds", "corpus", "heldout"):
            given += [f"--{key}", made[key]]
    fixed = FIXED.get(row.program, "").split()
    fitting = shlex.split(FLAGS[o.world].get(row.program, ""))
    return [*program, *given, *fixed, *fitting, *row.flags.split()]


def run_row(job: Job, o: argparse.Namespace, lock) -> tuple[Job, str]:
    """Run a row to its end, and SynPO's control with it; returns why it failed."""
    name, seed = job
    run = run_of(name, seed, o)
    run.mkdir(parents=True, exist_ok=True)
    link(run_of("SynPO", seed, o), run, ROWS[name].shared)
    log = run.with_suffix(".log")
    why = run_command(command(name, seed, o), log, lock)
    if not why and name == "SynPO":
        control = ["-m", "methods.controls", "--run", str(run), "--only", "seed_sft"]
        why = run_command(control, log.with_suffix(".controls.log"), lock)
    return job, why


# ---------------------------------------------------------------------------------- its figures


def figures_of(run: Path) -> dict:
    """What the table shows of a finished run."""
    o = load_json(run / "config.json")
    T = o["iters"]  # 1 in one shot
    evaluations = [load_json(run / f"iter{t}/eval.json") for t in range(T + 1)]
    pairs = [counts_of(run / f"iter{t}/pairs.jsonl") for t in range(1, T + 1)]
    steps = [counts_of(run / f"iter{t}/policy")["steps"] for t in range(1, T + 1)]
    stages = counted(run, o)
    trained = [line for line in stages if "steps" in line]
    written = [line for line in stages if "steps" not in line]
    first = counts_of(run / "first/model").get("steps", 0)  # Self-Rewarding's S
    return {
        "start": "M_{t-1}" if o["start"] == "previous" else "M_0",
        "scores": [result["score"] for result in evaluations],
        "words": evaluations[-1]["words"],
        "chosen": words_of(pairs, "chosen"),
        "rejected": words_of(pairs, "rejected"),
        "better": better(run, o, T),
        "pairs": [f"{one['pairs']}/{one['candidates']}" if one else "-" for one in pairs],
        "steps_to_last": first + (sum(steps) if o["start"] == "previous" else steps[-1]),
        # a training in rounds ends in a policy, whose steps are those of its rounds
        "steps": sum(line["steps"] for line in trained if line.get("tokens")),
        "generated": sum(line.get("tokens", 0) for line in written),
        "trained": sum(line.get("tokens", 0) for line in trained),
        "seconds": sum(line["seconds"] for line in stages),
    }


def counted(run: Path, o: dict) -> list[dict]:
    """The stages of a run that its method needs: without M_0, evaluations and controls."""
    found = []
    for line in finished_stages(run):
        name = line["stage"]
        evaluates = KINDS.get(name.rpartition("/")[2]) == "eval" or name.startswith("first/model_")
        is_M_0 = (run / name).resolve() == Path(o["model"]).resolve()
        if not (evaluates or is_M_0 or name.startswith("controls")):
            found.append(line)
    return found


def words_of(pairs: list[dict], side: str) -> float | None:
    """Mean words of a side over iterations that have pairs."""
    found = [one[f"{side}_words"] for one in pairs if one]
    return mean(found) if found else None


def better(run: Path, o: dict, T: int) -> float | None:
    """Share of pairs whose chosen side has the higher exact score, among those that differ."""
    exact = load_function(f"{o['evaluate'].partition(':')[0]}:score")
    found = []
    for t in range(1, T + 1):
        path = run / f"iter{t}/pairs.jsonl"
        rows = read_jsonl(path, "prompt") if path.is_file() else []
        chosen = exact([{**row, "response": row["chosen"]} for row in rows])
        rejected = exact([{**row, "response": row["rejected"]} for row in rows])
        sides = zip(chosen, rejected, strict=True)
        found += [high > low for high, low in sides if high != low]
    return mean(found) if found else None


# ---------------------------------------------------------------------------------- tables


def by_row(done: dict[Job, dict], o: argparse.Namespace) -> Figures:
    """row -> random seed -> figures, in the order of ROWS."""
    rows = defaultdict(dict)
    for name in o.rows:
        for seed in o.seeds:
            if (name, seed) in done:
                rows[name][seed] = done[name, seed]
    return rows


def score_rows(rows: Figures, T: int) -> list[dict]:
    """Scores by iteration, and M_T against M_0, SFT on the seeds and SynPO."""
    table_rows = []
    for name, by_seed in rows.items():
        last = scores_at(by_seed, -1)
        row = {"method": name.ljust(26)}
        for t in range(T + 1):
            scores = [r["scores"] for r in by_seed.values()]
            # what is trained once stands at T
            place = len(scores[0]) - 1 - T + t
            shown = t == 0 or place > 0
            at = [one[place if t else 0] for one in scores]
            row[f"M_{t}"] = cell(mean_and_deviation(at)) if shown else ""
        row["M_T - M_0"] = differences(last, scores_at(by_seed, 0))
        for other in ("SFT on the seeds", "SynPO"):
            theirs = scores_at(rows.get(other, {}), -1)
            row[f"M_T - {other}"] = "" if name == other else differences(last, theirs)
        row["seeds"] = " ".join(map(str, by_seed))
        table_rows.append(row)
    return table_rows


def scores_at(by_seed: dict[int, dict], index: int) -> dict[int, float]:
    """Random seed -> score of one model of a row."""
    return {seed: figures["scores"][index] for seed, figures in by_seed.items()}


def differences(ours: dict[int, float], theirs: dict[int, float]) -> str:
    found = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return cell(mean_and_deviation(found), "+")


def budget_rows(rows: Figures) -> list[dict]:
    """What the methods read, made and cost; means over random seeds."""
    table_rows = []
    for name, by_seed in rows.items():
        if name in ONCE:
            continue
        several = list(by_seed.values())
        row = {"method": name.ljust(26), "M_t starts from": several[0]["start"]}
        row["gold read by"] = ROWS[name].gold
        texts = {"M_T": "words", "chosen": "chosen", "rejected": "rejected"}
        for column, key in {**texts, "chosen better": "better"}.items():
            values = [one[key] for one in several if one[key] is not None]
            row[column] = f"{mean(values):.2f}" if values else "-"
        row[f"pairs kept/seen, seed {min(by_seed)}"] = " ".join(by_seed[min(by_seed)]["pairs"])
        row["steps to M_T"] = round(mean([one["steps_to_last"] for one in several]))
        row["all steps"] = round(mean([one["steps"] for one in several]))
        for key in ("generated", "trained"):
            row[f"tokens {key}"] = f"{mean([one[key] for one in several]) / 1e3:,.0f}k"
        row["seconds"] = round(mean([one["seconds"] for one in several]))
        table_rows.append(row)
    return table_rows


def draw(rows: Figures, T: int, out: Path) -> None:
    """Scores by iteration with standard errors over random seeds; what is trained once, at T."""
    import matplotlib.pyplot as plt  # only pictures need it (requirements-eval.txt)

    plt.rcParams["svg.hashsalt"] = "compare"  # the same picture in the same bytes
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for i, (name, by_seed) in enumerate(rows.items()):
        scores = [figures["scores"] for figures in by_seed.values()]
        columns = list(zip(*scores, strict=True))
        once = len(columns) - 1 < T
        columns = columns[-1:] if once else columns
        means = [mean(column) for column in columns]
        errors = [standard_error(column) for column in columns]
        # side by side, so that bars do not hide one another
        shift = 0.02 * (i - len(rows) / 2)
        places = [T + 1 - len(columns) + t + shift for t in range(len(columns))]
        look = {
            "label": f"{name}  {means[-1]:.3f}",
            "color": plt.get_cmap("tab20")(i % 20),
            "fmt": "s" if once else "o-",
        }
        axes.errorbar(places, means, errors, capsize=3, **look)
    axes.set_xlabel("iteration t")
    axes.set_ylabel("held-out score of M_t, standard error over random seeds")
    axes.set_xticks(range(T + 1))
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.savefig(out, metadata={"Date": None})


# ---------------------------------------------------------------------------------- the command


def run_all(o: argparse.Namespace, lock) -> tuple[dict[Job, dict], dict[str, str]]:
    """Run all rows, and print a line when one ends; returns their figures, and failures."""
    done = {}
    failed = {}
    jobs = [(name, seed) for name in o.rows for seed in o.seeds]
    with ThreadPool(o.workers) as pool:

        def run_each(some: list[Job]) -> None:
            for job, why in pool.imap_unordered(partial(run_row, o=o, lock=lock), some):
                name, seed = job
                if why:
                    failed[f"{name}, seed {seed}"] = why
                else:
                    done[job] = figures_of(run_of(name, seed, o))
                scores = ""
                if job in done:
                    scores = " ".join(f"{score:.3f}" for score in done[job]["scores"])
                progress = f"{len(done) + len(failed):>2} of {len(jobs)}"
                print(f"seed {seed}  {name:<26} {progress}   {why or scores}", flush=True)

        # SynPO first: what it makes is linked into the others
        run_each([job for job in jobs if job[0] == "SynPO"])
        others = [(name, seed) for name, seed in jobs if name != "SynPO"]
        run_each([(name, seed) for name, seed in others if ("SynPO", seed) in done])
        for name, seed in others:
            if ("SynPO", seed) not in done:
                failed[f"{name}, seed {seed}"] = "needs SynPO's run"
    return done, failed


def add_models_trained_once(rows: Figures, o: argparse.Namespace) -> None:
    for name, (of, evaluation) in ONCE.items():
        for seed, figures in rows.get(of, {}).items():
            score = load_json(run_of(of, seed, o) / evaluation)["score"]
            rows[name][seed] = {"scores": [figures["scores"][0], score]}


def main(o: argparse.Namespace) -> dict:
    o.out.mkdir(parents=True, exist_ok=True)
    with open(o.out / "lock", "w") as lock:
        wait_for(lock)
        done, failed = run_all(o, lock)
    rows = by_row(done, o)
    if not rows:
        return {"rows": 0, "failed": failed}
    add_models_trained_once(rows, o)
    scores, budget = score_rows(rows, o.iters), budget_rows(rows)
    print(table(scores), table(budget), sep="\n\n")
    lost = [{"row": name, "why": why} for name, why in failed.items()]
    write_figures(o.json, {"scores": scores, "budget": budget, "failed": lost})
    if o.svg:
        draw(rows, o.iters, o.svg)
    return {"rows": len(rows), "failed": failed}


if __name__ == "__main__":
    finish(main, parse(sys.argv[1:]))
