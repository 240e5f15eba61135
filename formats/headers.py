"""What the headers of a checkpoint's weights say: which file has a tensor, and its shape."""

import re
from pathlib import Path

from plumbing.files import InputError, load_json

LAYER = r"model\.layers\.(\d+)\."


def read_index(index: Path) -> dict[str, Path]:
    """Tensor -> file, by its path from the index."""
    content = load_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    try:
        return {name: index.parent / file for name, file in weight_map.items()}
    except (AttributeError, TypeError):
        problem = "its weight_map must be an object {tensor: file}"
        raise InputError(f"{index}: {problem}; download it again") from None


def check_sizes(config, weights, directory: Path) -> None:
    """Compare sizes of a model.Config with the headers of a checkpoint.Weights, before anything of
    such a size is made.
    """
    found = {match[1] for name in weights.file_of if (match := re.match(LAYER, name))}
    if len(found) != config.num_hidden_layers:
        problem = f"weights of {len(found)} layers, config.json makes it {config.num_hidden_layers}"
        raise InputError(f"{directory}: {problem}")
    head = config.head_dim
    for name, rows in {
        "embed_tokens": config.vocab_size,
        "layers.0.mlp.gate_proj": config.intermediate_size,
        "layers.0.self_attn.q_proj": config.num_attention_heads * head,
        "layers.0.self_attn.k_proj": config.num_key_value_heads * head,
    }.items():
        if (name := f"model.{name}.weight") in weights.file_of:
            check_shape(weights, name, [rows, config.hidden_size], directory)


def check_shape(weights, name: str, expected: list[int], directory) -> None:
    shape = weights.slice(name).get_shape()
    if shape != expected:
        raise InputError(f"{directory}: {name} has shape {shape}, config.json makes it {expected}")
