"""The Open LLM Leaderboard on small files, against lm_eval's own model."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from conftest import last_json, read_rows, tiny_checkpoint, write_rows
from eval_helpers import FP32, run_module, text

from eval import leaderboard
from eval.lm_eval_adapter import Harness, evaluate
from plumbing.files import InputError

LABELS = ["A", "B", "C", "D"]
NEEDS_LM_EVAL = "needs lm_eval: pip install -r requirements-eval.txt"


def choices(key) -> list[str]:
    return [text((key, label), 3) for label in LABELS]


@pytest.fixture
def tasks(tmp_path) -> Path:
    """Small files of all tasks but HellaSwag, in the layouts of the Hub."""
    pytest.importorskip("lm_eval", reason=NEEDS_LM_EVAL)
    folder = tmp_path / "tasks"
    for split, n in (("train", 40), ("test", 5)):
        rows = []
        for i in range(n):
            row = {
                "id": f"{split}{i}",
                "question": text((split, i), 3),
                "choices": {"text": choices(i), "label": LABELS},
                "answerKey": LABELS[i % 4],
            }
            rows.append(row)
        write_rows(folder / f"arc_challenge_{split}.jsonl", rows)
    rows = []
    for i in range(5):
        truths = {"choices": choices(i), "labels": [1, 0, 1, 0]}
        rows.append({"question": text(i, 5), "mc1_targets": truths, "mc2_targets": truths})
    write_rows(folder / "truthfulqa_mc.jsonl", rows)
    for split, n in (("dev", 5), ("test_few", 3)):
        rows = []
        for i in range(n):
            for subject in ("anatomy", "virology"):
                row = {
                    "question": text((split, subject, i), 4),
                    "subject": subject,
                    "choices": choices(i),
                    "answer": i % 4,
                }
                rows.append(row)
        write_rows(folder / f"mmlu_{split}.jsonl", rows)
    rows = []
    for i in range(12):
        row = {
            "sentence": f"{text(i, 4)} _ {text(-i, 4)}",
            "option1": "row",
            "option2": "list",
            "answer": str(i % 2 + 1),
        }
        rows.append(row)
    write_rows(folder / "winogrande_dev.jsonl", rows)
    rows = [{"question": text(i, 6), "answer": f"{i} rows\n#### {i}"} for i in range(12)]
    write_rows(folder / "gsm8k_test.jsonl", rows)
    return folder


def options(model: Path, files: Path, out: Path, **changes) -> leaderboard.Options:
    given = {"model": model, "data": files, "out": out, "limit": 3, "batch_tokens": 2000}
    return leaderboard.Options(run=FP32, **{**given, **changes})


@pytest.fixture
def roomy(tmp_path) -> Path:
    """A checkpoint with room for 25 examples."""
    return tiny_checkpoint(tmp_path / "roomy", max_position_embeddings=4096)


def manager_of(out: Path, task: str):
    """lm_eval's TaskManager of the definitions that the leaderboard wrote."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(out / "tasks" / task), include_defaults=False)


def check_samples(theirs: list[dict], ours: list[dict], name: str) -> None:
    """The same was asked, and answered alike."""
    shots = leaderboard.TASKS[name].shots
    for a, b in zip(theirs, ours, strict=True):
        assert a["arguments"] == b["arguments"]
        for [x], [y] in zip(a["resps"], b["resps"], strict=True):
            if name == "gsm8k":
                assert x == y
            else:
                assert x[0] == pytest.approx(y[0], abs=1e-3)
                assert x[1] == y[1]
        if name in ("arc_challenge", "mmlu", "gsm8k"):
            asked = b["arguments"][0][0]
            assert asked.count("Answer:") == shots + 1


@pytest.mark.slow
def test_the_numbers_are_those_of_lm_eval(roomy, tasks, tmp_path, capsys):
    pytest.importorskip("transformers", reason="needs transformers")
    from lm_eval.models.huggingface import HFLM

    out = tmp_path / "out"
    result = leaderboard.main(options(roomy, tasks, out))
    table = capsys.readouterr().out
    assert "hellaswag left out: no hellaswag_validation" in table
    assert "mmlu_dev.jsonl" in table
    names = ["arc_challenge", "truthfulqa_mc2", "mmlu", "winogrande", "gsm8k"]
    assert [*result] == ["score", "se", *names, "tasks"]
    assert result["tasks"] == 5
    mean = sum(result[name] for name in names) / 5
    assert result["score"] == pytest.approx(mean, abs=1e-4)

    peer = HFLM(pretrained=str(roomy), dtype="float32", device="cpu", batch_size=2)
    us = Harness(roomy, FP32, 2000)
    for name in names:
        parts = sorted(path.stem for path in (out / "tasks" / name).glob("*.yaml"))
        wanted = ["mmlu_anatomy", "mmlu_virology"] if name == "mmlu" else [name]
        assert parts == wanted
        manager = manager_of(out, name)
        theirs = evaluate(peer, parts, manager, 3)
        ours = evaluate(us, parts, manager, 3)
        metric = leaderboard.TASKS[name].metric
        scores = [leaderboard.headline(theirs, part, metric)[0] for part in parts]
        mean = sum(scores) / len(scores)
        assert result[name] == pytest.approx(mean, abs=1e-4), name
        for part in parts:
            check_samples(theirs["samples"][part], ours["samples"][part], name)
    questions = {}
    for line in table.splitlines():
        cells = line.split()
        if cells[:1] in (["gsm8k"], ["mmlu"]):
            questions[cells[0]] = cells[3]
    assert questions == {"mmlu": "6", "gsm8k": "3"}


@pytest.mark.slow
def test_the_question_itself_is_never_an_example(roomy, tasks, tmp_path):
    out = tmp_path / "out"
    leaderboard.main(options(roomy, tasks, out, tasks="gsm8k"))
    manager = manager_of(out, "gsm8k")
    found = evaluate(Harness(roomy, FP32), ["gsm8k"], manager, 12)
    samples = [s for s in found["samples"]["gsm8k"] if s["filter"] == "strict-match"]
    assert len(samples) == 12
    for sample in samples:
        question = sample["doc"]["question"]
        prompt = sample["arguments"][0][0]
        assert prompt.count(f"Question: {question}\n") == 1
        assert prompt.count("Question:") == 6


def test_hellaswag_runs_on_local_files_too(roomy, tmp_path):
    pytest.importorskip("lm_eval", reason=NEEDS_LM_EVAL)
    for split, n in (("train", 15), ("validation", 4)):
        rows = []
        for i in range(n):
            row = {
                "activity_label": "Reading",
                "label": str(i % 4),
                "ctx_a": text((split, i), 4),
                "ctx_b": text((i, split), 2),
                "endings": [text((split, i, c), 3) for c in LABELS],
            }
            rows.append(row)
        write_rows(tmp_path / f"hellaswag_{split}.jsonl", rows)
    out = tmp_path / "out"
    o = options(roomy, tmp_path, out, tasks="hellaswag")
    assert 0 <= leaderboard.main(o)["hellaswag"] <= 1
    manager = manager_of(out, "hellaswag")
    found = evaluate(Harness(roomy, FP32), ["hellaswag"], manager, 3)
    samples = found["samples"]["hellaswag"]
    assert [len(sample["arguments"]) for sample in samples] == [4] * 3
    context = samples[0]["arguments"][0][0]
    assert context.count("Reading: ") == 11
    asked = context.split("\n\n")[-1]
    assert asked.startswith(f"Reading: {text(('validation', 0), 4)}")


def test_a_finished_task_is_not_run_again(roomy, tasks, tmp_path, monkeypatch):
    o = options(roomy, tasks, tmp_path / "out", tasks="winogrande,truthfulqa_mc2")
    calls = []

    def dies(model, names, *rest):
        calls.append(names)
        if names == ["truthfulqa_mc2"] and len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(model, names, *rest)

    monkeypatch.setattr(leaderboard, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        leaderboard.main(o)
    result = leaderboard.main(o)
    assert calls == [["winogrande"], ["truthfulqa_mc2"], ["truthfulqa_mc2"]]
    assert leaderboard.main(o) == result
    assert len(calls) == 3
    with pytest.raises(InputError, match="limit"):
        leaderboard.main(replace(o, tasks="winogrande", limit=2))


def draw() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_random_numbers_go_on_as_if_nothing_had_been(roomy, tasks, tmp_path):
    python_state = random.getstate()
    numpy_state = numpy.random.get_state()
    torch_state = torch.get_rng_state()
    wanted = draw()
    random.setstate(python_state)
    numpy.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)
    leaderboard.main(options(roomy, tasks, tmp_path / "out", tasks="winogrande"))
    assert draw() == wanted


def test_missing_data_and_unknown_tasks_are_named(roomy, tasks, tmp_path):
    cases = [
        ({"data": tmp_path / "no"}, "no such directory"),
        ({"tasks": "hellaswag"}, "no file of hellaswag"),
        ({"tasks": "no_such_task"}, "no such task"),
    ]
    for changes, what in cases:
        with pytest.raises(InputError, match=what):
            leaderboard.main(options(roomy, tasks, tmp_path / "out", **changes))


def test_subjects_of_other_data_are_not_asked(tasks, tmp_path):
    o = options(tmp_path, tasks, tmp_path / "out")
    mmlu = leaderboard.TASKS["mmlu"]

    def names() -> list[str]:
        return [*leaderboard.define("mmlu", leaderboard.files_of(mmlu, o), o)]

    assert names() == ["mmlu_anatomy", "mmlu_virology"]
    for path in tasks.glob("mmlu_*.jsonl"):
        kept = [row for row in read_rows(path) if row["subject"] == "anatomy"]
        write_rows(path, kept)
    assert names() == ["mmlu_anatomy"]
    path.write_text(path.read_text() + "\n\n")
    with pytest.raises(InputError, match=f"{path.name}: line .* is not valid JSON"):
        names()


@pytest.mark.slow
@pytest.mark.ranks
def test_two_processes_give_the_numbers_of_one(roomy, tasks, tmp_path):
    names = ("mmlu", "winogrande", "gsm8k")
    few = {"tasks": ",".join(names), "batch_tokens": 500, "slots": 1}
    one = leaderboard.main(options(roomy, tasks, tmp_path / "one", **few))
    flags = ["--model", roomy, "--data", tasks, "--out", tmp_path / "two"]
    flags += ["--dtype", "float32", "--tasks", ",".join(names)]
    flags += ["--limit", 3, "--batch-tokens", 500, "--slots", 1]
    code, out, errors = run_module("eval.leaderboard", flags, nproc=2)
    assert code == 0, errors
    two = last_json(out)
    assert {name: two[name] for name in one} == one
    for name in names:
        found = []
        for folder in ("one", "two"):
            text = (tmp_path / folder / f"{name}.json").read_text()
            found.append(json.dumps(json.loads(text)["results"], sort_keys=True))
        assert found[0] == found[1]
