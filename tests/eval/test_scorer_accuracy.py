"""The accuracy of a scorer on labelled pairs: by hand, with two ranks, and on LLMBar."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, last_json, tiny_checkpoint, write_rows

from eval.scorer_accuracy import accuracy, read_labelled, wilson
from plumbing.files import InputError
from plumbing.options import RunOptions
from scorers.classifier import classifier
from scorers.load import load_scorer

FP32 = RunOptions(dtype="float32")


def length(rows: list[dict]) -> list[float]:
    return [float(len(row["response"])) for row in rows]


def judge(better: list[dict], worse: list[dict]) -> list[float]:
    return [0.9, 0.4, 0.5, 0.8]


judge.pairwise = True


def test_accuracy_by_hand(tmp_path, capsys):
    answers = (
        ("aa", "b", 1),
        ("aaa", "b", 2),
        ("a", "b", 2),
        ("a", "bbb", 2),
    )
    path = tmp_path / "labelled.json"
    rows = []
    for one, two, label in answers:
        rows.append({"input": "q", "output_1": one, "output_2": two, "label": label})
    path.write_text(json.dumps(rows))
    expected = [("aa", "b"), ("b", "aaa"), ("b", "a"), ("bbb", "a")]
    assert [(a["response"], b["response"]) for a, b in read_labelled(path)] == expected

    result = accuracy(path, length)  # right, wrong, a draw, right
    assert result["accuracy"] == 2.5 / 4
    assert result["longer"] == 0.5
    assert result["pairs"] == 4
    assert "accuracy on 4 labelled pairs: 0.625" in capsys.readouterr().out
    assert accuracy(path, judge)["accuracy"] == 2.5 / 4
    with pytest.raises(InputError, match="--scorer none scores nothing"):
        accuracy(path, None)


def test_the_interval_by_hand():
    """8 of 10 at z 1.96: (.8 + .19208 +- 1.96 sqrt(.016 + .009604)) / 1.38416."""
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert wilson(0, 5)[0] == 0
    assert wilson(5, 5)[1] == 1


def test_other_layouts(tmp_path):
    for text in ('[{"input": "q"}]', "[]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=r"bad.json: must be a list of \{input, output_1"):
            accuracy(tmp_path / "bad.json", length)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    talk.append({"role": "user", "content": "Bye"})
    rows = [{"messages": talk, "chosen": "See you", "rejected": "x"}]
    assert accuracy(write_rows(tmp_path / "talks.jsonl", rows), length)["accuracy"] == 1


def test_a_labelled_answer_that_cannot_be_scored_is_named(tmp_path):
    def short(rows: list[dict]) -> list[float | None]:
        return [None if len(row["response"]) > 2 else 1.0 for row in rows]

    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    rows.append({"prompt": "q", "chosen": "a", "rejected": "too long"})
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    name = read_labelled(data)[1][0]["id"]
    with pytest.raises(
        InputError,
        match=f"record {name}: beyond the context of the scorer's model; remove it",
    ):
        accuracy(data, short)


@pytest.mark.slow
@pytest.mark.ranks
def test_the_command_with_two_ranks(tmp_path):
    changes = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    model = tiny_checkpoint(tmp_path / "rm", seed=3, id2label={"0": "LABEL_0"}, **changes)
    labelled = []
    for i in range(5):
        labelled.append({"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": "no"})
    data = write_rows(tmp_path / "pairs.jsonl", labelled)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    flags = [f"--scorer={model}", f"--data={data}", "--dtype=float32"]
    command = [sys.executable, *torchrun, "-m", "eval.scorer_accuracy", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    rows = []
    for i in range(5):
        for text in (f"{i}", "no"):
            rows.append({"id": "x", "prompt": f"Say {i}.", "response": text})
    scores = classifier(model, FP32)(rows)
    right = sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True))
    assert last_json(done.stdout)["accuracy"] == right / 5


def test_random_on_real_labels(shared_data):
    scorer = load_scorer("random", "", FP32)
    result = accuracy(shared_data / "llmbar" / "Natural.json", scorer)
    assert result["pairs"] == 100
    assert 0.3 < result["accuracy"] < 0.7
    assert 0 < result["low"] < result["high"] < 1
