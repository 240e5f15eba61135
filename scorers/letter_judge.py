"""A chat model on this machine compares two answers: --scorer judge:DIR.

It is shown both and asked for one letter. The probabilities of the two letters are read where it
would write it: no sampling, no parsing. Judges favour a position, so both orders are read and
averaged. `python -m eval.scorer_accuracy` measures how often one is right.
"""

from functools import cache
from pathlib import Path

import torch

from checkpoint import load, load_config
from plumbing.chat import Chat
from plumbing.options import RunOptions
from plumbing.ranks import DEVICE
from plumbing.records import InputError, messages_of
from scorers.base import Scorer, packed

TEMPLATE = """\
Below are a conversation and two answers to its last message. Which answer follows the request \
better, more correctly and more helpfully? Ignore the order in which they are shown, and do not \
prefer one for being longer.

[Conversation]
{conversation}

[Answer A]
{a}

[Answer B]
{b}

Reply with one letter, A or B, and nothing else."""


def letter_judge(directory: str | Path, run: RunOptions) -> Scorer:
    """The pairwise scorer of a chat model's checkpoint directory."""
    chat = Chat(directory, run.chat_template)
    max_positions = load_config(directory).max_positions
    # the last token of each: some tokenizers put a word-start marker before the letter
    letters = [chat.encode(letter)[-1] for letter in "AB"]

    @cache
    def network():
        return load(directory, run.torch_dtype, DEVICE)

    def prompt_ids(first: dict, second: dict) -> list[int]:
        turns = [f"{message['role']}: {message['content']}" for message in messages_of(first)]
        texts = {"a": first["response"], "b": second["response"]}
        prompt = TEMPLATE.format(conversation="\n\n".join(turns), **texts)
        ids = chat.prompt_ids({"prompt": prompt})
        if len(ids) > max_positions:
            raise InputError(
                f"record {first['id']}: {len(ids)} tokens to judge, "
                f"the context of {directory} is {max_positions}; remove it"
            )
        return ids

    @torch.no_grad()
    def score(rows: list[dict], others: list[dict]) -> list[float]:
        # two prompts for each pair, one in each order
        prompts = []
        for row, other in zip(rows, others, strict=True):
            prompts += [prompt_ids(row, other), prompt_ids(other, row)]

        # P(the letter is A) at the end of each prompt
        p_first = [0.0] * len(prompts)
        for micro, tokens, context in packed(prompts):
            logits = network()(tokens, context, context.last).float()[:, letters]  # (B, 2)
            for i, p in zip(micro, logits.softmax(-1)[:, 0].tolist(), strict=True):
                p_first[i] = p

        # the mean over both orders
        orders = zip(p_first[::2], p_first[1::2], strict=True)
        return [(a + 1 - b) / 2 for a, b in orders]

    score.pairwise = True
    return score
