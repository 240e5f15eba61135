"""Reward models with one output: scoring with one (--scorer DIR) and training one.

Training follows Bradley and Terry, as in arXiv 2203.02155 equation 1: the chosen answer wins with
probability sigmoid(r(chosen) - r(rejected)). The result is a ...ForSequenceClassification
checkpoint that transformers opens.

pairs.jsonl {prompt | messages, chosen, rejected} -> DIR: an HF checkpoint, metrics.jsonl,
manifest.json

    python -m scorers.classifier --model DIR --pairs pairs.jsonl --out RM_DIR
    torchrun --nproc-per-node 8 -m scorers.classifier --model DIR --pairs pairs.jsonl --out RM_DIR
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from checkpoint import TOKENIZER_FILES, Checkpoint, Weights, load_config
from formats.chat import Chat
from formats.records import messages_of, read_jsonl
from plumbing.files import InputError, load_json, write_json
from plumbing.options import RunOptions, cli
from plumbing.ranges import Count, Positive
from plumbing.ranks import on_rank0
from plumbing.stage import Stage
from scorers.base import LocalModel, Scorer, in_micro_batches, packed
from train import Example, Sequence, TrainOptions, fit

# ---------------------------------------------------------------------------------- scoring


def conversation(chat: Chat, row: dict, response: str) -> list[int]:
    """Token ids of a whole conversation, response included."""
    turns = [*messages_of(row), {"role": "assistant", "content": response}]
    return chat.encode(chat.render(turns, False))


def conversations(model: LocalModel, rows: list[dict]) -> list[list[int]]:
    """Token ids of records and responses."""
    return [conversation(model.chat, row, row["response"]) for row in rows]


def classifier(directory: str | Path, run: RunOptions) -> Scorer:
    """The output of a reward model at the last token of the conversation, response included."""
    # refuse language models and classifiers of several classes, before weights are read
    model = LocalModel(directory, run)
    if load_config(directory).num_labels != 1:
        needed = "a sequence-classification checkpoint with one output (score.weight)"
        raise InputError(f"{directory}: a scorer needs {needed}")

    def reward(_, tokens, context):
        return model.network(tokens, context, context.last).float()[:, 0]  # (B,)

    return lambda rows: in_micro_batches(model, conversations(model, rows), reward)


# ---------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class RewardOptions(TrainOptions):
    lr: Positive = 1e-5  # peak learning rate
    epochs: Count = 1  # passes over the pairs; more of them fit the noise in the labels
    batch: Count = 64  # pairs per optimizer step, over all processes
    max_length: Count = 2048  # tokens of a conversation; longer ones are left out, and counted
    loss_on_prompt: bool = False  # not supported: a reward model is scored at the last token only


def bradley_terry(
    examples: list[Example], scores: list[list[torch.Tensor]]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Sum of -log sigmoid(r(chosen) - r(rejected)) over B pairs, and of what is logged."""
    gap = torch.stack([chosen - rejected for chosen, rejected in scores])  # (B,)
    metrics = {"accuracy": (gap > 0).sum().item(), "margin": gap.sum().item()}
    return -F.logsigmoid(gap).sum(), metrics


def last_scores(model: torch.nn.Module, sequences: list[Sequence]) -> list[torch.Tensor]:
    """fp32 outputs of a reward model at the last token of each sequence, scalars."""
    tokens, context = packed([ids for ids, _ in sequences])
    return list(model(tokens, context, context.last).float()[:, 0])


def start_reward_model(model: Path, out: Path, chat: Chat, last: int, seed: int) -> None:
    """Write a checkpoint with a new random head, whose index points at the model's weights.

    last: the token that conversations end with. transformers scores the last token that is not
    padding, so padding must be another.
    """
    # config.json: one output
    raw = load_json(model / "config.json")
    candidates = (raw.get("pad_token_id"), chat.end, 0, 1)
    pad = next(token for token in candidates if token not in (None, last))
    architecture = raw["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    raw |= {"architectures": [architecture], "num_labels": 1, "pad_token_id": pad}
    raw |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    write_json(out / "config.json", raw)

    # weights: the new head, and an index that points at the files of the body
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(1, raw["hidden_size"], generator=generator) * 0.02
    save_file({"score.weight": head}, out / "score.safetensors")
    files = {"score.weight": "score.safetensors"}
    for name, path in Weights(model).file_of.items():
        if name.startswith("model."):
            files[name] = str(path.resolve())
    write_json(out / "model.safetensors.index.json", {"weight_map": files})

    # the tokenizer
    for name in TOKENIZER_FILES:
        if (model / name).is_file():
            shutil.copy(model / name, out / name)


def train_reward(
    model: Checkpoint,  # chat model to start from
    pairs: Path,  # JSONL of {"prompt", "chosen", "rejected"}
    out: Path,  # checkpoint directory to write
    o: RewardOptions,
) -> Path:
    """Train a reward model on pairs, starting from a chat model."""
    stage = Stage(out, o, model=model, pairs=pairs)
    if stage.done:
        return out
    if o.loss_on_prompt:
        reason = "a reward model is scored at the last token only"
        raise InputError(f"--loss-on-prompt: {reason}; leave it out")

    # both conversations of every pair; one that is too long has no last token to score: left out
    chat = Chat(model, o.run)
    longest = chat.longest(o.max_length)
    rows = read_jsonl(pairs, "prompt", "chosen", "rejected")
    examples = []
    for row in rows:
        sides = [conversation(chat, row, row[side]) for side in ("chosen", "rejected")]
        if max(map(len, sides)) <= longest:
            examples.append(Example(row["id"], [(ids, len(ids) - 1) for ids in sides]))
    if not examples:
        limits = f"--max-length {o.max_length} and the model's context"
        raise InputError(f"{out}: no pair fits {limits}; shorten the pairs")

    # training starts from the language model with a new head
    start = stage.scratch / "start"
    last = conversation(chat, rows[0], rows[0]["chosen"])[-1]
    on_rank0(start_reward_model, model, start, chat, last, o.run.seed)
    counts = fit(start, examples, bradley_terry, stage, o, forward=last_scores)
    return stage.finish(pairs=len(rows), too_long=len(rows) - len(examples), **counts)


if __name__ == "__main__":
    cli(train_reward)
