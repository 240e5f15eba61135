"""Self-Rewarding Language Models (arXiv 2401.10020): the model judges its own responses.

S <- SFT of M_0 on the seeds and on examples of judging, once. M is S in iteration 1, M_{t-1} later.
Iteration t: new prompts; n = 4 responses of M to each; M judges every response three times, and the
mean of its readable scores counts; the best is chosen, the worst rejected; DPO of M on the pairs of
this iteration alone, reference M. Equal scores make no pair. (The paper counts S as its M_1.)

The paper's program was not published; its settings are taken from secondary sources: temperature
0.7 and top-p 0.9 for responses, beta 0.1; a short justification, then a score from an additive
rubric of five points; Llama-2-70B; SFT at a learning rate of 5.5e-6, DPO at 1e-6 falling to 1e-7,
batch 16.

What differs
1. Prompts are those of SynPO's G, so that methods can be compared; in the paper a fixed chat model
   writes them from eight examples.
2. Without --rewarding.examples, S learns to judge from the seeds, without justifications: the gold
   response deserves 5, a response of M_0 1 + round(4 F) where F is the F1 of its words and pairs of
   words with gold's. In the paper people ranked responses.
3. Pairs pass SynPO's filter of repetitive and cut-off responses.
4. No outside judge stops the training early, schedules fall to 0, and there is no dropout.
5. The template is in our own words (--rewarding.template).
6. The table of SynPO's paper has another version: SimPO, with judge's examples by GPT-4.

One public program parses the judged response together with the verdict, so that a response can
grade itself, and counts an unreadable verdict as the worst score. Here the judge's own words alone
are read, and an unreadable verdict counts for nothing.

    python -m methods.self_rewarding                        the demo
    torchrun --nproc-per-node 8 -m -- methods.self_rewarding --config FILE --model DIR \\
        --seeds seeds.jsonl --corpus corpus.txt
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import loop
from dpo import train_policy
from eval.in_run import evaluate_one
from formats.records import conversation_text, read_jsonl
from loop import Run, boost, new_prompts, prepare
from methods.checks import need_several, refuse
from methods.ranking import RECORDED, rank_pairs
from plumbing.files import InputError, digest, write_jsonl
from plumbing.options import RunOptions, cli
from plumbing.ranges import Count
from plumbing.ranks import on_rank0
from plumbing.stage import Stage
from sample import SampleOptions, sample
from train import finetune

TEMPLATE = """Judge how well the response below answers the request. Give one point for each of
these: it has to do with the request; it covers a good part of it; it answers what matters most in a
useful way; it is complete and well ordered; an expert could have written it, without a word wasted.

Request:
{prompt}

Response:
{response}

Say in at most 100 words why, then end with "Score: " and the number of points."""


@dataclass(frozen=True, kw_only=True)
class RewardingOptions:
    run: RunOptions = RunOptions()
    samples: Count = 4  # responses per prompt
    judgements: Count = 3  # verdicts per response
    examples: Path | None = None  # JSONL of {"prompt", "response", "verdict"}; empty: of the seeds
    template: str = TEMPLATE  # what the judge reads: {prompt} and {response}


@dataclass(frozen=True, kw_only=True)
class Options(loop.Options):
    out: Path = Path("runs/self_rewarding")  # run directory; rerun the same command to resume
    rejected: str = "previous"  # fixed: M_{t-1}'s response
    start: str = "previous"  # fixed: M_t starts from M_{t-1}
    data: str = "fresh"  # fixed: the pairs of this iteration
    rewarding: RewardingOptions = RewardingOptions()
    answers: SampleOptions = SampleOptions(top_p=0.9)  # sampling from M
    verdicts: SampleOptions = SampleOptions(top_p=0.9)  # sampling verdicts from M


def iteration(run: Run, t: int) -> None:
    """One iteration: M_{t-1} -> M_t."""
    o, it = run.o, run.iter(t)
    M = run.model(t - 1) if t > 1 else first_model(run)

    # G <- SFT(M_0) on seeds: keywords -> prompt;   x ~ G(. | 3 keywords)
    x = new_prompts(run, t)

    # y_1 .. y_n ~ M(. | x), and what M thinks of each
    n = o.rewarding.samples
    y = sample(M, x, it / "samples.jsonl", o.answers, samples=n, purpose=f"answers {t}")
    asked = ask(y, it / "judged.jsonl", o.rewarding.template, o.run)
    n = o.rewarding.judgements
    verdicts = sample(M, asked, it / "verdicts.jsonl", o.verdicts, n, f"verdicts {t}")
    scored = mean_scores(y, verdicts, it / "scored.jsonl", o.run)

    # (x, chosen the best y, rejected the worst y), of this iteration alone
    rank_pairs(scored, it / "pairs.jsonl", replace(o.pairs, scorer=RECORDED), t=t)

    # M_t <- DPO of M, reference M
    D = [it / "pairs.jsonl"]
    train_policy(M, D, run.model(t), o.policy, reference=M, cache=run.cache)


def first_model(run: Run) -> Path:
    """S <- SFT(M_0) on the seeds and on examples of judging."""
    o, M_0, folder = run.o, run.model(0), run.out / "first"
    examples = o.rewarding.examples
    if examples is None:
        drafts = sample(M_0, run.seeds, folder / "drafts.jsonl", o.answers, purpose="drafts")
        examples = grade(run.seeds, drafts, folder / "examples.jsonl", o.run)
    template = o.rewarding.template
    lessons = teach(run.seeds, examples, folder / "lessons.jsonl", template, o.run)
    S = finetune(M_0, lessons, folder / "model", o.seed_sft)
    evaluate_one(run, S)
    return S


# -------------------------------------------------------------------------------- judging


def grade(seeds: Path, drafts: Path, out: Path, run: RunOptions) -> Path:
    """Stage: examples {prompt, response, verdict} of gold responses and of drafts."""
    stage = Stage(out, run=run, seeds=seeds, drafts=drafts)
    if stage.done:
        return out
    gold = read_jsonl(seeds, "prompt", "response")
    by_id = {row["id"]: row for row in gold}
    rows = [{**row, "id": f"{row['id']} gold", "verdict": "Score: 5"} for row in gold]
    for draft in read_jsonl(drafts, "prompt"):
        points = 1 + round(4 * f1(draft["response"], by_id[draft["id"]]["response"]))
        rows.append({**draft, "id": f"{draft['id']} draft", "verdict": f"Score: {points}"})
    on_rank0(write_jsonl, out, rows)
    counts = Counter(row["verdict"].removeprefix("Score: ") for row in rows)
    points = {f"points_{name}": number for name, number in sorted(counts.items())}
    return stage.finish(examples=len(rows), **points)


def f1(text: str, gold: str) -> float:
    """F1 of a text's words and pairs of words with those of another, each as often as it occurs."""
    ours, theirs = words_and_pairs(text), words_and_pairs(gold)
    shared = (ours & theirs).total()
    both = ours.total() + theirs.total()
    return 2 * shared / max(1, both)


def words_and_pairs(text: str) -> Counter:
    words = text.lower().split()
    return Counter(words) + Counter(pairwise(words))


def teach(seeds: Path, examples: Path, out: Path, template: str, run: RunOptions) -> Path:
    """Stage: what S is trained on: the seeds, and judge's prompts with their verdicts."""
    stage = Stage(out, run=run, seeds=seeds, examples=examples, template=template)
    if stage.done:
        return out
    rows = read_jsonl(seeds, "prompt", "response")
    for example in read_jsonl(examples, "prompt", "verdict"):
        question = judged(example, template)
        rows.append({**question, "response": example["verdict"]})
    on_rank0(write_jsonl, out, rows)
    return stage.finish(records=len(rows))


def judged(row: dict, template: str) -> dict:
    """The judge's prompt about a response; texts may hold braces."""
    parts = re.split(r"(\{prompt\}|\{response\})", template)
    filled = {"{prompt}": conversation_text(row), "{response}": row["response"]}
    text = "".join(filled.get(part, part) for part in parts)
    return {"id": digest(row["id"], row.get("sample", 0), "judged"), "prompt": text}


def ask(responses: Path, out: Path, template: str, run: RunOptions) -> Path:
    """Stage: the judge's prompts about all responses."""
    stage = Stage(out, run=run, responses=responses, template=template)
    if stage.done:
        return out
    every = read_jsonl(responses, "prompt")
    rows = [judged(row, template) for row in every if row["response"]]
    on_rank0(write_jsonl, out, rows)
    return stage.finish(responses=len(rows), empty=len(every) - len(rows))


def mean_scores(responses: Path, verdicts: Path, out: Path, run: RunOptions) -> Path:
    """Stage: responses with `score`, the mean of their readable verdicts; others are left out."""
    stage = Stage(out, run=run, responses=responses, verdicts=verdicts)
    if stage.done:
        return out
    rows = read_jsonl(verdicts)
    scores = defaultdict(list)
    for row in rows:
        score = read_score(row["response"])
        if score is not None:
            scores[row["id"]].append(score)
    unreadable = len(rows) - sum(map(len, scores.values()))
    scored = []
    for row in read_jsonl(responses, "prompt"):
        found = scores[digest(row["id"], row.get("sample", 0), "judged")]
        if found:
            # rounded, so that the order of equal verdicts makes no difference
            scored.append({**row, "score": round(sum(found) / len(found), 6)})
    if not scored:
        problem = f"{unreadable} of {len(rows)} verdicts have no score that can be read"
        raise InputError(f"{out}: {problem}; train the judge longer, or shorten its template")
    on_rank0(write_jsonl, out, scored)
    return stage.finish(verdicts=len(rows), unreadable=unreadable, scored=len(scored))


def read_score(verdict: str) -> float | None:
    """The last number from 0 to 5 behind "score"; None where there is none, or it is another."""
    found = re.findall(r"score[\s*:]*(-?\d+(?:\.\d+)?)", verdict, re.IGNORECASE)
    if not found or not 0 <= float(found[-1]) <= 5:
        return None
    return float(found[-1])


def check_judge(o: RewardingOptions) -> None:
    for field in ("{prompt}", "{response}"):
        if field not in o.template:
            raise InputError(f"--rewarding.template: has no {field}; the judge must read it")
    for row in read_jsonl(o.examples, "prompt", "response", "verdict") if o.examples else []:
        if read_score(row["verdict"]) is None:
            fix = 'end it with "Score: " and 0 to 5'
            raise InputError(f"{o.examples}: {row['id']}: no score in its verdict; {fix}")


def main(o: Options) -> dict:
    refuse(o, "rejected", "start", "data", "more_pairs")
    need_several(o.rewarding.samples, "--rewarding.samples")
    check_judge(o.rewarding)
    o = prepare(o)
    if o.one_shot:
        o = o.at_once()
    return boost(iteration, Run(o, o.out, o.out))


if __name__ == "__main__":
    cli(main, default_config="recipes/methods/self_rewarding.toml")
