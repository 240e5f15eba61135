"""Arena-Hard: how often a judge prefers the model's answers to gpt-4-0314's, on 500 hard prompts.

score is the win rate in percent: two comparisons per prompt with positions swapped; a much better
answer ([[A>>B]]) counts three times, a tie as half a win. As every comparison is with the
baseline, this weighted mean is the win rate of the official Bradley-Terry fit. style_score is a
Bradley-Terry fit with the difference in style held at 0: length, headers, lists, bold. Intervals
are from 100 bootstrap resamples.

What differs from the official evaluator: the bootstrap resamples prompts, as the comparisons of
one prompt are not independent; style is held at the baseline's (official: at the mean over all
models on the board, so a score depends on who else is there); lengths are counted in words; the
judge's prompt is our own unless --judge-prompt gives the official one, and only with that and the
official judge are scores comparable with the leaderboard's. A comparison without a verdict is
left out, as in the official v0.1 (later versions leave out the prompt), and counted as malformed.

--data and --baseline are question.jsonl and model_answer/gpt-4-0314.jsonl in data/arena-hard-v0.1
of the repository lmarena/arena-hard-auto.

question.jsonl, gpt-4-0314.jsonl -> answers.jsonl, model_answer.jsonl, games.jsonl, verdicts.jsonl,
result.json in --out

    python -m eval.arena_hard --model DIR --data question.jsonl --baseline gpt-4-0314.jsonl \\
        --judge gpt-4-1106-preview
    torchrun --nproc-per-node 8 -m eval.arena_hard --model DIR --data question.jsonl \\
        --baseline gpt-4-0314.jsonl --judge JUDGE_DIR
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint import Checkpoint
from eval.answers import JudgedOptions, answer, first, need, place, read_lines, words
from eval.stats import bootstrap, logistic, sigmoid
from eval.table import table
from formats.records import read_jsonl
from plumbing.files import InputError, digest, write_json, write_jsonl
from plumbing.options import cli
from plumbing.ranges import Count, Temperature, Whole
from plumbing.ranks import on_rank0, print0
from scorers.llm_judge import Judge, pairwise

SOURCE = "from the repository lmarena/arena-hard-auto: data/arena-hard-v0.1/"
NEEDS = ("data", "baseline", "judge")  # what a run of loop.py must give in --eval-options
MARKDOWN = {
    "headers": r"^#{1,6}\s",
    "list items": r"^\s*(?:[-*+]|\d+\.)\s",
    "bold spans": r"\*\*[^*\n]+\*\*|__[^_\n]+__",
}
# P(the model is better) by verdict
OUTCOMES = {"much_better": 1.0, "better": 0.75, "tie": 0.5, "worse": 0.25, "much_worse": 0.0}


@dataclass(frozen=True, kw_only=True)
class Options(JudgedOptions):
    model: Checkpoint  # checkpoint directory
    data: Path | None = None  # JSONL of questions {"uid", "prompt"}
    baseline: Path | None = None  # JSONL of the baseline's answers to them
    out: Path | None = None  # directory to write; empty: MODEL/eval/arena_hard
    limit: Whole = 0  # use only the first N prompts; 0: all
    temperature: Temperature = 0.0  # 0 is greedy
    max_new_tokens: Count = 4096  # limit per answer
    judge_tokens: Count = 4096  # max tokens of a verdict with reasons


# ---------------------------------------------------------------------------------- statistics


def win_rate(result, weight) -> float:
    """Weighted mean in percent; nan where no comparison counts."""
    if not weight.any():
        return np.nan
    return 100 * float((result * weight).sum() / weight.sum())


def style(text: str) -> np.ndarray:
    """(4,): number of words, and of each kind of Markdown outside code blocks."""
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    markdown = [len(re.findall(pattern, plain, re.MULTILINE)) for pattern in MARKDOWN.values()]
    return np.array([len(text.split()), *markdown], float)


def style_difference(ours: str, theirs: str) -> np.ndarray:
    """(4,): relative difference in length, and of Markdown per word."""
    a, b = style(ours), style(theirs)
    for counts in (a, b):
        counts[1:] /= max(1, counts[0])
    # length relative to the sum of both, Markdown to that sum plus 1
    return (a - b) / np.maximum(1, a + b + [0, 1, 1, 1])


def styled_win_rate(result, weight, difference) -> float:
    """Percent at equal style. result and weight (P, 2), difference (P, 2, 4), of the model's side.

    A z-score over both positions of the pair: there every difference comes once with each sign,
    so its mean is 0, and from the model's side one divides by the root mean square. Centring here
    would remove what is measured.
    """
    X = difference.reshape(-1, 4)
    scale = np.sqrt((X**2).mean(0))
    X = np.column_stack([np.ones(len(X)), X / np.where(scale > 0, scale, 1)])
    b = logistic(X, result.ravel(), weight.ravel())
    return float(100 * sigmoid(b[0]))


def statistics(games: list[tuple], ours: list[str], theirs: list[str]) -> dict[str, float]:
    """All numbers of a model, from P(the model is better) in both comparisons of each prompt."""
    p = np.array(games, float)  # (P, 2) for P prompts, nan without a verdict
    result = np.nan_to_num(0.5 + 0.5 * np.sign(p - 0.5))  # (P, 2)
    weight = np.select([np.isnan(p), np.isin(p, (0, 1))], [0.0, 3.0], 1.0)  # (P, 2)
    pairs = zip(ours, theirs, strict=True)
    difference = np.array([[style_difference(a, b)] * 2 for a, b in pairs])  # (P, 2, 4)

    # score, standard error and 95 % interval of both
    numbers = {}
    rates = {
        "": (win_rate, result, weight),
        "style_": (styled_win_rate, result, weight, difference),
    }
    for prefix, (statistic, *columns) in rates.items():
        resampled = bootstrap(statistic, *columns)
        # nan where a resample holds no comparison with a verdict
        low, high = np.nanquantile(resampled, (0.025, 0.975)).tolist()
        numbers |= {
            f"{prefix}score": statistic(*columns),
            f"{prefix}se": float(np.nanstd(resampled, ddof=1)),
            f"{prefix}low": low,
            f"{prefix}high": high,
        }
    return {**numbers, "prompts": len(games), "games": int((weight > 0).sum())}


# ---------------------------------------------------------------------------------- the benchmark


def read_answers(path: Path | None) -> dict[str, str]:
    """uid -> answer of an official answer file.

    Either `messages`, whose content is a text or {answer}, or the older `choices`.
    """
    path = need(path, "--baseline", f"the baseline's answers, {SOURCE}model_answer/")
    answers = {}
    for number, row in enumerate(read_lines(path), 1):
        # a missing field is an error in the file
        try:
            turns = row["messages"] if "messages" in row else row["choices"][0]["turns"][:1]
            said = turns[-1]["content"]
            uid = row.get("uid", row.get("question_id"))
            answers[uid] = said["answer"] if isinstance(said, dict) else said
        except (KeyError, IndexError, TypeError):
            problem = "neither field 'messages' nor 'choices' holds an answer"
            fix = f"give the official file, {SOURCE}model_answer/"
            raise InputError(f"{path}: line {number}: {problem}; {fix}") from None
    return answers


def main(o: Options) -> dict:
    # all that can fail comes before the answers
    out = place(o, "arena_hard")
    need(o.data, "--data", f"the questions, {SOURCE}question.jsonl")
    questions = first(read_jsonl(o.data, "uid", "prompt"), o.limit)
    baseline = read_answers(o.baseline)
    absent = [row["uid"] for row in questions if row["uid"] not in baseline]
    if absent:
        problem = f"no answer to question {absent[0]} of {o.data}"
        raise InputError(f"{o.baseline}: {problem}; give the answers to the same questions")
    judge = Judge(o, out)

    # answer, then judge both orders
    prompts = [{"id": row["uid"], "prompt": row["prompt"]} for row in questions]
    answers = answer(o, prompts, out / "answers.jsonl", [o.data])
    on_rank0(write_official, out, o.model.name, answers)
    ours = [row["response"] for row in answers]
    theirs = [baseline[row["uid"]] for row in questions]
    games = pairwise(judge, [row["prompt"] for row in questions], ours, theirs, "verdict")
    rows = [
        {"uid": row["uid"], "model_first": a, "baseline_first": b}
        for row, (a, b) in zip(questions, games, strict=True)
    ]
    on_rank0(write_jsonl, out / "games.jsonl", rows)

    # count
    verdicts = [p for pair in games for p in pair]
    result = {
        **statistics(games, ours, theirs),
        **{name: verdicts.count(p) for name, p in OUTCOMES.items()},
        "words": words(ours),
        "baseline_words": words(theirs),
        **judge.usage(),
    }
    show(o.model.name, result)
    on_rank0(write_json, out / "result.json", result)
    return result


def show(name: str, result: dict) -> None:
    counts = {key: result[key] for key in ("words", "baseline_words", "games", "malformed")}
    rows = []
    for label, prefix in ((name, ""), ("at equal style", "style_")):
        score, low, high = (result[prefix + key] for key in ("score", "low", "high"))
        interval = f"{low:.1f} to {high:.1f}"
        rows.append({"Arena-Hard": label, "score": score, "95 % interval": interval, **counts})
    print0(table(rows))
    print0(table([{name: result[name] for name in OUTCOMES}]))


def write_official(out: Path, name: str, answers: list[dict]) -> None:
    """The answer file that arena-hard-auto's own judging reads; equal answers give equal bytes."""
    written = (out / "answers.jsonl").stat().st_mtime
    rows = []
    for row in answers:
        question = {"role": "user", "content": row["prompt"]}
        said = {"role": "assistant", "content": {"answer": row["response"]}}
        official = {
            "uid": row["id"],
            "ans_id": digest(name, row["id"], row["response"]),
            "model": name,
            "messages": [question, said],
            "tstamp": written,
        }
        rows.append(official)
    write_jsonl(out / "model_answer.jsonl", rows)


if __name__ == "__main__":
    cli(main)
