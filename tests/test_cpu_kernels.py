"""Every compiled kernel against plain PyTorch, in both number formats, at the edges of vectors, blocks and windows."""
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, llama_config, random_model, tiny_checkpoint

import cpu_kernels
from data import Chat
from model import Cache, Decode, Linear, Packed, RMSNorm, load, pack, rotate
from sample import Engine, Request, SampleOptions, digest_key, draw
from train import score_sequences

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of values of about 1; bf16 holds 8 bits of each


def random(*shape, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compiled_and_plain(function):
    """The function's value with the kernels, which must be ready, and without."""
    with torch.inference_mode():
        compiled = function()
    with torch.no_grad():
        plain = function()
    assert compiled.is_inference() and not plain.is_inference()
    return compiled.float(), plain.float()


@pytest.fixture(autouse=True)
def used(monkeypatch):
    """Counts calls of C: a comparison of PyTorch with itself would prove nothing."""
    calls, call = [], cpu_kernels.call
    monkeypatch.setattr(cpu_kernels, "call", lambda *values: (calls.append(values), call(*values)))
    yield calls
    assert calls


@BOTH
@pytest.mark.parametrize(("N", "C"), [(1, 32), (3, 576), (130, 64)])
def test_rms_norm(N, C, dtype):
    norm = RMSNorm(C, 1e-5).to(dtype)
    norm.weight.data = random(C, dtype=dtype, seed=1)
    compiled, plain = compiled_and_plain(lambda: norm(100 * random(N, C, dtype=dtype)))
    assert (compiled - plain).abs().max() <= 4 * TOLERANCE[dtype]


@BOTH
@pytest.mark.parametrize(("N", "H", "D"), [(1, 1, 32), (5, 3, 64), (40, 12, 128)])
def test_rotate_also_inside_wider_rows(N, H, D, dtype):
    angles = 10 * random(N, 1, D // 2, seed=1)
    wide = random(N, 3 * H * D, dtype=dtype)
    compiled, plain = compiled_and_plain(lambda: rotate(wide.clone()[:, H * D:2 * H * D].unflatten(-1, (H, D)), angles.cos(),
                                                        angles.sin()))
    assert (compiled - plain).abs().max() <= 4 * TOLERANCE[dtype]
    assert (plain - wide[:, H * D:2 * H * D].unflatten(-1, (H, D))).abs().max() > 1


@BOTH
def test_swiglu_of_gates_of_any_size(dtype):
    gate = torch.cat([torch.arange(-600, 200, 0.25), torch.tensor([-1e30, -1e4, -0.0, 1e-30, 1e4, 1e30, *[0.0] * 26]),
                      random(32)]).to(dtype)
    up = random(*gate.shape, dtype=dtype, seed=1)
    with torch.inference_mode():
        compiled = cpu_kernels.swiglu(gate.clone(), up)
    assert torch.allclose(compiled.float(), (F.silu(gate) * up).float(), rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype])


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
    q, k, v = random(B, C, dtype=dtype).split((G * Hkv * D, Hkv * D, Hkv * D), -1)  # slices of wider rows, as when fused
    q, k, v = q.unflatten(-1, (-1, D)), k.unflatten(-1, (-1, D)), v.unflatten(-1, (-1, D))

    def attention():
        cache.k.copy_(before[0]), cache.v.copy_(before[1])
        if torch.is_inference_mode_enabled():
            for b, n in enumerate(lengths):  # NaN would spread; SDPA multiplies what it masks by 0
                cache.k[:, b, n:], cache.v[:, b, n:] = math.nan, math.nan
            expected = cache.k.clone(), cache.v.clone()
            for x, new in zip(expected, (k, v), strict=True):
                x[1, torch.arange(B), lengths] = new
        out = Decode(cache, lengths, int(lengths.max()) + 1, window).attend(1, q, k, v, window)
        if torch.is_inference_mode_enabled():  # written where it should be, and nowhere else
            for x, wanted in zip((cache.k, cache.v), expected, strict=True):
                torch.testing.assert_close(x, wanted, rtol=0, atol=0, equal_nan=True)
        return out
    compiled, plain = compiled_and_plain(attention)
    assert compiled.shape == (B, G * Hkv, D)
    assert (compiled - plain).abs().max() <= 2 * TOLERANCE[dtype]


def test_attention_survives_scores_of_any_size():
    """Softmax in one pass: scores that grow, fall, and are hundreds apart."""
    D, T = 32, 48
    for scale in (1.0, 30.0, 1000.0):
        q, keys, values = (random(*shape, seed=i) for i, shape in enumerate([(1, 1, D), (1, T, 1, D), (1, T, 1, D)]))
        for order in (keys @ q[0, 0]).flatten().argsort(), (keys @ q[0, 0]).flatten().argsort(descending=True):
            k, v = keys[:, order].contiguous(), values[:, order].contiguous()
            out = cpu_kernels.attend(scale * q, k[:, -1], v[:, -1], k, v, torch.tensor([T - 1]), None)
            plain = torch.softmax(scale * (k[0, :, 0] @ q[0, 0]).double() / D ** 0.5, 0) @ v[0, :, 0].double()
            assert (out[0, 0] - plain).abs().max() < 1e-5


@BOTH
@pytest.mark.parametrize("V", [5, 256, 300, 49152])
def test_draw(V, dtype):
    """The same token as PyTorch's for all but a few numbers that lie within rounding of a boundary."""
    logits = 3 * random(200, V, dtype=dtype)
    u = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    compiled, plain = compiled_and_plain(lambda: draw(logits, u, 0.7, 1.0))
    assert (compiled != plain).sum() <= 1 and len(set(plain.tolist())) > min(V, 50) // 2


def test_draw_stays_inside_the_vocabulary_whatever_the_logits():
    for value in (math.nan, -math.inf, math.inf, 0.0):
        tokens = cpu_kernels.draw(torch.full((2, 300), value), torch.tensor([0.0, 1 - 2.0 ** -53], dtype=torch.float64), 1.0)
        assert 0 <= tokens.min() and tokens.max() < 300


@BOTH
@pytest.mark.parametrize("tied", [True, False])
def test_packed_model_computes_the_same_in_the_same_memory(tmp_path, tied, dtype):
    directory = tiny_checkpoint(tmp_path, head_dim=32, tie_word_embeddings=tied)
    ids, context = torch.randint(320, (21,), generator=torch.Generator().manual_seed(1)), Packed([20, 1])

    def logits(model):
        with torch.inference_mode():
            return model(ids, context, torch.arange(21)).float()
    plain, packed = load(directory, dtype), pack(load(directory, dtype))
    assert (logits(packed) - logits(plain)).abs().max() <= 2 * TOLERANCE[dtype]
    packs = (dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
             and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert all(m.weight.is_mkldnn == packs for m in packed.modules() if isinstance(m, Linear))
    if packs:
        extra = plain.head.weight.numel() if tied else 0  # the embedding keeps its own order beside the head's
        assert sum(p.numel() for p in packed.parameters()) == sum(p.numel() for p in plain.parameters()) + extra


@pytest.mark.parametrize("head_dim", [32, 64])
def test_engine_writes_the_same_with_and_without_kernels(tiny, monkeypatch, head_dim, used):
    model, chat = random_model(llama_config(head_dim=head_dim)), Chat(tiny)

    def outputs():
        requests = [Request([5 + i, 6, 7 * i], 30 + i, digest_key(i)) for i in range(12)]
        Engine(model, chat, SampleOptions(slots=5, ignore_eos=True)).run(requests)
        return [r.output for r in requests]
    compiled, calls = outputs(), len(used)
    assert {values[0].__name__ for values in used} == {"rms_norm", "rotate", "swiglu", "draw", "attend"}
    monkeypatch.setattr(cpu_kernels, "library", lambda *_: None)
    assert outputs() == compiled and len(used) == calls


def test_training_and_scoring_never_come_here(tiny, used):
    """Policy and reference are computed alike, with gradients or without; only inference_mode() has kernels."""
    model = load(tiny, torch.float32)
    with torch.no_grad():
        model(torch.tensor([1, 2, 3]), Packed([3]), torch.arange(3))
    score_sequences(model, [([5, 6, 7, 8], 2)])
    assert not used
    with torch.inference_mode():
        model(torch.tensor([1, 2, 3]), Packed([3]), torch.arange(3))
    assert used


def test_without_a_compiler_text_is_generated_all_the_same(tmp_path, used):
    program = ("import torch, cpu_kernels; x = torch.ones(2, 32)\nwith torch.inference_mode(): print(cpu_kernels.ready(x))")
    home = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    answers = [subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**home, **env}, capture_output=True, text=True,
                              check=True) for env in (
        {"PATH": ""}, {"PATH": "/usr/bin:/bin", "SYNPO_KERNELS": "0"}, {"PATH": "/usr/bin:/bin"})]
    assert [a.stdout.strip() for a in answers] == ["False", "False", "True"]
    assert "no compiled kernels" in answers[0].stderr and not answers[1].stderr and not answers[2].stderr
    assert len(list((tmp_path / ".cache" / "synpo").glob("*.so"))) == 1
    used.append("not in this process")
