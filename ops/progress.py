"""How far a stage has come: a bar on a terminal, and a line a minute on standard output.

with Progress("policy", "step", total=320) as progress:
    progress.update(note="loss 0.512")
"""

import sys
import time

from tqdm import tqdm

from plumbing.ranks import RANK

PAUSE = 60  # seconds between two lines


class Progress:
    """On rank 0; counts what that rank does. Without a total, no time left is estimated."""

    def __init__(
        self, name: str, unit: str, total: int | None = None, done: int = 0, silent: bool = False
    ):
        self.name = name
        self.unit = unit
        self.total = total
        self.first = self.done = done  # done by an earlier call
        self.begin = self.said = time.time()
        self.silent = silent or RANK > 0
        # a bar in a file would be redrawn ten times a second
        hidden = self.silent or not sys.stderr.isatty()
        self.bar = tqdm(
            desc=name, unit=f" {unit}", total=total, initial=done, leave=False, disable=hidden
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()  # before an error's line, which it would overwrite

    def update(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(n)
        now = time.time()
        if now - self.said >= PAUSE and not self.silent:
            self.said = now
            self.bar.clear()
            print(self.line(now - self.begin, note), flush=True)

    def line(self, seconds: float, note: str) -> str:
        new = self.done - self.first
        parts = [f"  {self.name}: {self.unit} {self.done:,}", f"{new / seconds:,.1f} a second"]
        if self.total:
            left = seconds / new * (self.total - self.done)
            parts = [f"{parts[0]} of {self.total:,}", f"about {left:,.0f} s left"]
        return ", ".join([*parts, note] if note else parts)
