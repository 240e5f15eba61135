"""Two checkpoints against each other, by a judge and by a scorer."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import read_rows, tiny_checkpoint, write_rows
from eval_helpers import FP32, judged_by
from eval_helpers import key as key
from stub import Stub, always_first, longer_is_better

from eval import head_to_head


@pytest.fixture
def two(tiny, tmp_path):
    prompts = write_rows(
        tmp_path / "prompts.jsonl", [{"prompt": f"Question {i}?"} for i in range(6)]
    )
    other = tiny_checkpoint(tmp_path / "other", seed=5)
    return {"model": tiny, "against": other, "data": prompts, "out": tmp_path / "out"}


def by_scorer(two: dict, scorer: str, **changes) -> head_to_head.Options:
    options = {**two, "run": FP32, "max_new_tokens": 12, "scorer": scorer}
    return head_to_head.Options(**{**options, **changes})


@pytest.mark.slow
def test_by_a_judge(two, tmp_path):
    with Stub(longer_is_better) as stub:
        o = head_to_head.Options(**two, **judged_by(stub))
        result = head_to_head.main(o)
        ours = read_rows(two["out"] / "answers.jsonl")
        theirs = read_rows(two["out"] / "against.jsonl")
        wins = []
        for a, b in zip(ours, theirs, strict=True):
            gap = len(a["response"]) - len(b["response"])
            wins.append(0.5 + 0.5 * np.sign(gap))
        assert 0 < sum(wins) < 6, "else the test cannot tell sides"
        assert sum(wins) != 3, "else the test cannot tell sides"
        assert result["score"] == pytest.approx(100 * sum(wins) / 6)
        se = np.std(wins, ddof=1) / 6**0.5
        assert result["se"] == pytest.approx(100 * se)
        assert result["wins"] == wins.count(1)
        assert result["draws"] == wins.count(0.5)
        assert result["losses"] == wins.count(0)

        # the other way around, and against itself
        turned = head_to_head.main(
            replace(o, model=o.against, against=o.model, out=tmp_path / "swapped")
        )
        assert turned["score"] == pytest.approx(100 - result["score"])
        asked = len(stub.bodies)
        itself = head_to_head.main(replace(o, against=o.model, out=tmp_path / "alone"))
        assert itself["score"] == 50
        assert itself["draws"] == 6
        assert len(stub.bodies) == asked


def test_a_lost_comparison_is_a_draw_and_a_slight_win_counts_as_one(two):
    def reply(body: dict):
        return "?" if "Question 0" in body["messages"][-1]["content"] else always_first(body)

    with Stub(reply) as stub:
        result = head_to_head.main(head_to_head.Options(**two, limit=2, **judged_by(stub)))
    assert result["score"] == 50
    assert result["malformed"] == 2
    assert result["prompts"] == 2
    for p in (1.0, 0.75, 0.51):
        assert head_to_head.win(p) == 1
    for p in (0.25, 0.0):
        assert head_to_head.win(p) == 0
    assert head_to_head.win(0.5) == 0.5
    assert head_to_head.win(None) == 0.5


def test_answers_that_the_scorer_cannot_read_are_a_draw_and_counted(two, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "def first(rows):\n    return [1.0 if '0' in r['prompt'] else None for r in rows]\n"
    )
    result = head_to_head.main(by_scorer(two, f"{plugin}:first", limit=3))
    assert (result["score"], result["draws"], result["not_scored"]) == (50, 3, 2)


def test_by_a_scorer(two, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text("def count(rows):\n    return [float(len(r['response'])) for r in rows]\n")
    result = head_to_head.main(by_scorer(two, f"{plugin}:count"))
    assert "judge_usd" not in result
    with Stub(longer_is_better) as stub:
        by_judge = head_to_head.main(head_to_head.Options(**two, **judged_by(stub)))
    assert by_judge["score"] == result["score"]
    likely = head_to_head.main(by_scorer(two, "likelihood"))
    assert likely["prompts"] == 6
    assert likely["score"] < 50, "the other's own words are likelier under it"
    under_ours = by_scorer(two, "likelihood", base=two["model"])
    assert head_to_head.main(under_ours)["score"] > 50
