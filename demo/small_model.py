"""The small Llama that a demo world starts from: its tokenizer, its random weights, its training.

A world (sorting.py, facts.py) brings an architecture, training options and M_0's text.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoint import parse_config, save
from formats.records import read_jsonl
from model import Model
from plumbing.files import write_text
from plumbing.options import RunOptions
from plumbing.ranks import on_rank0
from plumbing.stage import Stage
from train import TrainOptions, sft

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}<|assistant|>{% endif %}{% endfor %}"
)


def make_base(data: Path, out: Path, shape: dict, o: TrainOptions, run: RunOptions) -> Path:
    """Train M_0 from scratch on DATA/base.jsonl {prompt, response}; returns `out`.

    shape: sizes beside those of LLAMA; of these, `vocab_size` limits the tokenizer, and
    `add_prefix_space` makes a text's first word the token that it is elsewhere.
    """
    rows = data / "base.jsonl"
    start = data / "start"
    on_rank0(write_start, rows, start, shape, run.seed)

    # M_0 has a chat template of its own, so the run's must not count among its options
    options = replace(o, run=replace(run, chat_template=""))
    stage = Stage(out, options, model=start, data=rows)
    if stage.done:
        return out
    counts = sft(start, read_jsonl(rows), stage, options)
    return stage.finish(**counts)


def write_start(rows: Path, out: Path, shape: dict, seed: int) -> None:
    """Write an untrained checkpoint: a tokenizer of the records' words, and random weights."""
    texts = [text for row in read_jsonl(rows) for text in (row["prompt"], row["response"])]
    shape = dict(shape)
    prefix_space = shape.pop("add_prefix_space", False)
    tokenizer = train_tokenizer(texts, shape["vocab_size"], prefix_space)
    write_text(out / "tokenizer.json", tokenizer.to_str())
    settings = {"eos_token": SPECIAL[0], "chat_template": TEMPLATE}
    write_text(out / "tokenizer_config.json", json.dumps(settings))

    # random weights; those of the norms stay 1
    raw = {**LLAMA, **shape, "vocab_size": tokenizer.get_vocab_size()}
    model = Model(parse_config(raw))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.data.normal_(0, 0.02, generator=generator)
    save(model, out, out, torch.float32, TEMPLATE)


def train_tokenizer(texts: list[str], vocab_size: int, prefix_space: bool) -> Tokenizer:
    """A byte-level BPE with about one token a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    # all bytes are in the alphabet, so any text can be encoded
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tags = ["<question></question>", "<solution></solution>"]
    tokenizer.train_from_iterator(texts + tags * 100, trainer)
    return tokenizer
