"""AlpacaEval: its statistics against planted effects and published numbers, and whole runs."""

import csv
import gzip
import json

import numpy as np
import pytest
from conftest import read_rows
from eval_helpers import FP32, alpaca_file, judged_by
from eval_helpers import key as key
from stub import Stub, always_first, longer_is_better
from test_stats import sigma

from eval import alpaca_eval
from eval.stats import sigmoid
from plumbing.files import InputError

# ---- statistics


def planted(theta, phi, psi=0.0, n=400):
    """Noise-free preferences by model, lengths and difficulties (which go with lengths)."""
    rng = np.random.default_rng(1)
    ours = rng.integers(10, 4000, n)
    theirs = rng.integers(10, 2000, n)
    gap = (theirs - ours).astype(float)
    gap = gap / gap.std()
    difficulty = rng.normal(size=n) + gap
    logits = theta * np.tanh(gap) + phi + psi * difficulty
    return sigmoid(logits), ours, theirs, difficulty


def test_length_controlled_win_rate_takes_out_a_planted_effect_of_length():
    p, ours, theirs, _ = planted(theta=-2.0, phi=0.3)
    assert 100 * p.mean() > 61, "the longer model wins more often"
    score = alpaca_eval.length_controlled(p, ours, theirs)
    assert score == pytest.approx(100 * sigma(0.3), abs=0.05)

    p, ours, theirs, difficulty = planted(theta=-1.0, phi=-1.0, psi=2.0)
    right = 100 * np.mean([sigma(-1 + 2 * d) for d in difficulty])
    score = alpaca_eval.length_controlled(p, ours, theirs, difficulty)
    assert score == pytest.approx(right, abs=0.05)
    without = alpaca_eval.length_controlled(p, ours, theirs)
    assert without != pytest.approx(right, abs=0.5)


def test_without_a_difference_in_length_it_is_the_win_rate():
    columns = [[1.0, 0, 0.5, 0], [7] * 4, [9] * 4]
    score = alpaca_eval.length_controlled(*columns)
    assert score == pytest.approx(37.5, abs=0.2)
    s = alpaca_eval.statistics(*columns)
    assert s["win_rate"] == 37.5
    assert s["win_rate_se"] == pytest.approx(100 * (0.6875 / 3 / 4) ** 0.5)
    assert s["characters"] == 7
    assert s["baseline_characters"] == 9
    assert s["prompts"] == 4


@pytest.mark.slow
def test_published_numbers_are_reproduced(shared_data):
    data = shared_data / "alpaca_eval"
    o = alpaca_eval.Options(
        annotations=data / "ae2_annotations_12_models.csv.gz",
        leaderboard=data / "ae2_leaderboard_12_models.csv",
        difficulty=data / "instruction_difficulty_est.csv",
    )
    errors = alpaca_eval.reproduce(o)
    assert errors["models"] == 11
    assert errors["win_rate_error_max"] < 1e-4
    assert errors["standard_error_error_max"] < 1e-5
    assert errors["lc_error_mean"] < 1.0
    assert errors["lc_error_max"] < 2.0


def test_reproducing_says_what_is_missing(tmp_path, capsys):
    path, board = tmp_path / "a.csv.gz", tmp_path / "b.csv"
    header = ["model", "index", "preference", "len_1", "len_2"]
    with gzip.open(path, "wt") as file:
        csv.writer(file).writerows([header, ["x", 0, 1.5, 9, 8], ["x", 1, 1.9, 9, 8]])
    o = alpaca_eval.Options(annotations=path, leaderboard=board)
    columns = ",win_rate,standard_error,length_controlled_winrate\n"
    board.write_text(f"{columns}x,70.0,20.0,70.0\n")
    assert alpaca_eval.main(o)["win_rate_error_max"] == 0

    # models that were not annotated are left out, on one line
    names = ("x", *"pqrstuv")
    rows = "".join(f"{name},70.0,20.0,70.0\n" for name in names)
    board.write_text(columns + rows)
    capsys.readouterr()
    assert alpaca_eval.main(o)["models"] == 1
    left_out = f"left out, as {path} has no annotations of them (7): p, q, r, s, t, ...\n"
    assert left_out in capsys.readouterr().out
    board.write_text(f"{columns}y,70.0,20.0,70.0\n")
    with pytest.raises(InputError, match=r"a.csv.gz: .* none of the models of .*b.csv") as caught:
        alpaca_eval.main(o)
    assert "\n" not in str(caught.value)
    board.write_text(",win_rate\nx,70\n")
    with pytest.raises(InputError, match=r"b.csv: has no rows with the column 'standard_error'"):
        alpaca_eval.main(o)


# ---- whole runs


@pytest.mark.slow
def test_from_checkpoint_to_score(tiny, tmp_path, capsys):
    data, out = alpaca_file(tmp_path), tmp_path / "out"
    difficulty = tmp_path / "difficulty.csv"
    difficulty.write_text("index,d\n" + "".join(f"{i},{i / 5}\n" for i in range(5)))
    with Stub(longer_is_better) as stub:
        more = {"model": tiny, "data": data, **judged_by(stub)}
        o = alpaca_eval.Options(out=out, difficulty=difficulty, **more)
        result = alpaca_eval.main(o)
        assert len(stub.bodies) == 10
        assert result["judge_replies"] == 10
        official = json.loads((out / "model_outputs.json").read_text())
        lengths = [len(row["output"]) for row in official]
        theirs = [1 + 20 * i for i in range(5)]
        wins = [float(a > b) for a, b in zip(lengths, theirs, strict=True)]
        assert 0 < sum(wins) < 5, "else the test cannot tell sides"
        for i, row in enumerate(official):
            assert row["instruction"] == f"Question {i}?"
            assert row["dataset"] == "d"
            assert row["generator"] == tiny.name
        assert result["win_rate"] == 20 * sum(wins)
        assert result["characters"] == sum(lengths) / 5
        hard = [i / 5 for i in range(5)]
        score = alpaca_eval.length_controlled(wins, lengths, theirs, hard)
        assert result["score"] == pytest.approx(score)
        assert result["order_decided"] == 0
        assert "LC win rate" in capsys.readouterr().out

        assert alpaca_eval.main(o) == result
        assert len(stub.bodies) == 10, "nothing is paid for twice"
        assert json.loads((out / "result.json").read_text()) == result
        two = alpaca_eval.Options(out=tmp_path / "two", limit=2, **more)
        assert alpaca_eval.main(two)["prompts"] == 2


def test_a_judge_of_positions_gives_one_half(tiny, tmp_path):
    data = alpaca_file(tmp_path)
    with Stub(always_first) as stub:
        o = alpaca_eval.Options(model=tiny, data=data, out=tmp_path / "o", **judged_by(stub))
        result = alpaca_eval.main(o)
    assert result["win_rate"] == pytest.approx(50)
    assert result["score"] == pytest.approx(50)
    assert result["order_decided"] == 1


def test_a_pair_with_a_lost_comparison_is_left_out(tiny, tmp_path):
    data = alpaca_file(tmp_path)

    def reply(body: dict) -> str:
        text = body["messages"][-1]["content"]
        return "?" if "Question 3" in text and "Answer m\nx" in text else "m"

    with Stub(reply) as stub:
        o = alpaca_eval.Options(model=tiny, data=data, out=tmp_path / "o", **judged_by(stub))
        result = alpaca_eval.main(o)
    assert result["prompts"] == 4
    assert result["left_out"] == 1
    assert result["malformed"] == 1
    assert result["win_rate"] == 50
    lost = read_rows(tmp_path / "o/games.jsonl")[3]
    assert lost == {"index": 3, "model_first": 1.0, "baseline_first": None}


# ---- files


def test_official_data_goes_in(shared_data):
    data = shared_data / "alpaca_eval"
    rows = alpaca_eval.read_baseline(data / "gpt4_1106_preview_outputs.json")
    difficulty = data / "instruction_difficulty_est.csv"
    assert len(rows) == 805
    assert len(alpaca_eval.read_difficulty(difficulty, 805)) == 805
    with pytest.raises(InputError, match="holds 805 difficulties for 5 prompts"):
        alpaca_eval.read_difficulty(difficulty, 5)


def test_tables_and_baselines_in_other_forms(tmp_path):
    path = tmp_path / "difficulty.csv"
    as_pandas = ",index,difficulty\n0,0,-1.5\n1,1,2.5\n"
    for text in ("index,difficulty\n0,-1.5\n1,2.5\n", as_pandas):
        path.write_text(text)
        assert alpaca_eval.read_difficulty(path, 2) == {0: -1.5, 1: 2.5}
    for text in ('{"instruction": "x", "output": "y"}', "[7]"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"difficulty.csv: (not a JSON list|record 1)"):
            alpaca_eval.read_baseline(path)


def test_a_single_difficulty_is_not_needed(tiny):
    assert alpaca_eval.read_difficulty(None, 5)[4] == 0
    assert alpaca_eval.Options(run=FP32, model=tiny).difficulty is None
