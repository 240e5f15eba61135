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
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from traceback import walk_stack
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from safetensors.torch import save_file

# Private paths, but the ones that PyTorch's documentation of fake tensors and modes names; the
# names are the same in 2.11 to 2.15. Nothing else of PyTorch can run a model without memory.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from bench.command import answer, finish, parser_of, run_part
from bench.peers import most_resident, resident
from bench.tables import write_figures
from checkpoint import parse_config
from dpo import train_policy
from eval.table import table
from model import Model
from ops import attention, cpu
from plumbing.files import InputError
from plumbing.options import RunOptions, parse_options
from plumbing.ranks import distributed, gather

# The part of the work to which new memory belongs, by the innermost of these functions that asks
# for it; "activations" where none does. PyTorch's own names only decide labels: the total stands.
PARTS_BY_FUNCTION = {
    "shard": "parameters",
    "foreach_all_gather": "all-gathers",
    "FSDPParam.init_all_gather_outputs": "all-gathers",
    "foreach_reduce": "reduce-scatters",
    "TokenLogps.forward": "logits chunks",
    "TokenLogps.backward": "logits chunks",
    "Tensor.backward": "backward",
    "clip_grad_norm_": "optimizer",
    "Adam.step": "optimizer",
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

    model: str | Path
    processes: int = 1
    max_length: int = 512  # tokens of a sequence
    micro_batch_tokens: int = 2048
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
        count = max(1, self.micro_batch_tokens // self.max_length)
        return [([1] * self.max_length, 1)] * count


# ---------------------------------------------------------------------------------- two steps


def two_steps(net: torch.nn.Module, sequences: list[train.Sequence]) -> None:
    """Two optimizer steps of two micro-batches: the second finds its moments, and gradients."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
    for _ in range(2):
        for _ in range(2):
            logps = train.response_logps(net, sequences)
            torch.stack([one.sum() for one in logps]).sum().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------- estimates


class Tracker(TorchDispatchMode):
    """Labels each new storage by the part of the work that asks for it; keeps the peak's labels."""

    def __init__(self):
        super().__init__()
        self.alive: WeakKeyDictionary = WeakKeyDictionary()  # storage -> its part
        self.reductions = 0
        self.peak: Counter = Counter()  # bytes by part

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        storages = [tensor.untyped_storage() for tensor in local_tensors(result)]
        new = [storage for storage in storages if storage not in self.alive]
        for storage in new:
            self.alive[storage] = self.part()
        if new:
            # sizes are read anew: FSDP frees an all-gather by resizing its storage to 0
            now: Counter = Counter()
            for storage, part in self.alive.items():
                now[part] += storage.nbytes()
            self.peak = max(self.peak, now, key=Counter.total)
        return result

    def part(self) -> str:
        """The part of the work that the code now running belongs to."""
        inside_allocate = False
        for frame, _ in walk_stack(None):
            inside_allocate |= frame.f_code.co_name == "allocate"
            part = PARTS_BY_FUNCTION.get(frame.f_code.co_qualname)
            # FSDP allocates the input of a reduction, then its output, which are the gradients
            if part == "reduce-scatters" and inside_allocate:
                self.reductions += 1
                return part if self.reductions % 2 else "gradients"
            if part:
                return part
        return "activations"


def local_tensors(result) -> Iterator[torch.Tensor]:
    """The tensors that an operation returns and that have memory of this process."""
    for one in tree_leaves(result):
        if isinstance(one, DTensor):
            with torch.no_grad():
                one = one.to_local()
        if isinstance(one, FakeTensor) and one.device.type != "meta":
            yield one


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


def run_estimate(**setup) -> dict:
    """Bytes by part at the peak of two_steps(), of rank 0 of setup.processes."""
    setup = Setup(**setup)
    # no numbers: no weights are read, and no compiled function is called
    train.load_weights = cpu.call = lambda *_: None
    if setup.device == "cpu":
        cpu.PLAIN = (*cpu.PLAIN, FakeTensor)
    else:
        attention.use_flash = lambda *_: True
        attention.flash_attn_varlen_func = lambda q, k, v, *_, **__: FakeFlash.apply(q, k, v)

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
    }


# ---------------------------------------------------------------------------------- measurements


def run_measure(**setup) -> dict:
    """Real training of the same shape: how far this process grows over what it had before."""
    setup = Setup(**setup)
    with distributed(), tempfile.TemporaryDirectory() as folder:
        # a tiny model first, so that what Python and its libraries take is there already
        tiny = random_checkpoint(
            Path(folder),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            vocab_size=64,
        )
        two_steps(train.shard(tiny, setup.options), setup.sequences)
        gc.collect()
        before = resident()
        two_steps(train.shard(setup.model, setup.options), setup.sequences)
        return {"total": max(gather(most_resident() - before))}


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
        # nobody is asked there
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
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


@dataclass
class EstimateOptions:
    processes: int = 1  # that train together
    gpu_gb: float = 80.0  # memory of a GPU
    node_gpus: int = 8  # parameters are sharded in a node


def estimate_command(argv: list[str]) -> dict:
    """Print the peak memory of `train.py FLAGS` or `dpo.py FLAGS`, and what would fit a GPU."""
    file, *rest = argv
    args, flags = parser_of(EstimateOptions).parse_known_args(rest)
    # how many sequences of full length an example has
    commands = {"train.py": (train.finetune, 1), "dpo.py": (train_policy, 2)}
    if Path(file).name not in commands:
        raise InputError(f"{file}: give train.py or dpo.py, and its flags")
    if args.processes > args.node_gpus and args.processes % args.node_gpus:
        problem = f"must be whole nodes of {args.node_gpus} (--node-gpus)"
        raise InputError(f"--processes {problem}, got {args.processes}")
    function, sequences = commands[Path(file).name]
    given = parse_options(function, flags)
    o = given["o"]
    unit = sequences * o.max_length
    setup = Setup(
        model=given["model"].resolve(),
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
    tokens = setup.micro_batch_tokens
    batch = f"micro-batches of {tokens:,} tokens, sequences of {setup.max_length:,}"
    checkpointing = ", activation checkpointing" if setup.activation_checkpointing else ""
    print(f"{setup.model}: {setup.processes} processes, {batch}{checkpointing}")
    sizes = {**one["parts"], "total at peak": one["total"]}
    rows = [{"part": k, "GB per process": f"{size / 1e9:.2f}"} for k, size in sizes.items()]
    print(table(rows))
    print(f"total {one['total'] / 1e9:.2f} GB per process at peak")
    print(f"largest micro-batch in {args.gpu_gb:g} GB: {largest:,} tokens")
    write_figures(args.json, {"parts": rows})
    return {**one, "tokens": tokens, "largest": largest}


@dataclass
class CompareOptions:
    max_length: int = 512  # tokens of a sequence
    micro_batch_tokens: int = 2048  # of each process
    dtype: str = "bfloat16"  # of the computation


def compare_command(argv: list[str]) -> list[dict]:
    """Estimates of a small model on 1, 2 and 4 processes against what real processes take."""
    args = parser_of(CompareOptions).parse_args(argv)
    # a row for each number of processes, without and with activation checkpointing
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_checkpoint(Path(folder))
        for processes in (1, 2, 4):
            for checkpointing in (False, True):
                setup = Setup(
                    model,
                    processes,
                    args.max_length,
                    args.micro_batch_tokens,
                    checkpointing,
                    args.dtype,
                )
                estimated = estimate(setup)["total"]
                measured = measure(setup)["total"]
                row = {
                    "processes": processes,
                    "activation checkpointing": checkpointing,
                    "estimated": f"{estimated / 1e6:.0f} MB",
                    "measured": f"{measured / 1e6:.0f} MB",
                    "ratio": f"{estimated / measured:.2f}",
                }
                rows.append(row)
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
