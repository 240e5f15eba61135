"""Sequences into micro-batches of nearly equal size, so that no process waits for another."""

import heapq
import math


def pack_micro_batches(sizes: list[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Spread items of the given token counts over rounds of one micro-batch a rank: [round][rank]
    -> indices.

    Largest first, each into the emptiest micro-batch: as few rounds as the budget allows, nearly
    equal loads. Every rank gets equally many micro-batches, as sharded training must; some may be
    empty. An item over budget stands alone.
    """
    total = sum(min(size, budget) for size in sizes)
    rounds = max(1, math.ceil(total / (ranks * budget)))
    while True:
        bins = spread(sizes, rounds * ranks)
        if all(fits(items, sizes, budget) for items in bins):
            break
        rounds += 1
    return [bins[r * ranks : (r + 1) * ranks] for r in range(rounds)]


def spread(sizes: list[int], count: int) -> list[list[int]]:
    """Indices of items in `count` bins, the largest first, each into the emptiest bin."""
    bins: list[list[int]] = []
    loads = []  # a heap of (load, bin)
    for number in range(count):
        bins.append([])
        loads.append((0, number))
    largest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    for item in largest_first:
        load, emptiest = loads[0]
        bins[emptiest].append(item)
        heapq.heapreplace(loads, (load + sizes[item], emptiest))
    return bins


def fits(items: list[int], sizes: list[int], budget: int) -> bool:
    if len(items) <= 1:
        return True
    return sum(sizes[i] for i in items) <= budget
