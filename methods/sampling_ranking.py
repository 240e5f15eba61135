"""Sampling-Ranking, the baseline of SynPO's appendix C.5: choose among samples, improve none.

Iteration t: prompts as in SynPO; n = 5 responses of M_{t-1} to each; the scorer's best is chosen,
its worst rejected; preference optimisation.

What the paper does not state, and is as in SynPO here, each with its option: M_t starts from M_0
(--start), on the pairs of all iterations (--data), by DPO with reference M_0 (--policy.loss; SynPO:
SimPO); the temperature (--answers.temperature); a pair needs a gap above --pairs.threshold; equal
scores make no pair. It reads no gold response but those that train G.

    python -m methods.sampling_ranking                      the demo
    torchrun --nproc-per-node 8 -m -- methods.sampling_ranking --config FILE --model DIR \\
        --seeds seeds.jsonl --corpus corpus.txt
"""

from dataclasses import dataclass
from pathlib import Path

import loop
from dpo import train_policy
from loop import Run, boost, new_prompts, prepare
from methods.ranking import rank_pairs
from plumbing.options import Count, RunOptions, cli
from sample import sample


@dataclass(frozen=True, kw_only=True)
class RankingOptions:
    run: RunOptions = RunOptions()
    samples: Count = 5  # responses per prompt


@dataclass(frozen=True, kw_only=True)
class Options(loop.Options):
    out: Path = Path("runs/sampling_ranking")  # run directory; rerun the same command to resume
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
    o = prepare(o)
    return boost(iteration, Run(o, o.out, o.out))


if __name__ == "__main__":
    cli(main, default_config="recipes/methods/sampling_ranking.toml")
