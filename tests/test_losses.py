"""Losses: numbers by hand, invariants, gradients, agreement with TRL; what each reads; losses of one's own; their options."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import last_json, read_rows, run, tiny_checkpoint, write_rows
from test_dpo import EXAMPLES, FP32, LOGPS, PAIRS, distance
from torch.autograd import gradcheck

import dpo
import loop
from data import ROOT, Chat, InputError, parse_options
from dpo import Options, policy_options, preference_objective, reads, train_policy
from losses.pairs import PairLogps, differences, pair_logps, preference_of
from losses.published import LOSSES, fields_read, find_loss, log_odds
from train import Example

LN2 = math.log(2)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


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
    draw = lambda *shape: -4 * torch.rand(*shape, generator=g, dtype=torch.float64) - 0.01  # noqa: E731
    lengths = torch.randint(1, 10, (2, n), generator=g)
    tokens = [[draw(k) for k in side] for side in lengths.tolist()]
    frozen = [[t + 0.3 * draw(len(t)) for t in side] for side in tokens]
    total = lambda side: torch.stack([t.sum() for t in side])  # noqa: E731
    sums, ref = [total(side) for side in tokens], [total(side) for side in frozen]
    return PairLogps(
        *sums,
        *lengths,
        *ref,
        ref[0] + draw(n),
        ref[1] + draw(n),
        draw(n) * 9,
        draw(n) * 9,
        torch.rand(n, generator=g, dtype=torch.float64),
        *tokens,
        *frozen,
        *[[t > -2 for t in side] for side in tokens],
    )


# ---- numbers ----

GOLDEN = [
    ("dpo", {"beta": 0.1}, 0.5130152524),
    ("hinge", {"beta": 0.1}, 0.6),
    ("dpo", {"beta": 0.1, "label_smoothing": 0.1}, 0.5530152524),
    ("robust", {"beta": 0.1, "label_smoothing": 0.1}, 0.4630152524),
    ("ipo", {"tau": 0.1}, 1.0),
    ("ipo-mean", {"tau": 0.1}, 21.4677777778),
    ("simpo", {"beta": 2, "gamma": 1}, 0.6931471806),
    ("simpo", {"beta": 2.5, "gamma": 1.375}, 0.7575990353),
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


def test_more_golden_numbers():
    assert loss("soft-dpo", pair(preference=0.7), beta=0.1) == pytest.approx(
        0.6330152524, abs=1e-10
    )
    mrpo = loss("mrpo", pair(ref2_chosen=-21.0, ref2_rejected=-31.0), beta=0.1, eta=0.1)
    assert mrpo == pytest.approx(0.5620966477, abs=1e-10)
    assert log_odds(f64(-2, -2.5)).tolist() == pytest.approx(
        [-1.8545865421, -2.4143495163], abs=1e-10
    )
    # by hand, on u_c = 2, u_r = -2, beta 0.5: sigmoid(1) = .7310585786, -log sigmoid(1) = .3132616875, of -1 1.3132616875
    assert loss("nca", beta=0.5) == pytest.approx(
        0.3132616875 + 1.3132616875 / 2 + 0.3132616875 / 2, abs=1e-9
    )
    assert loss("bco", beta=0.5) == pytest.approx(2 * 0.3132616875, abs=1e-9)
    assert loss("sppo", beta=0.5) == pytest.approx(2 * (2 - 1) ** 2)
    assert loss("apo-zero", beta=0.5) == pytest.approx(2 * (1 - 0.7310585786), abs=1e-9)
    assert loss("apo-down", beta=0.5) == pytest.approx(
        0.7310585786 + 1 - 1 / (1 + math.exp(-2)), abs=1e-9
    )
    q = 1 / (1 + math.exp(-2))
    kl = q * math.log(q / 0.9) + (1 - q) * math.log((1 - q) / 0.1)
    assert loss("exo", beta=0.5, label_smoothing=0.1) == pytest.approx(kl)
    m = 1 / (1 + math.exp(-2 / 0.5))
    assert loss("discopop", beta=0.5, tau=0.5) == pytest.approx(
        (1 - m) * math.log(1 + math.exp(-2)) + m * math.exp(-2)
    )


def test_weights_of_bmc_by_hand():
    """chosen tokens p .5 (differs, 1/p = 2 under delta) and .8; rejected .1 (differs, 1/p cut off at delta 3) and .8."""
    log = lambda *p: f64(*p).log()  # noqa: E731
    ours, theirs = ([log(0.5, 0.8)], [log(0.1, 0.8)]), ([log(0.4, 0.8)], [log(0.2, 0.8)])
    marks = [torch.tensor([True, False])]
    p = PairLogps(
        f64(0),
        f64(0),
        f64(2),
        f64(2),
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        *ours,
        *theirs,
        marks,
        marks,
    )
    h = (1 + 2) * math.log(0.5 / 0.4) - (1 + 3) * math.log(0.1 / 0.2)
    assert loss("dpo-bmc", p, beta=0.3, delta=3.0) == pytest.approx(
        math.log(1 + math.exp(-0.3 * h))
    )
    p.chosen_differs = p.rejected_differs = [torch.tensor([False, False])]
    h = math.log(0.5 / 0.4) - math.log(0.1 / 0.2)
    assert loss("dpo-bmc", p, beta=0.3) == pytest.approx(math.log(1 + math.exp(-0.3 * h)))


def test_invariants_at_the_reference():
    same = pair(rc=-20.0, rr=-30.0)
    for name, parameters in (
        ("dpo", {}),
        ("dpo", {"label_smoothing": 0.2}),
        ("robust", {"label_smoothing": 0.2}),
        ("rpo", {}),
    ):
        assert loss(name, same, **{"beta": 0.7, **parameters}) == pytest.approx(LN2)
    assert (
        loss("ipo", same, tau=0.1)
        == loss("ipo-mean", same, tau=0.1)
        == pytest.approx(1 / (4 * 0.1**2))
    )


def test_swapping_the_answers_turns_the_margin_round():
    swapped = pair(-30.0, -20.0, -28.0, -22.0, 12.0, 10.0)
    assert swapped.margin.item() == -pair().margin.item() == -4
    # -log sigmoid(-x) = -log sigmoid(x) + x
    assert loss("dpo", swapped) - loss("dpo") == pytest.approx(0.1 * 4)
    assert loss("simpo", swapped, gamma=0) - loss("simpo", gamma=0) == pytest.approx(2 * (-2 + 2.5))
    assert loss("soft-dpo", pair(preference=0.5)) == pytest.approx(
        (loss("dpo") + loss("dpo", swapped)) / 2
    )
    assert loss("dpo", label_smoothing=0.3) == pytest.approx(
        loss("dpo", swapped, label_smoothing=0.7)
    )


def test_what_a_loss_is_blind_to():
    far = pair(rc=-1.0, rr=-99.0)
    for name in ("simpo", "orpo", "asft"):
        assert loss(name, far) == loss(name)
    assert loss("dpo", pair(nc=1.0, nr=50.0)) == loss("dpo")  # sums, no means
    assert loss("simpo", pair(pc=-40.0, nc=20.0)) == loss("simpo")  # means, no sums


def test_relations():
    # the optimum of cDPO, and ORPO's distance to ASFT
    h = math.log(0.9 / 0.1) / 0.1
    margins = torch.tensor([h - 0.01, h, h + 0.01], dtype=torch.float64)
    values = LOSSES["dpo"](
        PairLogps(margins, 0 * margins, None, None, 0 * margins, 0 * margins),
        beta=0.1,
        label_smoothing=0.1,
    )
    assert h == pytest.approx(21.9722457734) and values.argmin() == 1
    p = random_pairs()
    pc, pr = p.mean_chosen.exp(), p.mean_rejected.exp()
    gap = LOSSES["orpo"](p, weight=0.3) - LOSSES["asft"](p, weight=0.3)
    torch.testing.assert_close(gap, 0.3 * (pc * (1 - pr) + pr * (1 - pc)).log())
    p.ref2_chosen, p.ref2_rejected = p.ref_chosen, p.ref_rejected
    torch.testing.assert_close(LOSSES["mrpo"](p, beta=0.2), LOSSES["dpo"](p, beta=0.2))
    torch.testing.assert_close(
        LOSSES["mrpo"](p, beta=0.2, alpha=0.25, eta=-0.5), LOSSES["dpo"](p, beta=0.2)
    )


def test_mrpo_goes_over_to_a_single_reference():
    """alpha weighs e^x1: at 0 what is left is ref2 as clipped, at 1 the first reference."""
    p = random_pairs()
    first = LOSSES["dpo"](p, beta=0.2)
    torch.testing.assert_close(LOSSES["mrpo"](p, beta=0.2, alpha=1.0), first)
    torch.testing.assert_close(
        LOSSES["mrpo"](p, beta=0.2, alpha=0.0, eta=-1e9),  # no window
        -(0.2 * (p.chosen - p.rejected - p.ref2_chosen + p.ref2_rejected)).sigmoid().log(),
    )
    torch.testing.assert_close(
        LOSSES["mrpo"](p, beta=0.2, alpha=0.0, eta=-0.0), first
    )  # a closed one


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
    p = random_pairs(3)
    inputs = [x.clone().requires_grad_() for x in (p.chosen, p.rejected)]

    def of(chosen, rejected):
        if "bmc" in name:  # its sums are of tokens: put each pair's total on one token, of weight 1
            p.chosen_token_logp, p.rejected_token_logp = (
                [x[None] for x in side] for side in (chosen, rejected)
            )
            p.ref_chosen_token_logp, p.ref_rejected_token_logp = (
                [x[None] for x in s] for s in (p.ref_chosen, p.ref_rejected)
            )
            p.chosen_differs = p.rejected_differs = [torch.tensor([False])] * 3
        p.chosen, p.rejected = chosen, rejected
        return LOSSES[name](p)

    assert gradcheck(of, inputs)
    of(*inputs).sum().backward()
    if name not in (
        "apo-down",
        "sppo",
        "nca",
        "soft-dpo",
        "discopop",
    ):  # which may lower chosen, by design
        assert (inputs[0].grad <= 0).all() and (inputs[1].grad >= 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_far_margins_stay_finite_in_fp32(name):
    for far in (1e4, -1e4):
        p = PairLogps(
            **{
                field: value.float()
                if isinstance(value, torch.Tensor) and value.is_floating_point()
                else value
                for field, value in vars(random_pairs(3)).items()
            }
        )
        p.chosen, p.rejected = (
            torch.full((3,), x).requires_grad_() for x in (-1e-7 if far > 0 else -far * -1, -1e4)
        )
        p.chosen_token_logp = [
            x[None] + torch.zeros(len(r))
            for x, r in zip(p.chosen, p.ref_chosen_token_logp, strict=True)
        ]
        value = LOSSES[name](p)
        value.sum().backward()
        assert (
            value.isfinite().all() and p.chosen.grad is not None and p.chosen.grad.isfinite().all()
        ), (name, far)


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


def trl_dpo(kind: str, p: PairLogps, beta: float, label_smoothing: float) -> torch.Tensor:
    """The batch's loss of TRL's DPOTrainer, on the log-probs of p in the place of a model's."""
    trl = pytest.importorskip("trl")
    T = 1 + int(max(p.chosen_tokens.max(), p.rejected_tokens.max()))
    tokens = [*p.chosen_token_logp, *p.rejected_token_logp]
    logps, mask = (
        torch.zeros(len(tokens), T - 1, dtype=torch.float64),
        torch.zeros(len(tokens), T, dtype=torch.long),
    )
    for row, one in enumerate(tokens):
        logps[row, : len(one)] = one
        mask[row, 1 : 1 + len(one)] = 1
    outputs = SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=logps > -1)
    same = lambda x: x  # noqa: E731
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
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


@pytest.mark.parametrize("kind", TRL)
def test_agrees_with_trl(kind):
    name, parameter = TRL[kind]
    for seed, beta in ((0, 0.1), (1, 0.5), (2, 0.03)):
        p, smoothing = random_pairs(9, seed), 0.05 if kind in ("robust", "exo_pair") else 0.0
        ours = LOSSES[name](
            p, **{parameter: beta}, **({"label_smoothing": smoothing} if smoothing else {})
        )
        torch.testing.assert_close(
            ours.mean(), trl_dpo(kind, p, beta, smoothing), rtol=1e-6, atol=1e-9
        )  # e is fp32 there


def test_agrees_with_trls_simpo_and_orpo():
    pytest.importorskip("trl")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    p = random_pairs(9)
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=1.6,
        beta=2.0,
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs, _, _ = CPOTrainer.cpo_loss(trainer, p.mean_chosen, p.mean_rejected)
    torch.testing.assert_close(LOSSES["simpo"](p, beta=2.0, gamma=1.6), theirs)
    theirs, *_ = ORPOTrainer.odds_ratio_loss(
        trainer, p.mean_chosen, p.mean_rejected
    )  # fp32 inside, and without the NLL
    torch.testing.assert_close(
        LOSSES["orpo"](p, weight=2.0).float(), -p.mean_chosen.float() - theirs, rtol=1e-4, atol=1e-5
    )


# ---- what a loss reads ----

REFERENCED = {"ref_chosen", "ref_rejected"}
NO_REFERENCE = {"simpo", "orpo", "asft"}


@pytest.mark.parametrize("name", LOSSES)
def test_fields_read(name):
    read = fields_read(name, **find_loss(name)[1])
    assert bool(read & REFERENCED) == (name not in NO_REFERENCE | {"dpo-bmc"})
    assert ("ref2_chosen" in read) == (name == "mrpo")
    assert ("sample" in read) == (name in ("selm", "xpo")) and ("ref_sample" in read) == (
        name == "selm"
    )
    assert ("preference" in read) == (name == "soft-dpo")
    assert {
        "ref_chosen_token_logp",
        "ref_rejected_token_logp",
        "chosen_differs",
    } <= read or name != "dpo-bmc"
    assert ("chosen_tokens" in read) == (name in NO_REFERENCE | {"ipo-mean"})


def test_every_loss_says_what_its_reader_needs():
    for name, function in LOSSES.items():
        text = function.__doc__
        assert "rap" in text and "Needs" in text and ("arXiv" in text or "derived" in text), name


def test_what_a_loss_sees_of_a_micro_batch():
    examples = [
        Example(
            "a",
            [],
            {
                "reference": [[-1.0, -2.0, -2.5], [-6.0, -0.5], [-1.0]],
                "reference2": [-7.0, -8.0, -9.0],
                "differs": ([True, False, False], [False, True]),
                "preference": 0.7,
            },
        )
    ]
    p = pair_logps(examples, [[*LOGPS[0], torch.tensor([-9.0])]])
    shown = {
        name: value.item() for name, value in vars(p).items() if isinstance(value, torch.Tensor)
    }
    assert shown == pytest.approx(
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
    assert [p.chosen_token_logp[0].tolist(), p.ref_rejected_token_logp[0].tolist()] == [
        [-1, -2, -3],
        [-6, -0.5],
    ]
    assert (
        p.chosen_differs[0].tolist() == [True, False, False]
        and p.rejected_differs[0].dtype == torch.bool
    )
    bare = pair_logps([Example("a", [])], LOGPS[:1])
    assert (
        bare.ref_chosen is None
        and bare.sample is None
        and bare.preference is None
        and not bare.chosen_differs
    )


def test_differences_are_the_edit(tiny):
    chat = Chat(tiny)
    chosen, rejected = chat.encode("I like the red fox"), chat.encode("I like a blue fox")
    marks = differences(chat, chosen, rejected)
    marked = [
        chat.text([t for t, mark in zip(ids, some, strict=True) if mark])
        for ids, some in zip((chosen, rejected), marks, strict=True)
    ]
    assert "fox" not in marked[0] + marked[1] and "like" not in marked[0] + marked[1]
    assert set("rd") <= set(marked[0]) and set("bl") <= set(marked[1])
    assert differences(chat, chosen, chosen) == ([False] * len(chosen),) * 2
    whole = SimpleNamespace(text=lambda ids: {1: " the", 2: " fox", 3: "The", 4: " owl"}[ids[0]])
    assert differences(whole, [1, 2], [3, 4]) == (
        [False, True],
        [False, True],
    )  # stop words never count
    assert differences(whole, [2], []) == ([True], [])


def test_preference_is_the_pairs_own_or_of_its_scores():
    assert (
        preference_of({"id": "a", "score_chosen": -1e3, "score_rejected": 1e3}) == 0
    )  # and no overflow
    assert (
        preference_of({"id": "a", "preference": 0.25, "score_chosen": 9, "score_rejected": 0})
        == 0.25
    )
    assert preference_of({"id": "a", "score_chosen": 1.0, "score_rejected": 0.0}) == pytest.approx(
        0.7310585786
    )
    for row in (
        {},
        {"preference": 1.5},
        {"preference": "yes"},
        {"score_chosen": 1.0, "score_rejected": None},
    ):
        with pytest.raises(InputError, match="pair a: field 'preference'"):
            preference_of({"id": "a", **row})


# ---- training with each ----


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(tiny, tmp_path, name, monkeypatch):
    pairs = [{**row, "preference": 0.9} for row in PAIRS]
    second = tiny_checkpoint(tmp_path / "second", seed=1)
    samples = write_rows(
        tmp_path / "samples.jsonl",
        [{"id": row["id"], "prompt": "x", "response": "no"} for row in PAIRS],
    )
    if name in NO_REFERENCE:
        monkeypatch.setattr(dpo, "reference_logps", None)  # whoever computes one fails
    o = policy_options(name, lr=1e-4, epochs=4, batch=6)
    train_policy(tiny, pairs, tmp_path / "out", o, FP32, tiny, tmp_path / "cache", second, samples)
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert (
        lines[-1]["loss"] < lines[0]["loss"] or name == "discopop"
    )  # which has a hump behind margin 0
    assert distance(tmp_path / "out", tiny) > 1e-4
    models = len(list((tmp_path / "cache").glob("*")))
    assert models == (0 if name in NO_REFERENCE else 2 if name == "mrpo" else 1)
    [sizes] = (
        [
            {
                len(r["logp"]) if isinstance(r["logp"], list) else 0
                for f in (tmp_path / "cache").glob("*/*.jsonl")
                for r in read_rows(f)
            }
        ]
        if models
        else [{0}]
    )
    assert (sizes == {0}) == (
        name != "dpo-bmc"
    )  # lists of tokens only for the loss that reads them


def test_bmc_equals_a_plain_forward(tiny, tmp_path):
    """Step 0 from another start than the reference: token log-probs of both models, masks and weights, by transformers."""
    from transformers import AutoModelForCausalLM

    start, chat = tiny_checkpoint(tmp_path / "start", seed=1), Chat(tiny)
    row = {
        "id": "x",
        "prompt": "Say it.",
        "chosen": "one red fox",
        "rejected": "one blue fox jumps",
    }
    o = policy_options("dpo-bmc", beta=0.5, delta=2.0, lr=1e-6, batch=1)
    train_policy(start, [row], tmp_path / "out", o, FP32, tiny, tmp_path / "cache")
    ids = {side: chat.response_ids(row[side]) for side in ("chosen", "rejected")}
    marks, prompt, h = (
        dict(zip(ids, differences(chat, *ids.values()), strict=True)),
        chat.prompt_ids(row),
        0.0,
    )
    for side, sign in (("chosen", 1), ("rejected", -1)):
        ours, theirs = (
            [
                AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(
                    torch.tensor([prompt + ids[side]])
                )
                .logits[0, len(prompt) - 1 : -1]
                .log_softmax(-1)[range(len(ids[side])), ids[side]]
                .tolist()
            ]
            for model in (start, tiny)
        )
        h += sign * sum(
            (1 + mark * min(math.exp(-a), 2.0)) * (a - b)
            for a, b, mark in zip(ours[0], theirs[0], marks[side], strict=True)
        )
    [line] = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert line["preference_loss"] == pytest.approx(math.log1p(math.exp(-0.5 * h)), rel=1e-4)


def test_samples_are_joined_by_id(tiny, tmp_path):
    o = policy_options("xpo", alpha=1.0, lr=1e-6, batch=6)
    texts = {row["id"]: "yes " * i for i, row in enumerate(PAIRS, 1)}
    for name, rows in (("in_order", PAIRS), ("turned", PAIRS[::-1])):
        samples = write_rows(
            tmp_path / f"{name}.jsonl",
            [{"id": r["id"], "prompt": "x", "response": texts[r["id"]]} for r in rows],
        )
        train_policy(
            tiny, PAIRS, tmp_path / name, o, FP32, tiny, tmp_path / "cache", samples=samples
        )
    first, second = (
        read_rows(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("in_order", "turned")
    )
    assert first == second < LN2 - 1
    with pytest.raises(
        InputError, match=rf"4 pairs have no answer there \({PAIRS[2]['id']}\), 0 have further ones"
    ):
        short = write_rows(
            tmp_path / "short.jsonl",
            [{"id": r["id"], "prompt": "x", "response": "y"} for r in PAIRS[:2]],
        )
        train_policy(tiny, PAIRS, tmp_path / "no", o, FP32, tiny, tmp_path / "cache", samples=short)
    twice = write_rows(
        tmp_path / "twice.jsonl",
        [
            {"id": r["id"], "prompt": "x", "response": "y", "sample": i}
            for r in PAIRS
            for i in range(2)
        ],
    )
    with pytest.raises(
        InputError,
        match=rf"twice.jsonl: 0 pairs have no answer there \(none\), {len(PAIRS)} have further",
    ):
        train_policy(tiny, PAIRS, tmp_path / "no", o, FP32, tiny, tmp_path / "cache", samples=twice)


# ---- options ----


def parsed(*flags: str) -> Options:
    return parse_options(Options, ["--model", "m", "--pairs", "p", "--out", "o", *flags])


def test_options_are_the_parameters_of_the_chosen_loss(capsys):
    assert (parsed().beta, parsed().label_smoothing) == (0.1, 0.0)
    o = parsed("--loss", "simpo", "--gamma", "1")
    assert (o.beta, o.gamma, hasattr(o, "label_smoothing")) == (2.0, 1.0, False)
    for flags in (
        ["--loss=simpo", "--label-smoothing", "0.1"],
        ["--gamma", "1"],
        ["--loss", "orpo", "--beta", "1"],
    ):
        with pytest.raises(
            InputError, match=r"unrecognized arguments: --(label-smoothing|gamma|beta)"
        ):
            parsed(*flags)
    with pytest.raises(
        InputError, match=r"--loss nodpo: give FILE\.py:FUNCTION, or one of dpo, hinge"
    ):
        parsed("--loss", "nodpo")
    with pytest.raises(SystemExit):
        parsed("--loss", "asft", "--help")
    text = capsys.readouterr().out
    assert (
        "--weight" in text
        and "parameter of the loss asft (default: 1.0)" in text
        and "--gamma GAMMA" not in text
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*.json")), ids=lambda path: path.stem
)
def test_every_loss_can_replace_a_recipes_own(path):
    """A recipe gives no parameter that only its own loss has, so that another loss comes with its own published ones."""
    for name in LOSSES:
        o = parse_options(loop.Options, ["--config", str(path), "--policy.loss", name]).policy
        assert dpo.loss_parameters(o) == find_loss(name)[1]


def test_every_parameter_of_every_loss_reaches_it(monkeypatch):
    for name in LOSSES:
        wanted = {key: default * 3 + 0.01 for key, default in find_loss(name)[1].items()}
        o = parsed(
            "--loss", name, *(f"--{key.replace('_', '-')}={value}" for key, value in wanted.items())
        )
        assert dpo.loss_parameters(o) == pytest.approx(wanted)
        seen = {}
        monkeypatch.setattr(
            dpo,
            "find_loss",
            lambda _, wanted=wanted, seen=seen: (
                lambda p, **given: seen.update(given) or p.chosen,
                wanted,
            ),
        )
        preference_objective(o)(EXAMPLES, LOGPS)
        assert seen == pytest.approx(wanted)
        monkeypatch.undo()


def test_files_that_a_loss_does_not_read_are_refused(tiny, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    command = ["dpo.py", "--model", tiny, "--pairs", pairs, "--out", tmp_path / "out"]
    for flags, message in (
        (["--loss", "simpo", "--reference", tiny], "--reference: --loss simpo reads nothing of it"),
        (["--loss", "orpo", "--cache", tmp_path], "--cache: --loss orpo reads nothing of it"),
        (["--second-reference", tiny], "--second-reference: --loss dpo reads nothing of it"),
        (["--loss", "mrpo"], "--loss mrpo reads ref2_chosen; give dpo.py --second-reference DIR"),
        (["--loss", "selm"], "--loss selm reads sample; give dpo.py --samples FILE.jsonl"),
    ):
        code, _, err = run([*command, *flags])
        assert code == 2 and message in err
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


def test_own_loss_is_a_loss_like_any_other(tiny, tmp_path, mine):
    o = parsed("--loss", mine, "--push", "0.5")
    (tmp_path / "whole.py").write_text(MINE.replace("0.1", "1"))  # beta: float = 1
    assert parsed("--loss", f"{tmp_path / 'whole.py'}:my_loss", "--beta", "0.5").beta == 0.5
    assert (o.beta, o.push) == (0.1, 0.5) and reads(o) >= {"ref_chosen", "mean_rejected"}
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    command = [
        "dpo.py",
        "--model",
        tiny,
        "--pairs",
        pairs,
        "--dtype",
        "float32",
        "--lr",
        "1e-3",
        "--batch",
        "3",
    ]
    for name, flags in (
        ("plain", []),
        ("own", ["--loss", mine]),
        ("pushed", ["--loss", mine, "--push", "0.5"]),
    ):
        code, out, err = run([*command, "--out", tmp_path / name, *flags])
        assert code == 0 and last_json(out)["pairs"] == 6, err
    assert (
        distance(tmp_path / "plain", tmp_path / "own")
        < 1e-6
        < 1e-4
        < distance(tmp_path / "plain", tmp_path / "pushed")
    )
    (tmp_path / "mine.py").write_text(MINE + "# changed\n")  # the same command again
    code, _, err = run([*command, "--out", tmp_path / "own", "--loss", mine])
    assert code == 2 and f"made with input {mine}" in err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return p.margin.mean()",
            r"returned a tensor of shape \(\) for three pairs; return one loss a pair, shape \(3,\)",
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
        ("return p.choosen", "calling it on three pairs failed: AttributeError: .*choosen"),
        ("return undefined", "calling it on three pairs failed: NameError"),
    ],
)
def test_own_loss_that_is_none_is_told_why(tmp_path, body, message):
    (tmp_path / "bad.py").write_text(f"def bad(p, *, beta=0.1):\n    {body}\n")
    with pytest.raises(InputError, match=f"--loss .*bad.py:bad: {message}"):
        reads(parsed("--loss", f"{tmp_path / 'bad.py'}:bad"))


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("p, *, beta", "parameter beta needs a number as its default"),
        ("p, *, lr=1.0", "its parameter lr is the name of an option"),
    ],
)
def test_own_loss_with_parameters_that_cannot_be(tmp_path, signature, message):
    (tmp_path / "bad.py").write_text(f"def bad({signature}):\n    return p.chosen\n")
    with pytest.raises(InputError, match=message):
        parsed("--loss", f"{tmp_path / 'bad.py'}:bad")


def test_values_outside_of_a_losss_range_are_refused():
    for flags in (
        ("--loss=robust", "--label-smoothing=0.5"),
        ("--loss=exo", "--label-smoothing=0"),
        ("--beta=0",),
    ):
        with pytest.raises(InputError, match=r"not finite|no gradient"):
            reads(parsed(*flags))
