"""What a scorer is, and what scorers share: blocks, packed batches, both sides of a pair.

A scorer is a function: records {prompt | messages, response} -> one float each, higher is better.
One that compares has an attribute `pairwise` that is true; it takes two lists of records and
returns P(the first is better) by position. Every rank calls a scorer with all records.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ops.attention import Packed
from plumbing.ranks import DEVICE, gather, work_queue
from plumbing.records import digest, load_json, write_json
from train import pack_micro_batches

Scorer = Callable[..., list[float]]


def is_pairwise(scorer: Scorer | None) -> bool:
    return getattr(scorer, "pairwise", False)


def blockwise(score: Scorer, key: list, scratch: Path | None = None, size: int = 128) -> Scorer:
    """Score in blocks, distributed over ranks and optionally cached on disk.

    key: what the scores follow from besides the records. scratch: a folder for the scores of
    finished blocks, from which an interrupted call resumes.
    """

    def scorer(*sides: list[dict]) -> list[float]:
        # a block is the same slice of every side
        starts = range(0, len(sides[0]), size)
        blocks = [[rows[start : start + size] for rows in sides] for start in starts]

        # each block is scored by one rank, unless an earlier call left its scores
        done = {}
        for number in work_queue(list(range(len(blocks)))):
            block = blocks[number]
            file = scratch / f"{digest(key, block)}.json" if scratch else None
            if file and file.is_file():
                done[number] = load_json(file)["scores"]
            else:
                done[number] = score(*block)
                if file:
                    write_json(file, {"scores": done[number]})

        # every rank gets all scores, in the order of the records
        merged = {}
        for of_one_rank in gather(done):
            merged |= of_one_rank
        return [value for number in range(len(blocks)) for value in merged[number]]

    scorer.pairwise = is_pairwise(score)
    return scorer


def packed(
    sequences: list[list[int]], budget: int = 8192
) -> Iterator[tuple[list[int], torch.Tensor, Packed]]:
    """Micro-batches of about `budget` tokens: (indices of sequences, tokens (N,), context)."""
    if not sequences:
        return
    for [micro] in pack_micro_batches([len(ids) for ids in sequences], 1, budget):
        tokens = torch.tensor([token for i in micro for token in sequences[i]], device=DEVICE)
        yield micro, tokens, Packed([len(sequences[i]) for i in micro], DEVICE)


def score_pairs(
    scorer: Scorer | None, good: list[dict], bad: list[dict]
) -> tuple[list[float | None], list[float | None]]:
    """Scores of both sides. A pairwise scorer's are P and 1 - P; without a scorer they are None."""
    if scorer is None:
        return [None] * len(good), [None] * len(bad)
    if is_pairwise(scorer):
        better = scorer(good, bad)
        return better, [1 - p for p in better]
    return scorer(good), scorer(bad)


def quantiles(values: list[float]) -> str:
    """Minimum, lower quartile, median, upper quartile and maximum, for error messages."""
    if not values:
        return "none"
    ordered = sorted(values)
    last = len(ordered) - 1
    return " ".join(f"{ordered[round(q * last)]:.3g}" for q in (0, 0.25, 0.5, 0.75, 1))
