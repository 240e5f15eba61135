"""losses.py: numbers by hand, invariants, gradients, TRL; what each reads; a loss of one's own."""

import math
import re
from collections import defaultdict
from dataclasses import FrozenInstanceError, fields, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import last_json, read_rows, run, tiny_checkpoint, write_rows
from safetensors.torch import load_file
from torch.autograd import gradcheck

import dpo
import loop
from dpo import PolicyOptions, train_policy
from formats.chat import Chat
from losses import (
    LOSSES,
    Loss,
    PairLogps,
    differences,
    log_odds,
    loss_defaults,
    pair_logps,
    preference_of,
    resolve_loss,
    simpo,
)
from plumbing.files import InputError
from plumbing.options import ROOT, RunOptions, parse_options
from plumbing.parts import read_part
from train import Example

LN2 = math.log(2)
FP32 = RunOptions(dtype="float32")
PAIRS = [
    {
        "id": f"p{i}",
        "prompt": f"Count to {i}.",
        "chosen": " ".join(map(str, range(i + 1))),
        "rejected": "no " * (9 - i) + "never",
    }
    for i in range(6)
]


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def total(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([t.sum() for t in tensors])


def pair(pc=-20.0, pr=-30.0, rc=-22.0, rr=-28.0, nc=10.0, nr=12.0, **more) -> PairLogps:
    """The golden pair: h = 4."""
    given = {
        "chosen": pc,
        "rejected": pr,
        "ref_chosen": rc,
        "ref_rejected": rr,
        "chosen_tokens": nc,
        "rejected_tokens": nr,
        "sample": -25.0,
        "ref_sample": -24.0,
        **more,
    }
    return PairLogps(**{name: f64(value) for name, value in given.items()})


def loss(name: str, p: PairLogps | None = None, **parameters) -> float:
    return LOSSES[name](p or pair(), **parameters).item()


def random_pairs(n: int = 7, seed: int = 0) -> PairLogps:
    """Everything that any loss reads, of n pairs with 1 to 9 tokens."""
    g = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return -4 * torch.rand(*shape, generator=g, dtype=torch.float64) - 0.01

    lengths = torch.randint(1, 10, (2, n), generator=g)
    chosen, rejected = ([some(k) for k in side] for side in lengths.tolist())
    ref_chosen = [t + 0.3 * some(len(t)) for t in chosen]
    ref_rejected = [t + 0.3 * some(len(t)) for t in rejected]
    return PairLogps(
        chosen=total(chosen),
        rejected=total(rejected),
        chosen_tokens=lengths[0],
        rejected_tokens=lengths[1],
        ref_chosen=total(ref_chosen),
        ref_rejected=total(ref_rejected),
        ref2_chosen=total(ref_chosen) + some(n),
        ref2_rejected=total(ref_rejected) + some(n),
        sample=some(n) * 9,
        ref_sample=some(n) * 9,
        preference=torch.rand(n, generator=g, dtype=torch.float64),
        chosen_token_logp=chosen,
        rejected_token_logp=rejected,
        ref_chosen_token_logp=ref_chosen,
        ref_rejected_token_logp=ref_rejected,
        chosen_differs=[t > -2 for t in chosen],
        rejected_differs=[t > -2 for t in rejected],
    )


# ---- numbers ----

GOLDEN = [
    ("dpo", {"beta": 0.1}, 0.5130152524),
    ("dpo", {"beta": 0.1, "label_smoothing": 0.1}, 0.5530152524),
    ("simpo", {"beta": 2, "gamma": 1}, 0.6931471806),
    ("simpo", {"beta": 2.5, "gamma": 1.375}, 0.7575990353),
    ("hinge", {"beta": 0.1}, 0.6),
    ("robust", {"beta": 0.1, "label_smoothing": 0.1}, 0.4630152524),
    ("ipo", {"tau": 0.1}, 1.0),
    ("ipo-mean", {"tau": 0.1}, 21.4677777778),
    ("sft", {}, 2.0),
    ("orpo", {"weight": 0.1}, 2.0451931604),
    ("orpo", {"weight": 1}, 2 + 0.4519316040),
    ("asft", {"weight": 1}, 4.0856504837),
    ("asft", {"weight": 0.1}, 2.2085650484),
    ("selm", {"alpha": 1e-3, "beta": 0.01}, 0.6733371672),
    ("selm", {"alpha": 0.1, "beta": 0.1}, 0.5030152524),  # the online form of VPO, as derived
    ("rpo", {"alpha": 0.1, "beta": 0.1}, 0.4930152524),
    ("vpo-offline-derived", {"alpha": 0.1, "beta": 0.1}, 0.4930152524),
    ("xpo", {"alpha": 1e-5, "beta": 0.1}, 0.5127652524),
]


@pytest.mark.parametrize(("name", "parameters", "expected"), GOLDEN)
def test_golden_numbers(name, parameters, expected):
    assert loss(name, **parameters) == pytest.approx(expected, abs=1e-10)


def test_golden_numbers_of_soft_labels_a_second_reference_and_log_odds():
    soft = loss("soft-dpo", pair(preference=0.7), beta=0.1)
    assert soft == pytest.approx(0.6330152524, abs=1e-10)
    mrpo = loss("mrpo", pair(ref2_chosen=-21.0, ref2_rejected=-31.0), beta=0.1, eta=0.1)
    assert mrpo == pytest.approx(0.5620966477, abs=1e-10)
    odds = log_odds(f64(-2, -2.5)).tolist()
    assert odds == pytest.approx([-1.8545865421, -2.4143495163], abs=1e-10)


def test_numbers_by_hand():
    """On uc = 2, ur = -2, so h = 4; beta 0.5."""
    sigmoid_1, minus_ls_1, minus_ls_minus_1 = 0.7310585786, 0.3132616875, 1.3132616875
    nca = minus_ls_1 + minus_ls_minus_1 / 2 + minus_ls_1 / 2
    assert loss("nca", beta=0.5) == pytest.approx(nca, abs=1e-9)
    assert loss("bco", beta=0.5) == pytest.approx(2 * minus_ls_1, abs=1e-9)
    assert loss("sppo", beta=0.5) == pytest.approx(2 * (2 - 1) ** 2)
    assert loss("apo-zero", beta=0.5) == pytest.approx(2 * (1 - sigmoid_1), abs=1e-9)
    sigmoid_2 = 1 / (1 + math.exp(-2))
    assert loss("apo-down", beta=0.5) == pytest.approx(sigmoid_1 + 1 - sigmoid_2, abs=1e-9)
    q = sigmoid_2
    kl = q * math.log(q / 0.9) + (1 - q) * math.log((1 - q) / 0.1)
    assert loss("exo", beta=0.5, label_smoothing=0.1) == pytest.approx(kl)
    m = 1 / (1 + math.exp(-2 / 0.5))
    discopop = (1 - m) * math.log(1 + math.exp(-2)) + m * math.exp(-2)
    assert loss("discopop", beta=0.5, tau=0.5) == pytest.approx(discopop)


def test_weights_of_bmc_by_hand():
    """Chosen p .5 (differs, 1/p = 2 below delta), .8; rejected .1 (differs, 1/p cut at 3), .8."""
    marks = [torch.tensor([True, False])]
    p = replace(
        pair(),
        chosen_token_logp=[f64(0.5, 0.8).log()],
        rejected_token_logp=[f64(0.1, 0.8).log()],
        ref_chosen_token_logp=[f64(0.4, 0.8).log()],
        ref_rejected_token_logp=[f64(0.2, 0.8).log()],
        chosen_differs=marks,
        rejected_differs=marks,
    )
    h = (1 + 2) * math.log(0.5 / 0.4) - (1 + 3) * math.log(0.1 / 0.2)
    expected = math.log(1 + math.exp(-0.3 * h))
    assert loss("dpo-bmc", p, beta=0.3, delta=3.0) == pytest.approx(expected)
    none = [torch.tensor([False, False])]
    p = replace(p, chosen_differs=none, rejected_differs=none)
    h = math.log(0.5 / 0.4) - math.log(0.1 / 0.2)
    assert loss("dpo-bmc", p, beta=0.3) == pytest.approx(math.log(1 + math.exp(-0.3 * h)))


def test_invariants_at_the_reference():
    same = pair(rc=-20.0, rr=-30.0)
    assert loss("dpo", same, beta=0.7) == pytest.approx(LN2)
    assert loss("dpo", same, beta=0.7, label_smoothing=0.2) == pytest.approx(LN2)
    assert loss("robust", same, beta=0.7, label_smoothing=0.2) == pytest.approx(LN2)
    assert loss("rpo", same, beta=0.7) == pytest.approx(LN2)
    squared = 1 / (4 * 0.1**2)
    assert loss("ipo", same, tau=0.1) == loss("ipo-mean", same, tau=0.1) == pytest.approx(squared)


def test_swapping_the_responses_negates_the_margin():
    swapped = pair(-30.0, -20.0, -28.0, -22.0, 12.0, 10.0)
    assert swapped.margin.item() == -pair().margin.item() == -4
    # -log sigmoid(-x) = -log sigmoid(x) + x
    assert loss("dpo", swapped) - loss("dpo") == pytest.approx(0.1 * 4)
    difference = loss("simpo", swapped, gamma=0) - loss("simpo", gamma=0)
    assert difference == pytest.approx(2 * (-2 + 2.5))
    mean = (loss("dpo") + loss("dpo", swapped)) / 2
    assert loss("soft-dpo", pair(preference=0.5)) == pytest.approx(mean)
    smoothed = loss("dpo", swapped, label_smoothing=0.7)
    assert loss("dpo", label_smoothing=0.3) == pytest.approx(smoothed)


def test_what_a_loss_is_blind_to():
    far = pair(rc=-1.0, rr=-99.0)
    for name in NO_REFERENCE:
        assert loss(name, far) == loss(name)
    assert loss("dpo", pair(nc=1.0, nr=50.0)) == loss("dpo")  # sums, no means
    assert loss("simpo", pair(pc=-40.0, nc=20.0)) == loss("simpo")  # means, no sums
    assert loss("sft", pair(pr=-99.0, nr=1.0)) == loss("sft")


def test_sft_is_the_other_losses_first_term():
    p = random_pairs()
    assert torch.equal(LOSSES["sft"](p), -p.mean_chosen)
    assert torch.equal(LOSSES["orpo"](p, weight=0.0), LOSSES["sft"](p))
    assert torch.equal(LOSSES["asft"](p, weight=0.0), LOSSES["sft"](p))


@pytest.mark.slow
def test_sft_takes_the_steps_of_the_nll_alone(tiny, tmp_path):
    """DPO at beta 1e-30 is ln 2 whatever the pair, and its gradient vanishes beside that of the
    NLL: with nll 1 it trains as sft, to the same bytes.
    """
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    alike = {
        "sft": {},
        "dpo": {"nll": 1.0, "loss_parameters": {"beta": 1e-30}},
    }
    weights = {}
    losses = {}
    for name, changes in alike.items():
        out = tmp_path / name
        o = options(name, lr=1e-3, epochs=3, batch=2, **changes)
        train_policy(tiny, [pairs], out, o, cache=tmp_path / "cache")
        weights[name] = (out / "model.safetensors").read_bytes()
        losses[name] = [line["loss"] for line in read_rows(out / "metrics.jsonl")]
    assert weights["sft"] == weights["dpo"]
    shifted = [value + LN2 for value in losses["sft"]]
    assert losses["dpo"] == pytest.approx(shifted, abs=1e-5)
    assert losses["sft"][-1] < losses["sft"][0]

    # other rejected responses change nothing but the shapes of the batches
    rows = [{**row, "rejected": "so it is"} for row in PAIRS]
    other = write_rows(tmp_path / "other.jsonl", rows)
    o = options("sft", lr=1e-3, epochs=3, batch=2)
    train_policy(tiny, [other], tmp_path / "other", o)
    assert distance(tmp_path / "other", tmp_path / "sft") < 1e-5
    assert distance(tmp_path / "sft", tiny) > 1e-5


def test_cdpo_has_its_optimum_where_its_docstring_says():
    h = math.log(0.9 / 0.1) / 0.1
    assert h == pytest.approx(21.9722457734)
    margins, zero = f64(h - 0.01, h, h + 0.01), f64(0, 0, 0)
    p = replace(pair(), chosen=margins, rejected=zero, ref_chosen=zero, ref_rejected=zero)
    assert LOSSES["dpo"](p, beta=0.1, label_smoothing=0.1).argmin() == 1


def test_distance_of_orpo_to_asft():
    p = random_pairs()
    pc = p.mean_chosen.exp()
    pr = p.mean_rejected.exp()
    gap = LOSSES["orpo"](p, weight=0.3) - LOSSES["asft"](p, weight=0.3)
    torch.testing.assert_close(gap, 0.3 * (pc * (1 - pr) + pr * (1 - pc)).log())


def test_mrpo_with_twice_the_same_reference_is_dpo():
    p = random_pairs()
    p = replace(p, ref2_chosen=p.ref_chosen, ref2_rejected=p.ref_rejected)
    plain = LOSSES["dpo"](p, beta=0.2)
    torch.testing.assert_close(LOSSES["mrpo"](p, beta=0.2), plain)
    torch.testing.assert_close(LOSSES["mrpo"](p, beta=0.2, alpha=0.25, eta=-0.5), plain)


def test_mrpo_goes_over_to_a_single_reference():
    """alpha weighs e^x1: at 0 what is left is ref2 as clipped, at 1 the first reference."""
    p = random_pairs()
    first = LOSSES["dpo"](p, beta=0.2)
    second = replace(p, ref_chosen=p.ref2_chosen, ref_rejected=p.ref2_rejected)
    torch.testing.assert_close(LOSSES["mrpo"](p, beta=0.2, alpha=1.0), first)
    open_window = LOSSES["mrpo"](p, beta=0.2, alpha=0.0, eta=-1e9)
    torch.testing.assert_close(open_window, LOSSES["dpo"](second, beta=0.2))
    closed_window = LOSSES["mrpo"](p, beta=0.2, alpha=0.0, eta=-0.0)
    torch.testing.assert_close(closed_window, first)


def one_token_each(sums: torch.Tensor) -> list[torch.Tensor]:
    return [x[None] for x in sums]


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
    p = random_pairs(3)
    if name == "dpo-bmc":  # of token log-probs: put each pair's sum on one token of weight 1
        none = [torch.tensor([False])] * 3
        p = replace(
            p,
            ref_chosen_token_logp=one_token_each(p.ref_chosen),
            ref_rejected_token_logp=one_token_each(p.ref_rejected),
            chosen_differs=none,
            rejected_differs=none,
        )

    def of(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        moved = replace(
            p,
            chosen=chosen,
            rejected=rejected,
            chosen_token_logp=one_token_each(chosen),
            rejected_token_logp=one_token_each(rejected),
        )
        return LOSSES[name](moved)

    chosen = p.chosen.clone().requires_grad_()
    rejected = p.rejected.clone().requires_grad_()
    assert gradcheck(of, [chosen, rejected])
    of(chosen, rejected).sum().backward()
    if name not in ("apo-down", "sppo", "nca", "soft-dpo", "discopop"):  # may lower chosen
        assert (chosen.grad <= 0).all()
        assert (rejected.grad is None) == (name == "sft")
        assert name == "sft" or (rejected.grad >= 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chosen", [-1e-7, -1e4], ids=["near", "far"])
def test_extreme_margins_stay_finite_in_fp32(name, chosen):
    """Rejected lies at -1e4 nats; chosen at 0 or there as well."""

    def single(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.float()
        return value

    p = random_pairs(3)
    p = PairLogps(**{field: single(value) for field, value in vars(p).items()})
    pc = torch.full((3,), chosen).requires_grad_()
    tokens = [
        x[None] + torch.zeros(len(r)) for x, r in zip(pc, p.ref_chosen_token_logp, strict=True)
    ]
    p = replace(p, chosen=pc, rejected=torch.full((3,), -1e4), chosen_token_logp=tokens)
    value = LOSSES[name](p)
    value.sum().backward()
    assert value.isfinite().all()
    assert pc.grad is not None and pc.grad.isfinite().all()


# ---- against TRL ----

TRL = {
    "sigmoid": ("dpo", "beta"),
    "hinge": ("hinge", "beta"),
    "ipo": ("ipo-mean", "tau"),
    "robust": ("robust", "beta"),
    "exo_pair": ("exo", "beta"),
    "nca_pair": ("nca", "beta"),
    "bco_pair": ("bco", "beta"),
    "sppo_hard": ("sppo", "beta"),
    "apo_zero": ("apo-zero", "beta"),
    "apo_down": ("apo-down", "beta"),
    "discopop": ("discopop", "beta"),
}


def as_is(x):
    return x


def trl_dpo(kind: str, p: PairLogps, beta: float, label_smoothing: float) -> torch.Tensor:
    """The batch's loss of TRL's DPOTrainer, given the log-probs of p in place of a model's."""
    trl = pytest.importorskip("trl")
    # log-probs of completions that start at position 1, chosen above rejected
    tokens = [*p.chosen_token_logp, *p.rejected_token_logp]
    T = 1 + max(len(one) for one in tokens)
    logps = torch.zeros(len(tokens), T - 1, dtype=torch.float64)
    mask = torch.zeros(len(tokens), T, dtype=torch.long)
    for row, one in enumerate(tokens):
        logps[row, : len(one)] = one
        mask[row, 1 : 1 + len(one)] = 1
    outputs = SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=logps > -1)
    # as much of a trainer as the loss reads
    accelerator = SimpleNamespace(device="cpu", gather=as_is, gather_for_metrics=as_is)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        _total_train_tokens=0,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"eval": defaultdict(list)},
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": p.ref_chosen,
        "ref_rejected_logps": p.ref_rejected,
    }
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRL)
def test_agrees_with_trl(kind):
    name, parameter = TRL[kind]
    smoothing = {"label_smoothing": 0.05} if kind in ("robust", "exo_pair") else {}
    for seed, beta in ((0, 0.1), (1, 0.5), (2, 0.03)):
        p = random_pairs(9, seed)
        ours = LOSSES[name](p, **{parameter: beta}, **smoothing).mean()
        theirs = trl_dpo(kind, p, beta, smoothing.get("label_smoothing", 0.0))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # exo's e is fp32 there


@pytest.mark.slow
def test_agrees_with_trls_simpo_and_orpo():
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    p = random_pairs(9)
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=1.6,
        beta=2.0,
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs, _, _ = cpo.CPOTrainer.cpo_loss(trainer, p.mean_chosen, p.mean_rejected)
    torch.testing.assert_close(LOSSES["simpo"](p, beta=2.0, gamma=1.6), theirs)
    # theirs: fp32 inside, and without the NLL
    theirs, *_ = orpo.ORPOTrainer.odds_ratio_loss(trainer, p.mean_chosen, p.mean_rejected)
    ours = LOSSES["orpo"](p, weight=2.0).float()
    torch.testing.assert_close(ours, -p.mean_chosen.float() - theirs, rtol=1e-4, atol=1e-5)


# ---- what a loss reads ----

REFERENCED = {"ref_chosen", "ref_rejected"}
NO_REFERENCE = {"simpo", "sft", "orpo", "asft"}


@pytest.mark.parametrize("name", LOSSES)
def test_fields_read(name):
    read = resolve_loss(name).reads
    assert read <= {field.name for field in fields(PairLogps)}
    assert bool(read & REFERENCED) == (name not in NO_REFERENCE | {"dpo-bmc"})
    assert ("ref2_chosen" in read) == (name == "mrpo")
    assert ("sample" in read) == (name in ("selm", "xpo"))
    assert ("ref_sample" in read) == (name == "selm")
    assert ("preference" in read) == (name == "soft-dpo")
    tokens = {"ref_chosen_token_logp", "ref_rejected_token_logp", "chosen_differs"}
    assert tokens <= read or name != "dpo-bmc"
    assert ("chosen_tokens" in read) == (name in NO_REFERENCE | {"ipo-mean"})


def test_every_loss_says_what_its_reader_needs():
    for name, function in LOSSES.items():
        text = function.__doc__
        assert "Trap" in text and "Needs:" in text and ("arXiv" in text or "derived" in text), name
    text = " ".join(simpo.__doc__.split())
    assert "SynPO: gamma 1.6, fixed; beta searched in {2, 4, 6, 8, 10, 12}" in text


def needs(read: frozenset[str]) -> str:
    """What docs/losses.md says of a loss that reads these fields."""
    words = {
        "ref": ("ref_chosen", "ref_chosen_token_logp"),
        "ref2": ("ref2_chosen",),
        "counts": ("chosen_tokens",),
        "tokens": ("chosen_token_logp",),
        "edits": ("chosen_differs",),
        "sample": ("sample",),
        "preference": ("preference",),
    }
    return ", ".join(word for word, some in words.items() if read & set(some))


def test_the_documented_table_is_that_of_the_code():
    text = (ROOT / "docs" / "losses.md").read_text()
    rows = {}
    for line in text.split("\n"):
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        name = re.match(r"`([\w-]+)`", cells[0])
        if line.startswith("|") and name:
            rows[name[1]] = cells
    assert list(rows) == list(LOSSES)
    for name, cells in rows.items():
        assert cells[2] == needs(resolve_loss(name).reads), name
        flags = [f"`--{key.replace('_', '-')} {v:g}`" for key, v in loss_defaults(name).items()]
        assert cells[3] == " ".join(flags), name


LOGPS = [torch.tensor([-1.0, -2, -3]), torch.tensor([-2.0, -2])]


def test_what_a_loss_sees_of_a_micro_batch():
    extra = {
        "reference": [[-1.0, -2.0, -2.5], [-6.0, -0.5], [-1.0]],
        "reference2": [-7.0, -8.0, -9.0],
        "differs": ([True, False, False], [False, True]),
        "preference": 0.7,
    }
    p = pair_logps([Example("a", [], extra=extra)], [[*LOGPS, torch.tensor([-9.0])]])
    tensors = {name: x for name, x in vars(p).items() if isinstance(x, torch.Tensor)}
    assert {name: x.item() for name, x in tensors.items()} == pytest.approx(
        {
            "chosen": -6,
            "rejected": -4,
            "chosen_tokens": 3,
            "rejected_tokens": 2,
            "ref_chosen": -5.5,
            "ref_rejected": -6.5,
            "ref2_chosen": -7,
            "ref2_rejected": -8,
            "sample": -9,
            "ref_sample": -1,
            "preference": 0.7,
        }
    )
    assert p.chosen_token_logp[0].tolist() == [-1, -2, -3]
    assert p.ref_rejected_token_logp[0].tolist() == [-6, -0.5]
    assert p.chosen_differs[0].tolist() == [True, False, False]
    assert p.rejected_differs[0].dtype == torch.bool
    bare = pair_logps([Example("a", [])], [LOGPS])
    assert bare.ref_chosen is None and bare.sample is None and bare.preference is None
    assert not bare.chosen_differs


def test_differences_are_the_edit(tiny):
    chat = Chat(tiny)
    chosen = chat.encode("I like the red fox")
    rejected = chat.encode("I like a blue fox")
    marked = []
    for ids, marks in zip((chosen, rejected), differences(chat, chosen, rejected), strict=True):
        marked.append(chat.text([t for t, mark in zip(ids, marks, strict=True) if mark]))
    assert "fox" not in marked[0] + marked[1] and "like" not in marked[0] + marked[1]
    assert set("rd") <= set(marked[0]) and set("bl") <= set(marked[1])
    assert differences(chat, chosen, chosen) == ([False] * len(chosen),) * 2


def test_stop_words_are_no_differences():
    words = {1: " the", 2: " fox", 3: "The", 4: " owl"}
    chat = SimpleNamespace(text=lambda ids: words[ids[0]])
    assert differences(chat, [1, 2], [3, 4]) == ([False, True], [False, True])
    assert differences(chat, [2], []) == ([True], [])


def test_preference_is_the_pairs_own_or_of_its_scores():
    far = {"id": "a", "score_chosen": -1e3, "score_rejected": 1e3}
    assert preference_of(far) == 0  # and no overflow
    own = {"id": "a", "preference": 0.25, "score_chosen": 9, "score_rejected": 0}
    assert preference_of(own) == 0.25
    scored = {"id": "a", "score_chosen": 1.0, "score_rejected": 0.0}
    assert preference_of(scored) == pytest.approx(0.7310585786)
    halves = {"score_chosen": 1.0, "score_rejected": None}
    for row in ({}, {"preference": 1.5}, {"preference": "yes"}, halves):
        with pytest.raises(InputError, match="pair a: field 'preference'"):
            preference_of({"id": "a", **row})


# ---- training with each ----


def distance(a, b) -> float:
    """Largest difference between the weights of two checkpoints."""
    a, b = (load_file(directory / "model.safetensors") for directory in (a, b))
    return max((a[name] - b[name]).abs().max().item() for name in a | b)


def options(name: str, **changes) -> PolicyOptions:
    return PolicyOptions(run=FP32, loss=name, **changes)


# one for each kind of input; the others are slow together
QUICK = ("dpo", "simpo", "soft-dpo", "dpo-bmc", "mrpo", "xpo")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LOSSES if name not in QUICK]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_every_loss_trains(tiny, tmp_path, name, monkeypatch):
    # give what the loss reads, and nothing else
    given = {}
    if name == "mrpo":
        given["second_reference"] = tiny_checkpoint(tmp_path / "second", seed=1)
    if name in ("selm", "xpo"):
        samples = [{"id": row["id"], "prompt": "x", "response": "no"} for row in PAIRS]
        given["self_samples"] = write_rows(tmp_path / "samples.jsonl", samples)
    if name in NO_REFERENCE:
        monkeypatch.setattr(dpo, "reference_logps", None)  # whoever computes one fails

    # train
    rows = [{**row, "preference": 0.9} for row in PAIRS]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    o = options(name, lr=1e-4, epochs=4, batch=6, **given)
    cache = None if name in NO_REFERENCE else tmp_path / "cache"
    train_policy(tiny, [pairs], tmp_path / "out", o, cache=cache)
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] or name == "discopop"  # not convex below margin 0
    assert distance(tmp_path / "out", tiny) > 1e-4

    # the cache holds a folder a reference, and lists of tokens only for the loss that reads them
    folders = list((tmp_path / "cache").glob("*"))
    assert len(folders) == (0 if name in NO_REFERENCE else 2 if name == "mrpo" else 1)
    cached = [x for folder in folders for f in folder.glob("*") for x in read_part(f).values()]
    assert {type(logp) for logp in cached} <= {list if name == "dpo-bmc" else float}


@pytest.mark.slow
def test_bmc_equals_a_plain_forward(tiny, tmp_path):
    """Step 0 from another start than the reference: log-probs, masks, weights, by transformers."""
    from transformers import AutoModelForCausalLM

    # ours
    start = tiny_checkpoint(tmp_path / "start", seed=1)
    row = {
        "id": "x",
        "prompt": "Say it.",
        "chosen": "one red fox",
        "rejected": "one blue fox jumps",
    }
    o = options("dpo-bmc", loss_parameters={"beta": 0.5, "delta": 2.0}, lr=1e-6, batch=1)
    pairs = write_rows(tmp_path / "pairs.jsonl", [row])
    train_policy(start, [pairs], tmp_path / "out", o, reference=tiny, cache=tmp_path / "cache")
    [line] = read_rows(tmp_path / "out" / "metrics.jsonl")

    # theirs
    chat = Chat(tiny)
    prompt = chat.prompt_ids(row)

    def logps(directory, ids: list[int]) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(len(ids)), ids].tolist()

    chosen, rejected = chat.response_ids(row["chosen"]), chat.response_ids(row["rejected"])
    marks = differences(chat, chosen, rejected)
    h = 0.0
    for sign, ids, some in ((1, chosen, marks[0]), (-1, rejected, marks[1])):
        for a, b, mark in zip(logps(start, ids), logps(tiny, ids), some, strict=True):
            h += sign * (1 + mark * min(math.exp(-a), 2.0)) * (a - b)
    assert line["preference_loss"] == pytest.approx(math.log1p(math.exp(-0.5 * h)), rel=1e-4)


@pytest.mark.slow
def test_samples_are_joined_by_id(tiny, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    answers = [
        {"id": row["id"], "prompt": "x", "response": "yes " * i} for i, row in enumerate(PAIRS, 1)
    ]

    def first_loss(name: str, rows: list[dict]) -> float:
        samples = write_rows(tmp_path / f"{name}.jsonl", rows)
        parameters = {"alpha": 1.0}
        o = options("xpo", loss_parameters=parameters, lr=1e-6, batch=6, self_samples=samples)
        train_policy(tiny, [pairs], tmp_path / name, o, cache=tmp_path / "cache")
        return read_rows(tmp_path / name / "metrics.jsonl")[0]["loss"]

    in_order = first_loss("in_order", answers)
    assert in_order == first_loss("reversed", answers[::-1]) < LN2 - 1
    missing = rf"4 pairs have no \w+ there \({PAIRS[2]['id']}\), 0 have several"
    with pytest.raises(InputError, match=missing):
        first_loss("short", answers[:2])
    twice = [{**row, "sample": i} for row in answers for i in range(2)]
    further = rf"twice.jsonl: 0 pairs have no \w+ there \(none\), {len(PAIRS)} have several"
    with pytest.raises(InputError, match=further):
        first_loss("twice", twice)


# ---- options ----


def parsed(*flags: str) -> PolicyOptions:
    return parse_options(PolicyOptions, list(flags))


def resolved(*flags: str) -> Loss:
    o = parsed(*flags)
    return resolve_loss(o.loss, o.loss_parameters)


def test_options_are_the_parameters_of_the_chosen_loss(capsys):
    assert parsed().loss_parameters == {"beta": 0.1, "label_smoothing": 0.0}
    o = parsed("--loss", "simpo", "--gamma", "1")
    assert o.loss_parameters == {"beta": 2.0, "gamma": 1.0}
    strange = (
        ["--loss=simpo", "--label-smoothing", "0.1"],
        ["--gamma", "1"],
        ["--loss", "orpo", "--beta", "1"],
    )
    for flags in strange:
        unknown = r"unrecognized arguments: --(label-smoothing|gamma|beta)"
        with pytest.raises(InputError, match=unknown):
            parsed(*flags)
    with pytest.raises(InputError, match=r"--loss nodpo: give FILE\.py:FUNCTION, or one of dpo, s"):
        parsed("--loss", "nodpo")
    with pytest.raises(SystemExit):
        parsed("--loss", "asft", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--weight" in text and "--gamma GAMMA" not in text
    assert re.search(r"parameter of .*loss asft \(default: 1\.0\)", text)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_every_loss_can_replace_a_recipes_own(path):
    """A recipe's beta and gamma are of its own loss; another comes with its published ones."""
    for name in LOSSES:
        given = parse_options(loop.Options, ["--config", str(path), "--policy.loss", name])
        assert given.policy.loss_parameters == loss_defaults(name)


@pytest.mark.parametrize("name", LOSSES)
def test_every_parameter_of_every_loss_reaches_it(name):
    wanted = {key: default * 3 + 0.01 for key, default in loss_defaults(name).items()}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in wanted.items()]
    found = resolved("--loss", name, *flags)
    assert found.parameters == pytest.approx(wanted)
    p = random_pairs()
    assert torch.equal(found(p), LOSSES[name](p, **wanted))
    assert not wanted or not torch.equal(found(p), LOSSES[name](p))


def test_a_resolved_loss_is_fixed():
    found = resolve_loss("simpo", {"gamma": 1})
    assert found.function is simpo
    assert found.parameters == {"beta": 2.0, "gamma": 1.0}
    with pytest.raises(FrozenInstanceError):
        found.parameters = {}


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("simpo", {"tau": 1.0}, r"simpo\(\) got an unexpected keyword argument 'tau'"),
        ("dpo", {"beta": "0.1"}, ""),
        ("dpo", {"beta": None}, "unsupported operand"),
    ],
)
def test_parameters_that_a_loss_does_not_take_are_refused(name, parameters, message):
    problem = f"--loss {name}: calling it on three pairs failed: TypeError: .*({message})"
    with pytest.raises(InputError, match=problem):
        resolve_loss(name, parameters)


@pytest.mark.slow
def test_files_that_a_loss_does_not_read_are_refused(tiny, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    command = ["dpo.py", "--model", tiny, "--pairs", pairs, "--out", tmp_path / "out"]
    samples = write_rows(tmp_path / "samples.jsonl", PAIRS)
    refused = (
        (["--second-reference", tiny], "--second-reference DIR: --loss dpo does not read it"),
        (["--self-samples", samples], "--self-samples FILE.jsonl: --loss dpo does not read it"),
        (["--loss", "mrpo"], "--loss mrpo reads ref2; give --second-reference DIR"),
        (["--loss", "selm"], "--loss selm reads sample; give --self-samples FILE.jsonl"),
    )
    for flags, message in refused:
        code, _, err = run([*command, *flags])
        assert code == 2 and message in err, err
    assert not (tmp_path / "out").exists()


# ---- a loss of one's own ----

MINE = """
import torch.nn.functional as F

def my_loss(p, *, beta: float = 0.1, push: float = 0.0):
    return F.softplus(-beta * p.margin) + push * p.mean_rejected
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path / 'mine.py'}:my_loss"


def test_own_loss_has_parameters_like_any_other(tmp_path, mine):
    found = resolved("--loss", mine, "--push", "0.5")
    assert found.parameters == {"beta": 0.1, "push": 0.5}
    assert found.reads >= {"ref_chosen", "rejected_tokens"}  # by properties
    (tmp_path / "whole.py").write_text(MINE.replace("0.1", "1"))  # beta: float = 1
    whole = parsed("--loss", f"{tmp_path / 'whole.py'}:my_loss", "--beta", "0.5")
    assert whole.loss_parameters == {"beta": 0.5, "push": 0.0}


@pytest.mark.slow
def test_own_loss_trains_like_any_other(tiny, tmp_path, mine):
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    command = ["dpo.py", "--model", tiny, "--pairs", pairs, "--dtype", "float32"]
    command += ["--lr", "1e-3", "--batch", "3"]
    plain, own, pushed = (tmp_path / name for name in ("plain", "own", "pushed"))
    runs = (
        (plain, []),
        (own, ["--loss", mine]),
        (pushed, ["--loss", mine, "--push", "0.5"]),
    )
    for out, flags in runs:
        code, printed, err = run([*command, "--out", out, *flags])
        assert code == 0 and last_json(printed)["pairs"] == 6, err
    assert distance(plain, own) < 1e-6
    assert distance(plain, pushed) > 1e-4
    (tmp_path / "mine.py").write_text(MINE + "# changed\n")  # the same command again
    code, _, err = run([*command, "--out", own, "--loss", mine])
    assert code == 2 and "loss" in err and "own" in err, err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return p.margin.mean()",
            r"returned a tensor of shape \(\) for three pairs; return one loss a pair, shape \(3,",
        ),
        ("return 1.0", "returned float for three pairs"),
        (
            "return -beta * p.margin.detach()",
            "no gradient reaches the policy's log-probs with beta = 0.1",
        ),
        ("return p.ref_chosen - p.ref_rejected", "no gradient reaches"),
        ("return p.chosen * 0", "no gradient reaches"),
        ("return (p.margin * 0).log()", "it or its gradient is not finite"),
        ("return (p.chosen - p.chosen).sqrt()", "it or its gradient is not finite"),
        (
            "return p.choosen",
            "calling it on three pairs failed: .*line 2: AttributeError: .*choosen",
        ),
        ("return undefined", "calling it on three pairs failed: .*line 2: NameError"),
    ],
)
def test_what_is_not_a_loss_is_told_why(tmp_path, body, message):
    (tmp_path / "bad.py").write_text(f"def bad(p, *, beta=0.1):\n    {body}\n")
    with pytest.raises(InputError, match=f"--loss .*bad.py:bad: {message}"):
        resolved("--loss", f"{tmp_path / 'bad.py'}:bad")


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("p, *, beta", "parameter beta needs a number as its default"),
        ("p, *, beta=None", "parameter beta needs a number as its default"),
        ("p, *, lr=1.0", "its parameter lr has the name of another option"),
    ],
)
def test_parameters_that_cannot_be_flags_are_refused(tmp_path, signature, message):
    (tmp_path / "bad.py").write_text(f"def bad({signature}):\n    return p.chosen\n")
    with pytest.raises(InputError, match=message):
        parsed("--loss", f"{tmp_path / 'bad.py'}:bad")


@pytest.mark.parametrize(
    "flags",
    [
        ("--loss=robust", "--label-smoothing=0.5"),
        ("--loss=exo", "--label-smoothing=0"),
        ("--beta=0",),
    ],
)
def test_values_outside_of_a_losss_range_are_refused(flags):
    with pytest.raises(InputError, match=r"must be|not finite"):
        resolved(*flags)
