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
        loads = [(0, i) for i in range(rounds * ranks)]
        bins: list[list[int]] = [[] for _ in loads]
        for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            load, emptiest = heapq.heappop(loads)
            bins[emptiest].append(item)
            heapq.heappush(loads, (load + sizes[item], emptiest))
        if all(len(one) <= 1 or sum(sizes[i] for i in one) <= budget for one in bins):
            return [bins[r * ranks : (r + 1) * ranks] for r in range(rounds)]
        rounds += 1
