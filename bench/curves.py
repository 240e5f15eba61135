"""Held-out scores by iteration over random seeds, beside the controls: a picture and tables.

    for seed in 11 12 13; do
        python loop.py --seed $seed --out runs/seed$seed
        python -m methods.controls --run runs/seed$seed
    done
    python -m bench.curves runs/seed11 runs/seed12 runs/seed13 --svg docs/demo.svg

It reads the files of finished runs, and draws with matplotlib (requirements-eval.txt). Standard
errors of means are over random seeds; those of differences within one run are over held-out
prompts, paired.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt

from bench.command import finish, make_parser
from bench.tables import add_json_flag, write_figures
from eval.diagnostics import difference
from eval.report import evaluations
from eval.stats import mean, standard_error
from eval.table import table
from plumbing.files import load_json

# line of the picture -> its models at t = 1 .. T, as the report names them
LINES = {
    "SynPO": "M_{t}",
    "NLL alone": "NLL alone, M_{t}",
    "R_1 t times, distilled once": "{t} times R_1, distilled",
}
# models that are trained once
POINTS = ("one shot", "NLL alone, one shot", "SFT on the seeds", "pairs from the seeds")
BEST = "best of {n} of M_0"


def results_of(run: Path) -> dict[str, dict]:
    """Model -> result of its evaluation, M_0's best of n among them."""
    o = load_json(run / "config.json")
    found = evaluations(run, o["iters"])
    several = run / "iter0/eval_samples.json"
    if several.is_file():
        best = load_json(several)["best"]
        found[BEST.format(n=o["heldout_samples"])] = {"score": best}
    return found


def models_of(T: int) -> list[str]:
    return [f"M_{t}" for t in range(T + 1)]


def lines_of(results: dict, T: int, name: str) -> list[str]:
    """The models of a line at t = 0 .. T: all begin at M_0, and R_1 applied once is SynPO's M_1."""
    models = ["M_0", *(LINES[name].format(t=t) for t in range(1, T + 1))]
    if models[1] not in results:
        models[1] = "M_1"
    return models


def over_seeds(runs: list[dict[str, dict]], model: str) -> tuple[float, float]:
    """Mean score and its standard error over random seeds."""
    scores = [results[model]["score"] for results in runs]
    return mean(scores), standard_error(scores)


# ---------------------------------------------------------------------------------- tables


def score_row(runs: list[dict[str, dict]], model: str, label: str) -> dict:
    middle, error = over_seeds(runs, model)
    return {
        "model": label.ljust(24),
        "score": middle,
        "se over seeds": error,
    }


def method_rows(scores: list[dict], T: int, beside: list[str]) -> list[dict]:
    """The same scores with a row for each method and a column for each iteration: mean (se)."""
    cells = {}
    for row in scores:
        cells[row["model"].strip()] = f"{row['score']:.3f} ({row['se over seeds']:.3f})"
    names = {name: lines_of(cells, T, name) for name in LINES}
    names |= {name: [f"{name}, {model}" for model in models_of(T)] for name in beside}
    rows = []
    for name, models in names.items():
        rows.append({"method": name} | {f"t = {t}": cells[m] for t, m in enumerate(models)})
    # trained once, with as much data as all iterations
    for model in cells:
        if model in POINTS or model.startswith("best of"):
            empty = {f"t = {t}": "" for t in range(T)}
            rows.append({"method": model, **empty, f"t = {T}": cells[model]})
    return rows


def seed_rows(runs: dict[Path, dict[str, dict]], T: int) -> list[dict]:
    """For each run the paired differences that the claims are about."""
    rows = []
    for run, results in runs.items():
        row = {"seed": load_json(run / "config.json")["seed"]}
        for model in models_of(T):
            row[model] = results[model]["score"]

        # each model and the one before it, the last one and the controls
        pairs = list(pairwise(models_of(T)))
        for control in POINTS:
            if control in results:
                pairs.append((control, f"M_{T}"))
        for other, model in pairs:
            gain, error = difference(results[other], results[model])
            row[f"{model} - {other}"] = f"{gain:+.3f} ({error:.3f})"
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------- the picture


def draw(runs: list[dict[str, dict]], T: int, beside: dict[str, list[dict]], out: Path) -> None:
    """Scores by iteration with standard errors over random seeds; models trained once at the right.

    beside: name -> results of further runs, drawn as dashed lines.
    """
    plt.rcParams["svg.hashsalt"] = "curves"  # the same picture in the same bytes
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")

    def plot(name: str, results: list[dict], models: list[str], style: str) -> None:
        """The models' scores, the last one at T."""
        scores = [over_seeds(results, model) for model in models]
        means = [middle for middle, _ in scores]
        errors = [error for _, error in scores]
        places = range(T + 1 - len(models), T + 1)
        label = f"{name}  {means[-1]:.3f}"
        axes.errorbar(places, means, errors, fmt=style, capsize=3, label=label)

    for name in LINES:
        plot(name, runs, lines_of(runs[0], T, name), "o-")
    for name, others in beside.items():
        plot(name, others, models_of(T), "o--")
    for name in runs[0]:
        if name in POINTS or name.startswith("best of"):
            plot(name, runs, [name], "s")
    axes.set_xlabel("iteration t")
    axes.set_ylabel("held-out score of M_t")
    axes.set_xticks(range(T + 1))
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.savefig(out, metadata={"Date": None})


# ---------------------------------------------------------------------------------- the command


def main(args: argparse.Namespace) -> dict:
    T = load_json(args.runs[0] / "config.json")["iters"]
    by_run = {run: results_of(run) for run in args.runs}
    runs = list(by_run.values())
    beside = {}
    for name, *folders in args.beside:
        beside[name] = [results_of(Path(folder)) for folder in folders]

    # tables
    scores = [score_row(runs, model, model) for model in runs[0]]
    for name, others in beside.items():
        for model in models_of(T):
            scores.append(score_row(others, model, f"{name}, {model}"))
    methods = method_rows(scores, T, list(beside))
    seeds = seed_rows(by_run, T)
    print(table(methods), table(seeds), sep="\n\n")
    write_figures(args.json, {"scores": scores, "methods": methods, "seeds": seeds})

    if args.svg:
        draw(runs, T, beside, args.svg)
    return {"runs": len(runs), "M_T": over_seeds(runs, f"M_{T}")[0]}


if __name__ == "__main__":
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="finished runs with controls, one a random seed")
    help_text = "further runs, drawn as a dashed line: its name, and one run a random seed"
    add("--beside", nargs="+", action="append", default=[], metavar="NAME DIR", help=help_text)
    add("--svg", type=Path, help="write the picture there")
    add_json_flag(parser)
    finish(main, parser.parse_args(sys.argv[1:]))
