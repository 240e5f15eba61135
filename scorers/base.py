"""What a scorer is, and what scorers share: local models, blocks, both sides of a pair.

A scorer is a function: records {prompt | messages, response} -> one float each, higher is better.
One that compares has an attribute `pairwise` that is true; it takes two lists of records and
returns P(the first is better) by position, or, if its attribute `logits` is true, the logit of P.
None stands for the score of what does not fit the context of the scorer's model. Every rank calls a
scorer with all records.
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
from formats.plugins import load_function, plugin_files
from formats.records import conversation_text, where_of
from model import Model
from ops.attention import Packed
from ops.micro_batches import pack_micro_batches
from plumbing.files import InputError, digest
from plumbing.options import RunOptions
from plumbing.parts import read_part, write_part
from plumbing.ranks import DEVICE, gather, work_queue

Scorer = Callable[..., list[float | None]]


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


def blockwise(
    score: Scorer,
    key: list,
    scratch: Path | None = None,
    size: int = 128,
    directory: str | Path = "the scorer's model",
) -> Scorer:
    """Score in blocks, distributed over ranks and optionally cached on disk. Raises InputError if
    there are records and none has a score.

    key: what the scores follow from besides the records. scratch: a folder for the scores of
    finished blocks, from which an interrupted call resumes. directory: the model's, for the error.
    """

    def scorer(*sides):
        # a block is the same slice of every side
        starts = range(0, len(sides[0]), size)
        blocks = [[rows[start : start + size] for rows in sides] for start in starts]

        # each block is scored by one rank, unless an earlier call left its scores
        done = {}
        for number, block in work_queue(list(enumerate(blocks))):
            file = scratch / f"{digest(key, block)}.part" if scratch else None
            done[number] = read_part(file) if file else None
            if done[number] is None:
                done[number] = score(*block)
                if file:
                    write_part(file, done[number])

        # every rank gets all scores, in the order of the records
        scores = ChainMap(*gather(done))
        values = [value for number in range(len(blocks)) for value in scores[number]]
        if set(values) == {None}:
            raise InputError(
                f"none of {len(values)} records fits the context of {directory}; shorten them, or "
                "name another scorer"
            )
        return values

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


def packed(sequences: list[list[int]]) -> tuple[torch.Tensor, Packed]:
    """Tokens (N,) of sequences end to end, and their context."""
    tokens = torch.tensor([token for ids in sequences for token in ids], device=DEVICE)
    return tokens, Packed([len(ids) for ids in sequences], DEVICE)


@torch.no_grad()
def in_micro_batches(
    model: LocalModel, sequences: list[list[int]], forward: Callable
) -> list[float | None]:
    """A value for each sequence, from packed micro-batches of about 8192 tokens; None for those
    beyond the model's context.

    forward(indices of B sequences, their tokens (N,), context) -> (B,).
    """
    values = [None] * len(sequences)
    limit = model.network.config.max_positions
    fitting = [i for i, ids in enumerate(sequences) if len(ids) <= limit]
    if not fitting:
        return values
    for [places] in pack_micro_batches([len(sequences[i]) for i in fitting], 1, 8192):
        micro = [fitting[place] for place in places]
        outputs = forward(micro, *packed([sequences[i] for i in micro]))
        for i, value in zip(micro, outputs.tolist(), strict=True):
            values[i] = value
    return values


def score_pairs(
    scorer: Scorer | None, good: list[dict], bad: list[dict]
) -> tuple[list[float | None], list[float | None]]:
    """Scores of both sides. A pairwise scorer's are P and 1 - P, or the logit and its negative.
    Without a scorer they are None, as are both where it cannot read one.
    """
    if scorer is None:
        return [None] * len(good), [None] * len(bad)
    if is_pairwise(scorer):
        total = 0 if in_logits(scorer) else 1
        better = list(scorer(good, bad))
        return better, [None if score is None else total - score for score in better]
    pairs = [
        (None, None) if None in pair else pair
        for pair in zip(scorer(good), scorer(bad), strict=True)
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def score_gaps(scores: tuple[list, list]) -> list[float | None]:
    """How much higher the first side's scores are; None for a pair without."""
    return [None if a is None else a - b for a, b in zip(*scores, strict=True)]


def known(values: list) -> list:
    """The values that are not None."""
    return [value for value in values if value is not None]


def need_scores(scores: list[float | None], rows: list[dict]) -> list[float]:
    """The scores of a user's own records. Raises InputError at the first that has none."""
    if None in scores:
        row = rows[scores.index(None)]
        raise InputError(f"{where_of(row)}: beyond the context of the scorer's model; remove it")
    return scores


def preference_by(scorer: Scorer | None, score: float | None) -> float | None:
    """P(the first is better) from the first one's score_pairs() by a pairwise scorer, else None."""
    if not is_pairwise(scorer):
        return None
    if in_logits(scorer):
        return (1 + math.tanh(score / 2)) / 2  # the sigmoid, which does not overflow
    return score


def quantiles(values: list[float | None]) -> str:
    """Minimum, lower quartile, median, upper quartile and maximum, for error messages."""
    ordered = sorted(known(values))
    if not ordered:
        return "none"
    last = len(ordered) - 1
    return " ".join(f"{ordered[round(q * last)]:.3g}" for q in (0, 0.25, 0.5, 0.75, 1))
