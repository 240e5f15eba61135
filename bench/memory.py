"""Peak memory of training per process: estimated from fake tensors, and measured.

    python -m bench.memory dpo.py FLAGS --processes 8    needs no weights, GPU or other processes
    python -m bench.memory                               small models, estimated and measured

FLAGS are those of train.py or dpo.py, unchanged. The estimate runs two optimizer steps of two
micro-batches each of train.py's own model and FSDP2, in a process group that only pretends to have
other members, on tensors that have a shape but no numbers. It shows what all living storage is made
of at its peak. It counts what PyTorch asks for: a GPU's allocator adds its own rounding and
fragments (set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True), and CUDA and NCCL take 1 to 2 GB
more. Attention is taken to be flash-attn's. The last line is JSON.
"""

import argparse
import gc
import inspect
import json
import math
import os
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

# Private paths, but the ones that PyTorch's documentation of fake tensors and modes names; the
# names are the same in 2.11 to 2.15. Nothing else of PyTorch can run a model without memory.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import train
from bench.command import answer, finish, make_parser, run_part
from bench.tables import add_json_flag, write_figures
from checkpoint import parse_config
from dpo import train_policy
from eval.table import table
from model import Model
from ops import attention, cpu
from plumbing.options import RunOptions, parse_options
from plumbing.ranks import gather, distributed
from plumbing.records import InputError

# The part of the work to which new memory belongs, by the innermost of these functions that asks
# for it; "activations" where none does. FSDP's own names only decide labels: the total stands.
PARTS_BY_FUNCTION = {  # name -> file, part
    "shard": ("/train.py", "parameters"),
    "foreach_all_gather": ("/_fsdp_collectives.py", "all-gathers"),
    "init_all_gather_outputs": ("/_fsdp_param.py", "all-gathers"),
    "foreach_reduce": ("/_fsdp_collectives.py", "reduce-scatters"),
    "forward": ("/ops/logps.py", "logits chunks"),
    "backward": ("/ops/logps.py", "logits chunks"),
    "run_backward": ("/bench/memory.py", "backward"),
    "run_optimizer": ("/bench/memory.py", "optimizer"),
}
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
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Setup:
    """What the memory of a training process depends on."""

    model: str
    processes: int = 1
    max_length: int = 512  # tokens of a sequence
    micro_batch_tokens: int = 2048
    prompt_tokens: int = 1  # of each sequence: these need no head
    activation_checkpointing: bool = False
    dtype: str = "bfloat16"
    device: str = "cpu"  # whose functions to estimate: cpu or gpu
    node_gpus: int = 8

    @property
    def options(self) -> train.TrainOptions:
        run = RunOptions(dtype=self.dtype)
        return train.TrainOptions(run=run, activation_checkpointing=self.activation_checkpointing)

    @property
    def sequences(self) -> list[train.Sequence]:
        length = min(self.max_length, self.micro_batch_tokens)
        count = max(1, self.micro_batch_tokens // length)
        return [([1] * length, self.prompt_tokens)] * count


# ---------------------------------------------------------------------------------- two steps


def two_steps(net: torch.nn.Module, sequences: list[train.Sequence]) -> None:
    """Two optimizer steps of two micro-batches: the second finds its moments, and gradients."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
    for _ in range(2):
        for _ in range(2):
            run_backward(train.response_logps(net, sequences))
        run_optimizer(net, optimizer)
        optimizer.zero_grad(set_to_none=True)


def run_backward(logps: list[torch.Tensor]) -> None:
    torch.stack([one.sum() for one in logps]).sum().backward()


def run_optimizer(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()


# ---------------------------------------------------------------------------------- estimates


class Tracker(TorchDispatchMode):
    """Labels each new storage by the part of the work that asks for it; keeps the peak's labels."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, str] = {}  # id of a storage -> its part
        self.bytes: Counter = Counter()  # by part, but for all-gathers
        self.gathered: dict[int, weakref.ref] = {}  # id of a storage -> that storage
        self.reductions = 0
        self.peak: Counter = Counter()  # bytes by part

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        new = [self.add(tensor) for tensor in local_tensors(result)]
        if any(new):
            now = self.now()
            if now.total() > self.peak.total():
                self.peak = now
        return result

    def add(self, tensor: torch.Tensor) -> bool:
        """Follow a tensor's storage until it is freed; returns whether it is new."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.alive:
            return False
        part = self.part()
        self.alive[key] = part
        size = storage.nbytes()
        if part == "all-gathers":
            # FSDP frees them by resizing the storage to 0: now() asks for their size each time
            self.gathered[key] = weakref.ref(storage)
            size = 0
        self.bytes[part] += size
        weakref.finalize(storage, self.forget, key, size)
        return True

    def forget(self, key: int, size: int) -> None:
        self.bytes[self.alive.pop(key)] -= size
        self.gathered.pop(key, None)

    def now(self) -> Counter:
        """Bytes alive, by part."""
        storages = [reference() for reference in self.gathered.values()]
        gathered = sum(storage.nbytes() for storage in storages if storage is not None)
        return Counter({**self.bytes, "all-gathers": gathered})

    def part(self) -> str:
        """The part of the work that the code now running belongs to."""
        frame = inspect.currentframe()
        inside_allocate = False
        while frame is not None:
            name = frame.f_code.co_name
            file, part = PARTS_BY_FUNCTION.get(name, ("", ""))
            if file and frame.f_code.co_filename.endswith(file):
                # FSDP allocates the input of a reduction, then its output, which are the gradients
                if part == "reduce-scatters" and inside_allocate:
                    self.reductions += 1
                    return part if self.reductions % 2 else "gradients"
                return part
            inside_allocate |= name == "allocate"
            frame = frame.f_back
        return "activations"


def local_tensors(result) -> Iterator[torch.Tensor]:
    """The tensors that an operation returns and that have memory of this process."""
    if isinstance(result, list | tuple):
        for one in result:
            yield from local_tensors(one)
    elif isinstance(result, DTensor):
        with torch.no_grad():
            yield from local_tensors(result.to_local())
    elif isinstance(result, FakeTensor) and result.device.type != "meta":
        yield result


class FakeFlash(torch.autograd.Function):
    """flash-attn on fake tensors: results of the same shapes, and as much kept for backward."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def fake_flash(q, k, v, *_, **__) -> torch.Tensor:
    return FakeFlash.apply(q, k, v)


def do_nothing(*_) -> None:
    pass


def always(*_) -> bool:
    return True


def run_estimate(**setup) -> dict:
    """Bytes by part at the peak of two_steps(), of rank 0 of setup.processes."""
    setup = Setup(**setup)
    # no numbers: no weights are read, and no compiled function is called
    train.load_weights = do_nothing
    cpu.call = do_nothing
    if setup.device == "cpu":
        cpu.PLAIN = (*cpu.PLAIN, FakeTensor)
    else:
        attention.use_flash = always
        attention.flash_attn_varlen_func = fake_flash

    # the mesh needs real tensors
    dist.init_process_group("fake", rank=0, world_size=setup.processes)
    train.mesh()
    tracker = Tracker()
    with FakeTensorMode(), tracker:
        two_steps(train.shard(setup.model, setup.options), setup.sequences)
    dist.destroy_process_group()
    return {
        "parts": {part: tracker.peak[part] for part in PARTS},
        "total": tracker.peak.total(),
        "tokens": sum(len(ids) for ids, _ in setup.sequences),
    }


# ---------------------------------------------------------------------------------- measurements


def run_measure(**setup) -> dict:
    """Real training of the same shape: how far this process grows over what it had before."""
    setup = Setup(**setup)
    peak = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.is_set():
            peak = max(peak, resident())
            time.sleep(0.002)

    with distributed(), tempfile.TemporaryDirectory() as folder:
        # a tiny model first, so that what Python and its libraries take is there already
        tiny = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "vocab_size": 64,
        }
        random_checkpoint(Path(folder), **tiny)
        two_steps(train.shard(folder, setup.options), setup.sequences)
        gc.collect()
        before = resident()
        watcher = threading.Thread(target=watch)
        watcher.start()
        two_steps(train.shard(setup.model, setup.options), setup.sequences)
        ended.set()
        watcher.join()
        return {"total": max(gather(peak - before))}


def resident() -> int:
    """Bytes of memory that this process has now, without pages of files such as a checkpoint's."""
    _, pages, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (pages - shared) * os.sysconf("SC_PAGE_SIZE")


def random_checkpoint(folder: Path, **changes) -> str:
    """A small Llama: only what train.shard() reads of a checkpoint."""
    raw = {**SMALL, **changes}
    (folder / "config.json").write_text(json.dumps(raw))
    net = Model(parse_config(raw)).to(torch.bfloat16)
    save_file(dict(net.named_parameters()), folder / "model.safetensors")
    return str(folder)


# ---------------------------------------------------------------------------------- commands


def estimate(setup: Setup) -> dict:
    """run_estimate() in a process that is told that it is the first of many."""
    env = {
        "OMP_NUM_THREADS": "1",
        "RANK": "0",
        "WORLD_SIZE": str(setup.processes),
        "LOCAL_WORLD_SIZE": str(min(setup.node_gpus, setup.processes)),
        # on a GPU there is flash-attn, and PyTorch for the rest
        "SYNPO_KERNELS": "0" if setup.device == "gpu" else "1",
    }
    command = [sys.executable, "-m", "bench.memory"]
    return run_part(command, "estimate", asdict(setup), env=env)


def measure(setup: Setup) -> dict:
    """run_measure() in the given number of processes; large blocks go back when freed."""
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={setup.processes}"]
    command = [sys.executable, *launch, "-m", "bench.memory"]
    env = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return run_part(command, "measure", asdict(setup), env=env)


def estimate_command(argv: list[str]) -> dict:
    """Print the peak memory of `train.py FLAGS` or `dpo.py FLAGS`, and what would fit a GPU."""
    parser = make_parser(__doc__)
    parser.add_argument("file")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--gpu-gb", type=float, default=80.0, help="memory of a GPU")
    parser.add_argument("--node-gpus", type=int, default=8, help="parameters are sharded in a node")
    add_json_flag(parser)
    args, flags = parser.parse_known_args(argv)
    # how many sequences of full length an example has
    commands = {"train.py": (train.finetune, 1), "dpo.py": (train_policy, 2)}
    if Path(args.file).name not in commands:
        raise InputError(f"{args.file}: give train.py or dpo.py, and its flags")
    if args.processes > args.node_gpus and args.processes % args.node_gpus:
        problem = f"must be whole nodes of {args.node_gpus} (--node-gpus)"
        raise InputError(f"--processes {problem}, got {args.processes}")
    function, sequences = commands[Path(args.file).name]
    given = parse_options(function, flags)
    o = given["o"]
    unit = sequences * o.max_length
    setup = Setup(
        model=str(given["model"].resolve()),
        processes=args.processes,
        max_length=o.max_length,
        micro_batch_tokens=max(1, o.micro_batch_tokens // unit) * unit,
        activation_checkpointing=o.activation_checkpointing,
        dtype=o.run.dtype,
        device="gpu",
        node_gpus=args.node_gpus,
    )
    return show_estimate(setup, unit, args)


def show_estimate(setup: Setup, unit: int, args: argparse.Namespace) -> dict:
    """unit: tokens of an example, the least that a micro-batch may grow by."""
    # with many tokens memory grows in proportion to them; with few its peak may be elsewhere
    sizes = (setup.micro_batch_tokens, 16 * unit, 32 * unit)
    with ThreadPoolExecutor() as pool:
        setups = [replace(setup, micro_batch_tokens=size) for size in sizes]
        one, some, more = pool.map(estimate, setups)
    room = args.gpu_gb * 1e9 - some["total"]
    largest = max(0, 16 + math.floor(16 * room / (more["total"] - some["total"]))) * unit

    # a row for each part
    batch = f"micro-batches of {one['tokens']:,} tokens, sequences of {setup.max_length:,}"
    checkpointing = ", activation checkpointing" if setup.activation_checkpointing else ""
    print(f"{setup.model}: {setup.processes} processes, {batch}{checkpointing}")
    sizes = {**one["parts"], "total at peak": one["total"]}
    rows = [{"part": k, "GB per process": f"{size / 1e9:.2f}"} for k, size in sizes.items()]
    print(table(rows))
    print(f"total {one['total'] / 1e9:.2f} GB per process at peak")
    print(f"largest micro-batch in {args.gpu_gb:g} GB: {largest:,} tokens")
    write_figures(args.json, {"parts": rows})
    return {**one, "largest": largest}


def compare_command(argv: list[str]) -> list[dict]:
    """Estimates of a small model on 1, 2 and 4 processes against what real processes take."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="", help="checkpoint (default: small, random weights)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--prompt-tokens", type=int, default=1, help="these need no head")
    parser.add_argument("--dtype", default="bfloat16", help="of the computation")
    add_json_flag(parser)
    args = parser.parse_args(argv)

    # a row for each number of processes, without and with activation checkpointing
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(
            model=str(Path(args.model).resolve())
            if args.model
            else random_checkpoint(Path(folder)),
            max_length=args.max_length,
            micro_batch_tokens=args.micro_batch_tokens,
            prompt_tokens=args.prompt_tokens,
            dtype=args.dtype,
        )
        for processes in (1, 2, 4):
            for checkpointing in (False, True):
                one = replace(setup, processes=processes, activation_checkpointing=checkpointing)
                estimated = estimate(one)["total"]
                measured = measure(one)["total"]
                row = {"processes": processes, "activation checkpointing": checkpointing}
                row["estimated"] = f"{estimated / 1e6:.0f} MB"
                row["measured"] = f"{measured / 1e6:.0f} MB"
                rows.append({**row, "ratio": f"{estimated / measured:.2f}"})
    print(table(rows))
    write_figures(args.json, rows)
    return rows


def main() -> None:
    answer({"estimate": run_estimate, "measure": run_measure})
    argv = sys.argv[1:]
    named = argv and argv[0].endswith(".py")
    finish(estimate_command if named else compare_command, argv)


if __name__ == "__main__":
    main()
