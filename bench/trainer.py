"""The trainer against TRL, against the machine's matmul peak, and as the work grows.

    python -m bench.trainer --model DIR --pairs P.jsonl --trl PYTHON

P.jsonl holds {"prompt", "chosen", "rejected"}; the first --steps x --batch of them are used, cut at
--max-length tokens. PYTHON is the interpreter of an environment with trl; without it we run alone.
Everything runs in a process of its own, one after the other. SFT is on the chosen responses. Tokens
are those of prompts and responses; loading is not counted, the reference pass is counted apart. TRL
keeps its weights in bf16, as its users on small machines do; ours are fp32 masters: the share of
either that the steps moved is shown. Tables on standard output, JSON in the last line.
"""

import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch

import dpo
import train
from bench.command import answer, finish, measure, parser_of, progress, run_part, run_peer, watch
from bench.peers import most_resident, read_pairs, read_rows, resident, timed
from checkpoint import Checkpoint, Weights, load_config, parse_config, save
from formats.chat import Chat
from model import Model
from plumbing.files import write_jsonl
from plumbing.options import RunOptions
from plumbing.ranks import distributed
from plumbing.stage import counts_of

OURS = [sys.executable, "-m", "bench.trainer"]
SHARED = ("batch", "max_length", "micro_batch_tokens", "activation_checkpointing")


@dataclass
class Options:
    model: Path  # checkpoint directory
    pairs: Path  # JSONL of prompt, chosen, rejected
    trl: str = ""  # Python that has trl
    steps: int = 8  # optimizer steps
    batch: int = 8  # pairs in each
    max_length: int = 512  # tokens of prompt and response
    micro_batch_tokens: int = 4096  # of ours
    activation_checkpointing: bool = False  # of ours
    only: Literal["compare", "growth"] | None = None  # one part of the whole


# ---------------------------------------------------------------------------------- one run


def peak_flops() -> float:
    """Peak FLOP/s of this process: the best bf16 matmul of about a second of them.

    Their size doubles until one takes 10 ms: large on a fast CPU, and soon done on one without
    bf16. Training has all three layouts; such a CPU is many times faster in some than in others.
    """
    best = 0.0
    n = 128
    start = time.perf_counter()
    while time.perf_counter() < start + 1:
        a = torch.randn(n, n).bfloat16()
        seconds = [timed(partial(torch.mm, *pair)) for pair in ((a, a), (a, a.T), (a.T, a))]
        best = max(best, 2 * n**3 / min(seconds))
        if max(seconds) < 0.01:
            n *= 2
    return best


def run_ours(model: str, pairs: str, method: str, steps: int, **given) -> dict:
    """dpo.train_policy or train.finetune, as the commands run them."""
    shared = {name: given[name] for name in SHARED}
    rows = read_pairs(pairs, steps * shared["batch"], shared["max_length"])
    peak = peak_flops()
    shared.update(run=RunOptions(peak_tflops=peak / 1e12), epochs=1)
    before = resident()
    reference: list[float] = []  # seconds
    trained = []
    watch(dpo, "reference_logps", lambda seconds, *_: reference.append(seconds))
    watch(train, "shard", lambda seconds, model, *_: trained.append(model))
    with distributed(), tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        out = Path(folder) / "out"
        write_jsonl(data, [{**row, "response": row["chosen"]} for row in rows])
        if method == "dpo":
            o = dpo.PolicyOptions(**shared, lr=5e-7, loss_parameters={"beta": 0.1})
            work = partial(dpo.train_policy, Checkpoint(model), [data], out, o)
        else:
            o = train.TrainOptions(**shared, lr=1e-6)
            work = partial(train.finetune, Checkpoint(model), data, out, o)
        whole = timed(work)

        # what it took, and how many of the fp32 masters moved
        peak_gb = (most_resident() - before) / 1e9
        lines = read_rows(out / "metrics.jsonl")
        tokens = counts_of(out)["tokens"]
        old = Weights(model)
        masters = {name: p.full_tensor() for name, p in trained[0].named_parameters()}
        moved = sum((p != old.slice(name)[:].float()).sum() for name, p in masters.items())
    seconds = sum(line["seconds"] for line in lines)
    return {
        "seconds": seconds,
        "reference_seconds": sum(reference),
        "peak_gb": peak_gb,
        "moved": moved.item() / sum(p.numel() for p in masters.values()),
        "tokens": tokens,
        "mfu": median(line["mfu"] for line in lines),
        "peak_gflops": peak / 1e9,
        "step_seconds": median(line["seconds"] for line in lines),
        "start_seconds": whole - seconds - sum(reference),
    }


# ---------------------------------------------------------------------------------- what to run


def long_pairs(pairs: Path, n: int) -> Path:
    """A file of long pairs, n of the given ones joined, so that nearly all reach the length."""
    rows = read_rows(pairs)
    joined = []
    for i in range(0, len(rows) - n + 1, n):
        row = {"prompt": rows[i]["prompt"]}
        for side in ("chosen", "rejected"):
            row[side] = "\n\n".join(one[side] for one in rows[i : i + n])
        joined.append(row)
    path = Path(tempfile.mkdtemp()) / "long.jsonl"
    write_jsonl(path, joined)
    return path


def changed(model: Path, **changes) -> Path:
    """A checkpoint of another size with the same tokenizer, its weights random."""
    config = load_config(model)
    made = Model(parse_config({**config.raw, "head_dim": config.head_dim, **changes}))
    out = Path(tempfile.mkdtemp())
    save(made, out, model, torch.bfloat16, Chat(model).template)
    return out


# ---------------------------------------------------------------------------------- all of it


def compare(args) -> dict[str, list[dict]]:
    """DPO at the length asked for, SFT, and DPO at four times the length, where memory counts."""
    long = {"max_length": 4 * args.max_length, "steps": 1, "batch": 2}
    kinds = {
        "dpo": {"method": "dpo"},
        "sft": {"method": "sft"},
        "dpo, long": {"method": "dpo", **long, "pairs": long_pairs(args.pairs, 6)},
    }
    rows = []
    for name, changes in kinds.items():
        given = {**vars(args), **changes}
        ours = run_part(OURS, "ours", given)
        rows.append(shown({"training": f"{name}: ours"}, ours))
        print(f"peak: {ours['peak_gflops']:.0f} GFLOP/s in a large bf16 matmul")
        if not args.trl:
            continue

        peer = run_peer(args.trl, "trl", given)
        rows.append(shown({"training": f"{name}: TRL"}, {**ours, **peer, "mfu": None}))
        ratio = peer["seconds"] / ours["seconds"]
        memory = ours["peak_gb"] / peer["peak_gb"]
        reference = ""
        if name != "sft":
            speed = peer["reference_seconds"] / ours["reference_seconds"]
            reference = f", reference pass {speed:.2f}x"
        print(f"{name}: {ratio:.2f}x TRL{reference}, {memory:.2f} of its memory")
    return {"compare": rows}


def growth(args) -> dict[str, list[dict]]:
    """One step of two long pairs by length, two steps of the usual pairs by layers, many short
    pairs on a very small model.
    """
    long = {"batch": 2, "steps": 1, "pairs": long_pairs(args.pairs, 12)}
    small = changed(
        args.model,
        num_hidden_layers=1,
        hidden_size=64,
        intermediate_size=64,
        head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    runs = [("length", n, {**long, "max_length": n}) for n in (256, 1024, 4096)]
    for layers in (1, 8, 32):
        model = changed(args.model, num_hidden_layers=layers)
        runs.append(("layers", layers, {"model": model, "steps": 2}))
    for pairs in (100, 1000, 10000):
        steps = pairs // args.batch
        runs.append(("pairs", pairs, {"model": small, "max_length": 64, "steps": steps}))

    # a table for each of them
    tables = defaultdict(list)
    for name, x, changes in runs:
        run = run_part(OURS, "ours", {**vars(args), "method": "dpo", **changes})
        row = shown({name: x}, run)
        row["start s"] = f"{run['start_seconds']:.1f}"
        row["s a step"] = f"{run['step_seconds']:.3f}"
        tables[name].append(row)
    return tables


def shown(row: dict, run: dict) -> dict:
    """A row and its run's figures; also printed at once, as the next run may take long."""
    row = {
        **row,
        "tokens/s": f"{run['tokens'] / run['seconds']:.0f}",
        "reference s": f"{run['reference_seconds']:.1f}",
        "mfu": f"{run['mfu']:.0%}" if run["mfu"] else "-",
        "memory GB": f"{run['peak_gb']:.2f}",
        "moved": f"{run['moved']:.2%}",
    }
    progress(str(row))
    return row


PARTS = {"compare": compare, "growth": growth}


def main() -> None:
    answer({"ours": run_ours})
    finish(measure, PARTS, parser_of(Options).parse_args())


if __name__ == "__main__":
    main()
