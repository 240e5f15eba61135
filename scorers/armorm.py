"""ArmoRM-Llama3-8B (arXiv 2406.12845), the reward model of the paper's Llama-3 runs: --scorer DIR.

It is read from its checkpoint as published. An answer's 19 rewards come from the last token of the
conversation through a linear layer, and a transform takes length out of them. How much each counts
depends on the prompt alone: a small network reads the token before the answer opens.
"""

from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import load_weights, parse_config
from model import Linear, Model
from plumbing.chat import Chat
from plumbing.options import RunOptions
from plumbing.ranks import DEVICE
from plumbing.records import load_json, messages_of
from scorers.base import Scorer, packed
from scorers.classifier import conversations


class Gating(nn.Module):
    """Weights of the objectives, (B, objectives), from the prompt's hidden state (B, C)."""

    def __init__(self, width: int, hidden: int, layers: int, objectives: int, temperature: float):
        super().__init__()
        widths = [width] + [hidden] * layers + [objectives]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = temperature

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return F.softmax(self.layers[-1](x) / self.temperature, dim=-1) * self.logit_scale


class ArmoRM(Model):
    """A decoder whose forward returns the selected hidden states (M, C); scores() is its head."""

    def __init__(self, raw: dict):
        classifier = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
        super().__init__(parse_config({**raw, **classifier}))
        self.score = nn.Identity()
        objectives = raw.get("num_objectives", 19)
        self.regression_layer = Linear(raw["hidden_size"], objectives)
        self.reward_transform_matrix = nn.Parameter(torch.eye(objectives))
        self.gating = Gating(
            raw["hidden_size"],
            raw.get("gating_hidden_dim", 1024),
            raw.get("gating_n_hidden", 3),
            objectives,
            raw.get("gating_temperature", 10),
        )

    def scores(self, last: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """(B,) fp32 from hidden states (B, C) at the ends of conversations and of prompts."""
        rewards = self.regression_layer(last.float())  # (B, objectives)
        rewards = rewards @ self.reward_transform_matrix
        return (self.gating(prompt.float()) * rewards).sum(-1)


def load_armorm(directory: str | Path, dtype: torch.dtype) -> ArmoRM:
    """The decoder in dtype, what stands in place of its head in fp32, as the authors run it."""
    with torch.device("meta"):
        model = ArmoRM(load_json(Path(directory) / "config.json"))
        model.model.to(dtype)
    model.to_empty(device=DEVICE)
    load_weights(model, directory)
    return model.eval().requires_grad_(False)


def armorm(directory: str | Path, run: RunOptions) -> Scorer:
    """The scorer of a checkpoint directory in the layout of RLHFlow/ArmoRM-Llama3-8B-v0.1."""
    chat = Chat(directory, run.chat_template)

    @cache
    def network() -> ArmoRM:
        return load_armorm(directory, run.torch_dtype)

    @torch.no_grad()
    def score(rows: list[dict]) -> list[float]:
        # tokens of whole conversations, and how many of them follow the prompt
        sequences = conversations(chat, rows, network().config.max_positions)
        following = []
        for row, ids in zip(rows, sequences, strict=True):
            prompt = chat.encode(chat.render(messages_of(row), False))
            following.append(len(ids) - len(prompt))

        # hidden states at both places, from one forward
        scores = [0.0] * len(rows)
        for micro, tokens, context in packed(sequences):
            gates = context.last - torch.tensor([following[i] for i in micro], device=DEVICE)
            hidden = network()(tokens, context, torch.cat([context.last, gates]))  # (2 B, C)
            last, prompt = hidden.chunk(2)
            for i, value in zip(micro, network().scores(last, prompt).tolist(), strict=True):
                scores[i] = value
        return scores

    return score
