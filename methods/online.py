"""Training that makes its data as it goes: rounds of optimizer steps, with sampling in between.

Sampler and trainer never live together. A round samples from a checkpoint, then loads the sharded
training (weights and moments), takes its steps, and leaves a new checkpoint and the training for
the round after it. The checkpoint holds the exponential moving average of the weights (EMA) in
fp32, so it is also the EMA's memory; with decay 0 the average is the policy itself.

The average is written first, the training next, the manifest last: a kill repeats the round from
what the round before it has left. Averaging works on each process's own shards, without
communication, and takes 4 bytes a parameter in all.
"""

import gc
import shutil
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from checkpoint import local_rows, save
from formats.chat import Chat
from ops.meters import keep_metrics
from plumbing.files import InputError, rng, write_text
from plumbing.ranks import RANK, on_rank0
from plumbing.stage import Stage, counts_of, discard
from train import (
    Example,
    LossFn,
    TrainOptions,
    Watch,
    load_checkpoint,
    make_optimizer,
    metrics_until,
    save_checkpoint,
    shard,
    train_step,
    train_steps,
)


@dataclass(frozen=True)
class Round:
    """The steps after `first`, up to and with `last`, of a training of `total` steps."""

    start: Path  # checkpoint where the training starts
    folder: Path  # of this round
    before: "Round | None"  # None: the first round
    first: int
    last: int
    total: int

    @property
    def sampled(self) -> Path:
        """What this round samples from: the average after `first` steps."""
        return self.before.average if self.before else self.start

    @property
    def average(self) -> Path:
        """The average after `last` steps."""
        return self.folder / "average"

    @property
    def training(self) -> Path:
        """Weights and moments after `last` steps."""
        return self.folder / "training"

    @property
    def metrics(self) -> Path:
        return self.average / "metrics.jsonl"


def make_rounds(
    start: Path, folders: list[Path], steps: int, length: int, boundary: int = 1 << 30
) -> list[Round]:
    """Rounds of at most `length` steps, `steps` in each of the folders. A round also ends at every
    multiple of `boundary`.
    """
    total = steps * len(folders)
    ends = [s for s in range(total + 1) if s % steps % length == 0 or s % boundary == 0]
    rounds = []
    before = None
    for first, last in pairwise(ends):
        folder = folders[first // steps] / f"round{first}"
        before = Round(start, folder, before, first, last, total)
        rounds.append(before)
    return rounds


def presented(rows: list[dict], first: int, last: int, seed: int) -> list[tuple[int, dict]]:
    """(place, record) of the places first to last - 1 in epochs that follow one another, each in an
    order of its own: of 5 rows, place 7 is the third of the second epoch.
    """
    orders = {}
    found = []
    for place in range(first, last):
        epoch, i = divmod(place, len(rows))
        if epoch not in orders:
            orders[epoch] = list(rows)
            rng(seed, "epoch", epoch).shuffle(orders[epoch])
        found.append((place, orders[epoch][i]))
    return found


def in_batches(items: list, size: int) -> list[list]:
    """One batch after the other, in their order."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def train_round(
    r: Round,
    batches: list[list[Example]],
    loss_fn: LossFn,
    stage: Stage,
    o: TrainOptions,
    decay: float = 0.0,
    watch: Watch | None = None,
) -> dict:
    """Take the steps of a round on batches, one a step; returns counts. stage.out is r.average.

    average <- (1 - decay) weights + decay average, after every step. watch: as in train.fit.
    """
    on_rank0(write_text, stage.scratch / "metrics.jsonl", "")  # a kill has undone its steps
    model, optimizer = load_training(r.before, r.start, o)
    average = shard(r.sampled, o) if decay else model
    one_step = partial(train_step, model, optimizer, loss_fn=loss_fn, o=o)
    watch_step = partial(watch, model) if watch else None
    for _ in train_steps(one_step, batches, r.first, r.total, stage, o, watch_step):
        if decay:
            move(average, model, decay)

    on_rank0(keep_metrics, stage)
    template = Chat(r.start, o.run).template
    save(average, r.average, r.start, torch.float32, template, writer=RANK == 0)
    save_checkpoint(r.training, model, optimizer, r.last)
    del model, average, optimizer, one_step
    gc.collect()
    tokens = sum(example.tokens for batch in batches for example in batch)
    return {"steps": len(batches), "tokens": tokens, "fresh": tokens}


def load_training(r: Round | None, start: Path, o: TrainOptions):
    """(sharded model, optimizer) after a round's last step; None: of a new training."""
    model = shard(start, o)
    optimizer = make_optimizer(model, o)
    if r:
        saved = r.training / "checkpoint" / str(r.last)
        if metrics_until(saved) is None:
            fix = f"delete {r.folder.parent} and all later iterations to train again"
            raise InputError(f"{saved}: what training goes on from is gone or damaged; {fix}")
        load_checkpoint(r.training, model, optimizer, r.last)
    return model, optimizer


@torch.no_grad()
def move(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """average <- (1 - decay) weights + decay average, on this process's shards."""
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        local_rows(mean)[0].lerp_(local_rows(weight)[0], 1 - decay)


def forget(r: Round, keep_average: bool = False) -> None:
    """Delete a round's training, and the weights of its average unless they are still read."""
    shutil.rmtree(r.training, ignore_errors=True)
    if not keep_average and any(r.average.glob("*.safetensors")):
        discard(r.average)


def export_policy(last: Round, rounds: list[Round], out: Path, o: TrainOptions) -> Path:
    """Stage: the policy after the last of the rounds as a checkpoint in --dtype, and the metrics of
    all of them.
    """
    stage = Stage(out, o, model=last.start, average=last.average, step=last.last, total=last.total)
    if stage.done:
        return out
    model, optimizer = load_training(last, last.start, o)
    on_rank0(join_metrics, rounds, out)
    template = Chat(last.start, o.run).template
    save(model, out, last.start, o.run.torch_dtype, template, writer=RANK == 0)
    del model, optimizer
    gc.collect()
    return stage.finish(steps=sum(counts_of(r.average)["steps"] for r in rounds))


def join_metrics(rounds: list[Round], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "metrics.jsonl", "".join(r.metrics.read_text() for r in rounds))
