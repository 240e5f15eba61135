"""ArmoRM-Llama3-8B (arXiv 2406.12845), the reward model of the paper's Llama-3 runs, from its checkpoint as published.

An answer's 19 rewards are read from the last token of the conversation by a linear layer, and a transform takes length out of
them. How much each counts follows from the prompt alone: a small network reads the token before the answer opens.
"""

from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import DEVICE, Chat, Common, load_json, messages_of
from model import Config, Linear, Model, fill
from reward import Scorer
from scorers.classifier import conversations, packed


class Gating(nn.Module):
    """Weights of the objectives, (B, objectives), from the prompt's hidden state (B, C)."""

    def __init__(self, width: int, hidden: int, layers: int, objectives: int, temperature: float):
        super().__init__()
        widths = [width] + [hidden] * layers
        self.layers = nn.ModuleList(
            [*(nn.Linear(a, b) for a, b in pairwise(widths)), nn.Linear(widths[-1], objectives)]
        )
        self.logit_scale, self.temperature = nn.Parameter(torch.ones(1)), temperature

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return F.softmax(self.layers[-1](x) / self.temperature, dim=-1) * self.logit_scale


class ArmoRM(Model):
    """A decoder without a head of its own: forward gives hidden states where they are wanted."""

    def __init__(self, raw: dict):
        super().__init__(
            Config.parse(
                {**raw, "architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
            )
        )
        del self.score
        n = raw.get("num_objectives", 19)
        self.regression_layer, self.reward_transform_matrix = (
            Linear(raw["hidden_size"], n),
            nn.Parameter(torch.eye(n)),
        )
        self.gating = Gating(
            raw["hidden_size"],
            raw.get("gating_hidden_dim", 1024),
            raw.get("gating_n_hidden", 3),
            n,
            raw.get("gating_temperature", 10),
        )

    @property
    def head(self) -> nn.Module:
        return nn.Identity()

    def scores(self, last: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """(B,) from the hidden states of the conversations' and of the prompts' last tokens, (B, C) each, in fp32."""
        rewards = (
            self.regression_layer(last.float()) @ self.reward_transform_matrix
        )  # (B, objectives)
        return (self.gating(prompt.float()) * rewards).sum(-1)


def load_armorm(directory: str | Path, dtype: torch.dtype) -> ArmoRM:
    """The decoder in dtype, what stands in its head's place in fp32, as the authors run it."""
    with torch.device("meta"):
        model = ArmoRM(load_json(Path(directory) / "config.json"))
        model.model.to(dtype)
    model.to_empty(device=DEVICE)
    fill(model, directory)
    return model.eval().requires_grad_(False)


def armorm(directory: str, common: Common) -> Scorer:
    """The scorer of a checkpoint directory with the layout of RLHFlow/ArmoRM-Llama3-8B-v0.1."""
    chat, net = (
        Chat(directory, common.chat_template),
        cache(lambda: load_armorm(directory, common.torch_dtype)),
    )

    @torch.no_grad()
    def score(rows: list[dict]) -> list[float]:
        scores, ids = [0.0] * len(rows), conversations(chat, rows, net().config.context)
        prompts = [len(chat.encode(chat.render(messages_of(row), False))) for row in rows]
        for micro, tokens, context in packed(ids):
            starts = context.last - torch.tensor([len(ids[i]) - 1 for i in micro], device=DEVICE)
            gates = starts + torch.tensor([prompts[i] - 1 for i in micro], device=DEVICE)
            last, prompt = net()(tokens, context, torch.cat([context.last, gates])).chunk(2)
            for i, one in zip(micro, net().scores(last, prompt).tolist(), strict=True):
                scores[i] = one
        return scores

    return score
