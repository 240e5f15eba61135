"""Two checkpoints on any prompts: how often the answers of --model are better than those of --against.

score is the win rate in percent, a draw counts one half. By a judge (--judge) both orders of each pair are played, a slight
win counts as much as a large one, and a game without a verdict is a draw, counted as malformed; by a scorer (--scorer,
as in reward.py) the answer with the higher score wins. Both models
draw with the same random numbers.

prompts.jsonl {prompt | messages} -> answers.jsonl, against.jsonl, games.jsonl, verdicts.jsonl, result.json in --out

    python -m eval.head_to_head --model DIR --against OTHER_DIR --data prompts.jsonl --judge gpt-4.1
    torchrun --nproc-per-node 8 -m eval.head_to_head --model DIR --against OTHER_DIR --data prompts.jsonl --scorer REWARD_DIR
"""

import json
from dataclasses import dataclass
from pathlib import Path

from data import (
    Common,
    InputError,
    command,
    find_model,
    on_first,
    read_jsonl,
    say,
    write_jsonl,
    write_text,
)
from eval.answers import answer, first, need, place, words
from eval.judge import Judge, JudgeOptions, pairwise, question_of
from eval.report import table
from eval.stats import mean, standard_error
from reward import load_scorer, score_pairs
from sample import SampleOptions

NEEDS = ("against", "data")  # what a run of loop.py must give in --eval-options


@dataclass(kw_only=True)
class Options(JudgeOptions, SampleOptions, Common):
    model: str  # checkpoint directory
    against: str = ""  # checkpoint directory of the other model
    data: str = ""  # JSONL of {"prompt"} or {"messages"}
    out: str = ""  # directory to write; empty: eval/head_to_head in the model's
    limit: int = 0  # only the first so many prompts; 0: all
    scorer: str = ""  # instead of --judge: a scorer of reward.py, such as likelihood or a reward-model directory
    base: str = ""  # the model that `likelihood` scores under; empty: --against


def win(p: float | None) -> float:
    """1, 0.5 or 0 for P(the model is better); no verdict is a draw."""
    return 0.5 if p is None or p == 0.5 else float(p > 0.5)


def main(o: Options) -> dict:
    out = place(o, "head_to_head")
    rows = first(
        read_jsonl(need(o.data, "--data", 'a JSONL file of {"prompt"}'), "prompt"), o.limit
    )
    if not o.against:
        raise InputError("--against: give the checkpoint directory of the other model")
    if bool(o.scorer) == bool(o.judge) or o.scorer == "none":
        raise InputError("--judge or --scorer: give one of them")
    other = on_first(find_model, o.against)
    judge = Judge(o, o, out) if o.judge else None
    scorer = load_scorer(o.scorer, o.base or other, o) if o.scorer else None
    ours, theirs = (
        answer(o, rows, o.data, out / name, model)
        for model, name in ((o.model, "answers.jsonl"), (other, "against.jsonl"))
    )
    texts = [[row["response"] for row in side] for side in (ours, theirs)]
    if judge:
        games = pairwise(judge, [question_of(row) for row in rows], *texts, "verdict")
        said = [{"model_first": a, "other_first": b} for a, b in games]
    else:
        scores = list(zip(*score_pairs(scorer, ours, theirs), strict=True))
        games = [(0.5 + (a > b) / 2 - (a < b) / 2,) * 2 for a, b in scores]
        said = [{"score": a, "other_score": b} for a, b in scores]
    on_first(
        write_jsonl,
        out / "games.jsonl",
        [{"id": row["id"], **line} for row, line in zip(rows, said, strict=True)],
    )
    wins = [sum(map(win, pair)) / 2 for pair in games]
    result = {
        "score": 100 * mean(wins),
        "se": 100 * standard_error(wins),
        "prompts": len(rows),
        "wins": sum(w > 0.5 for w in wins),
        "draws": wins.count(0.5),
        "losses": sum(w < 0.5 for w in wins),
        "words": words(texts[0]),
        "other_words": words(texts[1]),
        **(judge.usage() if judge else {}),
    }
    say(
        table(
            [
                {
                    "head to head": f"{Path(o.model).name} against {Path(o.against).name}",
                    "win rate": result["score"],
                    **{
                        name: value
                        for name, value in result.items()
                        if name not in ("score", "judge_replies", "judge_usd")
                    },
                }
            ]
        )
    )
    on_first(lambda: write_text(out / "result.json", json.dumps(result, indent=1)))
    return result


if __name__ == "__main__":
    command(main, Options)
