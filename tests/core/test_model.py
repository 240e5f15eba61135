"""The network against transformers on tiny checkpoints; packed and cached against one by one."""

import pytest
import torch
import transformers
from conftest import llama_config, random_model, tiny_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint import load
from model import apply_rope, rms_norm
from ops.attention import Cache, Decode, Packed, Prefill

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MISTRAL = {"architectures": ["MistralForCausalLM"]}
# How transformers 5 writes RoPE and the dtype; None removes what transformers 4 has instead.
V5 = {
    "rope_theta": None,
    "torch_dtype": None,
    "dtype": "float32",
}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 200 rounding steps of fp32 at the largest number, as errors add up over layers."""
    step = torch.finfo(torch.float32).eps * theirs.abs().max()
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 200 * step


def tokens(n: int, vocab: int = 320, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def ours(model, ids: torch.Tensor) -> torch.Tensor:
    """Outputs of the head at every position of one sequence, (T, V)."""
    return model(ids, Packed([len(ids)]), torch.arange(len(ids)))


def theirs(directory, architecture: str = "LlamaForCausalLM", dtype=torch.float32):
    """What it does not find in the file it would start anew, say a bias at 0, without an error."""
    load_theirs = getattr(transformers, architecture).from_pretrained
    model, info = load_theirs(directory, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"], info
    return model.eval()


@torch.no_grad()
def their_logits(directory, ids, architecture: str = "LlamaForCausalLM") -> torch.Tensor:
    return theirs(directory, architecture)(ids[None]).logits[0]


# ------------------------------------------------------------------------------- transformers


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
            300,
            {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
            id="transformers 4, llama3 RoPE",
        ),
        pytest.param(
            300,
            {
                **V5,
                "rope_parameters": {"rope_theta": 500000.0, **LLAMA3},
            },
            id="transformers 5, llama3 RoPE",
        ),
        pytest.param(
            300,
            {
                **V5,
                "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
            },
            id="transformers 5, default RoPE",
        ),
        pytest.param(
            40,
            {**MISTRAL, "sliding_window": 7},
            id="Mistral, window",
        ),
        pytest.param(
            40,
            {**MISTRAL, "sliding_window": None},
            id="Mistral, no window",
        ),
    ],
)
def test_logits_equal_transformers(tmp_path, T, changes):
    directory = tiny_checkpoint(tmp_path, **changes)
    model = load(directory, torch.float32)
    expected = their_logits(directory, tokens(T), model.config.raw["architectures"][0])
    assert_close(ours(model, tokens(T)), expected)


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({"rope_scaling": LLAMA3}, {}),
        ({"rope_theta": 500.0}, {}),
        ({"rms_norm_eps": 0.5}, {}),
        ({**MISTRAL, "sliding_window": 7}, {**MISTRAL, "sliding_window": None}),
    ],
)
def test_the_settings_compared_above_matter_at_those_lengths(changes, plain):
    changed = ours(random_model(llama_config(**changes)), tokens(300))
    unchanged = ours(random_model(llama_config(**plain)), tokens(300))
    assert (changed - unchanged).abs().max() > 0.1


@pytest.mark.parametrize(
    ("labels", "architecture"),
    [
        (1, "LlamaForSequenceClassification"),
        (None, "LlamaForSequenceClassification"),
        (3, "MistralForSequenceClassification"),
    ],
)
def test_reward_head_equals_transformers(tmp_path, labels, architecture):
    """None: a config without id2label, which transformers omits for its default of two labels."""
    directory = tiny_checkpoint(
        tmp_path,
        architectures=[architecture],
        id2label=labels and {str(i): f"LABEL_{i}" for i in range(labels)},
        label2id=labels and {f"LABEL_{i}": i for i in range(labels)},
        pad_token_id=0,
    )
    model = load(directory, torch.float32)
    reference = theirs(directory, architecture)
    sequences = [tokens(n, 319, n) + 1 for n in (9, 3, 17)]  # no pad token inside
    context = Packed([len(s) for s in sequences])
    with torch.no_grad():
        scores = model(torch.cat(sequences), context, context.last)  # (S, labels)
        expected = torch.cat([reference(s[None]).logits for s in sequences])
    assert expected.shape == (3, labels or 2)
    assert_close(scores, expected)


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_equals_transformers(smollm2):
    prompt = "<|im_start|>user\nName three rivers of France.<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(smollm2)(prompt).input_ids)
    logits = ours(load(smollm2, torch.float32), ids)
    expected = their_logits(smollm2, ids)
    tolerance = 2e-3  # of logits of size 30
    assert (logits - expected).abs().max() < tolerance
    # the same tokens win, but for a tie
    winners = expected.gather(1, logits.argmax(-1, keepdim=True))[:, 0]
    assert (winners >= expected.amax(-1) - 2 * tolerance).all()


# ------------------------------------------------------------------------------- packed and cached


@pytest.mark.parametrize("changes", [{}, {**MISTRAL, "sliding_window": 5}])
def test_packed_sequences_do_not_see_each_other(changes):
    model = random_model(llama_config(**changes))
    lengths = [13, 1, 40, 2, 7]
    sequences = [tokens(n, seed=n) for n in lengths]
    packed = Packed(lengths)
    assert packed.positions.tolist() == [i for s in sequences for i in range(len(s))]
    with torch.no_grad():
        together = model(torch.cat(sequences), packed, torch.arange(63))
        alone = torch.cat([ours(model, s) for s in sequences])
        chosen = model(torch.cat(sequences), packed, packed.last)
    assert_close(together, alone)
    last = torch.stack([ours(model, s)[-1] for s in sequences])
    assert_close(chosen, last)


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
        context = Decode(cache, lengths, int(lengths.max()) + 1, model.config.sliding_window)
        logits = model(ids, context, torch.arange(3))
        seen = [s[: n + 1] for s, n in zip(sequences, lengths, strict=True)]
        expected = torch.stack([ours(model, s)[-1] for s in seen])
        assert_close(logits, expected)


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = random_model(llama_config())
        for block in model.model.layers:
            block.activation_checkpointing = checkpointing
        context = Packed([8, 4])
        model(tokens(12), context, torch.arange(11), tokens(11, seed=1)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class CountMatmuls(TorchDispatchMode):
    """Which is how the test below knows that something was computed again."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_activation_checkpointing_computes_the_blocks_again():
    counts = []
    for checkpointing in (False, True):
        model = random_model(llama_config())
        for block in model.model.layers:
            block.activation_checkpointing = checkpointing
        with CountMatmuls() as matmuls:
            context = Packed([12])
            model(tokens(12), context, torch.arange(11), tokens(11, seed=1)).sum().backward()
        counts.append(matmuls.count)
    # two blocks of seven matmuls, of which the last one's result is not needed again
    assert counts[1] >= counts[0] + 2 * 6


# ------------------------------------------------------------------------------- numerics


def test_rope_tables_stay_fp32_in_a_bf16_model(tmp_path):
    """At position 8000 fp32 angles are off by at most 5e-4. In bf16 they would be off by whole
    turns, and cos and sin by 2e-3.
    """
    model = load(tiny_checkpoint(tmp_path, saved_as=torch.bfloat16), torch.bfloat16)
    n = 100
    start = 8000
    context = Packed([n])
    context.positions = context.positions + start
    seen = {}

    def hook(_, args):
        seen.update(cos=args[1], sin=args[2])

    model.model.layers[0].self_attn.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(tokens(n), context, context.last)
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = torch.arange(start, start + n, dtype=torch.float64)[:, None] * frequencies  # (N, D/2)
    for table, exact in ((seen["cos"], angles.cos()), (seen["sin"], angles.sin())):
        assert table.dtype == torch.float32
        error = (table[:, 0].double() - exact).abs()
        assert error.max() < 6e-4
        assert error.mean() < 1e-4


def test_rope_on_bf16_rounds_once():
    x = torch.randn(200, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    angles = torch.arange(200.0)[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    cos = angles.cos()[:, None]
    sin = angles.sin()[:, None]
    a, b = x.double().chunk(2, -1)
    exact = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).bfloat16()
    assert (apply_rope(x, cos, sin) == exact).double().mean() > 0.999
    coarse = apply_rope(x, cos.bfloat16(), sin.bfloat16())
    assert (coarse == exact).double().mean() < 0.9  # so the test can tell


def test_bf16_logps_are_near_fp32_and_returned_in_fp32(tmp_path):
    directory = tiny_checkpoint(tmp_path, std=0.1, saved_as=torch.bfloat16)
    ids = tokens(400)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load(directory, dtype)
        results.append(model(ids, Packed([400]), torch.arange(399), ids[1:]))
    exact, rounded = results
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().mean() < 0.01
    assert (exact - rounded).abs().max() < 0.1


def test_epsilon_stands_under_the_root():
    """Of the plain function too, which nothing above reaches where there is a compiler."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) / 10
    weight = torch.linspace(0.5, 2, 64)
    for norm in (rms_norm, rms_norm.__wrapped__):
        expected = torch.nn.functional.rms_norm(x, (64,), weight, 0.5)
        assert (norm(x, weight, 0.5) - expected).abs().max() < 1e-6
