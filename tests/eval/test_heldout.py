"""The held-out evaluation: both numbers by hand, and its stage."""

import json

import pytest
import torch
from conftest import tiny_checkpoint, write_rows
from eval_helpers import FP32

from checkpoint import load
from eval.heldout import evaluate, over_samples, score_heldout
from formats.chat import Chat
from ops.attention import Packed
from plumbing.files import InputError

TEXTS = ["red fox", "a blue owl sings", "no", "the end of it", "so it is"]


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("another") / "model", seed=5)


def rows(responses: list[str]) -> list[dict]:
    texts = enumerate(responses)
    return [{"id": str(i), "prompt": f"Question {i}?", "response": text} for i, text in texts]


def by_hand(model, row) -> float:
    """Mean log-prob of response and end token from all logits, one sequence."""
    chat = Chat(model)
    net = load(model, torch.float32)
    response = chat.response_ids(row["response"])
    ids = torch.tensor(chat.prompt_ids(row) + response)
    T = len(ids)
    logits = net(ids, Packed([T]), torch.arange(T))  # (T, V)
    logps = logits.log_softmax(-1)
    token_logps = logps[torch.arange(T - 1), ids[1:]]
    return token_logps[-len(response) :].mean().item()


def test_win_rate_against_itself_is_one_half(tiny):
    answers = rows(TEXTS)
    assert evaluate(answers, answers, answers, tiny, tiny, FP32)["win_rate"] == 0.5


def test_win_rate_counts_likelier_answers_under_the_base_model(tiny, another):
    """By hand; the model that wrote the answers is another one, and does not matter."""
    ours = rows(TEXTS)
    theirs = rows([TEXTS[0], "x", "the", "qz", "and then"])  # the first is a draw
    wins = []
    for a, b in zip(ours, theirs, strict=True):
        likelier = by_hand(tiny, a) > by_hand(tiny, b)
        wins.append(0.5 if a == b else float(likelier))
    assert {*wins} == {0.0, 0.5, 1.0}
    assert sum(wins) != 2.5, "else the test cannot tell sides"
    win_rate = evaluate(ours, ours, theirs, another, tiny, FP32)["win_rate"]
    assert win_rate == pytest.approx(sum(wins) / 5)
    win_rate = evaluate(theirs, ours, ours, another, tiny, FP32)["win_rate"]
    assert win_rate == pytest.approx(1 - sum(wins) / 5)


def test_score_is_the_likelihood_of_gold_under_the_policy(tiny, another):
    answers = rows(TEXTS)
    gold = rows(TEXTS[::-1])
    values = [by_hand(another, row) for row in gold]
    result = evaluate(answers, gold, answers, another, tiny, FP32)
    mean = sum(values) / 5
    assert result["score"] == pytest.approx(mean, abs=1e-5)
    variance = sum((v - mean) ** 2 for v in values) / 4
    se = (variance / 5) ** 0.5
    assert result["se"] == pytest.approx(se, abs=1e-5)
    other = sum(by_hand(tiny, row) for row in gold) / 5
    assert result["score"] != pytest.approx(other, abs=1e-3)
    words = 2 + 4 + 1 + 4 + 3
    assert result["words"] == pytest.approx(words / 5)


def test_a_heldout_record_beyond_the_context_is_named(tiny, tmp_path):
    """Of the policy's context, and of M_0's."""
    small = tiny_checkpoint(tmp_path / "small", max_position_embeddings=32)
    answers = rows(TEXTS)
    answers[3]["prompt"] = "x" * 40
    problem = "record 3: beyond the context of the scorer's model; remove it"
    for model, base in ((tiny, small), (small, tiny)):
        with pytest.raises(InputError, match=problem):
            evaluate(answers, answers, answers, model, base, FP32)


def test_an_improver_has_no_likelihood_of_its_own(tiny):
    answers = rows(TEXTS)
    result = evaluate(answers, answers, answers, None, tiny, FP32)
    assert result.keys() == {"win_rate", "words"}


def test_answers_of_different_records_are_an_error(tiny):
    answers = rows(TEXTS)
    turned = answers[::-1]
    shorter = answers[:-1]
    for base in (turned, shorter):
        with pytest.raises(ValueError):
            evaluate(answers, answers, base, tiny, tiny, FP32)


# ---- the stage


class Run:
    """The part of loop.py's Options that counts here."""

    def __init__(self, evaluate: str = ""):
        self.run = FP32
        self.evaluate = evaluate


@pytest.fixture
def files(tmp_path) -> dict:
    texts = {"answers": TEXTS, "heldout": TEXTS[::-1], "base_answers": ["x"] * 5}
    paths = {"out": tmp_path / "iter1" / "eval.json"}
    for name, some in texts.items():
        paths[name] = write_rows(tmp_path / f"{name}.jsonl", rows(some))
    return paths


def test_the_stage_writes_what_evaluate_returns(files, tiny, another):
    out = score_heldout(**files, base=tiny, o=Run(), model=another)
    read = [rows(some) for some in (TEXTS, TEXTS[::-1], ["x"] * 5)]
    result = evaluate(*read, another, tiny, FP32)
    assert out == files["out"]
    assert json.loads(out.read_text()) == result
    manifest = json.loads(out.with_suffix(".manifest.json").read_text())
    inputs = {"answers", "base", "base_answers", "heldout", "model"}
    assert manifest["inputs"].keys() == inputs
    for name, value in result.items():
        assert manifest["counts"][name] == round(value, 4)

    # an improver's rewrites have no model
    improver = {**files, "out": out.with_name("eval_improver.json")}
    path = score_heldout(**improver, base=tiny, o=Run())
    assert json.loads(path.read_text()).keys() == {"win_rate", "words"}


PLUGIN = """
from helper import FACTOR

def evaluate(answers, heldout, base_answers, model, base, run):
    assert len(answers) == len(heldout) == len(base_answers) and run.dtype == "float32"
    return {"score": FACTOR * len(answers[0]["response"]), "model": model is None}
"""


def test_a_function_of_the_users_in_its_place(files, tiny, tmp_path, monkeypatch, capsys):
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    helper = tmp_path / "helper.py"
    helper.write_text("FACTOR = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    o = Run(f"{plugin}:evaluate")
    out = score_heldout(**files, base=tiny, o=o)
    assert json.loads(out.read_text()) == {"score": 14, "model": True}
    assert score_heldout(**files, base=tiny, o=o) == out
    assert "eval.json " in capsys.readouterr().out

    # whatever the result follows from is noticed: the plug-in, its neighbour, each file
    read = [files[name] for name in ("answers", "heldout", "base_answers")]
    for path in (plugin, helper, *read):
        before = path.read_text()
        path.write_text(before + "\n")
        with pytest.raises(InputError, match=r"eval\.json: made with input"):
            score_heldout(**files, base=tiny, o=o)
        path.write_text(before)
    with pytest.raises(InputError, match="made with option evaluate"):
        score_heldout(**files, base=tiny, o=Run())


# ---- several responses per prompt

LENGTHS = """
def evaluate(answers, heldout, base_answers, model, base, run):
    for row, gold, base_row in zip(answers, heldout, base_answers, strict=True):
        assert row["id"] == gold["id"] == base_row["id"]
        assert row["prompt"] == gold["prompt"]
    scores = [len(row["response"]) / len(g["response"]) for row, g in zip(answers, heldout)]
    return {"score": sum(scores) / len(scores), "scores": scores}
"""


def several(texts: dict[str, list[str]]) -> list[dict]:
    """Records of all responses to each id, side by side, asked with an improver's prompt."""
    records = []
    for name, some in texts.items():
        for i, text in enumerate(some):
            row = {"id": name, "prompt": "Improve!", "sample": i, "response": text}
            records.append(row)
    return records


def test_best_and_distinct_of_several_responses_by_hand():
    answers = several({"a": ["x", "y", "x"], "b": ["x", "z", "zz"]})
    result = over_samples(answers, [0.2, 0.8, 0.5, 0.0, -1.0, -2.0])
    # a text that answers two prompts counts for both
    assert result["distinct"] == pytest.approx(5 / 6)
    assert result["best"] == pytest.approx((0.8 + 0.0) / 2)
    assert result["scores"] == pytest.approx([0.5, -1.0])
    assert result.keys() == {"best", "distinct", "scores"}


def test_the_stage_joins_several_responses_with_their_gold(tiny, tmp_path):
    """Gold of 2 and 4 letters; an improver's own prompt gives way to the held-out one."""
    gold = [
        {"id": "a", "prompt": "A?", "response": "gg"},
        {"id": "b", "prompt": "B?", "response": "gggg"},
    ]
    base = [{**row, "response": "x"} for row in gold[::-1]]  # joined by id, not by place
    texts = {
        "a": ["x", "xx", "x"],
        "b": ["xxxx", "xxxx", "xx"],
    }
    paths = {
        "out": tmp_path / "eval_samples.json",
        "heldout": write_rows(tmp_path / "heldout.jsonl", gold),
        "base_answers": write_rows(tmp_path / "base_answers.jsonl", base),
        "answers": write_rows(tmp_path / "answers.jsonl", several(texts)),
    }
    plugin = tmp_path / "lengths.py"
    plugin.write_text(LENGTHS)
    o = Run(f"{plugin}:evaluate")
    out = score_heldout(**paths, base=tiny, o=o, model=tiny)
    # scores 0.5, 1, 0.5 and 1, 1, 0.5
    found = json.loads(out.read_text())
    scores = found.pop("scores")
    assert scores == pytest.approx([2 / 3, 2.5 / 3])
    wanted = {"score": 4.5 / 6, "best": 1.0, "distinct": 4 / 6}
    assert found == pytest.approx(wanted)
    manifest = json.loads(out.with_suffix(".manifest.json").read_text())
    assert manifest["counts"].keys() == {*wanted, "seconds"}

    # one response each: the scores stay in the order of the records
    single = several({"b": ["xx"], "a": ["x"]})
    paths["out"] = tmp_path / "eval.json"
    paths["answers"] = write_rows(tmp_path / "one.jsonl", single)
    out = score_heldout(**paths, base=tiny, o=o)
    found = json.loads(out.read_text())
    assert found == {"score": 0.5, "scores": [0.5, 0.5]}
