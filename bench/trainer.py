"""The trainer against TRL, against the machine's matmul peak, and as the work grows.

    python -m bench.trainer --model DIR --pairs P.jsonl --trl PYTHON

P.jsonl holds {"prompt", "chosen", "rejected"}; the first --steps x --batch of them are used, cut at
--max-length tokens. PYTHON is the interpreter of an environment with trl; without it we run alone.
Everything runs in a process of its own, one after the other. SFT is on the chosen responses. Tokens
are those of prompts and responses; loading is not counted, the reference pass is counted apart. TRL
keeps its weights in bf16, as its users on small machines do; ours are fp32 masters: the share of
either that the steps moved is shown. Tables on standard output, JSON in the last line.
"""

import json
import sys
import tempfile
import time
from functools import partial, wraps
from pathlib import Path
from statistics import median

import torch

import dpo
import train
from bench.command import ROOT, answer, finish, make_parser, measure, progress, run_part
from bench.peers import most_resident, read_pairs, resident, timed
from bench.tables import add_json_flag
from checkpoint import Checkpoint, Weights, load_config, parse_config, save
from model import Model
from plumbing.chat import Chat
from plumbing.options import RunOptions
from plumbing.ranks import distributed
from plumbing.records import read_jsonl, write_jsonl
from plumbing.stage import counts_of

OURS = [sys.executable, "-m", "bench.trainer"]
PEERS = ROOT / "bench/peers.py"
GIVEN = ("model", "pairs", "steps", "batch", "max_length", "micro_batch_tokens")


# ---------------------------------------------------------------------------------- one run


class Watch:
    """Seconds of the last call of a module's function, and what it returned."""

    def __init__(self, module, name: str):
        self.seconds = 0.0
        self.result = None
        # replaced where it is looked up: what calls it need not know
        function = getattr(module, name)

        @wraps(function)
        def watched(*args, **named):
            start = time.perf_counter()
            self.result = function(*args, **named)
            self.seconds = time.perf_counter() - start
            return self.result

        setattr(module, name, watched)


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


def run_ours(model: str, pairs: str, method: str, steps: int, batch: int, **shared) -> dict:
    """dpo.train_policy or train.finetune, as the commands run them."""
    rows = read_pairs(pairs, steps * batch, shared["max_length"])
    peak = peak_flops()
    before = resident()
    shared.update(run=RunOptions(peak_tflops=peak / 1e12), batch=batch, epochs=1)
    reference = Watch(dpo, "reference_logps")
    sharding = Watch(train, "shard")
    with distributed(), tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        out = Path(folder) / "out"
        write_jsonl(data, [{**row, "response": row["chosen"]} for row in rows])
        start = time.perf_counter()
        if method == "dpo":
            o = dpo.PolicyOptions(**shared, lr=5e-7, loss_parameters={"beta": 0.1})
            dpo.train_policy(Checkpoint(model), [data], out, o)
        else:
            o = train.TrainOptions(**shared, lr=1e-6)
            train.finetune(Checkpoint(model), data, out, o)
        whole = time.perf_counter() - start

        # what it took, and how many of the fp32 masters moved
        peak_gb = (most_resident() - before) / 1e9
        text = (out / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        tokens = counts_of(out)["tokens"]
        old = Weights(model)
        masters = dict(sharding.result.named_parameters())
        moved = sum(count_moved(p, old.slice(name)) for name, p in masters.items())
    seconds = sum(line["seconds"] for line in lines)
    return {
        "seconds": seconds,
        "reference_seconds": reference.seconds,
        "peak_gb": peak_gb,
        "moved": moved / sum(p.numel() for p in masters.values()),
        "tokens": tokens,
        "mfu": median(line["mfu"] for line in lines),
        "peak_gflops": peak / 1e9,
        "step_seconds": median(line["seconds"] for line in lines),
        "start_seconds": whole - seconds - reference.seconds,
    }


def count_moved(parameter: torch.Tensor, old) -> int:
    return (parameter.full_tensor() != old[:].float()).sum().item()


# ---------------------------------------------------------------------------------- what to run


def long_pairs(pairs: str, n: int) -> str:
    """A file of long pairs, n of the given ones joined, so that nearly all reach the length."""
    rows = read_jsonl(pairs)
    joined = []
    for i in range(0, len(rows) - n + 1, n):
        group = rows[i : i + n]
        sides = {side: "\n\n".join(row[side] for row in group) for side in ("chosen", "rejected")}
        joined.append({"prompt": group[0]["prompt"], **sides})
    path = Path(tempfile.mkdtemp()) / "long.jsonl"
    write_jsonl(path, joined)
    return str(path)


def changed(model: str, **changes) -> str:
    """A checkpoint of another size with the same tokenizer, its weights random."""
    config = load_config(model)
    made = Model(parse_config({**config.raw, "head_dim": config.head_dim, **changes}))
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    out = tempfile.mkdtemp()
    save(made, Path(out), model, torch.bfloat16, Chat(model).template)
    return out


# ---------------------------------------------------------------------------------- all of it


def compare(args) -> dict[str, list[dict]]:
    """DPO at the length asked for, SFT, and DPO at four times the length, where memory counts."""
    given = {name: getattr(args, name) for name in GIVEN}
    long = {"max_length": 4 * args.max_length, "steps": 1, "batch": 2}
    kinds = {
        "dpo": {"method": "dpo"},
        "sft": {"method": "sft"},
        "dpo, long": {"method": "dpo", **long, "pairs": long_pairs(args.pairs, 6)},
    }
    rows = []
    for name, changes in kinds.items():
        # ours; the peer is given no option that it does not have
        checkpointing = {"activation_checkpointing": args.activation_checkpointing}
        ours = run_part(OURS, "ours", {**given, **checkpointing, **changes})
        rows.append(shown({"training": f"{name}: ours"}, ours))
        print(f"peak: {ours['peak_gflops']:.0f} GFLOP/s in a large bf16 matmul")
        if not args.trl:
            continue

        # isolated, and not in our directory: the peer must not take our files for its own
        command = [args.trl, "-I", str(PEERS)]
        peer = run_part(command, "trl", {**given, **changes}, PEERS.parent)
        rows.append(shown({"training": f"{name}: TRL"}, {**peer, "tokens": ours["tokens"]}))
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
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    small.update(num_attention_heads=2, num_key_value_heads=2)
    changes = {"length": {}, "layers": {}, "pairs": {}}
    for length in (256, 1024, 4096):
        one = {"max_length": length, "batch": 2, "steps": 1, "pairs": long_pairs(args.pairs, 12)}
        changes["length"][length] = one
    for layers in (1, 8, 32):
        one = {"model": changed(args.model, num_hidden_layers=layers), "steps": 2}
        changes["layers"][layers] = one
    for pairs in (100, 1000, 10000):
        one = {"model": changed(args.model, **small), "max_length": 64}
        changes["pairs"][pairs] = {**one, "steps": pairs // args.batch}

    # a table for each of them
    given = {name: getattr(args, name) for name in GIVEN}
    given.update(method="dpo", activation_checkpointing=args.activation_checkpointing)
    tables = {}
    for name, runs in changes.items():
        tables[name] = []
        for x, one in runs.items():
            run = run_part(OURS, "ours", {**given, **one})
            row = shown({name: x}, run)
            row["start s"] = f"{run['start_seconds']:.1f}"
            tables[name].append({**row, "s a step": f"{run['step_seconds']:.3f}"})
    return tables


def shown(row: dict, run: dict) -> dict:
    """A row and its run's figures; also printed at once, as the next run may take long."""
    row = {
        **row,
        "tokens/s": f"{run['tokens'] / run['seconds']:.0f}",
        "reference s": f"{run['reference_seconds']:.1f}",
        "mfu": f"{run['mfu']:.0%}" if "mfu" in run else "-",
        "memory GB": f"{run['peak_gb']:.2f}",
        "moved": f"{run['moved']:.2%}",
    }
    progress(str(row))
    return row


PARTS = {"compare": compare, "growth": growth}


def main() -> None:
    answer({"ours": run_ours})
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--pairs", required=True, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--trl", default="", help="Python that has trl")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="pairs in each")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and response")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="of ours")
    parser.add_argument("--activation-checkpointing", action="store_true", help="of ours")
    parser.add_argument("--only", choices=PARTS, help="one part of the whole")
    add_json_flag(parser)
    args = parser.parse_args()
    # the parts run in other directories
    args.model = str(Path(args.model).resolve())
    args.pairs = str(Path(args.pairs).resolve())
    finish(measure, PARTS, args)


if __name__ == "__main__":
    main()
