"""MT-Bench: grades, their means, what is asked, and whole runs."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import last_json, read_rows, tiny_checkpoint, write_rows
from eval_helpers import FP32, judged_by, mt_files, run_module
from eval_helpers import key as key
from stub import Stub

from eval import mt_bench
from formats.records import messages_of
from plumbing.files import InputError
from scorers import llm_judge

# ---- grades

GRADES = [
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
]


@pytest.mark.parametrize(("text", "grade"), GRADES)
def test_grades(text, grade):
    assert mt_bench.read_grade({"text": text}) == grade


def test_grades_are_averaged_by_turn_and_lost_ones_left_out():
    s = mt_bench.statistics([(8.0, 4.0), (6.0, None), (None, None), (1.0, 3.0)])
    assert s["score"] == pytest.approx(22 / 5)
    assert s["turn_1"] == 5
    assert s["turn_2"] == 3.5
    assert s["se"] == pytest.approx(np.std([6, 6, 2], ddof=1) / 3**0.5)
    assert mt_bench.statistics([(5.0, None)]) == {"score": 5, "se": 0, "turn_1": 5}


# ---- whole runs


def grade_by_prompt(body: dict) -> str:
    """9 where there is a reference, else 4."""
    text = body["messages"][1]["content"]
    return "[[9]]" if text.startswith("single-math") else "[[4]]"


@pytest.mark.slow
def test_from_checkpoint_to_score(tiny, tmp_path, capsys):
    data, out = mt_files(tmp_path), tmp_path / "out"
    with Stub(grade_by_prompt) as stub:
        o = mt_bench.Options(model=tiny, data=data, out=out, **judged_by(stub))
        result = mt_bench.main(o)
        assert mt_bench.main(o) == result
        assert len(stub.bodies) == 8
    assert result["score"] == pytest.approx((9 + 9 + 6 * 4) / 8)
    assert result["math"] == 9
    assert result["stem"] == 4
    assert result["questions"] == 4
    assert result["se"] == pytest.approx(np.std([4, 9, 4, 4], ddof=1) / 2)
    assert re.search(r"math +9.000 +9.000 +9.000", capsys.readouterr().out)

    # what the judge was asked
    rows = read_rows(out / "model_answer.jsonl")
    answers = {row["question_id"]: row["choices"][0]["turns"] for row in rows}
    asked = [body["messages"][1]["content"] for body in stub.bodies]
    a, b = answers[82]
    assert f"single-math-v1: First 1?|REF1|{a}" in asked
    assert f"single-math-v1-multi-turn: First 1?|REF1|Then 1?|REF2|{a}|{b}" in asked
    a, b = answers[81]
    assert f"single-v1: First 0?|{a}" in asked
    assert f"single-v1-multi-turn: First 0?|{a}|Then 0?|{b}" in asked


@pytest.mark.slow
def test_the_second_turn_follows_the_first_by_temperature(tiny, tmp_path):
    out = tmp_path / "out"
    o = mt_bench.Options(run=FP32, model=tiny, data=mt_files(tmp_path), max_new_tokens=12)
    questions, _ = mt_bench.read_data(o)
    mt_bench.converse(o, questions, out)
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


@pytest.mark.slow
def test_a_local_model_judges_a_benchmark(tiny, tmp_path, monkeypatch):
    """Its replies are noise that no end token ends, so they are given an end, and what reads them
    is replaced: a longer reply is a better grade.
    """
    generate = llm_judge.generate

    def ended(model, rows, out, *more):
        generate(model, rows, out, *more)
        write_rows(out, [{**row, "finish_reason": "stop"} for row in read_rows(out)])

    monkeypatch.setattr(llm_judge, "generate", ended)
    monkeypatch.setattr(mt_bench, "read_grade", lambda reply: 1 + len(reply["text"]) % 10)
    out = tmp_path / "out"
    o = mt_bench.Options(
        run=FP32,
        model=tiny,
        data=mt_files(tmp_path),
        out=out,
        judge=str(tiny),
        judge_tokens=8,
        max_new_tokens=12,
    )
    result = mt_bench.main(o)
    texts = [row["text"] for row in read_rows(out / "verdicts.jsonl")]
    grades = [1 + len(text) % 10 for text in texts]
    assert len(texts) == 8
    assert result["score"] == pytest.approx(sum(grades) / 8)
    monkeypatch.setattr(llm_judge, "generate", lambda *args, **kw: pytest.fail("was judged before"))
    assert mt_bench.main(o) == result


@pytest.mark.slow
def test_the_command_prints_a_table_then_json_and_its_default_place_is_in_the_model(tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    with Stub(lambda body: "[[5]]") as stub:
        judged_by(stub)
        flags = ["--model", model, "--data", mt_files(tmp_path), "--judge", "stub"]
        flags += ["--base-url", stub.url, "--dtype", "float32", "--max-new-tokens", 12]
        code, out, errors = run_module("eval.mt_bench", flags)
    assert code == 0, errors
    assert last_json(out)["score"] == 5
    assert "extraction" in out.splitlines()[-3]
    assert (model / "eval/mt_bench/result.json").is_file()


# ---- files


def test_prompts_are_its_own(tmp_path):
    o = mt_bench.Options(model=tmp_path, data=tmp_path, judge_prompt="mine.txt")
    with pytest.raises(InputError, match="--judge-prompt: MT-Bench's prompts are those of --data"):
        mt_bench.read_data(o)


def test_official_files(shared_data, tmp_path):
    o = mt_bench.Options(model=tmp_path, data=shared_data / "mt_bench")
    questions, prompts = mt_bench.read_data(o)
    official = read_rows(o.data / "reference_answer_gpt-4.jsonl")
    references = {row["question_id"]: row["choices"][0]["turns"] for row in official}
    assert len(questions) == 80
    assert len(references) == 30
    for row in questions:
        reference = references.get(row["question_id"])
        assert row.get("ref_answer") == reference
        assert bool(reference) == (row["category"] in mt_bench.WITH_REFERENCE)
        for turn in (1, 2):
            answers = ["ANSWER ONE", "ANSWER TWO"]
            request = mt_bench.to_request(prompts, row, turn, answers)
            system, user = request.messages
            assert row["turns"][turn - 1] in user["content"]
            assert "ANSWER ONE" in user["content"]
            assert ("ANSWER TWO" in user["content"]) == (turn == 2)
            assert not re.search(r"\{(question|answer|ref_answer)\w*\}", user["content"])
            assert bool(reference) == ("eference answer" in user["content"].lower())
            assert system["role"] == "system"
    few, _ = mt_bench.read_data(replace(o, limit=8))
    categories = dict.fromkeys(row["category"] for row in questions)
    assert [row["category"] for row in few] == list(categories)
    more, _ = mt_bench.read_data(replace(o, limit=100))
    assert more == questions


def test_what_its_files_lack_is_named(tiny, tmp_path):
    data = mt_files(tmp_path)
    o = mt_bench.Options(model=tiny, data=data, judge="x")
    other = {"question_id": 81, "choices": [{"turns": ["a", "b"]}]}
    write_rows(data / "reference_answer_gpt-4.jsonl", [other])
    with pytest.raises(InputError, match="no two answers to question 82"):
        mt_bench.main(o)
    write_rows(data / "question.jsonl", [{"question_id": 1, "turns": ["a", "b"]}])
    with pytest.raises(InputError, match=r"question.jsonl: line 1: field 'category' is missing"):
        mt_bench.main(o)
