"""Every compiled function against plain PyTorch, in both dtypes, at the edges of vectors, blocks
and windows; log-probs in chunks; packed weights.
"""

import ctypes
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, llama_config, random_model, tiny_checkpoint
from test_model import tokens
from texts import assert_same_text, near_cdf
from torch.utils._python_dispatch import TorchDispatchMode

import ops.pack
from checkpoint import load
from formats.chat import Chat
from model import Linear, RMSNorm, apply_rope, rms_norm, swiglu
from ops import cpu
from ops.attention import Cache, Decode, Packed, Prefill
from ops.logps import TokenLogps, token_logps
from ops.pack import PackedLinear, can_pack, pack
from plumbing import stage
from sample import Engine, Request, SampleOptions, sample_token
from train import response_logps, score_sequences

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SIZES = pytest.mark.parametrize(
    ("D", "G", "Hkv"),
    [
        (32, 1, 2),
        (64, 3, 3),
        (128, 4, 2),
        (96, 16, 1),
    ],
)
# Of the largest number compared. Sums are taken in fp32, whose rounding adds up; bf16 is rounded a
# few times.
TOLERANCE = {
    torch.float32: 16 * torch.finfo(torch.float32).eps,
    torch.bfloat16: 3 * torch.finfo(torch.bfloat16).eps,
}
COMPILED = pytest.mark.usefixtures("used")


def random(*shape, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_pytorch():
    """A context without compiled functions."""
    return patch.object(cpu, "library", lambda *_: None)


def compiled_and_plain(function, *inputs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Value and gradients of the inputs, with compiled functions and in plain PyTorch; as fp32."""
    results = []
    for context in (nullcontext(), plain_pytorch()):
        with context:
            values = [x.clone().requires_grad_() for x in inputs]
            out = function(*values)
            out.backward(random(*out.shape, dtype=out.dtype, seed=9))
        results.append([x.detach().float() for x in (out, *(x.grad for x in values))])
    return tuple(results)


@torch.no_grad()
def decoded(function) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same for what is never trained: the value alone."""
    compiled = function()
    with plain_pytorch():
        plain = function()
    return [compiled.float()], [plain.float()]


def assert_close(results, tolerance: float) -> None:
    """Values and gradients, within the tolerance times the largest number of each."""
    for compiled, plain in zip(*results, strict=True):
        assert compiled.shape == plain.shape
        assert plain.abs().max() > 0
        assert (compiled - plain).abs().max() <= tolerance * max(1, plain.abs().max())


@pytest.fixture
def used(monkeypatch):
    """The calls of C; none would mean that PyTorch was compared with itself."""
    if not shutil.which("cc") or os.environ.get("SYNPO_KERNELS") == "0":
        pytest.skip("no C compiler, or the compiled functions are turned off")
    calls = []

    def call(function, *arguments):
        calls.append(function.__name__)
        function(*arguments)

    monkeypatch.setattr(cpu, "call", call)
    yield calls
    assert calls


# ------------------------------------------------------------------------------- inside a layer


@COMPILED
@BOTH
@pytest.mark.parametrize(
    ("N", "C"),
    [
        (1, 32),
        (3, 576),
        (64, 64),
        (130, 64),
    ],
)
def test_rms_norm(N, C, dtype):
    def norm(x, weight):
        module = RMSNorm(C, 1e-5)
        del module.weight
        module.weight = weight
        return module(x)

    x = 100 * random(N, C, dtype=dtype)
    assert_close(compiled_and_plain(norm, x, random(C, dtype=dtype, seed=1)), TOLERANCE[dtype])


@COMPILED
@BOTH
@pytest.mark.parametrize(("N", "H", "D"), [(1, 1, 32), (5, 3, 64), (40, 12, 128)])
def test_rms_norm_of_every_head_also_inside_wider_rows(N, H, D, dtype):
    """Against PyTorch's own norm too: both versions could mix heads up alike."""
    wide = 10 * random(N, 3 * H * D, dtype=dtype)
    weight = random(D, dtype=dtype, seed=1)

    def heads(wide):
        return wide[:, H * D : 2 * H * D].unflatten(-1, (H, D))

    def norm(wide, weight):
        return rms_norm(heads(wide), weight, 1e-5)

    results = compiled_and_plain(norm, wide, weight)
    assert_close(results, TOLERANCE[dtype])
    expected = torch.nn.functional.rms_norm(heads(wide).float(), (D,), weight.float(), 1e-5)
    assert_close(([results[0][0]], [expected]), TOLERANCE[dtype])


@COMPILED
@BOTH
@pytest.mark.parametrize(
    ("N", "H", "D"),
    [
        (1, 1, 32),
        (5, 3, 64),
        (40, 12, 128),
    ],
)
def test_apply_rope_also_inside_wider_rows(N, H, D, dtype):
    angles = 10 * random(N, 1, D // 2, seed=1)
    wide = random(N, 3 * H * D, dtype=dtype)

    def part(wide):
        return wide[:, H * D : 2 * H * D].unflatten(-1, (H, D))

    def rotate(wide):
        return apply_rope(part(wide), angles.cos(), angles.sin())

    results = compiled_and_plain(rotate, wide)
    assert_close(results, TOLERANCE[dtype])
    assert (results[1][0] - part(wide)).abs().max() > 1


@COMPILED
@BOTH
def test_swiglu_of_gates_of_any_size(dtype):
    extreme = [
        -3e38,
        -1e30,
        -1e4,
        -0.0,
        1e-30,
        1e4,
        1e30,
    ]
    padding = [0.0] * 25  # to whole vectors
    gate = torch.cat(
        [
            torch.arange(-600, 200, 0.25),
            torch.tensor([*extreme, *padding]),
            random(32),
        ]
    ).to(dtype)
    up = random(*gate.shape, dtype=dtype, seed=1)
    for compiled, plain in zip(*compiled_and_plain(swiglu, gate, up), strict=True):
        tolerance = TOLERANCE[dtype]
        assert torch.allclose(compiled, plain, rtol=2 * tolerance, atol=tolerance)


@COMPILED
@BOTH
def test_nan_stays_nan(dtype):
    """It must stop training, not turn into a probability of 0."""
    q, k, v = (random(40, 1, 32, dtype=dtype, seed=i) for i in range(3))
    k[20] = math.nan
    out = Packed([40]).attend(0, q, k, v, None)
    assert out[20:].isnan().all()
    assert out[:20].isfinite().all()
    logits = random(2, 64, dtype=dtype)
    logits[0, 5] = math.nan
    logps, _ = cpu.token_logps(logits, torch.tensor([1, 1]))
    assert logps.isnan().tolist() == [True, False]
    gate = torch.full((32,), math.nan, dtype=dtype)
    assert cpu.swiglu(gate, torch.ones_like(gate)).isnan().all()


# ------------------------------------------------------------------------------- attention


@COMPILED
@BOTH
@SIZES
@pytest.mark.parametrize("window", [None, 1, 17, 40])
def test_packed_attention(D, G, Hkv, window, dtype):
    """Sequences on both sides of a tile of 32 tokens; none sees another, as SDPA takes them one by
    one.
    """
    context = Packed([1, 31, 32, 33, 64, 70])
    heads = (G * Hkv, Hkv, Hkv)
    q, k, v = (random(231, heads[i], D, dtype=dtype, seed=i) for i in range(3))
    results = compiled_and_plain(lambda q, k, v: context.attend(0, q, k, v, window), q, k, v)
    assert_close(results, 4 * TOLERANCE[dtype])


@COMPILED
def test_packed_attention_survives_scores_of_any_size():
    context = Packed([50])
    for scale in (30.0, 1000.0):
        q, k, v = (random(50, 2, 32, seed=i) for i in range(3))
        results = compiled_and_plain(
            lambda q, k, v: context.attend(0, q, k, v, None), scale * q, k, v
        )
        assert all(x.isfinite().all() for x in results[0])
        assert_close(results, 1e-3)


@COMPILED
@BOTH
@SIZES
@pytest.mark.parametrize("window", [None, 1, 17])
def test_cached_attention(D, G, Hkv, window, dtype):
    """Lengths on both sides of a vector of tokens; what lies beyond a row's length is not read."""
    lengths = torch.tensor([0, 1, 14, 15, 16, 31, 32, 40])
    B = len(lengths)
    T = 41
    raw = llama_config(num_attention_heads=G * Hkv, num_key_value_heads=Hkv, head_dim=D)
    cache = Cache(random_model(raw).config, B, T, dtype)
    for i, x in enumerate((cache.k, cache.v)):
        x.copy_(random(*x.shape, dtype=dtype, seed=i + 1))
    before = (cache.k.clone(), cache.v.clone())

    # slices of wider rows, as when projections are fused; RoPE then makes a copy of k
    wide = random(B, (G + 2) * Hkv * D, dtype=dtype)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in wide.split((G * Hkv * D, Hkv * D, Hkv * D), -1))
    k = k.contiguous()

    def attention():
        for x, start in zip((cache.k, cache.v), before, strict=True):
            x.copy_(start)
        compiled = cpu.attention_library(q, k) is not None
        expected = []
        if compiled:
            for x, new in zip((cache.k, cache.v), (k, v), strict=True):
                for b, n in enumerate(lengths):  # NaN would spread; SDPA multiplies it by 0
                    x[:, b, n:] = math.nan
                wanted = x.clone()
                wanted[1, torch.arange(B), lengths] = new
                expected.append(wanted)
        out = Decode(cache, lengths, int(lengths.max()) + 1, window).attend(1, q, k, v, window)
        if compiled:  # written where it should be, and nowhere else
            for x, wanted in zip((cache.k, cache.v), expected, strict=True):
                torch.testing.assert_close(x, wanted, rtol=0, atol=0, equal_nan=True)
        return out

    assert_close(decoded(attention), 2 * TOLERANCE[dtype])


@COMPILED
def test_cached_attention_survives_scores_of_any_size():
    """Softmax in one pass: scores that grow, fall, and are hundreds apart."""
    D = 32
    T = 48
    shapes = [
        (1, 1, D),
        (1, T, 1, D),
        (1, T, 1, D),
    ]
    for scale in (1.0, 30.0, 1000.0):
        q, keys, values = (random(*shape, seed=i) for i, shape in enumerate(shapes))
        scores = (keys @ q[0, 0]).flatten()
        for order in (scores.argsort(), scores.argsort(descending=True)):
            k = keys[:, order].contiguous()
            v = values[:, order].contiguous()
            last = torch.tensor([T - 1])
            out = cpu.attend(scale * q, k[:, -1], v[:, -1], k, v, last, None)
            weights = torch.softmax(scale * (k[0, :, 0] @ q[0, 0]).double() / D**0.5, 0)
            assert (out[0, 0] - weights @ v[0, :, 0].double()).abs().max() < 1e-5


def test_a_row_that_would_outgrow_its_cache_is_refused():
    """C would write behind the end."""
    cache = Cache(random_model(llama_config()).config, 1, 8, torch.float32)
    with pytest.raises(AssertionError, match="9 tokens do not fit in a cache of 8"):
        Decode(cache, torch.tensor([8]), 9, None)


# ------------------------------------------------------------------------------- log-probs


@COMPILED
@BOTH
@pytest.mark.parametrize("M", [1, TokenLogps.CHUNK, TokenLogps.CHUNK + 1])
def test_token_logps(M, dtype):
    """Against plain PyTorch, which takes the same chunks, and one log-softmax in float64."""
    x = random(M, 32, dtype=dtype)
    weight = 0.5 * random(320, 32, dtype=dtype, seed=1)
    targets = tokens(M, seed=2)
    results = compiled_and_plain(lambda x, weight: token_logps(x, weight, targets), x, weight)
    assert results[0][0].dtype == torch.float32
    assert_close(results, 2 * TOLERANCE[dtype])
    x64 = x.double().requires_grad_()
    weight64 = weight.double().requires_grad_()
    expected = (x64 @ weight64.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected.backward(random(M, seed=9).double())
    exact = [expected.detach(), x64.grad, weight64.grad]
    assert_close((results[1], exact), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("chunk", [1, 7, 25, 26, 50, 51, 1024])
def test_token_logps_in_chunks_equal_log_softmax_with_gradients(chunk, monkeypatch):
    monkeypatch.setattr(TokenLogps, "CHUNK", chunk)
    M = 51
    V = 301
    x = random(M, 16, seed=0)
    weight = random(V, 16, seed=1)
    upstream = random(M, seed=2)
    targets = tokens(M, V)

    def one_softmax(x, weight):
        return F.log_softmax(x @ weight.T, -1)[torch.arange(M), targets]

    results = []
    for function in (lambda x, weight: token_logps(x, weight, targets), one_softmax):
        x1 = x.clone().requires_grad_()
        weight1 = weight.clone().requires_grad_()
        logps = function(x1, weight1)
        (logps * upstream).sum().backward()
        results.append((logps, x1.grad, weight1.grad))
    assert_close(results, TOLERANCE[torch.float32])
    with torch.no_grad():
        logps = token_logps(x, weight, targets)
    assert_close(([logps], results[1][:1]), TOLERANCE[torch.float32])


class LargestLogits(TorchDispatchMode):
    """Most rows of any (rows, V) tensor that is computed."""

    def __init__(self, V):
        super().__init__()
        self.V = V
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == self.V:
            self.rows = max(self.rows, out.shape[0])
        return out


def test_token_logps_never_hold_all_logits(monkeypatch):
    monkeypatch.setattr(TokenLogps, "CHUNK", 8)
    x = random(64, 4).requires_grad_()
    weight = random(301, 4, seed=1).requires_grad_()
    kept = []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    watch = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with LargestLogits(301) as largest, watch:
        logps = token_logps(x, weight, tokens(64, 301))
    assert largest.rows == 8
    assert not any(shape[-1] == 301 for shape in kept if len(shape) == 2), "kept for backward"
    with LargestLogits(301) as largest:
        logps.sum().backward()
    assert largest.rows == 8


def test_token_logps_of_bf16_take_the_softmax_in_fp32():
    x = random(20, 16, dtype=torch.bfloat16)
    weight = random(301, 16, dtype=torch.bfloat16, seed=1)
    targets = tokens(20, 301)
    logps = token_logps(x, weight, targets)
    assert logps.dtype == torch.float32
    expected = F.log_softmax((x @ weight.T).float(), -1)[torch.arange(20), targets]
    assert_close(([logps], [expected]), TOLERANCE[torch.float32])


# ------------------------------------------------------------------------------- drawing a token


@pytest.mark.slow
@COMPILED
@BOTH
@pytest.mark.parametrize("V", [5, 256, 300, 49152])
def test_sample_token(V, dtype):
    """Both draw the token whose interval of the CDF, taken in float64, holds the random number."""
    logits = 3 * random(200, V, dtype=dtype)
    u = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for [drawn] in decoded(lambda: sample_token(logits, u, 0.7, 1.0)):
        assert near_cdf(logits, u, 0.7, drawn.long(), 1e-5).all()
        assert len(set(drawn.tolist())) > min(V, 50) // 2


@COMPILED
def test_sample_token_stays_inside_the_vocabulary_whatever_the_logits():
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for value in (math.nan, -math.inf, math.inf, 0.0):
        drawn = cpu.sample_token(torch.full((2, 300), value), u, 1.0, 1.0)
        assert 0 <= drawn.min()
        assert drawn.max() < 300


@COMPILED
def test_what_is_not_compiled_is_left_to_pytorch():
    logits = random(2, 64)
    u = torch.rand(2, dtype=torch.float64)
    assert cpu.sample_token(logits, u, 0, 1.0) is NotImplemented
    assert cpu.sample_token(logits, u, 0.7, 0.9) is NotImplemented
    assert not cpu.ready(random(2, 33))
    assert not cpu.ready(random(2, 32).double())
    assert torch.equal(swiglu(random(2, 33), random(2, 33)), F.silu(random(2, 33)) * random(2, 33))
    swiglu(random(2, 32), random(2, 32))


# ------------------------------------------------------------------------------- how C is called


def test_the_table_of_parameters_is_what_cpu_c_declares():
    source = re.sub(r"/\*.*?\*/", "", cpu.SOURCE.read_text(), flags=re.DOTALL)
    declared = {}
    for name, parameters in re.findall(r"^void (\w+)\(([^)]*)\)", source, re.MULTILINE):
        types = []
        for parameter in parameters.split(","):
            words = parameter.replace("const ", "").replace("_t ", " ").split()
            types.append(words[0] + ("*" if words[1].startswith("*") else ""))
        declared[name] = types
    table = {
        name: parameters.replace("rows", "number*").split()
        for name, parameters in cpu.PARAMETERS.items()
    }
    assert table == declared
    assert len(table) == 11


@COMPILED
def test_no_argument_reaches_c_with_another_type(used):
    """Once, an integer epsilon went to C as an int64 where it reads a float."""
    x = random(4, 32)
    out = torch.empty_like(x)
    weight = torch.ones(32)
    norm = cpu.library(torch.float32).rms_norm
    cpu.call(norm, out, x, weight, 4, 32, 1)  # a whole number becomes a float
    assert torch.allclose(out, x / (x.pow(2).mean(-1, keepdim=True) + 1).sqrt(), atol=1e-5)
    wrong = [
        (out, x, weight, 4, 32, "1e-6"),
        (out, x, weight, 4, 32, None),
        (out, x, weight, 4.0, 32, 1e-6),
        (out, x.double(), weight, 4, 32, 1e-6),
        (out, x.bfloat16(), weight, 4, 32, 1e-6),
        (out, x.T, weight, 4, 32, 1e-6),
        (out, x, weight.to("meta"), 4, 32, 1e-6),
        (out, x.data_ptr(), weight, 4, 32, 1e-6),
    ]
    for arguments in wrong:
        with pytest.raises(ctypes.ArgumentError):
            cpu.call(norm, *arguments)
    with pytest.raises(TypeError):
        cpu.call(norm, out, x, weight, 4, 32)


@COMPILED
def test_rows_may_lie_apart_but_not_their_numbers(used):
    pointer = cpu.Pointer(torch.float32, rows=True)
    wide = random(4, 3 * 64)
    part = wide[:, 64:128].unflatten(-1, (2, 32))
    assert pointer.from_param(part).value == part.data_ptr()
    for wrong in (
        part.transpose(1, 2),
        part[..., ::2],
        part.double(),
        part[:, :, :16],
    ):
        with pytest.raises(TypeError, match="needs contiguous rows"):
            pointer.from_param(wrong)
    apply_rope(part, random(4, 1, 16), random(4, 1, 16))


@COMPILED
def test_tensors_whose_shapes_do_not_agree_are_refused(used):
    x = random(4, 32)
    heads = random(4, 2, 32)
    angles = random(4, 1, 16)
    starts = torch.tensor([0, 4])
    cached = random(4, 9, 2, 32)
    lengths = torch.zeros(4, dtype=torch.int64)
    u = torch.rand(4, dtype=torch.float64)
    calls = [
        lambda: cpu.rms_norm(x, torch.ones(64), 1e-6),
        lambda: cpu.swiglu(x, x[:2]),
        lambda: cpu.apply_rope(heads, angles[:2], angles),
        lambda: cpu.apply_rope(heads, angles, angles[..., :8]),
        lambda: cpu.attend_packed(heads, heads, heads[:3], starts, None),
        lambda: cpu.attend(heads, heads, heads[:3], cached, cached, lengths, None),
        lambda: cpu.attend(heads, heads, heads, cached, cached[:, :8], lengths, None),
        lambda: cpu.attend(heads[:3], heads, heads, cached, cached, lengths, None),
        lambda: cpu.attend(heads, heads, heads, cached, cached, lengths[:3], None),
        lambda: cpu.token_logps(x, lengths[:3]),
        lambda: cpu.token_logps_backward(x, x[:, 0], x[:3, 0], lengths),
        lambda: cpu.sample_token(x, u[:3], 1.0, 1.0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="shapes do not agree"):
            call()
    assert not used
    swiglu(x, x)


PROGRAM = """
import torch
from ops import cpu
print(cpu.ready(torch.ones(2, 32)))
"""


def ready_in_a_new_process(home, **env) -> tuple[str, str]:
    """What a process with this environment alone says, and its standard error."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={"HOME": str(home), "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip(), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_the_environment_decides_what_is_compiled(tmp_path):
    made = tmp_path / ".cache" / "synpo"
    path = "/usr/bin:/bin"

    # nothing is compiled: turned off, no compiler, or one that refuses
    assert ready_in_a_new_process(tmp_path, PATH=path, SYNPO_KERNELS="0") == ("False", "")
    for env in ({"PATH": ""}, {"PATH": path, "SYNPO_KERNELS_ARCH": "a-toaster"}):
        answer, error = ready_in_a_new_process(tmp_path, **env)
        assert answer == "False"
        assert error.count("\n") == 1
        message = "could not compile the CPU kernels; falling back to PyTorch (slower): "
        assert error.startswith(message)
        assert len(error) > len(message) + 1
    assert "a-toaster" in error
    assert not list(made.glob("*.so"))

    # one library for this CPU, another for another architecture
    assert ready_in_a_new_process(tmp_path, PATH=path) == ("True", "")
    assert len(list(made.glob("*.so"))) == 1
    if platform.machine() == "x86_64":
        env = {"PATH": path, "SYNPO_KERNELS_ARCH": "x86-64-v2"}
        assert ready_in_a_new_process(tmp_path, **env) == ("True", "")
        assert len(list(made.glob("*.so"))) == 2


def test_manifests_record_the_kernels_in_use(monkeypatch):
    """Not whether there is a compiler that could make some."""

    def recorded():
        return stage.machine.__wrapped__()["kernels"]

    monkeypatch.setattr(cpu, "library", lambda *_: "a library")
    monkeypatch.setattr(cpu, "ARCH", "native")
    assert recorded() == "compiled"
    monkeypatch.setattr(cpu, "ARCH", "x86-64-v3")
    assert recorded() == "compiled for x86-64-v3"
    monkeypatch.setattr(cpu, "library", lambda *_: None)
    assert recorded() == "pytorch"


@COMPILED
def test_nothing_is_compiled_twice(monkeypatch, used):
    """A second library with the same content would be built for every process."""
    path = cpu.compile_source(("-DFLOAT32",))
    monkeypatch.setattr(cpu.subprocess, "run", None)
    assert cpu.compile_source(("-DFLOAT32",)) == path
    swiglu(random(2, 32), random(2, 32))


# ------------------------------------------------------------------------------- packed weights


def packs(dtype: torch.dtype) -> bool:
    return can_pack(torch.zeros(1, dtype=dtype))


@COMPILED
@BOTH
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_model_computes_the_same_in_the_same_memory(tmp_path, tied, family, dtype):
    changes = {"architectures": [f"{family}ForCausalLM"], "head_dim": 32}
    directory = tiny_checkpoint(tmp_path, **changes, tie_word_embeddings=tied)
    ids = tokens(21, seed=1)
    context = Packed([20, 1])

    @torch.inference_mode()
    def logits(model):
        return model(ids, context, torch.arange(21)).float()

    plain = load(directory, dtype)
    packed = pack(load(directory, dtype))
    assert_close(([logits(packed)], [logits(plain)]), 2 * TOLERANCE[dtype])
    kinds = {type(m) for m in packed.modules() if isinstance(m, PackedLinear | torch.nn.Linear)}
    assert kinds == {PackedLinear if packs(dtype) else Linear}
    if packs(dtype):
        # the embedding keeps its own order beside the head's
        extra = plain.head.weight.numel() if tied else 0
        size = sum(p.numel() for p in packed.parameters())
        assert size == sum(p.numel() for p in plain.parameters()) + extra


@COMPILED
@BOTH
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_packed_model_decodes_what_the_plain_one_does(tmp_path, family, dtype):
    """A prefill and a step of several rows, with fused projections and C, against neither."""
    changes = {"architectures": [f"{family}ForCausalLM"], "head_dim": 32}
    directory = tiny_checkpoint(tmp_path, **changes, std=0.1)
    rows = [
        [5, 6, 7],
        [8],
        list(range(40, 75)),
    ]
    ids = torch.tensor([token for row in rows for token in row])
    lengths = [len(row) for row in rows]
    last = torch.tensor([11, 12, 13])

    @torch.inference_mode()
    def logits(model):
        cache = Cache(model.config, 3, 64, dtype)
        context = Prefill(cache, [0, 1, 2], lengths)
        first = model(ids, context, context.last)
        step = Decode(cache, torch.tensor(lengths), 36, None)
        return torch.cat([first, model(last, step, torch.arange(3))]).float()

    packed = logits(pack(load(directory, dtype)))
    with plain_pytorch():
        plain = logits(load(directory, dtype))
    assert_close(([packed], [plain]), 4 * TOLERANCE[dtype])


def test_a_pytorch_without_those_functions_leaves_the_model_as_it_is(tiny, monkeypatch):
    monkeypatch.setattr(ops.pack, "NEEDED", (*ops.pack.NEEDED, "_a_function_of_another_version"))
    model = pack(load(tiny, torch.bfloat16))
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


# ------------------------------------------------------------------------------- all together


@pytest.mark.parametrize("head_dim", [32, 64])
def test_engine_writes_the_same_with_and_without_kernels(tiny, head_dim, used):
    model = random_model(llama_config(head_dim=head_dim))
    chat = Chat(tiny)
    o = SampleOptions(slots=5, ignore_eos=True)

    def answers():
        requests = [Request([5 + i, 6, 7 * i], 30 + i, seed=i) for i in range(12)]
        Engine(model, chat, o).run(requests)
        return requests

    compiled = answers()
    calls = len(used)
    names = {"rms_norm", "apply_rope", "swiglu", "sample_token", "attend", "attend_packed"}
    assert set(used) == names
    with plain_pytorch():
        plain = answers()
        for mine, reference in zip(compiled, plain, strict=True):
            assert_same_text(model, mine, reference, o)
    assert len(used) == calls


def test_training_and_scoring_compute_alike(used):
    """A reference is scored without gradients, the policy with them: to the same bits."""
    model = random_model(llama_config(head_dim=32)).to(torch.bfloat16)
    sequences = [([5, 6, 7, 8], 2), ([9, 10], 1)]
    scored = score_sequences(model, sequences)
    trained = response_logps(model, sequences)
    assert all(torch.equal(a, b) for a, b in zip(scored, trained, strict=True))
    torch.cat(trained).sum().backward()
    both_ways = ("rms_norm", "apply_rope", "swiglu", "attend_packed", "token_logps")
    backward = {f"{name}_backward" for name in both_ways} - {"apply_rope_backward"}
    assert set(used) == {*both_ways, *backward}
