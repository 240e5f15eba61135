"""Which numbers an option takes, as types.

    batch: Count = 128
    warmup_ratio: Share = 0.1

To Python they are int and float. A command line or config file that says another number is refused
in one line (options.py); a plain `int` or `float` takes every finite one.
"""

import argparse
import math
from collections.abc import Callable
from typing import Annotated, NamedTuple


class Range(NamedTuple):
    words: str  # "must be ..."
    has: Callable[[float], bool]


Count = Annotated[int, Range("at least 1", lambda n: n >= 1)]
Whole = Annotated[int, Range("at least 0", lambda n: n >= 0)]
Positive = Annotated[float, Range("above 0", lambda x: x > 0)]
NotNegative = Annotated[float, Range("at least 0", lambda x: x >= 0)]
Share = Annotated[float, Range("from 0 to 1", lambda x: 0 <= x <= 1)]
Noise = Annotated[float, Range("at least 0 and below 0.5", lambda x: 0 <= x < 0.5)]
Mass = Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)]
# Logits divided by less would overflow.
Temperature = Annotated[float, Range("0 or at least 0.001", lambda x: x == 0 or x >= 1e-3)]

EVERY = Range("a finite number", lambda x: True)


def read_number(kind: type, allowed: Range, text: str) -> int | float:
    """The number that a text on a command line says."""
    try:
        value = kind(text)
        fits = math.isfinite(value) and allowed.has(value)
    except (ValueError, OverflowError):  # of a whole number of 400 digits
        fits = False
    if not fits:
        number = "a whole number, " if kind is int else ""
        raise argparse.ArgumentTypeError(f"must be {number}{allowed.words}, got {text}")
    return value
