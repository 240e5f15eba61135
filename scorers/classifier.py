"""Reward models of the Llama architectures with one output: scoring with one, and training one from pairs.

Training is Bradley and Terry's, as in arXiv 2203.02155 equation 1: the chosen answer wins with probability
sigmoid(r(chosen) - r(rejected)). The result is a ...ForSequenceClassification checkpoint, which transformers opens.

pairs.jsonl {prompt | messages, chosen, rejected} -> DIR: an HF checkpoint, metrics.jsonl, manifest.json

    python reward.py train --model DIR --pairs pairs.jsonl --out REWARD_DIR
    torchrun --nproc-per-node 8 reward.py train --model DIR --pairs pairs.jsonl --out REWARD_DIR
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from data import (
    DEVICE,
    Chat,
    Common,
    InputError,
    command,
    load_json,
    messages_of,
    on_first,
    part,
    read_jsonl,
    stage,
    write_text,
)
from model import TOKENIZER_FILES, Config, Packed, Weights, load
from reward import Scorer
from train import Example, Sequence, TrainOptions, fit, plan


def conversation(chat: Chat, row: dict, response: str) -> list[int]:
    """Token ids of a whole conversation with its answer."""
    return chat.encode(
        chat.render([*messages_of(row), {"role": "assistant", "content": response}], False)
    )


def conversations(chat: Chat, rows: list[dict], context: int) -> list[list[int]]:
    """Those of records {prompt | messages, response}; InputError where one is longer than the model's context."""
    ids = [conversation(chat, row, row["response"]) for row in rows]
    for row, one in zip(rows, ids, strict=True):
        if len(one) > context:
            raise InputError(
                f"record {row['id']}: {len(one)} tokens, the context of {chat.directory} is {context}; remove it"
            )
    return ids


def packed(
    ids: list[list[int]], budget: int = 8192
) -> Iterator[tuple[list[int], torch.Tensor, Packed]]:
    """Micro-batches of about so many tokens: which of ids, their tokens end to end (N,), a context."""
    for [micro] in plan([len(one) for one in ids], 1, budget) if ids else ():
        tokens = torch.tensor([t for i in micro for t in ids[i]], device=DEVICE)
        yield micro, tokens, Packed([len(ids[i]) for i in micro], DEVICE)


def classifier(model: str | Path, common: Common) -> Scorer:
    """Scorer by a reward model's output at the last token of the conversation, answer included."""
    chat, config = Chat(model, common.chat_template), Config.load(model)
    if config.labels != 1:
        raise InputError(
            f"{model}: a scorer needs a sequence-classification checkpoint with one output (score.weight)"
        )
    net = cache(lambda: load(model, common.torch_dtype, DEVICE))

    @torch.no_grad()
    def score(rows: list[dict]) -> list[float]:
        scores = [0.0] * len(rows)
        for micro, tokens, context in packed(conversations(chat, rows, config.context)):
            for i, [one] in zip(
                micro, net()(tokens, context, context.last).float().tolist(), strict=True
            ):
                scores[i] = one
        return scores

    return score


# ---------------------------------------------------------------------------------------------- training


@dataclass(kw_only=True)
class RewardOptions(TrainOptions):
    lr: float = 1e-5  # peak learning rate
    epochs: int = 1  # passes over the pairs; more of them fit the labels' noise
    batch: int = 64  # pairs per optimizer step, over all processes
    max_length: int = (
        2048  # tokens of a conversation; a pair with a longer one is left out, and counted
    )
    loss_on_prompt: bool = False  # of no use here: a score has no tokens to leave out


def bradley_terry(
    examples: list[Example], scores: list[list[torch.Tensor]]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Sum of -log sigmoid(r(chosen) - r(rejected)): the chosen answer wins with that probability."""
    gap = torch.stack([chosen - rejected for chosen, rejected in scores])  # (B,)
    return -F.logsigmoid(gap).sum(), {
        "accuracy": (gap > 0).sum().item(),
        "margin": gap.sum().item(),
    }


def last_scores(model: torch.nn.Module, sequences: list[Sequence]) -> list[torch.Tensor]:
    """fp32 outputs of a reward model at the last token of each sequence, scalars."""
    context = Packed([len(ids) for ids, _ in sequences], DEVICE)
    tokens = torch.tensor([t for ids, _ in sequences for t in ids], device=DEVICE)
    return list(model(tokens, context, context.last).float()[:, 0])


def start_reward_model(model: str | Path, out: Path, chat: Chat, last: int, seed: int) -> None:
    """A checkpoint directory that reads the language model's weights where they lie; its head is new, and random.

    last: the token that conversations end with. transformers takes the last one that is no padding, so padding is another.
    """
    raw, file_of = load_json(Path(model) / "config.json"), Weights(model).file_of
    weight = (
        torch.randn(1, raw["hidden_size"], generator=torch.Generator().manual_seed(seed)) * 0.02
    )
    pad = next(i for i in (raw.get("pad_token_id"), chat.end, 0, 1) if i is not None and i != last)
    kind = raw["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    write_text(
        out / "config.json",
        json.dumps(
            {
                **raw,
                "architectures": [kind],
                "num_labels": 1,
                "pad_token_id": pad,
                "id2label": {"0": "reward"},
                "label2id": {"reward": 0},
            }
        ),
    )
    save_file({"score.weight": weight}, out / "score.safetensors")
    body = {
        name: str(path.resolve()) for name, path in file_of.items() if name.startswith("model.")
    }
    write_text(
        out / "model.safetensors.index.json",
        json.dumps({"weight_map": {**body, "score.weight": "score.safetensors"}}),
    )
    for name in filter(lambda name: (Path(model) / name).is_file(), TOKENIZER_FILES):
        shutil.copy(Path(model) / name, out / name)


def train_reward(
    model: str | Path, pairs: list[dict], out: str | Path, o: RewardOptions, common: Common
) -> dict:
    """Make a language model's checkpoint into one of a reward model, trained on pairs; returns counts."""
    if o.loss_on_prompt:
        raise InputError(
            "--loss-on-prompt: a reward model is scored at the last token only; leave it out"
        )
    chat, start, longest = (
        Chat(model, common.chat_template),
        Path(out) / "start",
        min(o.max_length, Config.load(model).context),
    )
    sides = [
        [conversation(chat, row, row[side]) for side in ("chosen", "rejected")] for row in pairs
    ]
    examples = [
        Example(row["id"], [(ids, len(ids) - 1) for ids in two])
        for row, two in zip(pairs, sides, strict=True)
        if max(map(len, two)) <= longest
    ]  # a conversation without its end has no token to score
    if not examples:
        raise InputError(
            f"{out}: no pair fits --max-length {o.max_length} and the model's context; shorten the pairs"
        )
    on_first(start_reward_model, model, start, chat, sides[0][0][-1], common.seed)
    counts = fit(
        start, out, examples, bradley_terry, lambda example: 1, o, common, forward=last_scores
    )
    on_first(shutil.rmtree, start)
    return {"pairs": len(pairs), "too_long": len(pairs) - len(examples), **counts}


@dataclass(kw_only=True)
class Options(RewardOptions, Common):
    model: str  # checkpoint directory of a chat model to start from
    pairs: str  # JSONL of {"prompt", "chosen", "rejected"}
    out: str  # checkpoint directory to write


def main(o: Options) -> dict:
    pairs = read_jsonl(o.pairs, "prompt", "chosen", "rejected")
    return stage(
        o.out,
        {"model": o.model, "pairs": o.pairs},
        {**part(o, RewardOptions), **part(o, Common)},
        lambda: train_reward(o.model, pairs, o.out, o, o),
    )


def train_command() -> None:
    command(main, Options)
