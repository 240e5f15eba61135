"""A chat model on this machine compares two answers: --scorer judge:DIR.

It is shown both and asked for one letter. The score is read from the probabilities of the two
letters: no sampling, no parsing. Judges favour a position, so both orders are averaged.
`python -m eval.scorer_accuracy` measures how often one is right.
"""

from pathlib import Path

from checkpoint import load_config
from formats.records import messages_of
from plumbing.options import RunOptions
from scorers.base import LocalModel, Scorer, in_micro_batches

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
    load_config(directory)  # refuses an unsupported model before weights are read
    model = LocalModel(directory, run)
    # the last token of each: some tokenizers put a word-start marker before the letter
    letters = [model.chat.encode(letter)[-1] for letter in "AB"]

    def prompt_ids(first, second):
        turns = [f"{message['role']}: {message['content']}" for message in messages_of(first)]
        prompt = TEMPLATE.format(
            conversation="\n\n".join(turns),
            a=first["response"],
            b=second["response"],
        )
        return model.chat.prompt_ids({"prompt": prompt})

    def letter_is_a(_, tokens, context):
        logits = model.network(tokens, context, context.last).float()[:, letters]  # (B, 2)
        return logits.softmax(-1)[:, 0]  # (B,)

    def score(rows, others):
        # two prompts for each pair, one in each order
        prompts = []
        for row, other in zip(rows, others, strict=True):
            prompts += [prompt_ids(row, other), prompt_ids(other, row)]
        p_first = in_micro_batches(model, prompts, letter_is_a)

        # the mean over both orders
        orders = zip(p_first[::2], p_first[1::2], strict=True)
        return [None if None in (a, b) else (a + 1 - b) / 2 for a, b in orders]

    score.pairwise = True
    return score
