"""The sorting world: lists of words to put in order, where revising is easier than answering.

The world. 26 words, one for each letter, so that anyone can check an order by the first letters. A
prompt is "Sort: " and ten different words; the gold answer is the sorted list.

M_0's text. M_0 answers with one pass of bubble sort, so it is far from sorted and never better in
any sample. It also knows how to revise: given "Sort: ... Draft: ...", it puts back a lost word,
takes out a surplus one, and does one to three further passes. So a draft is easier to improve than
a prompt is to answer, which is what iterating needs.

Score. Kendall's tau between the answer and the alphabet, 0 if a word of the prompt is lost, or a
word is doubled or made up. Never in training: the only gold answers in the loop are the seeds.

To disclose wherever a figure of this world is shown: M_0's text gives it the skill to revise. The
cycle amplifies and distils that skill, which is SynPO's mechanism, but the world was made for it.

prepare(), evaluate() and well_formed() are what recipes/demo.toml names.
"""

import random
from itertools import combinations
from pathlib import Path

from demo.small_model import make_base
from eval.stats import mean, standard_error
from plumbing.files import write_jsonl, write_text
from plumbing.options import RunOptions
from plumbing.ranks import on_rank0
from train import TrainOptions

WORDS = (
    "apple banana cherry date elder fig grape honey ice jam kiwi lemon mango nut olive pear quince "
    "rice salt tea udon vanilla wheat xylo yam zest"
).split()
LENGTH = 10  # words of a list

# records of M_0's data
ANSWERS = 22_400
REVISIONS = 22_400
ASKING = 10_000

SEEDS = 40
HELDOUT = 400
CORPUS = 3_000  # paragraphs

# of M_0: half a million weights
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "max_position_embeddings": 128,
    "vocab_size": 392,
    "add_prefix_space": True,
}
PRETRAINING = TrainOptions(lr=2e-3, epochs=1, batch=64, max_length=128, save_every=200)

# What the held-out numbers do and do not show; the report prints it.
NOTE = """
What SynPO shows here: where revising is easier than answering, iterating helps. M_0's text gave it
the skill to revise; the cycle amplifies and distils that skill, but the world was made for it.
Not shown: that distilling after each revision matters (R_1 applied several times, then distilled
once, ends about as high), or that rejected answers do (NLL on the chosen ones alone does as well).
In the world of facts (recipes/facts.toml) nothing is gained after the first iteration."""


# ------------------------------------------------------------------------------------------- lists


def passes(words: list[str], k: int) -> list[str]:
    """The list after k passes of bubble sort.

    k passes at once: each place takes the first in the alphabet of the words up to k places ahead
    that are not placed yet. So more passes are the same operation with a wider view.
    """
    ordered = []
    waiting = list(words[:k])
    for i in range(len(words)):
        waiting += words[i + k : i + k + 1]
        waiting.sort()
        ordered.append(waiting.pop(0))
    return ordered


def slip(draft: list[str], rng: random.Random) -> list[str]:
    """A draft with a typical mistake: a word lost, and a word written twice or made up."""
    draft = list(draft)
    if rng.random() < 0.8:
        draft.remove(rng.choice(draft))
    kind = rng.random()
    if kind < 0.4:
        place = rng.randrange(len(draft))
        draft.insert(place + rng.randint(2, 4), draft[place])
    elif kind < 0.8:
        strange = rng.choice([word for word in WORDS if word not in draft])
        place = rng.randint(0, len(draft))
        if rng.random() < 0.7:  # where the alphabet has it
            place = sum(word < strange for word in draft)
        draft.insert(place, strange)
    return draft


def revise(words: list[str], draft: list[str], k: int) -> list[str]:
    """The draft with the prompt's lost words in front and without surplus ones, then k passes."""
    lost = [word for word in words if word not in draft]
    wanted = [word for word in dict.fromkeys(draft) if word in words]
    return passes(lost + wanted, k)


def prompt_of(words: list[str]) -> str:
    return "Sort: " + " ".join(words)


def words_of(prompt: str) -> list[str]:
    return prompt.removeprefix("Sort:").split()


def well_formed(record: dict) -> bool:
    """Whether G wrote a prompt of this world: ten different words. Knows nothing of answers."""
    words = words_of(record["prompt"])
    known = set(words) <= set(WORDS) and record["prompt"] == prompt_of(words)
    return known and len(words) == len(set(words)) == LENGTH


# -------------------------------------------------------------------------------------------- data


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
    """Write seeds and held-out prompts with gold answers, the corpus, and M_0's data."""
    rng = random.Random(seed)

    # no list occurs twice, so neither seeds nor held-out prompts are in M_0's data
    count = SEEDS + HELDOUT + ANSWERS + REVISIONS + ASKING
    lists: dict[tuple[str, ...], None] = {}
    while len(lists) < count:
        lists[tuple(rng.sample(WORDS, LENGTH))] = None
    fresh = iter([list(words) for words in lists])

    def gold() -> dict:
        words = next(fresh)
        return {"prompt": prompt_of(words), "response": " ".join(sorted(words))}

    write_jsonl(folder / "seeds.jsonl", [gold() for _ in range(SEEDS)])
    write_jsonl(folder / "heldout.jsonl", [gold() for _ in range(HELDOUT)])
    base = [answering(next(fresh)) for _ in range(ANSWERS)]
    base += [revising(next(fresh), rng) for _ in range(REVISIONS)]
    base += [asking(next(fresh), rng) for _ in range(ASKING)]
    rng.shuffle(base)
    write_jsonl(folder / "base.jsonl", base)
    paragraphs = [" ".join(rng.sample(WORDS, LENGTH)) for _ in range(CORPUS)]
    write_text(folder / "corpus.txt", "\n\n".join(paragraphs))


def answering(words: list[str]) -> dict:
    return {"prompt": prompt_of(words), "response": " ".join(passes(words, 1))}


def revising(words: list[str], rng: random.Random) -> dict:
    """A draft, one half of them with a slip, and its revision."""
    draft = passes(words, rng.randint(1, 7))
    if rng.random() < 0.5:
        draft = slip(draft, rng)
    [further] = rng.choices([1, 2, 3], [0.5, 0.3, 0.2])
    prompt = f"{prompt_of(words)} Draft: {' '.join(draft)}"
    return {"prompt": prompt, "response": " ".join(revise(words, draft, further))}


def asking(words: list[str], rng: random.Random) -> dict:
    """Practice for G: three keywords, all of them or two of them in the list that is asked for."""
    keywords = rng.sample(words, 3)
    if rng.random() < 0.5:
        keywords[rng.randrange(3)] = rng.choice([word for word in WORDS if word not in words])
    prompt = f"Ask something about: {', '.join(keywords)}."
    return {"prompt": prompt, "response": f"<question>{prompt_of(words)}</question>"}


# -------------------------------------------------------------------------------------- evaluation


def marks(prompt: str, response: str) -> dict[str, float]:
    """The measures of an answer, by name.

    score: Kendall's tau with the alphabet, 0 if a word is lost, doubled or made up. order: tau of
    the prompt's words that are there, less a tenth for each surplus word. whole: 1 if the answer is
    a rearrangement of the prompt.
    """
    words = words_of(prompt)
    answer = response.split()
    kept = [word for word in dict.fromkeys(answer) if word in words]
    whole = sorted(answer) == sorted(words)
    order = tau(kept) - (len(answer) - len(kept)) / 10
    return {"score": tau(answer) if whole else 0.0, "order": order, "whole": float(whole)}


def tau(words: list[str]) -> float:
    """Kendall's tau of different words with the alphabet: 1 sorted, 0 random, -1 reversed."""
    pairs = list(combinations(words, 2))
    return sum(1 if a < b else -1 for a, b in pairs) / max(1, len(pairs))


def evaluate(
    answers: list[dict],
    heldout: list[dict],
    base_answers: list[dict],
    model: Path | None,
    base: Path,
    run: RunOptions,
) -> dict[str, float]:
    """Means of the marks of answers to held-out prompts, the score's standard error, mean words,
    and the score of each answer.

    Only the answers are read.
    """
    rows = [marks(row["prompt"], row["response"]) for row in answers]
    scores = [row["score"] for row in rows]
    return {
        "score": mean(scores),
        "se": standard_error(scores),
        "order": mean([row["order"] for row in rows]),
        "whole": mean([row["whole"] for row in rows]),
        "words": mean([len(row["response"].split()) for row in answers]),
        "scores": scores,
    }


def score(rows: list[dict]) -> list[float]:
    """The exact score as a scorer, for comparison: the demo's own scorer knows only M_0."""
    return [marks(row["prompt"], row["response"])["score"] for row in rows]
