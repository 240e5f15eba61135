"""The model against transformers on tiny random checkpoints, packing against one by one, save and load, refusals."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import SPECIALS, TEMPLATE, llama_config, random_model, tiny_checkpoint
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from data import InputError
from model import Cache, Config, Decode, Packed, Prefill, TokenLogps, load, rotate, save

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MISTRAL = {"architectures": ["MistralForCausalLM"]}
SCORER = {"architectures": ["LlamaForSequenceClassification"]}


def tokens(n: int, vocab: int = 320, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def ours(model, ids: torch.Tensor) -> torch.Tensor:
    """Outputs of the head at every position of one sequence, (T, V)."""
    return model(ids, Packed([len(ids)]), torch.arange(len(ids)))


def theirs(directory, architecture: str = "LlamaForCausalLM", dtype=torch.float32):
    return getattr(transformers, architecture).from_pretrained(directory, dtype=dtype).eval()


@torch.no_grad()
def their_logits(
    directory, ids, architecture: str = "LlamaForCausalLM", dtype=torch.float32
) -> torch.Tensor:
    return theirs(directory, architecture, dtype)(ids[None]).logits[0]


# ---------------------------------------------------------------------------------------------- equal to transformers


@pytest.mark.parametrize(
    ("T", "changes"),
    [
        pytest.param(40, {"num_key_value_heads": 4}, id="MHA"),
        pytest.param(40, {"num_key_value_heads": None}, id="MHA by default"),
        pytest.param(40, {}, id="GQA"),
        pytest.param(40, {"num_key_value_heads": 1}, id="one key-value head"),
        pytest.param(40, {"tie_word_embeddings": True}, id="tied"),
        pytest.param(40, {"head_dim": 32}, id="head_dim is not hidden / heads"),
        pytest.param(40, {"rms_norm_eps": 0.5}, id="epsilon"),
        pytest.param(
            300, {"rope_theta": 500000.0, "rope_scaling": LLAMA3}, id="transformers 4, llama3 RoPE"
        ),
        pytest.param(
            300,
            {
                "rope_theta": None,
                "torch_dtype": None,
                "dtype": "float32",
                "rope_parameters": {"rope_theta": 500000.0, **LLAMA3},
            },
            id="transformers 5, llama3 RoPE",
        ),
        pytest.param(
            300,
            {
                "rope_theta": None,
                "torch_dtype": None,
                "dtype": "float32",
                "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
            },
            id="transformers 5, default RoPE",
        ),
        pytest.param(40, {**MISTRAL, "sliding_window": 7}, id="Mistral, window"),
        pytest.param(40, {**MISTRAL, "sliding_window": None}, id="Mistral, no window"),
    ],
)
def test_logits_equal_transformers(tmp_path, T, changes):
    directory = tiny_checkpoint(tmp_path, **changes)
    model = load(directory, torch.float32)
    difference = ours(model, tokens(T)) - their_logits(
        directory, tokens(T), model.config.raw["architectures"][0]
    )
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({"rope_scaling": LLAMA3}, {}),
        ({"rope_theta": 500.0}, {}),
        ({"rms_norm_eps": 0.5}, {}),
        ({**MISTRAL, "sliding_window": 7}, {**MISTRAL, "sliding_window": None}),
    ],
)
def test_the_options_compared_above_matter_at_those_lengths(changes, plain):
    changed, unchanged = (
        ours(random_model(llama_config(**c)), tokens(300)) for c in (changes, plain)
    )
    assert (changed - unchanged).abs().max() > 0.1


def test_mistral_without_a_word_about_its_window_has_transformers_default():
    raw = llama_config(**MISTRAL)
    del raw["torch_dtype"]
    assert "sliding_window" not in raw
    assert (
        Config.parse(raw).sliding_window == transformers.MistralConfig(**raw).sliding_window == 4096
    )


@pytest.mark.parametrize(
    ("labels", "architecture"),
    [
        (1, "LlamaForSequenceClassification"),
        (None, "LlamaForSequenceClassification"),
        (3, "MistralForSequenceClassification"),
    ],
)
def test_reward_head_equals_transformers(tmp_path, labels, architecture):
    """None: a config without id2label, which transformers leaves out for its default of two labels."""
    names = labels and {str(i): f"LABEL_{i}" for i in range(labels)}
    directory = tiny_checkpoint(
        tmp_path,
        architectures=[architecture],
        id2label=names,
        label2id=labels and {f"LABEL_{i}": i for i in range(labels)},
        pad_token_id=0,
    )
    model, reference = load(directory, torch.float32), theirs(directory, architecture)
    sequences = [tokens(n, 319, n) + 1 for n in (9, 3, 17)]  # no pad token inside
    context = Packed([len(s) for s in sequences])
    with torch.no_grad():
        scores = model(torch.cat(sequences), context, context.last)  # (S, labels)
        expected = torch.cat([reference(s[None]).logits for s in sequences])
    assert scores.shape == expected.shape == (3, labels or 2)
    assert (scores - expected).abs().max() < 1e-4


def test_smollm2_equals_transformers(smollm2):
    ids = torch.tensor(
        transformers.AutoTokenizer.from_pretrained(smollm2)(
            "<|im_start|>user\nName three rivers of France.<|im_end|>\n<|im_start|>assistant\n"
        ).input_ids
    )
    logits, expected = ours(load(smollm2, torch.float32), ids), their_logits(smollm2, ids)
    assert (logits - expected).abs().max() < 2e-3  # logits of size 30
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


# ---------------------------------------------------------------------------------------------- packed and cached


@pytest.mark.parametrize("changes", [{}, {**MISTRAL, "sliding_window": 5}])
def test_packed_sequences_do_not_see_each_other(changes):
    model = random_model(llama_config(**changes))
    sequences = [tokens(n, seed=n) for n in (13, 1, 40, 2, 7)]
    packed = Packed([len(s) for s in sequences])
    assert packed.positions.tolist() == [i for s in sequences for i in range(len(s))]
    with torch.no_grad():
        together = model(torch.cat(sequences), packed, torch.arange(63))
        alone = torch.cat([ours(model, s) for s in sequences])
        chosen = model(torch.cat(sequences), packed, packed.last)
    assert (together - alone).abs().max() < 1e-4
    assert torch.allclose(chosen, torch.stack([ours(model, s)[-1] for s in sequences]), atol=1e-4)


@torch.no_grad()
def test_cached_decoding_equals_packed_with_stale_and_moved_rows():
    model = random_model(llama_config(**MISTRAL, sliding_window=6))
    sequences = [tokens(n, seed=n) for n in (9, 4, 12)]
    cache = Cache(model.config, 4, 20, torch.float32)
    for x in (cache.k, cache.v):
        x.fill_(7.0)  # what a finished answer leaves behind
    cut = [n // 2 for n in (9, 4, 12)]
    heads = torch.cat([s[:c] for s, c in zip(sequences, cut, strict=True)])
    model(heads, Prefill(cache, [3, 1, 2], cut), torch.arange(1))
    cache.move_row(3, 0, cut[0])
    for step in range(2):
        lengths = torch.tensor(cut) + step
        ids = torch.tensor([s[n] for s, n in zip(sequences, lengths, strict=True)])
        logits = model(
            ids,
            Decode(cache, lengths, int(lengths.max()) + 1, model.config.sliding_window),
            torch.arange(3),
        )
        expected = torch.stack(
            [ours(model, s[: n + 1])[-1] for s, n in zip(sequences, lengths, strict=True)]
        )
        assert (logits - expected).abs().max() < 1e-4


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = random_model(llama_config())
        for block in model.model.layers:
            block.recompute = recompute
        context = Packed([8, 4])
        model(tokens(12), context, torch.arange(11), tokens(11, seed=1)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---------------------------------------------------------------------------------------------- numerics


def test_rope_tables_stay_fp32_in_a_bf16_model(tmp_path):
    """Tables rounded to bf16 are wrong by 2e-3, angles by whole turns; fp32 angles at position 8000 by 5e-4 at most."""
    model = load(tiny_checkpoint(tmp_path, saved_as=torch.bfloat16), torch.bfloat16)
    seen, n, start = {}, 100, 8000
    context = Packed([n])
    context.positions = context.positions + start
    hook = lambda _, args: seen.update(cos=args[1], sin=args[2])  # noqa: E731
    model.model.layers[0].self_attn.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(tokens(n), context, context.last)
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = torch.arange(start, start + n, dtype=torch.float64)[:, None] * frequencies  # (N, D/2)
    for table, exact in ((seen["cos"], angles.cos()), (seen["sin"], angles.sin())):
        assert table.dtype == torch.float32
        assert (table[:, 0].double() - exact).abs().max() < 6e-4 and (
            table[:, 0].double() - exact
        ).abs().mean() < 1e-4


def test_rotation_of_bf16_rounds_once():
    x = torch.randn(200, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    angles = torch.arange(200.0)[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x.double().chunk(2, -1)
    exact = torch.cat(
        (a * cos.double() - b * sin.double(), b * cos.double() + a * sin.double()), -1
    ).bfloat16()
    assert (rotate(x, cos, sin) == exact).double().mean() > 0.999
    assert (
        rotate(x, cos.bfloat16(), sin.bfloat16()) == exact
    ).double().mean() < 0.9  # so the test can tell


def test_bf16_logps_are_near_fp32_and_returned_in_fp32(tmp_path):
    directory = tiny_checkpoint(tmp_path, std=0.1, saved_as=torch.bfloat16)
    ids, context, select = tokens(400), Packed([400]), torch.arange(399)
    exact, rounded = (
        load(directory, dtype)(ids, context, select, ids[1:])
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().mean() < 0.01 and (exact - rounded).abs().max() < 0.1


class LargestLogits(TorchDispatchMode):
    """Most rows of any (rows, V) tensor that is computed."""

    def __init__(self, V):
        super().__init__()
        self.V, self.rows = V, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == self.V:
            self.rows = max(self.rows, out.shape[0])
        return out


@pytest.mark.parametrize("chunk", [1, 7, 25, 26, 50, 51, 1024])
def test_token_logps_in_chunks_equal_log_softmax_with_gradients(chunk, monkeypatch):
    monkeypatch.setattr(TokenLogps, "CHUNK", chunk)
    M, V = 51, 301
    x, weight, upstream = (
        torch.randn(shape, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate([(M, 16), (V, 16), (M,)])
    )
    targets = tokens(M, V)
    results = []
    for f in (
        lambda x, w: TokenLogps.apply(x, w, targets),
        lambda x, w: F.log_softmax(x @ w.T, -1)[torch.arange(M), targets],
    ):
        x1, w1 = (t.clone().requires_grad_() for t in (x, weight))
        logps = f(x1, w1)
        (logps * upstream).sum().backward()
        results.append((logps, x1.grad, w1.grad))
    for mine, reference in zip(*results, strict=True):
        assert (mine - reference).abs().max() < 1e-4
    with torch.no_grad():
        assert torch.allclose(TokenLogps.apply(x, weight, targets), results[1][0], atol=1e-5)


def test_token_logps_never_hold_all_logits(monkeypatch):
    monkeypatch.setattr(TokenLogps, "CHUNK", 8)
    x, weight = torch.randn(64, 4, requires_grad=True), torch.randn(301, 4, requires_grad=True)
    kept = []
    watch = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.shape) or t, lambda t: t
    )
    with LargestLogits(301) as largest, watch:
        logps = TokenLogps.apply(x, weight, tokens(64, 301))
    assert largest.rows == 8
    assert not any(shape[-1] == 301 for shape in kept if len(shape) == 2), (
        "logits kept for the backward pass"
    )
    with LargestLogits(301) as largest:
        logps.sum().backward()
    assert largest.rows == 8


def test_token_logps_of_bf16_take_the_softmax_in_fp32():
    x, weight, targets = (
        torch.randn(20, 16).bfloat16(),
        torch.randn(301, 16).bfloat16(),
        tokens(20, 301),
    )
    logps = TokenLogps.apply(x, weight, targets)
    assert logps.dtype == torch.float32
    assert torch.allclose(
        logps, F.log_softmax((x @ weight.T).float(), -1)[torch.arange(20), targets], atol=1e-5
    )


# ---------------------------------------------------------------------------------------------- save and load


def names_in(path) -> dict[str, torch.Size]:
    """Tensors of a file or of a directory's files."""
    return {
        name: t.shape
        for file in ([path] if path.is_file() else path.glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("shard_bytes", "tied"), [(4 << 30, False), (20_000, False), (20_000, True)]
)
def test_saved_model_is_the_same_here_and_in_transformers(tmp_path, shard_bytes, tied):
    source = tiny_checkpoint(tmp_path / "source", tie_word_embeddings=tied)
    out, ids = tmp_path / "out", tokens(30)
    out.mkdir()
    save(load(source, torch.float32), out, source, torch.float32, TEMPLATE, shard_bytes=shard_bytes)
    assert torch.equal(ours(load(out, torch.float32), ids), ours(load(source, torch.float32), ids))
    assert torch.equal(their_logits(out, ids), their_logits(source, ids))
    assert names_in(out) == names_in(source) and ("lm_head.weight" in names_in(out)) == (not tied)
    assert not list(out.glob("*.tmp"))
    index = out / "model.safetensors.index.json"
    assert index.is_file() == (shard_bytes == 20_000)
    if index.is_file():
        files = sorted(out.glob("*.safetensors"))
        assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        held = [[4 * shape.numel() for shape in names_in(file).values()] for file in files]
        assert all(len(sizes) == 1 or sum(sizes) <= shard_bytes for sizes in held)
        assert max(map(len, held)) > 1 and any(len(sizes) > 1 for sizes in held[2:])
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE


@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_in_shards_loads_here(tmp_path, tied):
    source = tiny_checkpoint(tmp_path / "source", tie_word_embeddings=tied, rope_scaling=LLAMA3)
    out, ids = tmp_path / "out", tokens(30)
    theirs(source).save_pretrained(out, max_shard_size="20KB")
    assert len(list(out.glob("*.safetensors"))) > 3
    assert "rope_parameters" in json.loads(
        (out / "config.json").read_text()
    )  # transformers 5 layout
    assert torch.equal(ours(load(out, torch.float32), ids), ours(load(source, torch.float32), ids))


def test_a_tied_checkpoint_may_hold_its_head_twice(tmp_path):
    directory = tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    expected = ours(load(directory, torch.float32), tokens(9))
    tensors |= {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file(tensors, directory / "model.safetensors")
    assert torch.equal(ours(load(directory, torch.float32), tokens(9)), expected)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, "torch_dtype"),
        (
            {
                "rope_theta": None,
                "dtype": "float32",
                "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
            },
            "dtype",
        ),
    ],
)
def test_saved_config_is_the_one_read_but_for_the_dtype(tmp_path, changes, key):
    source = tiny_checkpoint(tmp_path / "source", **changes, an_unknown_key=[1, {"a": None}])
    (tmp_path / "out").mkdir()
    save(load(source, torch.float32), tmp_path / "out", source, torch.bfloat16, TEMPLATE)
    before, after = (
        json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out")
    )
    assert after == {
        **{name: v for name, v in before.items() if name != "torch_dtype"},
        key: "bfloat16",
    }
    assert theirs(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_saving_again_in_one_file_leaves_no_old_index(tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    (tmp_path / "out").mkdir()
    save(
        random_model(llama_config(), seed=5),
        tmp_path / "out",
        source,
        torch.float32,
        TEMPLATE,
        shard_bytes=20_000,
    )
    save(load(source, torch.float32), tmp_path / "out", source, torch.float32, TEMPLATE)
    assert torch.equal(
        ours(load(tmp_path / "out", torch.float32), tokens(9)),
        ours(load(source, torch.float32), tokens(9)),
    )


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"architectures": None}, "architecture none"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "linear"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
            "dynamic",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
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
    path = tmp_path / "config.json"
    path.write_text(json.dumps(llama_config(**changes)))
    with pytest.raises(InputError) as refusal:
        Config.load(tmp_path)
    assert (
        named in str(refusal.value)
        and str(path) in str(refusal.value)
        and "\n" not in str(refusal.value)
    )


def drop_tensor(d):
    tensors = load_file(d / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, d / "model.safetensors")


def add_tensor(d):
    tensors = load_file(d / "model.safetensors") | {
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)
    }
    save_file(tensors, d / "model.safetensors")


def split_and_lose_a_shard(d):
    shutil.copytree(d, d / "whole")
    save(load(d, torch.float32), d, d / "whole", torch.float32, TEMPLATE, shard_bytes=20_000)
    next(d.glob("model-00002-of-*")).unlink()


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text('{\n"a": 1,\n}'), "line 3"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: missing"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"\x10" + b"\0" * 40),
            "not a readable safetensors file",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(
                (d / "model.safetensors").read_bytes()[:-100]
            ),
            "not a readable",
        ),
        (
            lambda d: (d / "config.json").write_text(
                json.dumps(llama_config(intermediate_size=95))
            ),
            "has shape [96, 64]",
        ),
        (drop_tensor, "model.layers.1.mlp.up_proj.weight"),
        (add_tensor, "model.layers.0.self_attn.q_proj.bias"),
        (split_and_lose_a_shard, "model-00002-of"),
    ],
    ids=[
        "no config",
        "bad config",
        "no weights",
        "garbage",
        "cut off",
        "other shape",
        "less",
        "more",
        "lost shard",
    ],
)
def test_harmed_checkpoint_is_refused_in_one_line(tmp_path, harm, named):
    directory = tiny_checkpoint(tmp_path / "m")
    harm(directory)
    with pytest.raises(InputError) as refusal:
        load(directory, torch.float32)
    assert (
        named in str(refusal.value)
        and str(directory) in str(refusal.value)
        and "\n" not in str(refusal.value)
    )


def test_the_tiny_tokenizer_is_read_alike_by_transformers(tiny):
    from data import Chat

    reference = transformers.AutoTokenizer.from_pretrained(tiny)
    talk = [{"role": "user", "content": "Écris: 日本?"}]
    expected = reference.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert Chat(tiny).prompt_ids({"messages": talk}) == list(expected)
    assert [reference.convert_tokens_to_ids(s) for s in SPECIALS] == [0, 1, 2]
