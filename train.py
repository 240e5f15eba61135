r"""Training, as every stage shares it, and SFT on top (SynPO sections 3.1 and 4.1: G and R_t).

What differs from the paper
1. The loss covers the response and its end token only, not the template (not stated there;
   --loss-on-prompt is the other reading), and is a mean over the tokens of the global batch, not
   over each process's own.
2. Cosine schedule (not stated) after the paper's warm-up ratio of 0.1; weight decay 0; gradients
   clipped at norm 1.
3. An example longer than --max-length loses its end; one whose prompt alone is that long is left
   out and counted.

Weights are fp32 masters, sharded by FSDP2; the forward pass runs in --dtype. bf16 masters would not
move at lr 1e-6. A global batch is cut into packed micro-batches of about --micro-batch-tokens,
equally many for every process. `python -m bench.memory train.py FLAGS` estimates peak memory per
process without weights or GPUs.

data.jsonl {prompt | messages, response} -> DIR: an HF checkpoint in --dtype and its metrics

    python train.py --model DIR --data seeds.jsonl --out DIR --lr 1e-5 --epochs 1
    torchrun --nproc-per-node 8 train.py --model DIR --data seeds.jsonl --out DIR --lr 1e-6 \
        --activation-checkpointing
"""

import gc
import math
import shutil
import time
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from checkpoint import Checkpoint, load_config, load_weights, save
from formats.chat import Chat
from formats.records import read_jsonl
from model import Model
from ops.attention import Packed
from ops.cpu import tell_of_slow_bf16
from ops.meters import keep_metrics, log, speed
from ops.micro_batches import pack_micro_batches
from ops.progress import Progress
from plumbing.files import InputError, rng, write_text, writing
from plumbing.options import RunOptions, cli
from plumbing.parts import read_part, write_part
from plumbing.ranges import Count, NotNegative, Positive, Share, Whole
from plumbing.ranks import DEVICE, LOCAL_WORLD, RANK, WORLD, gather, on_rank0, print0
from plumbing.stage import Stage, hash_content, name_of


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    run: RunOptions = RunOptions()
    lr: Positive = 1e-6  # peak learning rate
    epochs: Count = 3  # passes over the data
    batch: Count = 32  # examples (responses, or pairs) per optimizer step, over all processes
    max_length: Count = 2048  # tokens of prompt and response; what is longer loses its end
    micro_batch_tokens: Count = 4096  # per process; bounds memory, changes no more than rounding
    warmup_ratio: Share = 0.1  # share of the steps in which the learning rate rises
    weight_decay: NotNegative = 0.0  # AdamW's
    max_grad_norm: NotNegative = 1.0  # gradients are clipped to this norm; 0: not clipped
    loss_on_prompt: bool = False  # train on the prompt's tokens too
    activation_checkpointing: bool = field(default=False, compare=False)  # less memory, 1/3 slower
    save_every: Whole = field(default=0, compare=False)  # steps between saves to resume; 0: none


# Token ids, and how many of them precede the first scored one: the loss mask, which is always a
# prefix. From there on all tokens count, the end token included.
Sequence = tuple[list[int], int]


@dataclass
class Example:
    """One unit of a batch: one sequence for SFT, chosen and rejected for preferences."""

    id: str
    sequences: list[Sequence]
    weight: int = 1  # what it adds to the number that the batch's summed loss is divided by
    extra: dict = field(default_factory=dict)  # what a loss needs besides log-probs

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.sequences)


def make_sequence(chat: Chat, row: dict, response: str, o: TrainOptions) -> Sequence | None:
    """Prompt and response, tokenised apart and joined; None if max_length leaves no token of the
    response.
    """
    prompt = chat.prompt_ids(row)
    ids = [*prompt, *chat.response_ids(response)][: chat.longest(o.max_length)]
    if len(ids) <= len(prompt):
        return None
    # at the earliest from token 1: nothing predicts token 0
    return ids, 1 if o.loss_on_prompt else len(prompt)


# -------------------------------------------------------------------------- log-probs of sequences


def response_logps(model: torch.nn.Module, sequences: list[Sequence]) -> list[torch.Tensor]:
    """fp32 log-probs of the scored tokens of each sequence, (len(ids) - start,) each, from one
    packed forward.
    """
    lengths = [len(ids) for ids, _ in sequences]
    offsets = accumulate([0, *lengths[:-1]])
    select = []  # the token at position p is predicted by the hidden state at p - 1
    targets = []
    for (ids, start), offset in zip(sequences, offsets, strict=True):
        select += range(offset + start - 1, offset + len(ids) - 1)
        targets += ids[start:]
    tokens = torch.tensor([token for ids, _ in sequences for token in ids]).to(DEVICE)  # (N,)
    select = torch.tensor(select).to(DEVICE)  # (M,)
    targets = torch.tensor(targets).to(DEVICE)  # (M,)
    logps = model(tokens, Packed(lengths, DEVICE), select, targets)  # (M,)
    return list(logps.split([len(ids) - start for ids, start in sequences]))


@torch.no_grad()
def score_sequences(
    model: Model, sequences: list[Sequence], budget: int = 8192
) -> list[torch.Tensor]:
    """response_logps of any number of sequences, in micro-batches of about `budget` tokens, on the
    CPU.
    """
    results: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    if not sequences:
        return results
    for ranks in pack_micro_batches([len(ids) for ids, _ in sequences], 1, budget):
        micro_batch = ranks[0]  # the only one
        scores = response_logps(model, [sequences[i] for i in micro_batch])
        for i, logps in zip(micro_batch, scores, strict=True):
            results[i] = logps.cpu()
    return results


# -------------------------------------------------------------------------------- sharded training


@cache
def mesh() -> DeviceMesh:
    """All processes in one row; several nodes are several rows: sharded within a row, replicated
    across rows.
    """
    if WORLD == LOCAL_WORLD:
        return init_device_mesh(DEVICE.type, (WORLD,))
    shape = (WORLD // LOCAL_WORLD, LOCAL_WORLD)
    return init_device_mesh(DEVICE.type, shape, mesh_dim_names=("nodes", "processes"))


def shard(start: str | Path, o: TrainOptions) -> torch.nn.Module:
    """The model of a checkpoint, its fp32 parameters sharded over all processes, computing in
    o.run.dtype.
    """
    tell_of_slow_bf16(o.run.torch_dtype)
    with torch.device("meta"):
        model = Model(load_config(start))
    compute = None if o.run.dtype == "float32" else o.run.torch_dtype
    options = {
        "mesh": mesh(),
        # a single process has nothing to free, and would only copy
        "reshard_after_forward": None if WORLD > 1 else False,
        # casting inputs would round the RoPE tables, which are arguments of each block, to bf16
        "mp_policy": MixedPrecisionPolicy(
            compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    }
    for block in model.model.layers:
        block.activation_checkpointing = o.activation_checkpointing
        fully_shard(block, **options)
    fully_shard(model, **options)
    model.to_empty(device=DEVICE)
    load_weights(model, start)
    return model.train()


# (examples, their log-probs by example and sequence) -> (sum of losses, sums of metrics)
LossFn = Callable[[list[Example], list[list[torch.Tensor]]], tuple[torch.Tensor, dict[str, float]]]
# (model, a step's metrics) -> more metrics of that step; may raise
Watch = Callable[[torch.nn.Module, dict], dict]


def fit(
    start: str | Path,
    examples: list[Example],
    loss_fn: LossFn,
    stage: Stage,
    o: TrainOptions,
    watch: Watch | None = None,
    forward: Callable = response_logps,
) -> dict:
    """Train the checkpoint `start` on examples into the directory stage.out; returns counts.

    loss_fn's sums are divided by the sum of weights over the global batch. Resumes from
    stage.scratch. A loss that is not finite raises InputError and leaves the last checkpoint as it
    was.
    """
    model = shard(start, o)
    optimizer = make_optimizer(model, o)
    batches = make_batches(examples, o)
    steps = len(batches)
    first = resume(stage.scratch, model, optimizer)
    one_step = partial(train_step, model, optimizer, loss_fn=loss_fn, o=o, forward=forward)
    watch_step = partial(watch, model) if watch else None
    for done in train_steps(one_step, batches[first:], first, steps, stage, o, watch_step):
        if o.save_every and done % o.save_every == 0 and done < steps:
            save_checkpoint(stage.scratch, model, optimizer, done)

    # the result: weights, tokenizer and template of `start`, metrics
    on_rank0(keep_metrics, stage)
    template = Chat(start, o.run).template
    save(model, stage.out, start, o.run.torch_dtype, template, writer=RANK == 0)
    del model, optimizer
    gc.collect()
    tokens = [sum(example.tokens for example in batch) for batch in batches]
    return {
        "examples": len(examples),
        "steps": steps,
        "tokens": sum(tokens),
        "fresh": sum(tokens[first:]),
    }


def make_optimizer(model: torch.nn.Module, o: TrainOptions) -> torch.optim.Optimizer:
    parameters = model.parameters()
    return torch.optim.AdamW(parameters, lr=o.lr, weight_decay=o.weight_decay, fused=True)


def train_steps(
    one_step: Callable[[list[Example], float], dict],
    batches: list[list[Example]],
    first: int,
    steps: int,
    stage: Stage,
    o: TrainOptions,
    watch: Callable[[dict], dict] | None = None,
) -> Iterator[int]:
    """Take a step on each of batches, the steps after `first` of a schedule of `steps`. one_step:
    (examples, learning rate) -> metrics; watch: a step's metrics -> more of them.

    Yields the steps done after each, so that the caller may save or change the model.
    """
    with Progress(name_of(stage.out), "step", steps, first) as progress:
        for step, batch in enumerate(batches, first):
            metrics = one_step(batch, o.lr * lr_schedule(step, steps, o.warmup_ratio))
            line = {"step": step + 1, **metrics}
            refuse_non_finite(line, batch, stage)
            if watch:
                line |= watch(line)
            log(stage.scratch, line)
            yield step + 1
            progress.update(note=f"loss {line['loss']:.3f}")


def make_batches(examples: list, o: TrainOptions) -> list[list]:
    """Each step's examples: every epoch in an order of its own, epochs joined, nothing dropped at
    the end.
    """
    order = []
    for epoch in range(o.epochs):
        shuffled = list(examples)
        rng(o.run.seed, "epoch", epoch).shuffle(shuffled)
        order += shuffled
    return [order[i : i + o.batch] for i in range(0, len(order), o.batch)]


def micro_batches(batch: list[Example], o: TrainOptions) -> list[list[list[Example]]]:
    """A global batch as rounds of one micro-batch a rank: [round][rank] -> examples."""
    sizes = [example.tokens for example in batch]
    rounds = pack_micro_batches(sizes, WORLD, o.micro_batch_tokens)
    return [[[batch[i] for i in micro] for micro in ranks] for ranks in rounds]


def lr_schedule(step: int, steps: int, warmup_ratio: float) -> float:
    """Learning rate as a share of its peak: a linear rise, then half a cosine to 0."""
    rise = math.ceil(warmup_ratio * steps)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def train_step(
    model,
    optimizer,
    batch: list[Example],
    lr: float,
    loss_fn: LossFn,
    o: TrainOptions,
    forward: Callable = response_logps,
) -> dict:
    """One optimizer step on a global batch; returns its metrics, the same on every rank."""
    begin = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = lr
    metrics = mean_losses(model, batch, loss_fn, o, forward)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    metrics["grad_norm"] = norm.full_tensor().item()  # waits for a GPU
    metrics["lr"] = lr
    trained = [sequence for example in batch for sequence in example.sequences]
    seconds = time.perf_counter() - begin
    return {**metrics, **speed(model.config, trained, seconds, o.run.peak_tflops)}


def mean_losses(
    model,
    batch: list[Example],
    loss_fn: LossFn,
    o: TrainOptions,
    forward: Callable = response_logps,
    backward: bool = True,
) -> dict:
    """Loss and metrics of a global batch, means over its weights, the same on every rank.

    backward: add its gradients to the model's. Without, call it under torch.no_grad().
    """
    total = sum(example.weight for example in batch)
    sums: Counter = Counter()
    for ranks in micro_batches(batch, o):
        mine = ranks[RANK]
        sequences = [sequence for example in mine for sequence in example.sequences]
        # a rank without examples must still join the collectives: it scores one token, at weight 0
        outputs = forward(model, sequences or [([0, 0], 1)])
        if mine:
            loss, metrics = loss_fn(mine, by_example(mine, outputs))
            sums.update({"loss": loss.item(), **metrics})
        else:
            loss = outputs[0].sum() * 0
        if backward:
            # FSDP averages gradients over ranks; the mean wanted is over the global count, hence
            # WORLD
            (loss * WORLD / total).backward()
    if not backward:
        # after a backward pass, FSDP does so itself: fp32 shards in place of a copy in o.run.dtype
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    merged: Counter = Counter()
    for of_one_rank in gather(sums):
        merged.update(of_one_rank)
    return {name: value / total for name, value in merged.items()}


def by_example(examples: list[Example], outputs: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Outputs of all sequences, grouped by the example that they belong to."""
    ordered = iter(outputs)
    return [[next(ordered) for _ in example.sequences] for example in examples]


def refuse_non_finite(line: dict, batch: list[Example], stage: Stage) -> None:
    """Raise InputError where loss or gradient is NaN or infinite; the last checkpoint stays as it
    was.
    """
    if math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]):
        return
    where = f"step {line['step']} (records {' '.join(str(e.id) for e in batch)})"
    problem = f"loss {line['loss']}, gradient norm {line['grad_norm']} at {where}"
    raise InputError(f"{stage.out}: {problem}; use a lower --lr, which starts this stage over")


# --------------------------------------------------------------------------- stopping and resuming


def save_checkpoint(folder: Path, model, optimizer, step: int) -> None:
    """Write folder/checkpoint/STEP, every rank its shards, then drop the older one; a kill leaves
    one of them whole.
    """
    target = folder / "checkpoint" / str(step)
    weights, moments = get_state_dict(model, optimizer)
    with writing(target, CheckpointException):
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=target)
    on_rank0(complete, folder, target, digests(target))


def digests(target: Path) -> dict[str, str]:
    """Name -> digest of a checkpoint's files; every rank reads its share of them."""
    files = sorted(file for file in target.iterdir() if file.name != "done")
    return dict(ChainMap(*gather({file.name: hash_content(file) for file in files[RANK::WORLD]})))


def complete(folder: Path, target: Path, files: dict[str, str]) -> None:
    """Mark a checkpoint as complete, with the metrics up to it, and drop the older one."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text() if metrics.is_file() else ""
    write_part(target / "done", {"files": files, "metrics": lines})
    for older in target.parent.iterdir():
        if older != target:
            shutil.rmtree(older)


def latest_checkpoint(folder: Path) -> int:
    """The step of the latest complete checkpoint; 0 if none."""
    steps = [int(done.parent.name) for done in folder.glob("checkpoint/*/done")]
    return max(steps, default=0)


def resume(folder: Path, model, optimizer) -> int:
    """Load the latest complete checkpoint; return its step (0 if none). Metrics of steps that will
    be repeated are dropped.
    """
    step = on_rank0(latest_checkpoint, folder)
    metrics = metrics_until(folder / "checkpoint" / str(step)) if step else ""
    if metrics is None:
        print0(f"  {folder}: the checkpoint of step {step} is damaged; training starts over")
        step, metrics = 0, ""
    on_rank0(write_text, folder / "metrics.jsonl", metrics)
    if step:
        load_checkpoint(folder, model, optimizer, step)
    return step


def metrics_until(target: Path) -> str | None:
    """The metrics up to a checkpoint; None unless it is complete and every file as it was saved."""
    state = on_rank0(read_part, target / "done")
    return state["metrics"] if state and state["files"] == digests(target) else None


def load_checkpoint(folder: Path, model, optimizer, step: int) -> None:
    weights, moments = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": moments}
    dcp.load(saved, checkpoint_id=folder / "checkpoint" / str(step))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


# -------------------------------------------------------------------------- supervised fine-tuning


def sft_loss(
    examples: list[Example], logps: list[list[torch.Tensor]]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Sum of the negative log-probs of all scored tokens."""
    # an example has one sequence
    return -torch.stack([sequences[0].sum() for sequences in logps]).sum(), {}


def sft(model: str | Path, rows: list[dict], stage: Stage, o: TrainOptions) -> dict:
    """Fine-tune a checkpoint on rows {prompt | messages, response}; writes the directory stage.out,
    returns counts.
    """
    chat = Chat(model, o.run)
    examples = []
    truncated = 0
    for row in rows:
        sequence = make_sequence(chat, row, row["response"], o)
        if sequence is not None:
            ids, start = sequence
            truncated += ids[-1] != chat.end
            examples.append(Example(row["id"], [sequence], weight=len(ids) - start))
    if not examples:
        raise InputError(f"{stage.out}: no example fits --max-length {o.max_length}; raise it")
    counts = fit(model, examples, sft_loss, stage, o)
    too_long = len(rows) - len(examples)
    return {"records": len(rows), "too_long": too_long, "truncated": truncated, **counts}


def finetune(
    model: Checkpoint,  # where training starts
    data: Path,  # JSONL of {"prompt", "response"}
    out: Path,  # checkpoint directory to write
    o: TrainOptions,
) -> Path:
    """Supervised fine-tuning of a checkpoint on a file of records."""
    stage = Stage(out, o, model=model, data=data)
    if stage.done:
        return out
    rows = read_jsonl(data, "prompt", "response")
    return stage.finish(**sft(model, rows, stage, o))


if __name__ == "__main__":
    cli(finetune)
