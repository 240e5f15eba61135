"""bench/lm_eval.py: both models give the same numbers on small tasks."""

import json
from pathlib import Path

import pytest
from bench_helpers import run_bench
from conftest import last_json, tiny_checkpoint, write_rows

from bench import lm_eval
from plumbing.records import rng

WORDS = "the sampler writes answers of a list prompts some rows at time finished takes once".split()


def text(seed, words: int) -> str:
    r = rng("words", seed)
    return " ".join(r.choice(WORDS) for _ in range(words))


@pytest.fixture
def tasks(tmp_path) -> Path:
    """Small files of MMLU and GSM8K, in the layouts of the Hub."""
    folder = tmp_path / "tasks"
    for split, n in (("dev", 5), ("test_few", 3)):
        rows = []
        for i in range(n):
            for subject in ("anatomy", "virology"):
                question = {"question": text((split, subject, i), 4), "subject": subject}
                choices = [text((i, label), 3) for label in "ABCD"]
                rows.append({**question, "choices": choices, "answer": i % 4})
        write_rows(folder / f"mmlu_{split}.jsonl", rows)
    rows = [{"question": text(i, 6), "answer": f"{i} rows\n#### {i}"} for i in range(12)]
    write_rows(folder / "gsm8k_test.jsonl", rows)
    return folder


@pytest.mark.slow
def test_the_bench_compares_both_models(tasks, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -r requirements-eval.txt")
    pytest.importorskip("transformers", reason="needs transformers")
    roomy = tiny_checkpoint(tmp_path / "roomy", max_position_embeddings=4096)
    flags = ["--model", roomy, "--data", tasks, "--out", tmp_path / "out", "--limit", 2]
    flags += ["--subjects", 1, "--tasks", "mmlu,gsm8k", "--json", tmp_path / "figures.json"]
    code, out, errors = run_bench("lm_eval", flags)
    assert code == 0, errors
    result = last_json(out)
    assert (result["tasks"], result["same_scores"]) == (2, 2)
    assert result["largest_difference"] < 1e-3 and result["ratio"] > 0 and result["CPU_ratio"] > 0
    # the rows as they are measured, and as they are kept
    rows = [json.loads(line) for line in errors.splitlines() if line.startswith('{"task"')]
    assert [row["requests"] for row in rows] == [8, 2]
    assert all(row["greedy differs"] == row["texts differ"] == 0 for row in rows)
    kept = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert [row["task"] for row in kept] == ["mmlu", "gsm8k"]


def test_differences_are_counted():
    theirs = [(-1.0, True), (-2.0, False), "a", "b"]
    ours = [(-1.5, True), (-2.0, True), "a", "c"]
    assert lm_eval.difference(theirs, ours) == {
        "requests": 4,
        "largest difference": 0.5,
        "greedy differs": 1,
        "texts differ": 1,
    }
    assert lm_eval.difference(["a"], ["a"])["largest difference"] == 0


def test_seconds_are_of_the_models_own_work():
    class Model:
        def loglikelihood(self, requests):
            return requests

        def generate_until(self, requests):
            return sum(range(100_000))

    clocked = lm_eval.Clocked(Model())
    assert clocked.model.loglikelihood([1]) == [1] and clocked.model.generate_until([]) > 0
    assert clocked.seconds["wall"] > 0 and clocked.seconds["CPU"] > 0
    assert clocked.seconds.keys() == {"wall", "CPU"}
