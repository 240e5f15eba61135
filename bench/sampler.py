"""The sampler against its peers, against the machine's limit, and as the work grows.

    python -m bench.sampler --model DIR --requests R.jsonl --transformers PYTHON --vllm PYTHON

R.jsonl holds {"prompt", "max_new_tokens"}: exactly that many tokens are written for each, at
temperature 0.7. PYTHON is the interpreter of an environment with that peer; without it the peer is
left out. Everything runs in a process of its own, one after the other, the peers alternating with
us --rounds times; loading and one short warm-up are not counted.

The limit is what a step's matmuls take alone, on their shapes, plus its live keys and values at the
bandwidth of streaming memory, both measured in the same process as the step. Tables on standard
output, JSON in the last line.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import torch

from bench.command import ROOT, answer, finish, make_parser, measure, progress, run_part
from bench.peers import read_requests, resident, timed
from bench.tables import add_json_flag
from checkpoint import load
from model import Linear
from ops import cpu
from ops.attention import Cache
from ops.pack import PackedLinear, pack
from plumbing.chat import Chat
from sample import Engine, Request, SampleOptions
from train import peak_memory

OURS = [sys.executable, "-m", "bench.sampler"]
PEERS = ROOT / "bench/peers.py"
PARTS_OF_A_STEP = ("matmuls", "attention", "norms, RoPE, SwiGLU", "sampling", "rest")


# ---------------------------------------------------------------------------------- whole runs


class CountingEngine(Engine):
    """An engine that keeps how many rows each of its steps had."""

    def __init__(self, *args):
        super().__init__(*args)
        self.live: list[int] = []

    def step(self, state, live):
        self.live.append(state.shape[1])
        return super().step(state, live)


def run_ours(model: str, requests: str, slots: int = 0, count: int = 0, **_) -> dict:
    """The engine on chunks of requests, as sample.py runs it; how full its slots were; memory."""
    rows = read_requests(requests, count)
    chat = Chat(model)
    before = resident()
    net = pack(load(model, torch.bfloat16))
    o = SampleOptions(ignore_eos=True, slots=slots or SampleOptions.slots)
    queue = [Request(chat.prompt_ids(row), row["max_new_tokens"], i) for i, row in enumerate(rows)]

    # a short warm-up, then the measurement
    engine = CountingEngine(net, chat, o)
    engine.run([Request(r.ids, 4, r.seed) for r in queue[:4]])
    engine.live.clear()

    def work() -> None:
        for i in range(0, len(queue), o.chunk):
            engine.run(queue[i : i + o.chunk])

    seconds = timed(work)
    wanted = [row["max_new_tokens"] for row in rows]
    assert [len(r.output) for r in queue] == wanted, "every request must be written in full"

    # memory that must be there: weights as they are stored, and the KV cache
    longest = max(len(r.ids) + r.max_new_tokens for r in queue)
    rows_of_cache = engine.cache.k.shape[1]
    weights = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    cache = rows_of_cache * Cache.row_bytes(net.config, longest, torch.bfloat16)
    return {
        "seconds": seconds,
        "live_slots": sum(engine.live) / len(engine.live) / rows_of_cache,
        "slots": rows_of_cache,
        "peak_bytes": peak_memory() * 1e9 - before,
        "weights_and_cache_bytes": weights + cache,
    }


# ---------------------------------------------------------------------------------- one step


class Parts:
    """Seconds inside functions of a step, by label; wrapped where they are looked up."""

    def __init__(self):
        if cpu.library(torch.bfloat16) is None:
            sys.exit("the parts of a step are those of the compiled kernels; they need a compiler")
        self.seconds: Counter = Counter()
        # every call of C goes through cpu.call; the function's name says which it is
        labels = {"attend": "attention", "sample_token": "sampling"}

        def label_of_call(function, *_) -> str:
            return labels.get(function.__name__, "norms, RoPE, SwiGLU")

        self.wrap(cpu, "call", label_of_call)
        for layer in (Linear, PackedLinear):
            self.wrap(layer, "forward", lambda *_: "matmuls")

    def wrap(self, owner, name: str, label) -> None:
        """Count the seconds of owner.name under label(its arguments)."""
        function = getattr(owner, name)

        def counted(*args):
            start = time.perf_counter()
            result = function(*args)
            self.seconds[label(*args)] += time.perf_counter() - start
            return result

        setattr(owner, name, counted)


class Step:
    """One decode step of B rows whose caches hold `lengths` tokens of noise, as the engine's."""

    def __init__(self, model: str, rows: int, tokens: int, shortest: int):
        self.net = pack(load(model, torch.bfloat16))
        config = self.net.config
        self.engine = Engine(self.net, Chat(model), SampleOptions())
        self.engine.cache = Cache(config, rows, tokens, torch.bfloat16)
        # caches of noise, and rows in the middle of their responses
        torch.manual_seed(0)
        for x in (self.engine.cache.k, self.engine.cache.v):
            for layer in x:
                layer.normal_()
        self.lengths = torch.randint(shortest, tokens, (rows,))
        last = torch.randint(config.vocab_size, (rows,))
        self.state = torch.stack([last, self.lengths, torch.arange(rows), self.lengths])
        self.live_tokens = self.lengths.sum().item()
        self.bytes = self.live_tokens * Cache.row_bytes(config, 1, torch.bfloat16)
        self.seconds()

    def seconds(self) -> float:
        with torch.inference_mode():
            return timed(lambda: self.engine.step(self.state, int(self.lengths.max()) + 1))


def run_limit(model: str, slots: int = 0, repeats: int = 15, **_) -> dict:
    """Full slots halfway through the work: seconds of a step by part, and of its matmuls and its
    KV stream alone.
    """
    # the step, and the shapes of its matmuls
    rows = slots or SampleOptions.slots
    step = Step(model, rows, 240, 80)
    layers = [m for m in step.net.modules() if isinstance(m, Linear | PackedLinear)]
    shapes = [m.weight.shape for m in layers]
    inputs = {width: torch.randn(rows, width).bfloat16() for _, width in shapes}
    plain = [m.forward for m in layers]  # before Parts wraps the classes' own
    stream = torch.zeros(1 << 28, dtype=torch.float32)  # 1 GiB
    parts = Parts()

    @torch.inference_mode()
    def matmuls() -> None:
        for forward, (_, width) in zip(plain, shapes, strict=True):
            forward(inputs[width])

    # step and limit in turn, so that both have the machine at about the same time
    rounds = []
    for _ in range(repeats):
        parts.seconds.clear()
        seconds = step.seconds()
        one = {name: parts.seconds[name] for name in PARTS_OF_A_STEP}
        one["rest"] = seconds - sum(parts.seconds.values())
        one["step"] = seconds
        one["matmuls alone"] = timed(matmuls)
        one["KV stream alone"] = step.bytes / (stream.nbytes / timed(stream.sum))
        one["share"] = (one["matmuls alone"] + one["KV stream alone"]) / seconds
        rounds.append(one)
    result = {name: median(one[name] for one in rounds) for name in rounds[0]}
    flop = 2 * rows * sum(out * width for out, width in shapes)
    result["gflops"] = flop / result["matmuls alone"] / 1e9
    result["stream_gb_per_s"] = step.bytes / result["KV stream alone"] / 1e9
    return {**result, "rows": rows}


def run_context(model: str, count: int, repeats: int = 15, **_) -> dict:
    """16 rows of caches of up to `count` tokens, the shortest an eighth of it: attention's time."""
    step = Step(model, 16, count, count // 8)
    parts = Parts()
    # attention alone is what grows with the context
    rounds = []
    for _ in range(repeats):
        parts.seconds.clear()
        rounds.append((step.seconds(), parts.seconds["attention"]))
    seconds, attention = (median(column) for column in zip(*rounds, strict=True))
    return {
        "seconds": seconds,
        "attention": attention,
        "live_tokens": step.live_tokens,
        "peak_bytes": peak_memory() * 1e9,
    }


# ---------------------------------------------------------------------------------- all of it


def compare(args) -> dict[str, list[dict]]:
    """Everybody on the same requests, in turn."""
    given = {"model": args.model, "requests": args.requests, "count": args.count}
    commands = {"ours": (OURS, {"slots": args.slots}, ROOT)}
    for name in ("transformers", "vllm"):
        python = getattr(args, name)
        if python:
            # isolated, and not in our directory: a peer must not take our files for its own
            commands[name] = ([python, "-I", str(PEERS)], {"batch": args.batch}, PEERS.parent)
    tokens = sum(row["max_new_tokens"] for row in read_requests(args.requests, args.count))
    rates = {name: [] for name in commands}
    for turn in range(args.rounds):
        for name, (command, more, folder) in commands.items():
            run = run_part(command, name, {**given, **more}, folder)
            rates[name].append(tokens / run["seconds"])
            progress(f"round {turn + 1}: {name} {rates[name][-1]:.0f} tokens/s")
            if name == "ours":
                print(f"{run['slots']} slots, {run['live_slots']:.0%} live on average")

    # the median of the rounds' ratios, as both of a round had the machine at about the same time
    rows = []
    for name, theirs in rates.items():
        ratio = median(a / b for a, b in zip(rates["ours"], theirs, strict=True))
        shown = " ".join(f"{rate:.0f}" for rate in theirs)
        rows.append({"sampler": name, "tokens/s": shown, "ours is": f"{ratio:.2f}x"})
    return {"compare": rows}


def limit(args) -> dict[str, list[dict]]:
    """A step of full slots by part, and how near it is to the limit."""
    given = {"model": args.model, "slots": args.slots, "repeats": args.repeats}
    run = run_part(OURS, "limit", given)
    rate = run["rows"] / run["step"]
    print(f"{run['rows']} rows, {rate:.0f} tokens/s, {run['share']:.0%} of the limit")
    # the parts of the step, their sum, and what the machine would take at best
    names = {name: name for name in (*PARTS_OF_A_STEP, "step")}
    names["matmuls alone"] = f"limit: matmuls alone ({run['gflops']:.0f} GFLOP/s)"
    names["KV stream alone"] = f"limit: KV stream alone ({run['stream_gb_per_s']:.1f} GB/s)"
    rows = [{"part": shown, "ms": f"{run[name] * 1e3:.1f}"} for name, shown in names.items()]
    return {"limit": rows}


def processes(args) -> dict[str, list[dict]]:
    """sample.py by one process of one core, and by two: whole commands, loading included."""
    rows = []
    written = []
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, 2):
            # a thread a process: only two use both cores
            out = Path(folder) / f"{n}.jsonl"
            launch = ["-m", "torch.distributed.run", f"--nproc-per-node={n}"]
            flags = ["--model", args.model, "--prompts", args.requests, "--out", str(out)]
            done = subprocess.run(
                [sys.executable, *launch, "sample.py", *flags, "--ignore-eos", "--chunk=64"],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            written.append(out.read_bytes())
            seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
            rows.append({"processes": n, "seconds": f"{seconds:.1f}"})
    print("the same bytes" if written[0] == written[1] else "OTHER bytes")
    return {"processes": rows}


def growth(args) -> dict[str, list[dict]]:
    """More requests, and longer contexts."""
    requests = []
    contexts = []
    # more requests than slots: memory must not grow with them
    for count in (64, 256, 1024):
        given = {"model": args.model, "requests": args.requests, "slots": args.slots}
        run = run_part(OURS, "ours", {**given, "count": count})
        tokens = sum(row["max_new_tokens"] for row in read_requests(args.requests, count))
        over = run["peak_bytes"] / run["weights_and_cache_bytes"]
        row = {
            "requests": count,
            "tokens/s": f"{tokens / run['seconds']:.0f}",
            "live slots": f"{run['live_slots']:.0%}",
            "peak memory MB": f"{run['peak_bytes'] / 1e6:.0f}",
            "over weights + KV cache": f"{over:.2f}",
        }
        requests.append(row)
        progress(str(row))
    # attention's time must grow with the tokens that are live, and no faster
    for tokens in (256, 1024, 4096):
        given = {"model": args.model, "count": tokens, "repeats": args.repeats}
        run = run_part(OURS, "context", given)
        row = {
            "context": tokens,
            "step of 16 rows ms": f"{run['seconds'] * 1e3:.1f}",
            "attention ms": f"{run['attention'] * 1e3:.1f}",
            "ns per live token": f"{run['attention'] / run['live_tokens'] * 1e9:.0f}",
            "peak memory MB": f"{run['peak_bytes'] / 1e6:.0f}",
        }
        contexts.append(row)
        progress(str(row))
    return {"requests": requests, "context": contexts}


PARTS = {"compare": compare, "limit": limit, "processes": processes, "growth": growth}


def main() -> None:
    answer({"ours": run_ours, "limit": run_limit, "context": run_context})
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--requests", required=True, help="JSONL of prompt and max_new_tokens")
    parser.add_argument("--transformers", default="", help="Python that has transformers")
    parser.add_argument("--vllm", default="", help="Python that has vLLM")
    parser.add_argument("--rounds", type=int, default=2, help="turns of everybody")
    parser.add_argument("--batch", type=int, default=64, help="of transformers")
    parser.add_argument("--slots", type=int, default=0, help="ours; 0: sample.py's default")
    parser.add_argument("--repeats", type=int, default=15, help="steps of which to take the median")
    parser.add_argument("--count", type=int, default=0, help="requests; 0: all of the file")
    parser.add_argument("--only", choices=PARTS, help="one part of the whole")
    add_json_flag(parser)
    args = parser.parse_args()
    # the parts run in other directories
    args.model = str(Path(args.model).resolve())
    args.requests = str(Path(args.requests).resolve())
    finish(measure, PARTS, args)


if __name__ == "__main__":
    main()
