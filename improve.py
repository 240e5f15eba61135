r"""The response improver R_t: a prompt and a draft -> a better response (SynPO section 2.2).

What differs from the paper
1. By default no seed is filtered out; --improver.scorer and --improver.threshold give the paper's
   rule. --improver.drafts sampled responses per seed may serve as training drafts (the paper: one).
2. Several rewrites of each draft may be sampled (--rewrites.best_of), and the draft itself may
   compete (--rewrites.draft-competes); --rewrites.scorer names the scorer that picks the best (the
   paper: one rewrite, no competition). The demo's recipe uses this.
3. The template is not part of the loss (not stated there; --improver.loss-on-prompt is the other
   reading).

seeds.jsonl, seed_answers.jsonl of M_{t-1} -> improver/: a checkpoint, always trained from M_0
answers.jsonl of M_{t-1} -> rewrites.jsonl {id, prompt, response, draft, finish_reason}; all
candidates in rewrites.candidates.jsonl

    python improve.py --model M0 --policy M1 --seeds seeds.jsonl --prompts prompts.jsonl --out DIR
    torchrun --nproc-per-node 8 improve.py --model M0 --policy M1 --seeds seeds.jsonl \
        --prompts prompts.jsonl --out DIR
"""

from dataclasses import dataclass
from pathlib import Path

from checkpoint import Checkpoint
from formats.chat import Chat
from formats.records import read_jsonl
from plumbing.files import InputError, digest, write_jsonl
from plumbing.options import RunOptions, cli
from plumbing.ranges import Count, Whole
from plumbing.ranks import on_rank0
from plumbing.stage import Stage
from sample import SampleOptions, fitting, generate, repeat, sample
from scorers.base import Revision, Scorer, quantiles, score_gaps, score_pairs
from scorers.load import load_scorer, scorer_files
from train import TrainOptions, sft

TEMPLATE = """\
You are a careful assistant. Below are a question and an answer that somebody gave to it. Rewrite \
the answer so that it is better: mend what is wrong, add what is missing, stay with the question, \
and give full detail.

Given question:
{prompt}

Original answer:
{draft}

Rewritten answer:"""


@dataclass(frozen=True, kw_only=True)
class ImproverOptions(TrainOptions):
    drafts: Whole = 1  # sampled responses per seed to train on; 0: the drafts that seeds bring
    threshold: float = 0.0  # train only where score(gold) - score(draft) exceeds this
    scorer: str = "none"  # of that rule; none keeps all; see scorers/load.py
    template: str = TEMPLATE  # what R reads: {prompt}, {draft}, or any other field of a record
    feedback: str = ""  # FILE.py:FUNCTION from drafts to more fields, such as a checker's words
    max_length: Count = 6000  # tokens of template and gold response; what is longer loses its end

    @property
    def revision(self) -> Revision:
        """What R reads, in training and in rewriting."""
        return Revision(template=self.template, feedback=self.feedback)


@dataclass(frozen=True, kw_only=True)
class RewriteOptions(SampleOptions):
    best_of: Count = 1  # rewrites sampled per draft; the scorer picks one
    scorer: str = "none"  # picks the best candidate; none takes the first; see scorers/load.py
    draft_competes: bool = False  # the draft is a candidate beside its rewrites


# -------------------------------------------------------------------------------------- training R


def train_improver(
    model: Checkpoint, seeds: Path, drafts: Path, out: Path, o: ImproverOptions
) -> Path:
    """R_t <- SFT(M_0) on (seed prompt, draft) -> gold. drafts: responses of M_{t-1} to the seeds'
    prompts.
    """
    stage = Stage(
        out,
        o,
        model=model,
        seeds=seeds,
        answers=drafts,
        scorer_files=scorer_files(o.scorer),
        feedback_files=o.revision.files,
    )
    if stage.done:
        return out
    scorer = load_scorer(o.scorer, model, o.run, revision=o.revision)
    gold = read_jsonl(seeds, "prompt", "response")
    pairs = gold_and_draft(gold, read_drafts(drafts))
    rows, not_scored = training_rows(pairs, scorer, o)
    counts = {"drafts": len(pairs), "not_scored": not_scored, "kept": len(rows)}
    return stage.finish(**counts, **sft(model, rows, stage, o))


def read_drafts(path: Path) -> list[dict]:
    """Responses to the seeds' prompts; none were sampled with --improver.drafts 0."""
    return read_jsonl(path, answers=True) if path.stat().st_size else []


def gold_and_draft(seeds: list[dict], answers: list[dict]) -> list[tuple[dict, dict]]:
    """Every seed with each draft of it: the one that it brings in its field `draft`, or else the
    answers to its prompt.
    """
    asked = {seed["id"]: seed for seed in seeds if "draft" not in seed}
    pairs = []
    for answer in answers:
        if answer["response"] and answer["id"] in asked:
            pairs.append((asked[answer["id"]], answer))
    pairs += [(seed, {**seed, "response": seed["draft"]}) for seed in seeds if "draft" in seed]
    if not pairs:
        raise InputError("no seed has a draft; let --improver.drafts be 1, or give each a `draft`")
    return pairs


def training_rows(
    pairs: list[tuple[dict, dict]], scorer: Scorer | None, o: ImproverOptions
) -> tuple[list[dict], int]:
    """R's examples, where the gold response scores higher than the draft by more than the
    threshold, and how many pairs the scorer could not read.
    """
    not_scored = 0
    if scorer:
        scores = score_pairs(scorer, [seed for seed, _ in pairs], [draft for _, draft in pairs])
        gaps = score_gaps(scores)
        not_scored = gaps.count(None)
        pairs = [
            pair
            for pair, gap in zip(pairs, gaps, strict=True)
            if gap is not None and gap > o.threshold
        ]
        if not pairs:
            problem = f"no seed's gold response beats its draft by {o.threshold}"
            fix = "lower --improver.threshold"
            raise InputError(f"improver: {problem}; score gaps {quantiles(gaps)}; {fix}")
    asked = o.revision.prompts([{**seed, "response": draft["response"]} for seed, draft in pairs])
    rows = []
    for (seed, draft), prompt in zip(pairs, asked, strict=True):
        name = digest(seed["id"], draft.get("sample", 0))
        rows.append({"id": name, "prompt": prompt, "response": seed["response"]})
    return rows, not_scored


# --------------------------------------------------------------------------------------- rewriting


def rewrite(
    improver: Checkpoint,
    drafts: Path,
    base: Checkpoint,
    out: Path,
    o: RewriteOptions,
    revision: Revision,
    t: int = 1,
) -> Path:
    """y^ ~ R_t(. | x, y): the best of several rewrites of a draft; OUT.candidates.jsonl has all.

    drafts: records {id, prompt | messages, response, finish_reason}; base: M_0, under which
    `likelihood` and `settled` score.
    """
    stage = Stage(
        out,
        o,
        improver=improver,
        drafts=drafts,
        base=base,
        **revision.identity,
        iteration=t,
        scorer_files=scorer_files(o.scorer),
    )
    if stage.done:
        return out
    every = read_jsonl(drafts, answers=True)
    requests = requests_for(every, revision, Chat(improver, o.run), drafts)
    asked = {request["id"] for request in requests}
    rows = [row for row in every if row["id"] in asked]
    candidates = candidates_of(out)
    stage.beside.append(candidates)
    requests = repeat(requests, o.best_of)
    counts = generate(improver, requests, candidates, o, stage.scratch, f"rewrites {t}")

    # pick the best of each draft's candidates
    scores = stage.scratch / "scores"
    scorer = load_scorer(o.scorer, base, o.run, scores, single=True, revision=revision)
    best, not_scored = pick(rows, read_jsonl(candidates, answers=True), scorer, o)
    on_rank0(write_jsonl, out, best)
    return stage.finish(
        drafts=len(every),
        too_long=len(every) - len(rows),
        not_scored=not_scored,
        rewrites=len(best),
        unchanged=sum(row["response"].split() == row["draft"].split() for row in best),
        cut_off=sum(row["finish_reason"] == "length" for row in best),
        tokens=counts["tokens"],
        fresh=counts["fresh"],
    )


def requests_for(rows: list[dict], revision: Revision, chat: Chat, source: Path) -> list[dict]:
    """What the improver is asked, but for drafts so long that they leave no room for a rewrite."""
    requests = []
    for row, prompt in zip(rows, revision.prompts(rows), strict=True):
        requests.append({"id": row["id"], "prompt": prompt})
    return fitting(requests, chat, chat.max_positions, source)


def candidates_of(rewrites: Path) -> Path:
    """The file of all rewrites, beside that of the picked ones."""
    return rewrites.with_suffix(".candidates.jsonl")


def pick(
    drafts: list[dict], rewrites: list[dict], scorer: Scorer | None, o: RewriteOptions
) -> tuple[list[dict], int]:
    """Records {id, prompt | messages, draft, response, finish_reason}: the best candidate of each
    draft; and how many candidates the scorer could not read.
    """
    # a draft's candidates stand together, rewrites first
    place = {row["id"]: i for i, row in enumerate(drafts)}
    competing = rewrites + drafts if o.draft_competes else rewrites
    candidates = []
    for row in sorted(competing, key=lambda row: place[row["id"]]):
        draft = drafts[place[row["id"]]]
        written = ("sample", "response", "draft", "finish_reason", "tokens")
        candidate = {name: value for name, value in draft.items() if name not in written}
        candidate["draft"] = draft["response"]
        candidate |= {name: row[name] for name in ("response", "finish_reason")}
        candidates.append(candidate)

    # the first of the best: one without a score, an empty or a cut-off one only where there is no
    # other
    scores = list(scorer(candidates)) if scorer else [0.0] * len(candidates)
    best = {}
    for candidate, score in zip(candidates, scores, strict=True):
        complete = candidate["finish_reason"] == "stop"
        rank = (score is not None, bool(candidate["response"]), complete, score)
        highest, _ = best.get(candidate["id"], ((), None))
        if rank > highest:
            best[candidate["id"]] = (rank, candidate)
    return [candidate for _, candidate in best.values()], scores.count(None)


# ------------------------------------------------------------------------------------- the command


@dataclass(frozen=True, kw_only=True)
class Options:
    run: RunOptions = RunOptions()
    answers: SampleOptions = SampleOptions()  # sampling drafts from the policy
    improver: ImproverOptions = ImproverOptions()
    rewrites: RewriteOptions = RewriteOptions()


def main(
    model: Checkpoint,  # M_0, where the improver starts
    seeds: Path,  # JSONL of {"prompt", "response"}
    prompts: Path,  # JSONL of new prompts
    out: Path,  # folder to write
    o: Options,
    policy: Checkpoint | None = None,  # M_{t-1}, which writes the drafts; default: M_0
) -> Path:
    """Train R on the policy's responses to the seeds, then rewrite its responses to the prompts."""
    policy = policy or model
    n = o.improver.drafts
    seed_answers = sample(policy, seeds, out / "seed_answers.jsonl", o.answers, n, "seed answers")
    R = train_improver(model, seeds, seed_answers, out / "improver", o.improver)
    drafts = sample(policy, prompts, out / "answers.jsonl", o.answers, purpose="answers")
    return rewrite(R, drafts, model, out / "rewrites.jsonl", o.rewrites, o.improver.revision)


if __name__ == "__main__":
    cli(main)
