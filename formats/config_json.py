"""config.json of a checkpoint: which families and settings are supported, and what they mean.

As transformers 4 or 5 writes it. Refused by name: architectures of other families than those of
FAMILIES, RoPE types other than default and llama3, biases beside Qwen2's, a window on some layers
only, quantised weights, attention dropout.
"""

import math
from pathlib import Path
from typing import NamedTuple

from plumbing.files import InputError


class Family(NamedTuple):
    """What sets a family apart from Llama; model.py knows the switches, and no family."""

    defaults: dict  # transformers' own, for what a config.json leaves out
    qkv_bias: bool = False
    qk_norm: bool = False
    use_sliding_window: tuple = (False,)  # what a config.json may say; the first is the default


MISTRAL = {"sliding_window": 4096, "max_window_layers": 0}
QWEN = {"sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {
    "Llama": Family({}),
    "Mistral": Family(MISTRAL, use_sliding_window=(True,)),
    "Qwen2": Family(QWEN, qkv_bias=True, use_sliding_window=(False, True)),  # and Qwen2.5
    "Qwen3": Family({**QWEN, "head_dim": 128}, qk_norm=True, use_sliding_window=(False, True)),
}
ARCHITECTURES = [
    f"{family}For{head}" for family in FAMILIES for head in ("CausalLM", "SequenceClassification")
]
# Settings with one supported value. Any other changes the computation, so it must not be ignored.
SUPPORTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (None,),
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
REQUIRED_LLAMA3 = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def read_settings(raw: dict, path: str | Path) -> dict:
    """The fields of model.Config, but for `raw`; InputError on anything unsupported."""
    # refuse what this implementation would compute wrongly
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise InputError(f"{path}: architecture {architecture} is not supported; use {supported}")
    family = FAMILIES[architecture.partition("For")[0]]
    supported = {**SUPPORTED, "use_sliding_window": family.use_sliding_window}
    for name, allowed in supported.items():
        if name in raw and raw[name] not in allowed:
            expected = f"only {allowed[0]!r} is"
            raise InputError(f"{path}: {name} = {raw[name]!r} is not supported, {expected}")
    require(raw, (*REQUIRED, "max_position_embeddings"), path)

    # defaults of transformers, for what a config.json may leave out
    settings = {"use_sliding_window": family.use_sliding_window[0], **family.defaults, **raw}
    heads = raw["num_attention_heads"]
    num_labels = 0
    if architecture.endswith("Classification"):
        num_labels = len(raw.get("id2label") or ()) or raw.get("num_labels") or 2
    return {
        **{name: raw[name] for name in REQUIRED},
        "num_key_value_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": settings.get("head_dim") or raw["hidden_size"] // heads,
        "rms_norm_eps": norm_epsilon(raw, path),
        "rope": rope_settings(raw, path),
        "max_positions": raw["max_position_embeddings"],
        "sliding_window": sliding_window(settings, path),
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "tied": raw.get("tie_word_embeddings", False),
        "num_labels": num_labels,
    }


def require(settings: dict, names: tuple[str, ...], path) -> None:
    for name in names:
        if settings.get(name) is None:
            raise InputError(f"{path}: {name} is missing; complete the config")


def norm_epsilon(raw: dict, path) -> float:
    """rms_norm_eps as a float: a 0 would divide by zero wherever a row is all zeros."""
    value = raw.get("rms_norm_eps", 1e-6)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise InputError(
            f"{path}: rms_norm_eps must be a positive number, got {value!r}; correct it (the "
            "default is 1e-6)"
        )
    return float(value)


def rope_settings(raw: dict, path) -> dict:
    """RoPE's settings in one dict: rope_type, rope_theta and those of llama3.

    transformers 5 writes all of them to rope_parameters; transformers 4 has rope_theta beside an
    optional rope_scaling.
    """
    rope = {"rope_theta": raw.get("rope_theta", 10000.0)}
    rope.update(raw.get("rope_scaling") or {})
    rope.update(raw.get("rope_parameters") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        supported = "rope_type default and llama3 are"
        raise InputError(f"{path}: RoPE {rope} is not supported; {supported}")
    if rope["rope_type"] == "llama3":
        require(rope, REQUIRED_LLAMA3, path)
    return rope


def sliding_window(settings: dict, path) -> int | None:
    """The window of all layers, or None."""
    window = settings.get("sliding_window")
    if not window or not settings["use_sliding_window"]:
        return None
    # transformers 5 names every layer's kind; 4 says how many layers have no window
    layers = settings["num_hidden_layers"]
    full = min(settings["max_window_layers"], layers)
    kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    kinds = set(settings.get("layer_types") or kinds)
    if len(kinds) > 1:
        raise InputError(
            f"{path}: a sliding window on some layers only is not supported (layer_types, "
            "max_window_layers); use another model"
        )
    return window if kinds == {"sliding_attention"} else None
