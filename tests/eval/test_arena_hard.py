"""Arena-Hard: its statistics by hand, by brute force, against planted effects; a whole run."""

import numpy as np
import pytest
from conftest import read_rows, write_rows
from eval_helpers import BASELINE_LENGTHS, arena_files, judged_by
from eval_helpers import key as key
from stub import Stub, longer_is_better
from test_stats import sigma

from eval import arena_hard
from eval.stats import sigmoid
from plumbing.files import InputError

# ---- statistics


def test_a_much_better_answer_counts_three_times():
    games = [(1.0, 0.75), (0.5, 0.25), (0.75, None)]
    wins = 3 + 1 + 0.5 + 0 + 1
    total = 3 + 1 + 1 + 1 + 1
    s = arena_hard.statistics(games, ["a"] * 3, ["b"] * 3)
    assert s["score"] == pytest.approx(100 * wins / total)
    assert s["games"] == 5
    assert s["prompts"] == 3


def test_the_score_is_that_of_bradley_terry_on_repeated_battles():
    """By brute force: every battle as often as it counts, the rating difference by bisection."""
    rng = np.random.default_rng(2)
    verdicts = [0.0, 0.25, 0.5, 0.75, 1.0]
    games = [tuple(rng.choice(verdicts, 2)) for _ in range(40)]
    battles = []
    for pair in games:
        for p in pair:
            times = 3 if p in (0, 1) else 1
            battles += times * [0.5 + 0.5 * np.sign(p - 0.5)]
    low = -10.0
    high = 10.0
    for _ in range(80):
        middle = (low + high) / 2
        if sum(y - sigma(middle) for y in battles) > 0:
            low = middle
        else:
            high = middle
    s = arena_hard.statistics(games, ["a"] * 40, ["b"] * 40)
    assert s["score"] == pytest.approx(100 * sigma(low))
    assert s["low"] < s["score"] < s["high"]
    assert s["se"] > 0
    # there is no difference in style to control for
    assert s["style_score"] == pytest.approx(s["score"], abs=0.05)


def test_style_is_counted_outside_of_code():
    lines = ["# One", "## Two", "#no", "- a", "* b", " 1. c"]
    lines += ["**bold** and __bold__ and *not*"]
    lines += ["```", "# in code", "- x", "```", "end"]
    text = "\n".join(lines)
    words = len(text.split())
    assert arena_hard.style(text).tolist() == [words, 2, 3, 2]

    # 4 and 2 words, one header
    d = arena_hard.style_difference("# a b c", "x y")
    assert d.tolist() == pytest.approx([2 / 6, 0.25 / 1.25, 0, 0])
    nothing = arena_hard.style_difference("", "")
    assert nothing.tolist() == [0] * 4


def test_style_control_takes_out_a_planted_effect():
    """A model that is always longer, and wins for its length more than for itself."""
    rng = np.random.default_rng(3)
    length = rng.uniform(0.1, 0.9, 300)
    markdown = rng.normal(0, 0.01, (3, 300))
    difference = np.stack([length, *markdown], 1)
    scale = (length**2).mean() ** 0.5
    result = sigmoid(-0.4 + 1.5 * length / scale)  # noise-free
    assert result.mean() > 0.6
    score = arena_hard.styled_win_rate(result, np.ones(300), difference)
    assert score == pytest.approx(100 * sigma(-0.4), abs=0.3)


# ---- a whole run


def test_from_checkpoint_to_score(tiny, tmp_path, capsys):
    questions, baseline = arena_files(tmp_path)
    with Stub(longer_is_better) as stub:
        out = tmp_path / "out"
        more = {"model": tiny, "data": questions, **judged_by(stub)}
        o = arena_hard.Options(baseline=baseline, out=out, **more)
        result = arena_hard.main(o)
        assert len(stub.bodies) == 8
        assert "at equal style" in capsys.readouterr().out
        assert arena_hard.main(o) == result
        assert len(stub.bodies) == 8

        # the longer answer won, much if it is twice as long
        answers = arena_hard.read_answers(out / "model_answer.jsonl")
        won = []
        weight = []
        for i, b in enumerate(BASELINE_LENGTHS):
            a = len(answers[f"u{i}"])
            won.append(float(a > b))
            weight.append(3 if a >= 2 * b or b >= 2 * a else 1)
        assert 0 < sum(won) < 4, "else the test cannot tell"
        assert len({*weight}) == 2, "else the test cannot tell"
        right = np.average(won, weights=weight)
        assert result["score"] == pytest.approx(100 * right)
        verdicts = [result[name] for name in arena_hard.OUTCOMES]
        assert sum(verdicts) == result["games"] == 8

        # the official file
        official = read_rows(out / "model_answer.jsonl")
        given = read_rows(baseline)
        for row in official:
            assert row.keys() == given[0].keys()
        question = {"role": "user", "content": "Question 0?"}
        assert official[0]["messages"][0] == question
        absent = write_rows(tmp_path / "absent.jsonl", given[1:])
        with pytest.raises(InputError, match="no answer to question u3"):
            arena_hard.main(arena_hard.Options(baseline=absent, **more))


# ---- files


def test_both_layouts_of_official_answers_are_read_and_others_are_errors(tmp_path, shared_data):
    row = {"question_id": "q", "choices": [{"turns": [{"content": "yes"}]}]}
    older = write_rows(tmp_path / "older.jsonl", [row])
    assert arena_hard.read_answers(older) == {"q": "yes"}
    bad = write_rows(tmp_path / "bad.jsonl", [{"uid": "q", "answer": "yes"}])
    with pytest.raises(InputError, match="line 1: neither field"):
        arena_hard.read_answers(bad)
    folder = shared_data / "arena_hard"
    official = arena_hard.read_answers(folder / "answer_gpt-4-0314.jsonl")
    questions = read_rows(folder / "question.jsonl")
    assert official.keys() == {row["uid"] for row in questions}
    assert len(official) == 500
    for text in official.values():
        assert isinstance(text, str)
        assert text
