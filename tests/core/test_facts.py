"""The world of facts as a user's plug-in: its evaluation, its scorer, its data."""

import pytest

from demo import facts
from demo import facts_world as world
from formats.records import read_jsonl
from plumbing.options import RunOptions

FP32 = RunOptions(dtype="float32")


def score_of(row: dict) -> float:
    return world.rubric(row["prompt"], row["response"])["score"]


def test_evaluation_of_hand_made_answers():
    prompts = [
        "Describe a tiger.",
        "Where does a fox live?",
        "Describe a lion.",
        "Describe an owl.",
    ]
    gold = []
    for i, prompt in enumerate(prompts):
        response = world.gold(world.parse(prompt))
        gold.append({"id": str(i), "prompt": prompt, "response": response})
    result = facts.evaluate(gold, gold, gold, None, None, FP32)
    wanted = {"score": 1, "coverage": 1, "accuracy": 1, "form": 1, "se": 0}
    found = {name: result[name] for name in wanted}
    assert found == pytest.approx(wanted)
    words = [len(row["response"].split()) for row in gold]
    assert result["words"] == sum(words) / 4

    # two of the answers say nothing
    half = gold[:2]
    half += [{**row, "response": "um"} for row in gold[2:]]
    marks = [score_of(row) for row in half]
    assert marks[:2] == [1, 1]
    assert max(marks[2:]) < 0.3
    result = facts.evaluate(half, gold, gold, None, None, FP32)
    mean = sum(marks) / 4
    assert result["score"] == pytest.approx(mean)
    variance = sum((mark - mean) ** 2 for mark in marks) / 3
    assert result["se"] == pytest.approx((variance / 4) ** 0.5)
    assert facts.score(half) == pytest.approx(marks)
    unknown = {"prompt": "Describe a unicorn.", "response": gold[0]["response"]}
    assert facts.score([unknown]) == [0.0]


def test_the_data_keeps_held_out_prompts_out(tmp_path, monkeypatch):
    few = {"WEB": 400, "PARAGRAPHS": 20, "PRACTICE": 200, "ASKING": 40, "CORPUS": 50}
    for name, number in few.items():
        monkeypatch.setattr(facts, name, number)
    facts.write_data(tmp_path, 0)
    rows = {}
    for name in ("seeds", "heldout", "base"):
        rows[name] = read_jsonl(tmp_path / f"{name}.jsonl", "prompt", "response")
    hidden = {row["prompt"] for row in rows["heldout"]}
    assert len(hidden) == 150
    assert len(rows["heldout"]) == 150
    assert len(rows["seeds"]) == 100
    assert len(rows["base"]) > 500
    known = rows["seeds"] + rows["base"]
    assert not hidden & {row["prompt"] for row in known}

    # M_0's practice in asking holds no held-out prompt either
    practice = [row for row in rows["base"] if row["prompt"].startswith("Ask something")]
    asked = [row["response"] for row in practice]
    assert asked
    for text in asked:
        assert text.startswith("<question>")
        assert text.endswith("</question>")
        question = text.removeprefix("<question>").removesuffix("</question>")
        assert question not in hidden
    assert {score_of(row) for row in rows["seeds"]} == {1.0}
