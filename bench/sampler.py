"""The sampler against what people would use instead, against the machine's limit, and as the work grows.

    python bench/sampler.py --model DIR --requests R.jsonl --transformers PYTHON --vllm PYTHON

R.jsonl holds {"prompt", "max_new_tokens"}: exactly that many tokens are written for each, at temperature 0.7. PYTHON is the
interpreter of an environment with that peer; without it the peer is left out. Everything runs in a process of its own, one
after the other, the peers alternating with us `--rounds` times; loading and one short warm-up are not counted.

The limit is what the step's matmuls take alone, on their shapes, plus its live keys and values at the bandwidth of
streaming memory, both measured in the same process as the step. Tables on standard output, JSON in the last line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------- peers


def read_requests(args) -> list[dict]:
    """As many records as asked for, from the start again where the file has fewer."""
    rows = [json.loads(line) for line in Path(args.requests).read_text().splitlines()]
    return [rows[i % len(rows)] for i in range(args.count or len(rows))]


def chat_texts(tokenizer, rows: list[dict]) -> list[str]:
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run_transformers(args) -> dict:
    """Static batches of like lengths, the kindest order for it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    rows = sorted(read_requests(args), key=lambda row: row["max_new_tokens"])

    @torch.inference_mode()
    def generate(rows, most: int):
        for i in range(0, len(rows), args.batch):
            batch = rows[i : i + args.batch]
            inputs = tokenizer(
                chat_texts(tokenizer, batch),
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            )
            n = min(most, max(row["max_new_tokens"] for row in batch))
            model.generate(
                **inputs,
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=True,
                temperature=0.7,
                top_k=0,
                top_p=1.0,
            )

    generate(rows[:4], 4)
    return {"seconds": timed(lambda: generate(rows, 1 << 30))}


def run_vllm(args) -> dict:
    """vLLM's continuous batching, on its CPU build."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    rows = read_requests(args)
    llm = LLM(args.model, dtype="bfloat16", max_model_len=2048, max_num_seqs=256)
    texts = chat_texts(llm.get_tokenizer(), rows)
    params = [
        SamplingParams(
            temperature=0.7,
            max_tokens=row["max_new_tokens"],
            min_tokens=row["max_new_tokens"],
            ignore_eos=True,
        )
        for row in rows
    ]
    llm.generate(texts[:4], params[:4], use_tqdm=False)
    return {"seconds": timed(lambda: llm.generate(texts, params, use_tqdm=False))}


# ---------------------------------------------------------------------------------------------- us


def run_ours(args) -> dict:
    """The engine on chunks of requests, as sample.py runs it; how full its slots were; peak memory."""
    import torch

    from cpu.pack import pack
    from data import Chat
    from model import Cache, load
    from sample import Engine, Request, SampleOptions
    from train import peak_memory

    rows, chat = read_requests(args), Chat(args.model)
    before = resident()
    model = pack(load(args.model, torch.bfloat16))
    o = SampleOptions(ignore_eos=True, **({"slots": args.slots} if args.slots else {}))
    engine, live, step = Engine(model, chat, o), [], Engine.step
    requests = [
        Request(chat.prompt_ids(row), row["max_new_tokens"], i) for i, row in enumerate(rows)
    ]
    engine.run([Request(r.ids, 4, r.key) for r in requests[:4]])
    Engine.step = lambda self, state, tokens: (
        live.append(state.shape[1]),
        step(self, state, tokens),
    )[1]
    seconds = timed(
        lambda: [engine.run(requests[i : i + o.chunk]) for i in range(0, len(requests), o.chunk)]
    )
    assert all(
        len(r.output) == row["max_new_tokens"] for r, row in zip(requests, rows, strict=True)
    )
    longest = max(len(r.ids) + r.limit for r in requests)
    slots = engine.cache.k.shape[1]
    asked = sum(
        path.stat().st_size for path in Path(args.model).glob("*.safetensors")
    ) + slots * Cache.row_bytes(model.config, longest, torch.bfloat16)
    return {
        "seconds": seconds,
        "live_slots": sum(live) / len(live) / slots,
        "slots": slots,
        "peak_bytes": peak_memory() * 1e9 - before,
        "weights_and_cache_bytes": asked,
    }


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Parts:
    """Seconds inside functions of a step, by label; wrapped where they are looked up."""

    def __init__(self):
        import torch

        from cpu import kernels
        from model import Linear

        if kernels.library(torch.bfloat16) is None:
            sys.exit(
                "the parts of a step are those of the compiled kernels; they need a C compiler"
            )
        self.seconds = Counter()
        labels = {"attend": "attention", "draw": "sampling"}
        self.wrap(
            kernels,
            "call",
            lambda function, *_: labels.get(function.__name__, "norms, RoPE, SwiGLU"),
        )
        self.wrap(Linear, "forward", lambda *_: "matmuls")

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
    """One decode step of B rows whose caches hold `lengths` tokens of noise, as Engine.step runs it."""

    def __init__(self, args, rows: int, tokens: int, shortest: int):
        import torch

        from cpu.pack import pack
        from data import Chat
        from model import Cache, load
        from sample import Engine, SampleOptions

        self.model = pack(load(args.model, torch.bfloat16))
        self.engine = Engine(self.model, Chat(args.model), SampleOptions())
        self.engine.cache = Cache(self.model.config, rows, tokens, torch.bfloat16)
        torch.manual_seed(0)
        for x in (self.engine.cache.k, self.engine.cache.v):
            for layer in x:
                layer.normal_()
        self.lengths = torch.randint(shortest, tokens, (rows,))
        self.state = torch.stack(
            [
                torch.randint(self.model.config.vocab_size, (rows,)),
                self.lengths,
                torch.arange(rows),
                self.lengths,
            ]
        )
        self.bytes = self.lengths.sum().item() * Cache.row_bytes(
            self.model.config, 1, torch.bfloat16
        )
        self()

    def __call__(self) -> float:
        import torch

        with torch.inference_mode():
            return timed(lambda: self.engine.step(self.state, int(self.lengths.max()) + 1))


def run_limit(args) -> dict:
    """Full slots at the middle of the work: time of a step by part, and of its matmuls and its KV stream alone."""
    import torch

    from model import Linear

    rows = args.slots or 128
    step = Step(args, rows, 240, 80)
    layers = [m for m in step.model.modules() if isinstance(m, Linear)]
    inputs = {m.weight.shape[1]: torch.randn(rows, m.weight.shape[1]).bfloat16() for m in layers}
    plain, stream = Linear.forward, torch.zeros(1 << 28, dtype=torch.float32)  # 1 GiB
    parts, totals = Parts(), []

    @torch.inference_mode()
    def matmuls():
        for m in layers:
            plain(m, inputs[m.weight.shape[1]])

    for _ in range(args.repeats):
        parts.seconds.clear()
        seconds = step()
        totals.append(
            {
                "step": seconds,
                "matmuls alone": timed(matmuls),
                "KV stream alone": step.bytes / (stream.nbytes / timed(stream.sum)),
                **parts.seconds,
            }
        )
        totals[-1]["rest"] = seconds - sum(parts.seconds.values())
        totals[-1]["share"] = (
            totals[-1]["matmuls alone"] + totals[-1]["KV stream alone"]
        ) / seconds
    result = {name: median(t[name] for t in totals) for name in totals[0]}
    flop = 2 * rows * sum(m.weight.shape[0] * m.weight.shape[1] for m in layers)
    return {
        **result,
        "rows": rows,
        "gflops": flop / result["matmuls alone"] / 1e9,
        "stream_gb_per_s": step.bytes / result["KV stream alone"] / 1e9,
    }


def run_context(args) -> dict:
    """16 rows of caches up to args.count tokens, the shortest an eighth of it: attention's time per live token."""
    from train import peak_memory

    step, parts, totals = Step(args, 16, args.count, args.count // 8), Parts(), []
    for _ in range(args.repeats):
        parts.seconds.clear()
        totals.append((step(), parts.seconds["attention"]))
    seconds, attention = (median(x) for x in zip(*totals, strict=True))
    live = step.lengths.sum().item()
    return {
        "seconds": seconds,
        "tokens_per_second": 16 / seconds,
        "attention": attention,
        "live_tokens": live,
        "ns_per_live_token": attention / live * 1e9,
        "peak_bytes": peak_memory() * 1e9,
    }


# ---------------------------------------------------------------------------------------------- all of it

RUNS = {
    "ours": run_ours,
    "transformers": run_transformers,
    "vllm": run_vllm,
    "limit": run_limit,
    "context": run_context,
}


def child(args, what: str, python: str = sys.executable, **changes) -> dict:
    """RUNS[what] in a process of its own."""
    options = {
        **{
            name: getattr(args, name)
            for name in ("model", "requests", "batch", "slots", "repeats", "count")
        },
        **changes,
    }
    flags = [x for name, value in options.items() if value for x in (f"--{name}", str(value))]
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


def compare(args) -> dict:
    """Everybody on the same requests, in turn."""
    who = {"ours": sys.executable, "transformers": args.transformers, "vllm": args.vllm}
    tokens = sum(row["max_new_tokens"] for row in read_requests(args))
    runs = {name: [] for name, python in who.items() if python}
    for turn in range(args.rounds):
        for name in runs:
            runs[name].append(child(args, name, who[name]))
            print(
                f"round {turn + 1}: {name:12s} {tokens / runs[name][-1]['seconds']:7.0f} tokens/s",
                flush=True,
            )
    rates = {name: [tokens / run["seconds"] for run in done] for name, done in runs.items()}
    ratios = {
        name: median(a / b for a, b in zip(rates["ours"], rates[name], strict=True))
        for name in runs
        if name != "ours"
    }
    for name, ratio in ratios.items():
        print(f"we are {ratio:.2f} times as fast as {name} (median of {args.rounds} rounds)")
    last = runs["ours"][-1]
    print(f"slots: {last['slots']}, {last['live_slots']:.0%} of them live on average\n")
    return {
        "tokens_per_second": rates,
        "times_as_fast_as": ratios,
        "live_slots": last["live_slots"],
    }


def limit(args) -> dict:
    result = child(args, "limit")
    print(
        f"one step of {result['rows']} full slots: {result['step'] * 1e3:.1f} ms, "
        f"{result['rows'] / result['step']:.0f} tokens/s, {result['share']:.0%} of the limit"
    )
    for name in ("matmuls", "attention", "norms, RoPE, SwiGLU", "sampling", "rest"):
        print(f"    {name:22s} {result[name] * 1e3:6.1f} ms")
    print(
        f"    limit: matmuls alone   {result['matmuls alone'] * 1e3:6.1f} ms ({result['gflops']:.0f} GFLOP/s)\n"
        f"    limit: KV stream alone {result['KV stream alone'] * 1e3:6.1f} ms ({result['stream_gb_per_s']:.1f} GB/s)\n"
    )
    return result


def growth(args) -> dict:
    result = {"requests": {}, "context": {}}
    print("requests  tokens/s  live slots  peak memory  over weights + KV cache")
    for count in (64, 256, 1024):
        run = child(args, "ours", count=count)
        tokens = sum(
            row["max_new_tokens"]
            for row in read_requests(argparse.Namespace(requests=args.requests, count=count))
        )
        result["requests"][count] = {**run, "tokens_per_second": tokens / run["seconds"]}
        print(
            f"{count:8d}  {tokens / run['seconds']:8.0f}  {run['live_slots']:10.0%}  {run['peak_bytes'] / 1e6:8.0f} MB  "
            f"{run['peak_bytes'] / run['weights_and_cache_bytes']:.2f}",
            flush=True,
        )
    print("\ncontext  step of 16 rows  attention  per live token  peak memory")
    for tokens in (256, 1024, 4096):
        run = result["context"][tokens] = child(args, "context", count=tokens)
        print(
            f"{tokens:7d}  {run['seconds'] * 1e3:12.1f} ms  {run['attention'] * 1e3:6.1f} ms  "
            f"{run['ns_per_live_token']:11.0f} ns  {run['peak_bytes'] / 1e6:8.0f} MB",
            flush=True,
        )
    return result


def processes(args) -> dict:
    """sample.py by one process of one core, and by two: whole commands, the loading of the model included."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, 2):
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(n),
                str(ROOT / "sample.py"),
                "--model",
                args.model,
                "--prompts",
                args.requests,
                "--out",
                f"{folder}/{n}.jsonl",
                "--ignore-eos",
                "--chunk",
                "64",
            ]
            done = subprocess.run(
                command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            seconds[n] = json.loads(done.stdout.splitlines()[-1])["seconds"]
        same = Path(folder, "1.jsonl").read_bytes() == Path(folder, "2.jsonl").read_bytes()
    print(
        f"two processes of one core each: {seconds[1] / seconds[2]:.2f} times as fast as one "
        f"({seconds[1]:.1f} s, {seconds[2]:.1f} s), {'the same' if same else 'OTHER'} bytes\n"
    )
    return {"seconds": seconds, "times_as_fast": seconds[1] / seconds[2], "same_bytes": same}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--requests", required=True, help="JSONL of prompt and max_new_tokens")
    parser.add_argument("--transformers", default="", help="Python that has transformers")
    parser.add_argument("--vllm", default="", help="Python that has vLLM")
    parser.add_argument("--rounds", type=int, default=2, help="turns of everybody")
    parser.add_argument("--batch", type=int, default=64, help="of transformers")
    parser.add_argument("--slots", type=int, default=0, help="ours; 0 is the default of sample.py")
    parser.add_argument(
        "--repeats", type=int, default=15, help="steps that the parts are the median of"
    )
    parser.add_argument("--count", type=int, default=0, help="requests; 0 is all of the file")
    parser.add_argument(
        "--only", choices=["compare", "limit", "processes", "growth"], help="a part of it"
    )
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model, args.requests = (str(Path(path).resolve()) for path in (args.model, args.requests))
    if args.run:
        if args.run not in ("transformers", "vllm"):
            sys.path.insert(0, str(ROOT))
        print(json.dumps(RUNS[args.run](args)))
        return
    parts = {"compare": compare, "limit": limit, "processes": processes, "growth": growth}
    print(
        json.dumps({name: part(args) for name, part in parts.items() if args.only in (None, name)})
    )


if __name__ == "__main__":
    main()
