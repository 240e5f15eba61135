"""What the demo starts from: data of the closed world, and M_0, a small Llama trained from scratch on its web text.

prepare() is what recipes/demo.json names in `prepare`; evaluate() is its held-out measure and score() the rubric as a
scorer (a control: the default scorer needs nothing from outside the models). See world.py for the world itself.

M_0 learns, in one pass, from imperfect web answers, from correct paragraphs and from practice in copying, tidying and
asking about keywords, skills that a real chat model brings along.
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data import Common, on_first, read_jsonl, stage, write_jsonl, write_text
from model import Config, Model, save
from train import TrainOptions, sft

sys.path.insert(0, str(Path(__file__).resolve().parent))
import world

WEB, PARAGRAPHS, PRACTICE, ASKING, CORPUS = (
    12_000,
    2_000,
    2_400,
    3_600,
    3_000,
)  # records of M_0's data; of the corpus
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
    lr=3e-3, epochs=1, batch=32, max_length=256, loss_on_prompt=True, checkpoint_every=100
)
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}<|assistant|>{% endif %}{% endfor %}"
)
NOTE = """
Shown: one step of self-boosting lifts M_0 by many standard errors, with nothing from outside the models in the loop.
Not shown: that iterating is what helps. Later steps gain little, within a standard error or two; SFT on the seeds, pairs from
the seeds, and one shot with as many pairs end about as high (--controls). Form saturates in the first step. Held-out prompts
combine facts that M_0's web text holds in other prompts; gold text and rubric come from the same templates (demo/world.py)."""
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]


def prepare(o) -> dict[str, str]:
    """Make M_0, seeds, corpus and held-out prompts below o.out; returns the options of loop.py that name them."""
    data, base = Path(o.out) / "data", Path(o.out) / "base"
    on_first(write_data, data, o.seed)
    common = Common(seed=o.seed, dtype=o.dtype)
    on_first(write_start, data, o.seed)
    stage(
        base,
        {"model": data / "start", "data": data / "base.jsonl"},
        {**vars(PRETRAINING), **vars(common)},
        lambda: sft(data / "start", read_jsonl(data / "base.jsonl"), base, PRETRAINING, common),
    )
    return {
        "model": str(base),
        "seeds": str(data / "seeds.jsonl"),
        "heldout": str(data / "heldout.jsonl"),
        "corpus": str(data / "corpus.txt"),
    }


def write_data(folder: Path, seed: int) -> None:
    """Seeds and held-out prompts with gold answers, the corpus, and M_0's data, in which no held-out prompt occurs."""
    rng, hidden = random.Random(seed), world.heldout_prompts(seed)
    seeds, heldout = world.split(seed)
    asking = [
        row
        for row in world.practice_records(rng, 5 * ASKING, hidden)
        if row["prompt"].startswith("Ask")
    ][:ASKING]
    base = [
        *world.web_records(rng, WEB, hidden),
        *world.practice_records(rng, PRACTICE, hidden),
        *asking,
        *(
            {"prompt": "Tell me something.", "response": text}
            for text in world.paragraphs(rng, PARAGRAPHS)
        ),
    ]
    for row in base:  # M_0 knows what a tag is, as any chat model does
        if row["prompt"].startswith("Ask something"):
            row["response"] = f"<question>{row['response']}</question>"
    rng.shuffle(base)
    for name, rows in {"seeds": seeds, "heldout": heldout, "base": base}.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    write_text(folder / "corpus.txt", "\n\n".join(world.paragraphs(rng, CORPUS)))


def write_start(folder: Path, seed: int) -> None:
    """An untrained checkpoint: a byte-level BPE with about one token a word, and random weights."""
    texts = [
        text
        for row in read_jsonl(folder / "base.jsonl")
        for text in (row["prompt"], row["response"])
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts + ["<question></question>", "<solution></solution>"] * 100,
        trainers.BpeTrainer(
            vocab_size=1600,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    start = folder / "start"
    write_text(start / "tokenizer.json", tokenizer.to_str())
    write_text(
        start / "tokenizer_config.json",
        json.dumps({"eos_token": SPECIAL[0], "chat_template": TEMPLATE}),
    )
    config = Config.parse(
        {**ARCHITECTURE, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 0}
    )
    generator = torch.Generator().manual_seed(seed)
    model = Model(config)
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.data.normal_(0, 0.02, generator=generator)
    save(model, start, start, torch.float32, TEMPLATE)


def evaluate(
    answers: list[dict], heldout: list[dict], base_answers: list[dict], model, base, common
) -> dict[str, float]:
    """Mean rubric of answers to held-out prompts, its standard error, and its three parts (see world.rubric)."""
    marks = [world.rubric(row["prompt"], row["response"]) for row in answers]
    mean = lambda name: sum(mark[name] for mark in marks) / len(marks)  # noqa: E731
    variance = sum((mark["score"] - mean("score")) ** 2 for mark in marks) / max(1, len(marks) - 1)
    return {
        "score": mean("score"),
        "se": (variance / len(marks)) ** 0.5,
        **{name: mean(name) for name in ("coverage", "accuracy", "form")},
        "words": sum(len(row["response"].split()) for row in answers) / len(answers),
    }


def score(rows: list[dict]) -> list[float]:
    """The rubric as a scorer; a prompt outside the world scores 0 whatever the answer."""
    return [
        (world.rubric(row["prompt"], row["response"]) or {"score": 0.0})["score"] for row in rows
    ]
