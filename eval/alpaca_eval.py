"""AlpacaEval 2: how often a judge prefers the model's answers to a baseline's, at equal length.

score is the length-controlled win rate in percent, win_rate the plain mean preference (a draw
counts one half). The former is fitted: logit P(win) = theta * tanh((len_baseline - len_model) /
std of that difference) + psi * difficulty + phi, then averaged with the length term at 0. Without
--difficulty there is no psi, and a model far from the baseline comes out too high: by 6.9 points
on average over 11 published models (at most 22.7), by 0.7 (1.8) with estimated difficulties
(--annotations prints it). For prompts of your own choose a baseline of similar length, and look
at the win rate too.

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
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint import Checkpoint
from eval.answers import JudgedOptions, answer, first, need, place
from eval.stats import bootstrap, logistic, mean, sigmoid, standard_error
from eval.table import table
from plumbing.options import cli
from plumbing.ranks import on_rank0, print0
from plumbing.records import InputError, load_json, write_json, write_jsonl, write_text
from scorers.llm_judge import Judge, pairwise

SOURCE = (
    "the baseline's outputs as a JSON list of {instruction, output}, from the repository "
    "tatsu-lab/alpaca_eval: results/gpt4_1106_preview/model_outputs.json"
)
NEEDS = ("data", "judge")  # what a run of loop.py must give in --eval-options
PUBLISHED = ("win_rate", "standard_error", "length_controlled_winrate")  # columns of --leaderboard


@dataclass(frozen=True, kw_only=True)
class Options(JudgedOptions):
    model: Checkpoint | None = None  # checkpoint directory
    data: Path | None = None  # JSON list of {"instruction", "output"}: prompts, baseline's answers
    out: Path | None = None  # directory to write; empty: MODEL/eval/alpaca_eval
    limit: int = 0  # use only the first N prompts; 0: all
    max_new_tokens: int = 2048  # limit per answer
    difficulty: Path | None = None  # CSV of index, difficulty of each prompt; adds the psi term
    annotations: Path | None = None  # CSV (.gz): model, index, preference, len_1, len_2; see --help
    leaderboard: Path | None = None  # CSV of published figures; see --help


# ---------------------------------------------------------------------------------- statistics


def length_controlled(preference, len_model, len_baseline, difficulty=None) -> float:
    """Mean win probability at equal lengths, in percent.

    preference (N,) in [0, 1]; lengths (N,) in characters; difficulty (N,) or None.
    """
    gap = np.asarray(len_baseline, float) - np.asarray(len_model, float)
    # a constant gap cannot be told from skill
    length = np.tanh(gap / gap.std()) if gap.std() else 0 * gap
    others = [] if difficulty is None else [np.asarray(difficulty, float)]
    rest = np.stack([np.ones(len(gap)), *others], 1)  # (N, 1 or 2)
    b = logistic(np.hstack([length[:, None], rest]), preference)
    return float(100 * sigmoid(rest @ b[1:]).mean())


def statistics(preference, len_model, len_baseline, difficulty=None) -> dict[str, float]:
    """All numbers of a model; the standard error of score is by 100 bootstraps over prompts."""
    # columns of equal length, so that a bootstrap takes the same rows of each
    columns = [preference, len_model, len_baseline, difficulty]
    columns = [np.asarray(column, float) for column in columns if column is not None]
    preference = columns[0]

    def score(i) -> float:
        return length_controlled(*(column[i] for column in columns))

    return {
        "score": length_controlled(*columns),
        "se": float(bootstrap(score, len(preference)).std(ddof=1)),
        "win_rate": 100 * float(preference.mean()),
        "win_rate_se": 100 * standard_error(preference),
        "characters": float(columns[1].mean()),
        "baseline_characters": float(columns[2].mean()),
        "prompts": len(preference),
    }


def read_csv(path: Path | None, *fields: str) -> list[dict]:
    """Rows of a CSV file, gzipped or not; the first column may have no name."""
    columns = "a CSV file with the columns " + ", ".join(fields)
    path = need(path, "--annotations, --leaderboard or --difficulty", columns)
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    rows = list(csv.DictReader(io.StringIO(raw.decode())))
    for name in fields:
        if not rows or name not in rows[0]:
            raise InputError(f"{path}: has no rows with the column {name!r}; give {columns}")
    return rows


def read_difficulty(path: Path | None, n: int) -> np.ndarray | None:
    """Difficulties (n,) by prompt, None without a file. n = 0: as many as there are."""
    if path is None:
        return None
    rows = read_csv(path, "index")
    name = next(column for column in rows[0] if column not in ("index", ""))
    values = {int(row["index"]): float(row[name]) for row in rows}
    if n and values.keys() != set(range(n)):
        problem = f"holds {len(values)} difficulties for {n} prompts"
        raise InputError(f"{path}: {problem}; give one for each, or none")
    return np.array([values[i] for i in sorted(values)])


# ---------------------------------------------------------------------------------- reproduction


def reproduce(o: Options) -> dict[str, float]:
    """Our numbers from published annotations beside the published ones; returns their errors."""
    annotations = read_csv(o.annotations, "model", "index", "preference", "len_1", "len_2")
    annotations = [row for row in annotations if row["preference"] not in ("", "nan")]
    difficulty = read_difficulty(o.difficulty, 0)
    rows = []
    for published in read_csv(o.leaderboard, *PUBLISHED):
        # of one model: our numbers from its annotations, whose preferences lie between 1 and 2
        name = next(iter(published.values()))
        mine = [row for row in annotations if row["model"] == name]
        if not mine:
            problem = f"holds no annotations of {name}, which {o.leaderboard} lists"
            raise InputError(f"{o.annotations}: {problem}")
        preference = [float(row["preference"]) - 1 for row in mine]
        ours, theirs = ([float(row[column]) for row in mine] for column in ("len_2", "len_1"))
        indices = [int(row["index"]) for row in mine]
        hard = None if difficulty is None else difficulty[indices]
        s = statistics(preference, ours, theirs, hard)

        # the published ones
        win_rate, se, lc = (float(published[column]) for column in PUBLISHED)
        row = {"model": name, "win rate": s["win_rate"], "published": win_rate}
        row |= {"se": s["win_rate_se"], "published ": se}
        row |= {"LC": s["score"], "LC se": s["se"], "published  ": lc, "error": s["score"] - lc}
        rows.append(row)
    print0(table(rows))
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
        for field in ("instruction", "output"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                where = f"{path}: record {number}"
                raise InputError(f"{where}: field {field!r} is missing or not text; give {SOURCE}")
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
    prompts = [{"id": str(i), "prompt": row["instruction"]} for i, row in enumerate(baseline)]
    answers = answer(o, prompts, out / "answers.jsonl", [o.data])
    ours = [row["response"] for row in answers]
    theirs = [row["output"] for row in baseline]
    on_rank0(write_official, out / "model_outputs.json", o.model.name, baseline, ours)
    questions = [row["instruction"] for row in baseline]
    games = pairwise(judge, questions, ours, theirs, "choice")
    on_rank0(
        write_jsonl,
        out / "games.jsonl",
        [{"index": i, "model_first": a, "baseline_first": b} for i, (a, b) in enumerate(games)],
    )

    # a lone comparison would count the bias of its position
    judged = [i for i, pair in enumerate(games) if None not in pair]
    if not judged:
        problem = "no pair has verdicts in both orders"
        raise InputError(f"--judge {o.judge}: {problem}; see {judge.malformed_path}")
    result = statistics(
        [sum(games[i]) / 2 for i in judged],
        [len(ours[i]) for i in judged],
        [len(theirs[i]) for i in judged],
        None if difficulty is None else difficulty[judged],
    )
    torn = sum((games[i][0] > 0.5) != (games[i][1] > 0.5) for i in judged)
    result |= {
        "order_decided": torn / len(judged),
        "left_out": len(games) - len(judged),
        **judge.usage(),
    }
    show(o.model.name, result, difficulty is not None)
    on_rank0(write_json, out / "result.json", result)
    return result


def write_official(path: Path, name: str, baseline: list[dict], ours: list[str]) -> None:
    """The file of outputs that alpaca_eval's own judging reads."""
    rows = []
    for row, text in zip(baseline, ours, strict=True):
        official = {"dataset": row.get("dataset", ""), "instruction": row["instruction"]}
        rows.append({**official, "output": text, "generator": name})
    write_text(path, json.dumps(rows, indent=1, ensure_ascii=False))


def show(name: str, result: dict, has_difficulty: bool) -> None:
    shown = ("se", "win_rate", "win_rate_se", "characters", "baseline_characters", "prompts")
    row = {"AlpacaEval 2": name, "LC win rate": result["score"]}
    row |= {key: result[key] for key in (*shown, "malformed")}
    print0(table([row]))
    if not has_difficulty and not 30 <= result["win_rate"] <= 77:
        problem = "the length-controlled win rate is several points off outside of 30 to 77 %"
        print0(f"Without --difficulty {problem}.")


if __name__ == "__main__":
    cli(main)
