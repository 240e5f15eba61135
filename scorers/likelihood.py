"""Scorers made of the base model alone: --scorer likelihood, --scorer settled.

likelihood prefers plain and typical responses, and says nothing about truth. settled asks whether
the model, told to revise a response, would leave it as it is: as good a judge as the model is a
reviser, and useful where revising is easier than answering.
"""

import math
from pathlib import Path

from checkpoint import load_config
from plumbing.options import RunOptions
from scorers.base import LocalModel, Revision, Scorer, known
from train import TrainOptions, make_sequence, score_sequences


def likelihood(directory: str | Path, run: RunOptions) -> Scorer:
    """Mean log-prob of response and end token given the prompt, in nats per token; None where the
    prompt fills the model's context.
    """
    # M_0 reads what the policy reads: --chat-template, too
    model = LocalModel(directory, run, own_template=False)
    o = TrainOptions(max_length=load_config(directory).max_positions)

    def score(rows):
        sequences = [make_sequence(model.chat, row, row["response"], o) for row in rows]
        found = iter(score_sequences(model.network, known(sequences)))
        return [None if ids is None else next(found).mean().item() for ids in sequences]

    return score


def settled(directory: str | Path, run: RunOptions, revision: Revision) -> Scorer:
    """exp of the mean log-prob per token of a response, given the prompt and that same response as
    the draft to revise: 1 if the model is certain to leave it as it is, None if the question fills
    its context.

    revision: how the improver is asked.
    """
    logp = likelihood(directory, run)

    def score(rows):
        asked = []
        for row, prompt in zip(rows, revision.prompts(rows), strict=True):
            asked.append({"id": row["id"], "prompt": prompt, "response": row["response"]})
        return [None if value is None else math.exp(value) for value in logp(asked)]

    return score
