"""The response improver R_t: a prompt and a draft -> a better answer (SynPO section 2.2).

What differs from the paper
1. By default no seed is filtered out; --scorer and --threshold give the paper's rule. --drafts sampled answers per seed may
   serve as training drafts (the paper: one).
2. --rewrites of each draft may be sampled, the draft itself may compete (--draft-competes), and --pick names the scorer
   that chooses (the paper: one rewrite, no competition). The README's demo uses it.
3. The template is not part of the loss (not stated there; --loss-on-prompt is the other reading).

seeds.jsonl, seed_answers.jsonl -> improver/: a checkpoint, always trained from M_0
prompts.jsonl, answers.jsonl of M_{t-1} -> rewrites.candidates.jsonl; the best of each -> rewrites.jsonl {id, prompt, response,
draft, finish_reason}

    python improve.py --model M0 --policy M1 --seeds seeds.jsonl --prompts prompts.jsonl --out DIR
    torchrun --nproc-per-node 8 improve.py --model M0 --policy M1 --seeds seeds.jsonl --prompts prompts.jsonl --out DIR
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from data import (
    Common,
    InputError,
    command,
    digest,
    messages_of,
    on_first,
    part,
    read_jsonl,
    stage,
    write_jsonl,
)
from reward import Scorer, load_scorer, quantiles, scorer_file
from sample import SampleOptions, sample
from train import TrainOptions, sft

TEMPLATE = """\
You are a careful assistant. Below are a question and an answer that somebody gave to it. Rewrite the answer so that it is \
better: mend what is wrong, add what is missing, stay with the question, and give full detail.

Given question:
{prompt}

Original answer:
{draft}

Rewritten answer:"""


@dataclass(kw_only=True)
class ImproverOptions(TrainOptions, SampleOptions):
    drafts: int = 1  # sampled answers per seed to train on
    threshold: float = (
        0.0  # train only where score(gold) - score(draft) is above (the paper: as for pairs)
    )
    scorer: str = "none"  # of that rule: none keeps all; likelihood, a reward-model directory, or FILE.py:FUNCTION
    rewrites: int = 1  # samples per draft
    draft_competes: bool = False  # the draft is a candidate beside its rewrites
    pick: str = "none"  # scorer that picks the best candidate; none takes the first rewrite
    template: str = TEMPLATE  # what R reads; {prompt} and {draft} stand for the texts
    max_length: int = 6000  # tokens of template and gold answer; what is longer loses its end


def improver_prompt(row: dict, draft: str, o: ImproverOptions) -> str:
    """The template filled in; earlier turns of a conversation come before its last question."""
    turns = messages_of(row)
    asked = (
        turns[0]["content"]
        if len(turns) == 1
        else "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)
    )
    # in one pass, and not by format: the texts themselves may hold braces
    return re.sub(
        r"{(prompt|draft)}", lambda name: {"prompt": asked, "draft": draft}[name[1]], o.template
    )


def training_rows(
    seeds: list[dict], answers: list[dict], o: ImproverOptions, scorer: Scorer | None
) -> tuple[list[dict], dict]:
    """R's examples (prompt and sampled draft -> gold) where the gold answer is better by more than the threshold."""
    by_id = {row["id"]: row for row in seeds}
    drafts = [(by_id[row["id"]], row) for row in answers if row["response"]]
    if scorer:
        gold, sampled = scorer([seed for seed, _ in drafts]), scorer([draft for _, draft in drafts])
        gaps = [g - s for g, s in zip(gold, sampled, strict=True)]
        kept = [pair for pair, gap in zip(drafts, gaps, strict=True) if gap > o.threshold]
        if not kept:
            raise InputError(
                f"improver: no seed's gold answer beats its draft by {o.threshold}; score gaps {quantiles(gaps)}; "
                "lower the improver's --threshold"
            )
    else:
        kept = drafts
    rows = [
        {
            "id": digest(seed["id"], draft.get("sample", 0)),
            "prompt": improver_prompt(seed, draft["response"], o),
            "response": seed["response"],
        }
        for seed, draft in kept
    ]
    return rows, {"drafts": len(answers), "kept": len(kept)}


def train_improver(
    model: str | Path,
    seeds: list[dict],
    answers: list[dict],
    out: str | Path,
    o: ImproverOptions,
    common: Common,
) -> dict:
    """SFT of M_0 on drafts -> gold answers."""
    rows, counts = training_rows(
        seeds, answers, o, load_scorer(o.scorer, model, common, alone=True)
    )
    return {**counts, **sft(model, rows, out, o, common)}


def rewrite(
    model: str | Path,
    improver: Path,
    answers: Path,
    out: Path,
    o: ImproverOptions,
    common: Common,
    shared: dict,
    iteration: int = 1,
) -> dict:
    """Two stages: candidates for every answer, then the best of each; returns the counts of the second.

    model is M_0, under which `likelihood` scores; answers: a file of records {id, prompt | messages, response, finish_reason};
    shared: the options that the manifests of both name.
    """
    rows, candidates = read_jsonl(answers), Path(out).with_suffix(".candidates.jsonl")
    requests = [
        {"id": row["id"], "prompt": improver_prompt(row, row["response"], o)} for row in rows
    ]
    stage(
        candidates,
        {"model": improver, "answers": answers},
        shared,
        lambda: sample(
            improver, requests, candidates, o, common, f"rewrites {iteration}", o.rewrites, "drafts"
        ),
    )
    return stage(
        out,
        {"model": improver, "base": model, "answers": answers, **scorer_file(o.pick)},
        shared,
        lambda: pick(model, rows, candidates, out, o, common),
    )


def pick(
    model: str | Path,
    answers: list[dict],
    candidates: Path,
    out: Path,
    o: ImproverOptions,
    common: Common,
) -> dict:
    """The best candidate of each answer becomes its rewrite."""
    texts: dict[str, list[dict]] = {row["id"]: [] for row in answers}
    for row in read_jsonl(candidates) + (answers if o.draft_competes else []):
        texts[row["id"]].append(
            {"response": row["response"], "finish_reason": row["finish_reason"]}
        )
    asked = {
        row["id"]: {name: row[name] for name in ("id", "prompt", "messages") if name in row}
        for row in answers
    }
    flat = [{**asked[name], **candidate} for name, some in texts.items() for candidate in some]
    keep = out.with_suffix(".scores")
    scorer = load_scorer(o.pick, model, common, keep, alone=True)
    scores = iter(scorer(flat) if scorer else [0.0] * len(flat))
    rows = []
    for row in answers:
        # the first of the best: an empty or cut-off text only where there is no other
        ranked = max(
            texts[row["id"]],
            key=lambda c: (bool(c["response"]), c["finish_reason"] == "stop", next(scores)),
        )
        rows.append({**asked[row["id"]], "draft": row["response"], **ranked})
    on_first(write_jsonl, out, rows)
    on_first(shutil.rmtree, keep, True)
    unchanged = sum(row["response"].split() == row["draft"].split() for row in rows)
    return {
        "drafts": len(answers),
        "rewrites": len(rows),
        "unchanged": unchanged,
        "cut_off": sum(row["finish_reason"] == "length" for row in rows),
    }


@dataclass(kw_only=True)
class Options(ImproverOptions, Common):
    model: str  # M_0, from which the improver is trained
    policy: str = ""  # M_{t-1}, which writes the drafts; default: M_0
    seeds: str  # JSONL of {"prompt", "response"}
    prompts: str  # JSONL of new prompts
    out: str  # directory to write


def main(o: Options) -> dict:
    out, policy = Path(o.out), o.policy or o.model
    seeds, prompts = read_jsonl(o.seeds, "prompt", "response"), read_jsonl(o.prompts, "prompt")
    shared = {**part(o, ImproverOptions), **part(o, Common)}
    stage(
        out / "seed_answers.jsonl",
        {"model": policy, "seeds": o.seeds},
        shared,
        lambda: sample(
            policy, seeds, out / "seed_answers.jsonl", o, o, "seed answers", o.drafts, o.seeds
        ),
    )
    stage(
        out / "improver",
        {"model": o.model, "seeds": o.seeds, "answers": out / "seed_answers.jsonl"},
        shared,
        lambda: train_improver(
            o.model, seeds, read_jsonl(out / "seed_answers.jsonl"), out / "improver", o, o
        ),
    )
    stage(
        out / "answers.jsonl",
        {"model": policy, "prompts": o.prompts},
        shared,
        lambda: sample(policy, prompts, out / "answers.jsonl", o, o, "answers", source=o.prompts),
    )
    return rewrite(
        o.model, out / "improver", out / "answers.jsonl", out / "rewrites.jsonl", o, o, shared
    )


if __name__ == "__main__":
    command(main, Options)
