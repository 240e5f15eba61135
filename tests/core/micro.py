"""A world of 800 questions that a model of 120,000 weights learns in seconds: what the cycle's
tests run on.

M_0 answers tersely and often wrongly, and knows the generator's form; seeds are tidy and right. The
module is also the evaluation that the tests plug in (tests/core/micro.py:evaluate).
"""

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from plumbing.files import write_json, write_jsonl, write_text
from plumbing.options import RunOptions
from train import TrainOptions, finetune

ADJECTIVES = "red blue green brown happy quick quiet proud gentle clever".split()
NOUNS = "fox owl bear wolf horse rabbit eagle otter beaver camel".split()
VERBS = "jump sing dance sleep climb swim whistle paint".split()
SEEDS, HELDOUT, QUESTIONS, PARAGRAPHS = 20, 12, 1200, 300

TRAINING = {"lr": 1e-3, "batch": 16, "max_length": 64, "save_every": 1}
SAMPLING = {"max_new_tokens": 24, "slots": 32, "chunk": 16}
OPTIONS = {
    "iters": 2,
    "dtype": "float32",
    "evaluate": "tests/core/micro.py:evaluate",
    "generator": {**TRAINING, "epochs": 1, "draws": 4, "template": "Ask about: {keywords}."},
    "prompts": {**SAMPLING, "lists": 64, "max_prompts": 40, "near_duplicate": 0},
    "answers": SAMPLING,
    "improver": {**TRAINING, "epochs": 4, "template": "{draft}\n{prompt}"},
    "rewrites": SAMPLING,
    "pairs": {"scorer": "likelihood", "threshold": -3.0, "max_pairs": 16},
    "policy": {**TRAINING, "epochs": 2, "batch": 8, "lr": 5e-4, "nll": 0.5},
    "seed_sft": {**TRAINING, "epochs": 2},
}


def gold(words: tuple[str, str, str]) -> str:
    return "The {} {} can {} here. Good luck!".format(*words)


def make(folder: Path, tiny_checkpoint) -> dict[str, str]:
    """Write M_0, seeds, held-out records and a corpus; returns loop.py's options that name them."""
    rng = random.Random(0)
    questions, web = {}, []
    for _ in range(QUESTIONS):
        words = adjective, noun, verb = tuple(
            rng.choice(table) for table in (ADJECTIVES, NOUNS, VERBS)
        )
        question = f"Show how a {adjective} {noun} can {verb}."
        questions[question] = gold(words)
        wrong = rng.choice(ADJECTIVES) if rng.random() < 0.3 else adjective
        web += [
            {
                "prompt": question,
                "response": rng.choice(
                    [
                        gold((wrong, noun, verb)),
                        f"um, the {noun} can {verb}",
                        f"um, the {wrong} {noun} can {verb}",
                    ]
                ),
            },
            {
                "prompt": f"Ask about: {', '.join(rng.sample(words, 3))}.",
                "response": f"<question>{question}</question>",
            },
        ]
    rng.shuffle(web)
    tidy = [{"prompt": question, "response": answer} for question, answer in questions.items()]
    write_jsonl(folder / "seeds.jsonl", tidy[:SEEDS])
    write_jsonl(folder / "heldout.jsonl", tidy[SEEDS : SEEDS + HELDOUT])
    write_jsonl(folder / "web.jsonl", web)

    def thing() -> str:
        return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"

    write_text(
        folder / "corpus.txt",
        "\n\n".join(
            f"Once a {thing()} and a {thing()} began to {rng.choice(VERBS)}."
            for _ in range(PARAGRAPHS)
        ),
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text for row in web for text in row.values()],
        trainers.BpeTrainer(
            vocab_size=480,
            special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    start = tiny_checkpoint(
        folder / "start",
        std=0.05,
        tokenizer=tokenizer.to_str(),
        max_position_embeddings=128,
        vocab_size=tokenizer.get_vocab_size(),
        tie_word_embeddings=True,
    )
    training = TrainOptions(
        run=RunOptions(dtype="float32"), lr=4e-3, epochs=1, batch=32, max_length=64
    )
    finetune(start, folder / "web.jsonl", folder / "base", training)
    write_json(folder / "options.json", OPTIONS)
    return {
        "config": str(folder / "options.json"),
        "model": str(folder / "base"),
        "seeds": str(folder / "seeds.jsonl"),
        "heldout": str(folder / "heldout.jsonl"),
        "corpus": str(folder / "corpus.txt"),
    }


def evaluate(answers, heldout, base_answers, model, base, run) -> dict[str, float]:
    """Share of the gold answer's words that the answer has."""
    scores = []
    for row, gold in zip(answers, heldout, strict=True):
        wanted = set(gold["response"].split())
        scores.append(len(wanted & set(row["response"].split())) / len(wanted))
    words = [len(row["response"].split()) for row in answers]
    return {
        "score": sum(scores) / len(scores),
        "words": sum(words) / len(words),
        "scores": scores,
    }


def score(rows: list[dict]) -> list[float]:
    """What stands for an exact score: words of the response."""
    return [len(row["response"].split()) for row in rows]
