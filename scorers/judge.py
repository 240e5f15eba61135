"""A chat model on this machine as the judge of two answers: --scorer judge:DIR.

It is shown both, asked for one letter, and the probabilities of the two letters are read where it would write it: no sampling,
no parsing. Judges favour a place, so both orders are read and averaged. `reward.py --measure` says how often one is right.
"""

from functools import cache

import torch

from data import DEVICE, Chat, Common, InputError, messages_of
from model import Config, load
from reward import Scorer
from scorers.classifier import packed

TEMPLATE = """\
Below are a conversation and two answers to its last message. Which answer follows the request better, more correctly and more \
helpfully? Ignore the order in which they are shown, and do not prefer one for being longer.

[Conversation]
{conversation}

[Answer A]
{a}

[Answer B]
{b}

Reply with one letter, A or B, and nothing else."""


def judge(directory: str, common: Common) -> Scorer:
    """The pairwise scorer of a chat model's checkpoint directory: two lists of records -> P(the first is better), by place."""
    chat, context_length = Chat(directory, common.chat_template), Config.load(directory).context
    letters = [
        chat.encode(letter)[-1] for letter in "AB"
    ]  # some tokenizers put a mark of the word's start before it
    net = cache(lambda: load(directory, common.torch_dtype, DEVICE))

    def ids_of(first: dict, second: dict) -> list[int]:
        talk = "\n\n".join(f"{m['role']}: {m['content']}" for m in messages_of(first))
        text = TEMPLATE.format(conversation=talk, a=first["response"], b=second["response"])
        ids = chat.prompt_ids({"prompt": text})
        if len(ids) > context_length:
            raise InputError(
                f"record {first['id']}: {len(ids)} tokens to judge, the context of {directory} is "
                f"{context_length}; remove it"
            )
        return ids

    @torch.no_grad()
    def score(rows: list[dict], others: list[dict]) -> list[float]:
        ids = [
            ids_of(*two)
            for row, other in zip(rows, others, strict=True)
            for two in ((row, other), (other, row))
        ]
        first = [0.0] * len(ids)  # P(A)
        for micro, tokens, context in packed(ids):
            logits = net()(tokens, context, context.last).float()[:, letters]  # (B, 2)
            for i, p in zip(micro, logits.softmax(-1)[:, 0].tolist(), strict=True):
                first[i] = p
        return [(a + 1 - b) / 2 for a, b in zip(first[::2], first[1::2], strict=True)]

    score.pairwise = True
    return score
