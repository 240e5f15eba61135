"""What only measures and records: speed, memory, metrics.jsonl, and counts for people to read."""

import re
import resource
import shutil
import sys
import time
from pathlib import Path

import torch

from plumbing.files import to_json, writing
from plumbing.ranks import DEVICE, RANK, WORLD
from plumbing.stage import Stage


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
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def log(folder: Path, line: dict) -> None:
    """Append a step's metrics to folder/metrics.jsonl."""
    if RANK > 0:
        return
    short = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
    path = folder / "metrics.jsonl"
    with writing(path), open(path, "a") as file:
        print(to_json(short), file=file)


def keep_metrics(stage: Stage) -> None:
    """Copy what was logged into the result; the scratch folder stays whole until the manifest is
    written.
    """
    stage.out.mkdir(parents=True, exist_ok=True)
    with writing(stage.out):
        shutil.copy(stage.scratch / "metrics.jsonl", stage.out)


def time_left(begin: float, t: int, T: int) -> str:
    """An estimate from the iterations so far; empty before there is one."""
    if t == 1:
        return ""
    minutes = (time.time() - begin) / (t - 1) * (T - t + 1) / 60
    return f", about {minutes:.0f} min left"


def keyword_use(prompts: list[dict]) -> dict:
    """How many keywords, by their first five letters, the prompts use."""
    used = []
    for row in prompts:
        text = row["prompt"].lower()
        used.append(sum(re.search(rf"\b{word[:5]}", text) is not None for word in row["keywords"]))
    share = sum(n > 0 for n in used) / len(used)
    return {
        "use_a_keyword": round(share, 3),
        "keywords_used": round(sum(used) / len(used), 2),
    }
