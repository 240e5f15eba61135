"""Reinforcement learning from synthetic feedback (RLSF): RLOO with a clipped ratio.

There is no value network. In rounds (methods/online.py; what it calls the average is the policy
itself here), the policy answers the prompts of a few optimizer steps, k times each; then it takes
these steps, one batch of answers each. With
    R = r(x, y) - kl (log pi_old(y|x) - log pi_ref(y|x))
an answer's advantage is R less the mean R of its prompt's other answers (leave one out, arXiv
2402.14740), divided by the standard deviation of the round's advantages. Its loss is
    - sum over tokens of min(ratio A, clip(ratio, 1 - c, 1 + c) A),   ratio = pi / pi_old of a token
as in PPO (arXiv 1707.06347, equation 7), and the mean over the answers of a batch counts.
--rlsf.refresh 1 is on-policy; above, one sampling serves several steps.

What is scored is not quite what was sampled. Answers are texts, stripped and tokenised again, and
cut at --rlsf.max-length. One that has ended is followed by the template's end token; one that was
cut off is not, unless it has no text at all. The reward model reads a cut-off answer as if it had
ended. Equal answers of a batch are scored once for pi_old, so that in bf16 the first ratio is 1 but
for rounding.

An answer beyond the reward model's context has no reward. It leaves its prompt out: all answers to
it have advantage 0. In the logged mean reward such an answer counts as 0.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev

import torch

from dpo import add_reference_logps
from formats.chat import Chat
from formats.records import read_jsonl
from methods.online import (
    Round,
    export_policy,
    forget,
    in_batches,
    make_rounds,
    presented,
    train_round,
)
from plumbing.files import InputError, write_jsonl
from plumbing.ranges import Count, NotNegative, Positive
from plumbing.ranks import on_rank0
from plumbing.stage import Stage
from sample import SampleOptions, fitting, sample
from scorers.base import known
from scorers.load import load_scorer
from train import Example, TrainOptions, make_sequence


@dataclass(frozen=True, kw_only=True)
class RlsfOptions(TrainOptions):
    """epochs and save_every do not count: rounds are saved."""

    lr: Positive = 1e-6  # peak learning rate
    batch: Count = 128  # answers per optimizer step, over all processes
    steps: Count = 25  # optimizer steps per iteration
    refresh: Count = 8  # steps between two samplings
    samples: Count = 4  # answers per prompt
    kl: NotNegative = 0.05  # weight of the divergence from the reference in the reward
    clip: Positive = 0.2  # ratios are clipped to 1 - clip .. 1 + clip
    max_new_tokens: Count = 512  # limit per answer


def check_rlsf(o: RlsfOptions) -> None:
    if o.samples < 2:
        raise InputError(f"--rlsf.samples {o.samples}: others are the baseline; give at least 2")
    if o.kl < 0 or not 0 < o.clip < 1:
        raise InputError(f"--rlsf.kl {o.kl} --rlsf.clip {o.clip}: give kl >= 0 and 0 < clip < 1")
    if o.loss_on_prompt:
        raise InputError("--rlsf.loss-on-prompt: the policy wrote answers only; leave it out")
    if o.batch % o.samples:
        raise InputError(f"--rlsf.batch {o.batch}: give a multiple of --rlsf.samples {o.samples}")


def reinforce(
    model: Path, x: Path, reward_model: Path, reference: Path, it: Path, o: RlsfOptions, cache: Path
) -> Path:
    """it/policy <- reinforcement learning of the model on the prompts x."""
    rounds = make_rounds(model, [it], o.steps, o.refresh)
    # the distribution that is sampled is the one that is scored
    sampling = SampleOptions(
        run=o.run, temperature=1.0, top_p=1.0, max_new_tokens=o.max_new_tokens, chunk=64
    )
    for i, r in enumerate(rounds):
        asked = prompts_of_steps(x, model, r.folder / "prompts.jsonl", o, (r.first, r.last))
        answers = r.folder / "samples.jsonl"
        sample(r.sampled, asked, answers, sampling, o.samples, f"rollouts {r.first}")
        scored = score_answers(answers, reward_model, r.folder / "scored.jsonl", o)
        train_on_answers(r, scored, reference, o, cache)
        for old in rounds[:i]:
            on_rank0(forget, old)
    export_policy(rounds[-1], rounds, it / "policy", o)
    on_rank0(forget, rounds[-1])
    return it / "policy"


def prompts_of_steps(
    x: Path, model: Path, out: Path, o: RlsfOptions, steps: tuple[int, int]
) -> Path:
    """Stage: the prompts of the steps, of those that leave room for an answer.

    model: whose tokenizer.
    """
    stage = Stage(
        out,
        run=o.run,
        prompts=x,
        model=model,
        batch=o.batch,
        samples=o.samples,
        longest=o.max_length,
        between=steps,
    )
    if stage.done:
        return out
    rows = read_jsonl(x, "prompt")
    chat = Chat(model, o.run)
    usable = fitting(rows, chat, chat.longest(o.max_length), x)
    first, last = (step * o.batch // o.samples for step in steps)
    asked = []
    for place, row in presented(usable, first, last, o.run.seed):
        asked.append({**row, "id": f"{row['id']} {place}"})
    on_rank0(write_jsonl, out, asked)
    return stage.finish(prompts=len(asked), no_room=len(rows) - len(usable))


def score_answers(answers: Path, reward_model: Path, out: Path, o: RlsfOptions) -> Path:
    """Stage: answers with `reward`, None where the reward model cannot read one."""
    stage = Stage(out, run=o.run, answers=answers, scorer=reward_model)
    if stage.done:
        return out
    rows = read_jsonl(answers, "prompt")
    scorer = load_scorer(str(reward_model), None, o.run, stage.scratch / "scores", True)
    rewards = scorer(rows)
    scored = [{**row, "reward": reward} for row, reward in zip(rows, rewards, strict=True)]
    on_rank0(write_jsonl, out, scored)
    empty = sum(not row["response"] for row in rows)
    return stage.finish(
        answers=len(rows),
        empty=empty,
        not_scored=rewards.count(None),
        reward=round(mean(known(rewards)), 4),
    )


def train_on_answers(r: Round, scored: Path, reference: Path, o: RlsfOptions, cache: Path) -> Path:
    """Stage: a round's steps on scored answers."""
    stage = Stage(
        r.average,
        o,
        model=r.start,
        average=r.sampled,
        reference=reference,
        answers=scored,
        step=r.first,
        total=r.total,
    )
    if stage.done:
        return r.average
    rows = read_jsonl(scored, "prompt")
    chat = Chat(r.start, o.run)
    examples = [make_answer(chat, row, o) for row in rows]
    batches = in_batches(examples, o.batch)
    add_reference_logps("old", r.sampled, batches, cache, o, per_token=True)
    add_reference_logps("reference", reference, batches, cache, o)

    # rewards less what leaving the reference costs, and from these the advantages
    totals = [total_reward(example, o.kl) for example in examples]
    for example, advantage in zip(examples, advantages(totals, o.samples), strict=True):
        example.extra["advantage"] = advantage
    counts = train_round(r, batches, clipped_loss(o.clip), stage, o)
    divergence = round(mean(e.extra["kl"] for e in examples), 4)
    return stage.finish(answers=len(rows), kl=divergence, **counts)


def make_answer(chat: Chat, row: dict, o: RlsfOptions) -> Example:
    """An answer as it was sampled: with an end token only where it has ended."""
    ids, start = make_sequence(chat, row, row["response"], o)
    cut_off = row["finish_reason"] == "length"
    if cut_off and ids[-1] == chat.end and len(ids) - start > 1:
        ids = ids[:-1]
    return Example(row["id"], [(ids, start)], extra={"reward": row["reward"]})


def total_reward(example: Example, weight: float) -> float | None:
    """R of an answer, None without a reward; keeps its divergence from the reference as
    extra["kl"].
    """
    old, reference = example.extra["old"][0], example.extra["reference"][0]
    example.extra["kl"] = sum(old) - reference
    reward = example.extra["reward"]
    return None if reward is None else reward - weight * example.extra["kl"]


def advantages(rewards: list[float | None], k: int) -> list[float]:
    """Rewards of k answers to each prompt in a row -> advantages with standard deviation 1; 0 where
    all are equal.
    """
    raw = []
    for of_one_prompt in in_batches(rewards, k):
        raw += leave_one_out(of_one_prompt)
    deviation = pstdev(raw)
    return [one / deviation if deviation else 0.0 for one in raw]


def leave_one_out(rewards: list[float | None]) -> list[float]:
    """Each reward less the mean of the others, exactly 0 where all are equal, or where one is
    None.
    """
    if None in rewards:
        return [0.0] * len(rewards)
    others = len(rewards) - 1
    return [sum(reward - other for other in rewards) / others for reward in rewards]


def clipped_loss(clip: float):
    """The loss_fn of train_round."""

    def loss_fn(examples: list[Example], logps: list[list[torch.Tensor]]):
        losses = []
        sums = defaultdict(float)
        for example, (new,) in zip(examples, logps, strict=True):
            old = torch.tensor(example.extra["old"][0], device=new.device)  # (tokens,)
            advantage = example.extra["advantage"]
            ratio = (new - old).exp()
            clipped = ratio.clamp(1 - clip, 1 + clip)
            losses.append(-torch.minimum(ratio * advantage, clipped * advantage).sum())
            sums["reward"] += example.extra["reward"] or 0.0
            sums["kl"] += example.extra["kl"]
            sums["clipped"] += (ratio != clipped).float().mean().item()
        return torch.stack(losses).sum(), dict(sums)

    return loss_fn
