"""The controls of a finished run: what else the same seeds, prompts and models could have given.

    seed_sft      SFT of M_0 on the seeds
    seed_pairs    preference pairs (gold, M_0's response) from the seeds, as often as M_T saw pairs
    one_shot      one iteration with the keyword lists, prompts and pairs of all iterations
    nll           the iterations again, each trained on the chosen responses alone (loss sft)
    nll_one_shot  both at once
    repeated      M_0's responses to iteration t's prompts, revised t times by R_1, distilled once

RUN/config.json, RUN/iterT/... -> RUN/controls/: checkpoints, evaluations; the run's report is
written again. M_0's best of n needs no run: it is `best` in iter0/eval_samples.json.

    python -m methods.controls --run runs/demo
    python -m methods.controls --run runs/demo --only seed_sft,one_shot
    torchrun --nproc-per-node 8 -m -- methods.controls --run runs/llama3-8b
"""

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from dpo import train_policy
from eval.in_run import evaluate, evaluate_one
from eval.report import report
from formats.records import read_jsonl
from improve import gold_and_draft, read_drafts, rewrite, train_improver
from loop import Options, Run, synpo
from pairs import make_pairs
from plumbing.files import InputError, load_json, write_jsonl
from plumbing.options import RunOptions, cli, parse_options
from plumbing.ranks import on_rank0, print0
from plumbing.stage import Stage
from train import finetune


def seed_sft(cycle: Run, out: Path) -> None:
    finetune(cycle.o.model, cycle.seeds, out, cycle.o.seed_sft)
    evaluate_one(cycle, out)


def seed_pairs(cycle: Run, out: Path, total: int) -> None:
    """Preference pairs of gold over drafts. total: pairs that all iterations have made."""
    o, M_0 = cycle.o, cycle.o.model

    # as many training pairs as M_T saw
    drafts = cycle.iter(1) / "seed_answers.jsonl"
    pairs = gold_pairs(cycle.seeds, drafts, out.with_suffix(".jsonl"), o.run)
    epochs = max(1, round(o.policy.epochs * total / len(read_jsonl(pairs))))
    policy = replace(o.policy, epochs=epochs)
    train_policy(M_0, [pairs], out, policy, reference=M_0, cache=cycle.cache)
    evaluate_one(cycle, out)


def gold_pairs(seeds: Path, drafts: Path, out: Path, run: RunOptions) -> Path:
    """Pairs of a seed's gold response over each draft of it."""
    stage = Stage(out, run=run, seeds=seeds, drafts=drafts)
    if stage.done:
        return out
    pairs = []
    for seed, draft in gold_and_draft(read_jsonl(seeds), read_drafts(drafts)):
        name = f"{draft['id']}-{draft.get('sample', 0)}"
        sides = {"chosen": seed["response"], "rejected": draft["response"]}
        pairs.append({**seed, "id": name, **sides})
    on_rank0(write_jsonl, out, pairs)
    return stage.finish(pairs=len(pairs))


def one_shot(cycle: Run, o: Options, out: Path, total: int) -> None:
    """One iteration with the budget of all. total: pairs that all iterations have made."""
    once = o.at_once()
    once = replace(once, pairs=replace(once.pairs, max_pairs=total))
    shot = Run(once, out, cycle.home)
    synpo(shot, 1)
    evaluate(shot, 1)


def again(cycle: Run, o: Options, out: Path) -> None:
    """All iterations with other options."""
    other = Run(o, out, cycle.home)
    for t in range(1, o.iters + 1):
        synpo(other, t)
        evaluate(other, t)


def repeated(cycle: Run, out: Path) -> None:
    """R_1 applied t times to M_0's responses, and M_0 trained on the result, for t = 2 .. T."""
    o, M_0, revision = cycle.o, cycle.o.model, cycle.o.improver.revision
    other = Run(o, out, cycle.home)

    # R_1 once more: its weights were discarded
    drafts = cycle.iter(1) / "seed_answers.jsonl"
    R_1 = train_improver(M_0, cycle.seeds, drafts, out / "improver", o.improver)
    for t in range(2, o.iters + 1):
        y_0, it = cycle.iter(t) / "base_answers.jsonl", other.iter(t)
        y = y_0
        for time in range(1, t + 1):
            rewrites = it / f"rewrites{time}.jsonl"
            y = rewrite(R_1, y, M_0, rewrites, o.rewrites, revision, time)
        make_pairs(y, y_0, it / "pairs.jsonl", o.pairs, M_0, t, revision)
        pairs = [it / "pairs.jsonl"]
        train_policy(M_0, pairs, other.model(t), o.policy, reference=M_0, cache=cycle.cache)
        evaluate(other, t)


def main(
    run: Path,  # the directory of a finished run
    only: str = "",  # some controls, with commas between; empty: all
) -> dict:
    config = run / "config.json"
    known = {field.name for field in (*fields(Options), *fields(RunOptions))}
    foreign = [name for name in load_json(config) if name.partition(".")[0] not in known]
    if foreign:
        problem = f"option {foreign[0]} is of another method; controls are for runs of loop.py"
        raise InputError(f"{config}: {problem}")
    o = parse_options(Options, ["--config", str(config)])
    cycle = Run(o, run, run)
    out = run / "controls"
    total = sum(len(read_jsonl(path)) for path in cycle.every("pairs.jsonl", o.iters))
    chosen_only = replace(o.policy, loss="sft", loss_parameters={}, nll=0.0)
    nll = replace(o, policy=chosen_only)

    controls = {
        "seed_sft": partial(seed_sft, cycle),
        "seed_pairs": partial(seed_pairs, cycle, total=total),
        "one_shot": partial(one_shot, cycle, o, total=total),
        "nll": partial(again, cycle, nll),
        "nll_one_shot": partial(one_shot, cycle, nll, total=total),
        "repeated": partial(repeated, cycle),
    }
    chosen = only.split(",") if only else [*controls]
    for name in chosen:
        if name not in controls:
            raise InputError(f"--only {name}: no such control; there are {', '.join(controls)}")
    print0("controls")
    for name in chosen:
        controls[name](out=out / name)
    return on_rank0(report, run)


if __name__ == "__main__":
    cli(main)
