r"""The filter that turns rewrites and base responses into preference pairs (SynPO section 3.2, F).

What differs from the paper
1. The paper scores with PairRM or ArmoRM. Both work here, as does any sequence-classification
   checkpoint of a supported family with one output; `likelihood` needs no outside model: the mean
   log-prob per token under M_0.
2. Repetition (measure not stated there) is the share of word trigrams that occurred before in the
   same text.
3. A chosen response that the token limit cut off is dropped (--keep-cut-off keeps it): its end
   would be taught as one.

--scorer is a name of scorers/load.py, or a function of yours.

rewrites.jsonl, base_answers.jsonl -> pairs.jsonl {id, prompt, chosen, rejected, scores, iteration}

    python pairs.py --base DIR --chosen rewrites.jsonl --rejected answers.jsonl --out pairs.jsonl
    torchrun --nproc-per-node 8 pairs.py --scorer REWARD_DIR --chosen rewrites.jsonl \
        --rejected answers.jsonl --out pairs.jsonl
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from checkpoint import Checkpoint
from formats.records import conversation_text, read_jsonl, where_of
from plumbing.files import InputError, JsonlPath, digest, rng, write_jsonl
from plumbing.options import RunOptions, cli
from plumbing.ranges import Count, Share, Whole
from plumbing.ranks import on_rank0
from plumbing.stage import Stage
from scorers.base import (
    NO_REVISION,
    Revision,
    Scorer,
    known,
    preference_by,
    quantiles,
    score_gaps,
    score_pairs,
)
from scorers.load import load_scorer, scorer_files


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    run: RunOptions = RunOptions()
    scorer: str = "likelihood"  # see scorers/load.py
    threshold: float = 0.0  # keep pairs with a larger score gap (paper: 0.20 PairRM, 0.02 ArmoRM)
    max_repetition: Share = 0.5  # share of repeated word trigrams allowed in either text
    min_own_words: Whole = 0  # of the chosen text: words that its prompt does not have
    keep_cut_off: bool = False  # keep pairs whose chosen text ended at the token limit
    max_pairs: Count = 10_000  # keep at most N pairs, sampled uniformly


def make_pairs(
    chosen: Path,  # JSONL of responses {"prompt", "response"}
    rejected: Path,  # JSONL of responses to the same prompts, joined by id (and sample)
    out: JsonlPath,  # JSONL of pairs to write
    o: PairOptions,
    base: Checkpoint | None = None,  # M_0: the model that `likelihood` and `settled` score under
    t: Count = 1,  # iteration: recorded in the pairs
    revision: Revision = NO_REVISION,  # how the improver is asked, for `settled`
) -> Path:
    """D += (x, chosen, rejected) where the filter agrees; counts say why others were dropped."""
    stage = Stage(
        out,
        o,
        chosen=chosen,
        rejected=rejected,
        base=base,
        iteration=t,
        **(revision if o.scorer == "settled" else NO_REVISION).identity,
        scorer_files=scorer_files(o.scorer),
    )
    if stage.done:
        return out

    # join both sides and score them
    scorer = load_scorer(o.scorer, base, o.run, stage.scratch / "scores", revision=revision)
    pairs = join(read_jsonl(chosen, answers=True), read_jsonl(rejected, answers=True))
    if not pairs:
        raise InputError(f"{chosen}: none of its ids occurs in {rejected}; give matching files")
    scores = score_pairs(scorer, [good for good, _ in pairs], [bad for _, bad in pairs])
    return keep_pairs(stage, pairs, scores, scorer, o, t)


def keep_pairs(
    stage: Stage,
    pairs: list[tuple[dict, dict]],
    scores: tuple[list, list],
    scorer: Scorer | None,
    o: PairOptions,
    t: int,
    **more: int,
) -> Path:
    """Write the pairs that the filter agrees to. scores: of the chosen and the rejected; more:
    further counts.
    """
    good, bad = scores
    gaps = score_gaps(scores)
    kept = []
    dropped: Counter = Counter()
    for i, pair in enumerate(pairs):
        reason = reason_to_drop(*pair, gaps[i], o)
        if reason:
            dropped[reason] += 1
        else:
            preference = preference_by(scorer, good[i])
            kept.append(make_pair(*pair, good[i], bad[i], t, preference))
    if not kept:
        problem = f"no pair of {len(pairs)} left ({dict(dropped)}); score gaps {quantiles(gaps)}"
        raise InputError(f"{stage.out}: {problem}; lower the threshold, or see docs/your-model.md")
    valid = len(kept)
    kept = draw(kept, o, t)
    on_rank0(write_jsonl, stage.out, kept)
    counts = {"candidates": len(pairs), **dropped, "valid": valid, "pairs": len(kept)}
    return stage.finish(**counts, mean_gap=mean(known(gaps)), **words(kept), **more)


def draw(pairs: list[dict], o: PairOptions, t: int) -> list[dict]:
    """At most max_pairs of the pairs, sampled uniformly, in their order."""
    if len(pairs) <= o.max_pairs:
        return pairs
    drawn = rng(o.run.seed, "pairs", t).sample(range(len(pairs)), o.max_pairs)
    return [pairs[i] for i in sorted(drawn)]


def words(pairs: list[dict]) -> dict[str, float]:
    """Mean words of either side."""
    counts = {}
    for side in ("chosen", "rejected"):
        counts[f"{side}_words"] = mean([len(pair[side].split()) for pair in pairs])
    return counts


def join(chosen: list[dict], rejected: list[dict]) -> list[tuple[dict, dict]]:
    """Records of both sides with the same id and sample. A chosen one that has no samples, such as
    gold, goes with every sample of the other side.
    """
    by_prompt = defaultdict(list)
    for row in rejected:
        by_prompt[row["id"]].append(row)
    pairs = []
    for good in chosen:
        for bad in by_prompt[good["id"]]:
            if conversation_text(good) != conversation_text(bad):
                problem = f"another prompt than that of {where_of(bad)}, which has its id"
                raise InputError(f"{where_of(good)}: {problem} {good['id']!r}; give matching files")
            if "sample" not in good or pair_id(good) == pair_id(bad):
                pairs.append((good, bad))
    return pairs


def pair_id(row: dict) -> str:
    """The record's id; of a further sample, a hash of both."""
    if row.get("sample"):
        return digest(row["id"], row["sample"])
    return row["id"]


def reason_to_drop(good: dict, bad: dict, gap: float | None, o: PairOptions) -> str:
    """Why a pair is not used; empty if it is. gap: of scores, None where there are none."""
    texts = (good["response"], bad["response"])
    if texts[0].split() == texts[1].split():
        return "identical"
    if not all(texts):
        return "empty"
    if good.get("finish_reason") == "length" and not o.keep_cut_off:
        return "cut_off"
    if max(map(repetition, texts)) > o.max_repetition:
        return "repetitive"
    if own_words(good) < o.min_own_words:
        return "echo"
    if o.scorer == "none":
        return ""
    if gap is None:
        return "not_scored"
    if not gap > o.threshold:
        return "small_gap"
    return ""


def repetition(text: str) -> float:
    """Share of word trigrams that occurred before in the text; 0 for fewer than four words."""
    words = text.lower().split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    if len(trigrams) < 2:
        return 0.0
    return 1 - len(set(trigrams)) / len(trigrams)


def own_words(row: dict) -> int:
    """How many words of a response do not occur in its prompt."""
    asked = set(re.findall(r"\w+", conversation_text(row).lower()))
    return sum(word not in asked for word in re.findall(r"\w+", row["response"].lower()))


def make_pair(
    good: dict, bad: dict, score_good: float, score_bad: float, t: int, preference: float | None
) -> dict:
    """A record of pairs.jsonl. preference: P(chosen is better), where a judge gave it."""
    pair = {"id": pair_id(bad)}
    written = ("id", "sample", "draft", "response", "finish_reason", "tokens")
    pair |= {name: value for name, value in good.items() if name not in written}
    if preference is not None:
        pair["preference"] = preference
    return {
        **pair,
        "chosen": good["response"],
        "rejected": bad["response"],
        "score_chosen": score_good,
        "score_rejected": score_bad,
        "iteration": t,
    }


def mean(values: list[float]) -> float:
    return round(sum(values) / max(1, len(values)), 4)


if __name__ == "__main__":
    cli(make_pairs)
