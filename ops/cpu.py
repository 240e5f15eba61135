"""The compiled functions of cpu.c on CPU tensors, with gradients; GCC builds them on first use.

Models are written in plain PyTorch. One decorator line over a function names its compiled twin:

    @compiled(cpu.swiglu)
    def swiglu(gate, up):
        return F.silu(gate) * up

The plain function runs where the twin does not take the arguments: a GPU tensor, a width that is
not a multiple of 32, a machine without GCC 12+, such as a Mac with its own compiler. The two agree
to rounding; the twin is faster and keeps less for the backward pass.

SYNPO_KERNELS=0 turns the twins off. SYNPO_KERNELS_ARCH sets GCC's -march: the default "native" uses
every instruction of this CPU; "x86-64-v3" compiles the same code for all CPUs with AVX2.
"""

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
from functools import cache, wraps
from pathlib import Path

import torch
from torch.autograd import Function

from plumbing.files import cache_folder, digest
from plumbing.ranks import DEVICE, print0
from plumbing.stage import MACHINE_PARTS, cpuinfo

SOURCE = Path(__file__).with_name("cpu.c")
ARCH = os.environ.get("SYNPO_KERNELS_ARCH", "native")
COMPILE = ("cc", "-O3", f"-march={ARCH}", "-ffp-contract=fast", "-fno-math-errno")
COMPILE += ("-fopenmp", "-fPIC", "-w", "-c")
# OpenMP is not linked: its symbols resolve to the copy that PyTorch has loaded. A second copy would
# bring a second pool of threads, and both would spin.
LINK = ("cc", "-shared")
FLAGS = {torch.bfloat16: (), torch.float32: ("-DFLOAT32",)}
WIDTH = 32  # the C functions read this many numbers at a time
STRIPE = 64  # rows whose contributions to a norm's weight gradient are summed by one thread
PLAIN = (torch.Tensor, torch.nn.Parameter)  # these own memory; a DTensor or FakeTensor does not

# The parameters of every function in cpu.c, in order. "number" is the dtype that the library was
# compiled for. A pointer takes a contiguous tensor; `rows` takes one whose rows may lie apart.
PARAMETERS = {
    "rms_norm": "number* number* number* int64 int64 float",
    "rms_norm_backward": "number* float* number* number* number* int64 int64 float int64",
    "apply_rope": "number* rows float* float* int64 int64 int64 int64 float",
    "swiglu": "number* number* number* int64",
    "swiglu_backward": "number* number* number* number* number* int64",
    "token_logps": "float* float* number* int64* int64 int64",
    "token_logps_backward": "number* float* float* int64* int64 int64",
    "sample_token": "int64* number* double* int64 int64 float",
    "attend": "number* rows rows rows number* number* int64*" + 7 * " int64",
    "attend_packed": "number* float* number* number* number* int64* int64 int64 int64",
    "attend_packed_backward": 8 * "number* " + "float* int64* int64 int64 int64",
}


# ---------------------------------------------------------------------------------- calling C


class Pointer:
    """A ctypes argument type: a CPU tensor of one dtype, passed as its address.

    It must be contiguous. With `rows` it may be (N, H, D) of which each (H, D) is: a slice of wider
    rows.
    """

    def __init__(self, dtype: torch.dtype, rows: bool = False):
        self.dtype = dtype
        self.rows = rows

    def from_param(self, x: torch.Tensor) -> ctypes.c_void_p:
        """ctypes calls this for every argument, and turns a TypeError into an ArgumentError."""
        contiguous = x.is_contiguous() or (self.rows and x[0].is_contiguous())
        if x.dtype is self.dtype and x.is_cpu and contiguous:
            return ctypes.c_void_p(x.data_ptr())
        wanted = "contiguous rows" if self.rows else "a contiguous tensor"
        raise TypeError(f"needs {wanted} of {self.dtype} on the CPU, got {x.dtype}, {x.stride()}")


TYPES = {
    "float*": Pointer(torch.float32),
    "double*": Pointer(torch.float64),
    "int64*": Pointer(torch.int64),
    "int64": ctypes.c_int64,
    "float": ctypes.c_float,
}


def check(shapes_agree: bool, *tensors: torch.Tensor) -> None:
    """C cannot see a tensor's size: with a wrong shape it would read or write beyond the end."""
    if not shapes_agree:
        raise ValueError(f"shapes do not agree: {', '.join(str(tuple(x.shape)) for x in tensors)}")


def call(function, *arguments: torch.Tensor | int | float) -> None:
    """Call C. One place, so that tests and benchmarks can watch every call."""
    function(*arguments)


# ---------------------------------------------------------------------------------- compiling


@cache
def library(dtype: torch.dtype, *flags: str) -> ctypes.CDLL | None:
    """cpu.c compiled for a dtype, or None where that fails: then PyTorch does the work."""
    if os.environ.get("SYNPO_KERNELS") == "0":
        return None
    try:
        functions = ctypes.CDLL(str(compile_source((*FLAGS[dtype], *flags))))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        problem = "could not compile the CPU kernels; falling back to PyTorch (slower)"
        print(f"{problem}: {reason.splitlines()[0]}", file=sys.stderr)
        return None
    types = {**TYPES, "number*": Pointer(dtype), "rows": Pointer(dtype, rows=True)}
    for name, parameters in PARAMETERS.items():
        if hasattr(functions, name):  # attention is compiled apart from the rest
            function = getattr(functions, name)
            function.argtypes = [types[word] for word in parameters.split()]
            function.restype = None
    return functions


@cache
def tell_of_slow_bf16(dtype: torch.dtype) -> None:
    """Say once if this CPU has no instructions for bf16: then PyTorch multiplies one by one."""
    if dtype != torch.bfloat16 or DEVICE.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print0("  this CPU has no bf16 instructions: --dtype float32 is many times faster here")


def compile_source(flags: tuple[str, ...]) -> Path:
    """The shared library in the user's cache folder, named by a hash of what it is made from."""
    # the CPU too: "native" means something else on each machine that shares this home
    lines = cpuinfo().splitlines(keepends=True) or [f"Features: {platform.machine()}"]
    cpu = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    folder = cache_folder()
    path = folder / f"kernels-{digest(SOURCE.read_text(), COMPILE, LINK, flags, cpu)}.so"
    if path.is_file():
        return path

    # compile in a private folder and move the result: several processes may get here at once
    with tempfile.TemporaryDirectory(dir=folder) as private:
        made = f"{private}/kernels"
        compile_command = (*COMPILE, *flags, SOURCE, "-o", f"{made}.o")
        link_command = (*LINK, f"{made}.o", "-lm", "-o", f"{made}.so")
        for command in (compile_command, link_command):
            subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(f"{made}.so", path)
    return path


def in_use() -> str:
    """For manifests: which kernels compute here."""
    if DEVICE.type != "cpu" or library(torch.float32) is None:
        return "pytorch"
    return "compiled" if ARCH == "native" else f"compiled for {ARCH}"


MACHINE_PARTS["kernels"] = in_use


def ready(x: torch.Tensor, multiple: int = WIDTH) -> bool:
    """Whether the compiled functions take x: CPU, dtype, whole vectors, and a compiler."""
    return (
        x.is_cpu
        and x.shape[-1] % multiple == 0
        and x.dtype in FLAGS
        and type(x) in PLAIN
        and library(x.dtype) is not None
    )


def compiled(twin, multiple: int = WIDTH):
    """Decorate a plain PyTorch function: its compiled twin runs wherever it takes the arguments."""

    def decorate(plain):
        @wraps(plain)
        def dispatch(x, *more):
            result = twin(x, *more) if ready(x, multiple) else NotImplemented
            return plain(x, *more) if result is NotImplemented else result

        return dispatch

    return decorate


# ---------------------------------------------------------------------------------- for model.py


class RMSNorm(Function):
    """x (N, C) or (N, H, C), weight (C,), eps -> as x; every row of C numbers on its own."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        C = x.shape[-1]
        N = x.numel() // C
        check(weight.shape == (C,), x, weight)
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out = torch.empty_like(x)
        call(library(x.dtype).rms_norm, out, x, weight, N, C, eps)
        return out

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        C = x.shape[-1]
        N = x.numel() // C
        dx = torch.empty_like(x)
        # one partial sum for each stripe of rows, so that the total does not depend on the threads
        stripes = -(-N // STRIPE)
        dweight = x.new_empty(stripes, C, dtype=torch.float32)
        backward = library(x.dtype).rms_norm_backward
        call(backward, dx, dweight, dout.contiguous(), x, weight, N, C, ctx.eps, STRIPE)
        return dx, dweight.sum(0).to(weight.dtype), None


rms_norm = RMSNorm.apply


class RoPE(Function):
    """x (N, H, D), cos and sin (N, 1, D/2) -> (N, H, D); x may be a slice of wider rows."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return RoPE.rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, dout):
        cos, sin = ctx.saved_tensors
        return RoPE.rotate(dout.contiguous(), cos, sin, -1.0), None, None

    @staticmethod
    def rotate(x, cos, sin, direction: float):
        """direction: 1, or -1 to rotate back, as the gradient does."""
        N, H, D = x.shape
        check(cos.shape == sin.shape == (N, 1, D // 2), x, cos, sin)
        out = torch.empty(N, H, D, dtype=x.dtype)
        function = library(x.dtype).apply_rope
        call(function, out, x, cos, sin, N, H, D, x.stride(0), direction)
        return out


apply_rope = RoPE.apply


class SwiGLU(Function):
    """silu(gate) * up, of equal shapes."""

    @staticmethod
    def forward(ctx, gate, up):
        check(gate.shape == up.shape, gate, up)
        gate = gate.contiguous()
        up = up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        call(library(gate.dtype).swiglu, out, gate, up, gate.numel())
        return out

    @staticmethod
    def backward(ctx, dout):
        gate, up = ctx.saved_tensors
        dgate = torch.empty_like(gate)
        dup = torch.empty_like(up)
        function = library(gate.dtype).swiglu_backward
        call(function, dgate, dup, dout.contiguous(), gate, up, gate.numel())
        return dgate, dup


swiglu = SwiGLU.apply


# ---------------------------------------------------------------------------------- for attention


def attention_library(q, k) -> ctypes.CDLL | None:
    """Attention compiled for the sizes of q (N, H, D) and k (N, Hkv, D), or None.

    As constants they keep its sums in registers.
    """
    if not ready(q):
        return None
    return library(q.dtype, f"-DHEAD_DIM={q.shape[2]}", f"-DGROUP={q.shape[1] // k.shape[1]}")


def attend_packed(q, k, v, starts, window: int | None):
    """q (N, H, D), k and v (N, Hkv, D), starts (S + 1,) int64 -> (N, H, D)."""
    if attention_library(q, k) is None:
        return NotImplemented
    return AttendPacked.apply(q, k, v, starts, window)


class AttendPacked(Function):
    @staticmethod
    def forward(ctx, q, k, v, starts, window):
        N, H, D = q.shape
        Hkv = k.shape[1]
        check(k.shape == v.shape == (N, Hkv, D), q, k, v)
        q, k, v = (x.contiguous() for x in (q, k, v))
        out = torch.empty_like(q)
        lse = q.new_empty(N, H, dtype=torch.float32)  # log-sum-exp of every row of scores
        ctx.sizes = (len(starts) - 1, Hkv, window or N)
        function = attention_library(q, k).attend_packed
        call(function, out, lse, q, k, v, starts, *ctx.sizes)
        ctx.save_for_backward(q, k, v, out, lse, starts)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, starts = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        backward = attention_library(q, k).attend_packed_backward
        dout = dout.contiguous()
        call(backward, dq, dk, dv, dout, q, k, v, out, lse, starts, *ctx.sizes)
        return dq, dk, dv, None, None


def attend(q, k, v, keys, values, lengths, window: int | None):
    """One new token for each of B rows of a key-value cache, without gradients.

    q (B, H, D), k and v (B, Hkv, D) -> (B, H, D); each may be a slice of wider rows. k and v are
    written into keys and values (B, T, Hkv, D) at lengths (B,), which must be below T.
    """
    attention = attention_library(q, k)
    if attention is None:
        return NotImplemented
    B, T, Hkv, D = keys.shape
    check(q.shape[::2] == (B, D) and k.shape == v.shape == (B, Hkv, D), q, k, v, keys)
    check(keys.shape == values.shape and lengths.shape == (B,), keys, values, lengths)
    out = torch.empty(q.shape, dtype=q.dtype)
    strides = (q.stride(0), k.stride(0), v.stride(0))
    sizes = (B, T, Hkv, *strides, window or T)
    call(attention.attend, out, q, k, v, keys, values, lengths, *sizes)
    return out


# ---------------------------------------------------------------------------------- for logps.py


def token_logps(logits, targets):
    """fp32 log-probs (M,) of targets (M,) under logits (M, V), and each row's log-sum-exp (M,)."""
    M, V = logits.shape
    check(targets.shape == (M,), logits, targets)
    logps, lse = torch.empty(2, M).unbind()
    call(library(logits.dtype).token_logps, logps, lse, logits, targets, M, V)
    return logps, lse


def token_logps_backward(logits, dlogps, lse, targets):
    """The gradient of token_logps with respect to logits (M, V), which it overwrites."""
    M, V = logits.shape
    check(dlogps.shape == lse.shape == targets.shape == (M,), logits, dlogps, lse, targets)
    backward = library(logits.dtype).token_logps_backward
    call(backward, logits, dlogps.contiguous(), lse, targets, M, V)
    return logits


# ---------------------------------------------------------------------------------- for sample.py


def sample_token(logits, u, temperature: float, top_p: float):
    """Tokens (B,) from logits (B, V) and the float64 uniform numbers u (B,)."""
    if temperature == 0 or top_p < 1:
        return NotImplemented  # not compiled
    B, V = logits.shape
    check(u.shape == (B,), logits, u)
    tokens = torch.empty(B, dtype=torch.int64)
    call(library(logits.dtype).sample_token, tokens, logits, u, B, V, temperature)
    return tokens
