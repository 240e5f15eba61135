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
# Kinds of values, and below the fields of each. None stands for a field that is not there.
MOST = 2**31  # sizes above are none of a model that exists, and overflow in products
KINDS = {
    "a whole number from 1": lambda v: type(v) is int and 1 <= v < MOST,
    "a whole number from 0": lambda v: type(v) is int and 0 <= v < MOST,
    "a number above 0": lambda v: type(v) in (int, float) and 0 < v < math.inf,
    "true or false": lambda v: type(v) is bool,
    "an object": lambda v: isinstance(v, dict),
    "a list of texts": lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v),
    "a token id, or several": lambda v: all(
        type(i) is int and 0 <= i < MOST for i in (v if isinstance(v, list) else [v])
    ),
}
FIELDS = {
    "a whole number from 1": (*REQUIRED, "max_position_embeddings", "num_key_value_heads"),
    "a whole number from 0": ("head_dim", "sliding_window", "max_window_layers", "num_labels"),
    "a number above 0": ("rope_theta",),
    "true or false": ("tie_word_embeddings", "use_sliding_window"),
    "an object": ("rope_scaling", "rope_parameters", "id2label"),
    "a list of texts": ("architectures", "layer_types"),
    "a token id, or several": ("eos_token_id",),
}
ROPE_FIELDS = {"a number above 0": ("rope_theta", *REQUIRED_LLAMA3)}


def read_settings(raw: dict, path: str | Path) -> dict:
    """The fields of model.Config, but for `raw`; InputError on anything unsupported."""
    # the values' kinds, and then what this implementation would compute wrongly
    if not isinstance(raw, dict):
        raise InputError(f"{path}: not an object, {{...}}; download it again")
    check_kinds(raw, FIELDS, path)
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
    groups = raw.get("num_key_value_heads") or heads
    head_dim = settings.get("head_dim") or raw["hidden_size"] // heads
    if heads % groups or head_dim < 2 or head_dim % 2:
        problem = f"{heads} heads, {groups} of keys, of {head_dim} numbers each"
        raise InputError(f"{path}: {problem}: heads must be shared evenly, and the last be even")
    num_labels = 0
    if architecture.endswith("Classification"):
        num_labels = len(raw.get("id2label") or ()) or raw.get("num_labels") or 2
    return {
        **{name: raw[name] for name in REQUIRED},
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "rms_norm_eps": norm_epsilon(raw, path),
        "rope": rope_settings(raw, path),
        "max_positions": raw["max_position_embeddings"],
        "sliding_window": sliding_window(settings, path),
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "tied": bool(raw.get("tie_word_embeddings")),
        "num_labels": num_labels,
    }


def check_kinds(settings: dict, fields: dict, path) -> None:
    """Raise InputError where a field holds another kind of value than its row in a table says."""
    for kind, names in fields.items():
        for name in names:
            value = settings.get(name)
            if value is not None and not KINDS[kind](value):
                raise InputError(f"{path}: {name} must be {kind}, got {value!r:.50}; correct it")


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
    rope = {"rope_theta": raw.get("rope_theta") or 10000.0}
    rope.update(raw.get("rope_scaling") or {})
    rope.update(raw.get("rope_parameters") or {})
    check_kinds(rope, ROPE_FIELDS, path)
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
    full = min(settings["max_window_layers"] or 0, layers)
    parts = {"full_attention": full, "sliding_attention": layers - full}
    kinds = set(settings.get("layer_types") or [kind for kind, some in parts.items() if some])
    if len(kinds) > 1:
        raise InputError(
            f"{path}: a sliding window on some layers only is not supported (layer_types, "
            "max_window_layers); use another model"
        )
    return window if kinds == {"sliding_attention"} else None
