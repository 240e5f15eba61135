"""The controls of a run (`loop.py --controls`): what else the same seeds and pairs could have given.

SFT of M_0 on the seeds; preference pairs (gold, M_0's answer) from the seeds, trained for as many pairs as M_T saw; and one
iteration with as many keyword lists, prompts and pairs as all iterations together had.
"""

from dataclasses import asdict, replace

from data import read_jsonl, say, stage
from dpo import train_policy
from train import sft


def run_controls(cycle) -> None:
    """What else the same seeds and pairs could have given: SFT on the seeds, pairs from the seeds, one shot."""
    o, out, M_0 = cycle.o, cycle.out / "controls", cycle.M_0
    say("controls")
    total = sum(len(read_jsonl(cycle.folder(t) / "pairs.jsonl")) for t in range(1, o.iters + 1))
    gold = {row["id"]: row for row in cycle.seeds}
    drafts = cycle.folder(1) / "seed_answers.jsonl"
    pairs = [
        {
            **gold[row["id"]],
            "id": f"{row['id']}-{row.get('sample', 0)}",
            "chosen": gold[row["id"]]["response"],
            "rejected": row["response"],
        }
        for row in read_jsonl(drafts)
        if row["response"]
    ]
    equal_work = replace(o.policy, epochs=max(1, round(o.policy.epochs * total / len(pairs))))
    stage(
        out / "seed_sft",
        {"model": M_0, "seeds": o.seeds},
        {**asdict(o.seed_sft), **cycle.common},
        lambda: sft(M_0, cycle.seeds, out / "seed_sft", o.seed_sft, o),
    )
    stage(
        out / "seed_pairs",
        {"model": M_0, "seeds": o.seeds, "answers": drafts},
        {**asdict(equal_work), **cycle.common},
        lambda: train_policy(
            M_0, pairs, out / "seed_pairs", equal_work, o, M_0, cycle.home / "reference"
        ),
    )
    for name in ("seed_sft", "seed_pairs") if o.evaluate else ():
        answers = cycle.answer(
            out / name, o.heldout, out / f"{name}_answers.jsonl", "heldout", limit=o.heldout_limit
        )
        cycle.judge(out / name, answers, out / f"{name}_eval.json")
    once = o.at_once()
    type(cycle)(
        replace(once, filter=replace(once.filter, pairs=total)),
        out / "one_shot",
        cycle.generator,
        cycle.home,
    ).run()
