"""Sampling-Ranking, the baseline of SynPO's appendix C.5: choose among samples, rewrite none.

Iteration t: prompts as in SynPO; n = 5 responses of M_{t-1} to each; the scorer's best is chosen,
its worst rejected; preference optimisation.

What the paper does not state is as in SynPO's paper here, each with its option. M_t starts from M_0
(--start), on the pairs of all iterations (--data), with reference M_0. The temperature is SynPO's
(--answers.temperature). A pair needs a gap above --pairs.threshold, so equal scores make none.

What differs: the loss is DPO unless --policy.loss says simpo, as the paper does; the scorer is
likelihood, or --pairs.scorer, in place of PairRM or ArmoRM; SynPO's filter of repetitive and
cut-off responses applies; pairs that are dropped are not made up for, so there may be fewer than
SynPO's. Gold responses train G only.

    python -m methods.sampling_ranking                      the demo
    torchrun --nproc-per-node 8 -m -- methods.sampling_ranking --config FILE --model DIR \\
        --seeds seeds.jsonl --corpus corpus.txt
"""

from dataclasses import dataclass
from pathlib import Path

import loop
from dpo import train_policy
from loop import Run, boost, new_prompts, prepare
from methods.checks import need_several, refuse
from methods.ranking import rank_pairs
from plumbing.files import InputError
from plumbing.options import RunOptions, cli
from plumbing.ranges import Count
from sample import sample
from scorers.load import load_scorer


@dataclass(frozen=True, kw_only=True)
class RankingOptions:
    run: RunOptions = RunOptions()
    samples: Count = 5  # responses per prompt


@dataclass(frozen=True, kw_only=True)
class Options(loop.Options):
    out: Path = Path("runs/sampling_ranking")  # run directory; rerun the same command to resume
    rejected: str = "previous"  # fixed: the worst response of M_{t-1}
    ranking: RankingOptions = RankingOptions()


def iteration(run: Run, t: int) -> None:
    """One iteration: M_{t-1} -> M_t."""
    o, it = run.o, run.iter(t)
    M_0, M_prev = run.model(0), run.model(t - 1)

    # G <- SFT(M_0) on seeds: keywords -> prompt;   x ~ G(. | 3 keywords)
    x = new_prompts(run, t)

    # y_1 .. y_n ~ M_{t-1}(. | x)
    n = o.ranking.samples
    y = sample(M_prev, x, it / "samples.jsonl", o.answers, samples=n, purpose=f"answers {t}")

    # D += (x, chosen the best y, rejected the worst y) where the filter agrees
    rank_pairs(y, it / "pairs.jsonl", o.pairs, M_0, t, o.improver.revision)
    D = run.every("pairs.jsonl", t) if o.data == "cumulative" else [it / "pairs.jsonl"]

    # M_t <- preference optimisation of M_0 on D, reference M_0
    start = M_0 if o.start == "base" else M_prev
    train_policy(start, D, run.model(t), o.policy, reference=M_0, cache=run.cache)


def main(o: Options) -> dict:
    refuse(o, "rejected", "more_pairs")
    need_several(o.ranking.samples, "--ranking.samples")
    if o.pairs.scorer == "none":
        raise InputError("--pairs.scorer none: responses are ranked by their scores; name a scorer")
    o = prepare(o)
    if o.one_shot:
        o = o.at_once()
    # one that compares is refused
    load_scorer(o.pairs.scorer, o.model, o.run, single=True, revision=o.improver.revision)
    return boost(iteration, Run(o, o.out, o.out))


if __name__ == "__main__":
    cli(main, default_config="recipes/methods/sampling_ranking.toml")
