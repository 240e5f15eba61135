"""Preference pairs out of several responses to a prompt: the best against the worst.

The first of the best and the last of the worst are taken, so that equal scores give two texts and
the strict threshold drops them. An empty response takes no part, nor does one that the scorer
cannot read. One that the token limit cut off
may be rejected; the filter drops the pair where it would be chosen, as in pairs.py. The stage's
counts say how many responses these were, and how many prompts had fewer than two others.
"""

from pathlib import Path

from checkpoint import Checkpoint
from formats.records import read_jsonl
from pairs import PairOptions, keep_pairs
from plumbing.files import InputError, JsonlPath
from plumbing.stage import Stage
from scorers.base import NO_REVISION, Revision
from scorers.load import load_scorer, scorer_files

Scored = tuple[float, dict]  # (score, response)
RECORDED = "recorded"  # as --pairs.scorer: the field `score` of the records


def rank_pairs(
    samples: Path,  # JSONL of responses, several to a prompt
    out: JsonlPath,  # JSONL of pairs to write
    o: PairOptions,  # its scorer ranks; RECORDED: scores that the records have
    base: Checkpoint | None = None,  # M_0: the model that `likelihood` and `settled` score under
    t: int = 1,  # iteration: recorded in the pairs
    revision: Revision = NO_REVISION,  # how the improver is asked, for `settled`
) -> Path:
    """Stage: pairs of the best response to each prompt and the worst, where the filter agrees."""
    stage = Stage(
        out,
        o,
        samples=samples,
        base=base,
        iteration=t,
        **(revision if o.scorer == "settled" else NO_REVISION).identity,
        scorer_files=[] if o.scorer == RECORDED else scorer_files(o.scorer),
    )
    if stage.done:
        return out
    scorer = recorded
    if o.scorer != RECORDED:
        scorer = load_scorer(o.scorer, base, o.run, stage.scratch / "scores", True, revision)
    every = read_jsonl(samples, "prompt")
    rows = [row for row in every if row["response"]]
    if not rows:
        raise InputError(f"{samples}: every response is empty; look at the model that wrote them")

    # the best and the worst of each prompt
    values = list(scorer(rows))
    ranked = best_and_worst(rows, values)
    pairs = [(good, bad) for (_, good), (_, bad) in ranked]
    scores = [[score for score, _ in side] for side in zip(*ranked, strict=True)] or [[], []]
    prompts = {row["id"] for row in every}
    left_out = {
        "empty_responses": len(every) - len(rows),
        "unscored_responses": values.count(None),
        "lonely": len(prompts) - len(pairs),
    }
    return keep_pairs(stage, pairs, scores, scorer, o, t, **left_out)


def recorded(rows: list[dict]) -> list[float]:
    return [row["score"] for row in rows]


def best_and_worst(rows: list[dict], scores: list[float | None]) -> list[tuple[Scored, Scored]]:
    """The first of the best and the last of the worst, for each prompt with two scores or more."""
    by_prompt: dict[str, list[Scored]] = {}
    for row, score in zip(rows, scores, strict=True):
        response = {name: value for name, value in row.items() if name != "sample"}
        if score is not None:
            by_prompt.setdefault(row["id"], []).append((score, response))
    ranked = []
    for scored in by_prompt.values():
        if len(scored) > 1:
            best = max(scored, key=lambda one: one[0])
            worst = min(reversed(scored), key=lambda one: one[0])
            ranked.append((best, worst))
    return ranked
