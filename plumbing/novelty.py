"""Novelty: which of the texts seen so far a new one repeats, word for word or nearly."""

import re
from collections import Counter, defaultdict


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Novelty:
    """Texts seen so far, each with a label, and which of them a new one repeats."""

    def __init__(self, near_duplicate: float):
        self.near = near_duplicate
        self.exact: dict[str, str] = {}  # normalised text -> label
        self.texts: list[tuple[str, int]] = []  # (label, number of shingles)
        self.index = defaultdict(list)  # shingle -> places in texts

    @staticmethod
    def shingles(text: str) -> set[tuple[str, ...]]:
        """The word trigrams of a text."""
        words = ["", *words_of(text), ""]
        return set(zip(words, words[1:], words[2:], strict=False))

    def repeats(self, text: str) -> tuple[str, bool] | None:
        """(label, whether word for word) of a text that this one repeats, or None."""
        key = " ".join(words_of(text))
        if key in self.exact:
            return self.exact[key], True
        if not self.near:
            return None
        # shingles in common, and from them the Jaccard index
        mine = self.shingles(text)
        common = Counter(i for shingle in mine for i in self.index[shingle])
        for i in sorted(common):
            label, size = self.texts[i]
            if common[i] >= self.near * (len(mine) + size - common[i]):
                return label, False
        return None

    def add(self, text: str, label: str) -> None:
        self.exact.setdefault(" ".join(words_of(text)), label)
        if self.near:
            shingles = self.shingles(text)
            for shingle in shingles:
                self.index[shingle].append(len(self.texts))
            self.texts.append((label, len(shingles)))
