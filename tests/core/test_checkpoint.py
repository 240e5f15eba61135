"""Checkpoint directories: save and load, here and in transformers, over ranks; what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    ROOT,
    SPECIALS,
    TEMPLATE,
    llama_config,
    random_model,
    run,
    tiny_checkpoint,
)
from safetensors.torch import load_file, save_file
from test_model import LLAMA3, MISTRAL, ours, their_logits, theirs, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from checkpoint import load, load_config, local_rows, parse_config, save
from formats.chat import Chat
from formats.headers import read_index
from plumbing.files import InputError

V5_DEFAULT = {
    "rope_theta": None,
    "dtype": "float32",
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
}


def names_in(path: Path) -> dict[str, torch.Size]:
    """Shapes of the tensors of a file, or of a directory's files."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return {name: t.shape for file in files for name, t in load_file(file).items()}


def assert_equal_weights(model, reference) -> None:
    """Every parameter of two models, to the bit."""
    mine = dict(model.named_parameters())
    other = dict(reference.named_parameters())
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


# ------------------------------------------------------------------------------- save and load


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shard_bytes", "tied"), [(4 << 30, False), (20_000, False), (20_000, True)]
)
def test_saved_model_is_the_same_here_and_in_transformers(tmp_path, shard_bytes, tied):
    source = tiny_checkpoint(tmp_path / "source", tie_word_embeddings=tied)
    out = tmp_path / "out"
    out.mkdir()
    model = load(source, torch.float32)
    save(model, out, source, torch.float32, TEMPLATE, shard_bytes=shard_bytes)
    assert_equal_weights(load(out, torch.float32), model)
    assert_equal_weights(theirs(out), theirs(source))
    assert (ours(model, tokens(30)) - their_logits(out, tokens(30))).abs().max() < 1e-4
    assert names_in(out) == names_in(source)
    assert ("lm_head.weight" in names_in(out)) == (not tied)
    assert not list(out.glob("*.tmp"))
    assert (out / "model.safetensors.index.json").is_file() == (shard_bytes == 20_000)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE


def test_files_of_weights_are_as_large_as_asked(tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    save(load(source, torch.float32), out, source, torch.float32, TEMPLATE, shard_bytes=20_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [[4 * shape.numel() for shape in names_in(file).values()] for file in files]
    assert all(len(held) == 1 or sum(held) <= 20_000 for held in sizes)
    assert max(map(len, sizes)) > 1 and any(len(held) > 1 for held in sizes[2:])


@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_in_shards_loads_here(tmp_path, tied):
    source = tiny_checkpoint(tmp_path / "source", tie_word_embeddings=tied, rope_scaling=LLAMA3)
    out = tmp_path / "out"
    theirs(source).save_pretrained(out, max_shard_size="20KB")
    assert len(list(out.glob("*.safetensors"))) > 3
    assert "rope_parameters" in json.loads((out / "config.json").read_text())  # transformers 5
    assert_equal_weights(load(out, torch.float32), load(source, torch.float32))
    difference = ours(load(out, torch.float32), tokens(30)) - their_logits(source, tokens(30))
    assert difference.abs().max() < 1e-4


def test_a_tied_checkpoint_may_hold_its_head_twice(tmp_path):
    directory = tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    expected = load(directory, torch.float32)
    tensors = load_file(directory / "model.safetensors")
    tensors |= {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file(tensors, directory / "model.safetensors")
    assert_equal_weights(load(directory, torch.float32), expected)


@pytest.mark.parametrize(("changes", "key"), [({}, "torch_dtype"), (V5_DEFAULT, "dtype")])
def test_saved_config_is_the_one_read_but_for_the_dtype(tmp_path, changes, key):
    source = tiny_checkpoint(tmp_path / "source", **changes, an_unknown_key=[1, {"a": None}])
    out = tmp_path / "out"
    out.mkdir()
    save(load(source, torch.float32), out, source, torch.bfloat16, TEMPLATE)
    before = json.loads((source / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    kept = {name: value for name, value in before.items() if name != "torch_dtype"}
    assert after == {**kept, key: "bfloat16"}
    assert theirs(out, dtype="auto").dtype == torch.bfloat16


def test_saving_again_in_one_file_leaves_no_old_index(tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    other = random_model(llama_config(), seed=5)
    save(other, out, source, torch.float32, TEMPLATE, shard_bytes=20_000)
    save(load(source, torch.float32), out, source, torch.float32, TEMPLATE)
    assert_equal_weights(load(out, torch.float32), load(source, torch.float32))


def test_mistral_without_a_word_about_its_window_has_transformers_default():
    raw = llama_config(**MISTRAL)
    del raw["torch_dtype"]
    assert "sliding_window" not in raw
    default = transformers.MistralConfig(**raw).sliding_window
    assert parse_config(raw).sliding_window == default == 4096


def test_the_tiny_tokenizer_is_read_alike_by_transformers(tiny):
    reference = transformers.AutoTokenizer.from_pretrained(tiny)
    talk = [{"role": "user", "content": "Écris: 日本?"}]
    expected = reference.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert Chat(tiny).prompt_ids({"messages": talk}) == list(expected)
    assert [reference.convert_tokens_to_ids(s) for s in SPECIALS] == [0, 1, 2]


# ------------------------------------------------------------------------------- over ranks

# Each rank loads a sharded model and compares what it holds, and what it read, with torch.chunk. It
# prints, for each mesh, how many parameters have no rows on some rank, and how many uneven ones.
LOAD_ON_RANKS = """
import sys
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from checkpoint import Weights, load_config, load_weights
from model import Model
from plumbing.ranks import RANK, WORLD, distributed, print0

directory = sys.argv[1]
whole = load_file(directory + "/model.safetensors")
read = {}  # parameter -> rows read from the file

class Watched:
    def __init__(self, name, source):
        self.name = name
        self.source = source
        self.get_shape = source.get_shape

    def __getitem__(self, rows):
        read[self.name] = rows.stop - rows.start
        return self.source[rows]

plain = Weights.slice
Weights.slice = lambda self, name: Watched(name, plain(self, name))

def check(nodes):
    read.clear()
    names = ("nodes", "processes")
    shape = (nodes, WORLD // nodes)
    if nodes == 1:
        names = names[1:]
        shape = shape[1:]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    with torch.device("meta"):
        model = Model(load_config(directory))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    load_weights(model, directory)
    ranks = WORLD // nodes
    for name, parameter in model.named_parameters():
        chunks = [*whole[name].chunk(ranks), *[whole[name][:0]] * ranks]
        mine = chunks[RANK % ranks]
        assert torch.equal(parameter.to_local(), mine), name
        assert read.get(name, 0) == len(mine), name
        assert torch.equal(parameter.full_tensor(), whole[name]), name
    empty = sum(len(tensor.chunk(ranks)) < ranks for tensor in whole.values())
    uneven = sum(len(tensor) % ranks > 0 for tensor in whole.values())
    print0("result", empty, uneven)

with distributed():
    for nodes in sys.argv[2:]:
        check(int(nodes))
"""


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("family", "nproc", "nodes"),
    [
        ("Llama", 1, [1]),
        ("Llama", 2, [1]),
        ("Llama", 4, [1, 2]),
        ("Qwen2", 2, [1]),
        ("Qwen3", 4, [1, 2]),
    ],
)
def test_each_rank_reads_its_own_rows_only(tmp_path, family, nproc, nodes):
    """Rows that no number of ranks divides, and a head of three rows, of which four ranks get one,
    one, one and none. Two nodes of two ranks hold all rows each.
    """
    directory = tiny_checkpoint(
        tmp_path / "model",
        architectures=[f"{family}ForSequenceClassification"],
        id2label={str(i): f"LABEL_{i}" for i in range(3)},
        vocab_size=321,
        hidden_size=50,
        intermediate_size=91,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=6,
    )
    program = tmp_path / "program.py"
    program.write_text(LOAD_ON_RANKS)
    code, out, err = run([program, directory, *nodes], {"PYTHONPATH": str(ROOT)}, nproc)
    assert code == 0, err
    results = [line.split() for line in out.splitlines() if line.startswith("result")]
    for count, (_, empty, uneven) in zip(nodes, results, strict=True):
        ranks = nproc // count
        assert (int(uneven) > 0) == (ranks > 1) and (int(empty) > 0) == (ranks == 4)


def test_a_model_sharded_by_columns_is_refused():
    whole = torch.zeros(4, 4)
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(1)])
    with pytest.raises(AssertionError, match="only rows"):
        local_rows(sharded)


# ------------------------------------------------------------------------------- refusals


def refusal(directory: Path, **changes) -> str:
    """The error about a config.json with these changes."""
    path = directory / "config.json"
    path.write_text(json.dumps(llama_config(**changes)))
    with pytest.raises(InputError) as refused:
        load_config(directory)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"architectures": ["Qwen2MoeForCausalLM"]},
            "Qwen2MoeForCausalLM is not supported; use Llama",
        ),
        ({"architectures": None}, "architecture none"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "linear"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
            "dynamic",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"intermediate_size": None}, "intermediate_size"),
    ],
)
def test_unsupported_config_is_refused_by_name(tmp_path, changes, named):
    assert named in refusal(tmp_path, **changes)


@pytest.mark.parametrize("value", [0, 0.0, -1e-6, True, False, "1e-6", [1e-6]])
def test_an_epsilon_that_is_no_positive_number_is_refused(tmp_path, value):
    """Once, 0 and true reached C as integers, where a float was expected."""
    assert "rms_norm_eps must be a positive number" in refusal(tmp_path, rms_norm_eps=value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "64"}, "hidden_size must be a whole number from 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number from 1"),
        ({"num_attention_heads": True}, "num_attention_heads must be"),
        ({"num_key_value_heads": 3}, "shared evenly"),
        ({"head_dim": 15}, "be even"),
        ({"rope_scaling": 7}, "rope_scaling must be an object"),
        ({"rope_theta": "1e4"}, "rope_theta must be a number above 0"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of texts"),
        ({"eos_token_id": "a"}, "eos_token_id must be a token id"),
        ({"vocab_size": 10**20}, "vocab_size must be a whole number from 1"),
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(tmp_path, changes, named):
    assert named in refusal(tmp_path, **changes)


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "head_dim"]
)
def test_sizes_are_compared_with_the_weights(tmp_path, name):
    directory = tiny_checkpoint(tmp_path)
    edit_config(directory, **{name: 10**9})
    with pytest.raises(InputError, match=r"config\.json makes it"):
        load_config(directory)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_of_another_shape_is_refused(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(InputError, match="its weight_map must be an object"):
        read_index(index)


def test_an_epsilon_may_be_a_whole_number_or_missing():
    epsilon = parse_config(llama_config(rms_norm_eps=1)).rms_norm_eps
    assert epsilon == 1 and type(epsilon) is float
    assert parse_config(llama_config(rms_norm_eps=None)).rms_norm_eps == 1e-6


# ------------------------------------------------------------------------------- other directories


def edit_config(directory: Path, **changes) -> None:
    """Change a config.json; None removes a key."""
    raw = {**json.loads((directory / "config.json").read_text()), **changes}
    kept = {key: value for key, value in raw.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))


def edit_tensors(directory: Path, **changes) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, **changes}, directory / "model.safetensors", metadata={"format": "pt"})


def test_an_adapter_is_refused_as_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    fix = "merge it into its base model first (peft: merge_and_unload)"
    with pytest.raises(InputError) as refused:
        load_config(tmp_path)
    assert str(refused.value) == f"{tmp_path}: an adapter: {fix}"


@pytest.mark.slow
def test_commands_refuse_an_adapter_in_one_line(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Why?"}\n')
    flags = ["--model", tmp_path, "--prompts", prompts, "--out", tmp_path / "out.jsonl"]
    code, _, err = run(["sample.py", *flags])
    assert code == 2 and "an adapter: merge it" in err and err.count("\n") == 1


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path, capsys):
    """And saving in several files must not leave an older single one to win."""
    directory = tiny_checkpoint(tmp_path / "single")
    other = random_model(llama_config(), seed=5)
    expected = load(directory, torch.float32)
    single = (directory / "model.safetensors").read_bytes()
    save(other, directory, directory, torch.float32, TEMPLATE, shard_bytes=20_000)
    assert not (directory / "model.safetensors").exists()
    assert_equal_weights(load(directory, torch.float32), other)
    assert "ignored" not in capsys.readouterr().out

    (directory / "model.safetensors").write_bytes(single)
    assert_equal_weights(load(directory, torch.float32), expected)
    assert_equal_weights(theirs(directory), expected)
    index = directory / "model.safetensors.index.json"
    assert f"{index}: ignored" in capsys.readouterr().out


def test_a_tied_head_that_differs_is_refused(tmp_path):
    """transformers warns, and keeps it beside the embedding."""
    directory = tiny_checkpoint(tmp_path / "m", tie_word_embeddings=True)
    plain = tiny_checkpoint(tmp_path / "plain", seed=1)
    head = load_file(plain / "model.safetensors")["lm_head.weight"]
    edit_tensors(directory, **{"lm_head.weight": head})
    assert torch.equal(theirs(directory).lm_head.weight, head)
    with pytest.raises(InputError, match=r"lm_head.weight differs .* set tie_word_embeddings"):
        load(directory, torch.float32)
    # what the line says to do gives what transformers computes
    expected = their_logits(directory, tokens(30))
    edit_config(directory, tie_word_embeddings=False)
    assert (ours(load(directory, torch.float32), tokens(30)) - expected).abs().max() < 1e-4


NAN = torch.full((64,), 1.0)
NAN[5] = torch.nan
INFINITE = torch.full((64,), 1.0)
INFINITE[63] = torch.inf


@pytest.mark.parametrize(
    "values", [NAN, INFINITE, -INFINITE, torch.ones(64, dtype=torch.int8), torch.ones(64) > 0]
)
def test_numbers_that_are_no_weights_are_refused_by_the_tensors_name(tmp_path, values):
    directory = tiny_checkpoint(tmp_path)
    edit_tensors(directory, **{"model.norm.weight": values})
    with pytest.raises(InputError) as refused:
        load(directory, torch.float32)
    said = str(refused.value)
    assert said.startswith(
        f"{directory}/model.safetensors: model.norm.weight ({values.dtype}) must"
    )


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda rows: {}, id="nothing"),
        pytest.param(lambda rows: {"num_labels": rows}, id="num_labels"),
        pytest.param(lambda rows: {"id2label": {str(i): "x" for i in range(rows)}}, id="id2label"),
    ],
)
def test_the_outputs_of_a_reward_model_are_named_or_those_of_its_head(tmp_path, rows, given):
    names = {str(i): f"LABEL_{i}" for i in range(rows)}
    architecture = "Qwen2ForSequenceClassification"
    directory = tiny_checkpoint(tmp_path / "m", architectures=[architecture], id2label=names)
    edit_config(directory, **{"id2label": None, **given(rows)})
    model = load(directory, torch.float32)
    assert model.config.num_labels == rows
    # and what is saved says so to transformers
    out = tmp_path / "out"
    out.mkdir()
    save(model, out, directory, torch.float32, TEMPLATE)
    assert_equal_weights(theirs(out, architecture), model)


def test_a_reward_model_without_a_head_is_refused(tmp_path):
    directory = tiny_checkpoint(tmp_path)
    edit_config(directory, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(InputError, match=r"do not match config\.json"):
        load(directory, torch.float32)


def drop_tensor(directory):
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")


def add_tensor(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(tensors, directory / "model.safetensors")


def split_and_lose_a_shard(directory):
    whole = directory / "whole"
    shutil.copytree(directory, whole)
    model = load(directory, torch.float32)
    save(model, directory, whole, torch.float32, TEMPLATE, shard_bytes=20_000)
    next(directory.glob("model-00002-of-*")).unlink()


def cut_off(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        pytest.param(lambda d: (d / "config.json").unlink(), "no config.json", id="no config"),
        pytest.param(
            lambda d: (d / "config.json").write_text('{\n"a": 1,\n}'), "line 3", id="bad config"
        ),
        pytest.param(
            lambda d: (d / "model.safetensors").unlink(),
            "model.safetensors: missing",
            id="no weights",
        ),
        pytest.param(
            lambda d: (d / "model.safetensors").write_bytes(b"\x10" + b"\0" * 40),
            "not a readable safetensors file",
            id="garbage",
        ),
        pytest.param(cut_off, "not a readable", id="cut off"),
        pytest.param(
            lambda d: (d / "config.json").write_text(
                json.dumps(llama_config(intermediate_size=95))
            ),
            "has shape [96, 64]",
            id="other shape",
        ),
        pytest.param(drop_tensor, "model.layers.1.mlp.up_proj.weight", id="less"),
        pytest.param(add_tensor, "model.layers.0.self_attn.q_proj.bias", id="more"),
        pytest.param(split_and_lose_a_shard, "model-00002-of", id="lost shard"),
    ],
)
def test_harmed_checkpoint_is_refused_in_one_line(tmp_path, harm, named):
    directory = tiny_checkpoint(tmp_path / "m")
    harm(directory)
    with pytest.raises(InputError) as refused:
        load(directory, torch.float32)
    assert named in str(refused.value) and str(directory) in str(refused.value)
    assert "\n" not in str(refused.value)
