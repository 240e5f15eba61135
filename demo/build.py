"""What the demo starts from: data of a closed world, and M_0, a small Llama trained from scratch.

prepare() is what recipes/demo.toml names in `prepare`, and evaluate() is its held-out evaluation.
score() is the rubric as a scorer, for comparison: the default scorer needs nothing from outside the
models. The world itself is in world.py.

M_0 learns, in one pass, from imperfect web answers, from correct paragraphs and from practice in
copying, tidying and asking about keywords, skills that a real chat model brings along.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoint import parse_config, save
from demo import world
from model import Model
from plumbing.options import RunOptions
from plumbing.ranks import on_rank0
from plumbing.records import read_jsonl, write_jsonl, write_text
from plumbing.stage import Stage
from train import TrainOptions, sft

# records of M_0's data
WEB = 12_000
PARAGRAPHS = 2_000
PRACTICE = 2_400
ASKING = 3_600
# paragraphs of the corpus
CORPUS = 3_000

ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
PRETRAINING = TrainOptions(
    lr=3e-3, epochs=1, batch=32, max_length=256, loss_on_prompt=True, save_every=100
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}<|assistant|>{% endif %}{% endfor %}"
)
# What the held-out numbers do and do not show; the report prints it.
NOTE = """
Shown: one step of self-boosting lifts M_0 by many standard errors, with nothing from outside the
models in the loop.
Not shown: that iterating is what helps. Later steps gain little, within a standard error or two;
SFT on the seeds, pairs from the seeds, and one shot with as many pairs end about as high
(methods/controls.py). Form saturates in the first step. Held-out prompts combine facts that M_0's
web text holds in other prompts. Gold text and rubric come from the same templates: see
demo/world.py."""


def prepare(o) -> dict[str, Path]:
    """Make M_0, seeds, corpus and held-out prompts below o.out; returns loop.py's options for them.

    o: loop.py's Options.
    """
    data = o.out / "data"
    base = o.out / "base"
    on_rank0(write_data, data, o.run.seed)
    on_rank0(write_start, data, o.run.seed)

    # M_0 has a chat template of its own, so the run's must not count among its options
    options = replace(PRETRAINING, run=replace(o.run, chat_template=""))
    rows = data / "base.jsonl"
    stage = Stage(base, options, model=data / "start", data=rows)
    if not stage.done:
        counts = sft(data / "start", read_jsonl(rows), stage, options)
        stage.finish(**counts)
    return {
        "model": base,
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


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE with about one token a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # all bytes are in the alphabet, so any text can be encoded
    trainer = trainers.BpeTrainer(
        vocab_size=1600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tags = ["<question></question>", "<solution></solution>"]
    tokenizer.train_from_iterator(texts + tags * 100, trainer)
    return tokenizer


def write_start(folder: Path, seed: int) -> None:
    """Write an untrained checkpoint: a tokenizer and random weights."""
    rows = read_jsonl(folder / "base.jsonl")
    tokenizer = train_tokenizer([text for row in rows for text in (row["prompt"], row["response"])])
    start = folder / "start"
    write_text(start / "tokenizer.json", tokenizer.to_str())
    settings = {"eos_token": SPECIAL[0], "chat_template": TEMPLATE}
    write_text(start / "tokenizer_config.json", json.dumps(settings))

    # random weights; those of the norms stay 1
    raw = {**ARCHITECTURE, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 0}
    model = Model(parse_config(raw))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.data.normal_(0, 0.02, generator=generator)
    save(model, start, start, torch.float32, TEMPLATE)


def evaluate(
    answers: list[dict],
    heldout: list[dict],
    base_answers: list[dict],
    model: Path | None,
    base: Path,
    run: RunOptions,
) -> dict[str, float]:
    """Mean rubric of answers to held-out prompts, its standard error, its three parts, mean words.

    See world.rubric. Only the answers are read.
    """
    marks = [world.rubric(row["prompt"], row["response"]) for row in answers]
    n = len(marks)
    mean = {name: sum(mark[name] for mark in marks) / n for name in marks[0]}
    score = mean.pop("score")
    variance = sum((mark["score"] - score) ** 2 for mark in marks) / max(1, n - 1)
    return {
        "score": score,
        "se": (variance / n) ** 0.5,
        **mean,
        "words": sum(len(row["response"].split()) for row in answers) / n,
    }


def score(rows: list[dict]) -> list[float]:
    """The rubric as a scorer; a prompt outside the world scores 0 whatever the answer."""
    marks = [world.rubric(row["prompt"], row["response"]) for row in rows]
    return [mark["score"] if mark else 0.0 for mark in marks]
