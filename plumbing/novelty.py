"""Novelty: which of the texts seen so far a new one repeats, word for word or nearly."""

import math
import re
from collections import defaultdict

from plumbing.files import digest


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Novelty:
    """Texts seen so far, each with a label, and which of them a new one repeats."""

    def __init__(self, near_duplicate: float):
        self.near = near_duplicate
        self.exact: dict[str, str] = {}  # normalised text -> label
        self.sets: list[tuple[str, set[str]]] = []  # (label, shingles)
        self.index = defaultdict(list)  # shingle -> places in sets

    @staticmethod
    def shingles(text: str) -> list[str]:
        """Hashes of the word trigrams of a text, sorted."""
        words = ["", *words_of(text), ""]
        trigrams = zip(words, words[1:], words[2:], strict=False)
        return sorted({digest(*trigram) for trigram in trigrams})

    def prefix(self, shingles: list[str]) -> list[str]:
        """Those first shingles of which two near-duplicates share at least one.

        A set of n has at least near * n shingles in common with a near-duplicate, so all but one of
        these may be left out, if all sets have one order: that of the hashes. 1e-9 is for rounding.
        """
        n = len(shingles)
        shared = math.ceil(self.near * n - 1e-9)
        return shingles[: n - (shared - 1)]

    def repeats(self, text: str) -> tuple[str, bool] | None:
        """(label, whether word for word) of a text that this one repeats, or None."""
        key = " ".join(words_of(text))
        if key in self.exact:
            return self.exact[key], True
        if not self.near:
            return None
        shingles = self.shingles(text)
        mine = set(shingles)
        # compare with the texts that share a shingle of its prefix
        for i in sorted({i for s in self.prefix(shingles) for i in self.index[s]}):
            label, other = self.sets[i]
            if len(mine & other) >= self.near * len(mine | other):
                return label, False
        return None

    def add(self, text: str, label: str) -> None:
        self.exact.setdefault(" ".join(words_of(text)), label)
        if self.near:
            shingles = self.shingles(text)
            for shingle in self.prefix(shingles):
                self.index[shingle].append(len(self.sets))
            self.sets.append((label, set(shingles)))
