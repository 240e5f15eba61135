"""The controls of a finished run: what else the same seeds and pairs could have given.

    seed_sft    SFT of M_0 on the seeds
    seed_pairs  preference pairs (gold, M_0's response) from the seeds, as often as M_T saw pairs
    one_shot    one iteration with the keyword lists, prompts and pairs of all iterations

RUN/config.json, RUN/iterT/pairs.jsonl -> RUN/controls/: checkpoints, evaluations; the run's report
is written again

    python -m methods.controls --run runs/demo
    torchrun --nproc-per-node 8 -m -- methods.controls --run runs/llama3-8b
"""

from dataclasses import replace
from pathlib import Path

from dpo import train_policy
from eval.report import report
from loop import Options, Run, evaluate, score, synpo
from plumbing.options import RunOptions, cli, parse_options
from plumbing.ranks import on_rank0, print0
from plumbing.records import read_jsonl, write_jsonl
from plumbing.stage import Stage
from sample import sample
from train import finetune


def gold_pairs(seeds: Path, drafts: Path, out: Path, run: RunOptions) -> Path:
    """Pairs of a seed's gold response over each of M_0's responses to its prompt."""
    stage = Stage(out, run=run, seeds=seeds, drafts=drafts)
    if stage.done:
        return out
    gold = {row["id"]: row for row in read_jsonl(seeds)}
    pairs = []
    for draft in read_jsonl(drafts):
        seed = gold[draft["id"]]
        name = f"{draft['id']}-{draft.get('sample', 0)}"
        sides = {"chosen": seed["response"], "rejected": draft["response"]}
        if draft["response"]:
            pairs.append({**seed, "id": name, **sides})
    on_rank0(write_jsonl, out, pairs)
    return stage.finish(pairs=len(pairs))


def main(
    run: Path,  # the directory of a finished run
) -> dict:
    o = parse_options(Options, ["--config", str(run / "config.json")])
    cycle = Run(o, run, run)
    out = run / "controls"
    M_0 = o.model
    print0("controls")
    total = sum(len(read_jsonl(path)) for path in cycle.every("pairs.jsonl", o.iters))

    # SFT on the seeds
    finetune(M_0, cycle.seeds, out / "seed_sft", o.seed_sft)

    # pairs from the seeds, as many training pairs as M_T saw
    drafts = cycle.iter(1) / "seed_answers.jsonl"
    pairs = gold_pairs(cycle.seeds, drafts, out / "seed_pairs.jsonl", o.run)
    epochs = max(1, round(o.policy.epochs * total / len(read_jsonl(pairs))))
    policy = replace(o.policy, epochs=epochs)
    train_policy(M_0, [pairs], out / "seed_pairs", policy, reference=M_0, cache=cycle.cache)

    # held-out scores of both
    if o.heldout:
        for name in ("seed_sft", "seed_pairs"):
            answers = out / f"{name}_answers.jsonl"
            sample(out / name, cycle.heldout, answers, o.answers, purpose="heldout")
            score(cycle, answers, out / f"{name}_eval.json", out / name)

    # one shot
    once = o.at_once()
    once = replace(once, pairs=replace(once.pairs, max_pairs=total))
    shot = Run(once, out / "one_shot", run)
    synpo(shot, 1)
    evaluate(shot, 1)
    return on_rank0(report, run)


if __name__ == "__main__":
    cli(main)
