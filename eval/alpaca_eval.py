"""AlpacaEval 2: how often a judge prefers the model's answers to a baseline's, at equal length.

score is the length-controlled win rate in percent, win_rate the plain mean preference (a draw
counts one half). The former is fitted: logit P(win) = theta * tanh((len_baseline - len_model) /
std of that difference) + psi * difficulty + phi, then averaged with the length term at 0. Without
--difficulty there is no psi, and the score of a model far from the baseline is too high: by 6.9
points on average over 11 published models (at most 22.7), by 0.7 (1.8) with estimated difficulties
(--annotations prints these errors). For your own prompts, choose a baseline of similar length, and
look at the win rate too.

What differs from the official evaluator: both orders of a pair are judged, and their mean is the
preference (official: one order, drawn at random); the fit is a plain logistic regression, without
the penalty and the two length-gamed baselines. Comparable with the leaderboard only with the
official prompt (--judge-prompt) and judge. As there, a pair is left out if a comparison has no
verdict, and counted as malformed.

--data is results/gpt4_1106_preview/model_outputs.json of the repository tatsu-lab/alpaca_eval.
The three files of the last command below are tables made from the same repository: a judge's
preferences for published models, those models' published rates, and how hard each prompt is
(estimated from such preferences).

gpt4_1106_preview_outputs.json -> answers.jsonl, model_outputs.json, games.jsonl, verdicts.jsonl,
result.json in --out

    python -m eval.alpaca_eval --model DIR --judge gpt-4-1106-preview \\
        --data gpt4_1106_preview_outputs.json
    torchrun --nproc-per-node 8 -m eval.alpaca_eval --model DIR --judge JUDGE_DIR \\
        --data gpt4_1106_preview_outputs.json
    python -m eval.alpaca_eval --annotations annotations.csv.gz --difficulty difficulty.csv \\
        --leaderboard leaderboard.csv
"""

import csv
import gzip
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint import Checkpoint
from eval.answers import JudgedOptions, answer, first, need, place
from eval.stats import bootstrap, logistic, mean, sigmoid, standard_error
from eval.table import table
from plumbing.files import InputError, load_json, write_json, write_jsonl, write_text
from plumbing.options import cli
from plumbing.ranges import Count, Whole
from plumbing.ranks import on_rank0, print0
from scorers.llm_judge import Judge, pairwise

SOURCE = (
    "the baseline's outputs as a JSON list of {instruction, output}, from the repository "
    "tatsu-lab/alpaca_eval: results/gpt4_1106_preview/model_outputs.json"
)
NEEDS = ("data", "judge")  # what a run of loop.py must give in --eval-options
ANNOTATED = ("index", "preference", "len_1", "len_2")  # columns of --annotations
PUBLISHED = ("win_rate", "standard_error", "length_controlled_winrate")  # columns of --leaderboard


@dataclass(frozen=True, kw_only=True)
class Options(JudgedOptions):
    model: Checkpoint | None = None  # checkpoint directory
    data: Path | None = None  # JSON list of {"instruction", "output"}: prompts, baseline's answers
    out: Path | None = None  # directory to write; empty: MODEL/eval/alpaca_eval
    limit: Whole = 0  # use only the first N prompts; 0: all
    max_new_tokens: Count = 2048  # limit per answer
    difficulty: Path | None = None  # CSV of index, difficulty of each prompt; adds the psi term
    annotations: Path | None = None  # CSV (.gz): model, index, preference, len_1, len_2; see --help
    leaderboard: Path | None = None  # CSV of published figures; see --help


# ---------------------------------------------------------------------------------- statistics


def length_controlled(preference, len_model, len_baseline, difficulty=0.0) -> float:
    """Mean win probability at equal lengths, in percent.

    preference (N,) in [0, 1]; lengths (N,) in characters; difficulty (N,), or 0 where unknown.
    """
    gap = np.subtract(len_baseline, len_model)
    # a constant gap cannot be separated from skill
    length = np.tanh(gap / gap.std()) if gap.std() else 0 * gap
    X = np.column_stack(np.broadcast_arrays(length, 1.0, difficulty))  # (N, 3)
    b = logistic(X, preference)
    return float(100 * sigmoid(X[:, 1:] @ b[1:]).mean())


def statistics(preference, len_model, len_baseline, difficulty=0.0) -> dict[str, float]:
    """All numbers of a model; the standard error of score is from 100 bootstrap resamples."""
    columns = np.broadcast_arrays(preference, len_model, len_baseline, difficulty)
    return {
        "score": length_controlled(*columns),
        "se": float(bootstrap(length_controlled, *columns).std(ddof=1)),
        "win_rate": 100 * float(np.mean(preference)),
        "win_rate_se": 100 * standard_error(preference),
        "characters": float(np.mean(len_model)),
        "baseline_characters": float(np.mean(len_baseline)),
        "prompts": len(preference),
    }


def read_csv(path: Path | None, *fields: str) -> list[dict[str, str]]:
    """Rows of a CSV file, gzipped or not; the first column may have no name."""
    columns = "a CSV file with the columns " + ", ".join(fields)
    path = need(path, "--annotations, --leaderboard or --difficulty", columns)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in fields:
        if not rows or name not in rows[0]:
            raise InputError(f"{path}: has no rows with the column {name!r}; give {columns}")
    return rows


def read_difficulty(path: Path | None, n: int = 0) -> dict[int, float]:
    """Difficulty by index of the prompt, 0 without a file. n: the number of prompts, if known."""
    if path is None:
        return defaultdict(float)
    rows = read_csv(path, "index")
    name = next(column for column in rows[0] if column not in ("index", ""))
    values = {int(row["index"]): float(row[name]) for row in rows}
    if n and values.keys() != set(range(n)):
        problem = f"holds {len(values)} difficulties for {n} prompts"
        raise InputError(f"{path}: {problem}; give one for each, or none")
    return values


# ---------------------------------------------------------------------------------- reproduction


def reproduce(o: Options) -> dict[str, float]:
    """Our numbers from published annotations beside the published ones; returns their errors."""
    annotations = read_csv(o.annotations, "model", *ANNOTATED)
    annotations = [row for row in annotations if row["preference"] not in ("", "nan")]
    difficulty = read_difficulty(o.difficulty)
    rows = []
    absent = []
    for published in read_csv(o.leaderboard, *PUBLISHED):
        # our numbers for one model; published preferences are between 1 and 2
        name = next(iter(published.values()))
        mine = [[float(row[c]) for c in ANNOTATED] for row in annotations if row["model"] == name]
        if not mine:
            absent.append(name)
            continue
        index, preference, theirs, ours = np.array(mine).T
        s = statistics(preference - 1, ours, theirs, [difficulty[i] for i in index])

        # beside the published numbers
        win_rate, se, lc = (float(published[column]) for column in PUBLISHED)
        row = {
            "model": name,
            "win rate": s["win_rate"],
            "published": win_rate,
            "se": s["win_rate_se"],
            "published ": se,
            "LC": s["score"],
            "LC se": s["se"],
            "published  ": lc,
            "error": s["score"] - lc,
        }
        rows.append(row)
    if not rows:
        problem = f"holds annotations of none of the models of {o.leaderboard}"
        raise InputError(f"{o.annotations}: {problem}; give files of the same models")
    print0(table(rows))
    if absent:
        shown = absent if len(absent) <= 5 else [*absent[:5], "..."]
        why = f"as {o.annotations} has no annotations of them ({len(absent)})"
        print0(f"left out, {why}: {', '.join(shown)}")
    lc = [abs(row["error"]) for row in rows]
    return {
        "models": len(rows),
        "win_rate_error_max": max(abs(row["win rate"] - row["published"]) for row in rows),
        "standard_error_error_max": max(abs(row["se"] - row["published "]) for row in rows),
        "lc_error_mean": mean(lc),
        "lc_error_max": max(lc),
    }


# ---------------------------------------------------------------------------------- the benchmark


def read_baseline(path: Path | None) -> list[dict]:
    path = need(path, "--data", SOURCE)
    rows = load_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path}: not a JSON list; give {SOURCE}")
    for number, row in enumerate(rows, 1):
        texts = [row.get("instruction"), row.get("output")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            problem = "fields 'instruction' and 'output' must be texts"
            raise InputError(f"{path}: record {number}: {problem}; give {SOURCE}")
    return rows


def main(o: Options) -> dict:
    if o.annotations:
        return reproduce(o)
    # all that can fail comes before the answers
    out = place(o, "alpaca_eval")
    baseline = read_baseline(o.data)
    difficulty = read_difficulty(o.difficulty, len(baseline))
    baseline = first(baseline, o.limit)
    judge = Judge(o, out)

    # answer, then judge both orders
    questions = [row["instruction"] for row in baseline]
    theirs = [row["output"] for row in baseline]
    prompts = [{"id": str(i), "prompt": text} for i, text in enumerate(questions)]
    answers = answer(o, prompts, out / "answers.jsonl", [o.data])
    ours = [row["response"] for row in answers]
    on_rank0(write_official, out / "model_outputs.json", o.model.name, baseline, ours)
    games = pairwise(judge, questions, ours, theirs, "choice")
    rows = [{"index": i, "model_first": a, "baseline_first": b} for i, (a, b) in enumerate(games)]
    on_rank0(write_jsonl, out / "games.jsonl", rows)

    # a comparison in one order only would count the judge's position bias
    judged = [i for i, pair in enumerate(games) if None not in pair]
    if not judged:
        problem = "no pair has verdicts in both orders"
        raise InputError(f"--judge {o.judge}: {problem}; see {judge.malformed_path}")
    result = statistics(
        [mean(games[i]) for i in judged],
        [len(ours[i]) for i in judged],
        [len(theirs[i]) for i in judged],
        [difficulty[i] for i in judged],
    )
    result |= {
        "order_decided": mean([(games[i][0] > 0.5) != (games[i][1] > 0.5) for i in judged]),
        "left_out": len(games) - len(judged),
        **judge.usage(),
    }
    show(o, result)
    on_rank0(write_json, out / "result.json", result)
    return result


def write_official(path: Path, name: str, baseline: list[dict], ours: list[str]) -> None:
    """The file of outputs that alpaca_eval's own judging reads."""
    rows = []
    for row, text in zip(baseline, ours, strict=True):
        official = {
            "dataset": row.get("dataset", ""),
            "instruction": row["instruction"],
            "output": text,
            "generator": name,
        }
        rows.append(official)
    write_text(path, json.dumps(rows, indent=1, ensure_ascii=False))


def show(o: Options, result: dict) -> None:
    shown = ("se", "win_rate", "win_rate_se", "characters", "baseline_characters", "prompts")
    numbers = {key: result[key] for key in (*shown, "malformed")}
    print0(table([{"AlpacaEval 2": o.model.name, "LC win rate": result["score"], **numbers}]))
    if not o.difficulty and not 30 <= result["win_rate"] <= 77:
        problem = "the length-controlled win rate is several points off outside 30 to 77 %"
        print0(f"Without --difficulty {problem}.")


if __name__ == "__main__":
    cli(main)
