"""The benchmarks: statistics against hand-computed, brute-force and published ones, their files, whole runs."""

import csv
import gzip
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, last_json, read_rows, tiny_checkpoint, write_rows

from data import InputError, messages_of
from eval import alpaca_eval, answers, arena_hard, head_to_head, judge, mt_bench
from eval.stats import bootstrap, logistic, sigmoid, standard_error
from stub import Stub, always_first, longer_is_better

SETTINGS = {"dtype": "float32", "max_new_tokens": 12}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")


def endpoint(stub: Stub) -> dict:
    pytest.importorskip(
        "openai", reason="needs the openai package: pip install -r requirements-eval.txt"
    )
    return {"judge": "stub", "base_url": stub.url}


def by(stub: Stub) -> dict:
    return {**endpoint(stub), **SETTINGS}


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---- statistics that several share ----


def test_standard_error_by_hand():
    assert (
        standard_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx((14 / 3 / 4) ** 0.5)
        and standard_error([2.0]) == 0
    )


def test_sigmoid_far_out():
    assert sigmoid(0.3) == pytest.approx(sigma(0.3)) and sigmoid(-1e4) == 0 and sigmoid(1e4) == 1


def loss(b, X, y, w, ridge):
    """Written out for single rows."""
    total = ridge / 2 * sum(v * v for v in b)
    for row, target, weight in zip(X, y, w, strict=True):
        p = sigma(sum(v * x for v, x in zip(b, row, strict=True)))
        total -= weight * (target * math.log(p) + (1 - target) * math.log(1 - p))
    return total


def test_logistic_is_the_minimum_of_its_loss():
    rng = np.random.default_rng(0)
    X, y, w = rng.normal(size=(30, 3)), rng.random(30), rng.choice([1.0, 3.0], 30)
    b = logistic(X, y, w, ridge=0.5)
    best = loss(b, X, y, w, 0.5)
    for k in range(3):
        for step in (-1e-3, 1e-3):
            moved = b.copy()
            moved[k] += step
            assert loss(moved, X, y, w, 0.5) > best
    assert not np.allclose(b, logistic(X, y, None, 0.5), atol=1e-3), "weights matter"


def test_logistic_of_separable_rows_is_finite_and_of_large_features_converges():
    b = logistic([[1.0, -1], [1.0, 1]], [0.0, 1.0])
    assert np.isfinite(b).all() and b[1] > 3
    x = np.linspace(-300, 300, 61)
    b = logistic(np.stack([np.ones(61), x], 1), [sigma(0.5 + 0.02 * v) for v in x], ridge=0)
    assert b == pytest.approx([0.5, 0.02], abs=1e-6)


def test_bootstrap_draws_with_replacement_and_has_the_spread_of_the_mean():
    values = np.arange(50.0)
    means = bootstrap(lambda i: values[i].mean(), 50, rounds=2000)
    assert means.std() == pytest.approx(
        values.std() / 50**0.5, rel=0.05
    ) and means.mean() == pytest.approx(24.5, abs=0.2)
    assert (
        bootstrap(lambda i: values[i].mean(), 50) == bootstrap(lambda i: values[i].mean(), 50)
    ).all()


# ---- AlpacaEval ----


def planted(theta, phi, psi=0.0, n=400):
    """Preferences that follow the model without noise, lengths, difficulties (which go with the lengths)."""
    rng = np.random.default_rng(1)
    ours, theirs = rng.integers(10, 4000, n), rng.integers(10, 2000, n)
    gap = (theirs - ours).astype(float)
    difficulty = rng.normal(size=n) + gap / gap.std()
    return (
        sigmoid(theta * np.tanh(gap / gap.std()) + phi + psi * difficulty),
        ours,
        theirs,
        difficulty,
    )


def test_length_controlled_win_rate_takes_out_a_planted_effect_of_length():
    p, ours, theirs, _ = planted(theta=-2.0, phi=0.3)
    assert 100 * p.mean() > 61, "the longer model wins more often"
    assert alpaca_eval.length_controlled(p, ours, theirs) == pytest.approx(
        100 * sigma(0.3), abs=0.05
    )
    p, ours, theirs, difficulty = planted(theta=-1.0, phi=-1.0, psi=2.0)
    right = 100 * np.mean([sigma(-1 + 2 * d) for d in difficulty])
    assert alpaca_eval.length_controlled(p, ours, theirs, difficulty) == pytest.approx(
        right, abs=0.05
    )
    assert alpaca_eval.length_controlled(p, ours, theirs) != pytest.approx(right, abs=0.5)


def test_without_a_difference_in_length_it_is_the_win_rate():
    assert alpaca_eval.length_controlled([1.0, 0, 0.5, 0], [7] * 4, [9] * 4) == pytest.approx(
        37.5, abs=0.2
    )
    s = alpaca_eval.statistics([1.0, 0, 0.5, 0], [7] * 4, [9] * 4)
    assert s["win_rate"] == 37.5 and s["win_rate_se"] == pytest.approx(
        100 * (0.6875 / 3 / 4) ** 0.5
    )
    assert s["characters"] == 7 and s["baseline_characters"] == 9 and s["prompts"] == 4


def test_published_numbers_are_reproduced(shared_data):
    data = shared_data / "alpaca_eval"
    o = alpaca_eval.Options(
        annotations=str(data / "ae2_annotations_12_models.csv.gz"),
        leaderboard=str(data / "ae2_leaderboard_12_models.csv"),
        difficulty=str(data / "instruction_difficulty_est.csv"),
    )
    errors = alpaca_eval.reproduce(o)
    assert (
        errors["models"] == 11
        and errors["win_rate_error_max"] < 1e-4
        and errors["standard_error_error_max"] < 1e-5
    )
    assert errors["lc_error_mean"] < 1.0 and errors["lc_error_max"] < 2.0


def test_reproducing_says_what_is_missing(tmp_path):
    path, board = tmp_path / "a.csv.gz", tmp_path / "b.csv"
    with gzip.open(path, "wt") as file:
        csv.writer(file).writerows(
            [
                ["model", "index", "preference", "len_1", "len_2"],
                ["x", 0, 1.5, 9, 8],
                ["x", 1, 1.9, 9, 8],
            ]
        )
    board.write_text(",win_rate,standard_error,length_controlled_winrate\nx,70.0,20.0,70.0\n")
    assert (
        alpaca_eval.main(alpaca_eval.Options(annotations=str(path), leaderboard=str(board)))[
            "win_rate_error_max"
        ]
        == 0
    )
    board.write_text(",win_rate,standard_error,length_controlled_winrate\ny,70.0,20.0,70.0\n")
    with pytest.raises(InputError, match="no annotations of y"):
        alpaca_eval.main(alpaca_eval.Options(annotations=str(path), leaderboard=str(board)))
    board.write_text(",win_rate\nx,70\n")
    with pytest.raises(InputError, match=r"b.csv: has no rows with the column 'standard_error'"):
        alpaca_eval.main(alpaca_eval.Options(annotations=str(path), leaderboard=str(board)))


def alpaca_files(tmp_path, n=5):
    data = tmp_path / "baseline.json"
    data.write_text(
        json.dumps(
            [
                {
                    "dataset": "d",
                    "instruction": f"Question {i}?",
                    "output": "x" * (1 + 20 * i),
                    "generator": "g",
                }
                for i in range(n)
            ]
        )
    )
    return data


def test_alpaca_eval_from_checkpoint_to_score(tiny, tmp_path, capsys):
    data, out = alpaca_files(tmp_path), tmp_path / "out"
    difficulty = tmp_path / "difficulty.csv"
    difficulty.write_text("index,d\n" + "".join(f"{i},{i / 5}\n" for i in range(5)))
    with Stub(longer_is_better) as stub:
        o = alpaca_eval.Options(
            model=str(tiny), data=str(data), out=str(out), difficulty=str(difficulty), **by(stub)
        )
        result = alpaca_eval.main(o)
        assert len(stub.bodies) == 10 and result["judge_replies"] == 10
        official = json.loads((out / "model_outputs.json").read_text())
        lengths = [len(row["output"]) for row in official]
        wins = [float(a > 1 + 20 * i) for i, a in enumerate(lengths)]
        assert [(row["instruction"], row["dataset"], row["generator"]) for row in official] == [
            (f"Question {i}?", "d", tiny.name) for i in range(5)
        ]
        assert 0 < sum(wins) < 5, "else the test cannot tell sides"
        assert result["win_rate"] == 20 * sum(wins) and result["characters"] == sum(lengths) / 5
        assert result["score"] == pytest.approx(
            alpaca_eval.length_controlled(
                wins, lengths, [1 + 20 * i for i in range(5)], [i / 5 for i in range(5)]
            )
        )
        assert result["order_decided"] == 0 and "LC win rate" in capsys.readouterr().out
        assert alpaca_eval.main(o) == result and len(stub.bodies) == 10
        assert json.loads((out / "result.json").read_text()) == result
        o = alpaca_eval.Options(
            model=str(tiny), data=str(data), out=str(tmp_path / "two"), limit=2, **by(stub)
        )
        assert alpaca_eval.main(o)["prompts"] == 2
    with Stub(always_first) as stub:
        result = alpaca_eval.main(
            alpaca_eval.Options(
                model=str(tiny), data=str(data), out=str(tmp_path / "o"), **by(stub)
            )
        )
        assert (
            result["win_rate"] == pytest.approx(50)
            and result["score"] == pytest.approx(50)
            and result["order_decided"] == 1
        )


def test_alpaca_eval_leaves_out_a_pair_with_a_lost_game(tiny, tmp_path):
    data = alpaca_files(tmp_path)
    lost = ("Question 3", "Answer m\nx")
    with Stub(
        lambda body: "?" if all(text in body["messages"][-1]["content"] for text in lost) else "m"
    ) as stub:
        result = alpaca_eval.main(
            alpaca_eval.Options(
                model=str(tiny), data=str(data), out=str(tmp_path / "o"), **by(stub)
            )
        )
    assert (
        result["prompts"] == 4
        and result["left_out"] == 1
        and result["malformed"] == 1
        and result["win_rate"] == 50
    )
    assert read_rows(tmp_path / "o/games.jsonl")[3] == {
        "index": 3,
        "model_first": 1.0,
        "baseline_first": None,
    }


# ---- Arena-Hard ----


def test_a_much_better_answer_counts_three_times():
    games = [(1.0, 0.75), (0.5, 0.25), (0.75, None)]  # wins: 3 and 1, a tie, a loss, a win
    s = arena_hard.statistics(games, ["a"] * 3, ["b"] * 3)
    assert (
        s["score"] == pytest.approx(100 * (3 + 1 + 0.5 + 1) / (3 + 1 + 1 + 1 + 1))
        and s["games"] == 5
        and s["prompts"] == 3
    )


def test_the_score_is_that_of_bradley_terry_on_repeated_battles():
    """By brute force: every battle as often as it counts, the rating difference by bisection."""
    rng = np.random.default_rng(2)
    games = [tuple(rng.choice([0.0, 0.25, 0.5, 0.75, 1.0], 2)) for _ in range(40)]
    battles = [
        0.5 + 0.5 * np.sign(p - 0.5)
        for pair in games
        for p in pair
        for _ in range(3 if p in (0, 1) else 1)
    ]
    low, high = -10.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(y - sigma(middle) for y in battles) > 0 else (low, middle)
    s = arena_hard.statistics(games, ["a"] * 40, ["b"] * 40)
    assert s["score"] == pytest.approx(100 * sigma(low))
    assert s["low"] < s["score"] < s["high"] and s["se"] > 0
    assert s["style_score"] == pytest.approx(s["score"], abs=0.05), (
        "there is no difference in style to control for"
    )


def test_style_is_counted_outside_of_code():
    text = "# One\n## Two\n#no\n- a\n* b\n 1. c\n**bold** and __bold__ and *not*\n```\n# in code\n- x\n```\nend"
    assert arena_hard.style(text).tolist() == [len(text.split()), 2, 3, 2]
    d = arena_hard.style_difference("# a b c", "x y")  # 4 and 2 words, one header
    assert d.tolist() == pytest.approx([2 / 6, 0.25 / 1.25, 0, 0])
    assert arena_hard.style_difference("", "").tolist() == [0] * 4


def test_style_control_takes_out_a_planted_effect():
    """A model that is always longer, and wins for its length more than for itself."""
    rng = np.random.default_rng(3)
    difference = np.stack([rng.uniform(0.1, 0.9, 300), *rng.normal(0, 0.01, (3, 300))], 1)
    scale = (difference[:, 0] ** 2).mean() ** 0.5
    result = sigmoid(-0.4 + 1.5 * difference[:, 0] / scale)  # noise-free
    assert result.mean() > 0.6
    assert arena_hard.styled_win_rate(result, np.ones(300), difference) == pytest.approx(
        100 * sigma(-0.4), abs=0.3
    )


LENGTHS = [1, 9, 12, 40]  # of the baseline's answers; those of the tiny model are 11 to 15


def arena_files(tmp_path, n=4):
    return (
        write_rows(
            tmp_path / "question.jsonl",
            [{"uid": f"u{i}", "cluster": "k", "prompt": f"Question {i}?"} for i in range(n)],
        ),
        write_rows(
            tmp_path / "baseline.jsonl",
            [
                {
                    "uid": f"u{i}",
                    "ans_id": "x",
                    "model": "b",
                    "messages": [
                        {"role": "user", "content": f"Question {i}?"},
                        {"role": "assistant", "content": {"answer": "x" * LENGTHS[i]}},
                    ],
                    "tstamp": 1.0,
                }
                for i in reversed(range(n))
            ],
        ),
    )


def test_arena_hard_from_checkpoint_to_score(tiny, tmp_path, capsys):
    questions, baseline = arena_files(tmp_path)
    with Stub(longer_is_better) as stub:
        o = arena_hard.Options(
            model=str(tiny),
            data=str(questions),
            baseline=str(baseline),
            out=str(tmp_path / "out"),
            **by(stub),
        )
        result = arena_hard.main(o)
        assert len(stub.bodies) == 8 and "at equal style" in capsys.readouterr().out
        assert arena_hard.main(o) == result and len(stub.bodies) == 8
        answers = arena_hard.read_answers(str(tmp_path / "out/model_answer.jsonl"))
        won, weight = [], []
        for i in range(4):
            a, b = len(answers[f"u{i}"]), LENGTHS[i]
            won.append(float(a > b))
            weight.append(3 if a >= 2 * b or b >= 2 * a else 1)
        assert 0 < sum(won) < 4 and len({*weight}) == 2, "else the test cannot tell"
        assert result["score"] == pytest.approx(
            100 * sum(a * b for a, b in zip(won, weight, strict=True)) / sum(weight)
        )
        assert (
            sum(result[name] for name in ("much_better", "better", "tie", "worse", "much_worse"))
            == result["games"]
            == 8
        )
        official = read_rows(tmp_path / "out/model_answer.jsonl")
        given = read_rows(baseline)
        assert [row.keys() for row in official] == [given[0].keys()] * 4
        assert official[0]["messages"][0] == {"role": "user", "content": "Question 0?"}
        absent = write_rows(tmp_path / "absent.jsonl", given[1:])
        with pytest.raises(InputError, match="no answer to question u3"):
            arena_hard.main(
                arena_hard.Options(
                    model=str(tiny), data=str(questions), baseline=str(absent), **endpoint(stub)
                )
            )


def test_both_layouts_of_official_answers_are_read_and_others_are_errors(tmp_path, shared_data):
    older = write_rows(
        tmp_path / "older.jsonl",
        [{"question_id": "q", "choices": [{"turns": [{"content": "yes"}]}]}],
    )
    assert arena_hard.read_answers(str(older)) == {"q": "yes"}
    with pytest.raises(InputError, match="line 1: neither field"):
        arena_hard.read_answers(
            str(write_rows(tmp_path / "bad.jsonl", [{"uid": "q", "answer": "yes"}]))
        )
    official = arena_hard.read_answers(str(shared_data / "arena_hard/answer_gpt-4-0314.jsonl"))
    uids = {row["uid"] for row in read_rows(shared_data / "arena_hard/question.jsonl")}
    assert (
        official.keys() == uids
        and len(uids) == 500
        and all(isinstance(text, str) and text for text in official.values())
    )


# ---- MT-Bench ----


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Rating: [[7]]", 7),
        ("[[8.5]] then [[2]]", 8.5),
        ("I give [6].", 6),
        ("[1] says so. Rating: [[9]]", 9),
        ("[[0]]", None),
        ("[[11]]", None),
        ("7", None),
        ("[[seven]]", None),
        ("", None),
        ("[[10]]", 10),
        ("[[1]]", 1),
    ],
)
def test_grades(text, grade):
    assert mt_bench.read_grade({"text": text}) == grade


def test_grades_are_averaged_by_turn_and_lost_ones_left_out():
    s = mt_bench.statistics([(8.0, 4.0), (6.0, None), (None, None), (1.0, 3.0)])
    assert s["score"] == pytest.approx(22 / 5) and s["turn_1"] == 5 and s["turn_2"] == 3.5
    assert s["se"] == pytest.approx(np.std([6, 6, 2], ddof=1) / 3**0.5)
    assert mt_bench.statistics([(5.0, None)]) == {"score": 5, "se": 0, "turn_1": 5}


def mt_files(tmp_path):
    data = tmp_path / "mt"
    data.mkdir()
    write_rows(
        data / "question.jsonl",
        [
            {"question_id": 81 + i, "category": c, "turns": [f"First {i}?", f"Then {i}?"]}
            for i, c in enumerate(["writing", "math", "stem", "extraction"])
        ],
    )
    write_rows(
        data / "judge_prompts.jsonl",
        [
            {"name": name, "system_prompt": "S", "prompt_template": f"{name}: " + places}
            for name, places in (
                ("single-v1", "{question}|{answer}"),
                ("single-math-v1", "{question}|{ref_answer_1}|{answer}"),
                ("single-v1-multi-turn", "{question_1}|{answer_1}|{question_2}|{answer_2}"),
                (
                    "single-math-v1-multi-turn",
                    "{question_1}|{ref_answer_1}|{question_2}|{ref_answer_2}|{answer_1}|{answer_2}",
                ),
            )
        ],
    )
    write_rows(
        data / "reference_answer_gpt-4.jsonl",
        [{"question_id": 82, "choices": [{"turns": ["REF1", "REF2"]}]}],
    )
    return data


def test_mt_bench_from_checkpoint_to_score(tiny, tmp_path, capsys):
    data, out = mt_files(tmp_path), tmp_path / "out"
    grade = lambda body: (
        "[[9]]" if body["messages"][1]["content"].startswith("single-math") else "[[4]]"
    )  # noqa: E731
    with Stub(grade) as stub:
        o = mt_bench.Options(model=str(tiny), data=str(data), out=str(out), **by(stub))
        result = mt_bench.main(o)
        assert mt_bench.main(o) == result and len(stub.bodies) == 8
    assert (
        result["score"] == pytest.approx((9 + 9 + 6 * 4) / 8)
        and result["math"] == 9
        and result["stem"] == 4
    )
    assert (
        result["se"] == pytest.approx(np.std([4, 9, 4, 4], ddof=1) / 2) and result["questions"] == 4
    )
    assert re.search(r"math +9.000 +9.000 +9.000", capsys.readouterr().out)
    answers = {
        row["question_id"]: row["choices"][0]["turns"]
        for row in read_rows(out / "model_answer.jsonl")
    }
    asked = [body["messages"][1]["content"] for body in stub.bodies]
    a, b = answers[82]
    assert f"single-math-v1: First 1?|REF1|{a}" in asked
    assert f"single-math-v1-multi-turn: First 1?|REF1|Then 1?|REF2|{a}|{b}" in asked
    a, b = answers[81]
    assert (
        f"single-v1: First 0?|{a}" in asked
        and f"single-v1-multi-turn: First 0?|{a}|Then 0?|{b}" in asked
    )
    for temperature, ids in (("0.7", ["81"]), ("0.1", ["83"]), ("0.0", ["82", "84"])):
        first, second = (read_rows(out / f"turn{turn}-{temperature}.jsonl") for turn in (1, 2))
        assert [row["id"] for row in first] == [row["id"] for row in second] == ids
        manifest = json.loads((out / f"turn2-{temperature}.manifest.json").read_text())
        assert manifest["options"]["temperature"] == float(temperature)
        for one, two in zip(first, second, strict=True):
            i = int(one["id"]) - 81
            assert messages_of(two) == [
                {"role": "user", "content": f"First {i}?"},
                {"role": "assistant", "content": one["response"]},
                {"role": "user", "content": f"Then {i}?"},
            ]


def test_mt_bench_has_prompts_of_its_own():
    with pytest.raises(InputError, match="--judge-prompt: MT-Bench's prompts are those of --data"):
        mt_bench.read_data(mt_bench.Options(model="x", data="y", judge_prompt="mine.txt"))


def test_mt_bench_official_files(shared_data):
    o = mt_bench.Options(model="x", data=str(shared_data / "mt_bench"))
    questions, prompts, references = mt_bench.read_data(o)
    assert len(questions) == 80 and len(references) == 30
    for row in questions:
        for turn in (1, 2):
            reference = references.get(row["question_id"])
            system, user = mt_bench.to_request(
                prompts, row, turn, ["ANSWER ONE", "ANSWER TWO"], reference
            ).messages
            assert row["turns"][turn - 1] in user["content"] and (
                "ANSWER TWO" in user["content"]
            ) == (turn == 2)
            assert "ANSWER ONE" in user["content"] and not re.search(
                r"\{(question|answer|ref_answer)\w*\}", user["content"]
            )
            assert bool(reference) == (row["category"] in mt_bench.WITH_REFERENCE)
            assert bool(reference) == ("eference answer" in user["content"].lower())
            assert system["role"] == "system"
    o.limit = 8
    assert [row["category"] for row in mt_bench.read_data(o)[0]] == list(
        dict.fromkeys(row["category"] for row in questions)
    )


def test_mt_bench_says_what_its_files_lack(tiny, tmp_path):
    data = mt_files(tmp_path)
    write_rows(
        data / "reference_answer_gpt-4.jsonl",
        [{"question_id": 81, "choices": [{"turns": ["a", "b"]}]}],
    )
    with pytest.raises(InputError, match="no two answers to question 82"):
        mt_bench.main(mt_bench.Options(model=str(tiny), data=str(data), judge="x"))
    write_rows(data / "question.jsonl", [{"question_id": 1, "turns": ["a", "b"]}])
    with pytest.raises(InputError, match=r"question.jsonl: line 1: field 'category' is missing"):
        mt_bench.main(mt_bench.Options(model=str(tiny), data=str(data), judge="x"))


# ---- head to head ----


@pytest.fixture
def two(tiny, tmp_path):
    return {
        "model": str(tiny),
        "against": str(tiny_checkpoint(tmp_path / "other", seed=5)),
        "data": str(
            write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Question {i}?"} for i in range(6)])
        ),
        "out": str(tmp_path / "out"),
        **SETTINGS,
    }


def test_head_to_head_by_a_judge(two, tmp_path):
    with Stub(longer_is_better) as stub:
        result = head_to_head.main(head_to_head.Options(**two, **endpoint(stub)))
        a, b = (
            [len(row["response"]) for row in read_rows(tmp_path / f"out/{name}.jsonl")]
            for name in ("answers", "against")
        )
        wins = [0.5 + (x > y) / 2 - (x < y) / 2 for x, y in zip(a, b, strict=True)]
        assert (
            result["score"] == pytest.approx(100 * sum(wins) / 6)
            and 0 < sum(wins) < 6
            and sum(wins) != 3
        )
        assert result["se"] == pytest.approx(100 * np.std(wins, ddof=1) / 6**0.5)
        assert (result["wins"], result["draws"], result["losses"]) == tuple(
            wins.count(w) for w in (1, 0.5, 0)
        )
        swapped = {
            **two,
            "model": two["against"],
            "against": two["model"],
            "out": str(tmp_path / "swapped"),
        }
        turned = head_to_head.main(head_to_head.Options(**swapped, **endpoint(stub)))
        assert turned["score"] == pytest.approx(100 - result["score"])
        asked = len(stub.bodies)
        alone = {**two, "against": two["model"], "out": str(tmp_path / "alone")}
        itself = head_to_head.main(head_to_head.Options(**alone, **endpoint(stub)))
        assert itself["score"] == 50 and itself["draws"] == 6 and len(stub.bodies) == asked


def test_head_to_head_counts_a_lost_game_as_a_draw_and_a_slight_win_as_one(two, tmp_path):
    with Stub(
        lambda body: "?" if "Question 0" in body["messages"][-1]["content"] else always_first(body)
    ) as stub:
        result = head_to_head.main(head_to_head.Options(**{**two, "limit": 2}, **endpoint(stub)))
    assert result["score"] == 50 and result["malformed"] == 2 and result["prompts"] == 2
    assert [head_to_head.win(p) for p in (1.0, 0.75, 0.51, 0.5, None, 0.25, 0.0)] == [
        1,
        1,
        1,
        0.5,
        0.5,
        0,
        0,
    ]


def test_head_to_head_by_a_scorer(two, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def count(rows):\n    return [float(len(row['response'])) for row in rows]\n"
    )
    result = head_to_head.main(head_to_head.Options(**two, scorer=f"{tmp_path / 'mine.py'}:count"))
    with Stub(longer_is_better) as stub:
        assert (
            head_to_head.main(head_to_head.Options(**two, **endpoint(stub)))["score"]
            == result["score"]
        )
    assert "judge_usd" not in result
    by_likelihood = head_to_head.main(head_to_head.Options(**two, scorer="likelihood"))
    assert by_likelihood["prompts"] == 6 and by_likelihood["score"] < 50, (
        "the other's own words are likelier under it"
    )
    assert (
        head_to_head.main(head_to_head.Options(**two, scorer="likelihood", base=two["model"]))[
            "score"
        ]
        > 50
    )


# ---- what holds for all ----

ALL = [(alpaca_eval, {}), (arena_hard, {}), (mt_bench, {}), (head_to_head, {"against": "x"})]


@pytest.mark.parametrize(
    ("module", "more"), ALL, ids=lambda value: getattr(value, "__name__", "").rpartition(".")[2]
)
def test_everything_is_checked_before_an_answer_is_written(
    module, more, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(answers, "sample", lambda *args, **kw: pytest.fail("sampled"))
    monkeypatch.setattr(answers, "stage", lambda *args, **kw: pytest.fail("sampled"))
    questions, baseline = arena_files(tmp_path)
    data = {
        alpaca_eval: str(alpaca_files(tmp_path)),
        arena_hard: str(questions),
        mt_bench: str(mt_files(tmp_path)),
        head_to_head: str(questions),
    }[module]
    more = {"model": str(tiny), "out": str(tmp_path / "out"), **more}
    more |= {"baseline": str(baseline)} if module is arena_hard else {}
    cases = [
        ({"judge": "x", "base_url": "u"}, "--data: missing; give "),
        ({"data": data}, "--judge"),
        (
            {"data": str(tmp_path / "gone"), "judge": "x", "base_url": "u"},
            "gone: no such file; give",
        ),
        ({"data": data, "judge": "x", "base_url": "u", "limit": -1}, "--limit"),
        (
            {"data": data, "judge": "x", "base_url": "u", "budget": 1.0},
            "--budget: cannot be kept without prices",
        ),
    ]
    for changes, message in cases:
        if message.startswith("--budget"):
            pytest.importorskip(
                "openai", reason="needs the openai package: pip install -r requirements-eval.txt"
            )
        with pytest.raises(InputError, match=message) as caught:
            module.main(module.Options(**{**more, **changes}))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "more"), ALL, ids=lambda value: getattr(value, "__name__", "").rpartition(".")[2]
)
def test_a_benchmark_opens_with_what_its_reader_needs(module, more):
    name, text = module.__name__.rpartition(".")[2], module.__doc__
    assert text.splitlines()[0].endswith(".")
    assert re.search(r"^[^\n`]*\.(jsonl|json)\b[^\n]* -> \S", text, re.MULTILINE), (
        "files in -> files out"
    )
    assert re.search(rf"^    python -m eval\.{name} --model", text, re.MULTILINE)
    assert re.search(
        rf"^    torchrun --nproc-per-node 8 -m eval\.{name} --model", text, re.MULTILINE
    )


def test_the_command_prints_a_table_then_json_and_its_default_place_is_in_the_model(tmp_path):
    model, data = tiny_checkpoint(tmp_path / "model"), mt_files(tmp_path)
    with Stub(lambda body: "[[5]]") as stub:
        flags = {"model": model, "data": data, **by(stub)}
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "eval.mt_bench",
                *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items()),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["score"] == 5 and "extraction" in done.stdout.splitlines()[-3]
    assert (model / "eval/mt_bench/result.json").is_file()


def test_a_local_model_judges_a_benchmark(tiny, tmp_path, monkeypatch):
    """Its replies are noise, so what reads them is put in their place: the longer reply is the better grade."""
    monkeypatch.setattr(mt_bench, "read_grade", lambda reply: 1 + len(reply["text"]) % 10)
    o = mt_bench.Options(
        model=str(tiny),
        data=str(mt_files(tmp_path)),
        out=str(tmp_path / "out"),
        judge=str(tiny),
        judge_tokens=8,
        **SETTINGS,
    )
    result = mt_bench.main(o)
    texts = [row["text"] for row in read_rows(tmp_path / "out/verdicts.jsonl")]
    assert len(texts) == 8 and result["score"] == pytest.approx(
        sum(1 + len(text) % 10 for text in texts) / 8
    )
    monkeypatch.setattr(judge, "sample", lambda *args, **kw: pytest.fail("was judged before"))
    assert mt_bench.main(o) == result


def test_official_data_goes_in(shared_data, tmp_path):
    rows = alpaca_eval.read_baseline(
        str(shared_data / "alpaca_eval/gpt4_1106_preview_outputs.json")
    )
    difficulty = str(shared_data / "alpaca_eval/instruction_difficulty_est.csv")
    assert len(rows) == 805 and len(alpaca_eval.read_difficulty(difficulty, 805)) == 805
    with pytest.raises(InputError, match="holds 805 difficulties for 5 prompts"):
        alpaca_eval.read_difficulty(difficulty, 5)


def test_tables_and_baselines_in_other_forms(tmp_path):
    path = tmp_path / "difficulty.csv"
    for text in (
        "index,difficulty\n0,-1.5\n1,2.5\n",
        ",index,difficulty\n0,0,-1.5\n1,1,2.5\n",
    ):  # as pandas saves it
        path.write_text(text)
        assert [*alpaca_eval.read_difficulty(str(path), 2)] == [-1.5, 2.5]
    for text in ('{"instruction": "x", "output": "y"}', "[7]"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"difficulty.csv: (no JSON list|record 1)"):
            alpaca_eval.read_baseline(str(path))
