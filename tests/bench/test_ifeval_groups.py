"""bench/constraints.py: IFEval's types in two groups, by hand, and which types are near."""

import pytest

from bench.constraints import NEAR, answer_rows, ifeval_rows
from demo.constraint_kinds import KINDS
from eval.ifeval import METRICS


def verdict(name: str, instructions: list[str], followed: list[bool], **more) -> dict:
    lists = (METRICS["instruction_strict"], METRICS["instruction_loose"])
    row = {key: all(followed) for key in METRICS.values()}
    row |= dict.fromkeys(lists, followed)
    about = {"cut_off": False, "words": 10, **more}
    return {"id": name, "instructions": instructions, **row, **about}


CAPITALS = "change_case:english_capital"
TITLE = "detectable_format:title"


def test_the_two_groups_by_hand():
    ours = [
        verdict("a", [CAPITALS, TITLE], [True, True]),
        verdict("b", [TITLE], [False]),
        verdict("c", [CAPITALS], [True]),
    ]
    theirs = [
        verdict("a", [CAPITALS, TITLE], [False, True]),
        verdict("b", [TITLE], [True]),
        verdict("c", [CAPITALS], [True]),
    ]
    rows, types = ifeval_rows(ours, theirs)
    near, far = rows[-2:]
    assert len(rows) == len(METRICS) + 2
    assert near["IFEval"] == "near to a trained kind"
    assert near["number"] == 2
    assert near["ours"] == 1
    assert near["theirs"] == 0.5
    assert near["difference"] == 0.5
    assert near["won"] == 1
    assert near["lost"] == 0
    assert far["number"] == 2
    assert far["ours"] == 0.5
    assert far["theirs"] == 1
    assert far["difference"] == pytest.approx(-0.5)
    assert [row["IFEval"] for row in types] == [CAPITALS, TITLE]


def test_what_answers_are_like():
    first = verdict("a", [], [], words=4)
    second = verdict("b", [], [], cut_off=True, words=8)
    [row] = answer_rows({"M_0": [first, second]})
    assert row == {"model": "M_0", "words": 6, "cut off": 1}


def test_every_near_kind_has_its_types_and_no_other():
    named = set()
    for kinds in NEAR.values():
        named |= {*kinds.split(", ")}
    assert named == {name for name, kind in KINDS.items() if kind.near}
