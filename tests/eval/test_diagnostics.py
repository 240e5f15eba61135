"""Diagnostics of a run: rows by hand from hand-made files, and warnings of runs made sick."""

import json
from pathlib import Path

import pytest
from conftest import read_rows, write_rows
from cycle import go

from eval.diagnostics import diagnose, difference, log_prob_changes, warnings

pytest_plugins = ["cycle"]

COLUMNS = [
    "t",
    "gap",
    "gap se",
    "gain",
    "gain se",
    "uptake",
    "chosen",
    "rejected",
    "best",
    "change",
    "distinct",
    "words",
]


def write(path: Path, **result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))


def step(chosen: tuple[float, float], rejected: tuple[float, float]) -> dict:
    """A line of metrics from (log-prob, tokens) of both sides."""
    return {
        "logps/chosen": chosen[0],
        "tokens/chosen": chosen[1],
        "logps/rejected": rejected[0],
        "tokens/rejected": rejected[1],
    }


# ------------------------------------------------------------------------------------------ rows


@pytest.fixture
def made(tmp_path) -> Path:
    """A run of two iterations by hand."""
    scores = {0: [0.2, 0.6], 1: [0.4, 0.6], 2: [0.3, 0.5]}
    for t, some in scores.items():
        mean = sum(some) / 2
        write(tmp_path / f"iter{t}/eval.json", score=mean, words=7.0 + t, scores=some)
    write(tmp_path / "iter1/eval_rewrites.json", score=0.6, scores=[0.5, 0.7])
    write(tmp_path / "iter2/eval_rewrites.json", score=0.45, scores=[0.5, 0.4])
    for t, best in enumerate((0.7, 0.8, 0.5)):
        path = tmp_path / f"iter{t}/eval_samples.json"
        write(path, score=0.1, best=best, distinct=0.9 - t / 10, scores=[0.1, 0.1])
    # iteration 1: 20 steps, of which the last two count; iteration 2: 3 steps
    odd = [step((99.0, 1), (99.0, 1))] * 17
    lines = [step((-20.0, 10), (-30.0, 10)), *odd]
    lines += [step((-15.0, 10), (-40.0, 10)), step((-6.0, 6), (-60.0, 12))]
    write_rows(tmp_path / "iter1/policy/metrics.jsonl", lines)
    lines = [step((-4.0, 4), (-5.0, 5)), odd[0], step((-6.0, 4), (-10.0, 8))]
    write_rows(tmp_path / "iter2/policy/metrics.jsonl", lines)
    return tmp_path


def test_rows_by_hand(made):
    one, two = diagnose(made, 2)
    assert list(one) == list(two) == COLUMNS
    # differences 0.3 and 0.1, then 0.2 and 0
    # log-probs: -2 per token, then -1.5 and -1; -3 per token, then -4 and -5
    wanted = {
        "t": 1,
        "gap": 0.2,
        "gap se": 0.1,
        "gain": 0.1,
        "gain se": 0.1,
        "uptake": 0.5,
        "chosen": 0.75,
        "rejected": -1.5,
        "best": 0.8,
        "change": 0.1,
        "distinct": 0.8,
        "words": 8.0,
    }
    assert one == pytest.approx(wanted)
    # differences 0.1 and -0.2, then -0.1 twice; no gap, so no uptake
    assert two.pop("uptake") == "-"
    wanted = {
        "t": 2,
        "gap": -0.05,
        "gap se": 0.15,
        "gain": -0.1,
        "gain se": 0.0,
        "chosen": -0.5,
        "rejected": -0.25,
        "best": 0.5,
        "change": -0.3,
        "distinct": 0.7,
        "words": 9.0,
    }
    assert two == pytest.approx(wanted)


def test_every_warning_is_of_its_row(made):
    first, *rest = warnings(diagnose(made, 2))
    assert first == (
        "warning, iteration 2: the improver no longer improves (gap -0.050): stop, or give it new "
        "information"
    )
    assert rest == [
        "warning, iteration 2: log-probs of chosen responses fell (-0.500 per token): raise "
        "--policy.nll, or lower --policy.lr",
        "warning, iteration 2: the best of several responses fell (by 0.300 to 0.500): the policy "
        "narrows; lower --policy.lr or --policy.epochs",
    ]
    assert warnings(diagnose(made, 1)) == []


def test_a_first_iteration_that_narrows_is_warned_of(made):
    write(made / "iter0/eval_samples.json", best=0.85)
    [text] = warnings(diagnose(made, 1))
    assert "iteration 1: the best of several responses fell (by 0.050 to 0.800)" in text


def test_no_change_is_a_gap_of_nothing_and_no_fall():
    row = dict.fromkeys(COLUMNS, "-")
    assert warnings([row]) == []
    assert warnings([{**row, "t": 1, "chosen": 0.0, "best": 0.5, "change": 0.0}]) == []
    [text] = warnings([{**row, "t": 1, "gap": 0.0}])
    assert "the improver no longer improves (gap +0.000)" in text


MISSING = {
    # file -> columns without it
    "iter0/eval.json": ["gap", "gap se", "gain", "gain se", "uptake"],
    "iter1/eval.json": ["gain", "gain se", "uptake", "words"],
    "iter1/eval_rewrites.json": ["gap", "gap se", "uptake"],
    "iter0/eval_samples.json": ["change"],
    "iter1/eval_samples.json": ["best", "change", "distinct"],
    "iter1/policy/metrics.jsonl": ["chosen", "rejected"],
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_a_dash(made, name):
    (made / name).unlink()
    row = diagnose(made, 1)[0]
    assert [column for column in COLUMNS if row[column] == "-"] == MISSING[name]
    warnings([row])


def test_an_empty_run_has_rows_of_dashes(tmp_path):
    assert diagnose(tmp_path, 0) == []
    [row] = diagnose(tmp_path, 1)
    assert row == {**dict.fromkeys(COLUMNS, "-"), "t": 1}


def test_differences_need_the_same_number_on_both_sides():
    assert difference({"score": 1}, {"score": 3}) == (2, "-")
    assert difference({"score": 1, "scores": [1]}, {"score": 3}) == (2, "-")
    pairs = ({"score": 1.5, "scores": [1, 2]}, {"score": 3.5, "scores": [3, 4]})
    assert difference(*pairs) == (2.0, 0.0)
    # the built-in evaluation has no score of rewrites
    before = {"score": -2.0, "win_rate": 0.5}
    assert difference(before, {"win_rate": 0.75}) == (0.25, "-")
    assert difference(before, {"score": -1.0, "win_rate": 0.6}) == (1.0, "-")
    assert difference({"win_rate": 0.5}, {"score": 1.0}) == ("-", "-")
    assert difference({}, {"score": 1.0}) == difference({"score": 1.0}, {}) == ("-", "-")


def test_whole_numbers_have_an_uptake_too(tmp_path):
    for name, score in (("iter0/eval", 0), ("iter1/eval", 1), ("iter1/eval_rewrites", 2)):
        write(tmp_path / f"{name}.json", score=score)
    assert diagnose(tmp_path, 1)[0]["uptake"] == 0.5


def test_a_gap_that_may_be_none_has_no_uptake(tmp_path):
    write(tmp_path / "iter0/eval.json", score=0.0, scores=[0.0, 0.0])
    write(tmp_path / "iter1/eval.json", score=0.5, scores=[0.5, 0.5])
    # a gap of .8 with standard error .1; one of .1 with .5
    for scores, shown in (([0.9, 0.7], 0.625), ([0.6, -0.4], "-")):
        gap = sum(scores) / 2
        write(tmp_path / "iter1/eval_rewrites.json", score=gap, scores=scores)
        assert diagnose(tmp_path, 1)[0]["uptake"] == shown


def test_a_training_that_logs_no_log_probs_has_no_changes(tmp_path):
    metrics = write_rows(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 0.5}])
    assert log_prob_changes(metrics) == ("-", "-")
    write_rows(metrics, [step((-4.0, 2), (-9.0, 3))])
    assert log_prob_changes(metrics) == (0.0, 0.0)


# ------------------------------------------------------------------------------------ sick runs


def diagnosed(world: dict, out: Path, *flags: str) -> tuple[dict, str]:
    """The first row and all warnings of a run of one iteration."""
    go(world, out, "--iters", "1", *flags)
    rows = diagnose(out, 1)
    return rows[0], "\n".join(warnings(rows))


@pytest.mark.slow
def test_a_healthy_run_has_every_number_and_no_warning(finished):
    out, text = finished
    rows = diagnose(out, 2)
    assert warnings(rows) == []
    assert "warning, iteration" not in text
    assert "\ndiagnostics (eval/diagnostics.py)\n" in text
    for row in rows:
        assert "-" not in row.values()
        assert row["gap"] > 0
        assert row["chosen"] > 0 > row["rejected"]
        assert 0 < row["distinct"] <= 1
        assert row["gap se"] > 0
        assert row["gain se"] > 0
    kept = [line for line in read_rows(out / "metrics.jsonl") if "uptake" in line]
    assert [{**line, "stage": ""} for line in kept] == [{**row, "stage": ""} for row in rows]


@pytest.mark.slow
def test_an_improver_of_bad_seeds_no_longer_improves(world, tmp_path):
    """Gold answers that are worse than what M_0 writes."""
    rows = [{**row, "response": "No."} for row in read_rows(world["seeds"])]
    seeds = str(write_rows(tmp_path / "bad.jsonl", rows))
    flags = ["--seeds", seeds, "--improver.epochs", "12", "--pairs.scorer", "none"]
    row, text = diagnosed(world, tmp_path / "run", *flags)
    assert row["gap"] < 0
    assert row["uptake"] == "-"
    assert "warning, iteration 1: the improver no longer improves (gap -" in text


@pytest.mark.slow
def test_without_the_nll_a_high_lr_lowers_chosen_responses(world, tmp_path):
    flags = ["--policy.nll", "0", "--policy.lr", "3e-3"]
    row, text = diagnosed(world, tmp_path / "run", *flags)
    assert row["rejected"] < row["chosen"] < 0
    assert text.startswith("warning, iteration 1: log-probs of chosen responses fell (-")
    assert "no longer improves" not in text


@pytest.mark.slow
def test_a_policy_that_falls_apart_narrows(world, tmp_path):
    row, text = diagnosed(world, tmp_path / "run", "--policy.lr", "0.1")
    assert row["change"] < -0.2
    assert row["gain"] < 0
    assert "warning, iteration 1: the best of several responses fell (by 0." in text
