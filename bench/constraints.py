"""Tables of a finished run of recipes/constraints.toml: held-out scores, pairs, and IFEval.

    python -m eval.ifeval --model runs/constraints/iter3/policy --against M_0_DIR --data FILE
    python -m bench.constraints --run runs/constraints --json docs/figures/constraints.json

IFEval's verdicts are read where eval/ifeval.py leaves them, MODEL/eval/ifeval, for M_0 and every
M_t that has some. Its types of instruction are taken in two groups: those with a relative among the
constraints of the run (NEAR), and the others.
"""

import argparse
import sys
from pathlib import Path

from bench.command import finish, make_parser
from bench.tables import add_json_flag, write_figures
from eval.answers import read_lines
from eval.ifeval import METRICS, compare
from eval.report import evaluations, finished_stages, iteration_rows, score_rows, times
from eval.stats import mean, paired
from eval.table import table
from plumbing.files import load_json

# IFEval's types -> the kind in demo/constraint_kinds.py that is near to it
NEAR = {
    "change_case:english_capital": "capitals",
    "change_case:english_lowercase": "small letters",
    "detectable_format:json_format": "JSON",
    "detectable_format:number_bullet_lists": "dashed",
    "keywords:existence": "word used",
    "keywords:forbidden_words": "word avoided",
    "length_constraints:number_sentences": "sentences",
    "length_constraints:number_words": "few words, many words",
    "startend:end_checker": "closing",
}


def ifeval_rows(ours: list[dict], theirs: list[dict]) -> tuple[list[dict], list[dict]]:
    """(all numbers and the two groups of instructions, every type) of a model against another."""
    rows = compare(ours, theirs)
    metrics, types = rows[: len(METRICS)], rows[len(METRICS) :]
    groups = {"near to a trained kind": True, "without a relative": False}
    for label, near in groups.items():
        metrics.append({"IFEval": label, **of_group(ours, theirs, near)})
    return metrics, types


def of_group(ours: list[dict], theirs: list[dict], near: bool) -> dict:
    """Instructions followed strictly, of the types that are near or of the others."""
    prompts, mine, others = [], [], []
    for row, other in zip(ours, theirs, strict=True):
        strict = METRICS["instruction_strict"]
        for name, followed, before in zip(
            row["instructions"], row[strict], other[strict], strict=True
        ):
            if (name in NEAR) == near:
                prompts.append(row["id"])
                mine.append(followed)
                others.append(before)
    shown = {"number": len(mine), "ours": mean(mine), "theirs": mean(others)}
    return {**shown, **paired(mine, others, prompts)}


def answer_rows(scores: dict[str, list[dict]]) -> list[dict]:
    """What answers to IFEval are like."""
    rows = []
    for model, found in scores.items():
        cut_off = sum(row["cut_off"] for row in found)
        words = mean([row["words"] for row in found])
        rows.append({"model": model, "words": words, "cut off": cut_off})
    return rows


def main(args: argparse.Namespace) -> dict:
    run, o = args.run, load_json(args.run / "config.json")
    T = o["iters"]
    folders = [run / f"iter{t}" for t in range(1, T + 1)]
    tables = {
        "scores": score_rows(evaluations(run, T), T),
        "iterations": iteration_rows(folders, times(finished_stages(run))),
    }

    # IFEval
    places = {"M_0": Path(o["model"]), **{f"M_{t}": f / "policy" for t, f in enumerate(folders, 1)}}
    scores = {}
    for model, place in places.items():
        path = place / "eval/ifeval/scores.jsonl"
        if path.is_file():
            scores[model] = read_lines(path)
    for model, found in scores.items():
        if model != "M_0":
            tables[f"ifeval-{model}"], tables[f"types-{model}"] = ifeval_rows(found, scores["M_0"])
    tables["answers"] = answer_rows(scores)
    for name, rows in tables.items():
        print(f"\n{name}\n{table(rows)}")
    write_figures(args.json, tables)
    return {"models": list(scores)}


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a finished run")
    add_json_flag(parser)
    finish(main, parser.parse_args(sys.argv[1:]))
