"""Attention and the key-value cache. A model calls context.attend(); the context knows the shapes.

    Packed     training, scoring: (N,) tokens of several sequences laid end to end, no padding
    Prefill    the same, and keys and values are written to a cache
    Decode     one new token for each of B rows of the cache, rows of unequal length

Every context has `positions`, one per token, from which the model computes RoPE. The work is done
by flash-attn on a GPU where it is installed, by the functions of cpu.c on a CPU, and otherwise by
PyTorch's scaled_dot_product_attention (SDPA).
"""

import math
import os
from mmap import MAP_PRIVATE, mmap
from pathlib import Path

import torch
import torch.nn.functional as F

from ops import cpu
from plumbing.ranks import DEVICE, LOCAL_WORLD

try:
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
except ImportError:  # a CPU, or a GPU without the package
    flash_attn_varlen_func = None
    flash_attn_with_kvcache = None


def use_flash(x: torch.Tensor) -> bool:
    """Whether flash-attn takes x: installed, on a GPU, and a half-precision dtype."""
    return flash_attn_varlen_func is not None and x.is_cuda and x.dtype != torch.float32


def window_size(window: int | None) -> tuple[int, int]:
    """(left, right) as flash-attn counts a window; Mistral's counts the token itself too."""
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
        return attend_packed(q, k, v, self.starts, window)


@cpu.compiled(cpu.attend_packed)
def attend_packed(q, k, v, starts, window: int | None):
    """Packed.attend in plain PyTorch, one call a sequence: one mask for all would cost (N, N)."""
    outputs = []
    pieces = [x.split(starts.diff().tolist()) for x in (q, k, v)]
    for sequence in zip(*pieces, strict=True):
        q1, k1, v1 = (x.transpose(0, 1)[None] for x in sequence)  # (1, H or Hkv, T, D)
        T = q1.shape[2]
        mask = None
        if window is not None and T > window:
            everything = torch.ones(T, T, dtype=torch.bool, device=q.device)
            mask = everything.tril().triu(1 - window)
        out = F.scaled_dot_product_attention(
            q1, k1, v1, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))  # (T, H, D)
    return torch.cat(outputs)


def memory() -> int:
    """Bytes of memory for each process: of its GPU, else its share of the machine or container."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_properties(DEVICE).total_memory
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip() != "max":
        total = min(total, int(limit.read_text()))
    return total // LOCAL_WORLD


class Cache:
    """Keys and values of B rows of at most T tokens: k and v are (L, B, T, Hkv, D).

    Costs 4 * L * B * T * Hkv * D bytes in bf16. config: a model's Config.
    """

    def __init__(self, config, rows: int, tokens: int, dtype: torch.dtype, device="cpu"):
        shape = (
            config.num_hidden_layers,
            rows,
            tokens,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.k = zeros(shape, dtype, torch.device(device))
        self.v = zeros(shape, dtype, torch.device(device))

    @staticmethod
    def row_bytes(config, tokens: int, dtype: torch.dtype) -> int:
        """Memory of one row of `tokens` tokens."""
        width = config.num_key_value_heads * config.head_dim
        return 2 * config.num_hidden_layers * tokens * width * dtype.itemsize

    @staticmethod
    def most_rows(model, tokens: int) -> int:
        """How many rows fit in half of the memory that the model's weights leave; at least 1."""
        weights = list(model.parameters())
        free = memory() - sum(p.numel() * p.element_size() for p in weights)
        return max(1, free // 2 // Cache.row_bytes(model.config, tokens, weights[0].dtype))

    def move_row(self, source: int, target: int, tokens: int) -> None:
        """Copy one row's tokens over another row, so that the rows in use stay a prefix."""
        for x in (self.k, self.v):
            x[:, target, :tokens] = x[:, source, :tokens]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, not empty: SDPA multiplies what it masks by 0, and 0 * NaN of stale memory is NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # fresh pages of the system are zeros, and take no memory before a token is written to them
    pages = mmap(-1, math.prod(shape) * dtype.itemsize, MAP_PRIVATE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class Prefill(Packed):
    """A packed forward that also writes sequence i's keys and values to cache row rows[i]."""

    def __init__(self, cache: Cache, rows: list[int], lengths: list[int], device="cpu"):
        super().__init__(lengths, device)
        self.cache = cache
        token_rows = torch.tensor(rows).repeat_interleave(torch.tensor(lengths))
        self.token_rows = token_rows.to(device)  # (N,)

    def attend(self, layer: int, q, k, v, window: int | None):
        self.cache.k[layer][self.token_rows, self.positions] = k
        self.cache.v[layer][self.token_rows, self.positions] = v
        return super().attend(layer, q, k, v, window)


class Decode:
    """One new token for each of the first B rows of the cache.

    lengths (B,) int64 on the cache's device: the tokens that each row holds already. live: how many
    columns SDPA reads, at least max(lengths) + 1; an argument, as computing it would sync a GPU.
    """

    def __init__(self, cache: Cache, lengths: torch.Tensor, live: int, window: int | None):
        T = cache.k.shape[2]
        assert live <= T, f"{live} tokens do not fit in a cache of {T}"
        self.cache = cache
        self.positions = lengths
        self.live = live
        self.rows = torch.arange(len(lengths), device=lengths.device)
        if not use_flash(cache.k):
            columns = torch.arange(live, device=lengths.device)
            mask = columns <= lengths[:, None]  # (B, live)
            if window is not None:
                mask &= columns > lengths[:, None] - window
            self.mask = mask[:, None, None, :]  # (B, 1, 1, live)

    def attend(self, layer: int, q, k, v, window: int | None):
        """q (B, H, D), k and v (B, Hkv, D) -> (B, H, D); k and v are written to the cache."""
        B = len(q)
        keys = self.cache.k[layer][:B]  # (B, T, Hkv, D)
        values = self.cache.v[layer][:B]
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
        out = cpu.attend(q, k, v, keys, values, self.positions, window)
        if out is NotImplemented:
            return self.sdpa(q, k, v, keys, values)
        return out

    def sdpa(self, q, k, v, keys, values):
        """The same in plain PyTorch, over the first `live` columns."""
        B, H, D = q.shape
        Hkv = k.shape[1]
        keys[self.rows, self.positions] = k
        values[self.rows, self.positions] = v
        keys = keys[:, : self.live].transpose(1, 2)  # (B, Hkv, live, D), a view
        values = values[:, : self.live].transpose(1, 2)
        # heads of a group share keys and values: as H / Hkv queries of one head, nothing is copied
        q = q.view(B, Hkv, H // Hkv, D)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)
        return out.reshape(B, H, D)
