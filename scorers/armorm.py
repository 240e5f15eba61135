"""ArmoRM-Llama3-8B (arXiv 2406.12845), the reward model of the paper's Llama-3 runs: --scorer DIR.

It is read from its checkpoint as published. A linear layer on the last token of the conversation
gives 19 rewards, and a transform takes length out of them. How much each counts depends on the
prompt alone: a small network reads the token before the answer opens.
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import load_weights, parse_config
from formats.records import messages_of
from model import Linear, Model
from plumbing.files import load_json
from plumbing.options import RunOptions
from plumbing.ranks import DEVICE
from scorers.base import LocalModel, Scorer, in_micro_batches
from scorers.classifier import conversations


class ArmoRM(Model):
    """A decoder whose forward returns the selected hidden states (M, C); scores() is its head."""

    def __init__(self, raw: dict):
        decoder = {**raw, "architectures": ["LlamaForSequenceClassification"]}
        super().__init__(parse_config(decoder))
        self.score = nn.Identity()
        width = raw["hidden_size"]
        objectives = raw.get("num_objectives", 19)
        self.regression_layer = Linear(width, objectives)
        self.reward_transform_matrix = nn.Parameter(torch.eye(objectives))
        # the network that weights the objectives
        hidden = [raw.get("gating_hidden_dim", 1024)] * raw.get("gating_n_hidden", 3)
        self.temperature = raw.get("gating_temperature", 10)
        self.gating = nn.Module()
        self.gating.logit_scale = nn.Parameter(torch.ones(1))
        widths = pairwise([width, *hidden, objectives])
        self.gating.layers = nn.ModuleList(nn.Linear(a, b) for a, b in widths)

    def weights(self, prompt: torch.Tensor) -> torch.Tensor:
        """How much each objective counts, (B, objectives), from hidden states (B, C)."""
        *hidden, last = self.gating.layers
        for layer in hidden:
            prompt = F.relu(layer(prompt))
        return F.softmax(last(prompt) / self.temperature, dim=-1) * self.gating.logit_scale

    def scores(self, last: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """(B,) fp32 from hidden states (B, C) at the ends of conversations and of prompts."""
        rewards = self.regression_layer(last.float())  # (B, objectives)
        rewards = rewards @ self.reward_transform_matrix
        return (self.weights(prompt.float()) * rewards).sum(-1)


def load_armorm(directory: Path, dtype: torch.dtype, device: torch.device) -> ArmoRM:
    """The decoder in dtype, what replaces its head in fp32, as the authors run it."""
    with torch.device("meta"):
        model = ArmoRM(load_json(directory / "config.json"))
        model.model.to(dtype)
    model.to_empty(device=device)
    load_weights(model, directory)
    return model.eval().requires_grad_(False)


def armorm(directory: str | Path, run: RunOptions) -> Scorer:
    """The scorer of a checkpoint directory in the layout of RLHFlow/ArmoRM-Llama3-8B-v0.1."""
    model = LocalModel(directory, run, load_armorm)
    chat = model.chat

    def score(rows):
        # tokens of whole conversations, and how many of them follow the prompt
        sequences = conversations(model, rows)
        prompts = [chat.encode(chat.render(messages_of(row), False)) for row in rows]
        pairs = zip(sequences, prompts, strict=True)
        following = torch.tensor([len(ids) - len(prompt) for ids, prompt in pairs], device=DEVICE)

        def forward(micro, tokens, context):
            # hidden states at both places, from one forward
            gates = context.last - following[micro]
            hidden = model.network(tokens, context, torch.cat([context.last, gates]))  # (2 B, C)
            return model.network.scores(*hidden.chunk(2))

        return in_micro_batches(model, sequences, forward)

    return score
