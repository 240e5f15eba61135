"""Mean log-prob per token of a response under the base model: --scorer likelihood.

Needs no other model. It prefers plain and typical answers, and says nothing about truth.
"""

from pathlib import Path

from checkpoint import load_config
from plumbing.options import RunOptions
from plumbing.records import InputError
from scorers.base import LocalModel, Scorer
from train import TrainOptions, make_sequence, score_sequences


def likelihood(directory: str | Path, run: RunOptions) -> Scorer:
    """Mean log-prob of response and end token given the prompt, in nats per token."""
    model = LocalModel(directory, run)
    o = TrainOptions(max_length=load_config(directory).max_positions)

    def score(rows):
        sequences = [make_sequence(model.chat, row, row["response"], o) for row in rows]
        if None in sequences:
            name = rows[sequences.index(None)]["id"]
            problem = f"its prompt fills the context of {directory}"
            raise InputError(f"record {name}: {problem}; remove it")
        return [logps.mean().item() for logps in score_sequences(model.network, sequences)]

    return score
