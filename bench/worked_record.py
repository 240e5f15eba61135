"""The worked record of docs/design.md: one prompt followed through one iteration of a DPO run.

    python loop.py --config recipes/facts.toml && python -m bench.worked_record --run runs/facts

It replaces the blocks after the page's marker by what the run's files say and its models score.
"""

import math
import re
import textwrap
from pathlib import Path

import torch

from checkpoint import load
from dpo import key, reference_logps
from formats.chat import Chat
from formats.records import read_jsonl
from loop import Options, Run
from pairs import reason_to_drop, repetition
from plumbing.files import InputError, read_text, write_text
from plumbing.options import ROOT, cli, parse_options
from plumbing.ranks import DEVICE
from plumbing.stage import read_manifest
from scorers.load import load_scorer
from train import make_sequence, response_logps

PAGE = ROOT / "docs/design.md"
BLOCK = re.compile(r"```\w+\n.*?```", re.DOTALL)
WRAP = textwrap.TextWrapper(100, subsequent_indent=" " * 15, break_on_hyphens=False)
T = 2  # the iteration: from the second on, the draft y is not y_0


def show(value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list):
        return "  ".join(map(show, value))
    return str(value).replace("\n", "\\n")


def block(rows: dict) -> str:
    """Labels and values, wrapped."""
    lines = [WRAP.fill(label.ljust(15) + show(value)) for label, value in rows.items()]
    return "\n".join(["```text", *lines, "```"])


def of_prompt(run: Run, name: str, pair: dict) -> list[dict]:
    """The records of a file of the iteration that have the pair's id."""
    return [row for row in read_jsonl(run.iter(T) / f"{name}.jsonl") if row["id"] == pair["id"]]


def prompting(run: Run, pair: dict) -> dict:
    [x] = of_prompt(run, "prompts", pair)
    words = ", ".join(x["keywords"])
    raw = read_jsonl(run.iter(T) / "prompts.raw.jsonl")
    row = next(row for row in raw if words in row["prompt"] and x["prompt"] in row["response"])
    return {"keywords": words, "G reads": row["prompt"], "G writes": row["response"]}


def training(run: Run) -> dict:
    draft = read_jsonl(run.iter(T) / "seed_answers.jsonl")[0]  # of R's first example
    seed = next(row for row in read_jsonl(run.seeds) if row["id"] == draft["id"])
    [asked] = run.o.improver.revision.prompts([{**seed, "response": draft["response"]}])
    return {
        "x*": seed["prompt"],
        "y'": draft["response"],
        "R reads": asked,
        "y*": seed["response"],
    }


def rewriting(run: Run, pair: dict) -> dict:
    """The draft and its rewrites, with the scores by which one of them was picked."""
    o = run.o
    [y_hat] = of_prompt(run, "rewrites", pair)
    candidates = of_prompt(run, "rewrites.candidates", pair)
    rows = {"y": y_hat["draft"], "R reads": candidates[0]["prompt"]}
    # the scores
    if o.rewrites.draft_competes:
        candidates.append({"sample": "y", "response": y_hat["draft"]})
    revision = o.improver.revision
    scorer = load_scorer(o.rewrites.scorer, o.model, o.run, single=True, revision=revision)
    scores = scorer([{**y_hat, "response": row["response"]} for row in candidates])
    for row, score in zip(candidates, scores, strict=True):
        rows[f"candidate {row.get('sample', 0)}"] = [score, row["response"]]
    return {**rows, "y_0": pair["rejected"]}


def filtering(run: Run, pair: dict) -> dict:
    """What the filter compares: of chosen and rejected, or of both."""
    o = run.o.pairs
    sides = of_prompt(run, "rewrites", pair) + of_prompt(run, "base_answers", pair)
    gap = pair["score_chosen"] - pair["score_rejected"]
    return {
        "words": [len(row["response"].split()) for row in sides],
        "finish_reason": [row["finish_reason"] for row in sides],
        "repetition": [repetition(row["response"]) for row in sides],
        "max_repetition": o.max_repetition,
        "gap": gap,
        "threshold": o.threshold,
        "decision": reason_to_drop(*sides, gap, o) or "kept",
    }


@torch.no_grad()
def losing(run: Run, pair: dict) -> dict:
    """Summed log-probs of both sides, and DPO's margin and loss, before and after training."""
    o = run.o
    chat = Chat(o.model, o.run)
    sides = [make_sequence(chat, pair, pair[side], o.policy) for side in ("chosen", "rejected")]
    known = reference_logps(o.model, [sides], run.cache, o.policy)
    rc, rr = (known[key(side)] for side in sides)
    beta = o.policy.loss_parameters["beta"]
    tokens = [len(ids) - start for ids, start in sides]
    rows = {"beta": beta, "tokens": tokens, "reference": [rc, rr]}
    # each model's log-probs
    for name, model in {"step 0": o.model, "trained": run.model(T)}.items():
        scored = response_logps(load(model, o.run.torch_dtype, DEVICE), sides)
        pc, pr = (logps.sum().item() for logps in scored)
        h = (pc - pr) - (rc - rr)
        rows[name] = [pc, pr]
        rows[f"{name}: h"] = h
        rows[f"{name}: loss"] = math.log1p(math.exp(-beta * h))
    return rows


def main(
    run: Path,  # the directory of a finished run
    prompt: str = "How do a painter and a barber differ?",  # of one of its pairs
) -> dict:
    o = parse_options(Options, ["--config", str(run / "config.json")])
    files = Run(o, run, run)
    pairs = {row["prompt"]: row for row in read_jsonl(files.iter(T) / "pairs.jsonl")}
    if prompt not in pairs:
        raise InputError(f"{run}: no pair has this prompt; give another --prompt")
    pair = pairs[prompt]
    steps = (
        prompting(files, pair),
        training(files),
        rewriting(files, pair),
        filtering(files, pair),
        pair,
        losing(files, pair),
        read_manifest(files.model(T))["machine"],
    )
    # the words around the blocks stay
    blocks = map(block, steps)
    before, marker, after = read_text(PAGE).partition("<!-- worked record -->")
    write_text(PAGE, before + marker + BLOCK.sub(lambda match: next(blocks), after))
    return {"pair": pair["id"]}


if __name__ == "__main__":
    cli(main)
