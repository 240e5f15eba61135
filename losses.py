"""Preference losses: what a loss sees of B pairs, DPO, SimPO, and a catalogue (SynPO's equation 6).

A loss is a function loss(p: PairLogps, *, parameter=default, ...) -> (B,) and a row in LOSSES.
Its keyword parameters are flags of dpo.py, and only what it reads of p is computed: a loss that
never touches p.ref_chosen never has a reference model loaded. --loss FILE.py:FUNCTION takes one of
yours, under the same rules. docs/losses.md has the table of them all.

Notation. pc, pr: log-probs of chosen and rejected under the policy, summed over the tokens of the
response, the end token included and the prompt excluded. rc, rr: the same under the frozen
reference. nc, nr: numbers of those tokens. mc = pc / nc and mr = pr / nr: means per token.
uc = pc - rc and ur = pr - rr: log-ratios. h = uc - ur = (pc - pr) - (rc - rr): DPO's margin.
ls(x) = log sigmoid(x), and lo(m) = m - log(1 - e^m): the log-odds of a mean log-prob.

Defaults are the published values or, where a paper names none, those of its authors' code or TRL 1.
"""

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from formats.plugins import load_function
from plumbing.files import STOP_WORDS, InputError
from plumbing.ranges import Noise, NotNegative, Positive

ls = F.logsigmoid

# ------------------------------------------------------------------------------ what a loss sees


@dataclass(frozen=True, kw_only=True)
class PairLogps:
    """What a loss may read of B pairs: tensors (B,), or lists of B tensors (T,), T that response's.

    What the loss does not read is not computed, and is None.
    """

    chosen: torch.Tensor  # pc
    rejected: torch.Tensor  # pr
    chosen_tokens: torch.Tensor  # nc
    rejected_tokens: torch.Tensor  # nr
    ref_chosen: torch.Tensor | None = None  # rc
    ref_rejected: torch.Tensor | None = None  # rr
    ref2_chosen: torch.Tensor | None = None  # under the model of --second-reference
    ref2_rejected: torch.Tensor | None = None
    sample: torch.Tensor | None = None  # pc of the response in --self-samples to the same prompt
    ref_sample: torch.Tensor | None = None  # the same under the reference
    preference: torch.Tensor | None = None  # P(chosen is better), see preference_of()
    chosen_token_logp: list[torch.Tensor] | None = None  # log-prob of each token, policy
    rejected_token_logp: list[torch.Tensor] | None = None
    ref_chosen_token_logp: list[torch.Tensor] | None = None  # reference
    ref_rejected_token_logp: list[torch.Tensor] | None = None
    chosen_differs: list[torch.Tensor] | None = None  # bool: the token is new, see differences()
    rejected_differs: list[torch.Tensor] | None = None  # bool: the token is gone

    @property
    def mean_chosen(self) -> torch.Tensor:  # mc
        return self.chosen / self.chosen_tokens

    @property
    def mean_rejected(self) -> torch.Tensor:  # mr
        return self.rejected / self.rejected_tokens

    @property
    def ratio_chosen(self) -> torch.Tensor:  # uc
        return self.chosen - self.ref_chosen

    @property
    def ratio_rejected(self) -> torch.Tensor:  # ur
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> torch.Tensor:  # h
        return (self.chosen - self.rejected) - (self.ref_chosen - self.ref_rejected)


def pair_logps(examples: list, logps: list[list[torch.Tensor]]) -> PairLogps:
    """What a loss sees of a micro-batch of B examples.

    logps: for each example the policy's token log-probs (T,) of chosen, rejected and perhaps a
    self-sample. example.extra may hold, the same in all examples: `reference` and `reference2`,
    with as many sums or lists of token log-probs; `differs`, two lists of bools; `preference`.
    """
    device = logps[0][0].device
    chosen = [row[0] for row in logps]
    rejected = [row[1] for row in logps]
    sample = [row[2] for row in logps] if len(logps[0]) > 2 else None

    def known(name: str, i: int) -> list[torch.Tensor] | None:
        """Of each example extra[name][i]: chosen, rejected, self-sample; None if there is none."""
        if i >= len(examples[0].extra.get(name, ())):
            return None
        return [torch.as_tensor(e.extra[name][i], device=device) for e in examples]

    preference = None
    if "preference" in examples[0].extra:
        preference = torch.tensor([e.extra["preference"] for e in examples], device=device)

    return PairLogps(
        chosen=total(chosen),
        rejected=total(rejected),
        chosen_tokens=torch.tensor([len(t) for t in chosen], device=device),
        rejected_tokens=torch.tensor([len(t) for t in rejected], device=device),
        ref_chosen=total(known("reference", 0)),
        ref_rejected=total(known("reference", 1)),
        ref2_chosen=total(known("reference2", 0)),
        ref2_rejected=total(known("reference2", 1)),
        sample=total(sample),
        ref_sample=total(known("reference", 2)),
        preference=preference,
        chosen_token_logp=chosen,
        rejected_token_logp=rejected,
        ref_chosen_token_logp=known("reference", 0),
        ref_rejected_token_logp=known("reference", 1),
        chosen_differs=known("differs", 0),
        rejected_differs=known("differs", 1),
    )


def total(tensors: list[torch.Tensor] | None) -> torch.Tensor | None:
    """B tensors (T,) -> their sums (B,); None stays None."""
    return torch.stack([t.sum() for t in tensors]) if tensors else None


def preference_of(row: dict) -> float:
    """P(chosen is better): the pair's field `preference`, else its scores by Bradley and Terry.

    The latter is sigmoid(score_chosen - score_rejected). InputError if the pair has neither.
    """
    chosen, rejected = row.get("score_chosen"), row.get("score_rejected")
    if "preference" not in row and chosen is not None and rejected is not None:
        return torch.tensor(chosen - rejected, dtype=torch.float64).sigmoid().item()
    given = row.get("preference")
    if not isinstance(given, int | float) or not 0 <= given <= 1:
        raise InputError(
            f"pair {row['id']}: field 'preference': give P(chosen is better), from 0 to 1, "
            "or both scores"
        )
    return given


def differences(chat, chosen: list[int], rejected: list[int]) -> tuple[list[bool], list[bool]]:
    """Which tokens an edit from rejected to chosen inserts into chosen and drops from rejected.

    Token ids in, one bool a token out. A token that is an English stop word never counts, as in the
    code of BMC (arXiv 2408.07471). chat: anything whose text(ids) decodes.
    """
    # mark what the edit changes
    in_chosen = [False] * len(chosen)
    in_rejected = [False] * len(rejected)
    edit = SequenceMatcher(None, rejected, chosen, autojunk=False)
    for kind, r, r_end, c, c_end in edit.get_opcodes():
        if kind != "equal":
            in_chosen[c:c_end] = [True] * (c_end - c)
            in_rejected[r:r_end] = [True] * (r_end - r)

    # unmark stop words
    def counts(token: int) -> bool:
        return chat.text([token]).strip().lower() not in STOP_WORDS

    return (
        [mark and counts(token) for mark, token in zip(in_chosen, chosen, strict=True)],
        [mark and counts(token) for mark, token in zip(in_rejected, rejected, strict=True)],
    )


# ------------------------------------------------------------------------------ the two to read


def dpo(p: PairLogps, *, beta: Positive = 0.1, label_smoothing: Noise = 0.0) -> torch.Tensor:
    """DPO, arXiv 2305.18290 equation 7: -ls(beta h).

    With label_smoothing e it is cDPO, for labels of which a share e is wrong:
    -(1 - e) ls(beta h) - e ls(-beta h).
    Needs: the reference.
    Published: beta 0.1 to 0.5; tuned for chat models 0.003 to 0.01 (arXiv 2502.01237); cDPO starts
    at e = 0.1.
    Trap: only the difference is constrained; both log-probs usually fall. cDPO has its optimum at
    h = log((1 - e) / e) / beta.
    """
    return -(1 - label_smoothing) * ls(beta * p.margin) - label_smoothing * ls(-beta * p.margin)


def simpo(p: PairLogps, *, beta: Positive = 2.0, gamma: float = 1.6) -> torch.Tensor:
    """SimPO, arXiv 2405.14734 equation 6: -ls(beta (mc - mr) - gamma). The loss of SynPO's paper.

    Needs: token counts, no reference.
    Published by SynPO: gamma 1.6, fixed; beta searched in {2, 4, 6, 8, 10, 12} for every run, and
    the chosen one not stated. The default beta 2.0 with gamma 1.6 is SimPO's own Mistral-Base;
    for Llama-3 that beta is SimPO's, that gamma the paper's.
    Published by SimPO (beta / gamma): Mistral-Base 2 / 1.6, Mistral-Instruct 2.5 / 0.25,
    Llama-3-Base 2 / 1, Llama-3-Instruct 2.5 / 1.375 and v0.2 10 / 3, Gemma-2-9B-it 10 / 5.
    Trap: gamma is absolute here and in the paper; SimPO's code takes gamma / beta. With no
    reference only a low learning rate holds the model: too high a one ends in repetition.
    """
    return -ls(beta * (p.mean_chosen - p.mean_rejected) - gamma)


# ------------------------------------------------------------------------------ of the margin h


def hinge(p: PairLogps, *, beta: Positive = 0.1) -> torch.Tensor:
    """Hinge on DPO's margin, arXiv 2309.06657: max(0, 1 - beta h).

    Needs: the reference.
    Trap: no gradient once h > 1 / beta.
    """
    return F.relu(1 - beta * p.margin)


def robust(p: PairLogps, *, beta: Positive = 0.1, label_smoothing: Noise = 0.1) -> torch.Tensor:
    """Robust DPO, arXiv 2403.00409: [-(1 - e) ls(beta h) + e ls(-beta h)] / (1 - 2e).

    e is the share of flipped labels, below 0.5.
    Needs: the reference.
    Published: beta 0.1, e 0.1.
    Trap: e's term has the opposite sign of cDPO's. Unbiased, but unbounded below: the gradient
    never dies, and the loss may be negative.
    """
    e = label_smoothing
    return (-(1 - e) * ls(beta * p.margin) + e * ls(-beta * p.margin)) / (1 - 2 * e)


def ipo(p: PairLogps, *, tau: Positive = 0.005) -> torch.Tensor:
    """IPO, arXiv 2310.12036, on sums: (h - 1 / (2 tau))^2.

    Needs: the reference.
    Published: tuned for chat models, tau 0.001 to 0.005 (arXiv 2502.01237), which is a target of
    100 to 500 nats.
    Trap: a tau of this form means something else in ipo-mean; say which form was used.
    """
    return (p.margin - 1 / (2 * tau)) ** 2


def ipo_mean(p: PairLogps, *, tau: Positive = 0.1) -> torch.Tensor:
    """IPO, arXiv 2310.12036, per token as in TRL: (uc / nc - ur / nr - 1 / (2 tau))^2.

    Needs: the reference, token counts.
    Published: TRL's tau is 0.1.
    Trap: that is a target of 5 nats a token, which no model reaches, so the loss only ever pushes.
    """
    chosen = p.ratio_chosen / p.chosen_tokens
    rejected = p.ratio_rejected / p.rejected_tokens
    return (chosen - rejected - 1 / (2 * tau)) ** 2


def exo(p: PairLogps, *, beta: Positive = 0.1, label_smoothing: Noise = 1e-3) -> torch.Tensor:
    """EXO for pairs, arXiv 2402.00856: q log(q / (1 - e)) + (1 - q) log((1 - q) / e).

    The KL divergence from q = sigmoid(beta h) to the label smoothed by e.
    Needs: the reference.
    Published: TRL's e is 0.001.
    Trap: a reverse KL, so e must be above 0, and the gradient is tiny where q is near 0.
    """
    h = beta * p.margin
    e = h.new_tensor(label_smoothing)
    return h.sigmoid() * (ls(h) - torch.log1p(-e)) + (-h).sigmoid() * (ls(-h) - e.log())


def discopop(p: PairLogps, *, beta: Positive = 0.1, tau: Positive = 0.05) -> torch.Tensor:
    """DiscoPOP, arXiv 2406.08414: (1 - m) (-ls(z)) + m e^-z, z = beta h and m = sigmoid(z / tau).

    Needs: the reference.
    Published: tau 0.05.
    Trap: not convex; it has a second valley at small negative margins.
    """
    z = beta * p.margin
    # m e^-z as one exponential: e^-z alone would overflow
    return -ls(z) * (-z / tau).sigmoid() + (ls(z / tau) - z).exp()


def soft_dpo(p: PairLogps, *, beta: Positive = 0.1) -> torch.Tensor:
    """DPO with a probability q as its label, derived here: -q ls(beta h) - (1 - q) ls(-beta h).

    No paper is followed.
    Needs: the reference, and q = p.preference.
    Trap: a judge's q must be a mean over both orders of the answers, or it encodes the order.
    """
    return -p.preference * ls(beta * p.margin) - (1 - p.preference) * ls(-beta * p.margin)


# ------------------------------------------------------------------------------ of uc and ur apart


def nca(p: PairLogps, *, beta: Positive = 0.1) -> torch.Tensor:
    """NCA for pairs, arXiv 2402.05369: -ls(beta uc) - ls(-beta uc) / 2 - ls(-beta ur) / 2.

    Needs: the reference.
    Published: TRL's beta is 0.1.
    Trap: it also holds chosen near the reference. Losses that take chosen and rejected one at a
    time fall behind pairwise ones at 8B (arXiv 2502.01237).
    """
    pulled = 0.5 * ls(-beta * p.ratio_chosen)
    return -ls(beta * p.ratio_chosen) - pulled - 0.5 * ls(-beta * p.ratio_rejected)


def bco(p: PairLogps, *, beta: Positive = 0.1) -> torch.Tensor:
    """BCO for pairs, arXiv 2404.04656: -ls(beta uc) - ls(-beta ur).

    Without the paper's running shift of the rewards, as in TRL 1.
    Needs: the reference.
    Published: TRL's beta is 0.1.
    Trap: without that shift it is another loss than the paper's.
    """
    return -ls(beta * p.ratio_chosen) - ls(-beta * p.ratio_rejected)


def sppo(p: PairLogps, *, beta: Positive = 0.1) -> torch.Tensor:
    """SPPO with hard labels, arXiv 2405.00675: (uc - 1 / (2 beta))^2 + (ur + 1 / (2 beta))^2.

    Needs: the reference.
    Published: TRL's beta is 0.1.
    Trap: a regression whose size and gradient grow with 1 / beta: tune lr and beta together.
    """
    return (p.ratio_chosen - 0.5 / beta) ** 2 + (p.ratio_rejected + 0.5 / beta) ** 2


def apo_zero(p: PairLogps, *, beta: Positive = 0.1) -> torch.Tensor:
    """APO-zero, arXiv 2408.06266: 1 - sigmoid(beta uc) + sigmoid(beta ur).

    Chosen up, rejected down: for chosen responses that are better than the model's own.
    Needs: the reference.
    Published: TRL's beta is 0.1.
    Trap: the gradient dies in both tails.
    """
    return 1 - (beta * p.ratio_chosen).sigmoid() + (beta * p.ratio_rejected).sigmoid()


def apo_down(p: PairLogps, *, beta: Positive = 0.1) -> torch.Tensor:
    """APO-down, arXiv 2408.06266: sigmoid(beta uc) + 1 - sigmoid(beta h).

    Both down, rejected further: for chosen responses that are worse than the model's own.
    Needs: the reference.
    Published: TRL's beta is 0.1.
    Trap: the chosen log-prob falls by design.
    """
    return (beta * p.ratio_chosen).sigmoid() + 1 - (beta * p.margin).sigmoid()


def rpo(p: PairLogps, *, beta: Positive = 0.01, alpha: float = 0.005) -> torch.Tensor:
    """RPO, arXiv 2405.16436: -ls(beta h) - alpha beta uc. DPO with the summed NLL of chosen.

    The constant rc in uc only makes that term 0 at the reference. Also the offline form of VPO,
    arXiv 2405.19320, as derived from its abstract (vpo-offline-derived).
    Needs: the reference.
    Published: for RPO by TRL's index, beta 0.01 and alpha 0.005.
    Trap: we did not have VPO's printed formula; the opposite sign would go unnoticed.
    """
    return -ls(beta * p.margin) - alpha * beta * p.ratio_chosen


# ------------------------------------------------------------------------------ without a reference


def sft(p: PairLogps) -> torch.Tensor:
    """Supervised fine-tuning on the chosen responses, derived: -mc. It is a control.

    Needs: token counts, no reference.
    Trap: the rejected responses do not count.
    """
    return -p.mean_chosen


def log_odds(mean_logp: torch.Tensor) -> torch.Tensor:
    """lo(m) = log(p / (1 - p)) of p = e^m, (B,) -> (B,). m is clamped below -1e-6.

    log(1 - e^m) has two forms; each is used where it does not cancel.
    """
    m = mean_logp.clamp(max=-1e-6)
    return m - torch.where(m > -0.69, (-torch.expm1(m)).log(), torch.log1p(-m.exp()))


def orpo(p: PairLogps, *, weight: NotNegative = 0.1) -> torch.Tensor:
    """ORPO, arXiv 2403.07691: -mc - weight ls(lo(mc) - lo(mr)). weight is the paper's lambda.

    Needs: token counts, no reference.
    Published: 0.1 (Mistral-ORPO), with an NLL over prompt and response; here over the response.
    Trap: with sums in place of means e^m is 0, and the odds ratio silently becomes a plain
    log-ratio.
    """
    return -p.mean_chosen - weight * ls(log_odds(p.mean_chosen) - log_odds(p.mean_rejected))


def asft(p: PairLogps, *, weight: NotNegative = 1.0, beta: Positive = 1.0) -> torch.Tensor:
    """ASFT, arXiv 2409.10571: -mc - weight [ls(beta lo(mc)) + ls(-beta lo(mr))].

    weight is the paper's lambda.
    Needs: token counts, no reference.
    Published: turbo-alignment's defaults are weight 1 and beta 1.
    Trap: at beta 1 the chosen half is -mc, one more SFT term. The only contrast is
    log(1 - e^mr), whose gradient vanishes as mr falls.
    """
    chosen = ls(beta * log_odds(p.mean_chosen))
    rejected = ls(-beta * log_odds(p.mean_rejected))
    return -p.mean_chosen - weight * (chosen + rejected)


# ------------------------------------------------------------------------------ of more than sums


def dpo_bmc(p: PairLogps, *, beta: Positive = 0.01, delta: Positive = 2.0) -> torch.Tensor:
    """DPO-BMC, arXiv 2408.07471: DPO on sums of weighted token log-probs.

    A token weighs 1 + min(1 / p_t, delta) where the responses differ, else 1; p_t is the policy's
    probability of it, without gradient.
    Needs: token log-probs under policy and reference, and the differences.
    Published: beta 0.01 with delta 1.5 to 2 for instructions, 0.05 with 2.5 to 3 for maths and QA.
    Trap: the authors' code weighs the reference by its own p_t, so part of its margin is a change
    of confidence. Here one weight serves both.
    """

    def weighted(policy: list, reference: list, differs: list) -> torch.Tensor:
        sums = []
        for t, r, d in zip(policy, reference, differs, strict=True):  # (T,) each
            weight = 1 + d * (-t.detach()).exp().clamp(max=delta)
            sums.append((weight * (t - r)).sum())
        return torch.stack(sums)  # (B,)

    chosen = weighted(p.chosen_token_logp, p.ref_chosen_token_logp, p.chosen_differs)
    rejected = weighted(p.rejected_token_logp, p.ref_rejected_token_logp, p.rejected_differs)
    return -ls(beta * (chosen - rejected))


def mrpo(
    p: PairLogps, *, beta: Positive = 0.1, alpha: float = -1.0, eta: NotNegative = 0.1
) -> torch.Tensor:
    """MRPO with two references, arXiv 2405.16388 by its authors' code.

    DPO against the reference 1 / (a / pi_ref + (1 - a) / pi_ref2), where a is alpha or, if that is
    negative, |x1c - x1r| / (|x1c - x1r| + |x2c - x2r|); x1 are ref2's sums and x2 the reference's.
    x1 is first clipped to x2 (1 +- eta_c) and x2 (1 +- eta_r): eta divided in proportion to the
    log-probs of chosen and rejected or, if eta is negative, |eta| for both.
    Needs: both references.
    Published: beta 0.1, eta 0.1.
    Traps: the reference with the larger gap gets the smaller weight. An a that depends on the pair
    leaks its label. The references must share a tokenizer. A long response has a wide window.
    """
    x1c, x1r = p.ref2_chosen, p.ref2_rejected
    x2c, x2r = p.ref_chosen, p.ref_rejected

    # the weight a
    gap1 = (x1c - x1r).abs()
    gap2 = (x2c - x2r).abs()
    a = gap1 / (gap1 + gap2 + 1e-6) if alpha < 0 else torch.full_like(gap1, alpha)

    # the windows
    share = (x1c + x2c) / (x1c + x2c + x1r + x2r)
    eta_c = eta * share if eta >= 0 else -eta
    eta_r = eta * (1 - share) if eta >= 0 else -eta

    def mix(x1: torch.Tensor, x2: torch.Tensor, window) -> torch.Tensor:
        # log-probs are negative, so 1 + window gives the lower end
        x1 = x1.clamp(min=x2 * (1 + window), max=x2 * (1 - window))
        return x1 + x2 - torch.logaddexp(a.log() + x1, torch.log1p(-a) + x2)

    mixed = mix(x1c, x2c, eta_c) - mix(x1r, x2r, eta_r)
    return -ls(beta * ((p.chosen - p.rejected) - mixed))


def selm(p: PairLogps, *, beta: Positive = 0.01, alpha: float = 1e-3) -> torch.Tensor:
    """SELM, arXiv 2405.19332 equation 4.2: -ls(beta h) + alpha beta (log pi(y) - log pi_ref(y)).

    y is the greedy response of the model to start from. With a response of another model it is the
    online form of VPO, arXiv 2405.19320, as derived from its abstract.
    Needs: the reference, and --self-samples.
    Published: beta 0.01; alpha 0.001 (Zephyr) or 0.0001 (Llama-3).
    Traps: the bonus LOWERS the log-prob of the model's own samples. The paper's Algorithm 1 prints
    alpha without beta, a factor of 100 at this beta.
    """
    return -ls(beta * p.margin) + alpha * beta * (p.sample - p.ref_sample)


def xpo(p: PairLogps, *, beta: Positive = 0.1, alpha: float = 1e-5) -> torch.Tensor:
    """XPO, arXiv 2405.21046 as in TRL: -ls(beta h) + alpha log pi(y), y a sample of the reference.

    Needs: the reference, and --self-samples.
    Published: TRL's alpha is 1e-5.
    Trap: alpha is not multiplied by beta, as SELM's is.
    """
    return -ls(beta * p.margin) + alpha * p.sample


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "dpo": dpo,
    "simpo": simpo,
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
    "sft": sft,
    "orpo": orpo,
    "asft": asft,
    "dpo-bmc": dpo_bmc,
    "mrpo": mrpo,
    "selm": selm,
    "xpo": xpo,
}

# ------------------------------------------------------------------------------ choosing one


@dataclass(frozen=True)
class Loss:
    """A loss with its parameters, resolved once for a whole training: loss(p) -> (B,)."""

    function: Callable[..., torch.Tensor]
    parameters: dict[str, float]  # all of them, defaults included
    reads: frozenset[str]  # fields of PairLogps that the function reads, also by properties

    def __call__(self, p: PairLogps) -> torch.Tensor:
        return self.function(p, **self.parameters)


def resolve_loss(spec: str, parameters: dict | None = None) -> Loss:
    """The loss that --loss names, with the given parameters in place of their defaults.

    Calls it on three made-up pairs. InputError, which says why, for what is not a loss or not one
    with these parameters. A field that the loss reads only for some data is not seen: it should
    read first, then decide.
    """
    function = find_function(spec)
    chosen = {**loss_defaults(spec), **(parameters or {})}
    return Loss(function, chosen, fields_read(spec, function, chosen))


def loss_defaults(spec: str) -> dict[str, float]:
    """The parameters of the loss that --loss names, with their defaults: {name: default}."""
    return {name: default for name, (_, default) in loss_flags(spec).items()}


def find_function(spec: str) -> Callable[..., torch.Tensor]:
    if spec in LOSSES:
        return LOSSES[spec]
    if ".py:" in spec:
        return load_function(spec)
    raise InputError(f"--loss {spec}: give FILE.py:FUNCTION, or one of {', '.join(LOSSES)}")


def loss_flags(spec: str) -> dict[str, tuple]:
    """{name: (type, default)} of those parameters; a type of ranges.py limits what a flag takes."""
    flags = {}
    parameters = [*inspect.signature(find_function(spec)).parameters.values()]
    for parameter in parameters[1:]:  # the first is p
        name, default, kind = parameter.name, parameter.default, parameter.annotation
        if not isinstance(default, bool | int | float | str):
            raise InputError(
                f"--loss {spec}: parameter {name} needs a number as its default; "
                f"write {name}: float = 0.1"
            )
        if type(default) is int and kind in (float, "float"):
            default = float(default)  # beta: float = 1
        if typing.get_origin(kind) is not typing.Annotated:
            kind = type(default)
        flags[name] = (kind, default)
    return flags


@dataclass(frozen=True, kw_only=True)
class Recorder(PairLogps):
    """Pairs that remember which of their fields were read, also by their properties."""

    read: set[str] = field(default_factory=set)

    def __getattribute__(self, name: str):
        if name in PairLogps.__dataclass_fields__:
            self.read.add(name)
        return super().__getattribute__(name)


def made_up_pairs() -> Recorder:
    """Three pairs with every field; gradients reach the policy's token log-probs."""
    examples = []
    logps = []
    for n in (2, 3, 4):
        chosen = -torch.arange(1.0, n + 1) / (n + 1)  # n tokens
        rejected = -torch.arange(2.0, n + 3) / (n + 3)  # n + 1 tokens
        reference = [1.1 * chosen, 1.2 * rejected, 0.8 * chosen]
        extra = {
            "reference": reference,
            "reference2": [1.05 * t for t in reference],
            "differs": [chosen > -0.5, rejected > -0.5],
            "preference": 0.2 * n,
        }
        examples.append(SimpleNamespace(extra=extra))
        policy = [chosen.requires_grad_(), rejected.requires_grad_()]
        logps.append([*policy, 0.9 * chosen])
    return Recorder(**vars(pair_logps(examples, logps)))


def fields_read(spec: str, function: Callable[..., torch.Tensor], parameters: dict) -> frozenset:
    """What a loss reads of PairLogps, found by calling it on made-up pairs.

    InputError unless it returns one finite number a pair, with finite gradients of which some reach
    the policy's log-probs.
    """

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise InputError(f"--loss {spec}: {problem}")

    # call it
    pairs = made_up_pairs()
    try:
        loss = function(pairs, **parameters)
    except Exception as error:
        # a plug-in's is a whole line already
        why = error if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(f"--loss {spec}: calling it on three pairs failed: {why}") from None
    reads = frozenset(pairs.read)

    # one number a pair
    is_tensor = isinstance(loss, torch.Tensor)
    returned = f"a tensor of shape {tuple(loss.shape)}" if is_tensor else type(loss).__name__
    require(
        is_tensor and loss.shape == (3,),
        f"returned {returned} for three pairs; return one loss a pair, shape (3,)",
    )

    # finite, and so are its gradients, of which some reach the policy
    tokens = pairs.chosen_token_logp + pairs.rejected_token_logp
    gradients = []
    if loss.requires_grad:
        found = torch.autograd.grad(loss.sum(), tokens, allow_unused=True)
        gradients = [gradient for gradient in found if gradient is not None]
    given = ", ".join(f"{name} = {value}" for name, value in parameters.items())
    require(
        all(x.isfinite().all() for x in [loss, *gradients]),
        f"it or its gradient is not finite for three plain pairs with {given}: {loss.tolist()}",
    )
    require(
        any(gradient.any() for gradient in gradients),
        f"no gradient reaches the policy's log-probs with {given}; do not detach them",
    )
    return reads
