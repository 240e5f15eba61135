"""The memory that training takes of each process: foretold from fake tensors, and held against what processes really take.

    python dpo.py --dry-run 8 --model DIR --pairs - --out -    foretells: no weights, no other processes, no GPU
    python bench/memory.py                                     foretells small models on 1, 2 and 4 processes, measures them

A dry run goes through two optimizer steps of two micro-batches each of train.py's own model and FSDP2, in a process group that
only pretends to have others, on tensors that have a shape but no numbers. Of all storage that is alive, the moment when
it is the most is shown by part. It counts what PyTorch asks for: a GPU's allocator adds its own rounding and fragments (set
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True), and CUDA and NCCL take 1 to 2 GB beside it. Attention is taken to be
flash-attn's. JSON in the last line.
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "all-gathers",
    "reduce-scatters",
    "activations",
    "logits chunks",
    "backward",
)
MEASURED = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


# ---------------------------------------------------------------------------------------------- fake tensors


def make_tracker():
    """The mode that watches what is allocated; made in a function because it needs torch."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Tracker(TorchDispatchMode):
        """Labels each new storage by the part of the work that allocates it; keeps the moment when all together is the most."""

        def __init__(self):
            super().__init__()
            self.label, self.known, self.bytes, self.resized, self.most = (
                "activations",
                {},
                Counter(),
                {},
                Counter(),
            )

        def add(self, tensor) -> bool:
            """Count a tensor's storage under the label at hand until it is freed; returns whether it is new."""
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.known:
                return False
            self.known[key] = self.label
            if (
                self.label == "all-gathers"
            ):  # FSDP gives their memory back and takes it again: measured whenever it counts
                self.resized[key] = weakref.ref(storage)
                weakref.finalize(storage, self.forget, key, 0)
            else:
                self.bytes[self.label] += storage.nbytes()
                weakref.finalize(storage, self.forget, key, storage.nbytes())
            return True

        def forget(self, key: int, size: int) -> None:
            self.bytes[self.known.pop(key)] -= size
            self.resized.pop(key, None)

        def now(self) -> Counter:
            """Bytes alive by label."""
            gathered = sum(
                storage.nbytes()
                for reference in self.resized.values()
                if (storage := reference()) is not None
            )
            return Counter({**self.bytes, "all-gathers": gathered})

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            new = False
            for tensor in tree_leaves(result):
                # only what has memory: a DTensor is the cover of a local one, a meta tensor a shape
                tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
                if isinstance(tensor, FakeTensor) and tensor.device.type != "meta":
                    new |= self.add(tensor)
            if new and sum((sizes := self.now()).values()) > sum(self.most.values()):
                self.most = sizes
            return result

        @contextmanager
        def labelled(self, label: str):
            before, self.label = self.label, label
            try:
                yield
            finally:
                self.label = before

        def wrap(self, owner, name: str, label: str) -> None:
            """Label what owner.name allocates."""
            function = getattr(owner, name)

            def inside(*args, **named):
                with self.labelled(label):
                    return function(*args, **named)

            setattr(
                owner,
                name,
                staticmethod(inside)
                if isinstance(owner.__dict__.get(name), staticmethod)
                else inside,
            )

    return Tracker()


def fake_flash():
    """Stands in for flash-attn's function on fake tensors: the same results by shape, and the same things kept for later."""
    import torch

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out = torch.empty_like(q)
            ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
            return out

        @staticmethod
        def backward(ctx, dout):
            return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])

    return lambda q, k, v, *_, **__: Flash.apply(q, k, v)


def run_foretell(args) -> dict:
    """Bytes by part at the worst moment of two_steps(), of rank 0 of args.processes."""
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import model
    import train
    from cpu import kernels
    from data import Common

    kernels.call = lambda *_: None
    if args.device == "gpu":  # what runs there: flash-attn, and PyTorch for the rest
        model.use_flash, model.flash_attn_varlen_func, kernels.ready = (
            lambda _: True,
            fake_flash(),
            lambda *_, **__: False,
        )
    else:
        kernels.PLAIN = (*kernels.PLAIN, FakeTensor)
    train.fill = lambda *_: None
    tracker = make_tracker()
    tracker.wrap(FSDPParam, "init_all_gather_outputs", "all-gathers")
    tracker.wrap(train.TimedAllGather, "allocate", "all-gathers")
    for name in ("forward", "backward"):
        tracker.wrap(model.TokenLogps, name, "logits chunks")
    scatter = (
        train.TimedReduceScatter.allocate
    )  # FSDP asks for its input first, then for its output: the gradients

    def allocate(self, size, **named):
        self.asked = getattr(self, "asked", 0) + 1
        with tracker.labelled("reduce-scatters" if self.asked % 2 else "gradients"):
            return scatter(self, size, **named)

    train.TimedReduceScatter.allocate = allocate

    dist.init_process_group("fake", rank=0, world_size=args.processes, store=FakeStore())
    train.mesh()  # which needs real tensors
    length = min(args.max_length, args.micro_tokens)
    sequences = [([1] * length, args.prompt_tokens)] * max(1, args.micro_tokens // length)
    with FakeTensorMode(), tracker:
        o = train.TrainOptions(recompute=args.recompute)
        with tracker.labelled("parameters"):
            net = train.shard(args.model, o, Common(dtype=args.dtype))
        two_steps(net, sequences, tracker.labelled)
    dist.destroy_process_group()
    return {
        "parts": {part: tracker.most[part] for part in PARTS},
        "total": sum(tracker.most.values()),
        "tokens": length * len(sequences),
    }


# ---------------------------------------------------------------------------------------------- real processes


def run_measure(args) -> dict:
    """Real training of the same shape: how much more memory this process has at most than before it began."""
    import train
    from data import Common, gather, processes

    def resident() -> int:  # without the pages of files, such as the checkpoint's
        _, pages, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (pages - shared) * os.sysconf("SC_PAGE_SIZE")

    most, stop = [0], threading.Event()

    def watch():
        while not stop.is_set():
            most[0] = max(most[0], resident())
            time.sleep(0.002)

    def work(model: str) -> None:
        net = train.shard(
            model, train.TrainOptions(recompute=args.recompute), Common(dtype=args.dtype)
        )
        two_steps(
            net,
            [([1] * args.max_length, args.prompt_tokens)]
            * max(1, args.micro_tokens // args.max_length),
        )

    with processes(), tempfile.TemporaryDirectory() as folder:
        work(
            random_checkpoint(
                folder, hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64
            )
        )
        gc.collect()  # what Python and its libraries take is there now
        before, watcher = resident(), threading.Thread(target=watch)
        watcher.start()
        work(args.model)
        stop.set()
        watcher.join()
        return {"total": max(gather(most[0] - before))}


def two_steps(net, sequences: list, label=lambda _: nullcontext()) -> None:
    """Two optimizer steps of two micro-batches each: the second step finds its moments, the second micro-batch gradients."""
    import torch

    from train import response_logps

    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
    for _ in range(2):
        for _ in range(2):
            logps = response_logps(net, sequences)
            with label("backward"):
                torch.stack([one.sum() for one in logps]).sum().backward()
        with label("optimizer"):
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------- commands


def child(what: str, args, processes: int, **changes) -> dict:
    """foretell or measure in processes of their own: one that pretends to be the first of many, or all of them."""
    options = {**vars(args), **changes, "processes": processes}
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in options.items()
        if not isinstance(value, bool) and name != "part"
    ] + [f"--{name}" for name, value in options.items() if value is True]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # large blocks go back when they are freed
    many = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        if what == "measure"
        else []
    )
    if what == "foretell":
        env |= {
            "RANK": "0",
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(min(args.node_gpus, processes)),
        }
    done = subprocess.run(
        [sys.executable, *many, __file__, "--part", what, *flags],
        capture_output=True,
        text=True,
        env=env,
    )
    if done.returncode:
        sys.exit(f"{what}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def dry_run(o, sequences: int) -> dict:
    """What --dry-run N prints for a trainer's options, on GPUs of --gpu-gb; an example is so many sequences of full length."""
    from data import InputError

    if o.dry_run > o.node_gpus and o.dry_run % o.node_gpus:
        raise InputError(
            f"--dry-run {o.dry_run}: no whole number of nodes of {o.node_gpus}; see --node-gpus"
        )
    unit = sequences * o.max_length
    args = argparse.Namespace(
        model=o.model,
        max_length=o.max_length,
        micro_tokens=max(1, o.micro_tokens // unit) * unit,
        prompt_tokens=1,
        recompute=o.recompute,
        dtype=o.dtype,
        device="gpu",
        node_gpus=o.node_gpus,
    )
    # with many tokens memory grows in proportion to them; with few its worst moment may be another
    with ThreadPoolExecutor() as pool:
        one, some, more = pool.map(
            lambda tokens: child("foretell", args, o.dry_run, micro_tokens=tokens),
            (args.micro_tokens, 16 * unit, 32 * unit),
        )
    examples = 16 + math.floor(
        16 * (o.gpu_gb * 1e9 - some["total"]) / (more["total"] - some["total"])
    )
    print(
        f"{o.model}: {o.dry_run} processes, micro-batches of {args.micro_tokens:,} tokens, sequences of {o.max_length:,}"
        + ", recomputed" * o.recompute
    )
    for part in PARTS:
        print(f"  {part:16s} {one['parts'][part] / 1e9:7.2f} GB")
    print(
        f"  {'together':16s} {one['total'] / 1e9:7.2f} GB a process at the worst moment\n"
        f"  the largest micro-batch in {o.gpu_gb:g} GB: {max(0, examples) * unit:,} tokens"
    )
    return {**one, "largest": max(0, examples) * unit}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="", help="checkpoint directory; default: a small one with random weights"
    )
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--micro-tokens", type=int, default=2048, help="tokens of a micro-batch")
    parser.add_argument(
        "--prompt-tokens", type=int, default=1, help="of each sequence: these need no head"
    )
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--dtype", default="bfloat16", help="of the computation")
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), default="cpu", help="whose functions to foretell"
    )
    parser.add_argument("--node-gpus", type=int, default=8, help="processes of a node")
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=("foretell", "measure"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.part:
        result = {"foretell": run_foretell, "measure": run_measure}[args.part](args)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(result), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.model = args.model or random_checkpoint(folder)
        print("processes  recompute  foretold  measured   ratio")
        results = []
        for processes in (1, 2, 4):
            for args.recompute in (False, True):
                foretold, measured = (
                    child(what, args, processes)["total"] for what in ("foretell", "measure")
                )
                results.append(
                    {
                        "processes": processes,
                        "recompute": args.recompute,
                        "foretold": foretold,
                        "measured": measured,
                    }
                )
                print(
                    f"{processes:9d}  {args.recompute!s:9s} {foretold / 1e6:6.0f} MB {measured / 1e6:6.0f} MB "
                    f"{foretold / measured:7.2f}",
                    flush=True,
                )
    print(json.dumps(results))


def random_checkpoint(folder: str, **changes) -> str:
    """A Llama of MEASURED's shape but for changes: only what shard() reads."""
    import torch
    from safetensors.torch import save_file

    from model import Config, Model

    raw = {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        **MEASURED,
        **changes,
    }
    (Path(folder) / "config.json").write_text(json.dumps(raw))
    net = Model(Config.parse(raw)).to(torch.bfloat16)
    save_file(dict(net.named_parameters()), Path(folder) / "model.safetensors")
    return folder


if __name__ == "__main__":
    main()
