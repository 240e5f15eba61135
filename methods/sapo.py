"""SAPO, self-augmented preference optimisation (arXiv 2405.20830): gold with a segment rewritten.

One training goes on through all iterations. At every optimizer step the EMA of the weights writes a
segment of each gold response of the incoming batch anew; gold is chosen, gold with that segment is
rejected. The new pairs enter a replay buffer, first in, first out; the batch to train on is drawn
from the buffer, with weights 1 / (times drawn + 1). Every --sapo.reference steps, step 0 included,
the reference becomes the EMA. M_t is the policy after t times --sapo.steps steps.

The segment is the `segment` tokens from a random one on. If the EMA ends its text there, what
follows in gold is dropped. The loss covers the whole response, what both sides share included.

The paper's values are the defaults (lr 5e-7, DPO with beta 0.1, 4 iterations), but for
--policy.batch 64; or, from a base model, --policy.loss orpo --policy.weight 0.05 --policy.lr 5e-6.
--policy.epochs, --policy.save-every and --sampling.max-new-tokens do not count: --sapo.steps and
--sapo.segment do, and every round is saved.

What differs
1. Sampling in rounds of --sapo.refresh steps: order, buffer, EMA, reference and learning rate are
   exact with any of its values, but segments come from an EMA up to refresh - 1 steps old. A round
   reads and writes weights and moments once, 12 bytes a parameter, and the EMA, 4 bytes.
2. Pairs are texts, tokenised again as in all of this program. Where the segment would begin or end
   inside a character, it begins or ends before that character. An end token follows every rejected
   text, also one that was cut off with nothing of gold behind it (counted as no_end).
3. One buffer of 16,000 pairs; the authors have one of 2,000 for each of 8 processes, which draw
   alike, count by object identity, and lose the buffer when a run is resumed.
4. The segment is drawn from what --policy.max-length leaves of the response. The authors' program
   rewrites the tail whatever it drew where prompt and response exceed that, by a wrong sign. Their
   separate limit of prompts does not exist here.
5. AdamW and a cosine schedule; the authors take RMSProp and a linear one for DPO, 8-bit AdamW and
   an inverse square root for ORPO. No top-k.
6. losses.py's ORPO: its NLL leaves prompt and padding out. Theirs counts the header of the response
   as response, and gold ends with two end tokens.
7. The paper's DPO form starts from an SFT model; here from M_0 as it is.
8. With --policy.nll above 0 SAPO is partly SFT on gold.

Nothing checks that the new segment is worse than gold's, and the seam before what is kept of gold
may itself tell the sides apart.

    python -m methods.sapo                                  the demo
    torchrun --nproc-per-node 8 -m -- methods.sapo --config FILE --model DIR --seeds seeds.jsonl
"""

from collections import Counter, deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import loop
from checkpoint import load_config
from dpo import (
    PolicyOptions,
    add_reference_logps,
    check_start,
    heldout_examples,
    make_example,
    policy_loss,
    preference_loss,
    watch,
)
from formats.chat import Chat
from formats.plugins import plugin_files
from formats.records import read_jsonl
from loop import Run, boost, prepare
from methods.checks import refuse
from methods.online import (
    Round,
    export_policy,
    forget,
    in_batches,
    make_rounds,
    presented,
    train_round,
)
from pairs import words
from plumbing.files import InputError, rng, write_jsonl
from plumbing.options import RunOptions, cli
from plumbing.ranges import Count, Share
from plumbing.ranks import on_rank0
from plumbing.stage import Stage
from sample import SampleOptions, fitting, sample

# what a record of segments.jsonl has and a pair has not
REQUEST = {
    "prefix",
    "rest",
    "last",
    "gold",
    "max_new_tokens",
    "response",
    "finish_reason",
    "tokens",
}


@dataclass(frozen=True, kw_only=True)
class SapoOptions:
    run: RunOptions = RunOptions()
    steps: Count = 108  # optimizer steps per iteration; about the paper's epoch
    segment: Count = 256  # tokens that are written anew
    decay: Share = 0.5  # of the EMA: its own share in the new average
    reference: Count = 108  # steps after which the reference becomes the EMA
    buffer: Count = 16_000  # pairs in the replay buffer
    refresh: Count = 8  # steps between two samplings; 1: as in the paper


@dataclass(frozen=True, kw_only=True)
class Options(loop.Options):
    out: Path = Path("runs/sapo")  # run directory; rerun the same command to resume
    rejected: str = "previous"  # fixed: gold with a segment of the EMA's
    start: str = "previous"  # fixed: training goes on
    sapo: SapoOptions = SapoOptions()
    sampling: SampleOptions = SampleOptions(top_p=0.95, chunk=32)  # from the EMA


def iteration(run: Run, t: int) -> None:
    """One iteration: --sapo.steps more steps of the one training, M_{t-1} -> M_t."""
    o, M_0 = run.o, run.model(0)
    rounds = all_rounds(run)
    here = [r for r in rounds if r.folder.parent == run.iter(t)]
    for r in here:
        past = rounds[: rounds.index(r) + 1]  # this round included

        # the EMA writes a segment of every gold response of the incoming batches
        steps = (r.first, r.last)
        cut = cut_segments(run.seeds, M_0, r.folder / "cut.jsonl", o.sapo, o.policy, steps)
        written = sample(
            r.sampled, cut, r.folder / "segments.jsonl", o.sampling, purpose="segments"
        )
        new_pairs(written, r.folder / "pairs.jsonl", o.run)

        # the buffer, replayed from the first step on
        pairs = [one.folder / "pairs.jsonl" for one in past]
        D = draw(pairs, r.folder / "drawn.jsonl", o.sapo, o.policy.batch, steps)

        # steps of the policy and of its EMA
        reference = last_reference(past, r.first, o.sapo.reference)
        train_on_pairs(r, D, reference, o, run.cache)
        still_read = last_reference(past, r.last, o.sapo.reference)
        for old in past[:-2]:
            on_rank0(forget, old, old.average == still_read)

    join_pairs([r.folder / "pairs.jsonl" for r in here], run.iter(t) / "pairs.jsonl", o.run)
    export_policy(here[-1], here, run.model(t), o.policy)
    if t == o.iters:
        # the last EMA stays, beside M_T
        for old in rounds:
            on_rank0(forget, old, old is rounds[-1])


def all_rounds(run: Run) -> list[Round]:
    o = run.o
    folders = [run.iter(t) for t in range(1, o.iters + 1)]
    boundary = o.sapo.reference
    return make_rounds(run.model(0), folders, o.sapo.steps, o.sapo.refresh, boundary)


def last_reference(rounds: list[Round], step: int, interval: int) -> Path:
    """The reference in force at a step: the EMA after the last multiple of `interval` steps."""
    averages = {0: rounds[0].start}
    averages |= {r.last: r.average for r in rounds}
    return averages[step - step % interval]


# -------------------------------------------------------------------------------- segments


def cut_segments(
    seeds: Path,
    model: Path,
    out: Path,
    o: SapoOptions,
    policy: PolicyOptions,
    steps: tuple[int, int],
) -> Path:
    """Stage: for each gold response presented in the steps {prompt, prefix, max_new_tokens, rest,
    gold}: what precedes the segment, its tokens, what follows it.

    model: whose tokenizer and positions. steps: first and last.
    """
    stage = Stage(
        out,
        o,
        seeds=seeds,
        model=model,
        batch=policy.batch,
        longest=longest_of(policy, model),
        between=steps,
    )
    if stage.done:
        return out
    longest = longest_of(policy, model)
    chat = Chat(model, o.run)
    rows = read_jsonl(seeds, "prompt", "response")
    usable = fitting(rows, chat, longest, seeds)
    first, last = (step * policy.batch for step in steps)
    cut = []
    for place, row in presented(usable, first, last, o.run.seed):
        prompt = len(chat.prompt_ids(row))
        gold = chat.response_ids(row["response"])
        length, latest = span(prompt, len(gold), o.segment, longest)
        begin = rng(o.run.seed, "segment", place).randint(0, latest)
        parts = split(chat, gold, begin, length)
        request = {name: value for name, value in row.items() if name != "response"}
        request["id"] = f"{row['id']} {place}"
        request["max_new_tokens"] = length
        request["gold"] = row["response"]
        cut.append({**request, **parts})
    on_rank0(write_jsonl, out, cut)
    return stage.finish(segments=len(cut), no_room=len(rows) - len(usable))


def span(prompt: int, answer: int, segment: int, longest: int) -> tuple[int, int]:
    """(tokens of the segment, the latest at which it may begin), from the tokens of prompt and gold
    response, its end token included.

    3 tokens are left behind it, as in the authors' program, whose template ends gold with an end
    token, a line break and another end token.
    """
    length = min(segment, answer, longest - prompt)
    return length, max(0, min(answer - 3 - length, longest - prompt - length))


def longest_of(policy: PolicyOptions, model: Path) -> int:
    """Tokens of prompt and response that are trained on and can be sampled."""
    return min(policy.max_length, load_config(model).max_positions)


def split(chat: Chat, gold: list[int], begin: int, length: int) -> dict:
    """{prefix, rest, last}: texts before and after the segment, and whether it holds gold's end."""
    whole = chat.text(gold)
    prefix = beginning(chat, gold[:begin], whole)
    until = beginning(chat, gold[: begin + length], whole)
    return {"prefix": prefix, "rest": whole[len(until) :], "last": begin + length >= len(gold)}


def beginning(chat: Chat, ids: list[int], whole: str) -> str:
    """The text of ids; of fewer, where they end inside a character of `whole`."""
    while not whole.startswith(chat.text(ids)):
        ids = ids[:-1]
    return chat.text(ids)


def new_pairs(segments: Path, out: Path, run: RunOptions) -> Path:
    """Stage: pairs {prompt, chosen: gold, rejected: gold with the segment}; none is dropped."""
    stage = Stage(out, run=run, segments=segments)
    if stage.done:
        return out
    pairs = []
    counts = Counter(same=0, empty=0, ended=0, no_end=0)
    for row in read_jsonl(segments, "prompt"):
        ended = row["finish_reason"] == "stop"
        rejected = row["response"]
        if not ended:
            # the limit may have cut a character in two
            rejected = rejected.rstrip("\ufffd") + row["rest"]
        asked = {name: value for name, value in row.items() if name not in REQUEST}
        pairs.append({**asked, "chosen": row["gold"], "rejected": rejected})
        counts["same"] += rejected.split() == row["gold"].split()
        counts["empty"] += not rejected
        counts["ended"] += ended
        counts["no_end"] += not ended and row["last"]
    on_rank0(write_jsonl, out, pairs)
    return stage.finish(pairs=len(pairs), **counts)


def join_pairs(files: list[Path], out: Path, run: RunOptions) -> Path:
    """Stage: the new pairs of all rounds of an iteration."""
    stage = Stage(out, run=run, files=files)
    if stage.done:
        return out
    rows = [row for path in files for row in read_jsonl(path, "prompt")]
    on_rank0(write_jsonl, out, rows)
    same = sum(row["chosen"].split() == row["rejected"].split() for row in rows)
    counts = {"candidates": len(rows), "same": same, "valid": len(rows)}
    return stage.finish(**counts, pairs=len(rows), **words(rows))


# -------------------------------------------------------------------------------- replay buffer


def draw(files: list[Path], out: Path, o: SapoOptions, batch: int, steps: tuple[int, int]) -> Path:
    """Stage: the pairs to train on in the steps, in their order. files: new pairs of all rounds so
    far; that many a step come in.
    """
    stage = Stage(out, o, files=files, batch=batch, between=steps)
    if stage.done:
        return out
    pairs = [row for path in files for row in read_jsonl(path, "prompt")]
    drawn = replay(in_batches(pairs, batch), batch, o)
    rows = []
    for step in range(*steps):
        for i, pair in enumerate(drawn[step]):
            rows.append({**pair, "id": f"{pair['id']} drawn {step} {i}"})
    on_rank0(write_jsonl, out, rows)
    different = {pair["id"] for step in range(*steps) for pair in drawn[step]}
    return stage.finish(pairs=len(rows), different=len(different))


def replay(arrivals: list[list[dict]], batch: int, o: SapoOptions) -> list[list[dict]]:
    """The batch drawn at every step, with replacement. arrivals: the pairs that come in at each."""
    buffer: deque = deque(maxlen=o.buffer)
    times: Counter = Counter()
    drawn = []
    for step, new in enumerate(arrivals):
        buffer.extend(new)
        likely = weights([times[pair["id"]] for pair in buffer])
        random = rng(o.run.seed, "buffer", step)
        found = random.choices(list(buffer), likely, k=batch)
        times.update(pair["id"] for pair in found)
        drawn.append(found)
    return drawn


def weights(times: list[int]) -> list[float]:
    """How likely pairs are that were drawn so many times, up to a factor."""
    return [1 / (n + 1) for n in times]


# -------------------------------------------------------------------------------- training


def train_on_pairs(r: Round, D: Path, reference: Path, o: Options, cache: Path) -> Path:
    """Stage: a round's steps on the pairs D."""
    stage = Stage(
        r.average,
        o.policy,
        model=r.start,
        average=r.sampled,
        reference=reference,
        pairs=D,
        loss_file=plugin_files(o.policy.loss),
        decay=o.sapo.decay,
        step=r.first,
        total=r.total,
    )
    if stage.done:
        return r.average
    loss = policy_loss(o.policy)
    rows = read_jsonl(D, "prompt", "chosen")
    # also those whose rejected response is the chosen one again
    chat = Chat(r.start, o.run)
    examples = [make_example(chat, row, None, loss, o.policy) for row in rows]
    batches = in_batches(examples, o.policy.batch)
    assert None not in examples, "cut_segments has left out what does not fit"
    heldout = heldout_examples(r.start, loss, stage, o.policy)
    check = None
    reads = [name for name in loss.reads if name.startswith("ref_")]
    if reads:
        per_token = any(name.endswith("token_logp") for name in reads)
        scored = [*batches, heldout]
        add_reference_logps("reference", reference, scored, cache, o.policy, per_token)
        check = partial(check_start, out=r.average, cache=cache, o=o.policy)
    loss_fn = preference_loss(loss, o.policy)
    watch_pairs = partial(
        watch, heldout=heldout, loss_fn=loss_fn, last=r.total, o=o.policy, check=check
    )
    counts = train_round(r, batches, loss_fn, stage, o.policy, o.sapo.decay, watch_pairs)
    return stage.finish(pairs=len(rows), **counts)


def main(o: Options) -> dict:
    refuse(o, "rejected", "start", "data", "more_pairs", "one_shot")
    if not 0 <= o.sapo.decay < 1:
        raise InputError(f"--sapo.decay {o.sapo.decay}: give a number from 0 to below 1")
    reads = policy_loss(o.policy).reads
    if any(name.startswith(("ref2_", "sample", "preference")) for name in reads):
        raise InputError(f"--policy.loss {o.policy.loss}: not for this method; take another")
    o = prepare(o)
    if o.seeds and o.model:
        rows = read_jsonl(o.seeds, "prompt", "response")[: o.seeds_limit or None]
        longest = longest_of(o.policy, o.model)
        fitting(rows, Chat(o.model, o.run), longest, o.seeds)
    return boost(iteration, Run(o, o.out, o.out), needs_corpus=False)


if __name__ == "__main__":
    cli(main, default_config="recipes/methods/sapo.toml")
