"""The world of facts: what its runs start from, and its held-out evaluation.

prepare() is what recipes/facts.toml names in `prepare`, and evaluate() is its held-out evaluation.
score() is the rubric as a scorer, for comparison: the default scorer needs nothing from outside the
models. The world itself is in facts_world.py.

M_0 learns, in one pass, from imperfect web answers, from correct paragraphs and from practice in
copying, tidying and asking about keywords, skills that a real chat model brings along.
"""

import random
from pathlib import Path

from demo import facts_world as world
from demo.small_model import make_base
from eval.stats import mean, standard_error
from plumbing.files import write_jsonl, write_text
from plumbing.options import RunOptions
from plumbing.ranks import on_rank0
from train import TrainOptions

# records of M_0's data
WEB = 12_000
PARAGRAPHS = 2_000
PRACTICE = 2_400
ASKING = 3_600
# paragraphs of the corpus
CORPUS = 3_000

# of M_0: 2M weights
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "max_position_embeddings": 512,
    "vocab_size": 1600,
}
PRETRAINING = TrainOptions(
    lr=3e-3, epochs=1, batch=32, max_length=256, loss_on_prompt=True, save_every=100
)
# What the held-out numbers do and do not show; the report prints it.
NOTE = """
Shown: one step of self-boosting lifts M_0 by many standard errors, with nothing from outside the
models in the loop.
Not shown: that iterating is what helps. Later steps gain little, within a standard error or two;
SFT on the seeds, pairs from the seeds, and one shot with as many pairs end about as high
(methods/controls.py). Form saturates in the first step. Held-out prompts combine facts that M_0's
web text holds in other prompts. Gold text and rubric come from the same templates: see
demo/facts_world.py."""


def prepare(o) -> dict[str, Path]:
    """Make M_0, seeds, corpus and held-out prompts below o.out; returns loop.py's options for them.

    o: loop.py's Options.
    """
    data = o.out / "data"
    on_rank0(write_data, data, o.run.seed)
    return {
        "model": make_base(data, o.out / "base", SHAPE, PRETRAINING, o.run),
        "seeds": data / "seeds.jsonl",
        "heldout": data / "heldout.jsonl",
        "corpus": data / "corpus.txt",
    }


def write_data(folder: Path, seed: int) -> None:
    """Write seeds and held-out prompts with gold answers, the corpus, and M_0's data.

    No held-out prompt occurs in M_0's data.
    """
    rng = random.Random(seed)
    hidden = world.heldout_prompts(seed)
    seeds, heldout = world.split(seed)

    # the order of these draws decides the data
    practice = world.practice_records(rng, 5 * ASKING, hidden)
    asking = [row for row in practice if row["prompt"].startswith("Ask")][:ASKING]
    base = world.web_records(rng, WEB, hidden)
    base += world.practice_records(rng, PRACTICE, hidden)
    base += asking
    for text in world.paragraphs(rng, PARAGRAPHS):
        base.append({"prompt": "Tell me something.", "response": text})

    # M_0 knows what a tag is, as any chat model does
    for row in base:
        if row["prompt"].startswith("Ask something"):
            row["response"] = f"<question>{row['response']}</question>"
    rng.shuffle(base)
    write_jsonl(folder / "seeds.jsonl", seeds)
    write_jsonl(folder / "heldout.jsonl", heldout)
    write_jsonl(folder / "base.jsonl", base)
    write_text(folder / "corpus.txt", "\n\n".join(world.paragraphs(rng, CORPUS)))


def evaluate(
    answers: list[dict],
    heldout: list[dict],
    base_answers: list[dict],
    model: Path | None,
    base: Path,
    run: RunOptions,
) -> dict[str, float]:
    """Mean rubric of answers to held-out prompts, its standard error, its three parts, mean words,
    and the rubric of each answer.

    See facts_world.rubric. Only the answers are read.
    """
    marks = [world.rubric(row["prompt"], row["response"]) for row in answers]
    means = {name: mean([mark[name] for mark in marks]) for name in marks[0]}
    scores = [mark["score"] for mark in marks]
    return {
        "score": means.pop("score"),
        "se": standard_error(scores),
        **means,
        "words": mean([len(row["response"].split()) for row in answers]),
        "scores": scores,
    }


def score(rows: list[dict]) -> list[float]:
    """The rubric as a scorer; a prompt outside the world scores 0 whatever the answer."""
    marks = [world.rubric(row["prompt"], row["response"]) for row in rows]
    return [mark["score"] if mark else 0.0 for mark in marks]
