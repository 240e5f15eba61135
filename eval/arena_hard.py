"""Arena-Hard: how often a judge prefers the model's answers to 500 hard prompts to those of a baseline (gpt-4-0314).

score is the win rate in percent: two games per prompt with positions swapped, a much better answer ([[A>>B]]) counts three
times, a tie as half a win. As every game is against the baseline, this weighted mean is the win rate that the official
Bradley-Terry fit gives. style_score is a Bradley-Terry fit with the difference in style held at 0: length, headers, lists,
bold. Intervals are of 100 bootstraps.

What differs from the official evaluator: bootstraps draw prompts, as the games of one prompt are not independent; style is
held at the baseline's (official: at the mean over all models on the board, so that a score depends on who else is there);
lengths are counted in words; the judge's prompt is our own unless --judge-prompt gives the official one, and only with that and
the official judge is a score comparable with the leaderboard's. A game without a verdict is left out, as in the official v0.1
(later ones leave out the prompt), and counted as malformed.
--data and --baseline are question.jsonl and model_answer/gpt-4-0314.jsonl in data/arena-hard-v0.1 of the repository
lmarena/arena-hard-auto.

question.jsonl, gpt-4-0314.jsonl -> answers.jsonl, model_answer.jsonl, games.jsonl, verdicts.jsonl, result.json in --out

    python -m eval.arena_hard --model DIR --data question.jsonl --baseline gpt-4-0314.jsonl --judge gpt-4-1106-preview
    torchrun --nproc-per-node 8 -m eval.arena_hard --model DIR --data question.jsonl --baseline gpt-4-0314.jsonl --judge DIR
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import (
    Common,
    InputError,
    command,
    digest,
    on_first,
    read_jsonl,
    say,
    write_jsonl,
    write_text,
)
from eval.answers import answer, first, need, place, read_lines, words
from eval.judge import Judge, JudgeOptions, pairwise
from eval.report import table
from eval.stats import bootstrap, logistic, sigmoid
from sample import SampleOptions

SOURCE = "from the repository lmarena/arena-hard-auto: data/arena-hard-v0.1/"
NEEDS = ("data", "baseline", "judge")  # what a run of loop.py must give in --eval-options


@dataclass(kw_only=True)
class Options(JudgeOptions, SampleOptions, Common):
    model: str  # checkpoint directory
    data: str = ""  # JSONL of questions {"uid", "prompt"}
    baseline: str = ""  # JSONL of the baseline's answers to them
    out: str = ""  # directory to write; empty: eval/arena_hard in the model's
    limit: int = 0  # only the first so many prompts; 0: all
    temperature: float = 0.0  # 0 is greedy
    max_new_tokens: int = 4096  # limit per answer; a record's own max_new_tokens wins
    judge_tokens: int = 4096  # most tokens of a verdict with reasons


# ---------------------------------------------------------------------------------------------- statistics


def outcome(p: float | None) -> tuple[float, float]:
    """(result, weight) of a game from P(the model is better) in steps of a quarter; weight 0 where there is no verdict."""
    return (0.0, 0.0) if p is None else (0.5 + 0.5 * np.sign(p - 0.5), 3.0 if p in (0, 1) else 1.0)


def win_rate(result, weight) -> float:
    """Percent; nan where no game counts."""
    return 100 * float((result * weight).sum() / weight.sum()) if weight.any() else float("nan")


def style(text: str) -> np.ndarray:
    """(4,): words, headers, list items, bold spans; Markdown inside of code blocks does not count."""
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    count = lambda pattern: len(re.findall(pattern, plain, re.MULTILINE))  # noqa: E731
    return np.array(
        [
            len(text.split()),
            count(r"^#{1,6}\s"),
            count(r"^\s*(?:[-*+]|\d+\.)\s"),
            count(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
        ],
        float,
    )


def style_difference(ours: str, theirs: str) -> np.ndarray:
    """(4,): relative difference in length, and of Markdown per word."""
    a, b = style(ours), style(theirs)
    densities = a[1:] / max(1, a[0]), b[1:] / max(1, b[0])
    return np.array(
        [
            (a[0] - b[0]) / max(1, a[0] + b[0]),
            *(densities[0] - densities[1]) / (densities[0] + densities[1] + 1),
        ]
    )


def styled_win_rate(result, weight, difference) -> float:
    """Percent at equal style. result, weight (G,), difference (G, 4), all from the model's side.

    A z-score over both positions of the pair: there every difference comes once with each sign, so its mean is 0, and from
    the model's side what is left is to divide by the root mean square. Centring here would take out what is measured.
    """
    scale = np.sqrt((difference**2).mean(0))
    X = np.hstack([np.ones((len(result), 1)), difference / np.where(scale > 0, scale, 1)])
    return float(100 * sigmoid(logistic(X, result, weight)[0]))


def statistics(games: list[tuple], ours: list[str], theirs: list[str]) -> dict[str, float]:
    """All numbers of a model from P(the model is better) in both games of each prompt, and the answers."""
    result, weight = np.array([[outcome(p) for p in pair] for pair in games]).transpose(
        2, 0, 1
    )  # (P, 2) each
    difference = np.repeat(
        [style_difference(a, b) for a, b in zip(ours, theirs, strict=True)], 2, 0
    ).reshape(len(games), 2, 4)
    plain = lambda i: win_rate(result[i], weight[i])  # noqa: E731
    styled = lambda i: styled_win_rate(
        result[i].ravel(), weight[i].ravel(), difference[i].reshape(-1, 4)
    )  # noqa: E731
    everything, numbers = np.arange(len(games)), {}
    for prefix, statistic in (("", plain), ("style_", styled)):
        drawn = bootstrap(statistic, len(games))
        low, high = np.nanquantile(drawn, (0.025, 0.975))  # a draw may hold no game with a verdict
        numbers |= {
            f"{prefix}score": statistic(everything),
            f"{prefix}se": float(np.nanstd(drawn, ddof=1)),
            f"{prefix}low": float(low),
            f"{prefix}high": float(high),
        }
    return {**numbers, "prompts": len(games), "games": int((weight > 0).sum())}


# ---------------------------------------------------------------------------------------------- the benchmark


def read_answers(path: str) -> dict[str, str]:
    """uid -> answer of an official answer file: with messages (content: a text or {answer}), or the older choices."""
    answers = {}
    for number, row in enumerate(
        read_lines(need(path, "--baseline", f"the baseline's answers, {SOURCE}model_answer/")), 1
    ):
        try:
            said = (
                row["messages"][-1]["content"]
                if "messages" in row
                else row["choices"][0]["turns"][0]["content"]
            )
            answers[row.get("uid", row.get("question_id"))] = (
                said["answer"] if isinstance(said, dict) else said
            )
        except (KeyError, IndexError, TypeError):
            raise InputError(
                f"{path}: line {number}: neither field 'messages' nor 'choices' holds an answer; give the "
                f"official file, {SOURCE}model_answer/"
            ) from None
    return answers


def main(o: Options) -> dict:
    out = place(o, "arena_hard")
    questions = read_jsonl(
        need(o.data, "--data", f"the questions, {SOURCE}question.jsonl"), "uid", "prompt"
    )
    questions = first(questions, o.limit)
    baseline = read_answers(o.baseline)
    if absent := [row["uid"] for row in questions if row["uid"] not in baseline]:
        raise InputError(
            f"{o.baseline}: no answer to question {absent[0]} of {o.data}; give the answers to the same questions"
        )
    judge = Judge(o, o, out)
    answers = answer(
        o,
        [{"id": row["uid"], "prompt": row["prompt"]} for row in questions],
        o.data,
        out / "answers.jsonl",
    )
    ours, theirs = [row["response"] for row in answers], [baseline[row["uid"]] for row in questions]
    on_first(write_official, out, Path(o.model).name, answers)
    games = pairwise(judge, [row["prompt"] for row in questions], ours, theirs, "verdict")
    on_first(
        lambda: write_jsonl(
            out / "games.jsonl",
            [
                {"uid": row["uid"], "model_first": a, "baseline_first": b}
                for row, (a, b) in zip(questions, games, strict=True)
            ],
        )
    )
    said = [p for pair in games for p in pair if p is not None]
    shares = {
        name: said.count(p)
        for name, p in (
            ("much_better", 1.0),
            ("better", 0.75),
            ("tie", 0.5),
            ("worse", 0.25),
            ("much_worse", 0.0),
        )
    }
    result = {
        **statistics(games, ours, theirs),
        **shares,
        "words": words(ours),
        "baseline_words": words(theirs),
        **judge.usage(),
    }
    say(
        table(
            [
                {
                    "Arena-Hard": name,
                    "score": result[f"{prefix}score"],
                    "95 % interval": f"{result[f'{prefix}low']:.1f} to {result[f'{prefix}high']:.1f}",
                    "words": result["words"],
                    "baseline's": result["baseline_words"],
                    "games": result["games"],
                    "malformed": result["malformed"],
                }
                for name, prefix in ((Path(o.model).name, ""), ("at equal style", "style_"))
            ]
        )
    )
    say(table([shares]))
    on_first(lambda: write_text(out / "result.json", json.dumps(result, indent=1)))
    return result


def write_official(out: Path, name: str, answers: list[dict]) -> None:
    """The answer file that arena-hard-auto's own judging reads; the same bytes for the same answers."""
    write_jsonl(
        out / "model_answer.jsonl",
        [
            {
                "uid": row["id"],
                "ans_id": digest(name, row["id"], row["response"]),
                "model": name,
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": {"answer": row["response"]}},
                ],
                "tstamp": (out / "answers.jsonl").stat().st_mtime,
            }
            for row in answers
        ],
    )


if __name__ == "__main__":
    command(main, Options)
