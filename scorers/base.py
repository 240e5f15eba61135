"""What a scorer is, and what scorers share: local models, blocks, both sides of a pair.

A scorer is a function: records {prompt | messages, response} -> one float each, higher is better.
One that compares has an attribute `pairwise` that is true; it takes two lists of records and
returns P(the first is better) by position, or, if its attribute `logits` is true, the logit of P.
Every rank calls a scorer with all records.
"""

import math
import re
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from checkpoint import load
from formats.chat import Chat
from formats.records import conversation_text
from model import Model
from ops.attention import Packed
from ops.micro_batches import pack_micro_batches
from plumbing.files import InputError, digest, load_json, write_json
from plumbing.options import RunOptions, load_function, plugin_files
from plumbing.ranks import DEVICE, gather, work_queue

Scorer = Callable[..., list[float]]


@dataclass(frozen=True, kw_only=True)
class Revision:
    """How a model is asked to revise a response: what R_t reads, and the scorer `settled`."""

    run: RunOptions = RunOptions()
    template: str = ""  # {draft} is the response, {prompt} the conversation; other names are fields
    feedback: str = ""  # FILE.py:FUNCTION from records to dicts of further fields

    @property
    def files(self) -> list[Path]:
        return plugin_files(self.feedback)

    @property
    def identity(self) -> dict:
        """What a stage that asks so follows from, for Stage()."""
        return {
            "template": self.template or None,
            "feedback": self.feedback or None,
            "feedback_files": self.files,
        }

    def prompts(self, rows: list[dict]) -> list[str]:
        """The requests to revise the responses of records."""
        notes = [{}] * len(rows)
        if self.feedback:
            notes = load_function(self.feedback)(rows)
        texts = []
        for row, note in zip(rows, notes, strict=True):
            own = {"prompt": conversation_text(row), "draft": row["response"]}
            texts.append(fill(self.template, {**row, **own, **note}))
        return texts


NO_REVISION = Revision()


def fill(template: str, fields: dict) -> str:
    """The template with every {name} replaced by that field."""

    def text_of(match: re.Match) -> str:
        if match[1] not in fields:
            problem = f"the improver's template reads {match[0]}, which it does not have"
            raise InputError(f"record {fields['id']}: {problem}; correct one of them")
        return str(fields[match[1]])

    # in one pass, and not by format(): the texts themselves may contain braces
    return re.sub(r"{(\w+)}", text_of, template)


def is_pairwise(scorer: Scorer | None) -> bool:
    return getattr(scorer, "pairwise", False)


def in_logits(scorer: Scorer) -> bool:
    return getattr(scorer, "logits", False)


def blockwise(score: Scorer, key: list, scratch: Path | None = None, size: int = 128) -> Scorer:
    """Score in blocks, distributed over ranks and optionally cached on disk.

    key: what the scores follow from besides the records. scratch: a folder for the scores of
    finished blocks, from which an interrupted call resumes.
    """

    def scorer(*sides):
        # a block is the same slice of every side
        starts = range(0, len(sides[0]), size)
        blocks = [[rows[start : start + size] for rows in sides] for start in starts]

        # each block is scored by one rank, unless an earlier call left its scores
        done = {}
        for number, block in work_queue(list(enumerate(blocks))):
            file = scratch / f"{digest(key, block)}.json" if scratch else None
            if file and file.is_file():
                done[number] = load_json(file)["scores"]
            else:
                done[number] = score(*block)
                if file:
                    write_json(file, {"scores": done[number]})

        # every rank gets all scores, in the order of the records
        scores = ChainMap(*gather(done))
        return [value for number in range(len(blocks)) for value in scores[number]]

    scorer.pairwise = is_pairwise(score)
    scorer.logits = in_logits(score)
    return scorer


class LocalModel:
    """A checkpoint directory to score with. load(directory, dtype, device) runs at first use.

    own_template: a reward model or a judge is asked in its own template, whatever --chat-template.
    """

    def __init__(self, directory: str | Path, run: RunOptions, load=load, own_template=True):
        self.chat = Chat(directory, run, own_template)
        self.dtype = run.torch_dtype
        self.load = load

    @cached_property
    def network(self) -> Model:
        return self.load(self.chat.directory, self.dtype, DEVICE)

    def fitting(self, row: dict, ids: list[int]) -> list[int]:
        """The token ids of a record. Raises InputError if they exceed the model's context."""
        limit = self.network.config.max_positions
        if len(ids) > limit:
            problem = f"{len(ids)} tokens, the context of {self.chat.directory} is {limit}"
            raise InputError(f"record {row['id']}: {problem}; remove it")
        return ids


def packed(sequences: list[list[int]]) -> tuple[torch.Tensor, Packed]:
    """Tokens (N,) of sequences end to end, and their context."""
    tokens = torch.tensor([token for ids in sequences for token in ids], device=DEVICE)
    return tokens, Packed([len(ids) for ids in sequences], DEVICE)


@torch.no_grad()
def in_micro_batches(sequences: list[list[int]], forward: Callable) -> list[float]:
    """A value for each sequence, from packed micro-batches of about 8192 tokens.

    forward(indices of B sequences, their tokens (N,), context) -> (B,).
    """
    values = [0.0] * len(sequences)
    if not sequences:
        return values
    for [micro] in pack_micro_batches([len(ids) for ids in sequences], 1, 8192):
        outputs = forward(micro, *packed([sequences[i] for i in micro]))
        for i, value in zip(micro, outputs.tolist(), strict=True):
            values[i] = value
    return values


def score_pairs(
    scorer: Scorer | None, good: list[dict], bad: list[dict]
) -> tuple[list[float | None], list[float | None]]:
    """Scores of both sides. A pairwise scorer's are P and 1 - P, or the logit and its negative;
    without a scorer they are None.
    """
    if scorer is None:
        return [None] * len(good), [None] * len(bad)
    if is_pairwise(scorer):
        better = scorer(good, bad)
        if in_logits(scorer):
            return better, [-logit for logit in better]
        return better, [1 - p for p in better]
    return scorer(good), scorer(bad)


def preference_by(scorer: Scorer | None, score: float | None) -> float | None:
    """P(the first is better) from the first one's score_pairs() by a pairwise scorer, else None."""
    if not is_pairwise(scorer):
        return None
    if in_logits(scorer):
        return (1 + math.tanh(score / 2)) / 2  # the sigmoid, which does not overflow
    return score


def quantiles(values: list[float]) -> str:
    """Minimum, lower quartile, median, upper quartile and maximum, for error messages."""
    if not values:
        return "none"
    ordered = sorted(values)
    last = len(ordered) - 1
    return " ".join(f"{ordered[round(q * last)]:.3g}" for q in (0, 0.25, 0.5, 0.75, 1))
