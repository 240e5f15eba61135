"""Preferences: the loss as numbers, the metrics, the cache of reference log-probs, training with
it.
"""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    flip_a_bit,
    last_json,
    read_rows,
    run,
    tiny_checkpoint,
    tokenizer_json,
    write_rows,
)
from safetensors.torch import load_file

import dpo
from checkpoint import load
from dpo import PolicyOptions, key, policy_loss, preference_loss, reference_logps, train_policy
from formats.chat import Chat
from plumbing.files import InputError
from plumbing.options import RunOptions
from plumbing.parts import read_part, write_part
from plumbing.stage import counts_of
from train import (
    Example,
    TrainOptions,
    fit,
    make_sequence,
    mean_losses,
    response_logps,
    score_sequences,
    sft_loss,
    shard,
)

FP32 = RunOptions(dtype="float32")
BF16 = RunOptions(dtype="bfloat16")
LN2 = math.log(2)


def make_pair(i: int) -> dict:
    chosen = " ".join(map(str, range(i + 1)))
    rejected = "no " * (9 - i) + "never"
    return {"id": f"p{i}", "prompt": f"Count to {i}.", "chosen": chosen, "rejected": rejected}


PAIRS = [make_pair(i) for i in range(6)]


def options(loss: str = "dpo", loss_parameters: dict | None = None, **changes) -> PolicyOptions:
    parameters = loss_parameters or {"beta": 0.1}
    settings = {"run": FP32, "lr": 1e-3, "epochs": 2, "batch": 4, **changes}
    return PolicyOptions(loss=loss, loss_parameters=parameters, **settings)


def train(
    model,
    out,
    reference=None,
    cache=None,
    pairs=PAIRS,
    **changes,
) -> list[dict]:
    """Train and return the lines of metrics."""
    file = write_rows(out.with_name(f"pairs of {out.name}.jsonl"), pairs)
    cache = cache or out.parent / "cache"
    train_policy(model, [file], out, options(**changes), reference, cache)
    return read_rows(out / "metrics.jsonl")


def test_a_reference_of_other_tokens_is_refused(tiny, tmp_path):
    vocabulary = json.loads(tokenizer_json())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    other = tiny_checkpoint(tmp_path / "other", tokenizer=json.dumps(vocabulary))
    with pytest.raises(InputError, match=f"other: its tokenizer differs from that of {tiny}"):
        train(tiny, tmp_path / "out", reference=other)


def sequences_of(model, pairs=PAIRS) -> list:
    chat = Chat(model)
    sides = [(row, row[side]) for row in pairs for side in ("chosen", "rejected")]
    return [make_sequence(chat, row, text, TrainOptions()) for row, text in sides]


def distance(a, b) -> float:
    first = load_file(a / "model.safetensors")
    second = load_file(b / "model.safetensors")
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max() for name in first)


# -------------------------------------------------------------------------------- the loss function

LOGPS = [
    [
        torch.tensor([-1.0, -2, -3]),
        torch.tensor([-2.0, -2]),
    ],
    [
        torch.tensor([-1.0]),
        torch.tensor([-4.0, -4]),
    ],
]
EXAMPLES = [
    Example("a", [], extra={"reference": (-5.0, -6.0)}),
    Example("b", [], extra={"reference": (-3.0, -7.0)}),
]


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def evaluate(o: PolicyOptions, examples=EXAMPLES):
    """(sum of losses, sums of metrics) of the two examples."""
    return preference_loss(policy_loss(o), o)(examples, LOGPS)


def test_dpo_metrics_by_hand():
    total, metrics = evaluate(options())
    # h = (-6 + 4) - (-5 + 6) = -3 and (-1 + 8) - (-3 + 7) = 3
    expected = softplus(0.3) + softplus(-0.3)
    assert total.item() == pytest.approx(expected, rel=1e-6)
    by_hand = {
        "preference_loss": expected,
        "rewards/chosen": 0.1 * (-1 + 2),
        "rewards/rejected": 0.1 * (2 - 1),
        "rewards/accuracies": 1,
        "rewards/margins": 0.0,
        "logps/chosen": -7,
        "logps/rejected": -12,
        "nll/chosen": 2 + 1,
        "tokens/chosen": 3 + 1,
        "tokens/rejected": 2 + 2,
        "drift": 3 / 5 + 3 / 3,
    }
    assert metrics == pytest.approx(by_hand, abs=1e-6)


def test_simpo_metrics_are_means_without_a_reference():
    bare = [Example("a", []), Example("b", [])]
    total, metrics = evaluate(options("simpo", {"beta": 2, "gamma": 1.6}), bare)
    # mean log-probs -2, -2 and -1, -4
    expected = softplus(1.6) + softplus(1.6 - 2 * 3)
    assert total.item() == pytest.approx(expected, rel=1e-6)
    by_hand = {
        "preference_loss": expected,
        "rewards/chosen": 2 * -3,
        "rewards/rejected": 2 * -6,
        "rewards/accuracies": 1,
        "rewards/margins": 6,
        "logps/chosen": -7,
        "logps/rejected": -12,
        "nll/chosen": 3,
        "tokens/chosen": 4,
        "tokens/rejected": 4,
    }
    assert metrics == pytest.approx(by_hand, abs=1e-6)


def test_nll_of_the_chosen_response_is_added():
    without, plain = evaluate(options())
    total, metrics = evaluate(options(nll=0.5))
    assert (total - without).item() == pytest.approx(0.5 * (2 + 1), rel=1e-6)
    assert metrics == plain  # preference_loss is without it


# ------------------------------------------------------------------------------ the reference cache


def alone(sequences) -> list[list]:
    """Each sequence a group of its own."""
    return [[s] for s in sequences]


@pytest.mark.slow
def test_reference_equals_a_forward_pass_and_is_computed_once(tiny, tmp_path, monkeypatch, capsys):
    sequences = sequences_of(tiny)
    o = options()
    groups = [*alone(sequences[:6]), sequences[4:]]
    first = reference_logps(tiny, groups, tmp_path, o, block=5)
    assert first.keys() == {key(s) for s in sequences}
    assert "0 cached  12 computed" in capsys.readouterr().out

    # sums of the tokens' own, and of a plain forward pass
    tokens = reference_logps(tiny, [sequences], tmp_path, o, per_token=True)
    sums = {name: sum(tokens[name]) for name in first}
    assert sums == pytest.approx(first, rel=1e-4)
    assert len(tokens[key(sequences[0])]) > 1
    model = dpo.load(tiny, torch.float32)
    for s in sequences:
        plain = score_sequences(model, [s])[0].sum().item()
        assert first[key(s)] == pytest.approx(plain, rel=1e-4)

    # all are cached now: reading the weights fails
    capsys.readouterr()
    monkeypatch.setattr(dpo, "load", None)
    assert reference_logps(tiny, [sequences[::-1]], tmp_path, o) == first
    assert "12 cached  0 computed" in capsys.readouterr().out
    elsewhere = (sequences[0][0], 1)  # the same tokens, scored from another place on
    with pytest.raises(TypeError):
        reference_logps(tiny, [[elsewhere]], tmp_path, o)


@pytest.mark.slow
@pytest.mark.parametrize("lose", [Path.unlink, flip_a_bit])
def test_reference_resumes_where_it_stopped(tiny, tmp_path, monkeypatch, lose):
    sequences = sequences_of(tiny)
    first = reference_logps(tiny, alone(sequences), tmp_path, options(), block=5)
    files = sorted(tmp_path.glob("*/*.part"))
    assert sorted(len(read_part(file)) for file in files) == [2, 5, 5]
    lost = len(read_part(files[1]))
    lose(files[1])
    score = dpo.response_logps
    scored = []

    def watched(net, some):
        scored.extend(some)
        return score(net, some)

    monkeypatch.setattr(dpo, "response_logps", watched)
    again = reference_logps(tiny, alone(sequences), tmp_path, options(), block=5)
    assert again == pytest.approx(first, rel=1e-6)
    assert len(scored) == lost


@pytest.mark.slow
def test_reference_of_another_model_or_dtype_is_kept_apart(tiny, tmp_path):
    groups = alone(sequences_of(tiny)[:2])
    cache = tmp_path / "cache"
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    values = []
    for model, run_options in (
        (tiny, FP32),
        (other, FP32),
        (tiny, BF16),
    ):
        o = options(run=run_options)
        values.append(reference_logps(model, groups, cache, o))
    assert len({tuple(v.values()) for v in values}) == 3
    assert len(list(cache.iterdir())) == 3
    copy = tiny_checkpoint(tmp_path / "copy")  # the same content elsewhere is the same model
    assert reference_logps(copy, groups, cache, options()) == values[0]
    assert len(list(cache.iterdir())) == 3


@pytest.mark.slow
def test_reference_that_is_not_finite_is_refused(tiny, tmp_path, monkeypatch):
    groups = alone(sequences_of(tiny))
    nan = torch.tensor([math.nan])
    monkeypatch.setattr(dpo, "response_logps", lambda net, some: [nan for _ in some])
    problem = "12 of 12 reference log-probs are missing or not finite; delete the folder"
    with pytest.raises(InputError, match=problem):
        reference_logps(tiny, groups, tmp_path, options())
    monkeypatch.setattr(dpo, "write_part", lambda path, scores: None)  # a disk that forgets
    with pytest.raises(InputError, match=problem):
        reference_logps(tiny, groups, tmp_path / "empty", options())


@pytest.mark.slow
def test_reference_is_scored_in_the_batches_of_training(tiny, tmp_path, monkeypatch):
    """So that bf16 rounds alike: one group for each forward pass of the first epoch."""
    forwards = {"reference": [], "policy": []}

    def watched(score, name):
        def forward(net, some):
            forwards[name].append(sorted(key(s) for s in some))
            return score(net, some)

        return forward

    monkeypatch.setattr(dpo, "response_logps", watched(response_logps, "reference"))
    fit_watched = partial(fit, forward=watched(response_logps, "policy"))
    monkeypatch.setattr(dpo, "fit", fit_watched)
    train(tiny, tmp_path / "out", run=BF16, micro_batch_tokens=120, epochs=1)
    count = len(forwards["reference"])
    assert count > 2
    assert forwards["reference"] == forwards["policy"][:count]


# ---------------------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize(("run_options", "tolerance"), [(FP32, 1e-4), (BF16, 2e-2)])
def test_first_step_is_ln_2(tiny, tmp_path, run_options, tolerance):
    line = train(tiny, tmp_path / "out", run=run_options, epochs=1, batch=6)[0]
    assert line["preference_loss"] == pytest.approx(LN2, abs=tolerance)
    assert line["rewards/margins"] == pytest.approx(0, abs=2 * tolerance)


@pytest.mark.slow
def test_first_step_from_another_start_is_not_checked(tiny, tmp_path):
    start = tiny_checkpoint(tmp_path / "start", seed=1)
    line = train(start, tmp_path / "out", reference=tiny, epochs=1, batch=6)[0]
    assert abs(line["preference_loss"] - LN2) > 0.01


@pytest.mark.parametrize(
    "how",
    [
        lambda i, logps: logps[i] + i,
        lambda i, logps: logps[i - 2],
    ],
    ids=["shifted", "permuted"],
)
def test_cache_that_does_not_fit_stops_the_run(tiny, tmp_path, how):
    cache = tmp_path / "cache"
    reference_logps(tiny, alone(sequences_of(tiny)), cache, options())
    [file] = cache.glob("*/*.part")
    scores = read_part(file)
    logps = list(scores.values())
    write_part(file, {name: how(i, logps) for i, name in enumerate(scores)})
    with pytest.raises(InputError, match=f"nats a token apart .*ln 2.*delete the cache {cache}"):
        train(tiny, tmp_path / "out", cache=cache)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "parameters"),
    [
        ("dpo", {"beta": 0.1}),
        ("simpo", {"beta": 2.0, "gamma": 1.6}),
    ],
)
def test_training_widens_the_margin(tiny, tmp_path, loss, parameters):
    lines = train(tiny, tmp_path / "out", epochs=8, loss=loss, loss_parameters=parameters)
    first = lines[0]
    last = lines[-1]
    assert last["rewards/margins"] > first["rewards/margins"] + 1
    assert last["rewards/accuracies"] == 1
    assert last["loss"] < first["loss"]
    assert last["tokens/chosen"] > 1
    assert last["lr"] < first["lr"]


def test_simpo_needs_no_reference(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "reference_logps", None)
    train(tiny, tmp_path / "out", loss="simpo", loss_parameters={"beta": 2.0, "gamma": 0.0})
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_pairs_that_do_not_fit_are_counted(tiny, tmp_path):
    long = [{"id": "long", "prompt": "x" * 99, "chosen": "a", "rejected": "b"}]
    train(tiny, tmp_path / "out", pairs=PAIRS + long, max_length=90)
    counts = counts_of(tmp_path / "out")
    assert (counts["pairs"], counts["too_long"], counts["examples"]) == (7, 1, 6)
    with pytest.raises(InputError, match="no pair fits --max-length 90; raise it"):
        train(tiny, tmp_path / "none", pairs=long, max_length=90)


def test_pairs_that_the_cut_made_equal_are_left_out(tiny, tmp_path, capsys):
    cut = {"id": "cut", "prompt": "x", "chosen": "a" * 199 + "b", "rejected": "a" * 199 + "c"}
    same = {"id": "same", "prompt": "x", "chosen": "a", "rejected": "a"}
    train(tiny, tmp_path / "out", pairs=[*PAIRS, cut, same], max_length=90)
    counts = counts_of(tmp_path / "out")
    assert (counts["pairs"], counts["too_long"], counts["examples"]) == (8, 1, 7)
    assert counts["truncated"] == 0
    longer = {"id": "longer", "prompt": "x", "chosen": "a" * 199, "rejected": "b"}
    train(tiny, tmp_path / "longer", pairs=[*PAIRS, longer], max_length=90)
    counts = counts_of(tmp_path / "longer")
    assert (counts["too_long"], counts["truncated"]) == (0, 1)
    assert "--max-length" not in capsys.readouterr().out


HELDOUT = [make_pair(i) for i in (6, 7, 8)]


def test_heldout_pairs_are_measured_along_the_way(tiny, tmp_path):
    """As a plain forward of the final weights measures them; training does not notice."""
    heldout = write_rows(tmp_path / "heldout.jsonl", HELDOUT)
    train(tiny, tmp_path / "plain")
    more = {"heldout_pairs": heldout, "heldout_every": 99, "micro_batch_tokens": 80}
    lines = train(tiny, tmp_path / "out", **more)
    assert distance(tmp_path / "plain", tmp_path / "out") < 1e-6
    assert [line["step"] for line in lines if "heldout/loss" in line] == [3]

    def margins(model) -> torch.Tensor:
        net = load(model, torch.float32)
        sums = torch.stack(
            [one.sum() for one in score_sequences(net, sequences_of(model, HELDOUT))]
        )
        return sums[0::2] - sums[1::2]

    rewards = 0.1 * (margins(tmp_path / "out") - margins(tiny))
    loss = torch.nn.functional.softplus(-rewards).mean()
    assert lines[2]["heldout/loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert lines[2]["heldout/rewards/margins"] == pytest.approx(rewards.mean().item(), abs=1e-4)
    accuracy = (rewards > 0).float().mean().item()
    assert lines[2]["heldout/rewards/accuracies"] == pytest.approx(accuracy)


def test_measuring_without_training_leaves_the_fp32_shards_in_place(tiny):
    """FSDP2 keeps its bf16 copy after a forward pass without a backward one."""
    o = TrainOptions(run=RunOptions(dtype="bfloat16"))
    model = shard(tiny, o)
    before = {name: (type(p), p.dtype) for name, p in model.named_parameters()}
    batch = [Example("a", [([1, 2, 3, 4], 2)], weight=2)]
    with torch.no_grad():
        metrics = mean_losses(model, batch, sft_loss, o, backward=False)
    assert math.isfinite(metrics["loss"])
    assert {name: (type(p), p.dtype) for name, p in model.named_parameters()} == before


@pytest.mark.slow
@pytest.mark.ranks
def test_two_processes_measure_heldout_pairs_as_one_does(tiny, tmp_path):
    """One pair, so that a process has none."""
    heldout = write_rows(tmp_path / "heldout.jsonl", HELDOUT[:1])
    lines = train(tiny, tmp_path / "one", heldout_pairs=heldout, heldout_every=2)
    files = ["--model", tiny, "--pairs", tmp_path / "pairs of one.jsonl", "--out", tmp_path / "two"]
    more = "--dtype float32 --lr 1e-3 --epochs 2 --batch 4 --heldout-every 2"
    code, _, stderr = run(["dpo.py", *files, *more.split(), "--heldout-pairs", heldout], nproc=2)
    assert code == 0, stderr
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-4
    for line, other in zip(lines, read_rows(tmp_path / "two" / "metrics.jsonl"), strict=True):
        assert line.keys() == other.keys()
        for name in line:
            if name.startswith("heldout/"):
                assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    assert ["heldout/loss" in line for line in lines] == [False, True, True]  # 2, and the last


@pytest.mark.slow
@pytest.mark.ranks
def test_two_processes_equal_one(tiny, tmp_path):
    """The command, end to end; with one reference block a process, several micro-batches and a last
    batch of 2 pairs.
    """
    one = tmp_path / "one"
    two = tmp_path / "separate" / "two"
    lines = train(tiny, one, nll=0.1)
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    files = ["--model", tiny, "--pairs", pairs, "--out", two]
    more = "--dtype float32 --lr 1e-3 --epochs 2 --batch 4 --micro-batch-tokens 80 --nll 0.1"
    code, stdout, stderr = run(["dpo.py", *files, *more.split()], nproc=2)
    assert code == 0, stderr
    result = last_json(stdout)
    assert (result["pairs"], result["too_long"]) == (6, 0)
    assert (result["examples"], result["steps"]) == (6, 3)

    # the first step was checked and printed
    printed = re.search(r"step 0: loss (\S+) \(ln 2 = 0\.693147\), margin ([+-]\S+)\n", stdout)
    assert float(printed[1]) == pytest.approx(LN2, abs=1e-4)
    assert float(printed[2]) == pytest.approx(0, abs=1e-4)

    # weights, metrics and reference log-probs are those of one process
    assert distance(one, two) < 1e-4  # a tenth of a step
    assert distance(one, tiny) > 1e-3
    timing = ("seconds", "tokens_per_second", "memory_gb")
    for line, other in zip(lines, read_rows(two / "metrics.jsonl"), strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - timing:
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    caches = []
    for folder in (tmp_path / "cache", two.with_name(f"{two.name}.reference")):
        caches.append({})
        for file in folder.glob("*/*.part"):
            caches[-1] |= read_part(file)
    assert len(caches[0]) == 12
    assert caches[0] == pytest.approx(caches[1], rel=1e-4)
    manifest = json.loads((two / "manifest.json").read_text())
    assert manifest["processes"] == 2
    assert set(manifest["inputs"]) == {"model", "reference", "pairs"}
