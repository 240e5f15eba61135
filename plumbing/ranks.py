"""Ranks: torchrun's processes, or one process that runs the same code as a world of size one."""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

# What torchrun sets. Some of it alone is left over from another program.
TORCHRUN = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
if os.environ.keys() & {"RANK", "WORLD_SIZE"} and not TORCHRUN <= os.environ.keys():
    sys.exit("error: RANK or WORLD_SIZE is set, by another program? unset both, or use torchrun")

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
CPU = torch.device("cpu")
DEVICE = (
    torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else CPU
)

STORES: list[dist.Store] = []  # the key-value store that all ranks see
QUEUES = count()  # of work_queue()


@contextmanager
def distributed():
    """A process group around the body. A single process opens no port."""
    # On a CPU, Adam's moments of rare embedding rows decay into very slow denormals.
    torch.set_flush_denormal(True)
    backend = "gloo"
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
        backend = "cpu:gloo,cuda:nccl"
    store = dist.HashStore()
    if "RANK" in os.environ:
        store, _, _ = next(rendezvous("env://"))
    STORES.append(store)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=RANK,
        world_size=WORLD,
        timeout=timedelta(hours=6),
    )
    try:
        yield
        dist.barrier()  # without it a gloo rank aborts at exit in about every second run
    finally:
        dist.destroy_process_group()


def on_rank0(work, *args):
    """work(*args) on rank 0 only; every rank gets its value, or raises its exception."""
    answer = [None, None]
    if RANK == 0:
        try:
            answer[0] = work(*args)
        except Exception as error:  # any: no rank must wait for one that has failed
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, device=CPU)
    value, error = answer
    if error is not None:
        raise error
    return value


def gather(value) -> list:
    """Every rank's value, ordered by rank, on every rank."""
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def work_queue(items: list):
    """Yield items, each on one rank: the next one goes to the rank that asks first.

    Every rank must call this equally often, since the ranks share one counter a call.
    """
    counter = f"queue {next(QUEUES)}"
    while True:
        i = STORES[-1].add(counter, 1) - 1
        if i >= len(items):
            return
        yield items[i]


def print0(*words) -> None:
    """Print once, not once per rank."""
    if RANK == 0:
        print(*words, flush=True)
