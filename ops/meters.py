"""What a training step's time and memory went into: numbers for the metrics, used for nothing."""

import resource

import torch

from plumbing.ranks import DEVICE, WORLD


def speed(config, sequences: list[tuple], seconds: float, peak_tflops: float) -> dict:
    """What the time of a step on sequences (ids, start of the scored ones) was used for.

    MFU (arXiv 2204.02311) only where peak_tflops, of one device, is given.
    """
    tokens = sum(len(ids) for ids, _ in sequences)
    result = {"seconds": seconds, "tokens_per_second": tokens / seconds}
    if peak_tflops:
        scored = sum(len(ids) - start for ids, start in sequences)
        # the backward pass computes gradients of inputs and of weights, a forward pass each
        flop = 3 * forward_flop(config, tokens, scored)
        result["mfu"] = flop / seconds / (WORLD * peak_tflops * 1e12)
    return {**result, "memory_gb": peak_memory()}


def forward_flop(config, tokens: int, scored: int) -> int:
    """FLOPs of a forward pass, 2 for each weight of a matmul and token; attention is left out.

    config: model.Config. The head runs on `scored` tokens only.
    """
    c = config
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    mlp = 3 * c.hidden_size * c.intermediate_size
    head = c.hidden_size * (c.num_labels or c.vocab_size)
    return 2 * (c.num_hidden_layers * (attention + mlp) * tokens + head * scored)


def peak_memory() -> float:
    """Peak memory so far in GB: of the GPU, else of the process."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
