"""AlpacaEval 2: how often a judge prefers the model's answers to a baseline's, with the effect of their length taken out.

score is the length-controlled win rate in percent, win_rate the plain mean preference (a draw counts one half). The former
is fitted: logit P(win) = theta * tanh((len_baseline - len_model) / std of that difference) + psi * difficulty + phi, then
averaged with the length term at 0. Without --difficulty there is no psi, and a model far from the baseline comes out too
high: by 6.9 points on average over 11 published models (largest 22.7), by 0.7 (1.8) with estimated difficulties
(--annotations prints it). For prompts of your own use a baseline of similar length, and look at the win rate too.

What differs from the official evaluator: both orders of a pair are judged and their mean is the preference (official: one,
drawn at random); the fit is a plain logistic regression, without the penalty and the two length-gamed baselines. Comparable
with the leaderboard only with the official prompt (--judge-prompt) and judge. As there, a pair is left out where a game has no
verdict, and counted as malformed.

--data is results/gpt4_1106_preview/model_outputs.json of the repository tatsu-lab/alpaca_eval. The three files of the last line
below are tables to be made from the same repository: a judge's preferences for published models, those models' published
rates, and how hard each prompt is (estimated from such preferences).

gpt4_1106_preview_outputs.json -> answers.jsonl, model_outputs.json, games.jsonl, verdicts.jsonl, result.json in --out

    python -m eval.alpaca_eval --model DIR --data gpt4_1106_preview_outputs.json --judge gpt-4-1106-preview
    torchrun --nproc-per-node 8 -m eval.alpaca_eval --model DIR --data gpt4_1106_preview_outputs.json --judge JUDGE_DIR
    python -m eval.alpaca_eval --annotations annotations.csv.gz --difficulty difficulty.csv --leaderboard leaderboard.csv
"""

import csv
import gzip
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import Common, InputError, command, load_json, on_first, say, write_jsonl, write_text
from eval.answers import answer, first, need, place
from eval.judge import Judge, JudgeOptions, pairwise
from eval.report import table
from eval.stats import bootstrap, logistic, sigmoid, standard_error
from sample import SampleOptions

SOURCE = (
    "the baseline's outputs as a JSON list of {instruction, output}, from the repository tatsu-lab/alpaca_eval: "
    "results/gpt4_1106_preview/model_outputs.json"
)
NEEDS = ("data", "judge")  # what a run of loop.py must give in --eval-options


@dataclass(kw_only=True)
class Options(JudgeOptions, SampleOptions, Common):
    model: str = ""  # checkpoint directory
    data: str = ""  # JSON list of {"instruction", "output"}: the prompts and the baseline's answers
    out: str = ""  # directory to write; empty: eval/alpaca_eval in the model's
    limit: int = 0  # only the first so many prompts; 0: all
    max_new_tokens: int = 2048  # limit per answer; a record's own max_new_tokens wins
    difficulty: str = ""  # CSV of index, difficulty: of each prompt in --data; adds the psi term
    annotations: str = ""  # CSV (.gz) of model, index, preference, len_1, len_2: check the statistics on published ones instead
    leaderboard: str = (
        ""  # with --annotations: CSV of model, win_rate, standard_error, length_controlled_winrate
    )


# ---------------------------------------------------------------------------------------------- statistics


def length_controlled(preference, len_model, len_baseline, difficulty=None) -> float:
    """Percent: mean win probability at equal lengths. preference (N,) in [0, 1], lengths (N,) in characters."""
    gap = np.asarray(len_baseline, float) - np.asarray(len_model, float)
    length = (
        np.tanh(gap / gap.std()) if gap.std() else 0 * gap
    )  # a gap that is always the same cannot be told from skill
    rest = np.stack(
        [np.ones(len(gap))] + ([] if difficulty is None else [np.asarray(difficulty, float)]), 1
    )  # (N, 1 or 2)
    b = logistic(np.hstack([length[:, None], rest]), preference)
    return float(100 * sigmoid(rest @ b[1:]).mean())


def statistics(preference, len_model, len_baseline, difficulty=None) -> dict[str, float]:
    """All numbers of a model; the standard error of score by 100 bootstraps over prompts."""
    columns = [np.asarray(c, float) for c in (preference, len_model, len_baseline)] + (
        [] if difficulty is None else [np.asarray(difficulty, float)]
    )
    resampled = bootstrap(lambda i: length_controlled(*(c[i] for c in columns)), len(columns[0]))
    return {
        "score": length_controlled(*columns),
        "se": float(resampled.std(ddof=1)),
        "win_rate": 100 * float(columns[0].mean()),
        "win_rate_se": 100 * standard_error(columns[0]),
        "characters": float(columns[1].mean()),
        "baseline_characters": float(columns[2].mean()),
        "prompts": len(columns[0]),
    }


def read_csv(path: str, *fields: str) -> list[dict]:
    """Rows of a CSV file, gzipped or not; the first column may have no name."""
    need(
        path,
        "--annotations, --leaderboard or --difficulty",
        "a CSV file with the columns " + ", ".join(fields),
    )
    raw = Path(path).read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    for name in fields:
        if not rows or name not in rows[0]:
            raise InputError(
                f"{path}: has no rows with the column {name!r}; give a CSV file with "
                + ", ".join(fields)
            )
    return rows


def read_difficulty(path: str, n: int) -> np.ndarray | None:
    """(n,) by prompt, None without a file."""
    if not path:
        return None
    rows = read_csv(path, "index")
    name = next(column for column in rows[0] if column not in ("index", ""))
    values = {int(row["index"]): float(row[name]) for row in rows}
    if n and values.keys() != set(range(n)):
        raise InputError(
            f"{path}: holds {len(values)} difficulties for {n} prompts; give one for each, or none"
        )
    return np.array([values[i] for i in sorted(values)])


def reproduce(o: Options) -> dict[str, float]:
    """Our numbers from published annotations beside the published ones; returns the errors in points."""
    rows = read_csv(o.annotations, "model", "index", "preference", "len_1", "len_2")
    difficulty = read_difficulty(o.difficulty, 0)
    board = read_csv(o.leaderboard, "win_rate", "standard_error", "length_controlled_winrate")
    lines = []
    for published in board:
        name = next(iter(published.values()))
        mine = [
            row for row in rows if row["model"] == name and row["preference"] not in ("", "nan")
        ]
        if not mine:
            raise InputError(
                f"{o.annotations}: holds no annotations of {name}, which {o.leaderboard} lists"
            )
        columns = [
            np.array([float(row[c]) for row in mine]) for c in ("preference", "len_2", "len_1")
        ]
        columns += [] if difficulty is None else [difficulty[[int(row["index"]) for row in mine]]]
        s = statistics(columns[0] - 1, *columns[1:])
        win_rate, se, lc = (
            float(published[c]) for c in ("win_rate", "standard_error", "length_controlled_winrate")
        )
        lines.append(
            {
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
        )
    say(table(lines))
    off = lambda a, b: [abs(line[a] - line[b]) for line in lines]  # noqa: E731
    lc = off("LC", "published  ")
    return {
        "models": len(lines),
        "win_rate_error_max": max(off("win rate", "published")),
        "standard_error_error_max": max(off("se", "published ")),
        "lc_error_mean": sum(lc) / len(lc),
        "lc_error_max": max(lc),
    }


# ---------------------------------------------------------------------------------------------- the benchmark


def read_baseline(path: str) -> list[dict]:
    rows = load_json(need(path, "--data", SOURCE))
    if not isinstance(rows, list):
        raise InputError(f"{path}: no JSON list; give {SOURCE}")
    for number, row in enumerate(rows, 1):
        for field in ("instruction", "output"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise InputError(
                    f"{path}: record {number}: field {field!r} is missing or no text; give {SOURCE}"
                )
    return rows


def main(o: Options) -> dict:
    if o.annotations:
        return reproduce(o)
    out, everything = place(o, "alpaca_eval"), read_baseline(o.data)
    baseline, difficulty = (
        first(everything, o.limit),
        read_difficulty(o.difficulty, len(everything)),
    )
    judge = Judge(o, o, out)
    answers = answer(
        o,
        [{"id": str(i), "prompt": row["instruction"]} for i, row in enumerate(baseline)],
        o.data,
        out / "answers.jsonl",
    )
    ours, theirs = [row["response"] for row in answers], [row["output"] for row in baseline]
    on_first(
        lambda: write_text(
            out / "model_outputs.json",
            json.dumps(
                [
                    {
                        "dataset": row.get("dataset", ""),
                        "instruction": row["instruction"],
                        "output": text,
                        "generator": Path(o.model).name,
                    }
                    for row, text in zip(baseline, ours, strict=True)
                ],
                indent=1,
                ensure_ascii=False,
            ),
        )
    )
    games = pairwise(judge, [row["instruction"] for row in baseline], ours, theirs, "choice")
    on_first(
        lambda: write_jsonl(
            out / "games.jsonl",
            [{"index": i, "model_first": a, "baseline_first": b} for i, (a, b) in enumerate(games)],
        )
    )
    judged = [
        i for i, pair in enumerate(games) if None not in pair
    ]  # a lone game would count its position's bias
    if not judged:
        raise InputError(
            f"--judge {o.judge}: no pair has verdicts in both orders; see {judge.bad_path}"
        )
    s = statistics(
        [sum(games[i]) / 2 for i in judged],
        [len(ours[i]) for i in judged],
        [len(theirs[i]) for i in judged],
        None if difficulty is None else difficulty[judged],
    )
    torn = sum((games[i][0] > 0.5) != (games[i][1] > 0.5) for i in judged)
    result = {
        **s,
        "order_decided": torn / len(judged),
        "left_out": len(games) - len(judged),
        **judge.usage(),
    }
    say(
        table(
            [
                {
                    "AlpacaEval 2": Path(o.model).name,
                    "LC win rate": s["score"],
                    "se": s["se"],
                    "win rate": s["win_rate"],
                    "se ": s["win_rate_se"],
                    "characters": s["characters"],
                    "baseline's": s["baseline_characters"],
                    "prompts": len(judged),
                    "malformed": result["malformed"],
                }
            ]
        )
    )
    if difficulty is None and not 30 <= s["win_rate"] <= 77:
        say(
            "Without --difficulty the length-controlled win rate is several points off outside of 30 to 77 %."
        )
    on_first(lambda: write_text(out / "result.json", json.dumps(result, indent=1)))
    return result


if __name__ == "__main__":
    command(main, Options)
