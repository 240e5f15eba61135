"""Held-out scores by iteration over random seeds, beside the controls: a picture and tables.

    for seed in 11 12 13; do
        python loop.py --seed $seed --out runs/seed$seed
        python -m methods.controls --run runs/seed$seed
    done
    python -m bench.curves runs/seed11 runs/seed12 runs/seed13 --svg docs/demo.svg

It reads the files of finished runs. Standard errors of means are over random seeds; those of
differences within one run are over held-out prompts, paired.
"""

import argparse
import sys
from pathlib import Path

from bench.command import finish, make_parser
from bench.tables import add_json_flag, write_figures
from eval.diagnostics import difference
from eval.report import evaluations
from eval.stats import mean, standard_error
from eval.table import table
from plumbing.records import load_json, write_text

# line of the picture -> its colour, and the names of its models at t = 1 .. T in the report
LINES = {
    "SynPO": ("#1f6feb", "M_{t}"),
    "NLL alone": ("#8250df", "NLL alone, M_{t}"),
    "R_1 t times, distilled once": ("#d9730d", "R_1 {t} times, distilled"),
}
# models that are trained once: points at the right
POINTS = {
    "one shot": "#1a7f37",
    "NLL alone, one shot": "#9a6700",
    "SFT on the seeds": "#cf222e",
    "pairs from the seeds": "#656d76",
}
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


def lines_of(results: dict[str, dict], T: int, name: str) -> list[str]:
    """The models of a line at t = 0 .. T: all begin at M_0, and R_1 applied once is SynPO's M_1."""
    _, model = LINES[name]
    models = ["M_0", *(model.format(t=t) for t in range(1, T + 1))]
    if models[1] not in results:
        models[1] = "M_1"
    return models


def over_seeds(runs: list[dict[str, dict]], model: str) -> tuple[float, float]:
    """Mean score and its standard error over random seeds."""
    scores = [results[model]["score"] for results in runs]
    return mean(scores), standard_error(scores)


# ---------------------------------------------------------------------------------- tables


def score_rows(runs: list[dict[str, dict]]) -> list[dict]:
    """Mean scores of all models, and the paired difference to the last of the cycle."""
    rows = []
    for model in runs[0]:
        middle, error = over_seeds(runs, model)
        rows.append({"model": model.ljust(24), "score": middle, "se over seeds": error})
    return rows


def seed_rows(runs: dict[Path, dict[str, dict]], T: int) -> list[dict]:
    """For each run the paired differences that the claims are about."""
    rows = []
    for run, results in runs.items():
        row = {"seed": load_json(run / "config.json")["seed"]}
        row |= {f"M_{t}": results[f"M_{t}"]["score"] for t in range(T + 1)}
        last = f"M_{T}"
        pairs = [(f"M_{t}", f"M_{t - 1}") for t in range(1, T + 1)]
        pairs += [(last, control) for control in POINTS if control in results]
        for model, other in pairs:
            gain, error = difference(results[other], results[model])
            row[f"{model} - {other}"] = f"{gain:+.3f} ({error:.3f})"
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------- the picture


def picture(runs: list[dict[str, dict]], T: int, beside: dict[str, list[dict]]) -> str:
    """An SVG of scores 0 .. 1 by iteration, with standard errors over random seeds.

    beside: name -> results of further runs, drawn as dashed lines.
    """
    parts = [axes(T)]
    labels = []
    for name, (colour, _) in LINES.items():
        points = [over_seeds(runs, model) for model in lines_of(runs[0], T, name)]
        parts.append(line(points, colour, T))
        labels.append((points[-1][0], name, colour))
    for name, others in beside.items():
        points = [over_seeds(others, f"M_{t}") for t in range(T + 1)]
        parts.append(line(points, "#1f6feb", T, dashed=True))
        labels.append((points[-1][0], name, "#1f6feb"))
    best = next((model for model in runs[0] if model.startswith("best of")), None)
    colours = POINTS | ({best: "#000"} if best else {})
    for name, colour in colours.items():
        if name in runs[0]:
            middle, error = over_seeds(runs, name)
            parts.append(point(T, middle, error, colour, T))
            labels.append((middle, name, colour))
    parts += write_labels(labels)
    return "\n".join(parts) + "</svg>\n"


def x_of(t: float, T: int) -> float:
    return 50 + 380 * t / T


def y_of(score: float) -> float:
    return 330 - 310 * score


def axes(T: int) -> str:
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="680" height="370" font-family="sans-serif" '
        'font-size="12" style="background: white">'
    ]
    for tenth in range(0, 11, 2):
        y = y_of(tenth / 10)
        parts.append(
            f'<path d="M50 {y}H430" stroke="#ddd"/>'
            f'<text x="42" y="{y + 4}" text-anchor="end">{tenth / 10:.1f}</text>'
        )
    for t in range(T + 1):
        parts.append(f'<text x="{x_of(t, T)}" y="350" text-anchor="middle">{t}</text>')
    parts.append('<text x="240" y="366" text-anchor="middle">iteration t</text>')
    parts.append('<text x="50" y="12">held-out score of M_t</text>')
    return "\n".join(parts)


def line(points: list[tuple[float, float]], colour: str, T: int, dashed: bool = False) -> str:
    """A line through the points (mean, standard error) at t = 0 .. T."""
    path = " ".join(f"{x_of(t, T):.1f},{y_of(mean):.1f}" for t, (mean, _) in enumerate(points))
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    drawn = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
    for t, (middle, error) in enumerate(points):
        drawn.append(point(t, middle, error, colour, T))
    return "\n".join(drawn)


def point(t: int, middle: float, error: float, colour: str, T: int) -> str:
    x = x_of(t, T)
    low, high = y_of(middle - error), y_of(middle + error)
    return (
        f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>'
        f'<circle cx="{x:.1f}" cy="{y_of(middle):.1f}" r="3.5" fill="{colour}"/>'
    )


def write_labels(labels: list[tuple[float, str, str]]) -> list[str]:
    """Names at the right, at the heights of their last points but at least 15 units apart."""
    drawn = []
    lowest = 0.0
    for score, name, colour in sorted(labels, reverse=True):
        y = max(y_of(score) + 4, lowest + 15)
        lowest = y
        text = f"{name}  {score:.3f}"
        drawn.append(f'<text x="445" y="{y:.1f}" fill="{colour}">{text}</text>')
    return drawn


# ---------------------------------------------------------------------------------- the command


def main(args: argparse.Namespace) -> dict:
    runs = {run: results_of(run) for run in args.runs}
    T = load_json(args.runs[0] / "config.json")["iters"]
    beside = {}
    for name, *folders in args.beside:
        beside[name] = [results_of(Path(folder)) for folder in folders]
    tables = {"scores": score_rows(list(runs.values())), "seeds": seed_rows(runs, T)}
    for name, others in beside.items():
        for t in range(T + 1):
            middle, error = over_seeds(others, f"M_{t}")
            model = f"{name}, M_{t}".ljust(24)
            tables["scores"].append({"model": model, "score": middle, "se over seeds": error})
    for rows in tables.values():
        print(table(rows), end="\n\n")
    if args.svg:
        write_text(args.svg, picture(list(runs.values()), T, beside))
    write_figures(args.json, tables)
    return {"runs": len(runs), "M_T": over_seeds(list(runs.values()), f"M_{T}")[0]}


if __name__ == "__main__":
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="finished runs with controls, one a random seed")
    help_text = "further runs, drawn as a dashed line: its name, and one run a random seed"
    add("--beside", nargs="+", action="append", default=[], metavar="NAME DIR", help=help_text)
    add("--svg", type=Path, help="write the picture there")
    add_json_flag(parser)
    finish(main, parser.parse_args(sys.argv[1:]))
