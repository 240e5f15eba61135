"""How often scorers agree with the held-out evaluation, on what a finished run asked them to judge.

    python -m bench.scorers --run runs/demo
    python -m bench.scorers --run runs/facts

Two tasks: telling apart two rewrites of one draft (best of n), and telling a rewrite from M_0's own
response to the prompt (the filter of pairs). Only texts with different exact scores count, by the
function `score` in the file of the run's evaluation. The reward model is trained on the control's
pairs from the seeds, so methods/controls.py must have run.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from bench.command import finish, make_parser
from bench.tables import add_json_flag, write_figures
from eval.heldout import by_id, prompt_of
from eval.scorer_accuracy import wilson
from eval.stats import mean, wins
from eval.table import table
from formats.plugins import load_function
from formats.records import read_jsonl
from loop import Options, Run
from plumbing.files import InputError
from plumbing.options import parse_options
from plumbing.ranks import distributed
from scorers.base import Scorer, need_scores
from scorers.classifier import RewardOptions, train_reward
from scorers.load import load_scorer

Pair = tuple[dict, dict]  # (better, worse) responses to one prompt


def responses(run: Run) -> tuple[list[dict], list[dict]]:
    """All rewrites of all iterations, and M_0's responses to the same prompts."""
    rewrites = []
    base = []
    for t in range(1, run.o.iters + 1):
        rows = read_jsonl(run.iter(t) / "rewrites.candidates.jsonl")
        answers = read_jsonl(run.iter(t) / "base_answers.jsonl")
        # an improver's records have the prompt that it read
        for row, answer in zip(rows, by_id(answers, rows), strict=True):
            rewrites.append({**row, **prompt_of(answer)})
        base += answers
    return rewrites, base


def tasks(run: Run) -> dict[str, list[Pair]]:
    """Pairs to tell apart, by task; the exact score says which is better."""
    evaluation, _, _ = run.o.evaluate.partition(":")
    exact = load_function(f"{evaluation}:score")
    rewrites, base = responses(run)
    rows = rewrites + base
    scores = exact(rows)
    scored = defaultdict(list)  # id -> (score, response): rewrites first, M_0's last
    for row, score in zip(rows, scores, strict=True):
        scored[row["id"]].append((score, row))
    found = defaultdict(list)
    for *rewrites, answer in scored.values():
        if len(rewrites) > 1:
            found["rewrite or rewrite"].append(rewrites[:2])
        found["rewrite or M_0's"].append((rewrites[0], answer))
    return {task: better_and_worse(several) for task, several in found.items()}


def better_and_worse(scored: list) -> list[Pair]:
    """Two responses each as (better, worse), where their scores differ."""
    pairs = []
    for two in scored:
        (low, worse), (high, better) = sorted(two, key=lambda response: response[0])
        if low < high:
            pairs.append((better, worse))
    return pairs


def accuracy(scorer: Scorer, pairs: list[Pair]) -> str:
    """Share of pairs whose better text scores higher, and its 95 % interval."""
    sides = [[pair[i] for pair in pairs] for i in (0, 1)]
    right = wins(*(need_scores(scorer(side), side) for side in sides))
    low, high = wilson(sum(right), len(right))
    return f"{mean(right):.3f} ({low:.3f} to {high:.3f})"


def main(args: argparse.Namespace) -> dict:
    o = parse_options(Options, ["--config", str(args.run / "config.json")])
    seed_pairs = args.run / "controls/seed_pairs.jsonl"
    if not seed_pairs.is_file():
        raise InputError(f"{seed_pairs}: no such file; run methods.controls --run {args.run} first")
    found = tasks(Run(o, args.run, args.run))
    reward = RewardOptions(run=o.run, lr=1e-4, epochs=5, batch=8, max_length=o.policy.max_length)
    rows = []
    with distributed():
        model = train_reward(o.model, seed_pairs, args.run / "controls/reward_model", reward)
        for name in ("settled", "likelihood", "reward model"):
            spec = str(model) if name == "reward model" else name
            scorer = load_scorer(spec, o.model, o.run, revision=o.improver.revision)
            row = {"scorer": name.ljust(12)}
            for task, pairs in found.items():
                row[f"{task} ({len(pairs)} pairs)"] = accuracy(scorer, pairs)
            rows.append(row)
    print(table(rows))
    write_figures(args.json, rows)
    return {"pairs": {task: len(pairs) for task, pairs in found.items()}}


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a finished run with controls")
    add_json_flag(parser)
    finish(main, parser.parse_args(sys.argv[1:]))
