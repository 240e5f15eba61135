"""Training, as every stage shares it, and supervised fine-tuning on top (SynPO sections 3.1 and 4.1: G and R_t are SFT).

What differs from the paper
1. The loss covers the response and its end token only, not the template (not stated there; --loss-on-prompt is the other
   reading), and is a mean over the tokens of the global batch, not over each process's own.
2. Cosine schedule (not stated) after the paper's warm-up ratio of 0.1; weight decay 0; clipping at 1.
3. An example longer than --max-length loses its end; one whose prompt alone is as long is left out and counted.

Weights are fp32 masters, sharded by FSDP2; the forward pass runs in --dtype. bf16 masters would not move at lr 1e-6.
A global batch is cut into packed micro-batches of about --micro-tokens, the same number for every process.

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
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from data import (DEVICE, RANK, WORLD, Chat, Common, InputError, command, gather, on_first, part, read_jsonl, rng,
                  stage, write_text)
from model import Config, Model, Packed, fill, save


@dataclass(kw_only=True)
class TrainOptions:
    lr: float = 1e-6  # peak learning rate
    epochs: int = 3  # passes over the data
    batch: int = 32  # examples (answers, or pairs) per optimizer step, over all processes
    max_length: int = 2048  # tokens of prompt and response; what is longer loses its end
    micro_tokens: int = 4096  # tokens of a packed micro-batch per process; bounds memory, changes no result
    warmup: float = 0.1  # share of the steps in which the learning rate rises, before its cosine falls
    weight_decay: float = 0.0  # AdamW's
    clip: float = 1.0  # largest norm of the gradient
    loss_on_prompt: bool = False  # train on the prompt's tokens too
    recompute: bool = False  # activation checkpointing: a third more compute, far less memory
    checkpoint_every: int = 0  # steps between checkpoints to resume a stage from; 0 is never


Sequence = tuple[list[int], int]  # token ids, and how many of them come before the first that is scored


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
    ids = [*prompt, *chat.response_ids(response)][:o.max_length]
    return (ids, 1 if o.loss_on_prompt else len(prompt)) if len(ids) > len(prompt) else None


# ---------------------------------------------------------------------------------------------- log-probs of sequences

def response_logps(model: torch.nn.Module, sequences: list[Sequence]) -> list[torch.Tensor]:
    """fp32 log-probs of the scored tokens of each sequence, (len(ids) - start,) each, from one packed forward."""
    offsets, total = [], 0
    for ids, _ in sequences:
        offsets.append(total)
        total += len(ids)
    spans = list(zip(sequences, offsets, strict=True))
    # the token at position p is predicted by the hidden state at p - 1
    select = torch.cat([torch.arange(start - 1, len(ids) - 1) + offset for (ids, start), offset in spans])  # (M,)
    targets = torch.tensor([t for ids, start in sequences for t in ids[start:]])  # (M,)
    tokens = torch.tensor([t for ids, _ in sequences for t in ids])  # (N,)
    context = Packed([len(ids) for ids, _ in sequences], DEVICE)
    logps = model(tokens.to(DEVICE), context, select.to(DEVICE), targets.to(DEVICE))  # (M,)
    return list(logps.split([len(ids) - start for ids, start in sequences]))


@torch.no_grad()
def score_sequences(model: Model, sequences: list[Sequence], budget: int = 8192) -> list[torch.Tensor]:
    """response_logps of any number of sequences, in micro-batches of about `budget` tokens, on the CPU."""
    results: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    for [micro] in plan([len(ids) for ids, _ in sequences], 1, budget) if sequences else ():
        for i, logps in zip(micro, response_logps(model, [sequences[i] for i in micro]), strict=True):
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
            return [bins[r * ranks:(r + 1) * ranks] for r in range(rounds)]
        rounds += 1


# ---------------------------------------------------------------------------------------------- sharded training

def shard(start: str | Path, o: TrainOptions, common: Common) -> torch.nn.Module:
    """The model of a checkpoint with fp32 parameters sharded over all processes, computing in common.dtype."""
    with torch.device("meta"):
        model = Model(Config.load(start))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shape = (WORLD,) if WORLD == local else (WORLD // local, local)  # several nodes: shard inside one, replicate over them
    compute = None if common.dtype == "float32" else common.torch_dtype
    # cast_forward_inputs would round the RoPE tables, which are arguments of each block, to bf16
    options = {"mesh": init_device_mesh(DEVICE.type, shape),
               "mp_policy": MixedPrecisionPolicy(compute, reduce_dtype=torch.float32, cast_forward_inputs=False)}
    for block in model.model.layers:
        block.recompute = o.recompute
        fully_shard(block, **options)
    fully_shard(model, **options)
    model.to_empty(device=DEVICE)
    fill(model, start)
    return model.train()


Objective = Callable[[list[Example], list[list[torch.Tensor]]], tuple[torch.Tensor, dict[str, float]]]


def fit(start: str | Path, out: str | Path, examples: list[Example], objective: Objective,
        count: Callable[[Example], int], o: TrainOptions, common: Common, check: Callable[[dict], None] = lambda line: None,
        ) -> dict:
    """Train the checkpoint `start` on examples and write the result to the directory `out`; returns counts.

    objective(examples, log-probs by example and sequence) -> (sum of losses, sums of metrics); both are divided by the
    sum of count(example) over the global batch. check(first line of metrics) may raise. Goes on from out/checkpoint if an
    earlier call was stopped. A loss that is not finite raises InputError and leaves that checkpoint as it was.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model = shard(start, o, common)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=o.weight_decay, fused=True)
    batches = make_batches(len(examples), o, common.seed)
    first = resume(out, model, optimizer)
    tokens = sum(examples[i].tokens for batch in batches for i in batch)
    bar = tqdm(total=len(batches), initial=first, desc=out.name, unit=" step", leave=False, disable=RANK > 0)
    for step in range(first, len(batches)):
        begin, batch = time.perf_counter(), [examples[i] for i in batches[step]]
        for group in optimizer.param_groups:
            group["lr"] = o.lr * schedule(step, len(batches), o.warmup)
        line = train_step(model, optimizer, batch, objective, count, o)
        seconds = time.perf_counter() - begin
        line = {"step": step + 1, **line, "lr": optimizer.param_groups[0]["lr"], "seconds": seconds,
                "tokens_per_second": sum(example.tokens for example in batch) / seconds, "memory_gb": peak_memory()}
        if not math.isfinite(line["loss"]) or not math.isfinite(line["grad_norm"]):
            raise InputError(f"{out}: loss {line['loss']}, gradient norm {line['grad_norm']} at step {step + 1} (records "
                             f"{[e.id for e in batch][:8]}); lower --lr, which starts this stage over")
        log(out, line)
        if step == 0:
            check(line)
        bar.update()
        bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
        if o.checkpoint_every and (step + 1) % o.checkpoint_every == 0 and step + 1 < len(batches):
            save_checkpoint(out, model, optimizer, step + 1)
    bar.close()
    chat = Chat(start, common.chat_template)
    save(model, out, start, common.torch_dtype, chat.template, writer=RANK == 0)
    on_first(lambda: [done.unlink() for done in out.glob("checkpoint/*/done")])  # a half-removed one must not count
    on_first(shutil.rmtree, out / "checkpoint", True)
    del model, optimizer
    gc.collect()
    return {"examples": len(examples), "steps": len(batches), "tokens": tokens}


def make_batches(n: int, o: TrainOptions, seed: int) -> list[list[int]]:
    """Indices of each step's examples: every epoch in an order of its own, epochs joined, nothing dropped at the end."""
    order = []
    for epoch in range(o.epochs):
        indices = list(range(n))
        rng(seed, "epoch", epoch).shuffle(indices)
        order += indices
    return [order[i:i + o.batch] for i in range(0, len(order), o.batch)]


def schedule(step: int, steps: int, warmup: float) -> float:
    """Learning rate as a share of its peak: linear rise, then half a cosine to 0."""
    rise = math.ceil(warmup * steps)
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def train_step(model, optimizer, batch: list[Example], objective: Objective, count, o: TrainOptions) -> dict:
    """One optimizer step on a global batch; returns its metrics, the same on every rank."""
    total, sums = sum(count(example) for example in batch), Counter()
    for micro in plan([example.tokens for example in batch], WORLD, o.micro_tokens):
        mine = [batch[i] for i in micro[RANK]]
        # A rank without examples must still join the collectives: it runs one token with weight 0.
        sequences = [s for example in mine for s in example.sequences] or [([0, 0], 1)]
        logps = iter(response_logps(model, sequences))
        if mine:
            loss, metrics = objective(mine, [[next(logps) for _ in example.sequences] for example in mine])
            sums.update({"loss": loss.item(), **metrics})
        else:
            loss = next(logps).sum() * 0
        # FSDP averages gradients over ranks; the mean wanted is over the global count, hence the factor WORLD
        (loss * WORLD / total).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    merged: Counter = Counter()
    for one in gather(dict(sums)):
        merged.update(one)
    return {**{name: value / total for name, value in merged.items()}, "grad_norm": norm.full_tensor().item()}


def peak_memory() -> float:
    """GB at most so far: of the GPU, else of the process."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def log(out: Path, line: dict) -> None:
    if RANK == 0:
        with open(out / "metrics.jsonl", "a") as file:
            print(json.dumps({name: float(f"{value:.6g}") if isinstance(value, float) else value
                              for name, value in line.items()}), file=file)


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
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=out / "checkpoint" / str(step))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return step


# ---------------------------------------------------------------------------------------------- supervised fine-tuning

def sft_objective(examples: list[Example], logps: list[list[torch.Tensor]]) -> tuple[torch.Tensor, dict[str, float]]:
    """Sum of the negative log-probs of all scored tokens."""
    return -torch.stack([one.sum() for [one] in logps]).sum(), {}


def sft(model: str | Path, rows: list[dict], out: str | Path, o: TrainOptions, common: Common) -> dict:
    """Fine-tune on rows {prompt | messages, response}; writes a checkpoint directory, returns counts."""
    chat = Chat(model, common.chat_template)
    sequences = [(row["id"], make_sequence(chat, row, row["response"], o)) for row in rows]
    examples = [Example(name, [sequence]) for name, sequence in sequences if sequence]
    if not examples:
        raise InputError(f"{out}: no example fits --max-length {o.max_length}; raise it")
    counts = fit(model, out, examples, sft_objective, lambda example: example.scored, o, common)
    return {"records": len(rows), "too_long": len(rows) - len(examples), **counts}


@dataclass(kw_only=True)
class Options(TrainOptions, Common):
    model: str  # checkpoint directory to start from
    data: str  # JSONL of {"prompt", "response"}
    out: str  # checkpoint directory to write


def main(o: Options) -> dict:
    rows = read_jsonl(o.data, "prompt", "response")
    return stage(o.out, {"model": o.model, "data": o.data}, {**part(o, TrainOptions), **part(o, Common)},
                 lambda: sft(o.model, rows, o.out, o, o))


if __name__ == "__main__":
    command(main, Options)
