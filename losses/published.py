"""Published preference losses: pure functions from what is known of B pairs to B losses (SynPO's equation 6 takes any).

A loss is loss(p: PairLogps, *, parameter=default, ...) -> (B,), and a row in LOSSES. Its keyword parameters are its options on
the command line, and what it reads of p is what is computed for it: one that never touches p.ref_chosen never has a reference
model loaded. --loss FILE.py:FUNCTION chooses one of yours, which obeys the same rules.

Notation as in pairs.py; besides, ls = log sigmoid and lo(m) = m - log(1 - e^m). Defaults are those published or, where papers
name none, those of the authors' code or of TRL 1.
"""

import inspect
from collections.abc import Callable
from dataclasses import field, make_dataclass
from functools import cache

import torch
import torch.nn.functional as F

from data import InputError, load_function
from losses.pairs import PairLogps

ls = F.logsigmoid


def log_odds(mean_logp: torch.Tensor) -> torch.Tensor:
    """lo(m) = log(p / (1 - p)) of p = e^m, (B,): from whichever of two forms does not cancel; m is kept below -1e-6."""
    m = mean_logp.clamp(max=-1e-6)
    return m - torch.where(m > -0.69, (-torch.expm1(m)).log(), torch.log1p(-m.exp()))


# ---------------------------------------------------------------------------------------------- of the margin h


def dpo(p: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO, arXiv 2305.18290 equation 7: -ls(beta h). With label_smoothing e it is cDPO: -(1 - e) ls(beta h) - e ls(-beta h).

    Needs the reference. Published: beta 0.1 to 0.5; tuned for chat models 0.003 to 0.01 (arXiv 2502.01237); cDPO starts at e
    = 0.1. Trap: only the difference is constrained, both log-probs usually fall. cDPO ends at h = log((1 - e) / e) / beta.
    """
    return -(1 - label_smoothing) * ls(beta * p.margin) - label_smoothing * ls(-beta * p.margin)


def hinge(p: PairLogps, *, beta: float = 0.1) -> torch.Tensor:
    """Hinge on DPO's margin, arXiv 2309.06657: max(0, 1 - beta h).

    Needs the reference. Trap: no gradient once h > 1 / beta.
    """
    return F.relu(1 - beta * p.margin)


def robust(p: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> torch.Tensor:
    """Robust DPO, arXiv 2403.00409: [-(1 - e) ls(beta h) + e ls(-beta h)] / (1 - 2e), e the share of flipped labels, below 0.5.

    Needs the reference. Published: beta 0.1, e 0.1. Trap: the sign of e's term is the opposite of cDPO's; unbiased, but not
    bounded below, so the gradient never dies and the loss may be negative.
    """
    e = label_smoothing
    return (-(1 - e) * ls(beta * p.margin) + e * ls(-beta * p.margin)) / (1 - 2 * e)


def ipo(p: PairLogps, *, tau: float = 0.005) -> torch.Tensor:
    """IPO, arXiv 2310.12036, on sums: (h - 1 / (2 tau))^2.

    Needs the reference. Tuned for chat models: tau 0.001 to 0.005 (arXiv 2502.01237), that is a target of 100 to 500 nats.
    Trap: tau of this form and of ipo-mean do not transfer; say which was used.
    """
    return (p.margin - 1 / (2 * tau)) ** 2


def ipo_mean(p: PairLogps, *, tau: float = 0.1) -> torch.Tensor:
    """IPO, arXiv 2310.12036, with log-ratios divided by their lengths, as in TRL: (uc / nc - ur / nr - 1 / (2 tau))^2.

    Needs the reference and lengths. TRL's tau is 0.1. Trap: so it aims at 5 nats a token, which no model
    reaches, and only ever pushes.
    """
    return (
        p.ratio_chosen / p.chosen_tokens - p.ratio_rejected / p.rejected_tokens - 1 / (2 * tau)
    ) ** 2


def exo(p: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> torch.Tensor:
    """EXO for pairs, arXiv 2402.00856: KL from q = sigmoid(beta h) to the smoothed label: q log(q / (1-e)) +
    (1-q) log((1-q) / e).

    Needs the reference. TRL's e 0.001. Trap: reverse KL, so e must be above 0; the gradient is tiny where q is near 0.
    """
    h = beta * p.margin
    e = h.new_tensor(label_smoothing)
    return h.sigmoid() * (ls(h) - torch.log1p(-e)) + (-h).sigmoid() * (ls(-h) - e.log())


def discopop(p: PairLogps, *, beta: float = 0.1, tau: float = 0.05) -> torch.Tensor:
    """DiscoPOP, arXiv 2406.08414: (1 - m) (-ls(z)) + m e^-z with z = beta h and m = sigmoid(z / tau).

    Needs the reference. Published: tau 0.05. Trap: not convex, with a second valley at small negative margins.
    """
    z = beta * p.margin
    return -ls(z) * (-z / tau).sigmoid() + (ls(z / tau) - z).exp()  # e^-z alone would overflow


def soft_dpo(p: PairLogps, *, beta: float = 0.1) -> torch.Tensor:
    """DPO with a probability for a label, derived (no paper is followed): -q ls(beta h) - (1 - q) ls(-beta h).

    Needs the reference and q = p.preference. Trap: q of a judge must be a mean over both orders, or it encodes the order.
    """
    return -p.preference * ls(beta * p.margin) - (1 - p.preference) * ls(-beta * p.margin)


# ---------------------------------------------------------------------------------------------- of uc and ur apart


def nca(p: PairLogps, *, beta: float = 0.1) -> torch.Tensor:
    """NCA for pairs, arXiv 2402.05369: -ls(beta uc) - ls(-beta uc) / 2 - ls(-beta ur) / 2.

    Needs the reference. TRL's beta 0.1. Trap: it holds chosen near the reference as well as above it; losses of one side at a
    time lose to those of pairs at 8B (arXiv 2502.01237).
    """
    return (
        -ls(beta * p.ratio_chosen)
        - 0.5 * ls(-beta * p.ratio_chosen)
        - 0.5 * ls(-beta * p.ratio_rejected)
    )


def bco(p: PairLogps, *, beta: float = 0.1) -> torch.Tensor:
    """BCO for pairs, arXiv 2404.04656: -ls(beta uc) - ls(-beta ur), without the running shift of rewards, as in TRL 1.

    Needs the reference. TRL's beta 0.1. Trap: without that shift it is another loss than the paper's.
    """
    return -ls(beta * p.ratio_chosen) - ls(-beta * p.ratio_rejected)


def sppo(p: PairLogps, *, beta: float = 0.1) -> torch.Tensor:
    """SPPO with hard labels, arXiv 2405.00675: (uc - 1 / (2 beta))^2 + (ur + 1 / (2 beta))^2.

    Needs the reference. TRL's beta 0.1. Trap: a regression; its size and gradient grow with 1 / beta, so lr and beta go
    together.
    """
    return (p.ratio_chosen - 0.5 / beta) ** 2 + (p.ratio_rejected + 0.5 / beta) ** 2


def apo_zero(p: PairLogps, *, beta: float = 0.1) -> torch.Tensor:
    """APO-zero, arXiv 2408.06266: 1 - sigmoid(beta uc) + sigmoid(beta ur): chosen up, rejected down.

    Needs the reference. TRL's beta 0.1. For chosen answers that are better than the model's own. Trap: gradients die in both
    tails.
    """
    return 1 - (beta * p.ratio_chosen).sigmoid() + (beta * p.ratio_rejected).sigmoid()


def apo_down(p: PairLogps, *, beta: float = 0.1) -> torch.Tensor:
    """APO-down, arXiv 2408.06266: sigmoid(beta uc) + 1 - sigmoid(beta (uc - ur)): both down, rejected further.

    Needs the reference. TRL's beta 0.1. For chosen answers that are worse than the model's own. Trap: chosen falls by design.
    """
    return (beta * p.ratio_chosen).sigmoid() + 1 - (beta * p.margin).sigmoid()


def rpo(p: PairLogps, *, beta: float = 0.01, alpha: float = 0.005) -> torch.Tensor:
    """RPO, arXiv 2405.16436, and offline VPO, arXiv 2405.19320, as derived from what they say: -ls(beta h) - alpha beta uc.

    DPO with the chosen answer's summed NLL; the constant rc only makes it 0 at the reference. Needs the reference. RPO as TRL's
    index gives it: beta 0.01, 0.005. Trap: VPO's printed formula was not at hand; the opposite sign is silent.
    """
    return -ls(beta * p.margin) - alpha * beta * p.ratio_chosen


# ---------------------------------------------------------------------------------------------- without a reference


def simpo(p: PairLogps, *, beta: float = 2.0, gamma: float = 1.6) -> torch.Tensor:
    """SimPO, arXiv 2405.14734 equation 6: -ls(beta (mc - mr) - gamma). The loss of SynPO's own recipes.

    Needs lengths. SynPO: gamma 1.6, beta not stated. SimPO's releases: beta 2 to 10 with gamma / beta 0.1 to 0.8. Trap: gamma
    is absolute here, their gamma_beta_ratio is gamma / beta; nothing but a low lr holds the model, too high a one ends in
    repetition.
    """
    return -ls(beta * (p.mean_chosen - p.mean_rejected) - gamma)


def orpo(p: PairLogps, *, weight: float = 0.1) -> torch.Tensor:
    """ORPO, arXiv 2403.07691: -mc - weight ls(lo(mc) - lo(mr)); weight is the paper's lambda.

    Needs lengths. Published: 0.1 (Mistral-ORPO), with an NLL over prompt and response; here of the response only. Trap: with
    sums in the place of means e^m is 0 and the odds ratio turns silently into a plain log-ratio.
    """
    return -p.mean_chosen - weight * ls(log_odds(p.mean_chosen) - log_odds(p.mean_rejected))


def asft(p: PairLogps, *, weight: float = 1.0, beta: float = 1.0) -> torch.Tensor:
    """ASFT, arXiv 2409.10571: -mc - weight [ls(beta lo(mc)) + ls(-beta lo(mr))]; weight is the paper's lambda.

    Needs lengths. Defaults of turbo-alignment: 1 and 1. Trap: at beta 1 the chosen half is -mc, an SFT term once more; the only
    contrast is log(1 - e^mr), whose gradient vanishes as mr falls.
    """
    return -p.mean_chosen - weight * (
        ls(beta * log_odds(p.mean_chosen)) + ls(-beta * log_odds(p.mean_rejected))
    )


# ---------------------------------------------------------------------------------------------- of more than sums of pairs


def dpo_bmc(p: PairLogps, *, beta: float = 0.01, delta: float = 2.0) -> torch.Tensor:
    """DPO-BMC, arXiv 2408.07471: DPO on weighted sums, weight 1 + min(1 / p_t, delta) where the answers differ, else 1.

    p_t is the policy's probability of the token, without gradient. Needs token log-probs under policy and reference, and the
    difference. Published: beta 0.01, delta 1.5 to 2 for instructions; 0.05, 2.5 to 3 for maths and QA. Trap: the authors' code
    weighs the reference by its own p_t, so that part of its margin is a change of confidence; here one weight serves both.
    """

    def weighted(
        ours: list[torch.Tensor], theirs: list[torch.Tensor], differs: list[torch.Tensor]
    ) -> torch.Tensor:
        return torch.stack(
            [
                ((1 + d * (-t.detach()).exp().clamp(max=delta)) * (t - r)).sum()
                for t, r, d in zip(ours, theirs, differs, strict=True)
            ]
        )  # (B,)

    return -ls(
        beta
        * (
            weighted(p.chosen_token_logp, p.ref_chosen_token_logp, p.chosen_differs)
            - weighted(p.rejected_token_logp, p.ref_rejected_token_logp, p.rejected_differs)
        )
    )


def mrpo(p: PairLogps, *, beta: float = 0.1, alpha: float = -1.0, eta: float = 0.1) -> torch.Tensor:
    """MRPO with two references, arXiv 2405.16388 by its authors' code: DPO against 1 / (a / pi_ref + (1 - a) / pi_ref2).

    a = alpha, or if that is negative |x1c - x1r| / (|x1c - x1r| + |x2c - x2r|), with x1 = ref2's and x2 = the reference's
    sums; x1 is first clipped to x2 (1 +- eta_c or eta_r), eta shared out by the size of the two answers' log-probs (both
    |eta| if it is negative). Needs both references. Published: beta 0.1, eta 0.1. Traps: the reference with the larger gap
    gets the smaller weight; a that looks at the pair leaks its label; references must share the tokenizer; a long answer has
    a wide window.
    """
    x1, x2 = (p.ref2_chosen, p.ref2_rejected), (p.ref_chosen, p.ref_rejected)
    gap1, gap2 = (x1[0] - x1[1]).abs(), (x2[0] - x2[1]).abs()
    a = gap1 / (gap1 + gap2 + 1e-6) if alpha < 0 else torch.full_like(gap1, alpha)
    share = (x1[0] + x2[0]) / (x1[0] + x2[0] + x1[1] + x2[1])
    windows = (eta * share, eta * (1 - share)) if eta >= 0 else (-eta, -eta)
    mixed = []
    for extra, first, window in zip(x1, x2, windows, strict=True):
        extra = extra.clamp(
            min=first * (1 + window), max=first * (1 - window)
        )  # log-probs are negative
        mixed.append(extra + first - torch.logaddexp(a.log() + extra, torch.log1p(-a) + first))
    return -ls(beta * ((p.chosen - p.rejected) - (mixed[0] - mixed[1])))


def selm(p: PairLogps, *, beta: float = 0.01, alpha: float = 1e-3) -> torch.Tensor:
    """SELM, arXiv 2405.19332 equation 4.2: -ls(beta h) + alpha beta (log pi(y_s) - log pi_ref(y_s)).

    Needs the reference and --samples: greedy texts y_s of the model to start from. Published: beta 0.01, alpha 0.001
    (Zephyr), 0.0001 (Llama-3). With samples of another model it is VPO's online form, as derived (arXiv 2405.19320). Traps:
    the bonus LOWERS the log-prob of the model's own samples; the paper's Algorithm 1 prints alpha without beta, 100 times
    apart.
    """
    return -ls(beta * p.margin) + alpha * beta * (p.sample - p.ref_sample)


def xpo(p: PairLogps, *, beta: float = 0.1, alpha: float = 1e-5) -> torch.Tensor:
    """XPO, arXiv 2405.21046 as in TRL: -ls(beta h) + alpha log pi(y_s), y_s a sample of the reference.

    Needs the reference and --samples. TRL's alpha 1e-5. Trap: alpha is not multiplied by beta, as SELM's is.
    """
    return -ls(beta * p.margin) + alpha * p.sample


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "dpo": dpo,
    "hinge": hinge,
    "robust": robust,
    "ipo": ipo,
    "ipo-mean": ipo_mean,
    "exo": exo,
    "discopop": discopop,
    "soft-dpo": soft_dpo,
    "nca": nca,
    "bco": bco,
    "sppo": sppo,
    "apo-zero": apo_zero,
    "apo-down": apo_down,
    "rpo": rpo,
    "vpo-offline-derived": rpo,
    "simpo": simpo,
    "orpo": orpo,
    "asft": asft,
    "dpo-bmc": dpo_bmc,
    "mrpo": mrpo,
    "selm": selm,
    "xpo": xpo,
}


# ---------------------------------------------------------------------------------------------- choosing one


def find_loss(spec: str) -> tuple[Callable[..., torch.Tensor], dict[str, float]]:
    """The loss that --loss names, and its parameters with their defaults; InputError for what cannot be one."""
    if spec not in LOSSES and ".py:" not in spec:
        raise InputError(f"--loss {spec}: give FILE.py:FUNCTION, or one of {', '.join(LOSSES)}")
    loss = LOSSES[spec] if spec in LOSSES else load_function(spec)
    parameters = {
        name: float(one.default)
        if one.annotation in (float, "float") and type(one.default) is int
        else one.default
        for name, one in [*inspect.signature(loss).parameters.items()][1:]
    }  # beta: float = 1
    wrong = [
        name
        for name, default in parameters.items()
        if not isinstance(default, bool | int | float | str)
    ]
    if wrong:
        raise InputError(
            f"--loss {spec}: parameter {wrong[0]} needs a number as its default; write {wrong[0]}: float = 0.1"
        )
    return loss, parameters


@cache
def with_parameters(options: type, loss: str) -> type:
    """A dataclass of options with a field more for each parameter of the loss: those exist, and no others."""
    parameters = find_loss(loss)[1]
    taken = sorted(parameters.keys() & options.__dataclass_fields__.keys())
    if taken:
        raise InputError(
            f"--loss {loss}: its parameter {taken[0]} is the name of an option already; call it otherwise"
        )
    return make_dataclass(
        options.__name__,
        [
            (
                name,
                type(default),
                field(default=default, metadata={"help": f"parameter of the loss {loss}"}),
            )
            for name, default in parameters.items()
        ],
        bases=(options,),
        kw_only=True,
        namespace={"in_source": False},
    )


class Watched(PairLogps):
    """PairLogps that remembers which of its fields were read, by the loss itself or by a property."""

    def __getattribute__(self, name):
        object.__getattribute__(self, "__dict__").setdefault("read", set()).add(name)
        return super().__getattribute__(name)


def fields_read(spec: str, **parameters) -> set[str]:
    """Which fields of PairLogps a loss reads, found by calling it on three made-up pairs.

    Raises InputError unless it returns three finite numbers with gradients to the policy's log-probs. A field read only under a
    condition on the data is not seen: read it first, then decide.
    """
    lengths = ((2, 3, 4), (4, 2, 3))
    tokens = [
        [-(torch.arange(n) + 1.0 + side) / (n + side + 1) for n in some]
        for side, some in enumerate(lengths)
    ]
    policy = [[t.requires_grad_() for t in some] for some in tokens]
    chosen, rejected = (torch.stack([t.sum() for t in some]) for some in policy)
    frozen = [[t.detach() * 1.1 for t in some] for some in policy]
    sums = [torch.stack([t.sum() for t in some]) for some in frozen]
    p = Watched(
        chosen,
        rejected,
        *map(torch.tensor, lengths),
        *sums,
        sums[0] * 1.05,
        sums[1] * 0.95,
        chosen * 0.9,
        sums[0] * 0.8,
        torch.tensor([0.5, 0.7, 0.9]),
        *policy,
        *frozen,
        *[[t > -0.5 for t in some] for some in frozen],
    )
    vars(p)["read"] = set()
    try:
        loss = find_loss(spec)[0](p, **parameters)
    except Exception as error:  # whatever somebody's own function may raise
        raise InputError(
            f"--loss {spec}: calling it on three pairs failed: {type(error).__name__}: {error}"
        ) from None
    given = ", ".join(f"{name} = {value}" for name, value in parameters.items())
    if not isinstance(loss, torch.Tensor) or loss.shape != (3,):
        what = (
            f"a tensor of shape {tuple(loss.shape)}"
            if isinstance(loss, torch.Tensor)
            else type(loss).__name__
        )
        raise InputError(
            f"--loss {spec}: returned {what} for three pairs; return one loss a pair, shape (3,)"
        )
    gradients = [None]
    if loss.requires_grad:
        gradients = torch.autograd.grad(
            loss.sum(), [t for some in policy for t in some], allow_unused=True
        )
    moved = [g for g in gradients if g is not None]
    if not torch.isfinite(loss).all() or not all(torch.isfinite(g).all() for g in moved):
        raise InputError(
            f"--loss {spec}: it or its gradient is not finite for three plain pairs with {given}: {loss.tolist()}"
        )
    if not any(g.any() for g in moved):
        raise InputError(
            f"--loss {spec}: no gradient reaches the policy's log-probs with {given}; do not detach them"
        )
    return vars(p)["read"]
