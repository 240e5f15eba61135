"""Llama, Mistral, Qwen2 and Qwen3, written out by hand: the network, and nothing else.

Families differ by switches of Config only; the table FAMILIES in formats/config_json.py sets them.

Modules and parameters have the names of Hugging Face checkpoints: a state dict needs no renaming.
Tokens of all sequences come as one flat (N,) tensor, without padding. A context (ops/attention.py)
decides which of them attend to which; it also holds positions, keys and values:

    model(tokens, Packed([5, 3]), select)          # train or score two sequences
    model(tokens, Decode(cache, ...), select)      # one more token for each row of a cache

RoPE's tables and the log-softmax are always fp32: tables rounded to bf16 change answers.
`@compiled(...)` names the faster twin, for CPUs, of the plain function under it.

Shapes: N tokens, M of them with logits, C width, H query heads, Hkv key-value heads, D head
dimension, I intermediate size, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ops import cpu
from ops.cpu import compiled
from ops.logps import token_logps


@dataclass(frozen=True)
class Config:
    """The part of config.json that decides the computation; checkpoint.py reads and checks it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: dict  # rope_type, rope_theta, and for llama3 how it stretches
    max_positions: int
    sliding_window: int | None  # tokens that a token sees, itself included
    qkv_bias: bool  # the projections to q, k and v have one
    qk_norm: bool  # RMSNorm over each head of q and k, before RoPE
    tied: bool  # the head is the embedding
    num_labels: int  # outputs of a sequence-classification head; 0 for a language model
    raw: dict  # config.json as it was read, to be written back


# ---------------------------------------------------------------------------------- functions


@compiled(cpu.rms_norm)
def rms_norm(x, weight, eps: float):
    """x / sqrt(mean(x^2) + eps) * weight; x (N, C) or (N, H, C), weight (C,) -> as x."""
    x32 = x.float()  # squares of bf16 activations lose too much
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@compiled(cpu.apply_rope)
def apply_rope(x, cos, sin):
    """Rotate pairs (i, i + D/2) of x (N, H, D) by angles whose cos and sin are (N, 1, D/2) fp32."""
    a, b = x.float().chunk(2, dim=-1)  # (N, H, D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@compiled(cpu.swiglu)
def swiglu(gate, up):
    """gate and up (N, I) -> (N, I), I the intermediate size."""
    return F.silu(gate) * up


def rope_frequencies(config: Config) -> torch.Tensor:
    """Angle per position for each pair: (D/2,) fp32, on the CPU."""
    D = config.head_dim
    rope = config.rope
    exponents = torch.arange(0, D, 2, dtype=torch.int64, device="cpu").float() / D
    frequencies = 1.0 / (rope["rope_theta"] ** exponents)  # (D/2,)
    if rope["rope_type"] == "llama3":
        # Counting a pair's turns over the original context: below `low` its frequency is divided by
        # factor, above `high` it is kept, in between the two are mixed.
        low = rope["low_freq_factor"]
        high = rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / rope["factor"]
    return frequencies


# ---------------------------------------------------------------------------------- modules


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """Without bias, but for what Config.qkv_bias gives one."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__(inputs, outputs, bias)


class Attention(nn.Module):
    """Grouped-query attention: H / Hkv query heads share a head of keys and values."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        C = config.hidden_size
        query_width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(C, query_width, config.qkv_bias)
        self.k_proj = Linear(C, key_value_width, config.qkv_bias)
        self.v_proj = Linear(C, key_value_width, config.qkv_bias)
        self.o_proj = Linear(query_width, C)
        norm = RMSNorm if config.qk_norm else nn.Identity  # which takes and ignores arguments
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)

    def project(self, x):
        """(N, C) -> (N, H * D), (N, Hkv * D), (N, Hkv * D); ops/pack.py makes one matmul of it."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x, cos, sin, context):
        D = self.head_dim
        q, k, v = self.project(x)
        q = self.q_norm(q.unflatten(-1, (-1, D)))  # (N, H, D)
        k = self.k_norm(k.unflatten(-1, (-1, D)))  # (N, Hkv, D)
        q = apply_rope(q, cos, sin)
        k = apply_rope(k, cos, sin)
        v = v.unflatten(-1, (-1, D))  # (N, Hkv, D)
        y = context.attend(self.layer, q, k, v, self.window)  # (N, H, D)
        return self.o_proj(y.flatten(-2))  # (N, H * D) -> (N, C)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # (N, C)


class Block(nn.Module):
    # If on, only a block's input (N, C) is kept for the backward pass, which recomputes the rest:
    # far less memory for about a third more compute.
    activation_checkpointing = False

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def block(self, x, cos, sin, context):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, context)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, cos, sin, context):
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.block, x, cos, sin, context, use_reentrant=False)
        return self.block(x, cos, sin, context)


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens, cos, sin, context):
        x = self.embed_tokens(tokens)  # (N, C)
        for layer in self.layers:
            x = layer(x, cos, sin, context)
        return self.norm(x)


class Model(nn.Module):
    """A decoder with a language-model head, or with a reward head `score` if config.num_labels."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.frequencies = rope_frequencies(config)  # no buffer, which .to(bfloat16) would round
        self.model = Decoder(config)
        if config.num_labels:
            self.score = Linear(config.hidden_size, config.num_labels)
        elif not config.tied:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(self, tokens, context, select, targets=None):
        """tokens (N,) int64; context from ops.attention; select (M,): which of the N need the head.

        Without targets: logits (M, V), or scores (M, num_labels). With targets (M,): fp32 log-probs
        (M,) of those tokens; the (M, V) matrix is never materialised, not even in backward.
        """
        if self.frequencies.device != tokens.device:
            self.frequencies = self.frequencies.to(tokens.device)
        angles = context.positions[:, None].float() * self.frequencies  # (N, D/2)
        cos = angles.cos()[:, None]  # (N, 1, D/2)
        sin = angles.sin()[:, None]
        x = self.model(tokens, cos, sin, context)[select]  # (M, C)
        if targets is not None:
            return token_logps(x, self.head.weight, targets)
        if self.head is self.model.embed_tokens:
            return F.linear(x, self.head.weight)
        return self.head(x)

    @property
    def head(self) -> nn.Module:
        """What makes logits or scores: its own module, or the embedding if the two are tied."""
        if self.config.num_labels:
            return self.score
        return getattr(self, "lm_head", self.model.embed_tokens)
