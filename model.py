"""Llama and Mistral by hand, read from and written to Hugging Face checkpoint directories.

Modules and parameters carry the names of the checkpoint, so a state dict needs no renaming either way. The same
modules run two shapes of a forward pass, and an attention context decides which; the layers do not know:

    Packed    training, scoring, prefill: (N,) tokens of several sequences laid end to end, no padding
    Decode    one new token for each of B rows of a key-value cache, rows of unequal length

Attention runs through flash-attn where it is installed and the tensors are on a GPU, else through PyTorch's SDPA; a CPU
takes the functions of cpu/kernels.py where they are ready, and text is generated with the weights as cpu/pack.py lays them.
RoPE tables and log-softmax are fp32 always: tables rounded to bf16 change answers.
Not supported, and refused by name: other architectures, RoPE types other than default and llama3, biases, quantised
weights, attention dropout.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from mmap import MAP_PRIVATE, mmap
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from cpu import kernels
from data import InputError, load_json, spent

try:
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
except ImportError:  # a CPU, or a GPU without the package: SDPA
    flash_attn_varlen_func = flash_attn_with_kvcache = None

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "LlamaForSequenceClassification",
    "MistralForSequenceClassification",
)
# What a config may say about the computation; any other value would be silently wrong here, so it is refused.
ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (None,),
}
NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
NEEDED_LLAMA3 = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


# ---------------------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """The part of config.json that decides the computation; `raw` is the file, kept to be written back unchanged."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: dict
    context: int  # max_position_embeddings
    sliding_window: int | None
    tied: bool
    labels: int  # outputs of a sequence-classification head; 0 means a language model
    raw: dict

    @classmethod
    def load(cls, directory: str | Path) -> "Config":
        """Read config.json in the layout of transformers 4 or 5. Raises InputError on anything unsupported."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise InputError(
                f"{directory}: no config.json, so this is no checkpoint directory; give the directory "
                "that holds config.json, *.safetensors and tokenizer.json"
            )
        return cls.parse(load_json(path), path)

    @classmethod
    def parse(cls, raw: dict, path="config.json") -> "Config":
        """Check and convert a config.json dict; `path` names it in errors."""
        architecture = (raw.get("architectures") or ["none"])[0]
        if architecture not in ARCHITECTURES:
            raise InputError(
                f"{path}: architecture {architecture} is not supported; use one of "
                f"{', '.join(ARCHITECTURES)}"
            )
        for name, allowed in ONLY.items():
            if name in raw and raw[name] not in allowed:
                raise InputError(
                    f"{path}: {name} = {raw[name]!r} is not supported, only {allowed[0]!r} is"
                )
        # transformers 5 has all of RoPE in rope_parameters; 4 has rope_theta beside an optional rope_scaling
        rope = {
            "rope_theta": raw.get("rope_theta", 10000.0),
            **(raw.get("rope_scaling") or {}),
            **(raw.get("rope_parameters") or {}),
        }
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        if (
            rope["rope_type"] not in ("default", "llama3")
            or rope.get("partial_rotary_factor", 1) != 1
        ):
            raise InputError(
                f"{path}: RoPE {rope} is not supported; rope_type default and llama3 are"
            )
        wanted = {
            **dict.fromkeys(NEEDED, raw),
            **dict.fromkeys(NEEDED_LLAMA3 if rope["rope_type"] == "llama3" else (), rope),
        }
        missing = [name for name, where in wanted.items() if where.get(name) is None]
        if missing:
            raise InputError(f"{path}: {missing[0]} is missing; complete the config")
        heads = raw["num_attention_heads"]
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope=rope,
            context=raw.get("max_position_embeddings", 2048),
            # Llama's configs have no window; Mistral's has one unless it says null
            sliding_window=raw.get("sliding_window", 4096)
            if architecture.startswith("Mistral")
            else None,
            tied=raw.get("tie_word_embeddings", False),
            labels=len(raw.get("id2label") or (0, 1))
            if architecture.endswith("Classification")
            else 0,
            raw=raw,
        )


def rope_frequencies(config: Config) -> torch.Tensor:
    """Inverse wavelengths of RoPE, (D/2,) fp32 on the CPU, with Llama 3.1's stretching of the long ones."""
    D = config.head_dim
    exponents = torch.arange(0, D, 2, dtype=torch.int64, device="cpu").float() / D
    frequencies = 1.0 / (config.rope["rope_theta"] ** exponents)  # (D/2,)
    if config.rope["rope_type"] == "llama3":
        factor, low, high, old_context = (config.rope[k] for k in NEEDED_LLAMA3)
        # turns made over the original context: under `low` is divided by factor, over `high` is kept, between is mixed
        turns = old_context * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / factor
    return frequencies


# ---------------------------------------------------------------------------------------------- attention contexts


def use_flash(x: torch.Tensor) -> bool:
    """Whether attention over x runs through flash-attn: installed, on a GPU and in a half-precision type."""
    return flash_attn_varlen_func is not None and x.is_cuda and x.dtype != torch.float32


def window_size(window: int | None) -> tuple[int, int]:
    """flash-attn counts a window by its reach to the left and right; Mistral's counts the token itself."""
    return (-1, -1) if window is None else (window - 1, 0)


class Packed:
    """Causal attention inside each of S sequences that lie end to end in N tokens.

    lengths: S positive ints that sum to N. positions (N,) restart at 0 in every sequence.
    """

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu"):
        self.lengths = lengths
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(device)  # (N,)
        self.starts = torch.tensor([0, *lengths]).cumsum(0)  # (S + 1,) on the CPU
        self.cu_seqlens = self.starts.to(torch.int32).to(device)
        self.last = (self.starts[1:] - 1).to(device)  # (S,) index of each sequence's last token

    def attend(self, layer: int, q, k, v, window: int | None):
        """q (N, H, D), k and v (N, Hkv, D) -> (N, H, D)."""
        if use_flash(q):
            longest = max(self.lengths)
            return flash_attn_varlen_func(
                q,
                k,
                v,
                self.cu_seqlens,
                self.cu_seqlens,
                longest,
                longest,
                causal=True,
                window_size=window_size(window),
            )
        if kernels.ready(q, flags=kernels.attention_flags(q.shape[2], q.shape[1] // k.shape[1])):
            return kernels.attend_packed(q, k, v, self.starts, window)
        # One SDPA call a sequence: a mask over all N x N would cost the square of the micro-batch.
        outputs = []
        for q1, k1, v1 in zip(
            q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True
        ):
            q1, k1, v1 = (x.transpose(0, 1)[None] for x in (q1, k1, v1))  # (1, H or Hkv, T, D)
            T, mask = q1.shape[2], None
            if window is not None and T > window:
                mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
            out = F.scaled_dot_product_attention(
                q1, k1, v1, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            outputs.append(out[0].transpose(0, 1))  # (T, H, D)
        return torch.cat(outputs)


class Cache:
    """Keys and values of B rows of at most T tokens: k, v (L, B, T, Hkv, D). Costs 4 * L * B * T * Hkv * D bytes in bf16."""

    def __init__(
        self,
        config: Config,
        rows: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        shape = (
            config.num_hidden_layers,
            rows,
            tokens,
            config.num_key_value_heads,
            config.head_dim,
        )
        # Zeros, not empty: SDPA multiplies masked positions by 0, and 0 * NaN of stale memory is NaN. On a CPU they are fresh
        # pages of the system's, which take no memory before a token is written to them.
        if torch.device(device).type == "cpu":
            bytes_ = math.prod(shape) * dtype.itemsize
            self.k, self.v = (
                torch.frombuffer(mmap(-1, bytes_, MAP_PRIVATE), dtype=dtype).view(shape)
                for _ in range(2)
            )
        else:
            self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    @staticmethod
    def row_bytes(config: Config, tokens: int, dtype: torch.dtype) -> int:
        """What one row of so many tokens takes."""
        return (
            2
            * config.num_hidden_layers
            * tokens
            * config.num_key_value_heads
            * config.head_dim
            * dtype.itemsize
        )

    def move_row(self, source: int, target: int, tokens: int) -> None:
        """Copy one row's tokens over another row, so that the rows in use stay a prefix of the cache."""
        for x in (self.k, self.v):
            x[:, target, :tokens] = x[:, source, :tokens]


class Prefill(Packed):
    """A packed forward that also writes sequence i's keys and values to the start of cache row rows[i]."""

    def __init__(self, cache: Cache, rows: list[int], lengths: list[int], device="cpu"):
        super().__init__(lengths, device)
        self.cache = cache
        self.token_rows = (
            torch.tensor(rows).repeat_interleave(torch.tensor(lengths)).to(device)
        )  # (N,)

    def attend(self, layer, q, k, v, window):
        self.cache.k[layer][self.token_rows, self.positions] = k
        self.cache.v[layer][self.token_rows, self.positions] = v
        return super().attend(layer, q, k, v, window)


class Decode:
    """One new token for each of the first B rows of the cache, row i holding lengths[i] tokens before it."""

    def __init__(self, cache: Cache, lengths: torch.Tensor, live: int, window: int | None):
        """lengths (B,) int64 on the cache's device; live: how many columns SDPA looks at, max(lengths) + 1 or more, passed
        in to avoid a device sync."""
        self.cache, self.positions, self.live = cache, lengths, live
        self.rows = torch.arange(len(lengths), device=lengths.device)
        if not use_flash(cache.k):
            columns = torch.arange(live, device=lengths.device)
            mask = columns <= lengths[:, None]  # (B, live)
            if window is not None:
                mask &= columns > lengths[:, None] - window
            self.mask = mask[:, None, None, :]  # (B, 1, 1, live), for SDPA

    def attend(self, layer, q, k, v, window):
        """q (B, H, D), k and v (B, Hkv, D) -> (B, H, D)."""
        B, H, D = q.shape
        keys, values = self.cache.k[layer][:B], self.cache.v[layer][:B]  # (B, T, Hkv, D)
        if use_flash(q):
            return flash_attn_with_kvcache(
                q[:, None],
                keys,
                values,
                k[:, None],
                v[:, None],
                cache_seqlens=self.positions.int(),
                causal=True,
                window_size=window_size(window),
            )[:, 0]
        if kernels.ready(q, flags=kernels.attention_flags(D, H // k.shape[1])):
            return kernels.attend(q, k, v, keys, values, self.positions, window)
        keys[self.rows, self.positions] = k
        values[self.rows, self.positions] = v
        keys, values = (
            x[:, : self.live].transpose(1, 2) for x in (keys, values)
        )  # (B, Hkv, live, D), views
        # The heads of a group share keys and values: passed as G queries of one head, nothing is copied for GQA.
        q = q.view(B, -1, H // k.shape[1], D)  # (B, Hkv, G, D)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask).reshape(B, H, D)


# ---------------------------------------------------------------------------------------------- modules


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        if kernels.ready(x):
            return kernels.rms_norm(x, self.weight, self.eps)
        x32 = x.float()  # squares of bf16 activations lose too much
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on x (N, H, D) with cos, sin (N, 1, D/2) in fp32; pairs are (i, i + D/2), as in HF checkpoints."""
    if kernels.ready(x):
        return kernels.rotate(x, cos, sin)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.head_dim, config.sliding_window
        C, H, Hkv, D = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = Linear(C, H * D)
        self.k_proj = Linear(C, Hkv * D)
        self.v_proj = Linear(C, Hkv * D)
        self.o_proj = Linear(H * D, C)

    def project(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x, cos, sin, context):
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)) for y in self.project(x)
        )  # (N, H or Hkv, D)
        y = context.attend(
            self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v, self.window
        )  # (N, H, D)
        return self.o_proj(y.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        C, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, hidden)
        self.up_proj = Linear(C, hidden)
        self.down_proj = Linear(hidden, C)

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(
            kernels.swiglu(gate, up) if kernels.ready(gate) else F.silu(gate) * up
        )


class Block(nn.Module):
    recompute = (
        False  # activation checkpointing: about a third more compute for memory of one x a layer
    )

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
        if self.recompute and torch.is_grad_enabled():
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
    """A decoder with a language-model head, or a reward head `score` where config.labels says so."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.frequencies = config, rope_frequencies(config)
        self.model = Decoder(config)
        if config.labels:
            self.score = Linear(config.hidden_size, config.labels)
        elif not config.tied:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(self, tokens, context, select, targets=None):
        """Run the head only where it is wanted.

        tokens (N,) int64; context: Packed, Prefill or Decode; select (M,) int64: indices into the N tokens.
        Without targets: logits (M, V), or scores (M, labels). With targets (M,): fp32 log-probs (M,) of those tokens;
        the (M, V) matrix is never held in whole, in the backward pass neither.
        """
        if self.frequencies.device != tokens.device:
            self.frequencies = self.frequencies.to(tokens.device)
        spent.update(tokens=len(tokens), flop=self.flop(len(tokens), len(select)))
        angles = context.positions[:, None].float() * self.frequencies  # (N, D/2)
        x = self.model(tokens, angles.cos()[:, None], angles.sin()[:, None], context)[
            select
        ]  # (M, C)
        if targets is not None:
            return TokenLogps.apply(x, self.head.weight, targets)
        return (
            F.linear(x, self.head.weight) if isinstance(self.head, nn.Embedding) else self.head(x)
        )

    def flop(self, tokens: int, heads: int) -> int:
        """Of a forward pass: 2 for each weight of a matmul and token, the head's where it runs; attention is left out."""
        c = self.config
        attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
        layers = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
        return 2 * (layers * tokens + (c.labels or c.vocab_size) * c.hidden_size * heads)

    @property
    def head(self) -> nn.Module:
        """What makes logits or scores: a head of its own, or the embedding where the two are tied."""
        return (
            self.score if self.config.labels else getattr(self, "lm_head", self.model.embed_tokens)
        )


class TokenLogps(torch.autograd.Function):
    """log softmax(x @ weight.T)[targets] in fp32: x (M, C), weight (V, C), targets (M,) -> (M,).

    In chunks, each computed again in the backward pass: peak memory is (chunk, V) instead of (M, V), for one more head
    matmul.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx, x, weight, targets):
        pieces = [
            TokenLogps.logps(F.linear(x1, weight), t1)
            for x1, t1 in zip(
                x.split(TokenLogps.CHUNK), targets.split(TokenLogps.CHUNK), strict=True
            )
        ]
        logps, lse = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        ctx.save_for_backward(x, weight, targets, lse)
        return logps

    @staticmethod
    def backward(ctx, dlogps):
        x, weight, targets, lse = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        for start in range(0, len(x), TokenLogps.CHUNK):
            piece = slice(start, start + TokenLogps.CHUNK)
            dlogits = TokenLogps.gradient(
                F.linear(x[piece], weight), dlogps[piece], lse[piece], targets[piece]
            )  # (chunk, V)
            torch.mm(dlogits, weight, out=dx[piece])
            dweight.addmm_(dlogits.T, x[piece])
        return dx, dweight, None

    @staticmethod
    def logps(logits, targets):
        """Log-probs of targets, and the log of each row's sum of exponentials."""
        if kernels.ready(logits):
            return kernels.token_logps(logits, targets)
        logits = logits.float()
        lse = logits.logsumexp(1)
        return logits.gather(1, targets[:, None])[:, 0] - lse, lse

    @staticmethod
    def gradient(logits, dlogps, lse, targets):
        """d loss / d logits = dlogps * (onehot(targets) - softmax(logits))."""
        if kernels.ready(logits):
            return kernels.token_logps_backward(logits, dlogps.contiguous(), lse, targets)
        d = (logits.float() - lse[:, None]).exp_().mul_(-dlogps[:, None])
        d[torch.arange(len(d), device=d.device), targets] += dlogps
        return d.to(logits.dtype)


# ---------------------------------------------------------------------------------------------- checkpoints


class Weights:
    """The tensors of a checkpoint directory, by name; a sharded one is read through its index."""

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            self.file_of = {
                name: directory / file for name, file in load_json(index)["weight_map"].items()
            }
        else:
            self.file_of = dict.fromkeys(
                self._open(directory / "model.safetensors").keys(), directory / "model.safetensors"
            )
        self.handles = {path: self._open(path) for path in set(self.file_of.values())}

    @staticmethod
    def _open(path: Path):
        if not path.is_file():
            raise InputError(
                f"{path}: missing; complete the checkpoint (weights are read from safetensors only)"
            )
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise InputError(
                f"{path}: not a readable safetensors file ({error}); download it again"
            ) from None

    def slice(self, name: str):
        """A lazy view of a tensor: shape by .get_shape(), parts by indexing, nothing else is read."""
        return self.handles[self.file_of[name]].get_slice(name)


@torch.no_grad()
def fill(model: Model, directory: str | Path) -> None:
    """Copy a checkpoint into the model's parameters, whole or sharded; each process reads only its own slices.

    Raises InputError unless names and shapes agree exactly (a tied head and old RoPE buffers may be left over).
    """
    weights = Weights(directory)
    parameters = dict(model.named_parameters())
    spare = {name for name in weights.file_of if name.endswith("rotary_emb.inv_freq")}
    if model.config.tied:
        spare.add("lm_head.weight")
    wrong = sorted(parameters.keys() ^ (weights.file_of.keys() - spare))
    if wrong:
        raise InputError(
            f"{directory}: its tensors do not match config.json; first of {len(wrong)} missing or "
            f"unexpected: {wrong[0]}"
        )
    for name, parameter in parameters.items():
        source = weights.slice(name)
        if list(parameter.shape) != source.get_shape():
            raise InputError(
                f"{directory}: {name} has shape {source.get_shape()}, config.json makes it "
                f"{list(parameter.shape)}"
            )
        local, start, rows = parameter, 0, parameter.shape[0]
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            start, rows = offset[0], shape[0]
        if rows:
            local.copy_(source[start : start + rows])


def load(directory: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> Model:
    """A model for inference, every parameter in dtype."""
    with torch.device("meta"):
        model = Model(Config.load(directory)).to(dtype)
    model.to_empty(device=device)
    fill(model, directory)
    return model.eval().requires_grad_(False)


def save(
    model: Model,
    out: str | Path,
    tokenizer_from: str | Path,
    dtype: torch.dtype,
    chat_template: str,
    writer: bool = True,
    shard_bytes: int = 4 << 30,
) -> None:
    """Write an HF directory that transformers opens: config, tokenizer, chat template, safetensors in files of a size.

    Every process must call: a sharded model is gathered one parameter at a time. The `writer` holds a file's worth of them in
    the machine's memory. Each file of weights appears whole or not at all.
    """
    out, parameters, files, size = Path(out), dict(model.named_parameters()), [[]], 0
    for name, parameter in parameters.items():
        size += parameter.numel() * dtype.itemsize
        if files[-1] and size > shard_bytes:
            files.append([])
            size = parameter.numel() * dtype.itemsize
        files[-1].append(name)
    names = (
        ["model.safetensors"]
        if len(files) == 1
        else [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    )
    for path, held in zip(names, files, strict=True):
        tensors = {}
        for name in held:
            parameter = parameters[name]
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if writer:
                tensors[name] = full.detach().to(dtype).cpu().contiguous()
        if writer:
            save_file(tensors, out / f"{path}.tmp", metadata={"format": "pt"})
    if not writer:
        return
    for path in names:
        os.replace(out / f"{path}.tmp", out / path)
    (out / "model.safetensors.index.json").unlink(
        missing_ok=True
    )  # of an earlier save in other shards
    if len(files) > 1:
        weight_map = {name: path for path, held in zip(names, files, strict=True) for name in held}
        (out / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
        )
    for name in TOKENIZER_FILES:
        if (Path(tokenizer_from) / name).is_file() and out != Path(tokenizer_from):
            shutil.copy(Path(tokenizer_from) / name, out / name)
    (out / "chat_template.jinja").write_text(chat_template)
    # transformers 4 reads torch_dtype, 5 reads dtype; both are derived, so both are rewritten
    raw = {
        key: value for key, value in model.config.raw.items() if key not in ("dtype", "torch_dtype")
    }
    key = "dtype" if "rope_parameters" in raw else "torch_dtype"
    (out / "config.json").write_text(
        json.dumps({**raw, key: str(dtype).removeprefix("torch.")}, indent=2)
    )
