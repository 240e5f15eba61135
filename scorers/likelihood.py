"""Scorers made of the base model alone: --scorer likelihood, --scorer settled.

likelihood prefers plain and typical responses, and says nothing about truth. settled asks whether
the model, told to revise a response, would leave it as it is: as good a judge as the model is a
reviser, and useful where revising is easier than answering.
"""

import math
from pathlib import Path

from checkpoint import load_config
from plumbing.files import InputError
from plumbing.options import RunOptions
from scorers.base import LocalModel, Revision, Scorer
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


def settled(directory: str | Path, run: RunOptions, revision: Revision) -> Scorer:
    """exp of the mean log-prob per token of a response, given the prompt and that same response as
    the draft to revise: 1 if the model is certain to leave it as it is.

    revision: how the improver is asked.
    """
    logp = likelihood(directory, run)

    def score(rows):
        asked = []
        for row, prompt in zip(rows, revision.prompts(rows), strict=True):
            asked.append({"id": row["id"], "prompt": prompt, "response": row["response"]})
        return [math.exp(value) for value in logp(asked)]

    return score
