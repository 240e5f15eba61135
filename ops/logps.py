"""Log-probs of given tokens without the (M, V) matrix of logits."""

import torch
import torch.nn.functional as F

from ops import cpu
from ops.cpu import compiled


def token_logps(x, weight, targets):
    """log softmax(x @ weight.T)[targets] in fp32: x (M, C), weight (V, C), targets (M,) -> (M,)."""
    return TokenLogps.apply(x, weight, targets)


class TokenLogps(torch.autograd.Function):
    """token_logps in chunks of rows, each of which is computed again in the backward pass.

    Peak memory is (CHUNK, V) instead of (M, V), at the price of one more matmul of the head.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx, x, weight, targets):
        chunk = TokenLogps.CHUNK
        pieces = [
            chunk_logps(F.linear(x1, weight), targets1)  # from (chunk, V)
            for x1, targets1 in zip(x.split(chunk), targets.split(chunk), strict=True)
        ]
        logps, lse = (torch.cat(piece) for piece in zip(*pieces, strict=True))  # (M,), (M,)
        ctx.save_for_backward(x, weight, targets, lse)
        return logps

    @staticmethod
    def backward(ctx, dlogps):
        x, weight, targets, lse = ctx.saved_tensors
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight)
        for start in range(0, len(x), TokenLogps.CHUNK):
            rows = slice(start, start + TokenLogps.CHUNK)
            logits = F.linear(x[rows], weight)  # (chunk, V)
            dlogits = chunk_gradient(logits, dlogps[rows], lse[rows], targets[rows])
            torch.mm(dlogits, weight, out=dx[rows])
            dweight.addmm_(dlogits.T, x[rows])
        return dx, dweight, None


@compiled(cpu.token_logps)
def chunk_logps(logits, targets):
    """Log-probs (M,) of targets (M,) under logits (M, V), and each row's log-sum-exp (M,)."""
    logits = logits.float()
    lse = logits.logsumexp(1)
    return logits.gather(1, targets[:, None])[:, 0] - lse, lse


@compiled(cpu.token_logps_backward)
def chunk_gradient(logits, dlogps, lse, targets):
    """d loss / d logits (M, V) = dlogps * (onehot(targets) - softmax(logits)), overwritten."""
    d = (logits.float() - lse[:, None]).exp_().mul_(-dlogps[:, None])
    d[torch.arange(len(d), device=d.device), targets] += dlogps
    return d.to(logits.dtype)
