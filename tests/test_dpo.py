"""Preferences: the losses as numbers, the metrics, the reference cache, training with it."""

import json
import math

import pytest
import torch
from conftest import last_json, read_rows, run, tiny_checkpoint, tokenizer_json, write_rows
from safetensors.torch import load_file

import dpo
import train as train_file
from data import Chat, Common, InputError
from dpo import key, policy_options, preference_objective, reference_logps, train_policy
from train import Example, TrainOptions, make_sequence, score_sequences

FP32 = Common(dtype="float32")
LN2 = math.log(2)
PAIRS = [
    {
        "id": f"p{i}",
        "prompt": f"Count to {i}.",
        "chosen": " ".join(map(str, range(i + 1))),
        "rejected": "no " * (9 - i) + "never",
    }
    for i in range(6)
]


def options(**changes):
    return policy_options(**{"lr": 1e-3, "epochs": 2, "batch": 4, **changes})


def train(
    model, out, reference=None, cache=None, pairs=PAIRS, common=FP32, **changes
) -> list[dict]:
    """Train and return the lines of metrics."""
    train_policy(
        model,
        pairs,
        out,
        options(**changes),
        common,
        reference or model,
        cache or out.parent / "cache",
    )
    return read_rows(out / "metrics.jsonl")


def test_a_reference_of_other_tokens_is_refused(tiny, tmp_path):
    vocabulary = json.loads(tokenizer_json())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    other = tiny_checkpoint(tmp_path / "other", tokenizer=json.dumps(vocabulary))
    with pytest.raises(InputError, match=f"other: its tokenizer is not that of {tiny}"):
        train(tiny, tmp_path / "out", reference=other)


def sequences_of(model, pairs=PAIRS) -> list:
    chat = Chat(model)
    return [
        make_sequence(chat, row, row[side], TrainOptions())
        for row in pairs
        for side in ("chosen", "rejected")
    ]


def distance(a, b) -> float:
    a, b = (load_file(d / "model.safetensors") for d in (a, b))
    return max((a[name] - b[name]).abs().max().item() for name in a | b)


# ---- the objective ----

LOGPS = [
    [torch.tensor([-1.0, -2, -3]), torch.tensor([-2.0, -2])],
    [torch.tensor([-1.0]), torch.tensor([-4.0, -4])],
]
EXAMPLES = [
    Example("a", [], {"reference": (-5.0, -6.0)}),
    Example("b", [], {"reference": (-3.0, -7.0)}),
]


def test_dpo_metrics_by_hand():
    total, metrics = preference_objective(policy_options(loss="dpo", beta=0.1))(EXAMPLES, LOGPS)
    # h = (-6 + 4) - (-5 + 6) = -3 and (-1 + 8) - (-3 + 7) = 3
    expected = math.log(1 + math.exp(0.3)) + math.log(1 + math.exp(-0.3))
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert metrics == pytest.approx(
        {
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
        },
        abs=1e-6,
    )


def test_simpo_metrics_are_means_without_a_reference():
    bare = [Example("a", []), Example("b", [])]
    total, metrics = preference_objective(policy_options(loss="simpo", beta=2, gamma=1.6))(
        bare, LOGPS
    )
    # mean log-probs -2, -2 and -1, -4
    expected = math.log(1 + math.exp(1.6)) + math.log(1 + math.exp(-(2 * 3 - 1.6)))
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert metrics == pytest.approx(
        {
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
        },
        abs=1e-6,
    )


def test_nll_of_the_chosen_answer_is_added():
    without, plain = preference_objective(policy_options())(EXAMPLES, LOGPS)
    total, metrics = preference_objective(policy_options(nll=0.5))(EXAMPLES, LOGPS)
    assert (total - without).item() == pytest.approx(0.5 * (2 + 1), rel=1e-6)
    assert metrics == plain  # preference_loss is without it


# ---- the reference cache ----


def alone(sequences) -> list[list]:
    """Each sequence a group of its own."""
    return [[s] for s in sequences]


def test_reference_equals_a_forward_pass_and_is_computed_once(tiny, tmp_path, monkeypatch, capsys):
    sequences = sequences_of(tiny)
    first = reference_logps(tiny, [*alone(sequences[:6]), sequences[4:]], tmp_path, FP32, block=5)
    assert (
        first.keys() == {key(s) for s in sequences}
        and "0 cached  12 computed" in capsys.readouterr().out
    )
    tokens = reference_logps(tiny, [sequences], tmp_path, FP32, per_token=True)
    assert {name: sum(tokens[name]) for name in first} == pytest.approx(first) and len(
        tokens[key(sequences[0])]
    ) > 1
    model = dpo.load(tiny, torch.float32)
    for s in sequences:
        assert first[key(s)] == pytest.approx(score_sequences(model, [s])[0].sum().item(), rel=1e-5)
    monkeypatch.setattr(dpo, "load", None)  # whoever reads weights fails now
    assert reference_logps(tiny, [sequences[::-1]], tmp_path, FP32) == first
    assert "12 cached  0 computed" in capsys.readouterr().out
    with pytest.raises(TypeError):
        reference_logps(
            tiny, [[(sequences[0][0], 1)]], tmp_path, FP32
        )  # the same tokens, scored from elsewhere


def test_reference_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    sequences, score, scored = sequences_of(tiny), dpo.response_logps, []
    first = reference_logps(tiny, alone(sequences), tmp_path, FP32, block=5)
    files = sorted(tmp_path.glob("*/*.jsonl"))
    assert sorted(len(read_rows(file)) for file in files) == [2, 5, 5]
    lost = len(read_rows(files[1]))
    files[1].unlink()
    monkeypatch.setattr(
        dpo, "response_logps", lambda net, some: scored.extend(some) or score(net, some)
    )
    assert reference_logps(tiny, alone(sequences), tmp_path, FP32, block=5) == pytest.approx(
        first, rel=1e-6
    )
    assert len(scored) == lost


def test_reference_of_another_model_or_dtype_is_kept_apart(tiny, tmp_path):
    sequences, other = sequences_of(tiny)[:2], tiny_checkpoint(tmp_path / "other", seed=1)
    values = [
        reference_logps(model, alone(sequences), tmp_path / "cache", Common(dtype=dtype))
        for model, dtype in ((tiny, "float32"), (other, "float32"), (tiny, "bfloat16"))
    ]
    assert (
        len({tuple(v.values()) for v in values}) == 3
        and len(list((tmp_path / "cache").iterdir())) == 3
    )
    copy = tiny_checkpoint(tmp_path / "copy")  # the same content elsewhere is the same model
    assert reference_logps(copy, alone(sequences), tmp_path / "cache", FP32) == values[0]
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_reference_that_is_not_finite_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        dpo, "response_logps", lambda net, some: [torch.tensor([math.nan]) for _ in some]
    )
    with pytest.raises(
        InputError, match="12 of 12 reference log-probs are missing or not finite; delete"
    ):
        reference_logps(tiny, alone(sequences_of(tiny)), tmp_path, FP32)
    monkeypatch.setattr(dpo, "write_jsonl", lambda path, rows: None)  # a disk that forgets
    with pytest.raises(InputError, match="12 of 12"):
        reference_logps(tiny, alone(sequences_of(tiny)), tmp_path / "empty", FP32)


def test_reference_is_scored_in_the_batches_of_training(tiny, tmp_path, monkeypatch):
    """So that bf16 rounds alike: one group for each forward pass of the first epoch."""
    forwards = {"reference": [], "policy": []}
    for module, name in ((dpo, "reference"), (train_file, "policy")):
        score = module.response_logps
        monkeypatch.setattr(
            module,
            "response_logps",
            lambda net, some, score=score, name=name: (
                forwards[name].append(sorted(key(s) for s in some)) or score(net, some)
            ),
        )
    train(tiny, tmp_path / "out", common=Common(dtype="bfloat16"), micro_tokens=120, epochs=1)
    assert (
        len(forwards["reference"]) > 2
        and forwards["reference"] == forwards["policy"][: len(forwards["reference"])]
    )


# ---- training ----


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_first_step_is_ln_2(tiny, tmp_path, dtype, tolerance):
    line = train(tiny, tmp_path / "out", common=Common(dtype=dtype), epochs=1, batch=6)[0]
    assert line["preference_loss"] == pytest.approx(LN2, abs=tolerance)
    assert line["rewards/margins"] == pytest.approx(0, abs=2 * tolerance)


def test_first_step_from_another_start_is_not_checked(tiny, tmp_path):
    start = tiny_checkpoint(tmp_path / "start", seed=1)
    assert (
        abs(
            train(start, tmp_path / "out", reference=tiny, epochs=1, batch=6)[0]["preference_loss"]
            - LN2
        )
        > 0.01
    )


@pytest.mark.parametrize(
    "how",
    [lambda i, logps: logps[i] + i, lambda i, logps: logps[i - 2]],
    ids=["shifted", "permuted"],
)
def test_cache_that_does_not_fit_stops_the_run(tiny, tmp_path, how):
    reference_logps(tiny, alone(sequences_of(tiny)), tmp_path / "cache", FP32)
    [file] = (tmp_path / "cache").glob("*/*.jsonl")
    rows = read_rows(file)
    write_rows(
        file, [{**row, "logp": how(i, [r["logp"] for r in rows])} for i, row in enumerate(rows)]
    )
    with pytest.raises(
        InputError, match=f"nats a token apart .*ln 2.*delete the cache {tmp_path / 'cache'}"
    ):
        train(tiny, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "changes", [{}, {"loss": "simpo", "beta": 2.0, "gamma": 1.6}], ids=["dpo", "simpo"]
)
def test_training_widens_the_margin(tiny, tmp_path, changes):
    lines = train(tiny, tmp_path / "out", epochs=8, **changes)
    first, last = lines[0], lines[-1]
    assert (
        last["rewards/margins"] > first["rewards/margins"] + 1 and last["rewards/accuracies"] == 1
    )
    assert last["loss"] < first["loss"]
    assert last["tokens/chosen"] > 1 and last["lr"] < first["lr"]


def test_simpo_needs_no_reference(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "reference_logps", None)
    train(tiny, tmp_path / "out", cache=tmp_path / "cache", loss="simpo", beta=2.0)
    assert not (tmp_path / "cache").exists()


def test_pairs_that_do_not_fit_are_counted(tiny, tmp_path):
    long = [{"id": "long", "prompt": "x" * 99, "chosen": "a", "rejected": "b"}]
    counts = train_policy(
        tiny, PAIRS + long, tmp_path / "out", options(max_length=90), FP32, tiny, tmp_path / "cache"
    )
    assert (counts["pairs"], counts["too_long"], counts["examples"]) == (7, 1, 6)
    with pytest.raises(InputError, match="no pair fits --max-length 90"):
        train_policy(
            tiny, long, tmp_path / "none", options(max_length=90), FP32, tiny, tmp_path / "cache"
        )


def test_two_processes_equal_one(tiny, tmp_path):
    """The command, end to end; with one reference block a process, several micro-batches and a last batch of 2 pairs."""
    lines = train(tiny, tmp_path / "one", cache=tmp_path / "cache1", nll=0.1)
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    code, stdout, stderr = run(
        [
            "dpo.py",
            "--model",
            tiny,
            "--pairs",
            pairs,
            "--out",
            tmp_path / "two",
            "--dtype",
            "float32",
            "--lr",
            1e-3,
            "--epochs",
            2,
            "--batch",
            4,
            "--micro-tokens",
            80,
            "--nll",
            0.1,
        ],
        nproc=2,
    )
    assert code == 0, stderr
    result = last_json(stdout)
    assert (result["pairs"], result["too_long"], result["examples"], result["steps"]) == (
        6,
        0,
        6,
        3,
    )
    assert "step 0: loss 0.693147 (ln 2 = 0.693147), margin" in stdout
    assert (
        distance(tmp_path / "one", tmp_path / "two")
        < 1e-5
        < 1e-3
        < distance(tmp_path / "one", tiny)
    )
    timing = ("seconds", "tokens_per_second", "share_of_peak", "memory_gb")
    for a, b in zip(lines, read_rows(tmp_path / "two" / "metrics.jsonl"), strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == pytest.approx(
            {k: v for k, v in b.items() if k not in timing}, rel=1e-3, abs=1e-5
        )
    [one], [two] = (
        [{row["id"]: row["logp"] for row in read_rows(file)} for file in folder.glob("*/*.jsonl")]
        for folder in (tmp_path / "cache1", tmp_path / "two" / "reference")
    )
    assert one == pytest.approx(two, rel=1e-5) and len(one) == 12
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert manifest["processes"] == 2 and set(manifest["inputs"]) == {"model", "reference", "pairs"}
