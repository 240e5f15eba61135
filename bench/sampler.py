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

import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from bench.command import (
    answer,
    finish,
    last_json,
    measure,
    parser_of,
    progress,
    run_part,
    run_peer,
    watch,
)
from bench.peers import most_resident, read_requests, resident, timed
from checkpoint import load
from formats.chat import Chat
from model import Linear
from ops import cpu
from ops.attention import Cache
from ops.pack import PackedLinear, pack
from sample import Engine, Request, SampleOptions

OURS = [sys.executable, "-m", "bench.sampler"]
PARTS_OF_A_STEP = ("matmuls", "attention", "norms, RoPE, SwiGLU", "sampling", "rest")


# ---------------------------------------------------------------------------------- whole runs


def run_ours(model: str, requests: str, slots: int, count: int, **_) -> dict:
    """The engine on chunks of requests, as sample.py runs it; how full its slots were; memory."""
    rows = read_requests(requests, count)
    chat = Chat(model)
    before = resident()
    net = pack(load(model, torch.bfloat16))
    o = SampleOptions(ignore_eos=True, slots=slots)
    queue = [Request(chat.prompt_ids(row), row["max_new_tokens"], i) for i, row in enumerate(rows)]

    # a short warm-up, then the measurement
    engine = Engine(net, chat, o)
    engine.run([Request(r.ids, 4, r.seed) for r in queue[:4]])
    live: list[int] = []  # rows of each step

    def count_rows(seconds, result, state, *_) -> None:
        live.append(state.shape[1])

    def work() -> None:
        for i in range(0, len(queue), o.chunk):
            engine.run(queue[i : i + o.chunk])

    watch(engine, "step", count_rows)
    seconds = timed(work)
    assert all(len(r.output) == r.max_new_tokens for r in queue), "a request is not written in full"

    # memory that must be there: weights as they are stored, and the KV cache
    longest = max(len(r.ids) + r.max_new_tokens for r in queue)
    rows_of_cache = engine.cache.k.shape[1]
    weights = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    cache = rows_of_cache * Cache.row_bytes(net.config, longest, torch.bfloat16)
    return {
        "seconds": seconds,
        "tokens": sum(r.max_new_tokens for r in queue),
        "live_slots": sum(live) / len(live) / rows_of_cache,
        "slots": rows_of_cache,
        "peak_bytes": most_resident() - before,
        "weights_and_cache_bytes": weights + cache,
    }


# ---------------------------------------------------------------------------------- one step


class Step:
    """One decode step of B rows whose caches hold noise, as the engine's."""

    def __init__(self, model: str, rows: int, tokens: int, shortest: int):
        """shortest, tokens: bounds of the lengths of the rows' caches."""
        if cpu.library(torch.bfloat16) is None:
            sys.exit("the parts of a step are those of the compiled kernels; they need a compiler")
        self.net = pack(load(model, torch.bfloat16))
        config = self.net.config
        self.engine = Engine(self.net, Chat(model), SampleOptions())
        self.engine.cache = Cache(config, rows, tokens, torch.bfloat16)
        # caches of noise, and rows in the middle of their responses
        torch.manual_seed(0)
        for layer in (*self.engine.cache.k, *self.engine.cache.v):
            layer.normal_()
        lengths = torch.randint(shortest, tokens, (rows,))
        last = torch.randint(config.vocab_size, (rows,))
        self.state = torch.stack([last, lengths, torch.arange(rows), lengths])
        self.longest = int(lengths.max())
        self.live_tokens = int(lengths.sum())

        # seconds by part; every call of C goes through cpu.call, and its function says which it is
        self.parts: Counter = Counter()
        labels = {"attend": "attention", "sample_token": "sampling"}

        def count_call(seconds, result, function, *_) -> None:
            label = labels.get(function.__name__, "norms, RoPE, SwiGLU")
            self.parts[label] += seconds

        def count_matmul(seconds, *_) -> None:
            self.parts["matmuls"] += seconds

        watch(cpu, "call", count_call)
        for layer in (Linear, PackedLinear):
            watch(layer, "forward", count_matmul)
        self.seconds()

    @torch.inference_mode()
    def seconds(self) -> dict[str, float]:
        """Seconds of a step, and of each of its parts."""
        self.parts.clear()
        step = timed(lambda: self.engine.step(self.state, self.longest + 1))
        self.parts["rest"] = step - self.parts.total()
        return {"step": step, **{name: self.parts[name] for name in PARTS_OF_A_STEP}}


def medians(rounds: list[dict]) -> dict:
    return {name: median(one[name] for one in rounds) for name in rounds[0]}


def run_limit(model: str, slots: int, repeats: int, **_) -> dict:
    """Full slots halfway through the work: seconds of a step by part, and of its matmuls and its
    KV stream alone.
    """
    # the step, and the shapes of its matmuls
    step = Step(model, slots, 240, 80)
    layers = [m for m in step.net.modules() if isinstance(m, Linear | PackedLinear)]
    shapes = [layer.weight.shape for layer in layers]
    inputs = {width: torch.randn(slots, width).bfloat16() for _, width in shapes}
    live_bytes = step.live_tokens * Cache.row_bytes(step.net.config, 1, torch.bfloat16)
    stream = torch.zeros(1 << 28, dtype=torch.float32)  # 1 GiB

    @torch.inference_mode()
    def matmuls() -> None:
        for layer, (_, width) in zip(layers, shapes, strict=True):
            layer(inputs[width])

    # step and limit in turn, so that both have the machine at about the same time
    rounds = []
    for _ in range(repeats):
        one = step.seconds()
        one["matmuls alone"] = timed(matmuls)
        one["KV stream alone"] = live_bytes / stream.nbytes * timed(stream.sum)
        one["share"] = (one["matmuls alone"] + one["KV stream alone"]) / one["step"]
        rounds.append(one)
    result = medians(rounds)
    flop = 2 * slots * sum(out * width for out, width in shapes)
    result["gflops"] = flop / result["matmuls alone"] / 1e9
    result["stream_gb_per_s"] = live_bytes / result["KV stream alone"] / 1e9
    return result


def run_context(model: str, count: int, repeats: int, **_) -> dict:
    """16 rows of caches of up to `count` tokens, the shortest an eighth of it: attention's time."""
    step = Step(model, 16, count, count // 8)
    result = medians([step.seconds() for _ in range(repeats)])
    return {**result, "live_tokens": step.live_tokens, "peak_bytes": most_resident()}


# ---------------------------------------------------------------------------------- all of it


def compare(args) -> dict[str, list[dict]]:
    """Everybody on the same requests, in turn."""
    pythons = {"transformers": args.transformers, "vllm": args.vllm}
    rounds = []
    for turn in range(args.rounds):
        ours = run_part(OURS, "ours", vars(args))
        print(f"{ours['slots']} slots, {ours['live_slots']:.0%} live on average")
        runs = {"ours": ours}
        for name, python in pythons.items():
            if python:
                runs[name] = run_peer(python, name, vars(args))
        rates = {name: ours["tokens"] / run["seconds"] for name, run in runs.items()}
        progress(f"round {turn + 1}: tokens/s {rates}")
        rounds.append(rates)

    # the median of the rounds' ratios, as both of a round had the machine at about the same time
    rows = []
    for name in rounds[0]:
        ratio = median(rates["ours"] / rates[name] for rates in rounds)
        shown = " ".join(f"{rates[name]:.0f}" for rates in rounds)
        rows.append({"sampler": name, "tokens/s": shown, "ours is": f"{ratio:.2f}x"})
    return {"compare": rows}


def limit(args) -> dict[str, list[dict]]:
    """A step of full slots by part, and how near it is to the limit."""
    run = run_part(OURS, "limit", vars(args))
    rate = args.slots / run["step"]
    print(f"{args.slots} rows, {rate:.0f} tokens/s, {run['share']:.0%} of the limit")
    # the parts of the step, their sum, and what the machine would take at best
    names = {name: name for name in (*PARTS_OF_A_STEP, "step")}
    names["matmuls alone"] = f"limit: matmuls alone ({run['gflops']:.0f} GFLOP/s)"
    names["KV stream alone"] = f"limit: KV stream alone ({run['stream_gb_per_s']:.1f} GB/s)"
    rows = [{"part": shown, "ms": f"{run[name] * 1e3:.1f}"} for name, shown in names.items()]
    return {"limit": rows}


def processes(args) -> dict[str, list[dict]]:
    """sample.py by one process of one core, and by two: whole commands, loading included."""
    rows = []
    written = set()
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, 2):
            out = Path(folder) / f"{n}.jsonl"
            launch = ["-m", "torch.distributed.run", f"--nproc-per-node={n}", "sample.py"]
            files = [f"--model={args.model}", f"--prompts={args.requests}", f"--out={out}"]
            # a thread a process: only two use both cores
            done = last_json(
                [sys.executable, *launch, *files, "--ignore-eos", "--chunk=64"],
                env={"OMP_NUM_THREADS": "1"},
            )
            written.add(out.read_bytes())
            rows.append({"processes": n, "seconds": f"{done['seconds']:.1f}"})
    print("the same bytes" if len(written) == 1 else "OTHER bytes")
    return {"processes": rows}


def growth(args) -> dict[str, list[dict]]:
    """More requests, and longer contexts."""
    requests = []
    contexts = []
    # more requests than slots: memory must not grow with them
    for count in (64, 256, 1024):
        run = run_part(OURS, "ours", {**vars(args), "count": count})
        over = run["peak_bytes"] / run["weights_and_cache_bytes"]
        row = {
            "requests": count,
            "tokens/s": f"{run['tokens'] / run['seconds']:.0f}",
            "live slots": f"{run['live_slots']:.0%}",
            "peak memory MB": f"{run['peak_bytes'] / 1e6:.0f}",
            "over weights + KV cache": f"{over:.2f}",
        }
        requests.append(row)
        progress(str(row))
    # attention's time must grow with the tokens that are live, and no faster
    for tokens in (256, 1024, 4096):
        run = run_part(OURS, "context", {**vars(args), "count": tokens})
        row = {
            "context": tokens,
            "step of 16 rows ms": f"{run['step'] * 1e3:.1f}",
            "attention ms": f"{run['attention'] * 1e3:.1f}",
            "ns per live token": f"{run['attention'] / run['live_tokens'] * 1e9:.0f}",
            "peak memory MB": f"{run['peak_bytes'] / 1e6:.0f}",
        }
        contexts.append(row)
        progress(str(row))
    return {"requests": requests, "context": contexts}


PARTS = {"compare": compare, "limit": limit, "processes": processes, "growth": growth}


@dataclass
class Options:
    model: Path  # checkpoint directory
    requests: Path  # JSONL of prompt and max_new_tokens
    transformers: str = ""  # Python that has transformers
    vllm: str = ""  # Python that has vLLM
    rounds: int = 2  # turns of everybody
    batch: int = 64  # of transformers
    slots: int = SampleOptions.slots  # of ours
    repeats: int = 15  # steps of which to take the median
    count: int = 0  # requests; 0: all of the file
    only: Literal["compare", "limit", "processes", "growth"] | None = None  # one part of the whole


def main() -> None:
    answer({"ours": run_ours, "limit": run_limit, "context": run_context})
    finish(measure, PARTS, parser_of(Options).parse_args())


if __name__ == "__main__":
    main()
