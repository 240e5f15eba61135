"""Training, as every stage shares it, and supervised fine-tuning on top (SynPO sections 3.1 and 4.1: G and R_t are SFT).

What differs from the paper
1. The loss covers the response and its end token only, not the template (not stated there; --loss-on-prompt is the other
   reading), and is a mean over the tokens of the global batch, not over each process's own.
2. Cosine schedule (not stated) after the paper's warm-up ratio of 0.1; weight decay 0; clipping at 1.
3. An example longer than --max-length loses its end; one whose prompt alone is as long is left out and counted.

Weights are fp32 masters, sharded by FSDP2; the forward pass runs in --dtype. bf16 masters would not move at lr 1e-6.
A global batch is cut into packed micro-batches of about --micro-tokens, the same number for every process.
--dry-run N foretells the memory of each of N processes, without weights, GPUs or the other processes.

data.jsonl {prompt | messages, response} -> DIR: an HF checkpoint in --dtype, metrics.jsonl, manifest.json

    python train.py --model DIR --data seeds.jsonl --out DIR --lr 1e-5 --epochs 1
    torchrun --nproc-per-node 8 train.py --model DIR --data seeds.jsonl --out DIR --lr 1e-6 --recompute
"""

import gc
import heapq
import json
import math
import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from tqdm import tqdm

from data import (
    DEVICE,
    RANK,
    WORLD,
    Chat,
    Common,
    InputError,
    clock,
    command,
    gather,
    load_function,
    on_first,
    part,
    peak_flops,
    read_jsonl,
    rng,
    spent,
    stage,
    write_text,
)
from model import Config, Model, Packed, fill, save


@dataclass(kw_only=True)
class TrainOptions:
    lr: float = 1e-6  # peak learning rate
    epochs: int = 3  # passes over the data
    batch: int = 32  # examples (answers, or pairs) per optimizer step, over all processes
    max_length: int = 2048  # tokens of prompt and response; what is longer loses its end
    micro_tokens: int = 4096  # tokens of a packed micro-batch per process; bounds memory, changes no more than rounding
    warmup: float = (
        0.1  # share of the steps in which the learning rate rises, before its cosine falls
    )
    weight_decay: float = 0.0  # AdamW's
    clip: float = 1.0  # largest norm of the gradient
    loss_on_prompt: bool = False  # train on the prompt's tokens too
    recompute: bool = False  # activation checkpointing: a third more compute, far less memory
    checkpoint_every: int = 0  # steps between checkpoints to resume a stage from; 0 is never


Sequence = tuple[
    list[int], int
]  # token ids, and how many of them come before the first that is scored


@dataclass
class Example:
    """What one unit of a batch is made of: one sequence for SFT, chosen and rejected for preferences."""

    id: str
    sequences: list[Sequence]
    extra: dict = field(default_factory=dict)  # what an objective needs beside log-probs

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.sequences)

    @property
    def scored(self) -> int:
        return sum(len(ids) - start for ids, start in self.sequences)


def make_sequence(chat: Chat, row: dict, response: str, o: TrainOptions) -> Sequence | None:
    """Prompt and response tokenised apart and joined; None if max_length leaves no token of the response."""
    prompt = chat.prompt_ids(row)
    ids = [*prompt, *chat.response_ids(response)][: o.max_length]
    return (ids, 1 if o.loss_on_prompt else len(prompt)) if len(ids) > len(prompt) else None


# ---------------------------------------------------------------------------------------------- log-probs of sequences


def response_logps(model: torch.nn.Module, sequences: list[Sequence]) -> list[torch.Tensor]:
    """fp32 log-probs of the scored tokens of each sequence, (len(ids) - start,) each, from one packed forward."""
    with clock("waiting for data"):
        lengths = [len(ids) for ids, _ in sequences]
        context, offsets = Packed(lengths, DEVICE), accumulate([0, *lengths[:-1]])
        # the token at position p is predicted by the hidden state at p - 1
        select = torch.cat(
            [
                torch.arange(start - 1, len(ids) - 1) + offset
                for (ids, start), offset in zip(sequences, offsets, strict=True)
            ]
        )  # (M,)
        targets = torch.tensor([t for ids, start in sequences for t in ids[start:]])  # (M,)
        tokens = torch.tensor([t for ids, _ in sequences for t in ids])  # (N,)
    logps = model(tokens.to(DEVICE), context, select.to(DEVICE), targets.to(DEVICE))  # (M,)
    return list(logps.split([len(ids) - start for ids, start in sequences]))


@torch.no_grad()
def score_sequences(
    model: Model, sequences: list[Sequence], budget: int = 8192
) -> list[torch.Tensor]:
    """response_logps of any number of sequences, in micro-batches of about `budget` tokens, on the CPU."""
    results: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    for [micro] in plan([len(ids) for ids, _ in sequences], 1, budget) if sequences else ():
        for i, logps in zip(
            micro, response_logps(model, [sequences[i] for i in micro]), strict=True
        ):
            results[i] = logps.cpu()
    return results


def plan(sizes: list[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Spread items of the given token counts over rounds of one micro-batch a rank: [round][rank] -> indices.

    Largest first, each into the emptiest micro-batch: as few rounds as the budget allows, near equal loads. Every rank
    gets the same number of micro-batches, as sharded training must; some may be empty. An item over budget stands alone.
    """
    rounds = max(1, math.ceil(sum(min(size, budget) for size in sizes) / (ranks * budget)))
    while True:
        loads = [(0, i) for i in range(rounds * ranks)]
        bins: list[list[int]] = [[] for _ in loads]
        for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            load, emptiest = heapq.heappop(loads)
            bins[emptiest].append(item)
            heapq.heappush(loads, (load + sizes[item], emptiest))
        if all(len(b) <= 1 or sum(sizes[i] for i in b) <= budget for b in bins):
            return [bins[r * ranks : (r + 1) * ranks] for r in range(rounds)]
        rounds += 1


# ---------------------------------------------------------------------------------------------- sharded training


class Timed:
    """Before one of FSDP's collectives in the bases of a class: counts its seconds. A GPU's are those of the stream that it
    runs on, beside the computation, and are counted when the step is over. Sums over nodes cannot be caught and are not."""

    running: ClassVar[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = []

    def __call__(self, *args, **named):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * (DEVICE.type == "cuda"))]
        with clock("communicating"):
            for event in events[:1]:
                event.record()
            work = super().__call__(*args, **named)
            for event in events[1:]:
                event.record()
        self.running += [tuple(events)] if events else []
        return work

    @classmethod
    def settle(cls) -> None:
        """Count what has run on a GPU's streams; the caller has waited for them."""
        spent["communicating"] += sum(start.elapsed_time(end) for start, end in cls.running) / 1e3
        cls.running.clear()


class TimedAllGather(Timed, DefaultAllGather):
    pass


class TimedReduceScatter(Timed, DefaultReduceScatter):
    pass


@cache
def mesh() -> DeviceMesh:
    """All processes in a row; those of several nodes in rows: parameters are sharded inside one, replicated over them."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if WORLD == local:
        return init_device_mesh(DEVICE.type, (WORLD,))
    return init_device_mesh(
        DEVICE.type, (WORLD // local, local), mesh_dim_names=("nodes", "processes")
    )


def shard(start: str | Path, o: TrainOptions, common: Common) -> torch.nn.Module:
    """The model of a checkpoint with fp32 parameters sharded over all processes, computing in common.dtype."""
    with torch.device("meta"):
        model = Model(Config.load(start))
    compute = None if common.dtype == "float32" else common.torch_dtype
    # cast_forward_inputs would round the RoPE tables, which are arguments of each block, to bf16
    options = {
        "mesh": mesh(),
        "reshard_after_forward": None if WORLD > 1 else False,  # alone: saves little, costs copies
        "mp_policy": MixedPrecisionPolicy(
            compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    }
    for block in model.model.layers:
        block.recompute = o.recompute
        fully_shard(block, **options)
    fully_shard(model, **options)
    for module in (*model.model.layers, model):
        module.set_custom_all_gather(TimedAllGather())
        module.set_custom_reduce_scatter(TimedReduceScatter())
    model.to_empty(device=DEVICE)
    fill(model, start)
    return model.train()


Objective = Callable[
    [list[Example], list[list[torch.Tensor]]], tuple[torch.Tensor, dict[str, float]]
]


def fit(
    start: str | Path,
    out: str | Path,
    examples: list[Example],
    objective: Objective,
    count: Callable[[Example], int],
    o: TrainOptions,
    common: Common,
    check: Callable[[dict], None] | None = None,
    forward: Callable[[torch.nn.Module, list[Sequence]], list[torch.Tensor]] | None = None,
) -> dict:
    """Train the checkpoint `start` on examples and write the result to the directory `out`; returns counts.

    objective(examples, what forward gives, by example and sequence) -> (sum of losses, sums of metrics); both are divided by
    the sum of count(example) over the global batch. forward: response_logps unless given. check(first line of metrics) may
    raise. Goes on from out/checkpoint if an earlier call was stopped. A loss that is not finite raises InputError and leaves
    that checkpoint as it was.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model = shard(start, o, common)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, weight_decay=o.weight_decay, fused=True
    )
    batches = make_batches(examples, o, common.seed)
    first, peak = resume(out, model, optimizer), peak_flops(common.dtype, common.peak_tflops)
    tokens = sum(example.tokens for batch in batches for example in batch)
    bar = tqdm(
        total=len(batches),
        initial=first,
        desc=out.name,
        unit=" step",
        leave=False,
        disable=RANK > 0,
    )
    for step in range(first, len(batches)):
        begin, flop, batch = time.perf_counter(), spent["flop"], batches[step]
        for group in optimizer.param_groups:
            group["lr"] = o.lr * schedule(step, len(batches), o.warmup)
        line = train_step(model, optimizer, batch, objective, count, o, forward)
        seconds = time.perf_counter() - begin
        line = {
            "step": step + 1,
            **line,
            "lr": optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "tokens_per_second": sum(example.tokens for example in batch) / seconds,
            "share_of_peak": sum(gather(spent["flop"] - flop)) / seconds / WORLD / peak,
            "memory_gb": peak_memory(),
        }
        if not math.isfinite(line["loss"]) or not math.isfinite(line["grad_norm"]):
            good = max(
                (d.parent for d in out.glob("checkpoint/*/done")),
                key=lambda d: int(d.name),
                default="none",
            )
            raise InputError(
                f"{out}: loss {line['loss']}, gradient norm {line['grad_norm']} at step {step + 1} (records "
                f"{' '.join(str(e.id) for e in batch)}; last good checkpoint: {good}); lower --lr, which starts "
                "this stage over"
            )
        log(out, line)
        spent["done"] += sum(example.tokens for example in batch) if RANK == 0 else 0
        if step == 0 and check:
            check(line)
        bar.update()
        bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
        if o.checkpoint_every and (step + 1) % o.checkpoint_every == 0 and step + 1 < len(batches):
            save_checkpoint(out, model, optimizer, step + 1)
    bar.close()
    chat = Chat(start, common.chat_template)
    save(model, out, start, common.torch_dtype, chat.template, writer=RANK == 0)
    on_first(
        lambda: [done.unlink() for done in out.glob("checkpoint/*/done")]
    )  # a half-removed one must not count
    on_first(shutil.rmtree, out / "checkpoint", True)
    del model, optimizer
    gc.collect()
    return {"examples": len(examples), "steps": len(batches), "tokens": tokens}


def make_batches(examples: list, o: TrainOptions, seed: int) -> list[list]:
    """Each step's examples: every epoch in an order of its own, epochs joined, nothing dropped at the end."""
    order = []
    for epoch in range(o.epochs):
        shuffled = list(examples)
        rng(seed, "epoch", epoch).shuffle(shuffled)
        order += shuffled
    return [order[i : i + o.batch] for i in range(0, len(order), o.batch)]


def micro_batches(batch: list[Example], o: TrainOptions) -> list[list[list[Example]]]:
    """A global batch as rounds of one micro-batch a rank, of about o.micro_tokens each: [round][rank] -> examples."""
    return [
        [[batch[i] for i in micro] for micro in ranks]
        for ranks in plan([example.tokens for example in batch], WORLD, o.micro_tokens)
    ]


def schedule(step: int, steps: int, warmup: float) -> float:
    """Learning rate as a share of its peak: linear rise, then half a cosine to 0."""
    rise = math.ceil(warmup * steps)
    return (
        (step + 1) / rise
        if step < rise
        else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
    )


def train_step(
    model,
    optimizer,
    batch: list[Example],
    objective: Objective,
    count,
    o: TrainOptions,
    forward=None,
) -> dict:
    """One optimizer step on a global batch; returns its metrics, the same on every rank."""
    total, sums, flop = sum(count(example) for example in batch), Counter(), spent["flop"]
    for ranks in micro_batches(batch, o):
        mine = ranks[RANK]
        # A rank without examples must still join the collectives: it runs one token with weight 0.
        sequences = [s for example in mine for s in example.sequences] or [([0, 0], 1)]
        outputs = iter((forward or response_logps)(model, sequences))
        if mine:
            loss, metrics = objective(
                mine, [[next(outputs) for _ in example.sequences] for example in mine]
            )
            sums.update({"loss": loss.item(), **metrics})
        else:
            loss = next(outputs).sum() * 0
        # FSDP averages gradients over ranks; the mean wanted is over the global count, hence the factor WORLD
        (loss * WORLD / total).backward()
    spent["flop"] += 2 * (
        spent["flop"] - flop
    )  # the backward pass: gradients of inputs and of weights
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    merged: Counter = Counter()
    for one in gather(dict(sums)):
        merged.update(one)
    norm = norm.full_tensor().item()  # which waits for a GPU
    Timed.settle()
    return {**{name: value / total for name, value in merged.items()}, "grad_norm": norm}


def peak_memory() -> float:
    """GB at most so far: of the GPU, else of the process."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def log(out: Path, line: dict) -> None:
    """A step's metrics to metrics.jsonl, and to TensorBoard's files where tensorboard is installed."""
    if RANK == 0:
        with open(out / "metrics.jsonl", "a") as file:
            print(
                json.dumps(
                    {
                        name: float(f"{value:.6g}") if isinstance(value, float) else value
                        for name, value in line.items()
                    }
                ),
                file=file,
            )
        load_function("eval/tensorboard.py:add")(out, line)


# ---------------------------------------------------------------------------------------------- stopping and going on


def save_checkpoint(out: Path, model, optimizer, step: int) -> None:
    """Write out/checkpoint/STEP, every rank its shards, then drop the older one; a kill leaves one of them whole."""
    target = out / "checkpoint" / str(step)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=target)
    on_first(lambda: (target / "done").touch())
    for older in (out / "checkpoint").iterdir() if RANK == 0 else ():
        if older != target:
            shutil.rmtree(older)


def resume(out: Path, model, optimizer) -> int:
    """Load the newest whole checkpoint below out, if any; returns the number of steps it has behind it."""

    def newest():
        done = max((int(d.parent.name) for d in out.glob("checkpoint/*/done")), default=0)
        metrics = out / "metrics.jsonl"  # may hold steps that will be repeated
        lines = metrics.read_text().splitlines()[:done] if metrics.is_file() else []
        write_text(metrics, "".join(line + "\n" for line in lines))
        return done

    step = on_first(newest)
    if step:
        weights, moments = get_state_dict(model, optimizer)
        dcp.load(
            {"model": weights, "optimizer": moments}, checkpoint_id=out / "checkpoint" / str(step)
        )
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return step


# ---------------------------------------------------------------------------------------------- supervised fine-tuning


def sft_objective(
    examples: list[Example], logps: list[list[torch.Tensor]]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Sum of the negative log-probs of all scored tokens."""
    return -torch.stack([one.sum() for [one] in logps]).sum(), {}


def sft(
    model: str | Path, rows: list[dict], out: str | Path, o: TrainOptions, common: Common
) -> dict:
    """Fine-tune on rows {prompt | messages, response}; writes a checkpoint directory, returns counts."""
    chat = Chat(model, common.chat_template)
    sequences = [(row["id"], make_sequence(chat, row, row["response"], o)) for row in rows]
    examples = [Example(name, [sequence]) for name, sequence in sequences if sequence]
    if not examples:
        raise InputError(f"{out}: no example fits --max-length {o.max_length}; raise it")
    counts = fit(model, out, examples, sft_objective, lambda example: example.scored, o, common)
    return {"records": len(rows), "too_long": len(rows) - len(examples), **counts}


@dataclass(kw_only=True)
class DryRun:
    """Options of the training commands."""

    dry_run: int = 0  # train nothing: foretell the memory that each of so many processes would need (bench/memory.py)
    gpu_gb: float = 80.0  # --dry-run: memory of a GPU
    node_gpus: int = 8  # --dry-run: GPUs of a node, inside which parameters are sharded


@dataclass(kw_only=True)
class Options(TrainOptions, DryRun, Common):
    model: str  # checkpoint directory to start from
    data: str  # JSONL of {"prompt", "response"}
    out: str  # checkpoint directory to write


def main(o: Options) -> dict:
    if o.dry_run:
        return load_function("bench/memory.py:dry_run")(o, sequences=1)
    rows = read_jsonl(o.data, "prompt", "response")
    return stage(
        o.out,
        {"model": o.model, "data": o.data},
        {**part(o, TrainOptions), **part(o, Common)},
        lambda: sft(o.model, rows, o.out, o, o),
    )


if __name__ == "__main__":
    command(main, Options)
