"""Two generated texts are the same but for rounding: how tests compare kernels, batch sizes, CPUs.

The last bits of logits differ between them. So a sampled token may differ where its random number
lies next to a boundary of the distribution's CDF, and a greedy one where two logits nearly tie.
After such a token the texts have nothing to do with each other.
"""

import torch

from ops.attention import Packed
from sample import Request, SampleOptions, uniform


def near_cdf(logits, u, temperature: float, tokens, tolerance: float) -> torch.Tensor:
    """Whether u (B,) lies within tolerance of the interval that tokens (B,) have in the CDF: (B,).

    logits (B, V).
    """
    weights = (logits.double() / temperature).softmax(-1)
    high = weights.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    low = high - weights.gather(1, tokens[:, None])[:, 0]
    not_below = low - tolerance <= u
    not_above = u <= high + tolerance
    return not_below & not_above


@torch.no_grad()
def assert_same_text(
    model, ours: Request, theirs: Request, o: SampleOptions, tolerance: float = 1e-3
) -> None:
    """Equal outputs, or equal up to a token that rounding may change; `model` judges which may.

    tolerance: of the CDF, or of logits if o.temperature is 0.
    """
    assert ours.ids == theirs.ids
    assert ours.seed == theirs.seed
    if ours.output == theirs.output:
        return
    pairs = zip(ours.output, theirs.output, strict=False)
    differ = [a != b for a, b in pairs]
    assert any(differ), "one text is the beginning of the other"
    step = differ.index(True)

    # the distribution that both tokens were drawn from
    ids = [*ours.ids, *ours.output[:step]]
    context = Packed([len(ids)])
    logits = model(torch.tensor(ids), context, context.last).float()  # (1, V)
    for request in (ours, theirs):
        token = torch.tensor([request.output[step]])
        if o.temperature == 0:
            assert logits[0, token] >= logits.max() - tolerance
        else:
            u = uniform(torch.tensor([request.seed]), torch.tensor([step]))
            assert near_cdf(logits, u, o.temperature, token, tolerance).all()
