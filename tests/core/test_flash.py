"""The FlashAttention path against SDPA, with the real flash-attn package on a CPU.

Its Triton backend runs in Triton's interpreter, slowly. That takes an environment of its own, see
requirements-flash.txt; .ci/run builds it. Elsewhere these tests skip. The backend ignores sliding
windows, so they are not tested here.
"""

import importlib.util
import os

import pytest
import torch
from conftest import llama_config, random_model, tiny_checkpoint
from texts import assert_same_text

import ops.attention
from checkpoint import load
from formats.chat import Chat
from ops.attention import Cache, Decode, Packed, Prefill
from sample import Engine, Request, SampleOptions

if torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None:
    reason = "needs flash-attn in the environment of requirements-flash.txt"
    pytest.skip(reason, allow_module_level=True)


def import_flash_attn():
    """The package, which registers its functions for GPUs alone and asks a GPU for its maker."""
    os.environ.update(TRITON_INTERPRET="1", FLASH_ATTENTION_TRITON_AMD_ENABLE="TRUE")
    custom_op = torch.library.custom_op

    def register_everywhere(*args, device_types=None, **kwargs):
        return custom_op(*args, **kwargs)

    torch.library.custom_op = register_everywhere
    try:
        import flash_attn
        from flash_attn.flash_attn_triton_amd import fwd_decode, fwd_prefill, utils
    finally:
        torch.library.custom_op = custom_op
    for module in (fwd_decode, fwd_prefill, utils):
        for name in ("is_hip", "is_cdna", "is_rdna"):
            setattr(module, name, lambda: False)
    return flash_attn


flash_attn = import_flash_attn()
TOLERANCE = 2e-3  # of values of about 1 in fp16


@pytest.fixture
def flash(monkeypatch):
    """A switch, flash(True or False), and the count of calls that reached the package."""
    calls = {"flash_attn_varlen_func": 0, "flash_attn_with_kvcache": 0}

    def counted(name):
        function = getattr(flash_attn, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in calls:
        monkeypatch.setattr(ops.attention, name, counted(name))

    def switch(on: bool):
        monkeypatch.setattr(ops.attention, "use_flash", lambda x: on and x.dtype == torch.float16)

    switch.calls = calls
    return switch


def random(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


HEADS = pytest.mark.parametrize(("H", "Hkv", "D"), [(4, 4, 32), (6, 2, 64), (4, 1, 32)])


@pytest.mark.slow
@HEADS
def test_packed_forward_and_backward(flash, H, Hkv, D):
    lengths = [5, 1, 70, 16]
    heads = (H, Hkv, Hkv)
    results = []
    for on in (True, False):
        flash(on)
        q, k, v = (random(92, heads[i], D, seed=i).requires_grad_() for i in range(3))
        out = Packed(lengths).attend(0, q, k, v, None)
        (out * random(92, H, D, seed=3)).float().sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    assert flash.calls["flash_attn_varlen_func"] == 1
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 4 * TOLERANCE
        assert theirs.abs().max() > 0.5


@pytest.mark.slow
@HEADS
@torch.no_grad()
def test_decode_with_rows_of_unequal_length(flash, H, Hkv, D):
    raw = llama_config(num_attention_heads=H, num_key_value_heads=Hkv, head_dim=D)
    config = random_model(raw).config
    lengths = torch.tensor([0, 7, 31, 64])
    heads = (H, Hkv, Hkv)
    results = []
    for on in (True, False):
        flash(on)
        cache = Cache(config, 6, 80, torch.float16)
        cache.k.copy_(random(*cache.k.shape, seed=1))
        cache.v.copy_(random(*cache.v.shape, seed=2))
        q, k, v = (random(4, heads[i], D, seed=3 + i) for i in range(3))
        out = Decode(cache, lengths, 65, None).attend(1, q, k, v, None)
        results.append((out, cache.k, cache.v))
    assert flash.calls["flash_attn_with_kvcache"] == 1
    (flash_out, *flash_cache), (out, *cache) = results
    assert (flash_out - out).abs().max() < TOLERANCE and out.abs().max() > 0.5
    assert all(torch.equal(a, b) for a, b in zip(flash_cache, cache, strict=True))


@pytest.mark.slow
@torch.no_grad()
def test_prefill_then_decode_equal_sdpa(flash):
    """The whole model, as the sampler runs it: prompts to cache rows, then a token for each."""
    model = random_model(llama_config(head_dim=32)).half()
    lengths = [9, 1, 20]
    ids = torch.randint(320, (33,), generator=torch.Generator().manual_seed(1))
    results = []
    for on in (True, False):
        flash(on)
        cache = Cache(model.config, 3, 32, torch.float16)
        context = Prefill(cache, [0, 1, 2], lengths)
        first = model(ids[:30], context, context.last)
        step = Decode(cache, torch.tensor(lengths), 21, None)
        results.append((first, model(ids[30:], step, torch.arange(3))))
    assert min(flash.calls.values()) > 0
    for ours, theirs in zip(*results, strict=True):
        # logits are as large as 8 and have passed through two layers in fp16
        assert (ours - theirs).abs().max() < 20 * TOLERANCE and theirs.abs().max() > 0.5


@pytest.mark.slow
def test_the_engine_writes_the_same_greedy_text(flash, tmp_path):
    directory = tiny_checkpoint(tmp_path, head_dim=32)
    model = load(directory, torch.float16)
    chat = Chat(directory)
    o = SampleOptions(slots=2, temperature=0, ignore_eos=True)
    answers = []
    for on in (True, False):
        flash(on)
        requests = [Request([5 + i, 6, 7 * i], 4 + i, seed=i) for i in range(3)]
        Engine(model, chat, o).run(requests)
        answers.append(requests)
    assert min(flash.calls.values()) > 0
    for ours, theirs in zip(*answers, strict=True):
        assert_same_text(model, ours, theirs, o, tolerance=20 * TOLERANCE)
