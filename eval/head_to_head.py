"""Two checkpoints on any prompts: how often --model answers better than --against.

score is the win rate in percent, a draw counts one half. With a judge (--judge) both orders of
each pair are compared, a slight win counts as much as a large one, and a comparison without a
verdict is a draw, counted as malformed; with a scorer (--scorer, as in pairs.py) the answer with
the higher score wins, and a pair that it cannot read is a draw, counted as not_scored. Both models
are sampled with the same random numbers.

prompts.jsonl {prompt | messages} -> answers.jsonl, against.jsonl, games.jsonl, verdicts.jsonl,
result.json in --out

    python -m eval.head_to_head --model DIR --against OTHER_DIR --data prompts.jsonl --judge gpt-4.1
    torchrun --nproc-per-node 8 -m eval.head_to_head --model DIR --against OTHER_DIR \\
        --data prompts.jsonl --scorer REWARD_DIR
"""

from dataclasses import dataclass
from pathlib import Path

from checkpoint import Checkpoint
from eval.answers import JudgedOptions, answer, first, need, place, words
from eval.stats import mean, standard_error, wins
from eval.table import table
from formats.records import conversation_text, read_jsonl
from plumbing.files import InputError, write_json, write_jsonl
from plumbing.options import cli
from plumbing.ranges import Whole
from plumbing.ranks import on_rank0, print0
from scorers.base import score_pairs
from scorers.llm_judge import Judge, pairwise
from scorers.load import load_scorer

NEEDS = ("against", "data")  # what a run of loop.py must give in --eval-options


@dataclass(frozen=True, kw_only=True)
class Options(JudgedOptions):
    model: Checkpoint  # checkpoint directory
    against: Checkpoint | None = None  # checkpoint directory of the other model
    data: Path | None = None  # JSONL of {"prompt"} or {"messages"}
    out: Path | None = None  # directory to write; empty: MODEL/eval/head_to_head
    limit: Whole = 0  # use only the first N prompts; 0: all
    scorer: str = ""  # instead of --judge: a scorer, such as likelihood or a reward-model directory
    base: Checkpoint | None = None  # model under which `likelihood` scores; empty: --against


def win(p: float | None) -> float:
    """1, 0.5 or 0 for P(the model is better); no verdict is a draw."""
    return 0.5 if p is None or p == 0.5 else float(p > 0.5)


def main(o: Options) -> dict:
    # all that can fail comes before the answers
    out = place(o, "head_to_head")
    need(o.data, "--data", 'a JSONL file of {"prompt"}')
    prompts = first(read_jsonl(o.data, "prompt"), o.limit)
    if not o.against:
        raise InputError("--against: give the checkpoint directory of the other model")
    if bool(o.scorer) == bool(o.judge) or o.scorer == "none":
        raise InputError("--judge or --scorer: give exactly one of them")
    judge = Judge(o, out) if o.judge else None
    scorer = load_scorer(o.scorer, o.base or o.against, o.run) if o.scorer else None

    # answer with both models, then compare
    ours = answer(o, prompts, out / "answers.jsonl", [o.data])
    theirs = answer(o, prompts, out / "against.jsonl", [o.data], model=o.against)
    texts = [[row["response"] for row in side] for side in (ours, theirs)]
    if judge:
        names = ("model_first", "other_first")
        questions = [conversation_text(row) for row in ours]
        games = pairwise(judge, questions, *texts, "verdict")
        shares = [(win(a) + win(b)) / 2 for a, b in games]
        more = judge.usage()
    else:
        names = ("score", "other_score")
        scores = score_pairs(scorer, ours, theirs)
        games = zip(*scores, strict=True)
        shares = wins(*scores)
        more = {"not_scored": scores[0].count(None)}
    rows = []
    for row, (a, b) in zip(ours, games, strict=True):
        rows.append({"id": row["id"], names[0]: a, names[1]: b})
    on_rank0(write_jsonl, out / "games.jsonl", rows)

    # count
    result = {
        "score": 100 * mean(shares),
        "se": 100 * standard_error(shares),
        "prompts": len(prompts),
        "wins": sum(share > 0.5 for share in shares),
        "draws": shares.count(0.5),
        "losses": sum(share < 0.5 for share in shares),
        "words": words(texts[0]),
        "other_words": words(texts[1]),
        **more,
    }
    show(f"{o.model.name} against {o.against.name}", result)
    on_rank0(write_json, out / "result.json", result)
    return result


def show(title: str, result: dict) -> None:
    hidden = ("score", "judge_replies", "judge_usd")
    shown = {name: value for name, value in result.items() if name not in hidden}
    print0(table([{"head to head": title, "win rate": result["score"], **shown}]))


if __name__ == "__main__":
    cli(main)
