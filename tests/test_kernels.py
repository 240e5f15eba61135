"""Every compiled kernel against plain PyTorch, in both number formats, at the edges of vectors, blocks and windows."""

import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, llama_config, random_model, tiny_checkpoint

from cpu import kernels
from cpu.pack import PackedLinear, pack
from data import Chat
from model import Cache, Decode, Linear, Packed, Prefill, RMSNorm, TokenLogps, load, rotate
from sample import Engine, Request, SampleOptions, digest_key, draw
from train import response_logps, score_sequences

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,
}  # of values of about 1; bf16 holds 8 bits of each


def random(*shape, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compiled_and_plain(function, *inputs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The function's value and the gradients of its inputs with the kernels, and without; in fp32."""
    results = []
    for compiled in (True, False):
        with nullcontext() if compiled else patch.object(kernels, "library", lambda *_: None):
            values = [x.clone().requires_grad_() for x in inputs]
            out = function(*values)
            out.backward(random(*out.shape, dtype=out.dtype, seed=9))
            results.append([x.detach().float() for x in (out, *(x.grad for x in values))])
    return tuple(results)


def decoded(function) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same for what is never trained: the value alone."""
    with torch.no_grad():
        compiled = function()
        with patch.object(kernels, "library", lambda *_: None):
            return [compiled.float()], [function().float()]


def assert_close(results, tolerance: float) -> None:
    """Values and gradients: to the tolerance, of the largest number in each."""
    for compiled, plain in zip(*results, strict=True):
        assert compiled.shape == plain.shape and plain.abs().max() > 0
        assert (compiled - plain).abs().max() <= tolerance * max(1, plain.abs().max())


@pytest.fixture(autouse=True)
def used(monkeypatch):
    """Counts calls of C: a comparison of PyTorch with itself would prove nothing."""
    calls, call = [], kernels.call
    monkeypatch.setattr(kernels, "call", lambda *values: (calls.append(values), call(*values)))
    yield calls
    assert calls


@BOTH
@pytest.mark.parametrize(("N", "C"), [(1, 32), (3, 576), (64, 64), (130, 64)])
def test_rms_norm(N, C, dtype):
    def norm(x, weight):
        module = RMSNorm(C, 1e-5)
        del module.weight
        module.weight = weight
        return module(x)

    assert_close(
        compiled_and_plain(norm, 100 * random(N, C, dtype=dtype), random(C, dtype=dtype, seed=1)),
        TOLERANCE[dtype],
    )


@BOTH
@pytest.mark.parametrize(("N", "H", "D"), [(1, 1, 32), (5, 3, 64), (40, 12, 128)])
def test_rotate_also_inside_wider_rows(N, H, D, dtype):
    angles = 10 * random(N, 1, D // 2, seed=1)
    wide = random(N, 3 * H * D, dtype=dtype)

    def part(wide):
        return wide[:, H * D : 2 * H * D].unflatten(-1, (H, D))

    results = compiled_and_plain(lambda wide: rotate(part(wide), angles.cos(), angles.sin()), wide)
    assert_close(results, TOLERANCE[dtype])
    assert (results[1][0] - part(wide)).abs().max() > 1


@BOTH
def test_swiglu_of_gates_of_any_size(dtype):
    gate = torch.cat(
        [
            torch.arange(-600, 200, 0.25),
            torch.tensor([-3e38, -1e30, -1e4, -0.0, 1e-30, 1e4, 1e30, *[0.0] * 25]),
            random(32),
        ]
    ).to(dtype)
    up = random(*gate.shape, dtype=dtype, seed=1)
    results = compiled_and_plain(
        lambda gate, up: kernels.swiglu(gate, up) if kernels.ready(gate) else F.silu(gate) * up,
        gate,
        up,
    )
    for compiled, plain in zip(*results, strict=True):
        assert torch.allclose(compiled, plain, rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype])


@BOTH
@pytest.mark.parametrize(("D", "G", "Hkv"), [(32, 1, 2), (64, 3, 3), (128, 4, 2), (96, 16, 1)])
@pytest.mark.parametrize("window", [None, 1, 17, 40])
def test_attend_packed(D, G, Hkv, window, dtype):
    """Sequences on both sides of a tile of 32 tokens; nobody sees another's, which PyTorch computes one by one."""
    context = Packed([1, 31, 32, 33, 64, 70])
    q, k, v = (
        random(231, heads, D, dtype=dtype, seed=i) for i, heads in enumerate((G * Hkv, Hkv, Hkv))
    )
    assert_close(
        compiled_and_plain(lambda q, k, v: context.attend(0, q, k, v, window), q, k, v),
        4 * TOLERANCE[dtype],
    )


def test_packed_attention_survives_scores_of_any_size():
    for scale in (30.0, 1000.0):
        q, k, v = (random(50, 2, 32, seed=i) for i in range(3))
        results = compiled_and_plain(
            lambda q, k, v: Packed([50]).attend(0, q, k, v, None), scale * q, k, v
        )
        assert all(x.isfinite().all() for x in results[0])
        assert_close(results, 1e-3)


@BOTH
def test_nan_stays_nan(dtype):
    """It must stop training, not turn into a probability of 0."""
    q, k, v = (random(40, 1, 32, dtype=dtype, seed=i) for i in range(3))
    k[20] = math.nan
    out = Packed([40]).attend(0, q, k, v, None)
    assert out[20:].isnan().all() and out[:20].isfinite().all()
    logits = random(2, 64, dtype=dtype)
    logits[0, 5] = math.nan
    logps, _ = kernels.token_logps(logits, torch.tensor([1, 1]))
    assert logps.isnan().tolist() == [True, False]
    gate = torch.full((32,), math.nan, dtype=dtype)
    assert kernels.swiglu(gate, torch.ones_like(gate)).isnan().all()


@BOTH
@pytest.mark.parametrize("M", [1, TokenLogps.CHUNK, TokenLogps.CHUNK + 1])
def test_token_logps(M, dtype):
    """Against a log-softmax of all logits at once in float64: also what both ways do in chunks."""
    x, weight = random(M, 32, dtype=dtype), 0.5 * random(320, 32, dtype=dtype, seed=1)
    targets = torch.randint(320, (M,), generator=torch.Generator().manual_seed(2))
    results = compiled_and_plain(lambda x, weight: TokenLogps.apply(x, weight, targets), x, weight)
    assert results[0][0].dtype == torch.float32
    assert_close(results, 2 * TOLERANCE[dtype])
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = (x64 @ weight64.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected.backward(random(M, seed=9).double())
    assert_close((results[1], [expected.detach(), x64.grad, weight64.grad]), 2 * TOLERANCE[dtype])


@BOTH
@pytest.mark.parametrize(("D", "G", "Hkv"), [(32, 1, 2), (64, 3, 3), (128, 4, 2), (96, 16, 1)])
@pytest.mark.parametrize("window", [None, 1, 17])
def test_attend(D, G, Hkv, window, dtype):
    """Lengths on both sides of a vector of tokens; beyond a row's length lies what must not be read."""
    lengths = torch.tensor([0, 1, 14, 15, 16, 31, 32, 40])
    B, T, C = len(lengths), 41, (G + 2) * Hkv * D
    config = llama_config(num_attention_heads=G * Hkv, num_key_value_heads=Hkv, head_dim=D)
    cache = Cache(random_model(config).config, B, T, dtype)
    for i, x in enumerate((cache.k, cache.v)):
        x.copy_(random(*x.shape, dtype=dtype, seed=i + 1))
    before = cache.k.clone(), cache.v.clone()
    q, k, v = random(B, C, dtype=dtype).split(
        (G * Hkv * D, Hkv * D, Hkv * D), -1
    )  # slices of wider rows, as when fused
    q, k, v = (
        q.unflatten(-1, (-1, D)),
        k.unflatten(-1, (-1, D)).contiguous(),
        v.unflatten(-1, (-1, D)),
    )  # RoPE copies k

    def attention():
        cache.k.copy_(before[0]), cache.v.copy_(before[1])
        if compiled := kernels.ready(q):
            for b, n in enumerate(lengths):  # NaN would spread; SDPA multiplies what it masks by 0
                cache.k[:, b, n:], cache.v[:, b, n:] = math.nan, math.nan
            expected = cache.k.clone(), cache.v.clone()
            for x, new in zip(expected, (k, v), strict=True):
                x[1, torch.arange(B), lengths] = new
        out = Decode(cache, lengths, int(lengths.max()) + 1, window).attend(1, q, k, v, window)
        if compiled:  # written where it should be, and nowhere else
            for x, wanted in zip((cache.k, cache.v), expected, strict=True):
                torch.testing.assert_close(x, wanted, rtol=0, atol=0, equal_nan=True)
        return out

    assert_close(decoded(attention), 2 * TOLERANCE[dtype])


def test_attention_survives_scores_of_any_size():
    """Softmax in one pass: scores that grow, fall, and are hundreds apart."""
    D, T = 32, 48
    for scale in (1.0, 30.0, 1000.0):
        q, keys, values = (
            random(*shape, seed=i)
            for i, shape in enumerate([(1, 1, D), (1, T, 1, D), (1, T, 1, D)])
        )
        for order in (
            (keys @ q[0, 0]).flatten().argsort(),
            (keys @ q[0, 0]).flatten().argsort(descending=True),
        ):
            k, v = keys[:, order].contiguous(), values[:, order].contiguous()
            out = kernels.attend(scale * q, k[:, -1], v[:, -1], k, v, torch.tensor([T - 1]), None)
            plain = (
                torch.softmax(scale * (k[0, :, 0] @ q[0, 0]).double() / D**0.5, 0)
                @ v[0, :, 0].double()
            )
            assert (out[0, 0] - plain).abs().max() < 1e-5


@BOTH
@pytest.mark.parametrize("V", [5, 256, 300, 49152])
def test_draw(V, dtype):
    """The same token as PyTorch's for all but a few numbers that lie within rounding of a boundary."""
    logits = 3 * random(200, V, dtype=dtype)
    u = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    [compiled], [plain] = decoded(lambda: draw(logits, u, 0.7, 1.0))
    assert (compiled != plain).sum() <= 1 and len(set(plain.tolist())) > min(V, 50) // 2


def test_draw_stays_inside_the_vocabulary_whatever_the_logits():
    for value in (math.nan, -math.inf, math.inf, 0.0):
        tokens = kernels.draw(
            torch.full((2, 300), value), torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), 1.0
        )
        assert 0 <= tokens.min() and tokens.max() < 300


@BOTH
@pytest.mark.parametrize("tied", [True, False])
def test_packed_model_computes_the_same_in_the_same_memory(tmp_path, tied, dtype):
    directory = tiny_checkpoint(tmp_path, head_dim=32, tie_word_embeddings=tied)
    ids, context = (
        torch.randint(320, (21,), generator=torch.Generator().manual_seed(1)),
        Packed([20, 1]),
    )

    def logits(model):
        with torch.inference_mode():
            return model(ids, context, torch.arange(21)).float()

    plain, packed = load(directory, dtype), pack(load(directory, dtype))
    assert (logits(packed) - logits(plain)).abs().max() <= 2 * TOLERANCE[dtype]
    packs = (
        dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    kinds = {type(m) for m in packed.modules() if isinstance(m, PackedLinear | torch.nn.Linear)}
    assert kinds == {PackedLinear if packs else Linear}
    if packs:
        extra = (
            plain.head.weight.numel() if tied else 0
        )  # the embedding keeps its own order beside the head's
        assert (
            sum(p.numel() for p in packed.parameters())
            == sum(p.numel() for p in plain.parameters()) + extra
        )


@BOTH
def test_packed_model_decodes_what_the_plain_one_does(tmp_path, monkeypatch, dtype):
    """A prefill and a step of several rows, with fused projections and kernels, against neither."""
    directory, rows = (
        tiny_checkpoint(tmp_path, head_dim=32, std=0.1),
        [[5, 6, 7], [8], list(range(40, 75))],
    )
    lengths, last = [len(ids) for ids in rows], torch.tensor([11, 12, 13])

    @torch.inference_mode()
    def logits(model):
        cache = Cache(model.config, 3, 64, dtype)
        context = Prefill(cache, [0, 1, 2], lengths)
        first = model(torch.tensor([t for ids in rows for t in ids]), context, context.last)
        return torch.cat(
            [first, model(last, Decode(cache, torch.tensor(lengths), 36, None), torch.arange(3))]
        ).float()

    packed = logits(pack(load(directory, dtype)))
    monkeypatch.setattr(kernels, "library", lambda *_: None)
    assert (packed - logits(load(directory, dtype))).abs().max() <= 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [32, 64])
def test_engine_writes_the_same_with_and_without_kernels(tiny, monkeypatch, head_dim, used):
    model, chat = random_model(llama_config(head_dim=head_dim)), Chat(tiny)

    def outputs():
        requests = [Request([5 + i, 6, 7 * i], 30 + i, digest_key(i)) for i in range(12)]
        Engine(model, chat, SampleOptions(slots=5, ignore_eos=True)).run(requests)
        return [r.output for r in requests]

    compiled, calls = outputs(), len(used)
    assert {values[0].__name__ for values in used} == {
        "rms_norm",
        "rotate",
        "swiglu",
        "draw",
        "attend",
        "attend_packed",
    }
    monkeypatch.setattr(kernels, "library", lambda *_: None)
    assert outputs() == compiled and len(used) == calls


def test_training_and_scoring_compute_alike(used):
    """A reference log-prob is scored without gradients, the policy's with them: to the same bits."""
    model = random_model(llama_config(head_dim=32)).to(torch.bfloat16)
    sequences = [([5, 6, 7, 8], 2), ([9, 10], 1)]
    scored, trained = score_sequences(model, sequences), response_logps(model, sequences)
    assert all(torch.equal(a, b) for a, b in zip(scored, trained, strict=True))
    torch.cat(trained).sum().backward()
    names = {values[0].__name__ for values in used}
    assert names == {
        "rotate",
        *(
            name + way
            for name in ("rms_norm", "swiglu", "attend_packed", "token_logps")
            for way in ("", "_backward")
        ),
    }


def test_without_a_compiler_text_is_generated_all_the_same(tmp_path, used):
    program = "import torch; from cpu import kernels; print(kernels.ready(torch.ones(2, 32)))"
    home = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    answers = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**home, **env},
            capture_output=True,
            text=True,
            check=True,
        )
        for env in (
            {"PATH": ""},
            {"PATH": "/usr/bin:/bin", "SYNPO_KERNELS": "0"},
            {"PATH": "/usr/bin:/bin"},
        )
    ]
    assert [a.stdout.strip() for a in answers] == ["False", "False", "True"]
    assert (
        "no compiled kernels" in answers[0].stderr
        and not answers[1].stderr
        and not answers[2].stderr
    )
    assert len(list((tmp_path / ".cache" / "synpo").glob("*.so"))) == 1
    used.append("not in this process")
