"""Hugging Face checkpoint directories: find one, load config and weights, save.

formats/config_json.py says which families and settings are supported. Weights are read from
safetensors only.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Shard

from formats.config_json import read_settings
from formats.headers import check_shape, check_sizes, read_index
from model import Config, Model
from ops.cpu import tell_of_slow_bf16
from plumbing.files import InputError, load_json, write_json, write_text, writing
from plumbing.ranks import print0

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of several files; ignored beside a single one


class Checkpoint(type(Path())):
    """The path of a checkpoint directory. On a command line: or a Hub id (owner/name)."""

    @classmethod
    def from_text(cls, text: str) -> "Checkpoint":
        """A directory as given; a Hub id is downloaded to the Hub's cache."""
        refuse_adapter(Path(text))
        if Path(text).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
            return cls(text)
        try:
            # README.md names the licence, for the cards of what is trained from it
            files = ["*.json", "*.safetensors", "*.jinja", "README.md"]
            return cls(snapshot_download(text, allow_patterns=files))
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            problem = "not a directory, and not downloadable from the Hub"
            raise InputError(f"{text}: {problem} ({reason}); check the name") from None


# ---------------------------------------------------------------------------------- configuration


def refuse_adapter(directory: Path) -> None:
    """Of a LoRA adapter there is neither a config.json nor, often, a tokenizer."""
    has_config = (directory / "config.json").is_file()
    if (directory / "adapter_config.json").is_file() and not has_config:
        raise InputError(
            f"{directory}: an adapter: merge it into its base model first (peft: merge_and_unload)"
        )


def load_config(directory: str | Path) -> Config:
    """Read config.json as transformers 4 or 5 writes it; InputError on anything unsupported."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        refuse_adapter(path.parent)
        raise InputError(
            f"{directory}: not a checkpoint directory (no config.json); give the directory that "
            "holds config.json, *.safetensors and tokenizer.json"
        )
    raw = load_json(path)
    config = parse_config(raw, path)
    if config.num_labels and not (raw.get("id2label") or raw.get("num_labels")):
        # two outputs is only the default of transformers: the head itself knows better
        weights = Weights(directory)
        if "score.weight" in weights.file_of:
            raw["num_labels"] = weights.slice("score.weight").get_shape()[0]
            config = parse_config(raw, path)
    if any((path.parent / name).is_file() for name in (SINGLE, INDEX)):
        check_sizes(config, Weights(directory), path.parent)
    return config


def parse_config(raw: dict, path: str | Path = "config.json") -> Config:
    """Check and convert the content of a config.json; `path` names it in errors."""
    return Config(**read_settings(raw, path), raw=raw)


# ---------------------------------------------------------------------------------- loading


class Weights:
    """The tensors of a checkpoint directory by name; several files are read through their index."""

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        index = directory / INDEX
        path = directory / SINGLE
        if index.is_file() and not path.is_file():
            self.file_of = read_index(index)
        else:
            self.file_of = dict.fromkeys(self.open(path).keys(), path)
            if index.is_file():
                print0(f"{index}: ignored, as by transformers: {SINGLE} is beside it")
        self.handles = {path: self.open(path) for path in set(self.file_of.values())}

    @staticmethod
    def open(path: Path):
        if not path.is_file():
            raise InputError(
                f"{path}: missing; complete the checkpoint (only safetensors are read)"
            )
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            problem = f"not a readable safetensors file ({error})"
            raise InputError(f"{path}: {problem}; download it again") from None

    def slice(self, name: str):
        """A lazy view of a tensor: get_shape(), and indexing, which reads that part of the file."""
        return self.handles[self.file_of[name]].get_slice(name)


@torch.no_grad()
def load_weights(model: Model, directory: str | Path) -> None:
    """Copy a checkpoint into a model's parameters; a rank of a sharded model reads its rows only.

    Raises InputError unless names and shapes agree exactly.
    """
    weights = Weights(directory)
    check_names(model, weights, directory)
    for name, parameter in model.named_parameters():
        source = weights.slice(name)
        check_shape(weights, name, list(parameter.shape), directory)
        local, rows = local_rows(parameter)
        if rows.start < rows.stop:
            values = source[rows]
            local.copy_(values)
            if not (values.is_floating_point() and local.isfinite().all()):
                raise InputError(
                    f"{weights.file_of[name]}: {name} ({values.dtype}) must hold floats, no NaN "
                    "and no infinity; download it again, or convert it"
                )


def check_names(model: Model, weights: Weights, directory) -> None:
    """Names must agree; the file may also hold a tied model's head, and tables of positions."""
    tables = ("rotary_emb.inv_freq", "embeddings.position_ids")  # old transformers wrote these
    spare = {name for name in weights.file_of if name.endswith(tables)}
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight"
    if model.config.tied:
        spare.add(head)
    expected = dict(model.named_parameters()).keys()
    wrong = sorted(expected ^ (weights.file_of.keys() - spare))
    if wrong:
        raise InputError(
            f"{directory}: its tensors do not match config.json; first of {len(wrong)} missing or "
            f"unexpected: {wrong[0]}"
        )
    # a tied head that was trained apart; a reward model does without either
    if head in spare & weights.file_of.keys() and not model.config.num_labels:
        if not torch.equal(weights.slice(head)[:], weights.slice(embedding)[:]):
            raise InputError(
                f"{directory}: {head} differs from {embedding}, but config.json ties them; set "
                "tie_word_embeddings there to false"
            )


def local_rows(parameter: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """This rank's part of a parameter, and which rows of the whole it holds (maybe none).

    FSDP2 splits rows as torch.chunk does: ceil(rows / ranks) for each rank in order, until none are
    left. Over several nodes the placements are [Replicate, Shard(0)]: every node holds all rows.
    """
    if not isinstance(parameter, DTensor):
        return parameter, slice(0, len(parameter))
    rows = len(parameter)
    start = 0
    stop = rows
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        assert placement == Shard(0), f"only rows may be sharded, not {placement}"
        mesh = parameter.device_mesh
        chunk = -(-rows // mesh.size(dimension))
        start = min(mesh.get_local_rank(dimension) * chunk, rows)
        stop = min(start + chunk, rows)
    local = parameter.to_local()
    assert len(local) == stop - start, f"{len(local)} rows here, expected {stop - start}"
    return local, slice(start, stop)


def load(directory: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> Model:
    """A model for inference: every parameter in dtype, none of them trained."""
    tell_of_slow_bf16(dtype)
    with torch.device("meta"):
        model = Model(load_config(directory)).to(dtype)
    model.to_empty(device=device)
    load_weights(model, directory)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------- saving


def save(
    model: Model,
    out: str | Path,
    tokenizer_from: str | Path,
    dtype: torch.dtype,
    chat_template: str,
    writer: bool = True,
    shard_bytes: int = 4 << 30,
) -> None:
    """Write a directory that transformers opens: config, tokenizer, chat template, weights.

    Every rank must call, as a sharded model is gathered one parameter at a time; only the `writer`
    keeps what it gathers, at most shard_bytes, and writes files, each whole or not at all.
    """
    out = Path(out)
    sizes = {}
    for name, parameter in model.named_parameters():
        sizes[name] = torch.empty(parameter.shape, dtype=dtype, device="meta")
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=shard_bytes)

    # gather the parameters of one file after the other, and write each beside its final name
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            full = model.get_parameter(name)
            if isinstance(full, DTensor):
                full = full.full_tensor()
            if writer:
                tensors[name] = full.detach().to(dtype).cpu().contiguous()
        if writer:
            with writing(out / file, SafetensorError):
                save_file(tensors, out / f"{file}.tmp", metadata={"format": "pt"})
    if not writer:
        return

    name_files(out, split)

    # the rest of the directory
    for name in TOKENIZER_FILES:
        source = Path(tokenizer_from) / name
        if source.is_file() and out != Path(tokenizer_from):
            with writing(out / name):
                shutil.copy(source, out / name)
    write_text(out / "chat_template.jinja", chat_template)
    write_text(out / "config.json", json.dumps(saved_config(model.config.raw, dtype), indent=2))


def name_files(out: Path, split) -> None:
    """All files are there: give them their names; an index of an earlier save must not survive."""
    for file in split.filename_to_tensors:
        os.replace(out / f"{file}.tmp", out / file)
    (out / INDEX).unlink(missing_ok=True)
    if split.is_sharded:
        (out / SINGLE).unlink(missing_ok=True)  # of an earlier save too: it would hide the index
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(out / INDEX, index)


def saved_config(raw: dict, dtype: torch.dtype) -> dict:
    """config.json as it was read, but for the dtype: transformers 4 reads torch_dtype, 5 dtype."""
    config = {key: value for key, value in raw.items() if key not in ("dtype", "torch_dtype")}
    key = "dtype" if "rope_parameters" in raw else "torch_dtype"
    return {**config, key: str(dtype).removeprefix("torch.")}
