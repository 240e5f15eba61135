"""The trainer against what people would use instead, against the machine's matmul peak, and as the work grows.

    python bench/trainer.py --model DIR --pairs P.jsonl --trl PYTHON

P.jsonl holds {"prompt", "chosen", "rejected"}; the first `--steps` x `--batch` of them are used, cut at `--max-length` tokens.
PYTHON is the interpreter of an environment with trl; without it we run alone. Everything runs in a process of its own, one
after the other. SFT is on the chosen answers. Tokens are those of prompts and answers; loading is not counted, the reference
pass is counted apart. TRL keeps its weights in bf16, as its users on small machines do; ours are fp32 masters: how many of
either the steps moved is counted. Tables on standard output, JSON in the last line.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from sampler import resident

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def read_pairs(args) -> list[dict]:
    """As many pairs as the steps take, from the start again where the file has fewer; prompts that leave room for an answer."""
    rows = [json.loads(line) for line in Path(args.pairs).read_text().splitlines()]
    rows = [row for row in rows if len(row["prompt"]) < 2 * args.max_length]
    return [{**rows[i % len(rows)], "id": str(i)} for i in range(args.steps * args.batch)]


def most_resident() -> int:
    """Bytes of memory that this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------------------------------------- the peer


def run_trl(args) -> dict:
    """TRL's DPOTrainer or SFTTrainer in bf16, two micro-batches to an optimizer step."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    before = resident()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    marks = {}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            marks["begin"] = time.perf_counter()

        def on_train_end(self, *_, **__):
            marks["end"] = time.perf_counter()

    shared = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": args.batch // 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "max_length": args.max_length,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "logging_steps": 1000,
    }
    start = time.perf_counter()
    if args.method == "dpo":
        rows = [
            {
                "prompt": turn("user", r["prompt"]),
                "chosen": turn("assistant", r["chosen"]),
                "rejected": turn("assistant", r["rejected"]),
            }
            for r in read_pairs(args)
        ]
        config = DPOConfig(**shared, learning_rate=5e-7, beta=0.1, precompute_ref_log_probs=True)
    else:
        rows = [
            {"prompt": turn("user", r["prompt"]), "completion": turn("assistant", r["chosen"])}
            for r in read_pairs(args)
        ]
        config = SFTConfig(**shared, learning_rate=1e-6)
    trainer = (DPOTrainer if args.method == "dpo" else SFTTrainer)(
        model=model,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
        args=config,
    )
    reference = time.perf_counter() - start
    trainer.train()
    peak_gb, old = (
        (most_resident() - before) / 1e9,
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16),
    )
    moved = sum(
        (p != q).sum().item() for p, q in zip(model.parameters(), old.parameters(), strict=True)
    )
    return {
        "seconds": marks["end"] - marks["begin"],
        "reference_seconds": reference,
        "peak_gb": peak_gb,
        "moved": moved / sum(p.numel() for p in model.parameters()),
    }


# ---------------------------------------------------------------------------------------------- us


def run_ours(args) -> dict:
    """dpo.train_policy or train.sft, as the commands run them."""
    import dpo
    import train
    from data import Common, peak_flops, processes
    from dpo import policy_options, train_policy
    from model import Weights
    from train import TrainOptions, sft

    rows, common = read_pairs(args), Common()
    before = resident()
    shared = {
        "batch": args.batch,
        "max_length": args.max_length,
        "epochs": 1,
        "micro_tokens": args.micro_tokens,
        "recompute": args.recompute,
    }
    timed, kept = {}, {}

    def clock(module, name):
        function = getattr(module, name)

        def counted(*values, **named):
            start = time.perf_counter()
            kept[name] = function(*values, **named)
            timed[name] = time.perf_counter() - start
            return kept[name]

        setattr(module, name, counted)

    with processes(), tempfile.TemporaryDirectory() as folder:
        clock(dpo, "reference_logps")
        clock(train, "shard")
        start = time.perf_counter()
        if args.method == "dpo":
            o = policy_options(**shared, lr=5e-7, beta=0.1)
            counts = train_policy(
                args.model, rows, f"{folder}/out", o, common, args.model, f"{folder}/reference"
            )
        else:
            o = TrainOptions(**shared, lr=1e-6)
            counts = sft(
                args.model,
                [{**row, "response": row["chosen"]} for row in rows],
                f"{folder}/out",
                o,
                common,
            )
        whole = time.perf_counter() - start
        lines = [json.loads(line) for line in open(f"{folder}/out/metrics.jsonl")]
        peak_gb, old, masters = (
            (most_resident() - before) / 1e9,
            Weights(args.model),
            dict(kept["shard"].named_parameters()),
        )
        moved = sum(
            (p.full_tensor() != old.slice(name)[:].float()).sum().item()
            for name, p in masters.items()
        )
    seconds = sum(line["seconds"] for line in lines)
    return {
        "seconds": seconds,
        "reference_seconds": timed.get("reference_logps", 0.0),
        "peak_gb": peak_gb,
        "moved": moved / sum(p.numel() for p in masters.values()),
        "tokens": counts["tokens"],
        "share_of_peak": median(line["share_of_peak"] for line in lines),
        "peak_gflops": peak_flops(common.dtype) / 1e9,
        "step_seconds": median(line["seconds"] for line in lines),
        "start_seconds": whole - seconds - timed.get("reference_logps", 0.0),
    }


# ---------------------------------------------------------------------------------------------- all of it

RUNS = {"ours": run_ours, "trl": run_trl}


def child(args, what: str, python: str = sys.executable, **changes) -> dict:
    """RUNS[what] in a process of its own."""
    names = (
        "model",
        "pairs",
        "method",
        "steps",
        "batch",
        "max_length",
        "micro_tokens",
        "recompute",
    )
    options = {**{name: getattr(args, name) for name in names}, **changes}
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in options.items()
        if not isinstance(value, bool)
    ]
    flags += [f"--{name}" for name, value in options.items() if value is True]
    # not in our directory: peers must not take our files for theirs
    done = subprocess.run(
        [python, __file__, "--run", what, *flags],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    if done.returncode:
        sys.exit(f"{what}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(who: str, run: dict) -> None:
    rate = run["tokens"] / run["seconds"]
    share = f"{run['share_of_peak']:6.0%}" if "share_of_peak" in run else f"{'':6s}"
    print(
        f"{who:22s} {rate:8.0f} {run['reference_seconds']:11.1f} {share}  {run['peak_gb']:9.2f}  {run['moved']:7.2%}",
        flush=True,
    )


def compare(args) -> dict:
    """DPO at the length asked for, SFT, and DPO with four times the length, where memory is what counts."""
    print(f"{'':22s} tokens/s  reference s   peak  memory GB    moved")
    result = {}
    long = {"max_length": 4 * args.max_length, "steps": 1, "batch": 2}
    for name, changes in {"dpo": {}, "sft": {"method": "sft"}, "dpo, long": long}.items():
        if name == "dpo, long":
            changes["pairs"] = join(args, 6)
        ours = child(args, "ours", **changes)
        show(f"{name}: ours", ours)
        result[name] = {"ours": ours}
        if args.trl:
            peer = {**child(args, "trl", args.trl, **changes), "tokens": ours["tokens"]}
            show(f"{name}: TRL", peer)
            result[name] |= {
                "trl": peer,
                "times_as_fast": peer["seconds"] / ours["seconds"],
                "memory": ours["peak_gb"] / peer["peak_gb"],
            }
            if name != "sft":
                result[name]["times_as_fast_reference"] = (
                    peer["reference_seconds"] / ours["reference_seconds"]
                )
    for name, one in result.items():
        if args.trl:
            reference = (
                f", its reference pass {one['times_as_fast_reference']:.2f}"
                if name != "sft"
                else ""
            )
            print(
                f"{name}: we are {one['times_as_fast']:.2f} times as fast as TRL{reference}, "
                f"in {one['memory']:.2f} of its memory"
            )
    print(f"peak: {result['dpo']['ours']['peak_gflops']:.0f} GFLOP/s in a large bf16 matmul\n")
    return result


def join(args, n: int) -> str:
    """A file of long pairs: n of the given ones in a row make one, so that nearly all reach the length."""
    rows = [json.loads(line) for line in Path(args.pairs).read_text().splitlines()]
    groups = [rows[i : i + n] for i in range(0, len(rows) - n + 1, n)]
    path = Path(tempfile.mkdtemp()) / "long.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": group[0]["prompt"],
                    **{
                        side: "\n\n".join(row[side] for row in group)
                        for side in ("chosen", "rejected")
                    },
                }
            )
            + "\n"
            for group in groups
        )
    )
    return str(path)


def growth(args) -> dict:
    """One step of two long pairs by length, two steps of the usual pairs by layers, many short pairs on a very small model."""
    result = {"length": {}, "layers": {}, "pairs": {}}
    head = "tokens/s   peak  memory GB  start s  s a step"

    def row(what: str, x: int, **changes) -> None:
        run = result[what][x] = child(args, "ours", **changes)
        print(
            f"{x:10d}  {run['tokens'] / run['seconds']:8.0f} {run['share_of_peak']:6.0%} {run['peak_gb']:10.2f} "
            f"{run['start_seconds']:8.1f} {run['step_seconds']:9.3f}",
            flush=True,
        )

    print("max length  " + head)
    for length in (256, 1024, 4096):
        row("length", length, max_length=length, batch=2, steps=1, pairs=join(args, 12))
    print("    layers  " + head)
    for layers in (1, 8, 32):
        row("layers", layers, model=changed(args.model, num_hidden_layers=layers), steps=2)
    print("     pairs  " + head + "   (1 layer, 64 wide, at most 64 tokens)")
    small = changed(
        args.model,
        num_hidden_layers=1,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    )
    for pairs in (100, 1000, 10000):
        row("pairs", pairs, model=small, steps=pairs // args.batch, max_length=64)
    return result


def changed(model: str, **changes) -> str:
    """A checkpoint of another size with the same tokenizer, its weights random."""
    import torch

    from data import Chat
    from model import Config, Model, save

    config = Config.load(model)
    made = Model(Config.parse({**config.raw, "head_dim": config.head_dim, **changes}))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else None
    out = Path(tempfile.mkdtemp())
    save(made, out, model, torch.bfloat16, Chat(model).template)
    return str(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--pairs", required=True, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--trl", default="", help="Python that has trl")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="pairs in each")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and answer")
    parser.add_argument(
        "--micro-tokens", type=int, default=4096, help="of ours: tokens of a packed micro-batch"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="of ours: activation checkpointing"
    )
    parser.add_argument("--method", choices=("dpo", "sft"), default="dpo", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("compare", "growth"), help="one part of the whole")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(RUNS[args.run](args)))
        return
    parts = {"compare": compare, "growth": growth}
    print(
        json.dumps({name: part(args) for name, part in parts.items() if args.only in (None, name)})
    )


if __name__ == "__main__":
    main()
