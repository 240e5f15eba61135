"""Scorers made of the base model alone: --scorer likelihood, --scorer settled.

likelihood prefers plain and typical responses, and says nothing about truth. settled asks whether
the model, told to revise a response, would leave it as it is: as good a judge as the model is a
reviser, and useful where revising is easier than answering.
"""

import math
from pathlib import Path

from checkpoint import load_config
from formats.records import where_of
from plumbing.files import InputError
from plumbing.options import RunOptions
from scorers.base import LocalModel, Revision, Scorer
from train import TrainOptions, make_sequence, score_sequences


def mean_logps(directory: str | Path, run: RunOptions):
    """The function records -> mean log-prob of response and end token given the prompt, in nats per
    token; None where the prompt leaves no room in the model's context.
    """
    # M_0 reads what the policy reads: --chat-template, too
    model = LocalModel(directory, run, own_template=False)
    o = TrainOptions(max_length=load_config(directory).max_positions)

    def score(rows):
        sequences = [make_sequence(model.chat, row, row["response"], o) for row in rows]
        fitting = [sequence for sequence in sequences if sequence is not None]
        found = iter(score_sequences(model.network, fitting))
        return [None if ids is None else next(found).mean().item() for ids in sequences]

    return score


def likelihood(directory: str | Path, run: RunOptions) -> Scorer:
    """Mean log-prob of response and end token given the prompt, in nats per token."""
    logp = mean_logps(directory, run)

    def score(rows):
        values = logp(rows)
        if None in values:
            problem = f"its prompt fills the context of {directory}"
            raise InputError(f"{where_of(rows[values.index(None)])}: {problem}; remove it")
        return values

    return score


def settled(directory: str | Path, run: RunOptions, revision: Revision) -> Scorer:
    """exp of the mean log-prob per token of a response, given the prompt and that same response as
    the draft to revise: 1 if the model is certain to leave it as it is, 0 if the question does not
    fit its context.

    revision: how the improver is asked.
    """
    logp = mean_logps(directory, run)

    def score(rows):
        asked = []
        for row, prompt in zip(rows, revision.prompts(rows), strict=True):
            asked.append({"id": row["id"], "prompt": prompt, "response": row["response"]})
        return [0.0 if value is None else math.exp(value) for value in logp(asked)]

    return score
