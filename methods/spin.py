"""SPIN, self-play fine-tuning (arXiv 2401.01335): gold responses against the model's own.

Iteration t: M_{t-1} answers the seeds' prompts; gold is chosen, its answer rejected; M_t is trained
from M_{t-1}, with M_{t-1} as reference, by the logistic loss of equation 4.7, which is DPO's:
-log sigmoid(beta [log pi/p (gold) - log pi/p (own)]) with sums over response tokens, where p is
M_{t-1}. The pairs of this and of the last iteration are used (--spin.window); their reference
log-probs are new each time. SPIN cannot surpass the gold data: where the model's distribution is
the data's, it stays (theorem 5.4).

The paper's values, to be given: --spin.lrs 5e-7,5e-7,1e-7 --spin.betas .1,.1,.1,5
--policy.batch 64; epochs are 2, 3 or 6 by source, the length 1,024 or 2,048.

What differs
1. The paper starts from a model that SFT has trained on the same data; here from M_0 as it is.
2. The authors' program samples 256 tokens, greedily it seems, while gold is not cut, so that length
   gives the model's answers away, and it frames prompts in another way for sampling than for
   training (its issues 9 and 33). Here both use the chat template; a cut-off answer is only ever
   rejected, and counted.
3. It ends gold with two end tokens; here an end token follows every response once.
4. AdamW and a cosine schedule, not RMSProp and a linear one. Temperature: --answers.temperature.
5. --spin.samples answers to each prompt, 1 in the paper; --spin.equal divides the epochs by the
   number of iterations whose pairs are used, so that every iteration takes as many steps.
6. With --policy.nll above 0 SPIN is partly SFT on gold.
7. Answers equal to gold, and empty ones, make no pair; the paper keeps them, though their gradient
   is 0. Where every answer is gold the run ends. No other rule of [pairs] applies.

Users of the authors' program report that only the first iteration gains (its issue 36), and that
the log-probs of both sides fall (13): the run's diagnostics show both.

    python -m methods.spin                                  the demo
    torchrun --nproc-per-node 8 -m -- methods.spin --config FILE --model DIR --seeds seeds.jsonl
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import loop
from dpo import PolicyOptions, policy_loss, train_policy
from loop import Run, boost, prepare
from methods.checks import refuse
from pairs import PairOptions, make_pairs
from plumbing.files import InputError
from plumbing.options import RunOptions, cli
from plumbing.ranges import Count
from sample import sample


@dataclass(frozen=True, kw_only=True)
class SpinOptions:
    run: RunOptions = RunOptions()
    samples: Count = 1  # answers of M_{t-1} to each seed's prompt
    window: Count = 2  # iterations whose pairs are used
    equal: bool = False  # divide the epochs by the number of iterations whose pairs are used
    lrs: str = ""  # learning rate by iteration, such as 5e-7,5e-7,1e-7; the last one holds on
    betas: str = ""  # beta by iteration, such as .1,.1,.1,5


@dataclass(frozen=True, kw_only=True)
class Options(loop.Options):
    out: Path = Path("runs/spin")  # run directory; rerun the same command to resume
    rejected: str = "previous"  # fixed: M_{t-1}'s response
    start: str = "previous"  # fixed: M_t starts from M_{t-1}
    spin: SpinOptions = SpinOptions()


def iteration(run: Run, t: int) -> None:
    """One iteration: M_{t-1} -> M_t."""
    o, it = run.o, run.iter(t)
    M_prev = run.model(t - 1)

    # y ~ M_{t-1}(. | x) for the seeds' prompts x
    n = o.spin.samples
    y = sample(M_prev, run.seeds, it / "samples.jsonl", o.answers, n, purpose=f"answers {t}")

    # (x, chosen gold, rejected y): all but equal and empty ones
    try:
        make_pairs(run.seeds, y, it / "pairs.jsonl", all_pairs(o.pairs), t=t)
    except InputError as error:
        fix = f"--iters {t - 1} is as far as it goes, or take a lower --policy.lr"
        raise InputError(f"{error}; every answer is gold or empty, SPIN's end: {fix}") from None
    D = run.every("pairs.jsonl", t)[-o.spin.window :]

    # M_t <- DPO of M_{t-1} on D, reference M_{t-1}
    policy = policy_of(o, t)
    train_policy(M_prev, D, run.model(t), policy, reference=M_prev, cache=run.cache)


def all_pairs(o: PairOptions) -> PairOptions:
    """The filter's options with which it drops equal and empty pairs only."""
    return PairOptions(
        run=o.run,
        scorer="none",
        max_repetition=1.0,
        keep_cut_off=True,
        max_pairs=sys.maxsize,
    )


def policy_of(o: Options, t: int) -> PolicyOptions:
    """Options of iteration t's training."""
    policy = o.policy
    if o.spin.lrs:
        policy = replace(policy, lr=of_iteration(o.spin.lrs, t, "lrs"))
    if o.spin.betas:
        beta = of_iteration(o.spin.betas, t, "betas")
        policy = replace(policy, loss_parameters={**policy.loss_parameters, "beta": beta})
    used = min(t, o.spin.window)
    if o.spin.equal:
        if policy.epochs % used:
            problem = f"{policy.epochs} cannot be divided by the {used} iterations that are used"
            raise InputError(f"--policy.epochs: {problem}; --spin.equal needs a multiple")
        policy = replace(policy, epochs=policy.epochs // used)
    return policy


def of_iteration(values: str, t: int, name: str) -> float:
    try:
        numbers = [float(text) for text in values.split(",")]
    except ValueError:
        numbers = [0.0]
    if not all(0 < number < math.inf for number in numbers):
        raise InputError(f"--spin.{name} {values}: give numbers above 0 with commas between")
    return numbers[min(t, len(numbers)) - 1]


def main(o: Options) -> dict:
    refuse(o, "rejected", "start", "data", "more_pairs", "one_shot")
    for t in range(1, o.iters + 1):
        policy_loss(policy_of(o, t))
    o = prepare(o)
    return boost(iteration, Run(o, o.out, o.out), needs_corpus=False)


if __name__ == "__main__":
    cli(main, default_config="recipes/methods/spin.toml")
