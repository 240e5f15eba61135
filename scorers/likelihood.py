"""Mean log-prob per token of a response under the base model: --scorer likelihood.

Needs no model from outside. It prefers plain and typical answers, and says nothing about truth.
"""

from functools import cache
from pathlib import Path

from checkpoint import load, load_config
from plumbing.chat import Chat
from plumbing.options import RunOptions
from plumbing.ranks import DEVICE
from plumbing.records import InputError
from scorers.base import Scorer
from train import TrainOptions, make_sequence, score_sequences


def likelihood(model: str | Path, run: RunOptions) -> Scorer:
    """Mean log-prob of response and end token given the prompt, in nats per token."""
    chat = Chat(model, run.chat_template)
    o = TrainOptions(max_length=load_config(model).max_positions)

    @cache
    def network():
        return load(model, run.torch_dtype, DEVICE)

    def score(rows: list[dict]) -> list[float]:
        sequences = [make_sequence(chat, row, row["response"], o) for row in rows]
        if None in sequences:
            name = rows[sequences.index(None)]["id"]
            raise InputError(f"record {name}: its prompt fills the context of {model}; remove it")
        return [logps.mean().item() for logps in score_sequences(network(), sequences)]

    return score
